"""Values that the API fills in when they are left out.

Only what a client sees again matters here: a list that is applied a second time has to come out as
it was stored, or every run would report a change. Taken from the fields' descriptions in
https://kubernetes.io/docs/reference/kubernetes-api/. Not done: quantities are kept as they were
written (the real API turns "0.5" into "500m"), empty lists and maps stay, tolerations and the
volume of the service-account token are not added to pods, a HorizontalPodAutoscaler gets neither
metrics nor behavior, and ports of nodes are not allotted.
"""

from base64 import b64encode
from typing import Any

from .kinds import Kind

Object = dict[str, Any]


def _fill(target: Object, **values: Any) -> None:
    for name, value in values.items():
        target.setdefault(name, value)


def _downward_api(items: list[Object]) -> None:
    for item in items:
        if "fieldRef" in item:
            _fill(item["fieldRef"], apiVersion="v1")


def _probe(probe: Object) -> None:
    _fill(probe, timeoutSeconds=1, periodSeconds=10, successThreshold=1, failureThreshold=3)
    if "grpc" in probe:
        _fill(probe["grpc"], service="")


def _container(container: Object) -> None:
    tag = container.get("image", "").rsplit("/", 1)[-1]
    newest = tag.endswith(":latest") or not set(":@") & set(tag)
    _fill(
        container,
        imagePullPolicy="Always" if newest else "IfNotPresent",
        terminationMessagePath="/dev/termination-log",
        terminationMessagePolicy="File",
        resources={},
    )
    for port in container.get("ports", []):
        _fill(port, protocol="TCP")
    _downward_api([e["valueFrom"] for e in container.get("env", []) if "valueFrom" in e])
    if limits := container["resources"].get("limits"):
        container["resources"]["requests"] = limits | container["resources"].get("requests", {})
    probes = [container[p] for p in container if p.endswith("Probe")]
    for probe in probes:
        _probe(probe)
    for handler in [*probes, *container.get("lifecycle", {}).values()]:
        if "httpGet" in handler:
            _fill(handler["httpGet"], path="/", scheme="HTTP")


def _volume(volume: Object) -> None:
    if len(volume) == 1:
        volume["emptyDir"] = {}
    for source in ("secret", "configMap", "projected", "downwardAPI"):
        if source in volume:
            _fill(volume[source], defaultMode=0o644)
    _downward_api(volume.get("downwardAPI", {}).get("items", []))
    for source in volume.get("projected", {}).get("sources", []):
        _downward_api(source.get("downwardAPI", {}).get("items", []))
        if "serviceAccountToken" in source:
            _fill(source["serviceAccountToken"], expirationSeconds=3600)
    if "hostPath" in volume:
        _fill(volume["hostPath"], type="")


def pod_spec(spec: Object) -> None:
    _fill(
        spec,
        restartPolicy="Always",
        dnsPolicy="ClusterFirst",
        schedulerName="default-scheduler",
        securityContext={},
        terminationGracePeriodSeconds=30,
    )
    if "serviceAccountName" in spec:
        spec["serviceAccount"] = spec["serviceAccountName"]
    for container in [*spec.get("initContainers", []), *spec.get("containers", [])]:
        _container(container)
    for volume in spec.get("volumes", []):
        _volume(volume)


def _pod(obj: Object) -> None:
    _fill(obj["spec"], enableServiceLinks=True, serviceAccountName="default")
    pod_spec(obj["spec"])


def _stateful_set(obj: Object) -> None:
    spec = obj["spec"]
    _fill(
        spec,
        replicas=1,
        podManagementPolicy="OrderedReady",
        revisionHistoryLimit=10,
        updateStrategy={"type": "RollingUpdate"},
        persistentVolumeClaimRetentionPolicy={},
    )
    _fill(spec["persistentVolumeClaimRetentionPolicy"], whenDeleted="Retain", whenScaled="Retain")
    _fill(spec["updateStrategy"], type="RollingUpdate")
    if spec["updateStrategy"]["type"] == "RollingUpdate":
        _fill(spec["updateStrategy"], rollingUpdate={})
        _fill(spec["updateStrategy"]["rollingUpdate"], partition=0)
    for claim in spec.get("volumeClaimTemplates", []):
        _fill(claim, apiVersion="v1", kind="PersistentVolumeClaim", status={"phase": "Pending"})
        _claim(claim)
    pod_spec(spec["template"].setdefault("spec", {}))


def _deployment(obj: Object) -> None:
    spec = obj["spec"]
    _fill(spec, replicas=1, revisionHistoryLimit=10, progressDeadlineSeconds=600, strategy={})
    _fill(spec["strategy"], type="RollingUpdate")
    if spec["strategy"]["type"] == "RollingUpdate":
        _fill(spec["strategy"], rollingUpdate={})
        _fill(spec["strategy"]["rollingUpdate"], maxSurge="25%", maxUnavailable="25%")
    pod_spec(spec["template"].setdefault("spec", {}))


def _replica_set(obj: Object) -> None:
    _fill(obj["spec"], replicas=1)
    pod_spec(obj["spec"].setdefault("template", {}).setdefault("spec", {}))


def _job(obj: Object) -> None:
    spec = obj["spec"]
    _fill(
        spec,
        parallelism=1,
        completions=1,
        backoffLimit=6,
        completionMode="NonIndexed",
        suspend=False,
        manualSelector=False,
        podReplacementPolicy="TerminatingOrFailed",
    )
    uid = obj["metadata"]["uid"]
    labels = {"batch.kubernetes.io/controller-uid": uid}
    _fill(spec, selector={"matchLabels": labels})
    names = {"batch.kubernetes.io/job-name": obj["metadata"]["name"]} | labels
    template = spec["template"].setdefault("metadata", {})
    template["labels"] = template.get("labels", {}) | names
    # A job has to name its restart policy (validation.py), so that gets no default here.
    spec["template"].setdefault("spec", {}).setdefault("restartPolicy", "")
    pod_spec(spec["template"]["spec"])


def _service(obj: Object) -> None:
    spec = obj.setdefault("spec", {})
    _fill(spec, type="ClusterIP", sessionAffinity="None", internalTrafficPolicy="Cluster")
    if spec["type"] != "ExternalName":
        # Two bytes of the uid, so that an address does not depend on what else there is.
        number = int(obj["metadata"]["uid"][-4:], 16)
        _fill(spec, clusterIP=f"10.96.{number // 256}.{number % 256}")
        _fill(spec, clusterIPs=[spec["clusterIP"]])
        _fill(spec, ipFamilies=["IPv4"], ipFamilyPolicy="SingleStack")
    for port in spec.get("ports", []):
        _fill(port, protocol="TCP", targetPort=port["port"])


def _claim(obj: Object) -> None:
    _fill(obj.setdefault("spec", {}), volumeMode="Filesystem")


def _network_policy(obj: Object) -> None:
    spec = obj.setdefault("spec", {})
    _fill(spec, policyTypes=["Ingress", *(["Egress"] if spec.get("egress") else [])])
    for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
        for port in rule.get("ports", []):
            _fill(port, protocol="TCP")


def _role_binding(obj: Object) -> None:
    for subject in obj.get("subjects", []):
        if subject.get("kind") in {"User", "Group"}:
            _fill(subject, apiGroup="rbac.authorization.k8s.io")


def _secret(obj: Object) -> None:
    _fill(obj, type="Opaque")
    plain = {k: b64encode(v.encode()).decode() for k, v in obj.pop("stringData", {}).items()}
    if plain:
        obj["data"] = obj.get("data", {}) | plain


def _namespace(obj: Object) -> None:
    labels = obj["metadata"].setdefault("labels", {})
    labels["kubernetes.io/metadata.name"] = obj["metadata"]["name"]
    obj["spec"] = {"finalizers": ["kubernetes"]}


def _storage_class(obj: Object) -> None:
    _fill(obj, reclaimPolicy="Delete", volumeBindingMode="Immediate")


def _autoscaler(obj: Object) -> None:
    _fill(obj["spec"], minReplicas=1)


_BY_KIND = {
    "Pod": _pod,
    "StatefulSet": _stateful_set,
    "Deployment": _deployment,
    "ReplicaSet": _replica_set,
    "Job": _job,
    "Service": _service,
    "PersistentVolumeClaim": _claim,
    "NetworkPolicy": _network_policy,
    "RoleBinding": _role_binding,
    "Secret": _secret,
    "Namespace": _namespace,
    "StorageClass": _storage_class,
    "HorizontalPodAutoscaler": _autoscaler,
}


def fill(kind: Kind, obj: Object) -> None:
    """Fill in what `obj` leaves out, in place. It has its uid already, and passed the schema."""
    if kind.kind in _BY_KIND:
        _BY_KIND[kind.kind](obj)
