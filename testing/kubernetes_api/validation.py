"""What the API refuses although it fits the schema: wrong values, and changes to fixed fields.

A selection: the rules that manifests rendered from templates are likely to break. Each is described
with its field in https://kubernetes.io/docs/reference/kubernetes-api/.
"""

import re
from base64 import b64decode
from binascii import Error as Base64Error
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from decimal import Decimal, InvalidOperation
from typing import Any

from .errors import bad_request, invalid
from .kinds import Kind
from .pod_security import LABEL, LEVELS

Object = dict[str, Any]
Cause = tuple[str, str]

_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_DATA_KEY = re.compile(r"[-._a-zA-Z0-9]{1,253}")
_PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9](-?[a-z0-9])*")
_QUANTITY = re.compile(r"([+-]?[0-9.]+)([eE][-+]?[0-9]+|[numkMGTPE]?|[KMGTPE]i)")
_QUANTITY_TEXT = r"'^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
_SUFFIXES = {s: Decimal(1000) ** n for n, s in enumerate(["n", "u", "m", "", *"kMGTPE"], -3)}
_SUFFIXES |= {f"{s}i": Decimal(1024) ** n for n, s in enumerate("KMGTPE", 1)}
_ANNOTATIONS_LIMIT = 256 * 1024
_DATA_LIMIT = 1024 * 1024
_DNS_LABEL_KINDS = {"Namespace", "Service"}


def _wrong(value: Any, why: str) -> str:
    return f"Invalid value: {quoted(value)}: {why}"


def quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _metadata(kind: Kind, meta: Object) -> Iterator[Cause]:
    name = meta.get("name", "")
    limit = 63 if kind.kind in _DNS_LABEL_KINDS else 253
    if kind.group != "rbac.authorization.k8s.io":
        if not _NAME.fullmatch(name) or (limit == 63 and "." in name):
            what = "label" if limit == 63 else "subdomain"
            yield (
                "metadata.name",
                _wrong(
                    name,
                    f"a lowercase RFC 1123 {what} must consist of lower case alphanumeric "
                    "characters, '-'"
                    + (" or '.'" if limit == 253 else "")
                    + ", and must start and end with an "
                    "alphanumeric character",
                ),
            )
        if len(name) > limit:
            yield "metadata.name", _wrong(name, f"must be no more than {limit} characters")
    yield from _labels("metadata.labels", meta.get("labels", {}))
    annotations = meta.get("annotations", {})
    size = sum(len(k.encode()) + len(v.encode()) for k, v in annotations.items())
    if size > _ANNOTATIONS_LIMIT:
        yield "metadata.annotations", f"Too long: may not be more than {_ANNOTATIONS_LIMIT} bytes"


def _labels(path: str, labels: Object) -> Iterator[Cause]:
    for value in labels.values():
        if not _LABEL_VALUE.fullmatch(value):
            yield (
                path,
                _wrong(
                    value,
                    "a valid label must be an empty string or consist of at most 63 alphanumeric "
                    "characters, '-', '_' or '.', and must start and end with an alphanumeric "
                    "character",
                ),
            )


def _namespace(obj: Object) -> Iterator[Cause]:
    for mode in ("enforce", "audit", "warn"):
        level = obj["metadata"].get("labels", {}).get(LABEL + mode)
        if level is not None and level not in LEVELS:
            field = f"metadata.labels[{LABEL}{mode}]"
            yield field, _wrong(level, f"must be one of {', '.join(LEVELS)}")


def _data(obj: Object) -> Iterator[Cause]:
    for field in ("data", "binaryData"):
        for key, value in obj.get(field, {}).items():
            if not _DATA_KEY.fullmatch(key):
                yield (
                    f"{field}[{key}]",
                    _wrong(
                        key,
                        "a valid config key must consist of alphanumeric characters, '-', '_' or "
                        "'.' (e.g. 'key.name',  or 'KEY_NAME',  or 'key-name', regex used for "
                        "validation is '[-._a-zA-Z0-9]+')",
                    ),
                )
            if obj["kind"] == "Secret" or field == "binaryData":
                try:
                    b64decode(value, validate=True)
                except Base64Error as error:
                    raise bad_request(
                        f'{obj["kind"]} in version "v1" cannot be handled as a {obj["kind"]}: '
                        f"illegal base64 data at {field}.{key}"
                    ) from error
    values = [*obj.get("data", {}).values(), *obj.get("binaryData", {}).values()]
    if sum(len(value.encode()) for value in values) > _DATA_LIMIT:
        yield "", f"Too long: may not be more than {_DATA_LIMIT} bytes"


def _quantity(value: Any) -> Decimal:
    """A malformed quantity is refused as a whole, before anything else is looked at."""
    match = _QUANTITY.fullmatch(str(value))
    try:
        number, suffix = match.groups() if match else ("", "")
        scale = _SUFFIXES[suffix] if suffix in _SUFFIXES else Decimal(f"1{suffix}")
        return Decimal(number) * scale
    except InvalidOperation as error:
        raise bad_request(
            f"unable to parse quantity {quoted(value)}: quantities must match the regular "
            f"expression {_QUANTITY_TEXT}"
        ) from error


def _duplicates(path: str, key: str, values: list[Any]) -> Iterator[Cause]:
    counts = Counter(values)
    for number, value in enumerate(values):
        if counts[value] > 1 and values.index(value) != number:
            yield f"{path}[{number}].{key}", f"Duplicate value: {quoted(value)}"


def _container(path: str, container: Object, volumes: set[str], init: bool) -> Iterator[Cause]:
    if not container.get("image"):
        yield f"{path}.image", "Required value"
    mounts = container.get("volumeMounts", [])
    for number, mount in enumerate(mounts):
        if mount["name"] not in volumes:
            yield f"{path}.volumeMounts[{number}].name", f'Not found: "{mount["name"]}"'
    for number, mount in enumerate(mounts):
        if mount["mountPath"] in [m["mountPath"] for m in mounts[:number]]:
            field = f"{path}.volumeMounts[{number}].mountPath"
            yield field, _wrong(mount["mountPath"], "must be unique")
    for number, port in enumerate(container.get("ports", [])):
        if not 0 < port["containerPort"] < 65536:
            field = f"{path}.ports[{number}].containerPort"
            yield field, _wrong(port["containerPort"], "must be between 1 and 65535, inclusive")
        name = port.get("name")
        if name and (len(name) > 15 or not _PORT_NAME.fullmatch(name)):
            why = "must be no more than 15 characters" if len(name) > 15 else "must be lower case"
            yield f"{path}.ports[{number}].name", _wrong(name, why)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if probe not in container:
            continue
        settings = container[probe]
        if init and container.get("restartPolicy") != "Always":
            field = f"{path}.{probe}"
            yield (
                field,
                "Forbidden: may not be set for init containers without restartPolicy=Always",
            )
        if not {"exec", "httpGet", "tcpSocket", "grpc"} & set(settings):
            yield f"{path}.{probe}", "Required value: must specify a handler type"
        if probe != "readinessProbe" and settings["successThreshold"] != 1:
            field = f"{path}.{probe}.successThreshold"
            yield field, _wrong(settings["successThreshold"], "must be 1")
    limits = container["resources"].get("limits", {})
    requests = container["resources"].get("requests", {})
    for resource, value in requests.items():
        if resource in limits and _quantity(value) > _quantity(limits[resource]):
            field = f"{path}.resources.requests"
            why = f"must be less than or equal to {resource} limit of {limits[resource]}"
            yield field, _wrong(value, why)
    for value in limits.values():
        _quantity(value)


def _pod_spec(path: str, spec: Object, policies: tuple[str, ...]) -> Iterator[Cause]:
    if not spec.get("containers"):
        yield f"{path}.containers", "Required value"
    names = [v["name"] for v in spec.get("volumes", [])]
    yield from _duplicates(f"{path}.volumes", "name", names)
    for number, volume in enumerate(spec.get("volumes", [])):
        if len(volume) > 2:
            yield f"{path}.volumes[{number}]", "Forbidden: may not specify more than 1 volume type"
    everyone = []
    for field in ("initContainers", "containers"):
        for number, container in enumerate(spec.get(field, [])):
            where = f"{path}.{field}[{number}]"
            yield from _container(where, container, set(names), field == "initContainers")
            everyone.append(container["name"])
    yield from _duplicates(f"{path}.containers", "name", everyone)
    if spec["restartPolicy"] not in policies:
        listed = ", ".join(f'"{policy}"' for policy in policies)
        given = f'Unsupported value: "{spec["restartPolicy"]}": supported values: {listed}'
        required = f"Required value: valid values: {listed}"
        yield f"{path}.restartPolicy", given if spec["restartPolicy"] else required


def _pod(obj: Object) -> Iterator[Cause]:
    yield from _pod_spec("spec", obj["spec"], ("Always", "OnFailure", "Never"))


def _workload(obj: Object) -> Iterator[Cause]:
    template, job = obj["spec"]["template"], obj["kind"] == "Job"
    labels = template.get("metadata", {}).get("labels", {})
    wanted = obj["spec"]["selector"].get("matchLabels", {})
    yield from _labels("spec.template.metadata.labels", labels)
    if not job and not any(obj["spec"]["selector"].values()):
        yield "spec.selector", _wrong({}, f"empty selector is invalid for {obj['kind'].lower()}")
    if not wanted.items() <= labels.items():
        field = "spec.template.metadata.labels"
        yield field, _wrong(labels, "`selector` does not match template `labels`")
    for claim in obj["spec"].get("volumeClaimTemplates", []):
        template["spec"].setdefault("volumes", []).append(
            {"name": claim["metadata"]["name"], "persistentVolumeClaim": {}}
        )
        yield from _claim(claim)
    yield from _pod_spec(
        "spec.template.spec", template["spec"], ("OnFailure", "Never") if job else ("Always",)
    )


def _claim(obj: Object) -> Iterator[Cause]:
    if not obj["spec"].get("accessModes"):
        yield "spec.accessModes", "Required value: at least 1 access mode is required"
    storage = obj["spec"].get("resources", {}).get("requests", {}).get("storage")
    if storage is None:
        yield "spec.resources[storage]", "Required value"
    else:
        _quantity(storage)


def _service(obj: Object) -> Iterator[Cause]:
    spec, ports = obj["spec"], obj["spec"].get("ports", [])
    if not ports and spec.get("clusterIP") != "None" and spec["type"] != "ExternalName":
        yield "spec.ports", "Required value"
    for number, port in enumerate(ports):
        if len(ports) > 1 and not port.get("name"):
            yield f"spec.ports[{number}].name", "Required value"
    yield from _duplicates("spec.ports", "name", [p["name"] for p in ports if p.get("name")])


def _disruption_budget(obj: Object) -> Iterator[Cause]:
    if {"minAvailable", "maxUnavailable"} <= set(obj.get("spec", {})):
        yield "spec", _wrong("...", "minAvailable and maxUnavailable cannot be both set")


def _autoscaler(obj: Object) -> Iterator[Cause]:
    most, least = obj["spec"]["maxReplicas"], obj["spec"]["minReplicas"]
    if most < least:
        yield "spec.maxReplicas", _wrong(most, "must be greater than or equal to `minReplicas`")


_RULES = {
    "Namespace": _namespace,
    "ConfigMap": _data,
    "Secret": _data,
    "Pod": _pod,
    "StatefulSet": _workload,
    "Deployment": _workload,
    "Job": _workload,
    "PersistentVolumeClaim": _claim,
    "Service": _service,
    "PodDisruptionBudget": _disruption_budget,
    "HorizontalPodAutoscaler": _autoscaler,
}

# Of a StatefulSet's spec, the fields that may change
# (https://kubernetes.io/docs/concepts/workloads/controllers/statefulset/).
_STATEFUL_SET = (
    "replicas",
    "ordinals",
    "template",
    "updateStrategy",
    "revisionHistoryLimit",
    "persistentVolumeClaimRetentionPolicy",
    "minReadySeconds",
)
_CLAIM = (
    "spec is immutable after creation except resources.requests and volumeAttributesClassName for "
    "bound claims"
)
_FIXED = "field is immutable"
# Fields that never change once they are set, and what the refusal says.
_IMMUTABLE = {
    "Job": {"spec.template": _FIXED, "spec.selector": _FIXED, "spec.completions": _FIXED},
    "Deployment": {"spec.selector": _FIXED},
    "ReplicaSet": {"spec.selector": _FIXED},
    "Secret": {"type": _FIXED},
    "Service": {"spec.clusterIP": _FIXED},
    "RoleBinding": {"roleRef": "cannot change roleRef"},
    "StorageClass": {"provisioner": _FIXED, "parameters": _FIXED, "reclaimPolicy": _FIXED},
}


def _at(obj: Object, path: str) -> Any:
    value: Any = obj
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _changes(old: Object, new: Object) -> Iterator[Cause]:
    kind = new["kind"]
    for path, why in _IMMUTABLE.get(kind, {}).items():
        if _at(old, path) != _at(new, path):
            yield path, _wrong(_at(new, path), why)
    specs = old.get("spec", {}), new.get("spec", {})
    changed = {f for f in {*specs[0], *specs[1]} if specs[0].get(f) != specs[1].get(f)}
    if kind == "StatefulSet" and changed - set(_STATEFUL_SET):
        listed = ", ".join(f"'{field}'" for field in _STATEFUL_SET[:-1])
        yield (
            "spec",
            "Forbidden: updates to statefulset spec for fields other than "
            f"{listed} and '{_STATEFUL_SET[-1]}' are forbidden",
        )
    if kind == "PersistentVolumeClaim" and changed - {"resources", "volumeAttributesClassName"}:
        yield "spec", f"Forbidden: {_CLAIM}"
    if kind == "PersistentVolumeClaim" and "resources" in changed:
        if old.get("status", {}).get("phase") != "Bound":
            yield "spec", f"Forbidden: {_CLAIM}"
        elif _quantity(_at(new, "spec.resources.requests.storage")) < _quantity(
            old["status"]["capacity"]["storage"]
        ):
            field = "spec.resources.requests.storage"
            yield field, "Forbidden: field can not be less than status.capacity"
    if kind == "Pod" and changed - {"activeDeadlineSeconds", "terminationGracePeriodSeconds"}:
        images = all(
            [c | {"image": ""} for c in specs[0].get(f, [])]
            == [c | {"image": ""} for c in specs[1].get(f, [])]
            for f in ("initContainers", "containers")
        )
        if not images or changed - {"initContainers", "containers"}:
            yield "spec", "Forbidden: pod updates may not change fields other than images"
    if old.get("immutable") and any(old.get(f) != new.get(f) for f in ("data", "immutable")):
        yield "data", "Forbidden: field is immutable when `immutable` is set"


def check(kind: Kind, obj: Object, old: Object | None = None) -> None:
    """Refuse an object with wrong values, or a change of `old` that isn't allowed (422, some 400).

    `obj` has its defaults already, and is left as it is.
    """
    causes = [
        *_metadata(kind, obj["metadata"]),
        *_RULES.get(kind.kind, lambda _: [])(deepcopy(obj)),
    ]
    if old is not None:
        causes += _changes(old, obj)
    if causes:
        raise invalid(kind, obj["metadata"].get("name", ""), causes)
