"""The content of a payload as JSON: of ``temperature:23``, and of flat JSON objects.

The raw payload is always stored; ``fields`` is the part of it that SQL can query without decoding.
Nothing here raises an error: any other payload has no fields.
"""

import re
from collections.abc import Sequence
from typing import Any

import orjson

# A number as JSON writes it (RFC 8259 §6), so that what is stored is what jsonb accepts.
_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_NAME = re.compile(rb"[A-Za-z_][\w.\- ]{0,127}")
_BRACKET, _BACKSLASH = b"[\\"  # as int: `in` finds a byte faster than a bytes object
_SCALARS = frozenset({str, int, float, bool, type(None)})


def fields_of_all(payloads: list[bytes]) -> Sequence[bytes | None]:
    """Return for each payload what `fields_of` returns for it."""
    if flat_objects(payloads) is not None:
        return payloads
    return [fields_of(payload) for payload in payloads]


def flat_objects(payloads: list[bytes]) -> list[dict[str, Any]] | None:
    """Parse payloads that are all flat JSON objects; return None where that is not certain.

    They are parsed at once, as one array, in half the time of parsing each (benchmarks/). An
    element of the array cannot be anything but one payload: each payload begins with the only
    ``{`` that it has, and there are as many elements, all objects, as payloads.
    """
    together = b",".join(payloads)
    if _plain(together, len(payloads)) and {payload[:1] for payload in payloads} == {b"{"}:
        try:
            documents: list[dict[str, Any]] = orjson.loads(b"[%b]" % together)
        except orjson.JSONDecodeError:
            return None
        if len(documents) == len(payloads) and set(map(type, documents)) == {dict}:
            return documents
    return None


def fields_of(payload: bytes) -> bytes | None:
    """Return the JSON text of the payload's fields, or None when it has none.

    ``temperature:23`` gives ``{"temperature":23}``, ``state:on`` gives ``{"state":"on"}``; a JSON
    object without nested values is returned as it came (PostgreSQL keeps every digit of its
    numbers); anything else gives None. What is returned is valid for ``jsonb``, but for numbers
    beyond its own limits.
    """
    if payload.startswith(b"{"):
        try:
            document = orjson.loads(payload)
        except orjson.JSONDecodeError:
            return None
        return fields_of_object(payload, document)
    if payload[:1].isspace():
        return fields_of(payload.strip())
    # One regular expression for all of it would take minutes to fail on some payloads of 128 KiB.
    name, _, value = payload.partition(b":")
    name, value = name.strip(), value.strip()
    if not value or _NAME.fullmatch(name) is None:
        return None
    if not _is_number(value):
        try:
            value = orjson.dumps(value.decode())
        except UnicodeDecodeError:
            return None
        if b"\\u0000" in value:  # jsonb cannot hold U+0000
            return None
    return b'{"%b":%b}' % (name, value)


def fields_of_object(payload: bytes, document: dict[str, Any]) -> bytes | None:
    """Return the fields of a payload that is a JSON object: itself, or None if it is nested."""
    if _plain(payload, 1):  # takes a third of the time of the check below
        return payload
    flat = _SCALARS.issuperset(map(type, document.values()))
    return payload if flat and b"\\u0000" not in payload else None


def _plain(text: bytes, objects: int) -> bool:
    """Whether JSON text has this many objects, and no nested one, no array and no U+0000."""
    return text.count(b"{") == objects and _BRACKET not in text and _BACKSLASH not in text


def _is_number(text: bytes) -> bool:
    # orjson refuses numbers that overflow a double; so would most readers of the column.
    if _NUMBER.fullmatch(text) is None:
        return False
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True
