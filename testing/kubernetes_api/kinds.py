"""The kinds that are served, and the discovery documents that tell clients about them."""

from dataclasses import dataclass
from typing import Any

VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update"]


@dataclass(frozen=True)
class Kind:
    """One kind of object, as `apiVersion` and `kind` name it in a manifest."""

    api_version: str
    kind: str
    plural: str
    namespaced: bool = True

    @property
    def group(self) -> str:
        return self.api_version.rpartition("/")[0]

    @property
    def resource(self) -> str:
        """As error messages name it: statefulsets.apps."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def has_generation(self) -> bool:
        return self.group in {"apps", "batch", "policy", "networking.k8s.io"}


_RBAC = "rbac.authorization.k8s.io/v1"

KINDS = (
    Kind("v1", "Namespace", "namespaces", namespaced=False),
    Kind("v1", "Node", "nodes", namespaced=False),
    Kind("v1", "PersistentVolume", "persistentvolumes", namespaced=False),
    Kind("v1", "Secret", "secrets"),
    Kind("v1", "ConfigMap", "configmaps"),
    Kind("v1", "Service", "services"),
    Kind("v1", "ServiceAccount", "serviceaccounts"),
    Kind("v1", "Pod", "pods"),
    Kind("v1", "Event", "events"),
    Kind("v1", "PersistentVolumeClaim", "persistentvolumeclaims"),
    Kind("apps/v1", "StatefulSet", "statefulsets"),
    Kind("batch/v1", "Job", "jobs"),
    Kind("batch/v1", "CronJob", "cronjobs"),
    Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies"),
    Kind(_RBAC, "Role", "roles"),
    Kind(_RBAC, "RoleBinding", "rolebindings"),
    Kind("autoscaling/v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers"),
    Kind("storage.k8s.io/v1", "StorageClass", "storageclasses", namespaced=False),
)
BY_PLURAL = {(k.api_version, k.plural): k for k in KINDS}
BY_NAME = {k.kind: k for k in KINDS}


def _group(api_version: str) -> dict[str, Any]:
    group, _, version = api_version.partition("/")
    named = {"groupVersion": api_version, "version": version}
    return {"name": group, "versions": [named], "preferredVersion": named}


def discovery(path: str) -> dict[str, Any] | None:
    """Return the document at a path such as /apis, /api/v1 or /apis/apps/v1, if there is one."""
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
    groups = [_group(v) for v in dict.fromkeys(k.api_version for k in KINDS if k.group)]
    if path == "/apis":
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    name = path.removeprefix("/apis/").removeprefix("/api/")
    for group in groups:
        if group["name"] == name:
            return {"kind": "APIGroup", "apiVersion": "v1"} | group
    resources = [
        {
            "name": kind.plural,
            "singularName": kind.kind.lower(),
            "kind": kind.kind,
            "namespaced": kind.namespaced,
            "verbs": VERBS,
        }
        for kind in KINDS
        if kind.api_version == name
    ]
    if name == "v1":
        resources += [{"name": "pods/log", "kind": "Pod", "namespaced": True, "verbs": ["get"]}]
    document = {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": name}
    return document | {"resources": resources} if resources else None
