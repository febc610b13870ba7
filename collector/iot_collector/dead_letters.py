"""Messages that PostgreSQL refuses: found by bisection, stored in ``dead_letters``.

A constraint or trigger that somebody added to ``dead_letters`` may refuse a message again. The
message is then stored in ``dead_letters_fallback``, which has no constraints, so that it does not
block the messages after it. Writing it only to the log would not be enough, because logs are
rotated: a constraint that refuses every message would lose every message.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial

import psycopg2
import psycopg2.extensions
import structlog

from .copy_format import copy, decode_tuple, without_fields
from .database import kind_of
from .log import one_line

log = structlog.get_logger(__name__)

REFUSED_TWICE = "refused_twice"
_REASONS = {"22": "invalid_data", "23": "constraint", "54": "too_large"}  # by class of SQLSTATE

_INSERT = """
INSERT INTO dead_letters
    (received_at, topic, payload, properties, qos, retained, reason, sqlstate)
VALUES (to_timestamp(%s), %s, %s, %s, %s, %s, %s, %s)
"""
_INSERT_FALLBACK = """
INSERT INTO dead_letters_fallback
    (received_at, topic, payload, properties, qos, retained, reason, sqlstate, refusal)
VALUES (to_timestamp(%s), %s, %s, %s, %s, %s, %s, %s, %s)
"""


def store_valid(
    cursor: psycopg2.extensions.cursor, tuples: list[bytes], dead_letters: Counter[str]
) -> int:
    """Store the messages that PostgreSQL accepts, the others as dead letters.

    :param tuples: one complete tuple (see copy_format.py) for each message.
    :param dead_letters: counts the dead letters by reason; this function adds to it.
    :returns: how many messages were inserted into ``messages``.
    :raises psycopg2.Error: the cause is not the data, or ``dead_letters_fallback`` refused a
        message.
    """
    refusal = attempt(cursor, partial(copy, cursor, tuples))
    if refusal is None:
        return len(tuples)
    if len(tuples) > 1:
        middle = len(tuples) // 2
        stored = store_valid(cursor, tuples[:middle], dead_letters)
        return stored + store_valid(cursor, tuples[middle:], dead_letters)
    if (raw := without_fields(tuples[0])) != tuples[0]:
        # PostgreSQL may have refused only the fields that were parsed from the payload.
        return store_valid(cursor, [raw], dead_letters)
    dead_letters[_insert_dead_letter(cursor, tuples[0], refusal)] += 1
    return 0


def attempt(
    cursor: psycopg2.extensions.cursor, step: Callable[[], object]
) -> psycopg2.Error | None:
    """Run a step in a savepoint; return None, or the error if PostgreSQL refused the data.

    :raises psycopg2.Error: the cause is not the data.
    """
    cursor.execute("SAVEPOINT part")
    try:
        step()
    except psycopg2.Error as error:
        if kind_of(error) != "data":
            raise
        cursor.execute("ROLLBACK TO SAVEPOINT part; RELEASE SAVEPOINT part")
        return error
    cursor.execute("RELEASE SAVEPOINT part")
    return None


def _insert_dead_letter(
    cursor: psycopg2.extensions.cursor, data: bytes, refusal: psycopg2.Error
) -> str:
    """Store a tuple as a dead letter; return the reason for the metric (a label)."""
    timestamp, qos, retained, topic, properties, _, payload = decode_tuple(data)
    state = refusal.pgcode or ""
    letter = (timestamp, topic, payload, properties, qos, retained, reason_of(refusal), state)
    again = attempt(cursor, partial(cursor.execute, _INSERT, letter))
    if again is None:
        log.error("message kept as dead letter", topic=topic, sqlstate=state)
        return _REASONS.get(state[:2], "refused")
    cursor.execute(_INSERT_FALLBACK, (*letter, reason_of(again)))
    log.error(
        "dead_letters refused a message, which is kept in dead_letters_fallback",
        topic=topic,
        sqlstate=again.pgcode,
        error=one_line(again),
    )
    return REFUSED_TWICE


def reason_of(refusal: psycopg2.Error) -> str:
    """Return the text of an error for the column ``reason`` of ``dead_letters``."""
    return refusal.diag.message_primary or str(refusal)
