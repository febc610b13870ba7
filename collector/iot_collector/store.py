"""Stores batches: each in one transaction, together with its entry in the ledger."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psycopg2
import psycopg2.extensions
import structlog

from . import readings, sessions
from .buffer import Outcome, ReadBatch, message_count
from .copy_format import copy, tuple_start
from .database import StatementWatchdog, WatchedConnection, connect, kind_of
from .dead_letters import store_valid
from .ledger import Entry, Ledger
from .log import one_line
from .message_ids import drop_known, forget_old
from .migrate import missing_migrations
from .partitions import PartitionTimes, create_partitions, partition_times
from .settings import Settings

log = structlog.get_logger(__name__)

_LOOK_SECONDS = 3600.0
_DAILY_TIMEOUT = 6 * 3600.0  # seconds; there may be very many message ids to delete

Cursor = psycopg2.extensions.cursor


class Store:
    """Writes batches. Used by one thread; connects when necessary."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ledger = Ledger(
            settings.mqtt_client_id, settings.mqtt_max_inflight if settings.packet_ledger else 0
        )
        self._connection: WatchedConnection | None = None
        # Twice the time after which PostgreSQL itself cancels a statement.
        self.watchdog = StatementWatchdog(2 * settings.database_timeout_seconds)
        self._days_prepared: set[int] = set()  # days since 1970
        self.partition_times: PartitionTimes | None = None
        self._next_look = -math.inf
        self._readings_saved = False

    def ping(self) -> None:
        """Check that the database answers and has our schema.

        :raises psycopg2.Error: it does not.
        """
        with self._cursor() as cursor:
            cursor.execute("SELECT 'messages'::regclass")  # needs no privilege on the table
            if time.monotonic() > self._next_look:
                self._look_at_partitions(cursor)

    def start_session(self, *, session_present: bool, force: bool = False) -> sessions.Claim:
        """Start a session of the broker: load its ledger, and claim the filters of the settings.

        :param session_present: whether the broker has kept the session.
        :param force: see `sessions.claim`.
        :raises psycopg2.Error: nothing was changed.
        """
        with self._transaction() as cursor:
            self._ledger.start_session(cursor, session_present=session_present)
            return sessions.claim(cursor, self._settings, present=session_present, force=force)

    def save_filters(self, filters: list[str]) -> None:
        """Save what our session is subscribed to.

        :raises psycopg2.Error: nothing was saved.
        """
        with self._transaction() as cursor:
            sessions.save_filters(cursor, self._settings.mqtt_client_id, filters)

    def write(self, batch: list[ReadBatch]) -> Outcome:
        """Store a batch in one transaction; return what became of its messages, after COMMIT.

        :raises psycopg2.Error: as far as is known, nothing was stored. Call this again with the
            same batch: it first checks whether the batch was stored. An error of the kind "data" is
            raised only if both ``dead_letters`` and ``dead_letters_fallback`` refused a message.
        """
        return self._ledger.store(batch, self._cursor, self._write)

    def _write(self, batch: list[ReadBatch], entry: Entry, duplicates: int) -> Outcome:
        self._prepare_days(batch)
        try:
            return self._write_at_once(batch, entry, duplicates)
        except psycopg2.Error as error:
            if kind_of(error) != "data":
                raise
            log.warning("a row was refused, searching the batch for it", error=one_line(error))
        return self._write_valid(batch, entry, duplicates)

    def _write_at_once(self, batch: list[ReadBatch], entry: Entry, duplicates: int) -> Outcome:
        """Store all messages with as few queries as possible: round trips cost CPU (benchmarks/).

        One query from BEGIN to COMMIT; two with message ids.
        """
        with self._cursor() as cursor:
            begin = b"BEGIN; " + self._ledger.insert_sql(cursor, entry)
            if self._settings.message_id_key is not None:
                cursor.execute(begin)
                begin = b""
                batch, known = self._drop_known(cursor, batch)
                duplicates += known
            outcome = Outcome(inserted=message_count(batch), duplicates=duplicates)
            self._ledger.commit_sent(entry, outcome)
            copy(cursor, _pieces(batch), begin, b"; COMMIT")
        return outcome

    def _write_valid(self, batch: list[ReadBatch], entry: Entry, duplicates: int) -> Outcome:
        """Store the messages that PostgreSQL accepts, and the others as dead letters."""
        with self._cursor() as cursor:
            begin = b"BEGIN; " + self._ledger.insert_sql(cursor, entry)
            # An error of a constraint that is only checked at COMMIT would not show which row.
            cursor.execute(begin + b"SET CONSTRAINTS ALL IMMEDIATE")
            if self._settings.message_id_key is not None:
                batch, known = self._drop_known(cursor, batch)
                duplicates += known
            outcome = Outcome(duplicates=duplicates)
            tuples = [tuple_start(read.timestamp) + row for read in batch for row in read.rows]
            outcome.inserted = store_valid(cursor, tuples, outcome.dead_letters)
            self._ledger.commit_sent(entry, outcome)
            cursor.execute("COMMIT")
        return outcome

    @staticmethod
    def _drop_known(cursor: Cursor, batch: list[ReadBatch]) -> tuple[list[ReadBatch], int]:
        """Return the messages whose ids are new, and how many were dropped."""
        new = drop_known(cursor, batch)
        return new, message_count(batch) - message_count(new)

    def close(self) -> None:
        """Close the connection; the next call opens another."""
        self._days_prepared.clear()
        self.watchdog.close()
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
        """Yield a cursor outside a transaction. An error rolls back what the block has begun."""
        if self._connection is None or self._connection.closed:
            self._connection = connect(self._settings)
            self._connection.watchdog = self.watchdog
            self.watchdog.open(self._connection)
            self._set_up_connection()
        with self._connection.cursor() as cursor:
            try:
                yield cursor
            except BaseException:
                with suppress(psycopg2.Error):  # a lost connection rolls back by itself
                    cursor.execute("ROLLBACK")
                raise

    def _set_up_connection(self) -> None:
        """Set statement_timeout unless role or database have a shorter one; check durability."""
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
            # A role that may only insert does not need the privilege to read this table.
            cursor.execute("SELECT has_table_privilege(to_regclass('schema_migrations'), 'SELECT')")
            if cursor.fetchone() == (True,):
                missing_migrations(cursor)  # raises an error if the schema is newer
        if not self._readings_saved:
            self._save_readings()

    def _save_readings(self) -> None:
        """Save the settings of the view ``readings``; only once, so that the last start wins."""
        templates, keys = self._settings.topic_templates, self._settings.device_time_keys
        with self._transaction() as cursor:
            saved = readings.save(cursor, templates, keys)
        if not saved and (templates or keys):
            log.warning(
                "IOT_TOPIC_TEMPLATES and IOT_DEVICE_TIME_KEYS have no effect: run `iot-collector"
                " migrate`, and GRANT SELECT, INSERT, DELETE ON topic_templates, device_time_keys"
            )
        self._readings_saved = True

    def _prepare_days(self, batch: list[ReadBatch]) -> None:
        """With the first batch of each day, create partitions and delete old message ids."""
        days = {int(read.timestamp // 86400) for read in batch}
        if days <= self._days_prepared:
            return
        milliseconds = round(self._settings.database_timeout_seconds * 1000)
        usual, self.watchdog.limit = self.watchdog.limit, _DAILY_TIMEOUT
        try:
            with self._transaction() as cursor:
                # Deleting may take long; waiting for a lock of others may not.
                cursor.execute(
                    "SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = %s", (milliseconds,)
                )
                for day in days:
                    create_partitions(cursor, day * 86400)
                forget_old(
                    cursor,
                    self._settings.mqtt_session_expiry_seconds,
                    replay=self._settings.replay_queue is not None,
                )
                self._look_at_partitions(cursor)
        finally:
            self.watchdog.limit = usual
        self._days_prepared = days

    def _look_at_partitions(self, cursor: Cursor) -> None:
        """Read the times of partitions for the metrics: daily, and every hour while idle."""
        months = self._settings.archive_keep_months
        times = partition_times(cursor, time.time(), months)
        # Without an archive, no month is due.
        due = times.due if self._settings.archive_target else math.inf
        self.partition_times = times._replace(due=due)
        self._next_look = time.monotonic() + _LOOK_SECONDS


def _pieces(batch: list[ReadBatch]) -> Iterator[bytes]:
    """Yield the tuples of a batch, in as few pieces as possible."""
    for read in batch:
        if read.rows:
            start = tuple_start(read.timestamp)
            yield start
            yield start.join(read.rows)
