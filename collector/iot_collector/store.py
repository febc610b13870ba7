"""Batches in the database: one batch, one transaction, with its entry in the ledger."""

import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

import psycopg2
import psycopg2.extensions
import structlog

from . import sessions
from .database import Watch, WatchedConnection, connect, kind_of, one_line
from .dead_letters import store_or_bury
from .flow import Chunk
from .message_ids import drop_known, forget_old
from .rows import copy, head
from .settings import Settings

log = structlog.get_logger(__name__)

MONTHS_AHEAD = 3
_DAILY_SECONDS = 6 * 3600.0  # for a day's old message ids, which may be very many
_PRUNE_EVERY = 64  # batches: what the ledger does not need any more costs little until then

Cursor = psycopg2.extensions.cursor


@dataclass(slots=True)
class Stored:
    """What a committed transaction did with its rows; dead letters counted by reason."""

    inserted: int = 0
    duplicates: int = 0
    dead_letters: Counter[str] = field(default_factory=Counter)


class Store:
    """Writes batches. Used by one thread; connects when it has to."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client_id = settings.mqtt_client_id
        self._writer = str(uuid.uuid4())
        self._connection: WatchedConnection | None = None
        # Twice the time after which the server itself cancels a statement.
        self.watch = Watch(2 * settings.database_timeout_seconds)
        self._days_done: set[int] = set()
        self._seq = 0  # of the last batch in the ledger, as `begin_session` found it
        # A batch whose COMMIT was sent and not answered, and what becomes of it if it took place.
        self._unsure: tuple[int, Stored] | None = None

    def ping(self) -> None:
        """Ask the database for a sign of life.

        :raises psycopg2.Error: there is none.
        """
        with self._cursor() as cursor:
            cursor.execute("SELECT 'messages'::regclass")  # needs no right to read it

    def begin_session(
        self, *, present: bool, insist: bool = False
    ) -> tuple[sessions.Claim, list[bytes]]:
        """Note that the broker has a session for us, and claim the filters of the settings for it.

        :param present: whether it is the one that it had before; if not, the ledger means nothing.
        :param insist: see `sessions.claim`.
        :returns: what came of the claim, and the ledger's batches.
        :raises psycopg2.Error: nothing was noted.
        """
        with self._transaction() as cursor:
            if not present:
                cursor.execute("DELETE FROM ledger WHERE client_id = %s", (self._client_id,))
            claim = sessions.claim(cursor, self._settings, present=present, insist=insist)
            return claim, self._batches(cursor)

    def read_ledger(self) -> list[bytes]:
        """Return the ledger's batches, which another process may have added to.

        :raises psycopg2.Error: they could not be read.
        """
        with self._transaction() as cursor:
            return self._batches(cursor)

    def note_filters(self, filters: list[str]) -> None:
        """Note what our session is subscribed to.

        :raises psycopg2.Error: it was not noted.
        """
        with self._transaction() as cursor:
            sessions.note(cursor, self._client_id, filters)

    def _batches(self, cursor: Cursor) -> list[bytes]:
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
            same batch, which then looks whether it was. Of the kind "data" only when the table
            ``dead_letters_fallback`` refuses what ``dead_letters`` refused.
        """
        if (stored := self._find_unsure()) is not None:
            return stored
        unsure = self._unsure
        try:
            self._do_daily(chunks)
            return self._write(chunks, packets, keep)
        except psycopg2.Error as error:
            if kind_of(error) == "client_id":
                # Our COMMIT without an answer may have been still under way when we looked.
                self._unsure = unsure
                if (stored := self._find_unsure()) is not None:
                    return stored
            raise

    def _write(self, chunks: list[Chunk], packets: bytes, keep: int) -> Stored:
        if self._settings.message_id_key is None:
            try:
                return self._write_at_once(chunks, packets, keep)
            except psycopg2.Error as error:
                if kind_of(error) != "data":
                    raise
                log.warning("a row was refused, searching the batch for it", error=one_line(error))
        return self._write_in_steps(chunks, packets, keep)

    def _write_at_once(self, chunks: list[Chunk], packets: bytes, keep: int) -> Stored:
        """Store a batch with one query, because round trips cost both sides a lot (benchmarks/)."""
        with self._cursor() as cursor:
            seq, opening = self._opening(cursor, packets, keep)
            stored = Stored(inserted=sum(len(chunk.rows) for chunk in chunks))
            self._unsure = (seq, stored)
            copy(cursor, _tuples(chunks), opening, b"; COMMIT")
        self._seq, self._unsure = seq, None
        return stored

    def _write_in_steps(self, chunks: list[Chunk], packets: bytes, keep: int) -> Stored:
        """Store what can be stored of a batch, and each message id once."""
        stored = Stored()
        with self._cursor() as cursor:
            seq, opening = self._opening(cursor, packets, keep)
            # What is checked only at COMMIT could not be found by bisection.
            cursor.execute(opening + b"SET CONSTRAINTS ALL IMMEDIATE")
            rows = [head(chunk.timestamp) + row for chunk in chunks for row in chunk.rows]
            if self._settings.message_id_key is not None:
                new = drop_known(cursor, rows, self._settings.message_id_key)
                stored.duplicates, rows = len(rows) - len(new), new
            stored.inserted = store_or_bury(cursor, rows, stored.dead_letters)
            self._unsure = (seq, stored)
            cursor.execute("COMMIT")
        self._seq, self._unsure = seq, None
        return stored

    def _opening(self, cursor: Cursor, packets: bytes, keep: int) -> tuple[int, bytes]:
        """Return a batch's number, and the SQL that begins its transaction and enters it."""
        seq = self._seq + 1
        opening = cursor.mogrify(
            "BEGIN; INSERT INTO ledger (client_id, seq, writer, packets) VALUES (%s, %s, %s, %s);",
            (self._client_id, seq, self._writer, packets),
        )
        if seq % _PRUNE_EVERY == 0:
            opening += cursor.mogrify(
                "DELETE FROM ledger WHERE client_id = %s AND seq <= %s;",
                (self._client_id, seq - keep),
            )
        return seq, opening

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
            if cursor.fetchone() is None:
                return None  # or not yet: then its place in the ledger turns out to be taken
        self._seq, self._unsure = seq, None
        return stored

    def close(self) -> None:
        """Close the connection; the next call opens another."""
        self._days_done.clear()
        self.watch.close()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextmanager
    def _transaction(self) -> Iterator[Cursor]:
        """COMMIT at the end of the block, ROLLBACK on any error."""
        with self._cursor() as cursor:
            cursor.execute("BEGIN")
            yield cursor
            cursor.execute("COMMIT")

    @contextmanager
    def _cursor(self) -> Iterator[Cursor]:
        """A cursor outside of any transaction, or in one that an error rolls back."""
        if self._connection is None or self._connection.closed:
            self._connection = connect(self._settings)
            self._connection.watch = self.watch
            self.watch.open(self._connection)
            self._set_up()
        with self._connection.cursor() as cursor:
            try:
                yield cursor
            except BaseException:
                with suppress(psycopg2.Error):  # the connection may be gone, and with it all
                    cursor.execute("ROLLBACK")
                raise

    def _set_up(self) -> None:
        """Set the timeout, unless the role or database has a shorter one; look at durability."""
        milliseconds = round(self._settings.database_timeout_seconds * 1000)
        with self._cursor() as cursor:
            cursor.execute(
                "SELECT current_setting('synchronous_commit'), set_config(name, CASE WHEN"
                " setting::bigint BETWEEN 1 AND %(ms)s THEN setting ELSE %(ms)s::text END, false)"
                " FROM pg_settings WHERE name = 'statement_timeout'",
                {"ms": milliseconds},
            )
            if (cursor.fetchone() or ("",))[0] == "off":
                log.warning(
                    "synchronous_commit is off: a crash of PostgreSQL can lose acknowledged "
                    "messages; set it to on for this role or database"
                )

    @contextmanager
    def _unhurried(self) -> Iterator[None]:
        usual, self.watch.limit = self.watch.limit, _DAILY_SECONDS
        try:
            yield
        finally:
            self.watch.limit = usual

    def _do_daily(self, chunks: list[Chunk]) -> None:
        # With the first batch of each day: partitions are made months ahead of use.
        days = {int(chunk.timestamp // 86400) for chunk in chunks}
        if days <= self._days_done:
            return
        milliseconds = round(self._settings.database_timeout_seconds * 1000)
        with self._transaction() as cursor, self._unhurried():
            # What works takes its time; what waits for a lock of others is tried again.
            cursor.execute(
                "SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = %s", (milliseconds,)
            )
            for day in days:
                start = datetime.fromtimestamp(day * 86400, UTC)
                cursor.execute("SELECT ensure_partitions(%s, %s)", (start, MONTHS_AHEAD))
            forget_old(cursor, self._settings.mqtt_session_expiry_seconds)
        self._days_done = days


def _tuples(chunks: list[Chunk]) -> Iterator[bytes]:
    for chunk in chunks:
        if chunk.rows:
            start = head(chunk.timestamp)
            yield start
            yield start.join(chunk.rows)
