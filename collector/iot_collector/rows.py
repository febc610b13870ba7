"""Messages as tuples of PostgreSQL's binary COPY format.

Format: https://www.postgresql.org/docs/current/sql-copy.html ("Binary Format"). A message is
encoded once, when it is read, and travels as bytes from there on; only the rare message that
PostgreSQL refuses is decoded again.
"""

import itertools
import struct
from collections.abc import Iterable
from typing import Any, NamedTuple

import orjson
import psycopg2.extensions

from .fields import fields_of

COLUMNS = "received_at, qos, retained, topic, properties, fields, payload"
HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER = b"\xff\xff"
_COPY = f"COPY messages ({COLUMNS}) FROM STDIN BINARY".encode()
_ANY_SIZE = (1 << 31) - 1  # the most that copy_expert can be told to take at once

_COLUMN_COUNT = 7
_EPOCH = 946_684_800  # PostgreSQL counts timestamptz in microseconds from 2000-01-01 UTC.
_NULL = b"\xff\xff\xff\xff"
# The cache, one for each set of flags, is bounded whatever devices do.
_MAX_TOPICS = 10_000
_MAX_TOPIC = 256  # bytes; a longer one is encoded each time

_length = struct.Struct(">i").pack
_jsonb_length = struct.Struct(">ib").pack  # jsonb is sent as version 1 and its text
_head = struct.Struct(">hiq").pack
_flags = struct.Struct(">ihib").pack


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


class RowEncoder:
    """Encodes messages; what repeats from message to message is encoded once."""

    def __init__(self) -> None:
        self._prefixes: list[dict[bytes, bytes]] = [{} for _ in range(8)]

    def row(
        self, header: int, topic: bytes, payload: bytes, properties: bytes | None = None
    ) -> bytes:
        """Return the tuple of a message, without its head.

        :param header: first byte of its PUBLISH packet (MQTT 5 §3.3.1: DUP, QoS, RETAIN).
        :param properties: JSON object of its MQTT 5 properties, if it has any.
        :raises ValueError: the topic is not one that MQTT allows (UTF-8 without NUL, §4.7.3).
        """
        try:
            prefix = self._prefixes[header & 7][topic]
        except KeyError:
            prefix = self._prefix(header, topic)
        if properties is not None:
            prefix = prefix[:-4] + _jsonb_length(len(properties) + 1, 1) + properties
        fields = fields_of(payload)
        size = _length(len(payload))
        if fields is None:
            return b"".join((prefix, _NULL, size, payload))
        fields_size = _jsonb_length(len(fields) + 1, 1)
        return b"".join((prefix, fields_size, fields, size, payload))

    def _prefix(self, header: int, topic: bytes) -> bytes:
        if b"\0" in topic:
            raise ValueError("topic contains NUL")
        topic.decode()  # UnicodeDecodeError is a ValueError
        flags = _flags(2, header >> 1 & 3, 1, header & 1)
        prefix = flags + _length(len(topic)) + topic + _NULL
        if len(topic) <= _MAX_TOPIC:
            cache = self._prefixes[header & 7]
            if len(cache) >= _MAX_TOPICS:
                cache.clear()
            cache[topic] = prefix
        return prefix


def copy(
    cursor: psycopg2.extensions.cursor,
    tuples: Iterable[bytes],
    opening: bytes = b"",
    closing: bytes = b"",
) -> None:
    """Copy tuples, with their heads, into ``messages``; SQL before and after in the same query."""
    file: Any = _Pieces(itertools.chain((HEADER,), tuples, (TRAILER,)))
    cursor.copy_expert(opening + _COPY + closing, file, size=_ANY_SIZE)


class _Pieces:
    """A file that gives its content in the pieces in which it is there already.

    Joined they would be a megabyte, which the allocator fetches from the system and returns, page
    by page, for each batch: that costs as much as a quarter of all else (benchmarks/).
    """

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = filter(None, pieces)  # an empty one would be the end

    def read(self, _size: int) -> bytes:
        """Return the next piece, or nothing at the end."""
        return next(self._pieces, b"")


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
