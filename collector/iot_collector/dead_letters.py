"""What PostgreSQL refuses for the data's sake: found by bisection, kept in ``dead_letters``."""

from collections import Counter

import psycopg2
import psycopg2.extensions
import structlog

from .database import kind_of
from .rows import copy, decode, without_fields

log = structlog.get_logger(__name__)

_REASONS = {"22": "invalid_data", "23": "constraint", "54": "too_large"}  # by class of SQLSTATE


def store_or_bury(
    cursor: psycopg2.extensions.cursor, rows: list[bytes], dead_letters: Counter[str]
) -> int:
    """Store the rows that can be stored; keep the others as dead letters, counted by reason.

    :param rows: tuples with their heads.
    :returns: how many were stored.
    :raises psycopg2.Error: for no row's sake, or ``dead_letters`` itself refused one.
    """
    refusal = _try(cursor, rows)
    if refusal is None:
        return len(rows)
    if len(rows) > 1:
        middle = len(rows) // 2
        stored = store_or_bury(cursor, rows[:middle], dead_letters)
        return stored + store_or_bury(cursor, rows[middle:], dead_letters)
    if (bare := without_fields(rows[0])) != rows[0]:
        # Perhaps only our reading of the payload is at fault.
        return store_or_bury(cursor, [bare], dead_letters)
    _bury(cursor, rows[0], refusal)
    dead_letters[_REASONS.get((refusal.pgcode or "")[:2], "refused")] += 1
    return 0


def _try(cursor: psycopg2.extensions.cursor, rows: list[bytes]) -> psycopg2.Error | None:
    """Store the rows and return None, or store none and return why the data was refused."""
    cursor.execute("SAVEPOINT part")
    try:
        copy(cursor, rows)
    except psycopg2.Error as error:
        if kind_of(error) != "data":
            raise
        cursor.execute("ROLLBACK TO SAVEPOINT part; RELEASE SAVEPOINT part")
        return error
    cursor.execute("RELEASE SAVEPOINT part")
    return None


def _bury(cursor: psycopg2.extensions.cursor, row: bytes, refusal: psycopg2.Error) -> None:
    timestamp, qos, retained, topic, properties, _, payload = decode(row)
    reason = refusal.diag.message_primary or str(refusal)
    cursor.execute(
        "INSERT INTO dead_letters"
        " (received_at, topic, payload, properties, qos, retained, reason, sqlstate)"
        " VALUES (to_timestamp(%s), %s, %s, %s, %s, %s, %s, %s)",
        (timestamp, topic, payload, properties, qos, retained, reason, refusal.pgcode),
    )
    log.error("message kept as dead letter", topic=topic, sqlstate=refusal.pgcode)
