"""The database connection: one batch, one transaction.

What PostgreSQL refuses for the data's sake is found by bisection and kept in ``dead_letters``;
every other error is the caller's to retry, with nothing stored.
"""

import io
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import psycopg2
import psycopg2.errorcodes
import psycopg2.extensions
import structlog

from . import rows as copy
from .flow import Chunk
from .message_ids import drop_known, forget_old
from .settings import Settings

log = structlog.get_logger(__name__)

MONTHS_AHEAD = 3
_COPY = f"COPY messages ({copy.COLUMNS}) FROM STDIN BINARY".encode()
_PRUNE_EVERY = 64  # batches: what the ledger does not need any more costs little until then

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
    "44": "data",  # WITH CHECK OPTION
    "54": "data",  # program limit exceeded: a topic too long for the index
    "57": "shutdown",
    "57014": "timeout",
    "P0": "data",  # a trigger's RAISE: somebody's own rule refuses the row
}


# The classes of SQLSTATE that PostgreSQL has itself.
_CLASSES = {v for k, v in vars(psycopg2.errorcodes).items() if k.startswith("CLASS_")}


def kind_of(error: psycopg2.Error) -> str:
    """Return the kind of an error, one of a small fixed set."""
    if isinstance(error, psycopg2.InterfaceError) or not error.pgcode:
        return "authentication" if "authentication failed" in str(error) else "connection"
    if error.diag.constraint_name == "ledger_pkey":
        return "client_id"  # another process writes batches under ours
    if error.pgcode == "23514" and error.diag.table_name and not error.diag.constraint_name:
        return "schema"  # neither a CHECK nor a RAISE: there is no partition for the row
    for size in (5, 2):
        if error.pgcode[:size] in _KINDS:
            return _KINDS[error.pgcode[:size]]
    # A class that PostgreSQL does not have comes from a trigger's RAISE, like P0.
    return "other" if error.pgcode[:2] in _CLASSES else "data"


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
        "client_encoding": "UTF8",  # which is what MQTT's topics are in
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
    except UnicodeDecodeError:  # whose text has a part of what it could not read
        raise psycopg2.OperationalError("password file: it is not UTF-8 text") from None
    if password is not None:
        options["password"] = password
    connection: psycopg2.extensions.connection = psycopg2.connect(settings.database_url, **options)
    return connection


class Store:
    """Writes batches. Used by one thread; connects when it has to."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client_id = settings.mqtt_client_id
        self._writer = str(uuid.uuid4())
        self._connection: psycopg2.extensions.connection | None = None
        self._days_done: set[int] = set()
        self._seq: int | None = None  # of the last batch in the ledger; None: not known
        # The batch, and what became of it, of a COMMIT that got no answer.
        self._unsure: tuple[int, Stored] | None = None

    def ping(self) -> None:
        """Ask the database for a sign of life.

        :raises psycopg2.Error: there is none.
        """
        with self._cursor() as cursor:
            cursor.execute("SELECT 'messages'::regclass")  # needs no right to read it

    def begin_session(self, *, present: bool, filters: list[str]) -> tuple[list[str], list[bytes]]:
        """Note that the broker has a session for us, subscribed to ``filters``.

        :param present: whether it is the one that it had before; if not, the ledger means nothing.
        :returns: the filters it was subscribed to before and is not now, and the ledger's batches.
        :raises psycopg2.Error: nothing was noted.
        """
        client = (self._client_id,)
        with self._transaction() as cursor:
            stale: list[str] = []
            if present:
                cursor.execute("SELECT filters FROM sessions WHERE client_id = %s", client)
                stale = [f for (old,) in cursor.fetchall() for f in old if f not in filters]
            else:
                cursor.execute("DELETE FROM ledger WHERE client_id = %s", client)
            cursor.execute(
                "INSERT INTO sessions (client_id, filters) VALUES (%s, %s)"
                " ON CONFLICT (client_id) DO UPDATE SET filters = excluded.filters",
                (self._client_id, filters),
            )
            return stale, self._batches(cursor)

    def ledger(self) -> list[bytes]:
        """Return the packets of the batches in the ledger, oldest first."""
        with self._cursor() as cursor:
            return self._batches(cursor)

    def _batches(self, cursor: psycopg2.extensions.cursor) -> list[bytes]:
        cursor.execute(
            "SELECT seq, packets FROM ledger WHERE client_id = %s ORDER BY seq", (self._client_id,)
        )
        found = cursor.fetchall()
        # From what was seen, and never read apart from it: a batch that is committed later takes
        # the next place, and is noticed because it is taken.
        self._seq = found[-1][0] if found else 0
        return [bytes(packets) for _, packets in found]

    def write(self, chunks: list[Chunk], packets: bytes, keep: int) -> Stored:
        """Store a batch in one transaction; return what became of its rows, after COMMIT.

        :param packets: what the ledger says of it; ``keep`` is how many of the last batches'
            the ledger needs, this one included.
        :raises psycopg2.Error: nothing was stored as far as is known. To be called again with the
            same batch, which then looks whether it was. Never of the kind "data".
        """
        if (stored := self._find_unsure()) is not None:
            return stored
        self._do_daily(chunks)
        try:
            with self._booking(packets, keep) as (cursor, opening, stored):
                if self._settings.message_id_key is None:
                    stored.inserted = _copy(cursor, b"".join(_tuples(chunks)), opening)
                else:
                    cursor.execute(opening)
                    new = self._drop_known(cursor, chunks, stored)
                    stored.inserted = _copy(cursor, b"".join(_tuples(new)))
        except psycopg2.Error as error:
            if kind_of(error) == "client_id" and (stored := self._find_unsure()) is not None:
                return stored  # our COMMIT without an answer was still under way when we looked
            if kind_of(error) != "data":
                raise
            log.warning("a row was refused, searching the batch for it", error=one_line(error))
            with self._booking(packets, keep) as (cursor, opening, stored):
                # What is checked only at COMMIT could not be found by bisection.
                cursor.execute(opening + b"SET CONSTRAINTS ALL IMMEDIATE")
                new = self._drop_known(cursor, chunks, stored)
                _bisect(cursor, [c.head + row for c in new for row in c.rows], stored)
        return stored

    def _drop_known(
        self, cursor: psycopg2.extensions.cursor, chunks: list[Chunk], stored: Stored
    ) -> list[Chunk]:
        if self._settings.message_id_key is None:
            return chunks
        new, stored.duplicates = drop_known(cursor, chunks, self._settings.message_id_key)
        return new

    @contextmanager
    def _booking(
        self, packets: bytes, keep: int
    ) -> Iterator[tuple[psycopg2.extensions.cursor, bytes, Stored]]:
        """Run a transaction that enters its batch in the ledger.

        It has to begin with the SQL that comes with the cursor. That goes with the first
        statement, because each round trip costs both sides what ten rows do (benchmarks/).
        """
        seq = (self._last_seq() if self._seq is None else self._seq) + 1
        stored = Stored()
        with self._cursor() as cursor:
            opening = cursor.mogrify(
                "BEGIN; INSERT INTO ledger (client_id, seq, writer, packets)"
                " VALUES (%s, %s, %s, %s);",
                (self._client_id, seq, self._writer, packets),
            )
            if seq % _PRUNE_EVERY == 0:
                opening += cursor.mogrify(
                    "DELETE FROM ledger WHERE client_id = %s AND seq <= %s;",
                    (self._client_id, seq - keep),
                )
            yield cursor, opening, stored
            self._unsure = (seq, stored)
            cursor.execute("COMMIT")
        self._unsure = None
        self._seq = seq

    def _find_unsure(self) -> Stored | None:
        """Return what the transaction did whose COMMIT got no answer, or None if it did nothing."""
        if self._unsure is None:
            return None
        seq, stored = self._unsure
        with self._cursor() as cursor:
            cursor.execute(
                "SELECT 1 FROM ledger WHERE client_id = %s AND seq = %s AND writer = %s",
                (self._client_id, seq, self._writer),
            )
            committed = cursor.fetchone() is not None
        if not committed:
            return None  # or not yet: then its place in the ledger turns out to be taken
        self._unsure = None
        self._seq = seq
        return stored

    def _last_seq(self) -> int:
        with self._cursor() as cursor:
            cursor.execute(
                "SELECT coalesce(max(seq), 0) FROM ledger WHERE client_id = %s", (self._client_id,)
            )
            (seq,) = cursor.fetchone() or (0,)
        return int(seq)

    def close(self) -> None:
        """Close the connection; the next call opens another."""
        self._days_done.clear()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextmanager
    def _transaction(self) -> Iterator[psycopg2.extensions.cursor]:
        """COMMIT at the end of the block, ROLLBACK on any error."""
        with self._cursor() as cursor:
            cursor.execute("BEGIN")
            yield cursor
            cursor.execute("COMMIT")

    @contextmanager
    def _cursor(self) -> Iterator[psycopg2.extensions.cursor]:
        """A cursor outside of any transaction, or in one that an error rolls back."""
        if self._connection is None:
            self._connection = connect(self._settings)
            # Transactions are begun and ended in SQL, where that saves round trips.
            self._connection.autocommit = True
            self._warn_if_not_durable()
        with self._connection.cursor() as cursor:
            try:
                yield cursor
            except BaseException:
                with suppress(psycopg2.Error):  # the connection may be gone, and with it all
                    cursor.execute("ROLLBACK")
                raise

    def _warn_if_not_durable(self) -> None:
        with self._cursor() as cursor:
            cursor.execute("SHOW synchronous_commit")
            if cursor.fetchone() == ("off",):
                log.warning(
                    "synchronous_commit is off: a crash of PostgreSQL can lose acknowledged "
                    "messages; set it to on for this role or database"
                )

    def _do_daily(self, chunks: list[Chunk]) -> None:
        # With the first batch of each day: partitions are made months ahead of use.
        days = {int(chunk.timestamp // 86400) for chunk in chunks}
        if not days <= self._days_done:
            with self._transaction() as cursor:
                for day in days:
                    start = datetime.fromtimestamp(day * 86400, UTC)
                    cursor.execute("SELECT ensure_partitions(%s, %s)", (start, MONTHS_AHEAD))
                forget_old(cursor)
            self._days_done = days


def _tuples(chunks: list[Chunk]) -> Iterator[bytes]:
    for chunk in chunks:
        if chunk.rows:
            yield chunk.head
            yield chunk.head.join(chunk.rows)


def _copy(cursor: psycopg2.extensions.cursor, tuples: bytes, opening: bytes = b"") -> int:
    data = io.BytesIO(b"".join((copy.HEADER, tuples, copy.TRAILER)))
    cursor.copy_expert(opening + _COPY, data, size=1 << 18)
    return cursor.rowcount


def one_line(error: psycopg2.Error) -> str:
    """Return the text of an error without line breaks."""
    return " ".join(str(error).split())


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
        stored.inserted += _copy(cursor, b"".join(rows))
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
