"""The summaries thread: latest values, topics and rollups, a few seconds behind the messages.

The summaries are computed in the database, from messages that are stored, by the function
``update_summaries`` of migrations/0007_summaries.sql. So they do not slow down the storing of
messages, at any rate, and a crash at any moment leaves them right: each step is one transaction,
which processes the next time range.

A time range may be processed when all its messages are stored. Each collector reports a *bound*,
before which all its own messages are stored; the lowest bound of all collectors counts. If a
message is stored after its time range was processed, its whole hour is processed again.
"""

import threading
import time
from contextlib import closing

import psycopg2
import psycopg2.extensions
import structlog

from .buffer import Buffer
from .database import connect, kind_of
from .log import one_line
from .metrics import Metrics
from .settings import Settings

log = structlog.get_logger(__name__)

# Longer than the network thread takes from a message's timestamp until it is in the buffer.
_MARGIN_SECONDS = 2.0
# Updates take at most this share of the time.
_SHARE = 0.2
_RETRY_SECONDS = 60.0
_PERMISSION_HINT = (
    "grant the user of IOT_DATABASE_URL EXECUTE on update_summaries, summarize_again and "
    "count_silent_topics, or set IOT_SUMMARY_SECONDS=0"
)
# A topic counts as silent when this many messages would usually have come.
SILENT_INTERVALS = 10
_COUNT_SECONDS = 60.0


def summarize_again(cursor: psycopg2.extensions.cursor, first: float, last: float) -> None:
    """Have the hours of late messages processed again, if they were already processed.

    :param first: Unix time of the earliest late message.
    :param last: Unix time of the latest one.
    """
    cursor.execute("SELECT summarize_again(to_timestamp(%s), to_timestamp(%s))", (first, last))


class SummariesThread(threading.Thread):
    """Updates the summaries every ``summary_seconds``, on its own connection."""

    def __init__(self, settings: Settings, buffer: Buffer, metrics: Metrics) -> None:
        super().__init__(name="summaries", daemon=True)
        self._settings = settings
        self._buffer = buffer
        self._metrics = metrics
        self._stop = threading.Event()
        self._next_count = 0.0  # of silent topics

    def run(self) -> None:
        """Update until stopped; after an error, connect again a minute later."""
        pause = self._settings.summary_seconds
        self._metrics.summarized_until = time.monotonic()
        while not self._stop.wait(pause):
            try:
                with closing(connect(self._settings)) as connection, connection.cursor() as cursor:
                    cursor.execute("SET application_name = 'iot-collector summaries'")
                    self._update_for_ever(cursor)
            except psycopg2.Error as error:
                pause = _RETRY_SECONDS
                hint = _PERMISSION_HINT if kind_of(error) == "permission" else None
                log.warning(
                    "summaries are not updated, will retry; messages are still stored",
                    error=one_line(error),
                    hint=hint,
                )

    def stop(self, timeout: float) -> None:
        """End the thread; an update that takes longer than ``timeout`` seconds is rolled back."""
        self._stop.set()
        if self.is_alive():
            self.join(timeout)

    def _update_for_ever(self, cursor: psycopg2.extensions.cursor) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            behind = self._update(cursor)
            pause = (time.monotonic() - started) * (1 / _SHARE - 1)
            if behind < 60 + 2 * self._settings.summary_seconds:
                pause = max(pause, self._settings.summary_seconds)
            self._stop.wait(pause)

    def _update(self, cursor: psycopg2.extensions.cursor) -> float:
        """Process at most ten minutes of messages; return how many seconds are left to process."""
        bound = time.time() - self._buffer.oldest_age() - _MARGIN_SECONDS
        cursor.execute(
            "SELECT update_summaries(%s, to_timestamp(%s))", (self._settings.mqtt_client_id, bound)
        )
        behind: float = max(0.0, *(cursor.fetchone() or ()))
        self._metrics.summarized_until = time.monotonic() - behind
        if time.monotonic() > self._next_count:
            cursor.execute("SELECT count_silent_topics(%s)", (SILENT_INTERVALS,))
            self._metrics.silent_topics = (cursor.fetchone() or (None,))[0]
            self._next_count = time.monotonic() + _COUNT_SECONDS
        return behind
