"""The filter ``not_ready``: why a component on Kubernetes is not ready, and what to do about it."""

from __future__ import annotations

from typing import Any

Object = dict[str, Any]

_EVENTS = 5  # at most
_IMAGE = "set {role}_image to an image that the cluster can get, or load it: minikube image load"
_CLASS = "set iot_storage_class to a class that provides volumes"

# A text in a reason or message -> the next step. The first match counts.
NEXT_STEPS = {
    "exceeded quota": "raise the namespace's ResourceQuota, or lower the component's resources",
    "PodSecurity": "the namespace enforces the restricted profile; the manifest violates it",
    "ImagePull": _IMAGE,
    "ErrImage": _IMAGE,
    "InvalidImageName": "set {role}_image to a name and tag as in postgres:17.6",
    "unbound immediate PersistentVolumeClaims": _CLASS,
    "ProvisioningFailed": _CLASS,
    "FailedScheduling": "give the cluster more nodes, CPU or memory, or lower {name}'s resources",
    "OOMKilled": "raise the memory limit in {name}'s resources",
    "exit code": "read its log: kubectl -n {namespace} logs {pod} --all-containers",
    "not ready": "see why in its log: kubectl -n {namespace} logs {pod} --all-containers",
}


def _is(pod: Object, condition: str) -> bool:
    """Return whether the pod's condition of this type is True."""
    conditions = pod.get("status", {}).get("conditions") or []
    return any(c["type"] == condition and c["status"] == "True" for c in conditions)


def _pod_reasons(pod: Object) -> list[str]:
    """Return why a pod is not ready now, one line for each cause."""
    status = pod.get("status", {})
    reasons = [
        f"FailedScheduling: {condition.get('message', '')}"
        for condition in status.get("conditions") or []
        if condition["type"] == "PodScheduled" and condition["status"] == "False"
    ]
    for container in (status.get("initContainerStatuses") or []) + (
        status.get("containerStatuses") or []
    ):
        if container.get("ready", True):  # it is ready now, even if it failed before
            continue
        name, state = container["name"], container.get("state", {})
        waiting = state.get("waiting") or {}
        ended = state.get("terminated") or container.get("lastState", {}).get("terminated") or {}
        if waiting.get("reason") not in (None, "PodInitializing", "ContainerCreating"):
            reasons.append(f"{name}: {waiting['reason']}: {waiting.get('message', '')}")
        if state.get("running") is not None:
            reasons.append(f"{name}: it runs but is not ready")
        if ended.get("exitCode"):
            reasons.append(
                f"{name}: ended with {ended.get('reason')}, exit code {ended['exitCode']}"
            )
    return reasons


def _time(event: Object) -> str:
    """Return when an event was last seen, to the second (the fields differ in their precision)."""
    series = event.get("series") or {}
    seen = series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime")
    return (seen or "")[:19]


def _since(pod: Object) -> str:
    """Return when the pod reached its current step. Warnings from before that are solved."""
    status = pod.get("status", {})
    steps = [
        condition.get("lastTransitionTime")
        for condition in status.get("conditions") or []
        if condition["type"] in ("PodScheduled", "Initialized") and condition["status"] == "True"
    ]
    starts = [
        (container.get("state", {}).get("running") or {}).get("startedAt")
        for container in status.get("containerStatuses") or []
        if not container.get("restartCount")  # a restarted container: its last exit is the reason
    ]
    times = [pod["metadata"].get("creationTimestamp"), *steps, *starts]
    return max(time or "" for time in times)[:19]


def _event_reasons(
    workloads: list[Object], pods: list[Object], claims: list[Object], events: list[Object]
) -> list[str]:
    """Return the last warnings about objects that are not ready now, the oldest first.

    Objects are compared by uid, because a new object may have the name of a deleted one.
    """
    since = {pod["metadata"]["uid"]: _since(pod) for pod in pods if not _is(pod, "Ready")}
    since |= {c["metadata"]["uid"]: "" for c in claims if c["status"].get("phase") != "Bound"}
    lacking = {
        w["metadata"]["uid"]
        for w in workloads
        if w.get("status", {}).get("replicas", 0) < w["spec"].get("replicas", 1)
    }
    said: list[Object] = []
    refused: list[Object] = []
    for event in sorted(events, key=_time):
        uid = event["involvedObject"].get("uid", "")
        if event.get("reason") == "FailedScheduling":
            continue  # the pod's condition shows it while it is true
        if uid in lacking:
            refused = [event]  # no pod could be created; only the last such event counts
        elif uid in since and _time(event) >= since[uid]:
            said.append(event)
    return [
        f"{e['involvedObject'].get('name')}: {e.get('reason')}: {e.get('message')}"
        for e in (said + refused)[-_EVENTS:]
    ]


def not_ready(component: str, error: str, namespace: str, objects: list[Object]) -> str:
    """Return the error message for a component that does not become ready.

    ``objects`` are the component's StatefulSet, pods and claims, and the warnings (events) of the
    namespace, each with its ``kind``. Those that could not be read are missing.
    """
    kinds = ("StatefulSet", "Pod", "PersistentVolumeClaim", "Event")
    workloads, pods, claims, events = ([o for o in objects if o["kind"] == k] for k in kinds)
    # If a pod of the current template is not ready, ignore the pods of older templates.
    revisions = [w.get("status", {}).get("updateRevision") for w in workloads]
    pods = [
        pod
        for pod in pods
        if pod["metadata"].get("labels", {}).get("controller-revision-hash") in revisions
        and not _is(pod, "Ready")
    ] or pods
    found = {pod["metadata"]["name"]: _pod_reasons(pod) for pod in pods}
    now = [f"pod {name}: {reason}" for name, reasons in found.items() for reason in reasons]
    lately = _event_reasons(workloads, pods, claims, events)
    lines = dict.fromkeys(" ".join(line.split()) for line in now + lately)
    # The current state tells more than past events, and both tell more than the timeout.
    texts = ["\n".join(now), "\n".join(lately[::-1]), error]
    step = next(
        (step for text in texts for sign, step in NEXT_STEPS.items() if sign in text),
        "see its state: kubectl -n {namespace} describe statefulset {name}",
    ).format(
        name=component,
        role=component.replace("-", "_"),
        namespace=namespace,
        pod=next((name for name, reasons in found.items() if reasons), f"{component}-0"),
    )
    said = "\n".join(lines) or "The cluster gives no reason."
    return (
        f"{component} is not ready. {error}\n{said}\n"
        f"Next: {step}; then run the playbook again. It continues from here."
    )


class FilterModule:
    """Filters about components on Kubernetes."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {"not_ready": not_ready}
