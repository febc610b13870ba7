"""JSON Merge Patch (RFC 7386)."""

from typing import Any


def merge(current: Any, patch: Any) -> Any:
    """Return ``current`` with ``patch`` merged in. Null deletes a field; a list is replaced."""
    if not isinstance(patch, dict):
        return patch
    result = dict(current) if isinstance(current, dict) else {}
    for field, value in patch.items():
        if value is None:
            result.pop(field, None)
        else:
            result[field] = merge(result.get(field), value)
    return result


def without_nulls(value: Any) -> Any:
    """Return a manifest without the fields that are null: the API treats them as not set."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value
