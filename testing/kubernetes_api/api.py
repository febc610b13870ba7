"""What a request does: create, read, change and delete, with everything that may refuse it."""

from copy import deepcopy
from hashlib import sha256
from typing import Any

from . import defaults, errors, pod_security, validation
from .controllers import Controllers
from .kinds import Kind
from .schema import Schemas, apply_keys, no_keys, strategic_keys, without_nulls
from .store import Store, field_filter, label_filter

Object = dict[str, Any]

LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
# What a client may send back but cannot change.
_SERVER_SIDE = (
    "uid",
    "creationTimestamp",
    "generation",
    "resourceVersion",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
)
_LIST_KEYS = {
    "application/merge-patch+json": no_keys,
    "application/strategic-merge-patch+json": strategic_keys,
    "application/apply-patch+yaml": apply_keys,
}


class Api:
    """The API on one store. `dry` requests are answered like others, and store nothing."""

    def __init__(self, schemas: Schemas, store: Store, controllers: Controllers):
        self._schemas, self._store, self._controllers = schemas, store, controllers
        # What each field manager applied last, by uid and manager.
        self._applied: dict[tuple[str, str], Object] = {}

    def read(self, kind: Kind, namespace: str, name: str) -> Object:
        obj = self._store.get(kind.kind, namespace, name)
        if obj is None:
            raise errors.not_found(kind, name)
        return obj

    def select(self, kind: Kind, namespace: str, labels: str, fields: str) -> list[Object]:
        return [
            obj
            for obj in self._store.select(kind.kind, namespace)
            if label_filter(labels, obj["metadata"].get("labels", {}))
            and field_filter(kind, fields, obj)
        ]

    def as_list(self, kind: Kind, items: list[Object]) -> Object:
        # Items of a list of one kind say neither kind nor apiVersion.
        bare = [{k: v for k, v in o.items() if k not in {"kind", "apiVersion"}} for o in items]
        return {
            "kind": f"{kind.kind}List",
            "apiVersion": kind.api_version,
            "metadata": {"resourceVersion": self._store.revision},
            "items": bare,
        }

    def create(self, kind: Kind, namespace: str, body: Object, dry: bool) -> Object:
        obj = self._decoded(kind, namespace, body)
        meta = obj["metadata"]
        if "resourceVersion" in meta:
            raise errors.bad_request("resourceVersion should not be set on objects to be created")
        if not meta.get("name") and meta.get("generateName"):
            suffix = sha256(self._store.revision.encode()).hexdigest()[:5]
            meta["name"] = meta["generateName"] + suffix
        if not meta.get("name"):
            raise errors.invalid(
                kind, "", [("metadata.name", "Required value: name or generateName is required")]
            )
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
        self._finish(kind, obj)
        if kind.kind == "Pod":
            self._controllers.admit(obj)
        if not dry:
            self._store.put(obj)
            self._store.by_client.add(meta["uid"])
            self._controllers.reconcile()
        return obj

    def replace(self, kind: Kind, namespace: str, name: str, body: Object, dry: bool) -> Object:
        old = self.read(kind, namespace, name)
        new = self._decoded(kind, namespace, body)
        if kind.kind == "Service":  # an address that was given stays when a client leaves it out
            for field in ("clusterIP", "clusterIPs"):
                new.get("spec", {}).setdefault(field, old["spec"].get(field))
        return self._change(kind, old, without_nulls(new), dry)

    def patch(
        self, kind: Kind, namespace: str, name: str, body: Object, content_type: str, dry: bool
    ) -> Object:
        keys = _LIST_KEYS.get(content_type)
        if keys is None:
            raise errors.ApiError(
                *(415, "UnsupportedMediaType"),
                f"the body of the request was in an unknown format - accepted media types include: "
                f"{', '.join(_LIST_KEYS)}",
            )
        old = deepcopy(self.read(kind, namespace, name))
        new = self._schemas.merge(old, body, self._schemas.of(kind), keys)
        self._schemas.check(kind, new, patched=True)
        return self._change(kind, old, new, dry)

    def apply(
        self, kind: Kind, namespace: str, name: str, body: Object, manager: str, dry: bool
    ) -> Object:
        """Server-side apply: merges by the schema's list keys, and takes away what this manager
        applied before and left out now. Conflicts between managers are not found, and
        managedFields are not kept.

        https://kubernetes.io/docs/reference/using-api/server-side-apply/
        """
        if not manager:
            raise errors.ApiError(
                *(422, "Invalid"),
                'PatchOptions.meta.k8s.io "" is invalid: fieldManager: Required value: '
                "is required for apply patch",
            )
        old = self._store.get(kind.kind, namespace, name)
        body = without_nulls(body)
        if old is None:
            result = self.create(kind, namespace, deepcopy(body), dry)
        else:
            schema = self._schemas.of(kind)
            self._schemas.check(kind, body)
            before = self._applied.get((old["metadata"]["uid"], manager), {})
            kept = self._schemas.without(old, before, body, schema)
            new = self._schemas.merge(kept, body, schema, apply_keys)
            self._schemas.check(kind, new, patched=True)
            result = self._change(kind, old, new, dry)
        if not dry:
            self._applied[result["metadata"]["uid"], manager] = body
        return result

    def delete(
        self, kind: Kind, namespace: str, name: str, dry: bool, orphan: bool = False
    ) -> Object:
        """`orphan` leaves what the object owns, without an owner (propagationPolicy: Orphan)."""
        obj = self.read(kind, namespace, name)
        if not dry:
            if orphan:
                self._store.disown(obj)
            if kind.kind == "Namespace":
                self._controllers.terminate(obj)
            else:
                self._store.remove(obj)
            self._controllers.reconcile()
        left = self._store.get(kind.kind, namespace, name)
        if left and left["metadata"]["uid"] == obj["metadata"]["uid"] and not dry:
            return left
        details = {"name": name, "group": kind.group, "kind": kind.plural}
        details["uid"] = obj["metadata"]["uid"]
        status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
        return status | {"details": details}

    def delete_all(self, kind: Kind, items: list[Object], dry: bool) -> Object:
        for obj in items:
            meta = obj["metadata"]
            if self._store.get(kind.kind, meta.get("namespace", ""), meta["name"]):
                self.delete(kind, meta.get("namespace", ""), meta["name"], dry)
        return self.as_list(kind, items)

    def warnings(self, kind: Kind, obj: Object) -> list[str]:
        """What the answer's Warning headers say: a workload whose pods will break the standard."""
        spec = obj.get("spec", {}).get("template", {}).get("spec", {})
        namespace = self._store.get("Namespace", "", obj["metadata"].get("namespace", ""))
        if not spec.get("containers") or namespace is None or kind.group not in {"apps", "batch"}:
            return []
        broken = pod_security.violation(namespace, "warn", spec)
        return [f"would {broken.replace('violates', 'violate', 1)}"] if broken else []

    def _decoded(self, kind: Kind, namespace: str, body: Object) -> Object:
        given = (body.get("apiVersion", kind.api_version), body.get("kind", kind.kind))
        if given != (kind.api_version, kind.kind):
            raise errors.bad_request(
                f"the API version in the data ({given[0]}, Kind={given[1]}) does not match the "
                f"expected API version ({kind.api_version}, Kind={kind.kind})"
            )
        obj: Object = without_nulls({"apiVersion": given[0], "kind": given[1]} | body)
        self._schemas.check(kind, obj)
        meta = obj.setdefault("metadata", {})
        _settle_namespace(kind, meta, namespace)
        return obj

    def _check_namespace(self, kind: Kind, namespace: str, name: str) -> None:
        found = self._store.get("Namespace", "", namespace)
        if found is None:
            raise errors.not_found(_NAMESPACE, namespace)
        if "deletionTimestamp" in found["metadata"]:
            raise errors.forbidden(
                *(kind, name),
                f"unable to create new content in namespace {namespace} because it is being "
                "terminated",
            )

    def _change(self, kind: Kind, old: Object, new: Object, dry: bool) -> Object:
        before, meta = old["metadata"], new["metadata"]
        _settle_namespace(kind, meta, before.get("namespace", ""))
        if meta.get("name") != before["name"]:
            raise errors.bad_request(
                f"the name of the object ({meta.get('name')}) does not match the name on the URL "
                f"({before['name']})"
            )
        if meta.get("resourceVersion", before["resourceVersion"]) != before["resourceVersion"]:
            raise errors.modified(kind, before["name"])
        new = deepcopy(new) | ({"status": old["status"]} if "status" in old else {})
        new["metadata"] |= {field: before[field] for field in _SERVER_SIDE if field in before}
        self._finish(kind, new, old)
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

    def _finish(self, kind: Kind, obj: Object, old: Object | None = None) -> None:
        defaults.fill(kind, obj)
        if kind.kind == "PersistentVolumeClaim":
            self._controllers.set_storage_class(obj)
        validation.check(kind, obj, old)
        if kind.kind == "PersistentVolumeClaim" and old is not None:
            self._controllers.admit_resize(old, obj)


_NAMESPACE = Kind("", "v1", "Namespace", "namespaces")


def _settle_namespace(kind: Kind, meta: Object, namespace: str) -> None:
    """The path says which; what a manifest of a cluster-wide kind says about it is ignored."""
    if not kind.namespaced:
        meta.pop("namespace", None)
    elif meta.setdefault("namespace", namespace) != namespace:
        raise errors.bad_request(
            "the namespace of the provided object does not match the namespace sent on the request"
        )
