"""Where the objects are: in memory, with uid, resourceVersion and owners; found by selectors."""

import itertools
import re
import uuid
from collections.abc import Iterator
from copy import deepcopy
from datetime import UTC, datetime
from typing import Any

from .errors import bad_request
from .kinds import BY_NAME, Kind

Object = dict[str, Any]
Key = tuple[str, str, str]

_REQUIREMENT = re.compile(
    r"(?P<set>[^\s!=,]+) +(?P<verb>in|notin) +\((?P<values>[^)]*)\)"
    r"|(?P<not>!?)(?P<key>[^\s!=,]+)(?: *(?P<op>==|=|!=) *(?P<value>[^,]*))?"
)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def kind_of(obj: Object) -> Kind:
    return BY_NAME[obj["kind"]]


def key_of(obj: Object) -> Key:
    meta = obj["metadata"]
    return obj["kind"], meta.get("namespace", ""), meta["name"]


class Store:
    """All objects. What it hands out is its own: callers copy before they change."""

    def __init__(self) -> None:
        self._objects: dict[Key, Object] = {}
        self._count = 0
        self._numbers = itertools.count()
        self.by_client: set[str] = set()  # uids of what clients created

    @property
    def revision(self) -> str:
        return str(self._count)

    def _next(self) -> str:
        self._count += 1
        return str(self._count)

    def stamp(self, obj: Object) -> None:
        """Give a new object what the API gives it. Uids are the same in every run."""
        meta = obj["metadata"]
        meta["uid"] = str(uuid.uuid5(uuid.NAMESPACE_OID, str(next(self._numbers))))
        meta["creationTimestamp"] = now()
        if kind_of(obj).has_generation:
            meta["generation"] = 1

    def get(self, kind: str, namespace: str, name: str) -> Object | None:
        return self._objects.get((kind, namespace, name))

    def select(self, kind: str | None = None, namespace: str = "") -> list[Object]:
        """The objects of a kind and namespace (or all), sorted as the API sorts them."""
        return [
            obj
            for (its_kind, its_namespace, _), obj in sorted(self._objects.items())
            if kind in {None, its_kind} and namespace in {"", its_namespace}
        ]

    def put(self, obj: Object) -> Object:
        """Store `obj`. One that is the same as what is there keeps its resourceVersion."""
        old = self._objects.get(key_of(obj))
        if old is None or _content(old) != _content(obj):
            obj["metadata"]["resourceVersion"] = self._next()
            self._objects[key_of(obj)] = obj
            return obj
        return old

    def create(self, obj: Object) -> Object:
        self.stamp(obj)
        return self.put(obj)

    def set_status(self, obj: Object, **status: Any) -> Object:
        return self.put(deepcopy(obj) | {"status": obj.get("status", {}) | status})

    def remove(self, obj: Object) -> None:
        """Take an object away; one with finalizers stays, marked, until they are gone."""
        if obj["metadata"].get("finalizers"):
            marked = deepcopy(obj)
            marked["metadata"].setdefault("deletionTimestamp", now())
            marked["metadata"].setdefault("deletionGracePeriodSeconds", 0)
            self.put(marked)
        elif self._objects.pop(key_of(obj), None):
            self._next()

    def owned(self, owner: Object, kind: str) -> list[Object]:
        uid = owner["metadata"]["uid"]
        return [o for o in self.select(kind, owner["metadata"]["namespace"]) if uid in owners(o)]

    def disown(self, owner: Object) -> None:
        """Take the references to their owner from what an object owns."""
        uid = owner["metadata"]["uid"]
        for obj in [o for o in self._objects.values() if uid in owners(o)]:
            free = deepcopy(obj)
            refs = free["metadata"].pop("ownerReferences")
            if others := [ref for ref in refs if ref["uid"] != uid]:
                free["metadata"]["ownerReferences"] = others
            self.put(free)

    def collect_garbage(self) -> None:
        """Remove what has lost its owners, and what that owned."""
        while True:
            uids = {obj["metadata"]["uid"] for obj in self._objects.values()}
            lost = [o for o in self.select() if owners(o) and not uids & set(owners(o))]
            lost = [o for o in lost if "deletionTimestamp" not in o["metadata"]]
            if not lost:
                return
            for obj in lost:
                self.remove(obj)


def owners(obj: Object) -> list[str]:
    return [ref["uid"] for ref in obj["metadata"].get("ownerReferences", [])]


def _content(obj: Object) -> Object:
    meta = {k: v for k, v in obj["metadata"].items() if k != "resourceVersion"}
    return obj | {"metadata": meta}


def label_filter(selector: str, labels: Object) -> bool:
    """https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#label-selectors"""
    return all(_holds(requirement, labels) for requirement in _requirements(selector))


def _requirements(selector: str) -> Iterator[re.Match[str]]:
    rest = selector.strip()
    while rest:
        match = _REQUIREMENT.match(rest)
        if not match:
            raise bad_request(f'unable to parse requirement: "{rest}"')
        yield match
        rest = rest[match.end() :].strip()
        if rest and not rest.startswith(","):
            raise bad_request(f'unable to parse requirement: "{rest}"')
        rest = rest.removeprefix(",").strip()


def _holds(match: re.Match[str], labels: Object) -> bool:
    if match["set"]:
        values = {value.strip() for value in match["values"].split(",")}
        return (labels.get(match["set"]) in values) == (match["verb"] == "in")
    if match["op"]:
        return (labels.get(match["key"]) == match["value"].strip()) == (match["op"] != "!=")
    return (match["key"] in labels) != bool(match["not"])


def field_filter(kind: Kind, selector: str, obj: Object) -> bool:
    """https://kubernetes.io/docs/concepts/overview/working-with-objects/field-selectors/"""
    for part in filter(None, selector.split(",")):
        match = re.fullmatch(r"\s*([^=!]+?)\s*(==|=|!=)\s*(.*?)\s*", part)
        if not match:
            raise bad_request(f'invalid selector: "{part}"; can\'t understand it')
        path, operator, wanted = match.groups()
        if path not in {"metadata.name", "metadata.namespace", *kind.fields}:
            raise bad_request(f"field label not supported: {path}")
        value: Any = obj
        for name in path.split("."):
            value = value.get(name, "") if isinstance(value, dict) else ""
        if (str(value) == wanted) == (operator == "!="):
            return False
    return True
