"""The network thread: keeps a session with the broker, reads from it and acknowledges to it.

Every use of the socket is in this thread. A connection is a `Connection` object of its own, and
a chunk knows the one it came from, so that no acknowledgement ever crosses a reconnect, after
which its packet id may mean another message.
"""

import contextlib
import random
import select
import socket
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import structlog
from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from .flow import Chunk, Flow, Greeting
from .metrics import Metrics
from .reader import Inbox, make_client
from .rows import head
from .settings import Settings

log = structlog.get_logger(__name__)

_MAX_WAIT = 30.0  # seconds between attempts to connect, at most; each is random below its limit
_SETTLED = 10.0  # a connection that lasted this long was a good one
_RESUBSCRIBE = 15.0  # seconds until a refused subscription is asked for again
_GREETING = 2.0  # seconds that the database gets to note a new session before it is used
_LARGE_READ = 1 << 15  # bytes: there is a backlog, or nearly so
_FINISH = 5.0  # seconds to wait for the broker to have read the last acknowledgements
WINDOW_BUG = (
    "sends more un-acknowledged messages than IOT_MQTT_MAX_INFLIGHT, as Mosquitto does before "
    "2.0.21 (each PUBACK releases a whole window): memory is not bounded by it, and a crash may "
    "store more than that many messages twice; use 2.0.21 or newer"
)
_SESSION_TAKEN_OVER = 0x8E  # MQTT 5 §3.14.2.1


class Connection:
    """One connection to the broker, from CONNECT to its end."""

    def __init__(self, settings: Settings, *, keep_session: bool = True) -> None:
        self._settings = settings
        self._keep_session = keep_session
        self.inbox = Inbox()
        self.client = make_client(settings, self.inbox, keep_session=keep_session)
        self.client.on_connect = self._on_connect
        self.client.on_subscribe = self._on_subscribe
        self.client.on_unsubscribe = self._on_unsubscribe
        self.client.on_disconnect = self._on_disconnect
        self.accepted = False
        self.session_present = False
        self.greeting: Greeting | None = None  # to be put before the first messages
        self.refused: dict[str, str] = {}  # topic filter -> why the broker refused it
        self.subscribed = False
        self.unacked = 0
        self.warned = False  # that the broker exceeds its window
        self.unsubscribing = self.unsubscribed = False  # for good, to leave
        self.quiet_at: int | None = None  # messages received when the broker was last asked
        self.end: str | None = None  # why the connection ended
        self._filters: list[str] = []  # in the order of the SUBSCRIBE that is under way
        self._subscribe_at: float | None = None
        self._resubscribe_at = 0.0

    def open(self) -> None:
        """Connect, with credentials as they are now.

        :raises OSError: the broker is not reached, or TLS or a secret file fails.
        :raises ValueError: TLS files do not fit each other.
        """
        settings = self._settings
        broker = settings.broker
        set_up_transport(self.client, settings)
        options: dict[str, Any] = {}
        if settings.mqtt_version == "5":
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            if self._keep_session:
                properties.SessionExpiryInterval = settings.mqtt_session_expiry_seconds
            properties.ReceiveMaximum = settings.mqtt_max_inflight
            options = {"clean_start": not self._keep_session, "properties": properties}
        self.client.connect(broker.host, broker.port, settings.mqtt_keepalive_seconds, **options)

    def tend(self) -> None:
        """Do what is due; called at least once a second."""
        now = time.monotonic()
        if self._subscribe_at is not None and now >= self._subscribe_at:
            self._subscribe_at = None
            self._subscribe(self._settings.mqtt_topics)
        if self.refused and now >= self._resubscribe_at:
            self._subscribe(list(self.refused))

    def _subscribe(self, filters: list[str]) -> None:
        self._filters = filters
        self._resubscribe_at = time.monotonic() + _RESUBSCRIBE
        qos = min(self._settings.mqtt_qos, self.client.max_qos)
        if self._settings.mqtt_version == "5":
            # Retained messages only for a new subscription, or each reconnect stores them again.
            options = SubscribeOptions(
                qos=qos, retainHandling=SubscribeOptions.RETAIN_SEND_IF_NEW_SUB
            )
            self.client.subscribe([(f, options) for f in filters])
        else:
            self.client.subscribe([(f, qos) for f in filters])

    def _on_connect(
        self, _c: Client, _u: object, flags: ConnectFlags, reason: ReasonCode, _p: Properties | None
    ) -> None:
        if reason.is_failure:
            self.end = f"broker refused the connection: {reason}"
            return
        self.accepted = True
        self.session_present = flags.session_present
        self.greeting = Greeting(self, flags.session_present)
        log.info("connected to broker", session_present=flags.session_present)
        if flags.session_present:
            self._subscribe(self._settings.mqtt_topics)
        else:
            # A session that is new makes the ledger void. That is to be noted before the first
            # message can be sent, so that no process can take it for one of the old session;
            # but a database that is away shall not cost messages.
            self._subscribe_at = time.monotonic() + _GREETING

    def session_noted(self, stale: list[str]) -> None:
        """Go on: the database knows about the session, and of ``stale`` filters in it."""
        if self._subscribe_at is not None:
            self._subscribe_at = None
            self._subscribe(self._settings.mqtt_topics)
        if stale:
            log.info("unsubscribing from topics that are no longer set", filters=stale)
            self.client.unsubscribe(stale)

    def _on_subscribe(
        self, _c: Client, _u: object, _m: int, reasons: list[ReasonCode], _p: Properties | None
    ) -> None:
        self.refused = {}
        for topic_filter, reason in zip(self._filters, reasons, strict=False):
            if reason.is_failure:
                self.refused[topic_filter] = str(reason)
                log.error(
                    "broker refused the subscription; check IOT_MQTT_TOPICS and the broker's ACL",
                    filter=topic_filter,
                    reason=str(reason),
                )
            elif reason.value == 0:
                log.warning("broker granted QoS 0 only: it may lose messages", filter=topic_filter)
        self.subscribed = not self.refused

    def _on_unsubscribe(
        self, _c: Client, _u: object, _m: int, _r: list[ReasonCode], _p: Properties | None
    ) -> None:
        self.unsubscribed = self.unsubscribing

    def _on_disconnect(
        self, _c: Client, _u: object, _f: DisconnectFlags, reason: ReasonCode, _p: Properties | None
    ) -> None:
        if reason.value == _SESSION_TAKEN_OVER:
            self.end = f"another client {_twin(self._settings)}"
        self.end = self.end or self.client.fault or f"connection ended: {reason}"


class Link(threading.Thread):
    """Keeps one connection open until it is stopped, and moves messages and acknowledgements."""

    def __init__(self, settings: Settings, flow: Flow, metrics: Metrics) -> None:
        super().__init__(name="network", daemon=True)
        self._settings = settings
        self._flow = flow
        self._metrics = metrics
        self._acks: deque[Chunk | Greeting] = deque()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._draining = False
        self._leaving = False
        self.left = threading.Event()
        self._stopping = threading.Event()
        self._connected_before = False
        self.connection: Connection | None = None
        self.error: str | None = "not connected yet"
        self.beat = time.monotonic()
        self._next_read = 0.0
        flow.on_room = self._wake
        metrics.mqtt_connected = lambda: self.connected

    @property
    def connected(self) -> bool:
        """Whether the broker sends us what we are here to collect."""
        return self.connection is not None and self.connection.subscribed

    def acknowledge(self, item: Chunk | Greeting) -> None:
        """Queue what the writer has dealt with for acknowledgement; any thread."""
        self._acks.append(item)
        self._wake()

    def drain(self) -> None:
        """Stop taking messages; acknowledgements go on."""
        self._draining = True
        self._wake()

    def leave(self) -> None:
        """Unsubscribe and go on until the broker has nothing left for us; sets `left` then."""
        self._leaving = True
        self._wake()

    def stop(self) -> None:
        """Send what is left to acknowledge, then disconnect and end the thread."""
        self._draining = True
        self._stopping.set()
        self._wake()

    def run(self) -> None:
        """Connect again and again, until stopped."""
        failures = kicked = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            connection = Connection(self._settings)
            try:
                self._serve(connection)
            except Exception as error:  # noqa: BLE001 - whatever it is, the next attempt may work
                self.error = f"{type(error).__name__}: {error}"
            self.connection = None
            if self._stopping.is_set():
                break
            settled = time.monotonic() - began > _SETTLED
            failures = 0 if settled else failures + 1
            kicked = kicked + 1 if connection.accepted and not settled else 0
            if kicked > 1:
                # Older brokers and MQTT 3.1.1 do not say why they end a connection.
                self.error = f"{self.error}; perhaps another client {_twin(self._settings)}"
            wait = random.uniform(0, min(_MAX_WAIT, 0.25 * 2**failures))  # noqa: S311
            log.warning(
                "no connection to broker, will retry",
                broker=str(self._settings.broker),
                error=self.error,
                seconds=round(wait, 2),
            )
            self._rest(wait)

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._stopping.is_set():
            self.beat = time.monotonic()
            self._stopping.wait(min(left, 1.0))

    def _serve(self, connection: Connection) -> None:
        """Open a connection and move messages until it ends."""
        connection.open()
        self.connection = connection
        while connection.client.socket() is not None:
            self._turn(connection)
            if connection.accepted and self.error is not None:
                self._count_connection()
            if self._stopping.is_set() and not self._acks:
                connection.client.finish(_FINISH, end_session=self.left.is_set())
                log.info("disconnected from broker")
                return
        connection.subscribed = False
        self.error = connection.end

    def _count_connection(self) -> None:
        self.error = None
        if self._connected_before:
            self._metrics.mqtt_reconnects.inc()
        self._connected_before = True

    def _turn(self, connection: Connection) -> None:
        """Wait for something to do, at most a second, and do it."""
        client = connection.client
        self._send_acks(connection)
        if (sock := client.socket()) is None:
            return
        rest = self._next_read - time.monotonic()
        # Not reading is what holds the broker back: TCP's window closes, nothing is dropped.
        willing = not (self._draining or self._flow.full)
        reading = willing and rest <= 0
        # What TLS has decrypted already, select does not see.
        pending = reading and hasattr(sock, "pending") and sock.pending() > 0
        readable, writable, _ = select.select(
            [self._wake_reader, sock] if reading else [self._wake_reader],
            [sock] if client.want_write() else [],
            [],
            0 if pending else 1.0 if rest <= 0 else rest,
        )
        self.beat = time.monotonic()
        if self._wake_reader in readable:
            self._wake_reader.recv(4096)
        if pending or sock in readable:
            self._read(connection)
        if writable:
            client.loop_write()
        if not willing:
            client.excuse_ping()
        client.loop_misc()
        if self._leaving:
            self._see_off(connection)
        else:
            connection.tend()

    def _see_off(self, connection: Connection) -> None:
        """Take a step towards leaving: unsubscribe, empty the session, and be sure that it is."""
        if not connection.unsubscribing:
            connection.unsubscribing = True
            connection.client.unsubscribe(self._settings.mqtt_topics)
        account = self._flow.account()
        if self._acks or account.in_flight or not connection.unsubscribed:
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
            self._flow.put(connection.greeting)
            connection.greeting = None
        rows, tags = connection.inbox.empty()
        if rows:
            size = sum(map(len, rows))
            if size < _LARGE_READ:
                # Lingering before the read rather than after it costs the messages the same time
                # and saves waking both threads for each of them (benchmarks/).
                self._next_read = at + self._settings.batch_linger_ms / 1000
            connection.unacked += len(tags)
            if connection.unacked > self._settings.mqtt_max_inflight and not connection.warned:
                self._warn_of_window(connection, tags)
            self._flow.put(Chunk(connection, head(timestamp), rows, tags, at, timestamp, size))

    def _warn_of_window(self, connection: Connection, tags: list[int]) -> None:
        if min(tags) & 0x06 << 16:  # with QoS 0 there is no window
            connection.warned = True
            log.warning(f"the broker {WINDOW_BUG}", unacked=connection.unacked)

    def _send_acks(self, connection: Connection) -> None:
        tags: list[int] = []
        while self._acks:
            item = self._acks.popleft()
            if item.source is not connection:
                continue
            if isinstance(item, Greeting):
                connection.session_noted(item.stale)
            else:
                tags += item.tags
        if tags:
            connection.client.acknowledge(tags)
            connection.unacked -= len(tags)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full of wake-ups: it will wake
            self._wake_writer.send(b"\0")


def _twin(settings: Settings) -> str:
    return (
        f"connects with the client id {settings.mqtt_client_id!r}; "
        "give each collector its own IOT_MQTT_CLIENT_ID"
    )


def set_up_transport(client: Client, settings: Settings) -> None:
    """Give a client its credentials, as they are now, its TLS and its WebSocket path.

    :raises OSError: a secret or TLS file cannot be read.
    """
    broker = settings.broker
    if broker.username is not None:
        client.username_pw_set(broker.username, settings.mqtt_secret)
    if broker.transport == "websockets":
        client.ws_set_options(path=broker.path)
    if broker.tls:
        client.tls_set(
            ca_certs=_text(settings.mqtt_ca_file),
            certfile=_text(settings.mqtt_cert_file),
            keyfile=_text(settings.mqtt_key_file),
        )


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
