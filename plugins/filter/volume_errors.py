"""The filter ``volume_errors``: whether existing volumes match the inventory.

A StatefulSet's volumeClaimTemplates cannot be changed. A claim can only grow, and only if its
storage class has allowVolumeExpansion:
https://kubernetes.io/docs/concepts/storage/persistent-volumes/#expanding-persistent-volumes-claims
"""

from __future__ import annotations

from typing import Any

Object = dict[str, Any]

_MOVE = (
    "or move: back up the data, delete them with the namespace, deploy again and restore them "
    "(docs/kubernetes.md, Volumes)."
)


def volume_errors(
    wanted: dict[str, Object], storage_class: str, kubectl: str, objects: list[Object]
) -> list[str]:
    """Return an error message with the next step for each volume that does not match.

    ``wanted`` has the ``size`` and the name of its ``variable`` by component. ``storage_class`` is
    "" for the cluster's default. ``kubectl`` is the command with the options for the namespace.
    ``objects`` are the namespace's StatefulSets and claims and the cluster's storage classes, each
    with its ``kind``.
    """
    workloads = {o["metadata"]["name"]: o for o in objects if o["kind"] == "StatefulSet"}
    errors = []
    for component, want in wanted.items():
        if _bytes(want["size"]) is None:
            errors.append(
                f"{want['variable']} is {want['size']}, which is not a size such as 10Gi."
            )
        elif templates := workloads.get(component, {}).get("spec", {}).get("volumeClaimTemplates"):
            template = templates[0]
            prefix = f"{template['metadata']['name']}-{component}-"
            claims = [
                o
                for o in objects
                if o["kind"] == "PersistentVolumeClaim" and o["metadata"]["name"].startswith(prefix)
            ]
            classes = sorted({c["spec"].get("storageClassName", "") for c in claims})
            errors += _class_errors(component, template, storage_class, classes)
            growing = {
                o["metadata"]["name"]
                for o in objects
                if o["kind"] == "StorageClass" and o.get("allowVolumeExpansion")
            }
            fixed = [name for name in classes if name not in growing]
            errors += _size_errors(component, template, want, kubectl, claims, fixed)
    return errors


def _class_errors(component: str, template: Object, wanted: str, classes: list[str]) -> list[str]:
    """Return why the storage class cannot be changed; ``classes`` are those of the claims."""
    made = template["spec"].get("storageClassName", "")
    if made == wanted:
        return []
    before = f"with iot_storage_class: {made}" if made else "without an iot_storage_class"
    has = f" (its volume has {', '.join(classes)})" if classes and not made else ""
    return [
        f"iot_storage_class is {wanted or 'empty'}, but {component} was deployed {before}{has}. "
        "A volume keeps the storage class that it was created with.\n"
        f"Next: set iot_storage_class to {made or 'nothing'} again, {_MOVE}"
    ]


def _size_errors(
    component: str,
    template: Object,
    want: Object,
    kubectl: str,
    claims: list[Object],
    fixed: list[str],
) -> list[str]:
    """Return why the size cannot be changed; ``fixed`` are the classes that cannot grow."""
    made = template["spec"]["resources"]["requests"]["storage"]
    size, before = _bytes(want["size"]), _bytes(made)
    if size == before:
        return []
    now = f"{want['variable']} is {want['size']}, but {component} was deployed with {made}."
    back = f"Next: set {want['variable']} to {made} again, {_MOVE}"
    if size < before:
        return [f"{now} A volume cannot shrink.\n{back}"]
    if fixed:
        why = f"The storage class {fixed[0]} has no allowVolumeExpansion: true, so its"
        return [f"{now} {why} volumes cannot grow.\n{back}"]
    patch = f"""'{{"spec": {{"resources": {{"requests": {{"storage": "{want["size"]}"}}}}}}}}'"""
    grow = [
        f"  {kubectl} patch pvc {claim['metadata']['name']} -p {patch}"
        for claim in claims
        if _bytes(claim["spec"]["resources"]["requests"]["storage"]) < size
    ]
    return [
        "\n".join(
            [
                f"{now} The volume can grow, but Kubernetes does not do it for a StatefulSet.",
                "Next: grow it, delete the StatefulSet but not its pods, which continue to run, "
                "and run the playbook again:",
                *grow,
                f"  {kubectl} delete statefulset {component} --cascade=orphan",
            ]
        )
    ]


def _bytes(size: object) -> Any:
    """Return a Kubernetes quantity as a number; None if it is not a quantity above zero."""
    # Imported here, because preflight first reports a missing module with its fix.
    from kubernetes.utils.quantity import parse_quantity

    try:
        number = parse_quantity(size)
        positive = number > 0
    except (ValueError, ArithmeticError):
        return None
    return number if positive else None


class FilterModule:
    """Filter ``volume_errors``."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {"volume_errors": volume_errors}
