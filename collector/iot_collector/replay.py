"""Stores the messages that the collector missed, from the replay queue, each message once.

The queue (replay_queue.py) has a copy of every message of the last 14 days, and the collector has
stored most of them. SQS cannot be searched: a copy can only be read by receiving it, and after
120 000 messages that were received and not deleted (its quota) SQS delivers no more. So a run
empties the queue:

1. *Take.* Copies go into the table ``replay_copies``; after COMMIT they are deleted from the queue.
   ``trace_id`` is the key of the table, so copies that SQS delivers twice, or that two rules made
   of one message, are in it once.
2. *Compare.* Copies and stored rows (messages and dead letters) with the same topic and payload are
   paired, those closest in time first. A row is paired with one copy only, so equal payloads that
   were sent twice are both kept. The message of a copy without a row is missing. With
   IOT_MESSAGE_ID_KEY, its id is looked up as well, which is exact.
3. *Settle.* In batches, one transaction each: missing messages are stored as the collector stores
   them, with the time when IoT Core received them, and all copies of the batch lose their payload.

At any moment a message is in the queue, in ``replay_copies`` or in its table, and every step can be
repeated: after a crash, or after credentials have expired, the next run continues.

A row can be later than its copy: the collector may get a message from its session in IoT Core hours
after it was published, see `longest_delay`. If a copy without an id is younger than that, its
message may still be in the session, so the copy stays in ``replay_copies`` until a later run.
"""

import hashlib
import heapq
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

import psycopg2
import psycopg2.extensions
import structlog
import tenacity

from .binary_payloads import BinaryTopics
from .buffer import ReadBatch
from .copy_format import RowPrefixes, encode_rows, tuple_start
from .database import connect, kind_of
from .dead_letters import store_valid
from .message_ids import drop_known, fields_and_ids
from .partitions import create_partitions
from .replay_queue import HIDDEN_SECONDS, RECEIVE_MAX, Copy, Queue, Received, parse
from .settings import Settings
from .summaries import summarize_again

log = structlog.get_logger(__name__)

Cursor = psycopg2.extensions.cursor
Progress = Callable[[str, int, int], None]  # name of the step, number done, total

DAY = 86400.0
_RECEIVERS = 16  # threads that receive and delete; a call to SQS mostly waits
_BATCH = 500  # copies in a transaction; 64 MB with the largest payloads that IoT Core accepts
# Seconds by which the clocks of IoT Core and the collector may differ.
_CLOCKS = 60.0
# How long the delivery of all messages of a session takes, as a multiple of its expiry: a collector
# is planned for up to 70 messages a second, and IoT Core delivers 10 a second from the session.
_DELIVERY = 7
_KEPT_DAYS = 15  # a day more than the queue keeps copies
_PATIENCE = 120.0  # seconds without progress after which a database error ends the run
_QUIET_ROUNDS = 3
# After this time, copies that a killed run had received are visible again.
_LEAST_SECONDS = HIDDEN_SECONDS + 5.0
# Kinds of database errors that may go away, by themselves or when somebody fixes the cause.
_PASSING = {
    *("authentication", "conflict", "connection", "disk_full", "password", "read_only"),
    *("resources", "shutdown", "timeout", "too_many_connections"),
}

_TAKE = """
INSERT INTO replay_copies (trace_id, received_at, digest, named, topic, payload)
SELECT i, to_timestamp(r), d, n, t, p
FROM unnest(%s::text[], %s::float8[], %s::bytea[], %s::boolean[], %s::text[], %s::bytea[])
    AS copies (i, r, d, n, t, p)
ON CONFLICT DO NOTHING
"""
# Copies and stored rows, ordered by digest. Only copies have trace_id, named, and whether they are
# still to be settled.
_COMPARE = """
WITH wanted AS MATERIALIZED (SELECT DISTINCT digest FROM replay_copies WHERE payload IS NOT NULL),
span AS MATERIALIZED (
    SELECT min(received_at) - make_interval(secs => %s) AS start
    FROM replay_copies WHERE payload IS NOT NULL
),
stored AS (
    SELECT received_at, sha256(convert_to(topic, 'UTF8') || '\\x00'::bytea || payload) AS digest
    FROM messages WHERE received_at >= (SELECT start FROM span)
    UNION ALL
    SELECT received_at, sha256(topic || '\\x00'::bytea || payload)
    FROM dead_letters WHERE received_at >= (SELECT start FROM span)
    UNION ALL
    SELECT received_at, sha256(topic || '\\x00'::bytea || payload)
    FROM dead_letters_fallback WHERE received_at >= (SELECT start FROM span)
)
SELECT digest, extract(epoch FROM received_at)::float8, trace_id, named, payload IS NOT NULL
FROM replay_copies WHERE digest IN (SELECT digest FROM wanted)
UNION ALL
SELECT digest, extract(epoch FROM received_at)::float8, NULL, NULL, NULL
FROM stored WHERE digest IN (SELECT digest FROM wanted)
ORDER BY 1
"""


class ReplayError(Exception):
    """The run cannot continue; nothing is lost."""


class Entry(NamedTuple):
    """A copy in ``replay_copies``, or a stored row, which has no trace id."""

    digest: bytes
    at: float
    trace_id: str | None
    named: bool | None
    pending: bool | None


@dataclass
class Summary:
    """What a run did, in messages. What an earlier run did is not counted."""

    restored: int = 0
    stored_already: int = 0
    dead_letters: Counter[str] = field(default_factory=Counter)
    repeated: int = 0  # copies whose trace id was known
    unread: int = 0  # deleted from the queue because they are older than `since`
    left: int = 0  # in replay_copies, because they are too young to be settled
    malformed: dict[str, str] = field(default_factory=dict)  # message id -> why; left in the queue


def longest_delay(settings: Settings) -> float:
    """Return the longest time, in seconds, until the collector stores a message of its session."""
    return min(settings.mqtt_session_expiry_seconds * (1 + _DELIVERY), 14 * DAY)


def missing(copies: list[float], rows: list[float], longest: float) -> set[int]:
    """Return the indexes of the copies that have no row.

    All copies and rows have the same topic and payload. A copy and a row that are neighbours in
    time are paired, the closest first. Then those between which a pair was removed are neighbours.
    The pairs are right unless messages overtake each other, and even then the number of missing
    messages is right.

    :param copies: when IoT Core received them, Unix time in seconds.
    :param rows: when the collector received them.
    :param longest: how much later a row can be than its copy, in seconds.
    """
    points = sorted([(at, i) for i, at in enumerate(copies)] + [(at, -1) for at in rows])
    left, right = list(range(-1, len(points) - 1)), list(range(1, len(points) + 1))
    heap: list[tuple[float, int, int]] = []

    def consider(a: int, b: int) -> None:
        if a < 0 or b >= len(points) or (points[a][1] < 0) == (points[b][1] < 0):
            return
        distance = points[b][0] - points[a][0]
        if distance <= (longest if points[a][1] >= 0 else _CLOCKS):
            heapq.heappush(heap, (distance, a, b))

    for a in range(len(points) - 1):
        consider(a, a + 1)
    alone = set(range(len(copies)))
    paired: set[int] = set()
    while heap:
        _, a, b = heapq.heappop(heap)
        if a in paired or b in paired:
            continue
        paired |= {a, b}
        alone.discard(max(points[a][1], points[b][1]))
        before, after = left[a], right[b]
        if before >= 0:
            right[before] = after
        if after < len(points):
            left[after] = before
        consider(before, after)
    return alone


class Replay:
    """A run.

    :param since: Unix time in seconds. Delete older copies without comparing them, except those
        whose rows may be up to `longest_delay` later. None: compare all copies.
    :param until: Unix time in seconds. Settle all copies until then, and leave the younger ones.
        None: settle copies with an id, and copies older than `longest_delay`.
    """

    def __init__(
        self,
        settings: Settings,
        queue: Queue,
        since: float | None = None,
        until: float | None = None,
        progress: Progress = lambda _what, _done, _of: None,
    ) -> None:
        self._settings = settings
        self._queue = queue
        self._longest = longest_delay(settings)
        self._oldest = 0.0 if since is None else since - self._longest - _CLOCKS
        self._until = until
        self._progress = progress
        self._binary_topics = BinaryTopics(settings)
        self._prefixes = RowPrefixes(0x32)  # QoS 1, because the rule does not copy the QoS
        self._months: set[str] = set()
        self._started = time.time()
        self._moved_at = time.monotonic()
        self._taken = 0
        self.summary = Summary()

    @property
    def decided_until(self) -> float:
        """The Unix time after which copies without an id are left for a later run."""
        return self._started - self._longest - _CLOCKS if self._until is None else self._until

    def run(self) -> Summary:
        """Take, compare and settle.

        :raises aws.AwsError: the queue cannot be used.
        :raises psycopg2.Error: the database cannot be used, or was away for two minutes.
        :raises ReplayError: another run is in progress.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(
                lambda error: isinstance(error, psycopg2.Error) and kind_of(error) in _PASSING
            ),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=10),
            stop=lambda _: time.monotonic() - self._moved_at > _PATIENCE,
            before_sleep=_log_retry,
            reraise=True,
        )
        retrying(self._run_once)
        return self.summary

    def _run_once(self) -> None:
        with closing(connect(self._settings)) as connection, connection.cursor() as cursor:
            # Slow statements disturb nobody here. Two runs must not pair the same row.
            cursor.execute(
                "SET statement_timeout = 0; SELECT pg_try_advisory_lock(hashtext('iot.replay'))"
            )
            if cursor.fetchone() != (True,):
                raise ReplayError("another `iot-collector replay` is running on this database")
            cursor.execute(
                "DELETE FROM replay_copies WHERE payload IS NULL"
                " AND received_at < now() - make_interval(days => %s)",
                (_KEPT_DAYS,),
            )
            self._started = time.time()
            self._take_all(cursor)
            self._settle_all(connection, cursor)
            cursor.execute("SELECT count(*) FROM replay_copies WHERE payload IS NOT NULL")
            self.summary.left = _one(cursor)

    # Take -------------------------------------------------------------------------------------

    def _take_all(self, cursor: Cursor) -> None:
        """Take all copies that were sent until now from the queue, while more arrive.

        This takes at least `_LEAST_SECONDS`, until copies that a killed run had received are
        visible again.
        """
        quiet = 0
        total = self._taken + sum(self._queue.size())
        with ThreadPoolExecutor(_RECEIVERS) as pool:
            while True:
                rounds = pool.map(lambda _: self._queue.receive(), range(_RECEIVERS))
                found = [m for m in itertools.chain(*rounds) if m.id not in self.summary.malformed]
                self._take(cursor, found, pool)
                self._progress("taking copies", self._taken, max(total, self._taken))
                old = any(message.sent < self._started for message in found)
                quiet = 0 if old else quiet + 1
                if quiet >= _QUIET_ROUNDS and time.time() > self._started + _LEAST_SECONDS:
                    return

    def _take(self, cursor: Cursor, found: list[Received], pool: ThreadPoolExecutor) -> None:
        copies, handles, unread = [], [], 0
        for message in found:
            try:
                copy = parse(message.body, message.id)
            except ValueError as error:
                self.summary.malformed[message.id] = str(error)
                log.warning("malformed message left in the queue", id=message.id, error=str(error))
                continue
            handles.append(message.handle)
            if copy.received < self._oldest:
                unread += 1
            else:
                copies.append(copy)
        new = self._keep(cursor, copies) if copies else 0
        for _ in pool.map(self._queue.delete, _chunks(handles, RECEIVE_MAX)):
            pass
        self.summary.repeated += len(copies) - new
        self.summary.unread += unread
        self._taken += len(handles)

    def _keep(self, cursor: Cursor, copies: list[Copy]) -> int:
        """Put copies into ``replay_copies``; return how many were new."""
        columns = zip(*((*c[:2], _digest(c), self._named(c), *c[2:]) for c in copies), strict=True)
        cursor.execute(_TAKE, [list(column) for column in columns])
        self._moved_at = time.monotonic()
        return cursor.rowcount

    def _named(self, copy: Copy) -> bool:
        return self._parsed(copy)[1] is not None

    def _parsed(self, copy: Copy) -> tuple[bytes | None, str | None]:
        """Return the fields of a copy, and the message id in its payload, if any."""
        decoder = self._binary_topics.decoder_of(copy.topic.encode())
        decoders = {0: decoder} if decoder else {}
        [fields], ids = fields_and_ids([copy.payload], self._settings.message_id_key, decoders)
        return fields, ids[0] if ids else None

    def _read_batch(self, copy: Copy) -> ReadBatch:
        """Return a copy in the form in which the collector stores messages."""
        fields, device_id = self._parsed(copy)
        rows = encode_rows([self._prefixes[copy.topic.encode()]], [copy.payload], [fields])
        return ReadBatch(None, rows, [0], 0.0, copy.received, [device_id])

    # Compare and settle -----------------------------------------------------------------------

    def _settle_all(self, connection: psycopg2.extensions.connection, cursor: Cursor) -> None:
        cursor.execute("SELECT count(*) FROM replay_copies WHERE payload IS NOT NULL")
        total, done = _one(cursor), 0
        self._progress("comparing", 0, total)
        with connection.cursor("replay", withhold=True) as entries:
            entries.itersize = 10_000
            entries.execute(_COMPARE, (_CLOCKS,))
            for batch in _chunks(self._decide(map(Entry._make, entries)), _BATCH):
                self._settle(cursor, dict(batch))
                done += len(batch)
                self._progress("settling", done, total)

    def _decide(self, entries: Iterator[Entry]) -> Iterator[tuple[str, bool]]:
        """Yield the trace id of each copy that can be settled; whether its message is missing."""
        until = self.decided_until
        for _, group in itertools.groupby(entries, lambda entry: bytes(entry.digest)):
            both = list(group)
            copies = [entry for entry in both if entry.trace_id is not None]
            rows = [entry for entry in both if entry.trace_id is None]
            alone = missing([c.at for c in copies], [r.at for r in rows], self._longest)
            for i, copy in enumerate(copies):
                known = copy.named and self._until is None
                if copy.pending and (known or copy.at <= until):
                    yield str(copy.trace_id), i in alone

    def _settle(self, cursor: Cursor, batch: dict[str, bool]) -> None:
        """Store the missing messages of a batch, in one transaction."""
        wanted = [trace_id for trace_id, alone in batch.items() if alone]
        cursor.execute(
            "SELECT trace_id, extract(epoch FROM received_at)::float8, topic, payload"
            " FROM replay_copies WHERE trace_id = ANY(%s) ORDER BY received_at",
            (wanted,),
        )
        copies = [Copy(i, at, topic, bytes(payload)) for i, at, topic, payload in cursor]
        self._create_partitions(cursor, copies)
        letters: Counter[str] = Counter()
        try:
            # Bisection could not find a row that a deferred constraint refuses at COMMIT.
            cursor.execute("BEGIN; SET CONSTRAINTS ALL IMMEDIATE")
            reads = [self._read_batch(copy) for copy in copies]
            if self._settings.message_id_key is not None:
                reads = drop_known(cursor, reads)
            rows = [tuple_start(read.timestamp) + row for read in reads for row in read.rows]
            restored = store_valid(cursor, rows, letters) if rows else 0
            if reads:
                summarize_again(cursor, reads[0].timestamp, reads[-1].timestamp)
            cursor.execute(
                "UPDATE replay_copies SET topic = NULL, payload = NULL WHERE trace_id = ANY(%s)",
                (list(batch),),
            )
            cursor.execute("COMMIT")
        except psycopg2.Error:
            if not cursor.connection.closed:
                cursor.execute("ROLLBACK")
            raise
        self._moved_at = time.monotonic()
        self.summary.restored += restored
        self.summary.dead_letters += letters
        self.summary.stored_already += len(batch) - len(rows)

    def _create_partitions(self, cursor: Cursor, copies: list[Copy]) -> None:
        for copy in copies:
            month = f"{datetime.fromtimestamp(copy.received, UTC):%Y-%m}"
            if month not in self._months:
                create_partitions(cursor, copy.received)
                self._months.add(month)


def _digest(copy: Copy) -> bytes:
    return hashlib.sha256(copy.topic.encode() + b"\0" + copy.payload).digest()


def _one(cursor: Cursor) -> int:
    row = cursor.fetchone()
    return int(row[0]) if row else 0


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of up to ``size`` items (itertools.batched of Python 3.12)."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _log_retry(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.warning("database is not usable, will retry", error=str(error).strip())
