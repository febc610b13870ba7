"""The monthly partitions of the table ``messages``.

They are created months before they are needed, so that no message has to wait for one. The SQL is
the function ``ensure_partitions`` of migrations/0001_messages.sql.
"""

import psycopg2.extensions

MONTHS_AHEAD = 3


def create_partitions(cursor: psycopg2.extensions.cursor, timestamp: float) -> None:
    """Create the partitions from a time's month (UTC) to three months later, where missing.

    :param timestamp: Unix time.
    """
    cursor.execute("SELECT ensure_partitions(to_timestamp(%s), %s)", (timestamp, MONTHS_AHEAD))
