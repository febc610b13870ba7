"""``iot-collector dead-letters``: list, show, retry and delete what PostgreSQL refused."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import datetime
from functools import partial
from typing import NamedTuple

import orjson
import psycopg2
import psycopg2.extensions

from .binary_payloads import BinaryTopics, decoder_of
from .copy_format import (
    RowPrefixes,
    copy,
    encode_rows,
    tuple_start,
    with_properties,
    without_fields,
)
from .database import connect
from .dead_letters import attempt, reason_of
from .message_ids import fields_and_ids
from .settings import Settings
from .summaries import summarize_again

Cursor = psycopg2.extensions.cursor

_COLUMNS = (
    "id, received_at, extract(epoch FROM received_at)::float8, topic, payload, properties, qos,"
    " retained, reason, sqlstate, stored_at"
)


class DeadLetter(NamedTuple):
    """A row of ``dead_letters``; ``timestamp`` is ``received_at`` in Unix seconds."""

    id: int
    received_at: datetime
    timestamp: float
    topic: bytes
    payload: bytes
    properties: bytes | None
    qos: int
    retained: bool
    reason: str
    sqlstate: str
    stored_at: datetime


@contextmanager
def _cursor(settings: Settings) -> Iterator[Cursor]:
    with closing(connect(settings)) as connection, connection.cursor() as cursor:
        cursor.execute("SET timezone = 'UTC'")
        yield cursor


def _fetch(cursor: Cursor) -> list[DeadLetter]:
    letters = map(DeadLetter._make, cursor.fetchall())
    return [
        letter._replace(
            topic=bytes(letter.topic),
            payload=bytes(letter.payload),
            properties=None if letter.properties is None else bytes(letter.properties),
        )
        for letter in letters
    ]


def newest(settings: Settings, limit: int) -> tuple[list[DeadLetter], int, int]:
    """Return the newest dead letters, how many there are, and how many are in the fallback table.

    :raises psycopg2.Error: they could not be read.
    """
    with _cursor(settings) as cursor:
        cursor.execute(f"SELECT {_COLUMNS} FROM dead_letters ORDER BY id DESC LIMIT %s", (limit,))  # noqa: S608
        letters = _fetch(cursor)
        cursor.execute(
            "SELECT (SELECT count(*) FROM dead_letters),"
            " (SELECT count(*) FROM dead_letters_fallback)"
        )
        [(total, fallback)] = cursor.fetchall()
    return letters, total, fallback


def find(settings: Settings, letter_id: int) -> DeadLetter | None:
    """Return a dead letter, or None if there is none with this id.

    :raises psycopg2.Error: it could not be read.
    """
    with _cursor(settings) as cursor:
        cursor.execute(f"SELECT {_COLUMNS} FROM dead_letters WHERE id = %s", (letter_id,))  # noqa: S608
        return next(iter(_fetch(cursor)), None)


def ids(settings: Settings, wanted: Sequence[int] | None) -> list[int]:
    """Return the ids of the wanted dead letters that exist; with None, of all dead letters.

    :raises psycopg2.Error: they could not be read.
    """
    with _cursor(settings) as cursor:
        cursor.execute(
            "SELECT id FROM dead_letters WHERE %(ids)s::bigint[] IS NULL OR id = ANY(%(ids)s)"
            " ORDER BY id",
            {"ids": None if wanted is None else list(wanted)},
        )
        return [letter_id for (letter_id,) in cursor.fetchall()]


def retry(settings: Settings, letter_ids: Sequence[int]) -> Iterator[tuple[int, str | None]]:
    """Try to store dead letters in ``messages``, each in a separate transaction.

    One transaction inserts the message and deletes the dead letter, so the message is stored once.
    If PostgreSQL refuses the message again, the dead letter stays, with the new reason.

    :returns: for each dead letter that still exists, its id and None, or its id and the reason why
        it was refused again.
    :raises psycopg2.Error: the cause is not the data; the current dead letter is unchanged.
    """
    binary_topics = BinaryTopics(settings)
    with _cursor(settings) as cursor:
        for letter_id in letter_ids:
            cursor.execute("BEGIN")
            try:
                cursor.execute(
                    f"SELECT {_COLUMNS} FROM dead_letters WHERE id = %s FOR UPDATE",  # noqa: S608
                    (letter_id,),
                )
                found = _fetch(cursor)
                refusal = _store(cursor, found[0], binary_topics) if found else None
                cursor.execute("COMMIT")
            except psycopg2.Error:
                if not cursor.connection.closed:
                    cursor.execute("ROLLBACK")
                raise
            if found:
                yield letter_id, refusal


def _store(cursor: Cursor, letter: DeadLetter, binary_topics: BinaryTopics) -> str | None:
    """Move a dead letter to ``messages``; return None, or the new reason if it is refused."""
    # The month may have been archived, and the partition dropped.
    cursor.execute("SELECT ensure_partitions(%s, 0)", (letter.received_at,))
    refusal: psycopg2.Error | None = None
    for step in _ways_to_store(cursor, letter, binary_topics):
        refusal = attempt(cursor, step)
        if refusal is None:
            cursor.execute("DELETE FROM dead_letters WHERE id = %s", (letter.id,))
            summarize_again(cursor, letter.timestamp, letter.timestamp)
            return None
    if refusal is None:
        raise AssertionError("_ways_to_store yields at least one step")
    cursor.execute(
        "UPDATE dead_letters SET reason = %s, sqlstate = %s WHERE id = %s",
        (reason_of(refusal), refusal.pgcode or "", letter.id),
    )
    return reason_of(refusal)


def _ways_to_store(
    cursor: Cursor, letter: DeadLetter, binary_topics: BinaryTopics
) -> Iterator[Callable[[], None]]:
    """Yield the steps that the collector tries to store a message, see `dead_letters.store_valid`.

    First with the fields of the payload, then without them.
    """
    prefix = RowPrefixes(letter.qos << 1 | letter.retained)[letter.topic]
    decoder = binary_topics.decoder_of(letter.topic)
    if letter.properties is not None:
        prefix = with_properties(prefix, letter.properties)
        content_type = orjson.loads(letter.properties).get("ContentType", "")
        decoder = decoder_of(content_type) or decoder
    fields, _ = fields_and_ids([letter.payload], None, {0: decoder} if decoder else {})
    row = tuple_start(letter.timestamp) + encode_rows([prefix], [letter.payload], fields)[0]
    yield partial(copy, cursor, [row])
    if (raw := without_fields(row)) != row:
        yield partial(copy, cursor, [raw])


def purge(settings: Settings, letter_ids: Sequence[int]) -> int:
    """Delete dead letters for good; return how many were deleted.

    :raises psycopg2.Error: nothing was deleted.
    """
    with _cursor(settings) as cursor:
        cursor.execute("DELETE FROM dead_letters WHERE id = ANY(%s)", (list(letter_ids),))
        return cursor.rowcount
