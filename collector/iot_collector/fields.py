"""The content of a payload as JSON, for the column ``fields``.

The raw payload is always stored; ``fields`` has the part that SQL can query without decoding. The
functions here raise no errors: a payload that cannot be parsed has no fields. binary_payloads.py
decodes CBOR and MessagePack.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import orjson

# A number in the syntax of JSON (RFC 8259 §6), which jsonb accepts.
_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_NAME = re.compile(rb"[A-Za-z_][\w.\- ]{0,127}")
_MAX_CACHED = 32  # bytes; the fields of a longer payload are not cached
_MAX_TEXT = 255  # bytes; a longer text is not a reading, and would only be stored twice
_NUL = b"\\u0000"  # jsonb cannot hold U+0000


def fields_of_all(payloads: list[bytes]) -> Sequence[bytes | None]:
    """Return the result of `fields_of` for each payload."""
    try:
        # This loop in C takes half the time of calling `fields_of` for each payload (benchmarks/).
        types = set(map(type, map(orjson.loads, payloads)))
    except orjson.JSONDecodeError:
        types = {type(None)}
    return payloads if _are_fields(types, payloads) else [fields_of(p) for p in payloads]


def documents_of(payloads: list[bytes]) -> list[Any] | None:
    """Parse payloads that are all JSON and fields as they are; return None if one is not."""
    try:
        documents = list(map(orjson.loads, payloads))
    except orjson.JSONDecodeError:
        return None
    return documents if _are_fields(map(type, documents), payloads) else None


def _are_fields(types: Iterable[type], payloads: list[bytes]) -> bool:
    """Whether JSON payloads can be stored as fields: none is null or contains U+0000."""
    return type(None) not in types and _NUL not in b"".join(payloads)


def fields_of(payload: bytes) -> bytes | None:
    """Return the JSON text of the payload's fields, or None if it has none.

    * JSON other than ``null`` is returned unchanged: PostgreSQL keeps every digit of its numbers.
    * ``temperature:23`` gives ``{"temperature":23}``, ``state:on`` gives ``{"state":"on"}``. The
      value may also be a JSON object or array.
    * Other text gives a JSON string, if it is one line of at most 255 bytes: ``on`` gives ``"on"``.

    The result is valid for ``jsonb``, except for numbers beyond the limits of ``jsonb``.
    """
    if len(payload) <= _MAX_CACHED and payload[:1] not in (b"{", b"["):
        return _fields_of_short(payload)
    return _fields_of(payload)


def _fields_of(payload: bytes) -> bytes | None:
    try:
        document = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return _fields_of_text(payload.strip())
    return None if document is None or _NUL in payload else payload


# Text takes longer to parse than JSON, and the same texts come often: on, off, online.
_fields_of_short = lru_cache(4096)(_fields_of)


def _fields_of_text(text: bytes) -> bytes | None:
    """Return the fields of a payload that is not JSON.

    :param text: the payload, without the white space around it.
    """
    if text[:1] in b'{["':  # empty, or invalid JSON
        return None
    # A single regular expression for all of this would take minutes on some payloads of 128 KiB.
    name, colon, value = text.partition(b":")
    name, value = name.strip(), value.strip()
    if colon and not (name and value):
        return None
    if colon and _NAME.fullmatch(name):
        found = _value(value)
        return found and b'{"%b":%b}' % (name, found)
    return _string(text) if len(text) <= _MAX_TEXT and _one_line(text) else None


def _value(text: bytes) -> bytes | None:
    """Return the value of a pair ``name:value`` as JSON, or None."""
    if text[:1] in b"{[" or _NUMBER.fullmatch(text):
        # orjson refuses numbers that overflow a double, as most programs that read the column do.
        try:
            orjson.loads(text)
        except orjson.JSONDecodeError:
            return _string(text)
        return None if _NUL in text else text
    return _string(text)


def _string(text: bytes) -> bytes | None:
    try:
        value = orjson.dumps(text.decode())
    except UnicodeDecodeError:
        return None
    return None if _NUL in value else value


def _one_line(text: bytes) -> bool:
    try:
        return text.decode().isprintable()
    except UnicodeDecodeError:
        return False
