"""What a payload says, as JSON: ``temperature:23`` and flat JSON objects.

The raw payload is always stored; ``fields`` is the part of it that can be queried without
decoding. Nothing here raises: a payload that says nothing readable has no fields.
"""

import re
from collections.abc import Sequence

import orjson

# A number as JSON writes it (RFC 8259 §6), so that what is stored is what jsonb accepts.
_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_NAME = re.compile(rb"[A-Za-z_][\w.\- ]{0,127}")
_BRACKET, _BACKSLASH = b"[\\"  # as numbers, which `in` finds at once
_SCALARS = frozenset({str, int, float, bool, type(None)})


def fields_of_all(payloads: list[bytes]) -> Sequence[bytes | None]:
    """Return for each payload what `fields_of` returns for it.

    Flat JSON objects, which most devices send, are read all at once, as one array: that takes half
    the time of reading each (benchmarks/). It is certain of every one of them, because where each
    payload begins with the only ``{`` that it has, and the array's elements are as many objects,
    each element must be one payload.
    """
    together = b",".join(payloads)
    if _plain(together, len(payloads)) and {payload[:1] for payload in payloads} == {b"{"}:
        try:
            documents = orjson.loads(b"[%b]" % together)
        except orjson.JSONDecodeError:
            documents = []  # one of them is not JSON: which one?
        if len(documents) == len(payloads) and set(map(type, documents)) == {dict}:
            return payloads
    return [fields_of(payload) for payload in payloads]


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
        if _plain(payload, 1):  # to see that costs a third of looking at the values
            return payload
        flat = _SCALARS.issuperset(map(type, document.values()))
        return payload if flat and b"\\u0000" not in payload else None
    if payload[:1].isspace():
        return fields_of(payload.strip())
    # Not one pattern for all of it: that takes minutes to fail on some payloads of 128 KiB.
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


def _plain(text: bytes, objects: int) -> bool:
    """Whether JSON of so many objects cannot have nested ones, nor arrays, nor U+0000."""
    return text.count(b"{") == objects and _BRACKET not in text and _BACKSLASH not in text


def _is_number(text: bytes) -> bool:
    # orjson refuses numbers that are infinite as a double; so would every reader of the column.
    if _NUMBER.fullmatch(text) is None:
        return False
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True
