"""The writer thread: takes batches, stores them, and only then has them acknowledged."""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import psycopg2
import structlog
import tenacity

from .database import explain, kind_of
from .flow import Chunk, Flow, Greeting, Note, Subscribed
from .ledger import Ledger
from .metrics import Metrics
from .sessions import Claim
from .settings import Settings
from .store import Store, Stored

log = structlog.get_logger(__name__)

# How often an idle writer asks the database for a sign of life, so that /health tells the truth.
_PING_SECONDS = 5.0
_BATCH_ROWS = 5_000  # about the most in a transaction
_BATCH_BYTES = 8 << 20

T = TypeVar("T")


class Writer(threading.Thread):
    """The only user of the database connection."""

    def __init__(
        self,
        settings: Settings,
        flow: Flow,
        metrics: Metrics,
        acknowledge: Callable[[Sequence[Chunk | Note]], None],
    ) -> None:
        super().__init__(name="writer", daemon=True)
        self._acknowledge = acknowledge
        self._flow = flow
        self._metrics = metrics
        self._store = Store(settings)
        self._ledger = Ledger(settings.mqtt_max_inflight if settings.packet_ledger else 0)
        # Writing at half the window keeps the broker sending meanwhile.
        self._batch_rows = min(_BATCH_ROWS, max(1, settings.mqtt_max_inflight // 2))
        self._overtaken = False  # somebody has written to the ledger since it was loaded
        self._abandon = threading.Event()
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Exception),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=10),
            sleep=tenacity.sleep_using_event(self._abandon),
            stop=tenacity.stop_when_event_set(self._abandon),
        )
        self.error: str | None = "not connected yet"  # why the database is not usable, or None
        self.bugs = 0  # met since a step last succeeded
        self._beat = time.monotonic()

    @property
    def beat(self) -> float:
        """When the thread last made a step: a statement, an answer to it, or a look for work."""
        return max(self._beat, self._store.watch.beat)

    @property
    def limit(self) -> float:
        """How long a step may take, in seconds: far more than all timeouts together allow."""
        return 60 + 2 * self._store.watch.limit

    def break_if_overdue(self) -> None:
        """Break the connection to a database that does not answer any more; any thread."""
        if self._store.watch.break_if_overdue():
            log.warning("the database does not answer, breaking the connection")

    def run(self) -> None:
        """Write batches until the flow is closed and empty."""
        try:
            self._ping()
            while (item := self._next()) is not None:
                if isinstance(item, Greeting):
                    item.claim = self._persist(partial(self._begin, item))
                    self._acknowledge([item])
                elif isinstance(item, Subscribed):
                    self._persist(partial(self._store.note_filters, item.filters))
                elif item:
                    self._write(item)
                else:
                    self._ping()
        except tenacity.RetryError:
            log.warning("drain time is over; the broker keeps and sends again what is not stored")
        finally:
            self._store.close()

    def abandon(self) -> None:
        """Stop retrying; called from another thread when the drain time is over."""
        self._abandon.set()

    def _next(self) -> list[Chunk] | Note | None:
        self._beat = time.monotonic()
        return self._flow.take(rows=self._batch_rows, size=_BATCH_BYTES, patience=_PING_SECONDS)

    def _begin(self, greeting: Greeting) -> Claim:
        """Note the session, and load what the ledger has of it; return what it may do."""
        claim, batches = self._store.begin_session(
            present=greeting.session_present, insist=greeting.insist
        )
        self._ledger.reset(batches)
        return claim

    def _write(self, batch: list[Chunk]) -> None:
        started = time.monotonic()
        stored, packets = self._persist(partial(self._store_batch, batch))
        # Nothing from here on is tried again: the batch is committed.
        self._ledger.add(packets)
        now = time.monotonic()
        self._flow.settle(
            inserted=stored.inserted,
            duplicates=stored.duplicates,
            dead_letters=stored.dead_letters,
        )
        self._acknowledge(batch)
        self._metrics.batch_rows.observe(_count(batch))
        self._metrics.flush_seconds.observe(now - started)
        for chunk in batch:
            self._metrics.message_delay.observe(now - chunk.at, len(chunk.tags))

    def _store_batch(self, batch: list[Chunk]) -> tuple[Stored, bytes]:
        """Store a batch; return what became of it, and its packets for the ledger."""
        if self._overtaken:
            self._ledger.reset(self._store.read_ledger())
            self._overtaken = False
        new, packets = self._ledger.split(batch)
        stored = Stored()
        try:
            if any(chunk.rows for chunk in new):
                stored = self._store.write(new, packets, len(self._ledger) + 1)
        except psycopg2.Error as error:
            # Somebody's batch took our place in the ledger: another collector's, or one of
            # our predecessor's that was still being committed when we looked.
            self._overtaken = kind_of(error) == "client_id"
            raise
        stored.duplicates += _count(batch) - _count(new)
        return stored, packets

    def _persist(self, step: Callable[[], T]) -> T:
        """Return a step's result as soon as the database lets it succeed.

        :raises tenacity.RetryError: the drain time was over first.
        """
        try:
            return self._noted(step)
        except Exception:  # noqa: BLE001 - a bug, too, may be one of the moment
            # Only now: tenacity's bookkeeping costs as much as five messages (benchmarks/).
            result: T = self._retrying(self._noted, step)
            return result

    def _noted(self, step: Callable[[], T]) -> T:
        """Do a step, and note whether the database is usable."""
        try:
            result = step()
        except Exception as error:
            self._store.close()
            kind = kind_of(error)
            self._metrics.db_errors.labels(kind).inc()
            self.error = explain(error)
            if kind == "bug":
                self.bugs += 1
                log.exception("a bug in the collector, will retry", error=self.error)
            else:
                log.warning("database is not usable, will retry", error=self.error)
            raise
        self.bugs = 0
        if self.error is not None:
            log.info("database is usable")
            self.error = None
        return result

    def _ping(self) -> None:
        with contextlib.suppress(Exception):
            self._noted(self._store.ping)


def _count(chunks: list[Chunk]) -> int:
    return sum(len(chunk.tags) for chunk in chunks)
