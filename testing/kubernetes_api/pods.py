"""What becomes of a pod: what keeps it from running, and the status and events that say so.

The forms are those of https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/ and of
https://kubernetes.io/docs/tasks/debug/debug-application/debug-pods/.
"""

from dataclasses import dataclass
from typing import Any

from .store import Store

Object = dict[str, Any]
Events = tuple[tuple[str, str], ...]  # reason, message

NODE = "minikube"
_NO_NODE = "0/1 nodes are available: {}. preemption: 0/1 nodes are available."
_PULL, _MEMORY = 'Back-off pulling image "{image}"', _NO_NODE.format("1 Insufficient memory")
_NAME = 'Failed to apply default image tag "{image}": couldn\'t parse image name'
_BACK_OFF = "restarting failed container {name} in pod {pod}"
_PROBE = "Readiness probe failed: HTTP probe failed with statuscode: 503"
# What `never_ready` may say -> what the status and the events of the pod say. The last three are no
# reasons of a waiting container: no node takes the pod; its probe fails; its process fails.
REASONS: dict[str, tuple[str, Events]] = {
    "ImagePullBackOff": (
        _PULL,
        (
            ("Failed", 'Failed to pull image "{image}": manifest for {image} not found'),
            ("Failed", "Error: ImagePullBackOff"),
        ),
    ),
    "InvalidImageName": (_NAME, (("InspectFailed", _NAME),)),
    "CrashLoopBackOff": (f"back-off 5m0s {_BACK_OFF}", (("BackOff", f"Back-off {_BACK_OFF}"),)),
    "Unschedulable": (_MEMORY, (("FailedScheduling", _MEMORY),)),
    "NotReady": (_PROBE, (("Unhealthy", _PROBE),)),
    "Error": ("", ()),
}


@dataclass
class Trouble:
    """Why a pod does not run. `container` is the one concerned, "" when it is the pod itself."""

    reason: str
    message: str = ""
    container: str = ""
    events: Events = ()


def containers(pod: Object) -> list[Object]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def told(pod: Object, container: str, reason: str) -> Trouble:
    """Return the trouble that `never_ready` asks for."""
    chosen = next(
        (c for c in containers(pod) if c["name"] == container), pod["spec"]["containers"][0]
    )
    values = {k: chosen[k] for k in ("name", "image")} | {"pod": pod["metadata"]["name"]}
    message, events = REASONS[reason]
    return Trouble(
        reason,
        message.format(**values),
        "" if reason == "Unschedulable" else chosen["name"],
        tuple((kind, text.format(**values)) for kind, text in events),
    )


def lacking(store: Store, pod: Object) -> Trouble | None:
    """Return what keeps a pod from starting: something that it refers to and that is not there."""
    namespace = pod["metadata"]["namespace"]

    def lack(kind: str, source: Object, keys: list[str]) -> str:
        name = source.get("secretName") or source["name"]
        found = store.get(kind[0].upper() + kind[1:], namespace, name)
        if source.get("optional"):
            return ""
        if found is None:
            return f'{kind.lower()} "{name}" not found'
        missing = set(keys) - {*found.get("data", {}), *found.get("binaryData", {})}
        return f"{kind.lower()} {name} has no key {', '.join(sorted(missing))}" if missing else ""

    for volume in pod["spec"].get("volumes", []):
        claim_name = volume.get("persistentVolumeClaim", {}).get("claimName", "")
        claim = store.get("PersistentVolumeClaim", namespace, claim_name)
        if claim_name and not (claim and claim["status"]["phase"] == "Bound"):
            why = "pod has unbound immediate PersistentVolumeClaims"
            message = _NO_NODE.format(why if claim else f'claim "{claim_name}" not found')
            return Trouble("Unschedulable", message, "", (("FailedScheduling", message),))
        for source in [volume, *volume.get("projected", {}).get("sources", [])]:
            for kind in {"secret", "configMap"} & source.keys():
                keys = [item["key"] for item in source[kind].get("items", [])]
                if why := lack(kind, source[kind], keys):
                    message = f'MountVolume.SetUp failed for volume "{volume["name"]}" : {why}'
                    return Trouble("ContainerCreating", events=(("FailedMount", message),))
    for container in containers(pod):
        given = [variable.get("valueFrom", {}) for variable in container.get("env", [])]
        for kind in ("secret", "configMap"):
            sources = [s[f"{kind}Ref"] for s in container.get("envFrom", []) if f"{kind}Ref" in s]
            sources += [value[f"{kind}KeyRef"] for value in given if f"{kind}KeyRef" in value]
            for source in sources:
                if why := lack(kind, source, [source["key"]] if "key" in source else []):
                    events = (("Failed", f"Error: {why}"),)
                    return Trouble("CreateContainerConfigError", why, container["name"], events)
    return None


def status(pod: Object, trouble: Trouble | None) -> Object:
    """Return the status of a pod with that trouble; without, the pod of a Job has ended."""
    since = pod["metadata"]["creationTimestamp"]
    if trouble and trouble.reason == "Unschedulable":
        condition = _condition("PodScheduled", False, since) | {"message": trouble.message}
        return {"phase": "Pending", "conditions": [condition | {"reason": "Unschedulable"}]}
    finishes = pod["spec"].get("restartPolicy", "Always") != "Always"
    inits = [c["name"] for c in pod["spec"].get("initContainers", [])]
    in_init = trouble is not None and trouble.container in inits
    shown: dict[bool, list[Object]] = {True: [], False: []}  # by whether it is an init container
    reached = trouble is None or bool(trouble.container)  # its turn has come
    for container in containers(pod):
        name, init = container["name"], container["name"] in inits
        concerned = trouble is not None and trouble.container == name
        if concerned and trouble:
            state = _troubled(trouble, since)
        elif not reached:
            reason = "PodInitializing" if in_init else "ContainerCreating"
            state = {"state": {"waiting": {"reason": reason}}}
        elif init or (finishes and trouble is None):
            state = _ended(0, since) | {"ready": init}
        else:
            state = {"state": {"running": {"startedAt": since}}, "ready": True}
        reached = reached and not (init and concerned)
        common = {"name": name, "image": container["image"], "restartCount": 0, "ready": False}
        shown[init].append(common | state)
    ready = all(s["ready"] for s in shown[False])
    running = any("running" in s["state"] for s in shown[False])
    crashing = trouble is not None and trouble.reason == "CrashLoopBackOff" and not in_init
    if trouble and trouble.reason == "Error":
        phase = "Failed"
    elif finishes and trouble is None:
        phase = "Succeeded"
    else:
        phase = "Running" if running or crashing else "Pending"
    conditions = [
        _condition("PodScheduled", True, since),
        _condition("Initialized", reached, since),
        _condition("Ready", ready, since),
    ]
    statuses = {"initContainerStatuses": shown[True], "containerStatuses": shown[False]}
    return {"phase": phase, "conditions": conditions, "startTime": since, **statuses}


def _condition(kind: str, true: bool, since: str) -> Object:
    return {"type": kind, "status": str(true), "lastTransitionTime": since}


def _ended(code: int, since: str) -> Object:
    end = {"exitCode": code, "reason": "Error" if code else "Completed"}
    return {"state": {"terminated": end | {"startedAt": since, "finishedAt": since}}}


def _troubled(trouble: Trouble, since: str) -> Object:
    if trouble.reason == "NotReady":
        return {"state": {"running": {"startedAt": since}}}
    if trouble.reason == "Error":
        return _ended(1, since)
    state = {"state": {"waiting": {"reason": trouble.reason, "message": trouble.message}}}
    if trouble.reason == "CrashLoopBackOff":
        return state | {"restartCount": 5, "lastState": _ended(1, since)["state"]}
    return state


def is_ready(pod: Object) -> bool:
    conditions = pod.get("status", {}).get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
