"""What PostgreSQL refuses because of the data: found by bisection, kept in ``dead_letters``.

Somebody's constraint or trigger on ``dead_letters`` may refuse it again. Then it is kept in
``dead_letters_fallback``, a table without constraints, and the flow goes on. A table and not the
log, because logs are rotated away, and a rule that refuses everything would make that a loss.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial

import psycopg2
import psycopg2.extensions
import structlog

from .database import kind_of, one_line
from .rows import copy, decode, without_fields

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


def store_or_bury(
    cursor: psycopg2.extensions.cursor, rows: list[bytes], dead_letters: Counter[str]
) -> int:
    """Store the rows that can be stored; keep the others as dead letters, counted by reason.

    :param rows: tuples with their heads.
    :returns: how many were stored.
    :raises psycopg2.Error: the cause is not the data, or ``dead_letters_fallback`` refused it.
    """
    refusal = _attempt(cursor, partial(copy, cursor, rows))
    if refusal is None:
        return len(rows)
    if len(rows) > 1:
        middle = len(rows) // 2
        stored = store_or_bury(cursor, rows[:middle], dead_letters)
        return stored + store_or_bury(cursor, rows[middle:], dead_letters)
    if (bare := without_fields(rows[0])) != rows[0]:
        # Perhaps only our reading of the payload is at fault.
        return store_or_bury(cursor, [bare], dead_letters)
    dead_letters[_bury(cursor, rows[0], refusal)] += 1
    return 0


def _attempt(
    cursor: psycopg2.extensions.cursor, step: Callable[[], object]
) -> psycopg2.Error | None:
    """Do a step and return None, or undo it and return why the data was refused."""
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


def _bury(cursor: psycopg2.extensions.cursor, row: bytes, refusal: psycopg2.Error) -> str:
    """Keep a row as a dead letter; return the reason it is counted under."""
    timestamp, qos, retained, topic, properties, _, payload = decode(row)
    state = refusal.pgcode or ""
    letter = (timestamp, topic, payload, properties, qos, retained, _text(refusal), state)
    again = _attempt(cursor, partial(cursor.execute, _INSERT, letter))
    if again is None:
        log.error("message kept as dead letter", topic=topic, sqlstate=state)
        return _REASONS.get(state[:2], "refused")
    cursor.execute(_INSERT_FALLBACK, (*letter, _text(again)))
    log.error(
        "dead_letters refused a message, which is kept in dead_letters_fallback",
        topic=topic,
        sqlstate=again.pgcode,
        error=one_line(again),
    )
    return REFUSED_TWICE


def _text(refusal: psycopg2.Error) -> str:
    return refusal.diag.message_primary or str(refusal)
