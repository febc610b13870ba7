"""The writer thread: stores batches, and only then has them acknowledged."""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import structlog
import tenacity

from .buffer import Buffer, Event, ReadBatch, SessionStart, message_count
from .database import explain, kind_of
from .metrics import Metrics
from .settings import Settings
from .store import Store

log = structlog.get_logger(__name__)

# How often an idle writer pings the database, so that /health is up to date.
_PING_SECONDS = 5.0
# Approximate limits of a transaction.
_BATCH_ROWS = 5_000
_BATCH_BYTES = 8 << 20

T = TypeVar("T")


class WriterThread(threading.Thread):
    """The only user of the database connection."""

    def __init__(
        self,
        settings: Settings,
        buffer: Buffer,
        metrics: Metrics,
        acknowledge: Callable[[Sequence[ReadBatch | Event]], None],
    ) -> None:
        super().__init__(name="writer", daemon=True)
        self._acknowledge = acknowledge
        self._buffer = buffer
        self._metrics = metrics
        self._store = Store(settings)
        # While half the window is in a transaction, the broker can send the other half.
        self._batch_rows = min(_BATCH_ROWS, max(1, settings.mqtt_max_inflight // 2))
        self._giving_up = threading.Event()
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Exception),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=10),
            sleep=tenacity.sleep_using_event(self._giving_up),
            stop=tenacity.stop_when_event_set(self._giving_up),
        )
        self.error: str | None = "not connected yet"  # why the database is not usable, or None
        self.consecutive_bugs = 0
        self._last_progress = time.monotonic()

    @property
    def last_progress(self) -> float:
        """When the thread last sent a statement, got an answer, or took work (monotonic clock)."""
        return max(self._last_progress, self._store.watchdog.last_progress)

    @property
    def progress_timeout(self) -> float:
        """Seconds without progress after which the thread is hung; longer than all timeouts."""
        return 60 + 2 * self._store.watchdog.limit

    def break_if_overdue(self) -> None:
        """Break the connection if the database does not answer. Any thread may call this."""
        if self._store.watchdog.break_if_overdue():
            log.warning("the database does not answer, breaking the connection")

    def run(self) -> None:
        """Store batches until the buffer is closed and empty."""
        try:
            self._ping()
            while not self._buffer.finished:
                self._last_progress = time.monotonic()
                work = self._buffer.take(
                    max_rows=self._batch_rows, max_bytes=_BATCH_BYTES, timeout=_PING_SECONDS
                )
                if work.event is not None:
                    self._handle(work.event)
                elif work.batch:
                    self._write(work.batch)
                elif not self._buffer.finished:
                    self._ping()
        except tenacity.RetryError:
            log.warning("drain time is over; the broker keeps the messages that are not stored")
        finally:
            self._store.close()

    def stop(self, timeout: float) -> None:
        """Store what has been received, for at most ``timeout`` seconds, and end the thread."""
        self._buffer.close()
        self.join(timeout)
        self._giving_up.set()

    def _handle(self, event: Event) -> None:
        if isinstance(event, SessionStart):
            start = partial(
                self._store.start_session,
                session_present=event.session_present,
                force=event.force,
            )
            event.claim = self._retry(start)
            self._acknowledge([event])
        else:
            self._retry(partial(self._store.save_filters, event.filters))

    def _write(self, batch: list[ReadBatch]) -> None:
        started = time.monotonic()
        outcome = self._retry(partial(self._store.write, batch))
        # The batch is committed: an error from here on must not lead to another attempt.
        now = time.monotonic()
        self._buffer.complete(batch, outcome)
        self._acknowledge(batch)
        self._metrics.batch_rows.observe(message_count(batch))
        self._metrics.flush_seconds.observe(now - started)
        for read in batch:
            self._metrics.message_delay.observe(now - read.read_at, len(read))

    def _retry(self, step: Callable[[], T]) -> T:
        """Repeat a step until it succeeds; return its result.

        :raises tenacity.RetryError: the thread was stopped first.
        """
        try:
            return self._attempt(step)
        except Exception:  # noqa: BLE001 - even after a bug, the next attempt may succeed
            # Not for the first attempt: tenacity costs as much CPU as five messages (benchmarks/).
            result: T = self._retrying(self._attempt, step)
            return result

    def _attempt(self, step: Callable[[], T]) -> T:
        """Run a step once, and record whether the database is usable."""
        try:
            result = step()
        except Exception as error:
            self._store.close()
            kind = kind_of(error)
            self._metrics.db_errors.labels(kind).inc()
            self.error = explain(error)
            if kind == "bug":
                self.consecutive_bugs += 1
                log.exception("a bug in the collector, will retry", error=self.error)
            else:
                log.warning("database is not usable, will retry", error=self.error)
            raise
        self.consecutive_bugs = 0
        self._metrics.partition_times = self._store.partition_times
        if self.error is not None:
            log.info("database is usable")
            self.error = None
        return result

    def _ping(self) -> None:
        with contextlib.suppress(Exception):
            self._attempt(self._store.ping)
