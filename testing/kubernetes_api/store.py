"""Where the objects are: in memory, with uid, resourceVersion and owners; found by selectors."""

import re
import uuid
from copy import deepcopy
from datetime import UTC, datetime
from typing import Any

from .errors import bad_request
from .kinds import BY_NAME, Kind

Object = dict[str, Any]
Key = tuple[str, str, str]


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def kind_of(obj: Object) -> Kind:
    return BY_NAME[obj["kind"]]


def key_of(obj: Object) -> Key:
    meta = obj["metadata"]
    return obj["kind"], meta.get("namespace", ""), meta["name"]


class Store:
    """All objects. What it returns is its own: callers copy before they change it."""

    def __init__(self) -> None:
        self._objects: dict[Key, Object] = {}
        self.revision = 0
        self.by_client: set[str] = set()  # uids of what clients created

    def stamp(self, obj: Object) -> None:
        """Give a new object what the API gives it."""
        meta = obj["metadata"]
        meta |= {"uid": str(uuid.uuid4()), "creationTimestamp": now()}
        if kind_of(obj).has_generation:
            meta["generation"] = 1

    def get(self, kind: str, namespace: str, name: str) -> Object | None:
        return self._objects.get((kind, namespace, name))

    def select(self, kind: str | None = None, namespace: str = "") -> list[Object]:
        """Return the objects of a kind and namespace (or of all), sorted as the API sorts them."""
        return [
            obj
            for (its_kind, its_namespace, _), obj in sorted(self._objects.items())
            if kind in {None, its_kind} and namespace in {"", its_namespace}
        ]

    def put(self, obj: Object) -> Object:
        """Store `obj`. One that equals what is there keeps its resourceVersion."""
        old = self._objects.get(key_of(obj))
        if old is None or _content(old) != _content(obj):
            self.revision += 1
            obj["metadata"]["resourceVersion"] = str(self.revision)
            self._objects[key_of(obj)] = obj
            return obj
        return old

    def set_status(self, obj: Object, **status: Any) -> Object:
        return self.put(deepcopy(obj) | {"status": obj.get("status", {}) | status})

    def remove(self, obj: Object) -> None:
        """Take an object away; one with finalizers stays, marked, until they are gone."""
        if obj["metadata"].get("finalizers"):
            marked = deepcopy(obj)
            marked["metadata"].setdefault("deletionTimestamp", now())
            self.put(marked)
        else:
            self._objects.pop(key_of(obj), None)

    def owned(self, owner: Object, kind: str) -> list[Object]:
        uid = owner["metadata"]["uid"]
        return [o for o in self.select(kind, owner["metadata"]["namespace"]) if uid in owners(o)]

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
    # A comma between brackets separates values, not requirements.
    parts = map(str.strip, re.split(r",(?![^(]*\))", selector))
    return all(_holds(part, labels) for part in parts if part)


def _holds(requirement: str, labels: Object) -> bool:
    if match := re.fullmatch(r"(\S+) +(in|notin) +\((.*)\)", requirement):
        values = {value.strip() for value in match[3].split(",")}
        return (labels.get(match[1]) in values) == (match[2] == "in")
    if match := re.fullmatch(r"([^!=\s]+) *(==|=|!=) *(\S*)", requirement):
        return (labels.get(match[1]) == match[3]) == (match[2] != "!=")
    if match := re.fullmatch(r"(!?)(\S+)", requirement):
        return (match[2] in labels) != bool(match[1])
    raise bad_request(f'unable to parse requirement: "{requirement}"')


def field_filter(selector: str, obj: Object) -> bool:
    """As a label selector with = and != alone, on fields such as status.phase."""

    def value(path: str) -> str:
        found: Any = obj
        for name in path.split("."):
            found = found.get(name, "") if isinstance(found, dict) else ""
        return str(found)

    paths = re.findall(r"([^!=,\s]+) *(?:==|=|!=)", selector)
    return label_filter(selector, {path: value(path) for path in paths})
