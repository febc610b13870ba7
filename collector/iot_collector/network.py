"""The network thread: keeps a session with the broker, reads messages and acknowledges them.

Only this thread uses the socket. A `ReadBatch` refers to the connection that it came from, so that
its messages are not acknowledged on a later connection.
"""

import contextlib
import random
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence

import structlog
from paho.mqtt.exception import MQTTException

from .buffer import Buffer, Event, ReadBatch, SessionStart
from .connection import Connection, duplicate_client_id
from .metrics import Metrics
from .settings import Settings
from .subscriptions import Subscriptions

log = structlog.get_logger(__name__)

# The errors of a connection; those of TLS and WebSocket are subclasses of OSError.
_CONNECTION_ERRORS = (OSError, MQTTException)
# Opening one can also raise ValueError: for a wrong TLS file, or an invalid host name.
_OPEN_ERRORS = (*_CONNECTION_ERRORS, ValueError)

# Times are in seconds.
_MAX_BACKOFF = 30.0  # limit of the random wait between two attempts to connect
_STABLE_AFTER = 10.0  # a connection that lasts longer resets the backoff
_LARGE_READ = 1 << 18  # bytes of memory; a read of this size means that there is a backlog
_CHECK_INTERVAL = 0.5  # of keepalive and subscriptions; a check costs as much CPU as a message
_MIN_LINGER = 0.2  # as a share of the longest linger, while there are few messages
_MANY_MESSAGES = 50  # in a read; from this number on, the linger is the longest
_DISCONNECT_TIMEOUT = 5.0  # to wait until the broker has read the last acknowledgements


def linger(limit: float, messages: int) -> float:
    """Return how long to wait before the next read, after one with this many messages.

    A COMMIT costs as much CPU as about 100 rows. At 10 000 messages/s, that many arrive within
    ``limit`` (10 ms by default), and the wait is worth it. At 1 000 messages/s, it would delay each
    message and save little. If fewer than ``_MANY_MESSAGES`` arrive within ``limit``, each read has
    fewer messages than the one before, and the wait shrinks to the share ``_MIN_LINGER`` of
    ``limit``. Above that rate it grows to ``limit``.
    """
    return limit * min(1.0, max(_MIN_LINGER, messages / _MANY_MESSAGES))


def backoff(failures: int) -> float:
    """Return the longest wait before the next attempt, after this many failures in a row."""
    # The exponent is limited: 2.0**1024 is too large for a float, and a broker that is away for
    # some hours causes as many failures.
    return min(_MAX_BACKOFF, 0.25 * 2.0 ** min(failures, 10))


class NetworkThread(threading.Thread):
    """Connects until it is stopped, and moves messages and acknowledgements."""

    def __init__(self, settings: Settings, buffer: Buffer, metrics: Metrics) -> None:
        super().__init__(name="network", daemon=True)
        self._settings = settings
        self.subscriptions = Subscriptions(settings)
        self._buffer = buffer
        self._metrics = metrics
        self._done: deque[ReadBatch | Event] = deque()  # finished by the writer
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._leaving = self._connected_before = False
        self._stopping = threading.Event()
        self._left = threading.Event()
        self._next_read = self._next_check = 0.0
        self._hold_until = 0.0  # acknowledgements wait until then, at most until the next read
        self.connection: Connection | None = None
        self.error: str | None = "not connected yet"
        self.consecutive_bugs = 0
        self.last_progress = time.monotonic()
        self.progress_timeout = 60.0  # a step takes about a second
        metrics.mqtt_connected.set_function(lambda: self.connected)
        metrics.mqtt_waiting.set_function(lambda: bool(self.waiting_for))

    @property
    def connected(self) -> bool:
        """Whether there is a connection, and the broker has granted all its subscriptions."""
        return self.connection is not None and self.subscriptions.active

    @property
    def waiting_for(self) -> list[str]:
        """The client ids of collectors that have to change their subscriptions first.

        Meanwhile the session keeps the subscriptions that it has, and messages are received.
        """
        return self.subscriptions.waiting_for if self.connection is not None else []

    def acknowledge(self, items: Sequence[ReadBatch | Event]) -> None:
        """Queue what the writer has finished, to be acknowledged. Any thread may call this."""
        self._done.extend(items)
        if time.monotonic() >= self._hold_until:  # otherwise the thread wakes up by itself
            self._wake()

    def leave_session(self, timeout: float) -> bool:
        """Unsubscribe, and receive until the broker has no messages left for the session.

        :returns: whether that succeeded within ``timeout`` seconds.
        """
        self._leaving = True
        self._wake()
        return self._left.wait(timeout)

    def stop(self, timeout: float) -> None:
        """Send the last acknowledgements, disconnect, and end the thread; wait for its end."""
        self._stopping.set()
        self._wake()
        self.join(timeout)

    def run(self) -> None:
        """Connect, and connect again after each end of a connection, until stopped."""
        failures = short_connections = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            connection = Connection(self._settings, self.subscriptions)
            bug = False
            try:
                self._serve(connection)
            except Exception as error:  # even after a bug, the next attempt may succeed
                self.error = f"{type(error).__name__}: {error}"
                bug = not isinstance(error, _CONNECTION_ERRORS if self.connection else _OPEN_ERRORS)
                if bug:
                    log.exception("a bug in the collector, will retry", error=self.error)
            self.connection = None
            self.subscriptions.reset()
            if self._stopping.is_set():
                break
            self._metrics.mqtt_errors.labels("bug" if bug else "connection").inc()
            stable = time.monotonic() - started > _STABLE_AFTER
            self.consecutive_bugs = (0 if stable else self.consecutive_bugs) + bug
            failures = 0 if stable else failures + 1
            short_connections = short_connections + 1 if connection.accepted and not stable else 0
            if short_connections > 1:
                # With MQTT 3.1.1, and with older brokers, we do not learn why it was closed.
                self.error = f"{self.error}; perhaps {duplicate_client_id(self._settings)}"
            wait = random.uniform(0, backoff(failures))  # noqa: S311
            wait += self._settings.connect_interval
            log.warning(
                "no connection to broker, will retry",
                broker=str(self._settings.broker),
                error=self.error,
                seconds=round(wait, 2),
            )
            self.last_progress = time.monotonic()
            self._stopping.wait(wait)

    def _serve(self, connection: Connection) -> None:
        """Open a connection and move messages until it ends."""
        # The wait since the last attempt must not count as a hang: this attempt may take as long
        # again if no address of the broker answers.
        self.last_progress = time.monotonic()
        connection.open()
        self.connection = connection
        while connection.client.socket() is not None:
            self._step(connection)
            if self._stopping.is_set() and not self._done:
                connection.client.disconnect_gracefully(
                    _DISCONNECT_TIMEOUT, end_session=self._left.is_set()
                )
                log.info("disconnected from broker")
                return
        self.error = connection.end_reason

    def _step(self, connection: Connection) -> None:
        """Wait for something to do, at most a second, and do it."""
        client = connection.client
        now = time.monotonic()
        if now >= self._hold_until:
            self._send_acknowledgements(connection)
        if (sock := client.socket()) is None:
            return
        # If we do not read, the TCP window fills up, and the broker waits. Nothing is dropped.
        full = self._buffer.full
        linger_left = max(0.0, self._next_read - now)
        reading = not full and not linger_left
        # select() does not see data that TLS has already decrypted.
        pending = reading and hasattr(sock, "pending") and sock.pending() > 0
        readable, writable, _ = select.select(
            [self._wake_reader, sock] if reading else [self._wake_reader],
            [sock] if client.want_write() else [],
            [],
            0 if pending else linger_left or 1.0,
        )
        self.last_progress = time.monotonic()
        if self._wake_reader in readable:
            self._wake_reader.recv(4096)
        if pending or sock in readable:
            self._read(connection)
        if writable:
            client.loop_write()
        if self._leaving:
            self._leave_session(connection)
        if self.last_progress >= self._next_check:
            self._next_check = self.last_progress + _CHECK_INTERVAL
            if full:
                client.forget_ping()
            client.loop_misc()
            if not self._leaving:
                self.subscriptions.check_due()
        self._forward_events()

    def _leave_session(self, connection: Connection) -> None:
        """Take the next step to leave the session: unsubscribe, store messages, check for more."""
        if not connection.accepted:
            return
        if not connection.leaving:
            connection.leaving = True
            self.subscriptions.unsubscribe_all()
        counts = self._buffer.counts()
        if self._done or counts.in_flight:
            connection.received_at_ping = None
        elif connection.received_at_ping != counts.received:
            # If no message arrives before the answer to the ping, none is left.
            connection.received_at_ping = counts.received
            connection.client.ping()
        elif connection.client.ping_answered:
            self._left.set()

    def _read(self, connection: Connection) -> None:
        timestamp, read_at = time.time(), time.monotonic()
        connection.client.read()
        if connection.session_start is not None:
            self._announce(connection.session_start)
            connection.session_start = None
        self._forward_events()
        rows, tags, ids = connection.client.take_messages()
        read = ReadBatch(connection, rows, tags, read_at, timestamp, ids)
        if self.subscriptions.replacing:
            received = len(read)
            read = self.subscriptions.drop_copies(read)
            self._buffer.count_duplicates(received - len(read))
        if read.rows:
            connection.count_received(read.tags)
            if read.size < _LARGE_READ and not connection.window_nearly_full:
                # Waiting before a read delays messages as much as waiting after it, but wakes both
                # threads once instead of once per message (benchmarks/).
                self._next_read = read_at + linger(self._settings.batch_linger_ms / 1000, len(read))
                # A broker that uses Nagle's algorithm (Mosquitto's default) holds messages back
                # until TCP has acknowledged the previous ones, which our kernel does together with
                # our PUBACKs. Messages that are sent after PUBACKs right after COMMIT wait in our
                # socket until the linger ends. Those that are published later wait for the next
                # PUBACKs, and then for the end of another linger. PUBACKs right before the read
                # halve the delay (1 000 messages/s, 10 ms: p50 6 instead of 14 ms). But a broker
                # that may have filled its window must get them at once.
                self._hold_until = self._next_read if connection.window_half_empty else 0.0
            self._buffer.put(read)

    def _forward_events(self) -> None:
        while self.subscriptions.events:
            self._buffer.put(self.subscriptions.events.pop(0))

    def _announce(self, session_start: SessionStart) -> None:
        log.info("connected to broker", session_present=session_start.session_present)
        self.error = None
        if self._connected_before:
            self._metrics.mqtt_reconnects.inc()
        self._connected_before = True
        self._buffer.put(session_start)

    def _send_acknowledgements(self, connection: Connection) -> None:
        tags: list[int] = []
        while self._done:
            item = self._done.popleft()
            if item.connection is not connection:
                continue
            if isinstance(item, SessionStart):
                self.subscriptions.handle_claim(item.claim)
            elif isinstance(item, ReadBatch):
                tags += item.tags
        if tags:
            connection.acknowledge(tags)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full of wake-ups that are not read yet
            self._wake_writer.send(b"\0")
