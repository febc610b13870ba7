"""Refusals, worded and numbered as the Kubernetes API words them.

The form is the `Status` object of
https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/status/.
"""

from typing import Any

from .kinds import Kind


class ApiError(Exception):
    """A refusal; `status()` is what the client gets to read."""

    def __init__(self, code: int, reason: str, message: str, details: dict[str, Any] | None = None):
        super().__init__(message)
        self.code, self.reason, self.details = code, reason, details or {}

    def status(self) -> dict[str, Any]:
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": str(self),
            "reason": self.reason,
            "details": self.details,
            "code": self.code,
        }


def _about(kind: Kind, name: str) -> dict[str, Any]:
    return {"name": name, "group": kind.group, "kind": kind.plural}


def bad_request(message: str) -> ApiError:
    return ApiError(400, "BadRequest", message)


def not_found(kind: Kind, name: str) -> ApiError:
    return ApiError(404, "NotFound", f'{kind.resource} "{name}" not found', _about(kind, name))


def already_exists(kind: Kind, name: str, prefix: str = "") -> ApiError:
    message = f'{prefix}{kind.resource} "{name}" already exists'
    return ApiError(409, "AlreadyExists", message, _about(kind, name))


def modified(kind: Kind, name: str) -> ApiError:
    message = (
        f'Operation cannot be fulfilled on {kind.resource} "{name}": the object has been modified; '
        "please apply your changes to the latest version and try again"
    )
    return ApiError(409, "Conflict", message, _about(kind, name))


def forbidden(kind: Kind, name: str, why: str) -> ApiError:
    message = f'{kind.resource} "{name}" is forbidden: {why}'
    return ApiError(403, "Forbidden", message, _about(kind, name))


def invalid(kind: Kind | None, name: str, causes: list[tuple[str, str]]) -> ApiError:
    """`causes` are (field, "Required value"); all of them are named, as the real API does."""
    texts = [f"{field}: {what}" for field, what in causes]
    listed = texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
    message = f'{kind.qualified if kind else ""} "{name}" is invalid: {listed}'
    details = _about(kind, name) | {"kind": kind.kind} if kind else {}
    reasons = {
        "Required value": "FieldValueRequired",
        "Forbidden": "FieldValueForbidden",
        "Not found": "FieldValueNotFound",
        "Duplicate value": "FieldValueDuplicate",
        "Unsupported value": "FieldValueNotSupported",
    }
    details["causes"] = [
        {
            "reason": reasons.get(what.split(":")[0], "FieldValueInvalid"),
            "message": what,
            "field": field,
        }
        for field, what in causes
    ]
    return ApiError(422, "Invalid", message, details)
