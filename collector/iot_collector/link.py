"""The network thread: keeps a session with the broker, reads from it and acknowledges to it.

Every use of the socket is in this thread. A chunk knows the connection it came from, so that no
acknowledgement ever crosses a reconnect.
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

from .connection import Connection, twin
from .flow import Chunk, Flow, Greeting, Note
from .metrics import Metrics
from .settings import Settings
from .subscriptions import Subscriptions

log = structlog.get_logger(__name__)

# What connections fail with; TLS's and WebSocket's errors are kinds of OSError.
_EXPECTED = (OSError, MQTTException)
_EXPECTED_AT_OPEN = (*_EXPECTED, ValueError)  # of TLS files, or of what cannot be a host's name

_MAX_WAIT = 30.0  # seconds between attempts to connect, at most; each is random below its limit
_SETTLED = 10.0  # a connection that lasted this long was a good one
_LARGE_READ = 1 << 18  # bytes of memory: there is a backlog
_LOOK = 0.5  # seconds between looks at keepalive and subscriptions; each costs what a message does
_SHORT = 0.2  # of the linger, while messages are few
_MANY = 50  # messages in a read that are worth the whole linger
_FINISH = 5.0  # seconds to wait for the broker to have read the last acknowledgements


def linger(limit: float, messages: int) -> float:
    """Return how long to wait before the next read, after one that brought so many messages.

    A COMMIT costs as much CPU as about 100 rows. At 10 000 messages/s, ``limit`` (10 ms by default)
    gathers that many, and the wait is worth it. At 1 000/s it would make each message wait for few
    others. Where fewer than ``_MANY`` come within ``limit``, each read brings fewer than the one
    before and the wait shrinks to ``_SHORT`` of the limit; above that rate it grows to the limit.
    """
    return limit * min(1.0, max(_SHORT, messages / _MANY))


class Link(threading.Thread):
    """Keeps one connection open until it is stopped, and moves messages and acknowledgements."""

    def __init__(self, settings: Settings, flow: Flow, metrics: Metrics) -> None:
        super().__init__(name="network", daemon=True)
        self._settings = settings
        self.subscriptions = Subscriptions(settings)
        self._flow = flow
        self._metrics = metrics
        self._done: deque[Chunk | Note] = deque()  # by the writer, for us to act on
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._leaving = self._connected_before = False
        self._stopping = threading.Event()
        self._next_read = self._next_look = 0.0
        self._hold_until = 0.0  # for acknowledgements; never later than the next read
        self.left = threading.Event()
        self.connection: Connection | None = None
        self.error: str | None = "not connected yet"
        self.bugs = 0  # met since a connection last was a good one
        self.beat = time.monotonic()
        self.limit = 60.0  # how long a step may take, in seconds; a turn takes about one
        metrics.mqtt_connected.set_function(lambda: self.connected)

    @property
    def connected(self) -> bool:
        """Whether the broker sends us what we are here to collect."""
        return self.connection is not None and self.subscriptions.active

    def acknowledge(self, items: Sequence[Chunk | Note]) -> None:
        """Queue what the writer has dealt with for acknowledgement; any thread."""
        self._done.extend(items)
        if time.monotonic() >= self._hold_until:  # else it wakes up by itself
            self._wake()

    def leave(self) -> None:
        """Unsubscribe and go on until the broker has nothing left for us; sets `left` then."""
        self._leaving = True
        self._wake()

    def stop(self) -> None:
        """Send what is left to acknowledge, then disconnect and end the thread."""
        self._stopping.set()
        self._wake()

    def run(self) -> None:
        """Connect again and again, until stopped."""
        failures = kicked = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            connection = Connection(self._settings, self.subscriptions)
            bug = False
            try:
                self._serve(connection)
            except Exception as error:  # whatever it is, the next attempt may work
                self.error = f"{type(error).__name__}: {error}"
                bug = not isinstance(error, _EXPECTED if self.connection else _EXPECTED_AT_OPEN)
                if bug:
                    log.exception("a bug in the collector, will retry", error=self.error)
            self.connection = None
            self.subscriptions.end()
            if self._stopping.is_set():
                break
            self._metrics.mqtt_errors.labels("bug" if bug else "connection").inc()
            settled = time.monotonic() - began > _SETTLED
            self.bugs = (0 if settled else self.bugs) + bug
            failures = 0 if settled else failures + 1
            kicked = kicked + 1 if connection.accepted and not settled else 0
            if kicked > 1:
                # Older brokers and MQTT 3.1.1 do not say why they end a connection.
                self.error = f"{self.error}; perhaps another client {twin(self._settings)}"
            wait = random.uniform(0, min(_MAX_WAIT, 0.25 * 2**failures))  # noqa: S311
            log.warning(
                "no connection to broker, will retry",
                broker=str(self._settings.broker),
                error=self.error,
                seconds=round(wait, 2),
            )
            self.beat = time.monotonic()
            self._stopping.wait(wait)

    def _serve(self, connection: Connection) -> None:
        """Open a connection and move messages until it ends."""
        connection.open()
        self.connection = connection
        while connection.client.socket() is not None:
            self._turn(connection)
            if self._stopping.is_set() and not self._done:
                connection.client.finish(_FINISH, end_session=self.left.is_set())
                log.info("disconnected from broker")
                return
        self.error = connection.end

    def _turn(self, connection: Connection) -> None:
        """Wait for something to do, at most a second, and do it."""
        client = connection.client
        now = time.monotonic()
        if now >= self._hold_until:
            self._acknowledge(connection)
        if (sock := client.socket()) is None:
            return
        # Not reading is what holds the broker back: TCP's window closes, nothing is dropped.
        willing = not self._flow.full
        rest = max(0.0, self._next_read - now)
        reading = willing and not rest
        # What TLS has decrypted already, select does not see.
        pending = reading and hasattr(sock, "pending") and sock.pending() > 0
        readable, writable, _ = select.select(
            [self._wake_reader, sock] if reading else [self._wake_reader],
            [sock] if client.want_write() else [],
            [],
            0 if pending else rest or 1.0,
        )
        self.beat = time.monotonic()
        if self._wake_reader in readable:
            self._wake_reader.recv(4096)
        if pending or sock in readable:
            self._read(connection)
        if writable:
            client.loop_write()
        if self._leaving:
            self._see_off(connection)
        if self.beat >= self._next_look:
            self._next_look = self.beat + _LOOK
            if not willing:
                client.excuse_ping()
            client.loop_misc()
            if not self._leaving:
                self.subscriptions.look()
        self._pass_notes()

    def _see_off(self, connection: Connection) -> None:
        """Take a step towards leaving: unsubscribe, empty the session, and be sure that it is."""
        if not connection.accepted:
            return
        if not connection.unsubscribed:
            connection.unsubscribed = True
            self.subscriptions.leave()
        account = self._flow.account()
        if self._done or account.in_flight:
            connection.quiet_at = None
        elif connection.quiet_at != account.received:
            connection.quiet_at = account.received
            connection.client.ping()
        elif connection.client.answered:
            self.left.set()

    def _read(self, connection: Connection) -> None:
        timestamp, at = time.time(), time.monotonic()
        connection.client.read()
        if connection.greeting is not None:
            self._greet(connection.greeting)
            connection.greeting = None
        self._pass_notes()
        rows, tags = connection.client.take()
        if self.subscriptions.replacing:
            rows, tags, copies = self.subscriptions.drop_copies(rows, tags)
            self._flow.drop(copies)
        if rows:
            connection.received(tags)
            chunk = Chunk(connection, rows, tags, at, timestamp)
            if chunk.size < _LARGE_READ and not connection.window_fills:
                # Lingering before the read rather than after it costs the messages the same time
                # and saves waking both threads for each of them (benchmarks/).
                self._next_read = at + linger(self._settings.batch_linger_ms / 1000, len(rows))
                # A broker that uses Nagle's algorithm (Mosquitto's default) holds messages back
                # until what it sent before is acknowledged by TCP, which our system does with the
                # PUBACKs. Written right after COMMIT, they bring messages that wait in our socket
                # for the end of the linger; what is published after that waits for the next
                # PUBACKs, and then for the end of the next linger. Written right before the read,
                # they halve the delay (1 000 messages/s, 10 ms: p50 6 instead of 14 ms). But a
                # broker whose window is full must not wait for them.
                self._hold_until = self._next_read if connection.has_room else 0.0
            self._flow.put(chunk)

    def _pass_notes(self) -> None:
        while self.subscriptions.notes:
            self._flow.put(self.subscriptions.notes.pop(0))

    def _greet(self, greeting: Greeting) -> None:
        log.info("connected to broker", session_present=greeting.session_present)
        self.error = None
        if self._connected_before:
            self._metrics.mqtt_reconnects.inc()
        self._connected_before = True
        self._flow.put(greeting)

    def _acknowledge(self, connection: Connection) -> None:
        tags: list[int] = []
        while self._done:
            item = self._done.popleft()
            if item.source is not connection:
                continue
            if isinstance(item, Greeting):
                self.subscriptions.answer(item.claim)
            elif isinstance(item, Chunk):
                tags += item.tags
        if tags:
            connection.acknowledge(tags)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full of wake-ups: it will wake
            self._wake_writer.send(b"\0")
