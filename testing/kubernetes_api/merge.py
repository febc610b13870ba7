"""Merging of patches, and of what is applied on the server's side."""

from typing import Any

Object = dict[str, Any]

# What tells the items of a list apart, where the API merges them one by one and does not replace
# the list (`x-kubernetes-list-map-keys` in the OpenAPI document). A protocol left out means TCP.
LIST_KEYS = {
    "containers": ("name",),
    "initContainers": ("name",),
    "env": ("name",),
    "volumes": ("name",),
    "volumeMounts": ("mountPath",),
    "ports": ("containerPort", "port", "protocol"),
    "ownerReferences": ("uid",),
}


def merge(current: Any, patch: Any, *, by_item: bool, name: str = "") -> Any:
    """Return `current` with `patch` merged in; null deletes.

    :param by_item: merge the lists in `LIST_KEYS` item by item; without it this is RFC 7386.
    :param name: of the field that both are the value of.
    """
    if isinstance(patch, dict):
        result = dict(current) if isinstance(current, dict) else {}
        for field, value in patch.items():
            if value is None:
                result.pop(field, None)
            else:
                result[field] = merge(result.get(field), value, by_item=by_item, name=field)
        return result
    if by_item and isinstance(patch, list) and isinstance(current, list) and name in LIST_KEYS:
        items = _by_key(current, name)
        for key, item in _by_key(patch, name).items():
            items[key] = merge(items.get(key), item, by_item=True)
        return list(items.values())
    return patch


def without(current: Any, old: Any, new: Any, name: str = "") -> Any:
    """Return `current` less the fields and items that are in `old` and no longer in `new`."""
    if isinstance(current, dict) and isinstance(old, dict) and isinstance(new, dict):
        return {
            field: without(value, old.get(field), new.get(field), field)
            for field, value in current.items()
            if field not in old or field in new
        }
    if name in LIST_KEYS and all(isinstance(x, list) for x in (current, old, new)):
        olds, news = _by_key(old, name), _by_key(new, name)
        return [
            without(item, olds.get(key), news.get(key))
            for key, item in _by_key(current, name).items()
            if key not in olds or key in news
        ]
    return current


def _by_key(items: list[Object], name: str) -> dict[Any, Object]:
    keys = LIST_KEYS[name]
    return {tuple(i.get(k, "TCP" if k == "protocol" else None) for k in keys): i for i in items}


def without_nulls(value: Any) -> Any:
    """Return a manifest without the fields that are null, which means that they are not there."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value
