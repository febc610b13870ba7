"""The kinds that are served, and the discovery documents that tell clients about them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update"]


@dataclass(frozen=True)
class Kind:
    """One kind of object; `fields` are those a fieldSelector may name beside name and namespace."""

    group: str
    version: str
    kind: str
    plural: str
    short: tuple[str, ...] = ()
    namespaced: bool = True
    fields: tuple[str, ...] = ()
    subresources: tuple[str, ...] = ()

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def resource(self) -> str:
        """As messages about missing and conflicting objects name it: statefulsets.apps."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def qualified(self) -> str:
        """As messages about invalid objects name it: StatefulSet.apps."""
        return f"{self.kind}.{self.group}" if self.group else self.kind

    @property
    def has_generation(self) -> bool:
        return self.group in {"apps", "batch", "policy", "networking.k8s.io"}


_EVENT_FIELDS = (
    *(f"involvedObject.{f}" for f in ("kind", "namespace", "name", "uid", "apiVersion")),
    "reason",
    "reportingComponent",
    "source",
    "type",
)
_RBAC = "rbac.authorization.k8s.io"

KINDS = (
    Kind("", "v1", "Namespace", "namespaces", ("ns",), False, ("status.phase",)),
    Kind("", "v1", "Node", "nodes", ("no",), False, ("spec.unschedulable",)),
    Kind("", "v1", "PersistentVolume", "persistentvolumes", ("pv",), False),
    Kind("", "v1", "Secret", "secrets", fields=("type",)),
    Kind("", "v1", "ConfigMap", "configmaps", ("cm",)),
    Kind("", "v1", "Service", "services", ("svc",), fields=("spec.clusterIP", "spec.type")),
    Kind("", "v1", "ServiceAccount", "serviceaccounts", ("sa",)),
    Kind(
        *("", "v1", "Pod", "pods", ("po",)),
        fields=("spec.nodeName", "spec.restartPolicy", "spec.serviceAccountName", "status.phase"),
        subresources=("log",),
    ),
    Kind("", "v1", "Event", "events", ("ev",), fields=_EVENT_FIELDS),
    Kind("", "v1", "PersistentVolumeClaim", "persistentvolumeclaims", ("pvc",)),
    Kind("", "v1", "ResourceQuota", "resourcequotas", ("quota",)),
    Kind("apps", "v1", "StatefulSet", "statefulsets", ("sts",)),
    Kind("apps", "v1", "Deployment", "deployments", ("deploy",)),
    Kind("apps", "v1", "ReplicaSet", "replicasets", ("rs",), fields=("status.replicas",)),
    Kind("batch", "v1", "Job", "jobs", fields=("status.successful",)),
    Kind("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets", ("pdb",)),
    Kind("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies", ("netpol",)),
    Kind(_RBAC, "v1", "Role", "roles"),
    Kind(_RBAC, "v1", "RoleBinding", "rolebindings"),
    Kind("autoscaling", "v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers", ("hpa",)),
    Kind("storage.k8s.io", "v1", "StorageClass", "storageclasses", ("sc",), False),
)
BY_PLURAL = {(k.group, k.version, k.plural): k for k in KINDS}
BY_NAME = {k.kind: k for k in KINDS}


def _resources(kind: Kind) -> Iterator[dict[str, Any]]:
    common = {"kind": kind.kind, "namespaced": kind.namespaced}
    yield common | {
        "name": kind.plural,
        "singularName": kind.kind.lower(),
        "shortNames": list(kind.short),
        "verbs": VERBS,
    }
    for name in kind.subresources:
        yield common | {"name": f"{kind.plural}/{name}", "singularName": "", "verbs": ["get"]}


def discovery(path: str) -> dict[str, Any] | None:
    """The document of a path such as /apis, /api/v1 or /apis/apps/v1, if there is one."""
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
    groups = {k.group: k.version for k in KINDS if k.group}
    described = {
        group: {"name": group, "versions": [version], "preferredVersion": version}
        for group, version in (
            (g, {"groupVersion": f"{g}/{v}", "version": v}) for g, v in groups.items()
        )
    }
    if path == "/apis":
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": list(described.values())}
    if (name := path.removeprefix("/apis/")) in described:
        return {"kind": "APIGroup", "apiVersion": "v1"} | described[name]
    api_version = path.removeprefix("/apis/") if path.startswith("/apis/") else path[len("/api/") :]
    if kinds := [k for k in KINDS if k.api_version == api_version]:
        return {
            "kind": "APIResourceList",
            "apiVersion": "v1",
            "groupVersion": api_version,
            "resources": [r for kind in kinds for r in _resources(kind)],
        }
    return None
