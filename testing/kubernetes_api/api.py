"""What a request does: create, read, change and delete, and what it is refused for."""

from copy import deepcopy
from typing import Any

from . import defaults, errors
from .controllers import Controllers
from .kinds import BY_NAME, Kind
from .merge import merge, without_nulls
from .store import Store, field_filter, label_filter

Object = dict[str, Any]

LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
# What a client may send back but cannot change.
_SERVER_SIDE = ("uid", "creationTimestamp", "generation", "resourceVersion", "deletionTimestamp")
_MERGE_PATCH = "application/merge-patch+json"


class Api:
    """The API on one store. `dry` requests are answered like others, and store nothing."""

    def __init__(self, store: Store, controllers: Controllers) -> None:
        self._store, self._controllers = store, controllers

    def read(self, kind: Kind, namespace: str, name: str) -> Object:
        obj = self._store.get(kind.kind, namespace, name)
        if obj is None:
            raise errors.not_found(kind, name)
        return obj

    def select(self, kind: Kind, namespace: str, labels: str, fields: str) -> list[Object]:
        return [
            obj
            for obj in self._store.select(kind.kind, namespace)
            if label_filter(labels, obj["metadata"].get("labels", {})) and field_filter(fields, obj)
        ]

    def as_list(self, kind: Kind, items: list[Object]) -> Object:
        # Items of a list of one kind say neither kind nor apiVersion.
        bare = [{k: v for k, v in o.items() if k not in {"kind", "apiVersion"}} for o in items]
        meta = {"resourceVersion": str(self._store.revision)}
        named = {"kind": f"{kind.kind}List", "apiVersion": kind.api_version}
        return named | {"metadata": meta, "items": bare}

    def create(self, kind: Kind, namespace: str, body: Object, dry: bool) -> Object:
        obj = self._decoded(kind, namespace, body)
        meta = obj["metadata"]
        if not meta.get("name"):
            raise errors.invalid(f'{kind.kind} "" is invalid: metadata.name: Required value')
        if kind.namespaced:
            self._check_namespace(kind, namespace, meta["name"])
        if existing := self._store.get(kind.kind, namespace, meta["name"]):
            leaving = "deletionTimestamp" in existing["metadata"]
            prefix = "object is being deleted: " if leaving else ""
            raise errors.already_exists(kind, meta["name"], prefix)
        for field in _SERVER_SIDE:
            meta.pop(field, None)
        obj.pop("status", None)
        self._store.stamp(obj)
        defaults.fill(obj)
        if not dry:
            self._store.put(obj)
            self._store.by_client.add(meta["uid"])
            self._controllers.reconcile()
        return obj

    def patch(
        self, kind: Kind, namespace: str, name: str, body: Object, content_type: str, dry: bool
    ) -> Object:
        if content_type != _MERGE_PATCH:
            raise errors.ApiError(
                *(415, "UnsupportedMediaType"),
                f"the body of the request was in an unknown format - accepted media types include: "
                f"{_MERGE_PATCH}",
            )
        old = self.read(kind, namespace, name)
        return self._change(kind, old, merge(deepcopy(old), body), dry)

    def delete(self, kind: Kind, namespace: str, name: str, dry: bool) -> Object:
        obj = self.read(kind, namespace, name)
        if not dry:
            if kind.kind == "Namespace":
                self._controllers.terminate(obj)
            else:
                self._store.remove(obj)
            self._controllers.reconcile()
            if left := self._store.get(kind.kind, namespace, name):
                return left
        status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
        return status | {"details": {"name": name, "uid": obj["metadata"]["uid"]}}

    def delete_all(self, kind: Kind, items: list[Object], dry: bool) -> Object:
        for obj in items:
            self.delete(kind, obj["metadata"].get("namespace", ""), obj["metadata"]["name"], dry)
        return self.as_list(kind, items)

    def _decoded(self, kind: Kind, namespace: str, body: Object) -> Object:
        named = {"apiVersion": kind.api_version, "kind": kind.kind}
        obj: Object = without_nulls(named | body)
        if any(obj[field] != value for field, value in named.items()):
            raise errors.bad_request(
                f"the API version in the data ({obj['apiVersion']}, Kind={obj['kind']}) does not "
                f"match the expected API version ({kind.api_version}, Kind={kind.kind})"
            )
        _set_namespace(kind, obj.setdefault("metadata", {}), namespace)
        return obj

    def _check_namespace(self, kind: Kind, namespace: str, name: str) -> None:
        found = self._store.get("Namespace", "", namespace)
        if found is None:
            raise errors.not_found(BY_NAME["Namespace"], namespace)
        if "deletionTimestamp" in found["metadata"]:
            raise errors.forbidden(
                *(kind, name),
                f"unable to create new content in namespace {namespace} because it is being "
                "terminated",
            )

    def _change(self, kind: Kind, old: Object, new: Object, dry: bool) -> Object:
        before, meta = old["metadata"], new["metadata"]
        _set_namespace(kind, meta, before.get("namespace", ""))
        if meta.get("name") != before["name"]:
            raise errors.bad_request(f"the name of the object is not {before['name']}")
        if meta.get("resourceVersion", before["resourceVersion"]) != before["resourceVersion"]:
            raise errors.modified(kind, before["name"])
        new = deepcopy(new) | ({"status": old["status"]} if "status" in old else {})
        new["metadata"] |= {field: before[field] for field in _SERVER_SIDE if field in before}
        defaults.fill(new)
        if kind.has_generation and old.get("spec") != new.get("spec"):
            new["metadata"]["generation"] += 1
        if dry:
            return new
        stored = self._store.put(new)
        meta = new["metadata"]
        if "deletionTimestamp" in meta and not meta.get("finalizers") and kind.kind != "Namespace":
            self._store.remove(stored)
        self._controllers.reconcile()
        return stored


def _set_namespace(kind: Kind, meta: Object, namespace: str) -> None:
    """The path says which; what a manifest of a cluster-wide kind says about it is ignored."""
    if not kind.namespaced:
        meta.pop("namespace", None)
    elif meta.setdefault("namespace", namespace) != namespace:
        raise errors.bad_request(
            "the namespace of the provided object does not match the namespace sent on the request"
        )
