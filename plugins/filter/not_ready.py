"""Why a component on Kubernetes is not ready, in the cluster's words, and what to do about it."""

from __future__ import annotations

_EVENTS = 5  # at the most
_IMAGE = "set {name}_image to an image that the cluster can get, or load it: minikube image load"
_CLASS = "set iot_storage_class to a class that provides volumes"

# What a reason or message contains -> the next step. The first that fits.
NEXT_STEPS = {
    "exceeded quota": "raise the namespace's ResourceQuota, or lower the component's resources",
    "PodSecurity": "the namespace enforces the restricted profile; the manifest violates it",
    "ImagePull": _IMAGE,
    "ErrImage": _IMAGE,
    "InvalidImageName": "set {name}_image to a name and tag as in postgres:17.6",
    "unbound immediate PersistentVolumeClaims": _CLASS,
    "ProvisioningFailed": _CLASS,
    "FailedScheduling": "give the cluster more nodes, CPU or memory, or lower {name}'s resources",
    "OOMKilled": "raise the memory limit in {name}'s resources",
    "exit code": "read what it says: kubectl -n {namespace} logs {pod} --all-containers",
    "not ready": "ask it why: kubectl -n {namespace} logs {pod} --all-containers",
}


def _pod_reasons(pod: dict) -> list[str]:
    """Return why a pod is not ready now, one line a cause."""
    status = pod.get("status", {})
    reasons = [
        f"FailedScheduling: {condition.get('message', '')}"
        for condition in status.get("conditions") or []
        if condition["type"] == "PodScheduled" and condition["status"] == "False"
    ]
    for container in (status.get("initContainerStatuses") or []) + (
        status.get("containerStatuses") or []
    ):
        name, state = container["name"], container.get("state", {})
        waiting = state.get("waiting") or {}
        ended = state.get("terminated") or container.get("lastState", {}).get("terminated") or {}
        if waiting.get("reason") not in (None, "PodInitializing", "ContainerCreating"):
            reasons.append(f"{name}: {waiting['reason']}: {waiting.get('message', '')}")
        if state.get("running") is not None and not container.get("ready", True):
            reasons.append(f"{name}: it runs and is not ready")
        if ended.get("exitCode"):
            reasons.append(
                f"{name}: ended with {ended.get('reason')}, exit code {ended['exitCode']}"
            )
    return reasons


def _event_reasons(component: str, events: list[dict]) -> list[str]:
    """Return the last warnings about a component's objects; older ones may be mended by now."""
    about = [
        e
        for e in events
        if e["involvedObject"].get("name", "").startswith((component, f"data-{component}"))
    ]
    about.sort(key=lambda e: e.get("lastTimestamp") or e.get("eventTime") or "")
    return [
        f"{e['involvedObject']['name']}: {e.get('reason')}: {e.get('message')}"
        for e in about[-_EVENTS:]
    ]


def not_ready(component: str, error: str, namespace: str, pods: dict, events: dict) -> str:
    """Return the error message about a component that does not become ready.

    ``pods`` and ``events`` are results of ``kubernetes.core.k8s_info``, or what it failed with.
    """
    found = {pod["metadata"]["name"]: _pod_reasons(pod) for pod in pods.get("resources") or []}
    now = [f"pod {name}: {reason}" for name, reasons in found.items() for reason in reasons]
    lately = _event_reasons(component, events.get("resources") or [])
    lines = dict.fromkeys(" ".join(line.split()) for line in now + lately)
    # What is so now says more than what has happened, and that more than that it took too long.
    texts = ["\n".join(now), "\n".join(lately[::-1]), error]
    step = next(
        (step for text in texts for sign, step in NEXT_STEPS.items() if sign in text),
        "look at it: kubectl -n {namespace} describe statefulset {name}",
    ).format(
        name=component,
        namespace=namespace,
        pod=next((name for name, reasons in found.items() if reasons), f"{component}-0"),
    )
    said = "\n".join(lines) or "The cluster names no reason."
    return (
        f"{component} is not ready. {error}\n{said}\n"
        f"Next: {step}; then run the playbook again, it goes on from here."
    )


class FilterModule:
    """Filters about components on Kubernetes."""

    def filters(self) -> dict:
        """Return the filters by name."""
        return {"not_ready": not_ready}
