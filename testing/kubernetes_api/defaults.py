"""The values filled in that controllers, kubernetes.core or the roles read."""

from base64 import b64encode
from typing import Any

Object = dict[str, Any]

DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"


def fill(obj: Object) -> None:
    """Fill in what `obj`, which has its uid already, leaves out, in place."""
    meta = obj["metadata"]
    match obj["kind"]:
        case "Namespace":
            meta["labels"] = meta.get("labels", {}) | {"kubernetes.io/metadata.name": meta["name"]}
        case "StatefulSet":
            spec = obj["spec"]
            spec["updateStrategy"] = {"type": "RollingUpdate"} | spec.get("updateStrategy", {})
            spec.setdefault("replicas", 1)
        case "Job":
            spec = obj["spec"]
            spec.setdefault("completions", 1)
            template = spec["template"].setdefault("metadata", {})
            labels = {"batch.kubernetes.io/job-name": meta["name"], "job-name": meta["name"]}
            template["labels"] = template.get("labels", {}) | labels
        case "Secret":
            obj.setdefault("type", "Opaque")
            plain = obj.pop("stringData", {})
            encoded = {key: b64encode(value.encode()).decode() for key, value in plain.items()}
            if encoded:
                obj["data"] = obj.get("data", {}) | encoded
        case "StorageClass":
            obj.setdefault("reclaimPolicy", "Delete")
