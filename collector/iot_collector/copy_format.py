"""Messages in PostgreSQL's binary COPY format.

Format: https://www.postgresql.org/docs/current/sql-copy.html ("Binary Format"). A message is
encoded once, when it is read. It is decoded again only if PostgreSQL refuses it.

All messages of one read have the same time. A tuple, as the format calls it, therefore has two
parts: the start (number of columns and ``received_at``), made once per read, and the row (the other
columns), made for each message.
"""

import itertools
import struct
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import orjson
import psycopg2
import psycopg2.extensions

COLUMNS = "received_at, qos, retained, topic, properties, fields, payload"
HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER = b"\xff\xff"
_COPY = f"COPY messages ({COLUMNS}) FROM STDIN BINARY".encode()
_ANY_SIZE = (1 << 31) - 1  # the largest ``size`` that copy_expert accepts

_COLUMN_COUNT = 7
_EPOCH = 946_684_800  # PostgreSQL counts timestamptz in microseconds from 2000-01-01 UTC.
_NULL = b"\xff\xff\xff\xff"
_JSONB = 1  # version number of jsonb's binary format, in which the JSON is text
_MAX_TOPICS = 10_000  # entries in the cache `RowPrefixes`
_MAX_TOPIC = 256  # bytes; a longer topic is not cached

_start = struct.Struct(">hiq").pack
_flags = struct.Struct(">ihib").pack
_length = lru_cache(4096)(struct.Struct(">i").pack)
_jsonb_length = lru_cache(4096)(struct.Struct(">ib").pack)


class Message(NamedTuple):
    """A decoded tuple: ``timestamp`` in Unix seconds, topic and payload as received, JSON as text.

    ``properties`` and ``fields`` are None for NULL.
    """

    timestamp: float
    qos: int
    retained: bool
    topic: bytes
    properties: bytes | None
    fields: bytes | None
    payload: bytes


def tuple_start(timestamp: float) -> bytes:
    """Return the start of the tuples of messages received at ``timestamp``, in Unix seconds."""
    return _start(_COLUMN_COUNT, 8, round((timestamp - _EPOCH) * 1_000_000))


class RowPrefixes(dict[bytes, bytes]):
    """Cache: topic -> the columns qos, retained, topic and properties (NULL) of its messages.

    :param header: first byte of their PUBLISH packets (MQTT 5 §3.3.1: DUP, QoS, RETAIN).
    """

    def __init__(self, header: int) -> None:
        super().__init__()
        self._flags = _flags(2, header >> 1 & 3, 1, header & 1)

    def __missing__(self, topic: bytes) -> bytes:
        """Make the prefix for a topic.

        :raises ValueError: MQTT does not allow the topic (it must be UTF-8 without NUL, MQTT 5
            §4.7.3).
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


def topic_of(prefix: bytes) -> bytes:
    """Return the topic in a prefix."""
    start = len(_flags(2, 0, 1, 0)) + 4
    return prefix[start : start + int.from_bytes(prefix[start - 4 : start])]


def with_properties(prefix: bytes, properties: bytes) -> bytes:
    """Return a prefix with MQTT 5 properties (a JSON object) in place of its NULL."""
    return prefix[: -len(_NULL)] + _jsonb_length(len(properties) + 1, _JSONB) + properties


def encode_rows(
    prefixes: list[bytes], payloads: list[bytes], all_fields: Sequence[bytes | None]
) -> list[bytes]:
    """Return the row of each message, from its prefix, payload and fields (JSON or None)."""
    rows = []
    for prefix, fields, payload in zip(prefixes, all_fields, payloads, strict=True):
        size = _length(len(payload))
        if fields is None:
            rows.append(b"".join((prefix, _NULL, size, payload)))
        else:
            fields_size = _jsonb_length(len(fields) + 1, _JSONB)
            rows.append(b"".join((prefix, fields_size, fields, size, payload)))
    return rows


def copy(
    cursor: psycopg2.extensions.cursor,
    tuples: Iterable[bytes],
    sql_before: bytes = b"",
    sql_after: bytes = b"",
) -> None:
    """Copy tuples into ``messages``, with other SQL before and after COPY in the same query.

    :param tuples: the bytes of the tuples, in pieces of any size.
    :raises psycopg2.Error: the query failed.
    """
    pieces = itertools.chain((HEADER,), tuples, (TRAILER,))
    copy_pieces(cursor, sql_before + _COPY + sql_after, pieces)


def copy_pieces(cursor: psycopg2.extensions.cursor, sql: bytes, pieces: Iterable[bytes]) -> None:
    """Run a COPY FROM STDIN whose data comes in pieces of any size.

    :raises psycopg2.Error: the query failed.
    """
    file: Any = _PieceFile(pieces)
    try:
        cursor.copy_expert(sql, file, size=_ANY_SIZE)
    except psycopg2.Error:
        # psycopg2 replaces an error of the file with QueryCanceled, without the traceback.
        if file.error is not None:
            raise file.error from None
        raise


class _PieceFile:
    """A file that is read in the pieces that are in memory already.

    Joining the pieces would allocate a megabyte per batch, which the allocator gets from the system
    and returns page by page. That adds a quarter to the CPU time of all other work (benchmarks/).
    """

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = filter(None, pieces)  # an empty piece would mean the end of the file
        self.error: Exception | None = None  # that the iterator of the pieces raised

    def read(self, _size: int) -> bytes:
        """Return the next piece, or no bytes at the end."""
        try:
            return next(self._pieces, b"")
        except Exception as error:
            self.error = error
            raise


def decode_tuple(data: bytes) -> Message:
    """Decode a tuple (its start and its row)."""
    values: list[bytes | None] = []
    at = 2
    for _ in range(_COLUMN_COUNT):
        size = int.from_bytes(data[at : at + 4], signed=True)
        at += 4
        values.append(None if size < 0 else data[at : at + size])
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


def without_fields(data: bytes) -> bytes:
    """Return the tuple with NULL in ``fields``; the same tuple if it has NULL there already."""
    message = decode_tuple(data)
    if message.fields is None:
        return data
    end = len(data) - len(message.payload) - 4
    start = end - len(message.fields) - 5
    return data[:start] + _NULL + data[end:]


def properties_json(user: list[tuple[str, str]], other: dict[str, object]) -> bytes | None:
    """Return MQTT 5 properties as a JSON object; None if there are none or jsonb refuses them.

    A name of user properties may occur several times (MQTT 5 §3.3.2.3.7), so each name has a list
    of values.

    :param user: the user properties, as (name, value).
    :param other: the other properties, by name.
    """
    names: dict[str, list[str]] = {}
    for name, value in user:
        names.setdefault(name, []).append(value)
    document = other | ({"user": names} if names else {})
    if not document:
        return None
    text = orjson.dumps(document)
    return None if b"\\u0000" in text else text
