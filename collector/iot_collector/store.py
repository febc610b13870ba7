"""The database connection: one batch, one transaction.

What PostgreSQL refuses for the data's sake is found by bisection and kept in ``dead_letters``;
every other error is the caller's to retry, with nothing stored.
"""

import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import psycopg2
import psycopg2.extensions
import structlog

from . import rows as copy
from .settings import Settings

log = structlog.get_logger(__name__)

MONTHS_AHEAD = 3

# SQLSTATE -> kind of error, by the longest prefix that fits
# (https://www.postgresql.org/docs/current/errcodes-appendix.html).
_KINDS = {
    "08": "connection",
    "22": "data",
    "23": "data",
    "25006": "read_only",
    "28": "authentication",
    "3D": "schema",
    "3F": "schema",
    "40": "conflict",
    "42": "schema",
    "42501": "permission",
    "53": "resources",
    "53100": "disk_full",
    "53300": "too_many_connections",
    "54": "data",  # program limit exceeded: a topic too long for the index
    "57": "shutdown",
    "57014": "timeout",
    "P0": "data",  # a trigger's RAISE: somebody's own rule refuses the row
}


def kind_of(error: psycopg2.Error) -> str:
    """Return the kind of an error, one of a small fixed set."""
    if isinstance(error, psycopg2.InterfaceError) or not error.pgcode:
        return "authentication" if "authentication failed" in str(error) else "connection"
    for size in (5, 2):
        if error.pgcode[:size] in _KINDS:
            return _KINDS[error.pgcode[:size]]
    return "other"


@dataclass(slots=True)
class Stored:
    """What a committed transaction did with its rows; dead letters counted by reason."""

    inserted: int = 0
    duplicates: int = 0
    dead_letters: Counter[str] = field(default_factory=Counter)


def connect(settings: Settings) -> psycopg2.extensions.connection:
    """Open a connection as the settings say, libpq's variables filling what they leave open.

    :raises psycopg2.OperationalError: the database is not reached or refuses the login.
    """
    options: dict[str, Any] = {
        "fallback_application_name": "iot-collector",
        "connect_timeout": 10,
        # A peer that vanished is noticed in seconds, not in TCP's quarter of an hour.
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 30_000,
    }
    given = psycopg2.extensions.parse_dsn(settings.database_url) if settings.database_url else {}
    options = {name: value for name, value in options.items() if name not in given}
    try:
        password = settings.database_secret
    except OSError as error:  # a secret being rotated may be away for a moment
        raise psycopg2.OperationalError(f"password file: {error}") from error
    if password is not None:
        options["password"] = password
    connection: psycopg2.extensions.connection = psycopg2.connect(settings.database_url, **options)
    return connection


class Store:
    """Writes batches. Used by one thread; connects when it has to."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._connection: psycopg2.extensions.connection | None = None
        self._partitioned_days: set[int] = set()

    def ping(self) -> None:
        """Ask the database for a sign of life.

        :raises psycopg2.Error: there is none.
        """
        with self._transaction() as cursor:
            cursor.execute("SELECT 1 FROM messages LIMIT 0")

    def write(self, rows: list[bytes], first: float, last: float) -> Stored:
        """Store COPY tuples in one transaction and return what became of them after COMMIT.

        :param first: Unix time of the oldest row; ``last`` that of the newest.
        :raises psycopg2.Error: nothing was stored, or, where the connection broke at COMMIT,
            perhaps all of it; never of the kind "data".
        """
        self._ensure_partitions(first, last)
        stored = Stored()
        try:
            with self._transaction() as cursor:
                stored.inserted = _copy(cursor, rows)
        except psycopg2.Error as error:
            if kind_of(error) != "data":
                raise
            log.warning("row refused, searching the batch for it", rows=len(rows), error=str(error))
            with self._transaction() as cursor:
                # What is checked only at COMMIT could not be found by bisection.
                cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
                stored = Stored()
                _bisect(cursor, rows, stored)
        return stored

    def close(self) -> None:
        """Close the connection; the next call opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextmanager
    def _transaction(self) -> Iterator[psycopg2.extensions.cursor]:
        """COMMIT at the end of the block, ROLLBACK on any error."""
        if self._connection is None:
            self._connection = connect(self._settings)
            self._warn_if_not_durable()
        with self._connection, self._connection.cursor() as cursor:
            yield cursor

    def _warn_if_not_durable(self) -> None:
        with self._transaction() as cursor:
            cursor.execute("SHOW synchronous_commit")
            if cursor.fetchone() == ("off",):
                log.warning(
                    "synchronous_commit is off: a crash of PostgreSQL can lose acknowledged "
                    "messages; set it to on for this role or database"
                )

    def _ensure_partitions(self, first: float, last: float) -> None:
        # Asked with the first batch of each day: partitions are made months ahead of use.
        days = {int(moment // 86400) for moment in (first, last)}
        if not days <= self._partitioned_days:
            with self._transaction() as cursor:
                for day in days:
                    start = datetime.fromtimestamp(day * 86400, UTC)
                    cursor.execute("SELECT ensure_partitions(%s, %s)", (start, MONTHS_AHEAD))
            self._partitioned_days = days


def _copy(cursor: psycopg2.extensions.cursor, rows: list[bytes]) -> int:
    data = io.BytesIO(b"".join((copy.HEADER, *rows, copy.TRAILER)))
    cursor.copy_expert(f"COPY messages ({copy.COLUMNS}) FROM STDIN BINARY", data, size=1 << 18)
    return cursor.rowcount


def _bisect(cursor: psycopg2.extensions.cursor, rows: list[bytes], stored: Stored) -> None:
    """Store the rows that can be stored; keep the others as dead letters."""
    refusal = _try_copy(cursor, rows, stored)
    if refusal is None:
        return
    if len(rows) > 1:
        middle = len(rows) // 2
        _bisect(cursor, rows[:middle], stored)
        _bisect(cursor, rows[middle:], stored)
    elif (bare := copy.without_fields(rows[0])) != rows[0]:
        # Perhaps only our reading of the payload is at fault.
        _bisect(cursor, [bare], stored)
    else:
        _bury(cursor, rows[0], refusal)
        stored.dead_letters[_reason(refusal)] += 1


def _try_copy(
    cursor: psycopg2.extensions.cursor, rows: list[bytes], stored: Stored
) -> psycopg2.Error | None:
    """Store the rows and return None, or store none and return why the data was refused."""
    cursor.execute("SAVEPOINT part")
    try:
        stored.inserted += _copy(cursor, rows)
    except psycopg2.Error as error:
        if kind_of(error) != "data":
            raise
        cursor.execute("ROLLBACK TO SAVEPOINT part; RELEASE SAVEPOINT part")
        return error
    cursor.execute("RELEASE SAVEPOINT part")
    return None


def _reason(error: psycopg2.Error) -> str:
    return {"22": "invalid_data", "23": "constraint", "54": "too_large"}.get(
        (error.pgcode or "")[:2], "refused"
    )


def _bury(cursor: psycopg2.extensions.cursor, row: bytes, error: psycopg2.Error) -> None:
    message = copy.decode(row)
    cursor.execute(
        "INSERT INTO dead_letters"
        " (received_at, topic, payload, properties, qos, retained, reason, sqlstate)"
        " VALUES (to_timestamp(%s), %s, %s, %s, %s, %s, %s, %s)",
        (
            message.timestamp,
            message.topic,
            message.payload,
            message.properties,
            message.qos,
            message.retained,
            (error.diag.message_primary or str(error)),
            error.pgcode,
        ),
    )
    log.error("message kept as dead letter", topic=message.topic, sqlstate=error.pgcode)
