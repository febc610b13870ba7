"""The writer thread: takes batches, stores them, and only then has them acknowledged."""

import threading
import time
from collections.abc import Callable

import psycopg2
import structlog
import tenacity

from .flow import Chunk, Flow, Greeting
from .ledger import Ledger
from .metrics import Metrics
from .settings import Settings
from .store import Store, Stored, kind_of, one_line

log = structlog.get_logger(__name__)

_HINTS = {
    "schema": "run `iot-collector migrate`",
    "client_id": "another collector has this client id; give each its own IOT_MQTT_CLIENT_ID",
    "authentication": "check the user in IOT_DATABASE_URL and IOT_DATABASE_PASSWORD_FILE",
}
# How often an idle writer asks the database for a sign of life, so that /health tells the truth.
_PING_SECONDS = 5.0


class Writer(threading.Thread):
    """The only user of the database connection."""

    def __init__(
        self,
        settings: Settings,
        flow: Flow,
        metrics: Metrics,
        acknowledge: Callable[[Chunk | Greeting], None],
    ) -> None:
        super().__init__(name="writer", daemon=True)
        self._acknowledge = acknowledge
        self._settings = settings
        self._flow = flow
        self._metrics = metrics
        self._store = Store(settings)
        self._ledger = Ledger(settings.mqtt_max_inflight if settings.packet_ledger else 0)
        # Writing at half the window keeps the broker sending meanwhile.
        self._batch_rows = min(settings.batch_rows, max(1, settings.mqtt_max_inflight // 2))
        # What the ledger says of the batch in hand; None when it has to be asked again.
        self._recorded: tuple[list[Chunk], bytes] | None = None
        self._abandon = threading.Event()
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(psycopg2.Error),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=10),
            sleep=tenacity.sleep_using_event(self._abandon),
            stop=tenacity.stop_when_event_set(self._abandon),
            before_sleep=self._failed,
        )
        self.error: str | None = "not connected yet"  # why the database is not usable, or None
        self.beat = time.monotonic()  # when the thread last made a step
        self.in_database = False  # waiting for the database, which may take what it takes

    def run(self) -> None:
        """Write batches until the flow is closed and empty."""
        try:
            self._ping()
            while (item := self._next()) is not None:
                if isinstance(item, Greeting):
                    self._greet(item)
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

    def _next(self) -> list[Chunk] | Greeting | None:
        self.beat = time.monotonic()
        self.in_database = False
        item = self._flow.take(
            rows=self._batch_rows,
            size=self._settings.batch_bytes,
            patience=_PING_SECONDS,
        )
        self.in_database = True
        return item

    def _greet(self, greeting: Greeting) -> None:
        greeting.stale, batches = self._retrying(
            self._store.begin_session,
            present=greeting.session_present,
            filters=self._settings.mqtt_topics,
        )
        self._succeeded()
        self._ledger.reset(batches)
        self._acknowledge(greeting)

    def _write(self, batch: list[Chunk]) -> None:
        started = time.monotonic()
        self._recorded = self._ledger.record(batch)
        stored = self._retrying(self._store_batch, batch)
        self._succeeded()
        now = time.monotonic()
        self._flow.settle(
            inserted=stored.inserted,
            duplicates=stored.duplicates,
            dead_letters=stored.dead_letters,
        )
        self._metrics.batch_rows.observe(sum(len(chunk.tags) for chunk in batch))
        self._metrics.flush_seconds.observe(now - started)
        for chunk in batch:
            self._metrics.message_delay.observe(now - chunk.at, len(chunk.tags))
            self._acknowledge(chunk)

    def _store_batch(self, batch: list[Chunk]) -> Stored:
        if self._recorded is None:
            self._ledger.reset(self._store.ledger())
            self._recorded = self._ledger.record(batch)
        new, packets = self._recorded
        known = sum(len(chunk.tags) for chunk in batch) - sum(len(chunk.tags) for chunk in new)
        stored = Stored()
        try:
            if any(chunk.rows for chunk in new):
                stored = self._store.write(new, packets, self._ledger.forget())
        except psycopg2.Error as error:
            if kind_of(error) == "client_id":
                # Somebody's batch took our place in the ledger: another collector's, or one of
                # our predecessor's that was still being committed when we looked.
                self._recorded = None
            raise
        stored.duplicates += known
        return stored

    def _ping(self) -> None:
        try:
            self._store.ping()
            self._succeeded()
        except psycopg2.Error as error:
            self._note(error)

    def _succeeded(self) -> None:
        if self.error is not None:
            log.info("database is usable")
            self.error = None

    def _failed(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, psycopg2.Error):
            self._note(error)

    def _note(self, error: psycopg2.Error) -> None:
        kind = kind_of(error)
        self._store.close()
        self._metrics.db_errors.labels(kind).inc()
        self.error = f"{kind}: {one_line(error)}"
        hint = _HINTS.get(kind)
        log.warning("database is not usable, will retry", kind=kind, error=self.error, hint=hint)
