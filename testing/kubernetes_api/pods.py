"""What becomes of a pod: what keeps it from running, and the status and events that say so.

The forms are those of https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/ and of
https://kubernetes.io/docs/tasks/debug/debug-application/debug-pods/.
"""

from dataclasses import dataclass, field
from typing import Any

from .store import Store

Object = dict[str, Any]

NODE = "minikube"
# What `never_ready` may say, each as it is seen in a pod's status (the last three are not reasons
# of a waiting container: no node takes the pod; its readiness probe fails; its process fails).
REASONS = (
    "ImagePullBackOff",
    "ErrImageNeverPull",
    "InvalidImageName",
    "CrashLoopBackOff",
    "CreateContainerConfigError",
    "Unschedulable",
    "NotReady",
    "Error",
)


@dataclass
class Trouble:
    """Why a pod does not run. `container` is the one concerned, "" when it is the pod itself."""

    reason: str
    message: str = ""
    container: str = ""
    events: list[tuple[str, str]] = field(default_factory=list)  # reason, message


def images(spec: Object) -> list[Object]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def told(pod: Object, container: str, reason: str) -> Trouble:
    """The trouble that `never_ready` asks for."""
    meta, spec = pod["metadata"], pod["spec"]
    chosen = next((c for c in images(spec) if c["name"] == container), spec["containers"][0])
    name, image = chosen["name"], chosen["image"]
    place = f"{meta['name']}_{meta['namespace']}({meta['uid']})"
    message, events = {
        "ImagePullBackOff": (
            f'Back-off pulling image "{image}"',
            [
                ("Failed", f'Failed to pull image "{image}": manifest for {image} not found'),
                ("Failed", "Error: ErrImagePull"),
                ("Failed", "Error: ImagePullBackOff"),
            ],
        ),
        "ErrImageNeverPull": (
            f'Container image "{image}" is not present with pull policy of Never',
            [(reason, ""), ("Failed", "Error: ErrImageNeverPull")],
        ),
        "InvalidImageName": (
            f'Failed to apply default image tag "{image}": couldn\'t parse image name',
            [("InspectFailed", "")],
        ),
        "CrashLoopBackOff": (
            f"back-off 5m0s restarting failed container={name} pod={place}",
            [("BackOff", f"Back-off restarting failed container {name} in pod {place}")],
        ),
        "CreateContainerConfigError": (
            "container has runAsNonRoot and image will run as root "
            f'(pod: "{place}", container: {name})',
            [("Failed", "Error: ")],
        ),
        "NotReady": (
            "Readiness probe failed: HTTP probe failed with statuscode: 503",
            [("Unhealthy", "")],
        ),
        "Unschedulable": (_unschedulable("1 Insufficient memory"), [("FailedScheduling", "")]),
        "Error": ("", []),
    }[reason]
    container = "" if reason == "Unschedulable" else name
    # An event without a text of its own says what the status says.
    texts = [(kind, text + message if text in {"", "Error: "} else text) for kind, text in events]
    return Trouble(reason, message, container, texts)


def _unschedulable(why: str) -> str:
    preemption = "Preemption is not helpful for scheduling"
    return f"0/1 nodes are available: {why}. preemption: 0/1 nodes are available: 1 {preemption}."


def found(store: Store, pod: Object) -> Trouble | None:
    """What keeps a pod that has not run yet from running: a claim, volume or variable it lacks."""
    namespace, spec = pod["metadata"]["namespace"], pod["spec"]
    for volume in spec.get("volumes", []):
        name = volume.get("persistentVolumeClaim", {}).get("claimName")
        claim = store.get("PersistentVolumeClaim", namespace, name)
        why = "" if claim else f'persistentvolumeclaim "{name}" not found'
        if claim and claim["status"]["phase"] != "Bound":
            why = "pod has unbound immediate PersistentVolumeClaims"
        if name and why:
            message = _unschedulable(why)
            return Trouble("Unschedulable", message, "", [("FailedScheduling", message)])
    for volume in spec.get("volumes", []):
        sources = [volume, *volume.get("projected", {}).get("sources", [])]
        for kind in ("secret", "configMap"):
            for source in (s[kind] for s in sources if kind in s):
                wanted = source.get("secretName", source.get("name"))
                keys = [item["key"] for item in source.get("items", [])]
                if source.get("optional"):
                    continue
                if lack := _lack(store, namespace, kind, wanted, keys, mounted=True):
                    message = f'MountVolume.SetUp failed for volume "{volume["name"]}" : {lack}'
                    events = [("FailedMount", message)]
                    return Trouble("ContainerCreating", events=events)
    for container in images(spec):
        for kind, name, keys in _variables(container):
            if lack := _lack(store, namespace, kind, name, keys):
                events = [("Failed", f"Error: {lack}")]
                return Trouble("CreateContainerConfigError", lack, container["name"], events)
    return None


def _variables(container: Object) -> list[tuple[str, str, list[str]]]:
    """The (kind, name, keys) that the environment of a container comes from."""
    found: list[tuple[str, Object, list[str]]] = []
    values = [variable.get("valueFrom", {}) for variable in container.get("env", [])]
    for kind in ("secret", "configMap"):
        sources = [s[f"{kind}Ref"] for s in container.get("envFrom", []) if f"{kind}Ref" in s]
        found += [(kind, reference, []) for reference in sources]
        keyed = [value[f"{kind}KeyRef"] for value in values if f"{kind}KeyRef" in value]
        found += [(kind, reference, [reference["key"]]) for reference in keyed]
    return [(kind, r["name"], keys) for kind, r, keys in found if not r.get("optional")]


def _lack(
    store: Store, namespace: str, kind: str, name: str, keys: list[str], mounted: bool = False
) -> str:
    obj = store.get(kind[0].upper() + kind[1:], namespace, name)
    if obj is None:
        return f'{kind.lower()} "{name}" not found'
    missing = [k for k in keys if k not in {*obj.get("data", {}), *obj.get("binaryData", {})}]
    if missing and mounted:
        return f"{'references' if kind == 'secret' else 'configmap references'} non-existent " + (
            f"{'secret' if kind == 'secret' else 'config'} key: {missing[0]}"
        )
    titled = "Secret" if kind == "secret" else "ConfigMap"
    return f"couldn't find key {missing[0]} in {titled} {namespace}/{name}" if missing else ""


def status(pod: Object, trouble: Trouble | None, finishes: bool) -> Object:
    """The status of a pod with that trouble; one that `finishes` has run to its end without."""
    since = pod["metadata"]["creationTimestamp"]
    spec = pod["spec"]
    if trouble and trouble.reason == "Unschedulable":
        conditions = [_condition("PodScheduled", False, since, "Unschedulable", trouble.message)]
        return {"phase": "Pending", "conditions": conditions, "qosClass": "Burstable"}
    failed = bool(trouble and trouble.reason == "Error")
    inits = [c["name"] for c in spec.get("initContainers", [])]
    whole = trouble is not None and not trouble.container
    in_init = trouble is not None and trouble.container in inits
    statuses: dict[str, list[Object]] = {"initContainerStatuses": [], "containerStatuses": []}
    reached = True  # nothing before this container keeps it from its turn
    for container in images(spec):
        name = container["name"]
        init = name in inits
        concerned = trouble is not None and trouble.container == name
        waiting = "PodInitializing" if inits and (whole or in_init or init) else "ContainerCreating"
        if concerned and trouble:
            state = _troubled(trouble, since)
        elif whole or not reached:
            state = _waiting(waiting)
        elif init and container.get("restartPolicy") != "Always":
            state = _terminated(0, since) | {"ready": True}
        elif finishes and not init and trouble is None:
            state = _terminated(0, since)
        else:
            state = {"state": {"running": {"startedAt": since}}, "ready": True, "started": True}
        reached = reached and not (init and concerned)
        shown = {"name": name, "image": container["image"], "imageID": "", "restartCount": 0}
        shown |= {"ready": False, "started": False} | state
        statuses["initContainerStatuses" if init else "containerStatuses"].append(shown)
    ready = all(s["ready"] for s in statuses["containerStatuses"])
    started = any("running" in s["state"] for s in statuses["containerStatuses"])
    done = finishes and trouble is None
    phase = "Failed" if failed else "Succeeded" if done else "Running" if started else "Pending"
    crashing = trouble is not None and trouble.reason == "CrashLoopBackOff" and not in_init
    names = ", ".join(s["name"] for s in statuses["containerStatuses"] if not s["ready"])
    unready = ("ContainersNotReady", f"containers with unready status: [{names}]")
    completed = ("PodCompleted", "") if done else unready
    return {
        "phase": "Running" if crashing else phase,
        "conditions": [
            _condition("PodReadyToStartContainers", not whole, since),
            _condition("Initialized", not (whole and inits) and not in_init, since),
            _condition("Ready", ready, since, *completed),
            _condition("ContainersReady", ready, since, *completed),
            _condition("PodScheduled", True, since),
        ],
        "startTime": since,
        "hostIP": "192.168.49.2",
        "qosClass": "Burstable",
        **{k: v for k, v in statuses.items() if v},
    }


def _condition(kind: str, true: bool, since: str, reason: str = "", message: str = "") -> Object:
    why = {} if true else {k: v for k, v in {"reason": reason, "message": message}.items() if v}
    return {"type": kind, "status": str(true), "lastTransitionTime": since} | why


def _waiting(reason: str, message: str = "") -> Object:
    return {"state": {"waiting": {"reason": reason} | ({"message": message} if message else {})}}


def _terminated(code: int, since: str) -> Object:
    end = {"exitCode": code, "reason": "Error" if code else "Completed"}
    return {"state": {"terminated": end | {"startedAt": since, "finishedAt": since}}}


def _troubled(trouble: Trouble, since: str) -> Object:
    if trouble.reason == "NotReady":
        return {"state": {"running": {"startedAt": since}}, "started": True}
    if trouble.reason == "Error":
        return _terminated(1, since)
    state = _waiting(trouble.reason, trouble.message)
    if trouble.reason == "CrashLoopBackOff":
        state |= {"restartCount": 5, "lastState": _terminated(1, since)["state"]}
    return state


def is_ready(pod: Object) -> bool:
    conditions = pod.get("status", {}).get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def is_running(pod: Object) -> bool:
    statuses = pod.get("status", {}).get("containerStatuses", [])
    return any("running" in shown["state"] for shown in statuses)
