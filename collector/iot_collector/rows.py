"""Messages as tuples of PostgreSQL's binary COPY format.

Format: https://www.postgresql.org/docs/current/sql-copy.html ("Binary Format"). A message is
encoded once, when it is read, and travels as bytes from there on; only the rare message that
PostgreSQL refuses is decoded again.
"""

import itertools
import struct
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import orjson
import psycopg2
import psycopg2.extensions

from .fields import fields_of_all

COLUMNS = "received_at, qos, retained, topic, properties, fields, payload"
HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER = b"\xff\xff"
_COPY = f"COPY messages ({COLUMNS}) FROM STDIN BINARY".encode()
_ANY_SIZE = (1 << 31) - 1  # the most that copy_expert can be told to take at once

_COLUMN_COUNT = 7
_EPOCH = 946_684_800  # PostgreSQL counts timestamptz in microseconds from 2000-01-01 UTC.
_NULL = b"\xff\xff\xff\xff"
_JSONB = 1  # the version of jsonb that is sent as text
# What is kept of topics is bounded whatever devices do.
_MAX_TOPICS = 10_000
_MAX_TOPIC = 256  # bytes; a longer one is encoded each time

_head = struct.Struct(">hiq").pack
_flags = struct.Struct(">ihib").pack
_length = lru_cache(4096)(struct.Struct(">i").pack)
_jsonb_length = lru_cache(4096)(struct.Struct(">ib").pack)


class Message(NamedTuple):
    """A tuple decoded again; ``timestamp`` is Unix time in seconds, the rest as received."""

    timestamp: float
    qos: int
    retained: bool
    topic: bytes
    properties: bytes | None
    fields: bytes | None
    payload: bytes


def head(timestamp: float) -> bytes:
    """Return the beginning of the tuples of all messages received at a time in Unix seconds."""
    return _head(_COLUMN_COUNT, 8, round((timestamp - _EPOCH) * 1_000_000))


class Prefixes(dict[bytes, bytes]):
    """Topic -> how the tuples of its messages go on after their head; made at the first use.

    :param header: first byte of their PUBLISH packets (MQTT 5 §3.3.1: DUP, QoS, RETAIN).
    """

    def __init__(self, header: int) -> None:
        super().__init__()
        self._flags = _flags(2, header >> 1 & 3, 1, header & 1)

    def __missing__(self, topic: bytes) -> bytes:
        """Return the prefix of a topic.

        :raises ValueError: it is not one that MQTT allows (UTF-8 without NUL, §4.7.3).
        """
        if not topic or b"\0" in topic:
            raise ValueError("topic is empty or contains NUL")
        topic.decode()  # UnicodeDecodeError is a ValueError
        prefix = self._flags + _length(len(topic)) + topic + _NULL
        if len(topic) <= _MAX_TOPIC:
            if len(self) >= _MAX_TOPICS:
                self.clear()
            self[topic] = prefix
        return prefix


def with_properties(prefix: bytes, properties: bytes) -> bytes:
    """Return a prefix with a JSON object of MQTT 5 properties, in place of none."""
    return prefix[: -len(_NULL)] + _jsonb_length(len(properties) + 1, _JSONB) + properties


def tuples(prefixes: list[bytes], payloads: list[bytes]) -> list[bytes]:
    """Return the tuples of messages, without their heads."""
    made = []
    all_fields = fields_of_all(payloads)
    for prefix, fields, payload in zip(prefixes, all_fields, payloads, strict=True):
        size = _length(len(payload))
        if fields is None:
            made.append(b"".join((prefix, _NULL, size, payload)))
        else:
            fields_size = _jsonb_length(len(fields) + 1, _JSONB)
            made.append(b"".join((prefix, fields_size, fields, size, payload)))
    return made


def copy(
    cursor: psycopg2.extensions.cursor,
    tuples: Iterable[bytes],
    opening: bytes = b"",
    closing: bytes = b"",
) -> None:
    """Copy tuples, with their heads, into ``messages``; SQL before and after in the same query."""
    file: Any = _Pieces(itertools.chain((HEADER,), tuples, (TRAILER,)))
    try:
        cursor.copy_expert(opening + _COPY + closing, file, size=_ANY_SIZE)
    except psycopg2.Error:
        if file.bug is not None:  # psycopg2 makes a canceled query of it, without its traceback
            raise file.bug from None
        raise


class _Pieces:
    """A file that gives its content in the pieces in which it is there already.

    Joined they would be a megabyte, which the allocator fetches from the system and returns, page
    by page, for each batch: that costs as much as a quarter of all else (benchmarks/).
    """

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = filter(None, pieces)  # an empty one would be the end
        self.bug: Exception | None = None  # what the making of a piece has raised

    def read(self, _size: int) -> bytes:
        """Return the next piece, or nothing at the end."""
        try:
            return next(self._pieces, b"")
        except Exception as error:
            self.bug = error
            raise


def decode(row: bytes) -> Message:
    """Return the message that a tuple, with its head, was made of."""
    values: list[bytes | None] = []
    at = 2
    for _ in range(_COLUMN_COUNT):
        size = int.from_bytes(row[at : at + 4], signed=True)
        at += 4
        values.append(None if size < 0 else row[at : at + size])
        at += max(size, 0)
    received, qos, retained, topic, properties, fields, payload = values
    return Message(
        timestamp=_EPOCH + int.from_bytes(received or b"", signed=True) / 1_000_000,
        qos=int.from_bytes(qos or b""),
        retained=retained == b"\x01",
        topic=topic or b"",
        properties=properties[1:] if properties else None,
        fields=fields[1:] if fields else None,
        payload=payload or b"",
    )


def without_fields(row: bytes) -> bytes:
    """Return the tuple with ``fields`` null: the message without our reading of it."""
    message = decode(row)
    if message.fields is None:
        return row
    end = len(row) - len(message.payload) - 4
    start = end - len(message.fields) - 5
    return row[:start] + _NULL + row[end:]


def properties_json(user: list[tuple[str, str]], other: dict[str, object]) -> bytes | None:
    """Return MQTT 5 properties as a JSON object, or None where there are none.

    User properties may repeat a name (MQTT 5 §3.3.2.3.7), so each name has a list of values.
    """
    names: dict[str, list[str]] = {}
    for name, value in user:
        names.setdefault(name, []).append(value)
    document = other | ({"user": names} if names else {})
    if not document:
        return None
    text = orjson.dumps(document)
    return None if b"\\u0000" in text else text
