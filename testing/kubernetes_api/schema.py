"""The published schemas: strict checking of what clients send, and merging of what they change.

The schemas come with the package kubernetes-validate, one set for each minor version of Kubernetes.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jsonschema
from kubernetes_validate import utils
from referencing import Registry, Resource

from .errors import ApiError, bad_request, invalid
from .kinds import Kind

Object = dict[str, Any]
ListKeys = Callable[[Object], list[str]]


class Schemas:
    """The schemas of one version of Kubernetes, such as "1.34"."""

    def __init__(self, version: str):
        found = [v for v in utils.all_versions() if utils.major_minor(v) == version]
        if not found:
            known = ", ".join(utils.major_minor(v) for v in utils.all_versions())
            raise ValueError(f"kubernetes-validate has no schemas of Kubernetes {version}: {known}")
        self.version = found[-1]
        self._directory = f"kubernetes-json-schema/v{self.version}-local-strict"
        self._definitions = utils.schema_contents(
            f"{self._directory}/_definitions.json", self.version
        )
        self.of = cache(self._load)
        self._validator = cache(self._make_validator)

    def _load(self, kind: Kind) -> Object:
        group = f"{kind.group.split('.')[0]}-" if kind.group else ""
        name = f"{kind.kind.lower()}-{group}{kind.version}.json"
        schema: Object = utils.schema_contents(f"{self._directory}/{name}", self.version)
        return schema

    def _make_validator(self, kind: Kind) -> Any:
        schema = self.of(kind)
        registry = Resource.from_contents(self._definitions) @ (
            Resource.from_contents(schema) @ Registry()
        )
        return jsonschema.Draft202012Validator(schema, registry=registry)

    def check(self, kind: Kind, obj: Object, patched: bool = False) -> None:
        """Refuse unknown fields, wrong types (400) and missing fields (422).

        As though every request said fieldValidation=Strict. What a patch has made is worded
        differently from what came whole. See
        https://kubernetes.io/docs/reference/using-api/api-concepts/#field-validation.
        """
        unknown, mistyped, missing = [], [], []
        if "spec" not in obj and self.child(self.of(kind), "spec").get("required"):
            missing.append(("spec", "Required value"))
        for error in self._validator(kind).iter_errors(obj):
            path = field_path(error.absolute_path)
            if error.validator == "additionalProperties":
                extra = sorted(set(error.instance) - set(error.schema["properties"]))
                unknown += [f'unknown field "{join(path, name)}"' for name in extra]
            elif error.validator == "required":
                gone = [n for n in error.validator_value if n not in error.instance]
                missing += [(join(path, name), "Required value") for name in gone]
            else:
                wanted = str(error.validator_value).replace(", 'null'", "")
                mistyped.append(
                    f"json: cannot unmarshal {json_type(error.instance)} into Go struct field "
                    f"{kind.kind}.{path} of type {wanted}"
                )
        name = obj.get("metadata", {}).get("name", "")
        refusals = mistyped[:1] or (unknown and ["strict decoding error: " + ", ".join(unknown)])
        if refusals and patched:
            raise invalid(None, "", [("patch", f'Invalid value: "...": {refusals[0]}')])
        if refusals:
            raise bad_request(
                f'{kind.kind} in version "{kind.version}" cannot be handled as a {kind.kind}: '
                f"{refusals[0]}"
            )
        if missing:
            raise invalid(kind, name, list(dict.fromkeys(missing)))

    def child(self, schema: Object, field: str) -> Object:
        """The schema of a field, or of a list's items (`field` is "")."""
        below = schema.get("properties", {}).get(field) or schema.get("additionalProperties") or {}
        below = schema.get("items", {}) if not field else below
        reference = below.get("$ref") if isinstance(below, dict) else None
        if reference:
            referred: Object = self._definitions["$defs"][reference.rsplit("/", 1)[-1]]
            return referred | below
        return below if isinstance(below, dict) else {}

    def merge(self, current: Any, patch: Any, schema: Object, keys: ListKeys) -> Any:
        """`current` with `patch` merged in: null deletes, and lists whose items `keys` tells apart
        are merged item by item, others replaced. With `no_keys` this is RFC 7386."""
        if isinstance(patch, dict):
            if directives := [name for name in patch if name.startswith("$")]:
                raise ApiError(415, "UnsupportedMediaType", f"the stand-in has no {directives[0]}")
            result = dict(current) if isinstance(current, dict) else {}
            for name, value in patch.items():
                if value is None:
                    result.pop(name, None)
                else:
                    below = self.child(schema, name)
                    result[name] = self.merge(result.get(name), value, below, keys)
            return result
        if isinstance(patch, list) and isinstance(current, list) and (by := keys(schema)):
            items = {item_key(item, by): item for item in current}
            for item in patch:
                key = item_key(item, by)
                items[key] = self.merge(items.get(key), item, self.child(schema, ""), keys)
            return list(items.values())
        return patch

    def without(self, current: Any, old: Any, new: Any, schema: Object) -> Any:
        """`current` less the fields that are in `old` and no longer in `new`."""
        if isinstance(current, dict) and isinstance(old, dict) and isinstance(new, dict):
            return {
                name: self.without(value, old.get(name), new.get(name), self.child(schema, name))
                for name, value in current.items()
                if name not in old or name in new
            }
        if all(isinstance(x, list) for x in (current, old, new)) and (by := apply_keys(schema)):
            olds, news = ({item_key(i, by): i for i in x} for x in (old, new))
            return [
                self.without(item, olds.get(key), news.get(key), self.child(schema, ""))
                for item, key in ((i, item_key(i, by)) for i in current)
                if key not in olds or key in news
            ]
        return current


def no_keys(_schema: Object) -> list[str]:
    return []


def strategic_keys(schema: Object) -> list[str]:
    key = schema.get("x-kubernetes-patch-merge-key")
    return [key] if key and "merge" in schema.get("x-kubernetes-patch-strategy", "") else []


def apply_keys(schema: Object) -> list[str]:
    keys: list[str] = schema.get("x-kubernetes-list-map-keys", [])
    return keys


def item_key(item: Object, keys: list[str]) -> tuple[Any, ...]:
    # Ports are told apart by number and protocol, and a protocol left out means TCP.
    return tuple(item.get(key, "TCP" if key == "protocol" else None) for key in keys)


def without_nulls(value: Any) -> Any:
    """null in a manifest means that the field is not there."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def field_path(parts: Any) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in parts).removeprefix(".")


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def json_type(value: Any) -> str:
    names = {bool: "bool", int: "number", float: "number", str: "string", list: "array"}
    return names.get(type(value), "object")
