"""The monthly partitions of the table ``messages``.

They are created months before they are needed, so that no message has to wait for one. The SQL is
the function ``ensure_partitions`` of migrations/0001_messages.sql.
"""

import re
from contextlib import suppress
from datetime import UTC, date, datetime
from typing import NamedTuple

import psycopg2.extensions

MONTHS_AHEAD = 3
# Start of the comment on a restored partition. A date follows, before which it is not archived.
KEPT_UNTIL = "iot-collector: kept until "

_KEPT = re.compile(re.escape(KEPT_UNTIL) + r"(\d{4}-\d\d-\d\d)")
_BOUNDS = """
SELECT lower::timestamptz AT TIME ZONE 'UTC', extract(epoch FROM upper::timestamptz)::float8,
       coalesce(obj_description(oid, 'pg_class'), '')
FROM (
  SELECT c.oid, substring(pg_get_expr(relpartbound, c.oid) FROM 'FROM \\(''(.+?)''\\)') AS lower,
         substring(pg_get_expr(relpartbound, c.oid) FROM 'TO \\(''(.+?)''\\)') AS upper
  FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid
  WHERE inhparent = 'messages'::regclass AND NOT inhdetachpending
) partitions
WHERE upper::timestamptz < '9000-01-01' AND lower IS NOT NULL  -- Python's years end with 9999
ORDER BY 1
"""


class PartitionTimes(NamedTuple):
    """The times that the alerts about partitions use, in Unix time."""

    until: float  # partitions cover the time from now until then without a gap
    due: float  # when the first partition is due to be archived; infinity if there is none


def kept_until(comment: str) -> date | None:
    """Return the date in the comment on a partition until which it is kept, or None."""
    match = _KEPT.match(comment)
    with suppress(ValueError):  # the date does not exist
        return date.fromisoformat(match[1]) if match else None
    return None


def partition_times(
    cursor: psycopg2.extensions.cursor, now: float, keep_months: int
) -> PartitionTimes:
    """Read how far the partitions reach, and when one is due to be archived.

    :param now: Unix time.
    :param keep_months: whole months that stay in the database.
    """
    cursor.execute(_BOUNDS)
    until, due = now, float("inf")
    for start, end, comment in cursor.fetchall():
        if start.replace(tzinfo=UTC).timestamp() <= until < end:
            until = end
        month = start.year * 12 + start.month - 1 + keep_months + 1
        archived_from = datetime(month // 12, month % 12 + 1, 1, tzinfo=UTC)
        if kept := kept_until(comment):
            archived_from = max(archived_from, datetime(*kept.timetuple()[:3], tzinfo=UTC))
        due = min(due, archived_from.timestamp())
    return PartitionTimes(until, due)


def create_partitions(cursor: psycopg2.extensions.cursor, timestamp: float) -> None:
    """Create the missing partitions, from the month (UTC) of a time to three months later.

    :param timestamp: Unix time.
    """
    cursor.execute("SELECT ensure_partitions(to_timestamp(%s), %s)", (timestamp, MONTHS_AHEAD))
