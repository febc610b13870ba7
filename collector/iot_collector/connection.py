"""One connection to the broker, from CONNECT to its end: session, subscriptions, and window.

Used by the network thread alone. What comes from one connection is never acknowledged on another,
where its packet ids may mean other messages.
"""

import functools
from collections.abc import Callable
from typing import Any

import structlog
from paho.mqtt.client import Client, ConnectFlags
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from .flow import Greeting
from .reader import make_client
from .settings import Settings
from .subscriptions import Subscriptions

log = structlog.get_logger(__name__)

_SESSION_TAKEN_OVER = 0x8E  # MQTT 5 §3.14.2.1
_SAME = 8  # times in a row that a read ended with as many un-acknowledged: the broker's window


def _callback(method: Callable[..., None]) -> Callable[..., None]:
    """Have a bug in a callback not be taken for a malformed packet, as its ValueError would be."""

    @functools.wraps(method)
    def call(*args: object) -> None:
        try:
            method(*args)
        except Exception as error:
            raise RuntimeError(f"{method.__name__} failed: {error}") from error

    return call


class Connection:
    """A client, and what is known of its session."""

    def __init__(
        self,
        settings: Settings,
        subscriptions: Subscriptions | None = None,
        *,
        keep_session: bool = True,
    ) -> None:
        self._settings = settings
        self.subscriptions = subscriptions or Subscriptions(settings)
        self._keep_session = keep_session
        self.client = make_client(settings, keep_session=keep_session)
        # Of paho's arguments for each, the first two and the last are not needed.
        self.client.on_connect = lambda _c, _u, flags, why, _p: self._on_connect(flags, why)
        self.client.on_subscribe = lambda _c, _u, mid, why, _p: self._on_subscribe(mid, why)
        self.client.on_unsubscribe = lambda _c, _u, mid, _w, _p: self._on_unsubscribe(mid)
        self.client.on_disconnect = lambda _c, _u, _f, why, _p: self._on_disconnect(why)
        self.accepted = False
        self.session_present = False
        self.greeting: Greeting | None = None  # to be put before the first messages
        self.unsubscribed = False  # for good, to leave
        self.quiet_at: int | None = None  # messages received when the broker was last asked
        self.end: str | None = None  # why the connection ended
        self._unacked = self._last_unacked = self._repeated = 0
        self._most_unacked = 0
        self._window = settings.mqtt_max_inflight
        self._warned = False  # that it exceeds its window

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

    def received(self, tags: list[int]) -> None:
        """Count messages that the broker waits to have acknowledged."""
        self._unacked += len(tags)
        self._most_unacked = max(self._most_unacked, self._unacked)
        announced = self._settings.mqtt_max_inflight
        # The broker's own window may be smaller, and it does not say so. Where it was only traffic
        # that was so regular, there are soon more.
        self._repeated = self._repeated + 1 if self._unacked == self._last_unacked else 0
        self._last_unacked = self._unacked
        if self._repeated == _SAME:
            self._window = self._unacked
        elif self._unacked > self._window:
            self._window = announced
        if self._unacked > announced and not self._warned:
            self._warned = bool(min(tags) & 0x06 << 16)  # with QoS 0 there is no window
            if self._warned:
                log.warning(
                    "the broker sends more un-acknowledged messages than IOT_MQTT_MAX_INFLIGHT, as "
                    "Mosquitto does before 2.0.21 (each PUBACK releases a whole window): memory is "
                    "not bounded by it, and a crash may store more than that many messages twice; "
                    "use 2.0.21 or newer",
                    unacked=self._unacked,
                )

    @property
    def window_fills(self) -> bool:
        """Whether the broker stops sending, or soon will, until it gets acknowledgements."""
        announced = self._settings.mqtt_max_inflight
        return self._window < announced or self._unacked >= announced // 2

    @property
    def has_room(self) -> bool:
        """Whether the broker has sent twice as many before without an acknowledgement.

        Then its window, which it may not have announced, is at least half empty now.
        """
        return 2 * self._unacked <= self._most_unacked

    def acknowledge(self, tags: list[int]) -> None:
        """Acknowledge stored messages."""
        self.client.acknowledge(tags)
        self._unacked -= len(tags)

    @_callback
    def _on_connect(self, flags: ConnectFlags, reason: ReasonCode) -> None:
        if reason.is_failure:
            self.end = f"broker refused the connection: {reason}"
            return
        self.accepted = True
        self.session_present = flags.session_present
        self.greeting = Greeting(self, flags.session_present)
        self.subscriptions.begin(self.client, self, present=flags.session_present)

    @_callback
    def _on_subscribe(self, mid: int, reasons: list[ReasonCode]) -> None:
        self.subscriptions.subscribed(mid, reasons)

    @_callback
    def _on_unsubscribe(self, mid: int) -> None:
        self.subscriptions.unsubscribed(mid)

    @_callback
    def _on_disconnect(self, reason: ReasonCode) -> None:
        if reason.value == _SESSION_TAKEN_OVER:
            self.end = f"another client {twin(self._settings)}"
        self.end = self.end or self.client.fault or f"connection ended: {reason}"


def twin(settings: Settings) -> str:
    """Say what a client with our name does, and what to change."""
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
        files = (settings.mqtt_ca_file, settings.mqtt_cert_file, settings.mqtt_key_file)
        ca, cert, key = (str(file) if file else None for file in files)
        client.tls_set(ca, cert, key)
