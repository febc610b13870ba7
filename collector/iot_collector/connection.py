"""One connection to the broker, from CONNECT to its end: its session and in-flight window.

Used by the network thread only. Messages are acknowledged on the connection that they came from and
on no other, where their packet ids may belong to other messages.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import structlog
from paho.mqtt.client import Client, ConnectFlags, WebsocketConnectionError
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from .buffer import QOS, SessionStart
from .client import make_client
from .iot_core import ALPN, ALPN_PORT, POLICY_HINT
from .settings import Settings
from .subscriptions import Subscriptions

if TYPE_CHECKING:
    from .signing import Handshake

log = structlog.get_logger(__name__)

_SESSION_TAKEN_OVER, _NOT_AUTHORIZED = 0x8E, 0x87  # MQTT 5 §3.14.2.1
# If this many reads in a row end with the same number of un-acknowledged messages, that number is
# taken for the broker's window.
_SAME_COUNT = 8


def _callback(method: Callable[..., None]) -> Callable[..., None]:
    """Wrap a callback of paho, so that its ValueError is not taken for a malformed packet."""

    @functools.wraps(method)
    def call(*args: object) -> None:
        try:
            method(*args)
        except Exception as error:
            raise RuntimeError(f"{method.__name__} failed: {error}") from error

    return call


class Connection:
    """A client and the state of its session."""

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
        self.client.on_connect = lambda _c, _u, flags, why, prop: self._on_connect(flags, why, prop)
        self.client.on_subscribe = lambda _c, _u, mid, why, _p: self._on_subscribe(mid, why)
        self.client.on_unsubscribe = lambda _c, _u, mid, _w, _p: self._on_unsubscribe(mid)
        self.client.on_disconnect = lambda _c, _u, _f, why, _p: self._on_disconnect(why)
        self.accepted = False
        self.session_present = False
        self.session_start: SessionStart | None = None  # goes into the buffer before any message
        self.leaving = False  # UNSUBSCRIBE of all filters was sent
        self.received_at_ping: int | None = None  # messages received when `ping` was last called
        self.end_reason: str | None = None
        self._unacked = self._most_unacked = self._last_unacked = self._same_count = 0
        self._window = settings.mqtt_max_inflight  # as far as it shows
        self._warned = False  # that the broker exceeds the window

    def open(self) -> None:
        """Connect, with the current content of the credential files.

        :raises OSError: the broker cannot be reached, or TLS or reading a file fails.
        :raises ValueError: certificate and key do not belong together.
        """
        settings = self._settings
        broker = settings.broker
        handshake = set_up_transport(self.client, settings)
        options: dict[str, Any] = {}
        if settings.mqtt_version == "5":
            properties = Properties(PacketTypes.CONNECT)
            if self._keep_session:
                properties.SessionExpiryInterval = settings.mqtt_session_expiry_seconds
            properties.ReceiveMaximum = settings.mqtt_max_inflight
            options = {"clean_start": not self._keep_session, "properties": properties}
        try:
            self.client.connect(
                broker.host, broker.port, settings.mqtt_keepalive_seconds, **options
            )
        except WebsocketConnectionError as error:
            if handshake is None:
                raise
            raise handshake.explain(error) from None

    def count_received(self, tags: list[int]) -> None:
        """Count messages that wait for their acknowledgement."""
        self._unacked += len(tags)
        self._most_unacked = max(self._most_unacked, self._unacked)
        announced = self._settings.mqtt_max_inflight
        # The broker may have a smaller window, and it does not announce it. If it has not, and the
        # traffic was only that regular, `_unacked` exceeds the assumed window soon.
        self._same_count = self._same_count + 1 if self._unacked == self._last_unacked else 0
        self._last_unacked = self._unacked
        if self._same_count == _SAME_COUNT:
            self._window = self._unacked
        elif self._unacked > self._window:
            self._window = announced
        if self._unacked > announced and not self._warned:
            self._warned = bool(min(tags) & QOS)  # QoS 0 has no window
            if self._warned:
                log.warning(
                    "the broker sends more un-acknowledged messages than IOT_MQTT_MAX_INFLIGHT, as "
                    "Mosquitto does before 2.0.21 (each PUBACK releases a whole window): memory is "
                    "not bounded by it, and a crash may store more than that many messages twice; "
                    "use 2.0.21 or newer",
                    unacked=self._unacked,
                )

    @property
    def window_nearly_full(self) -> bool:
        """Whether the broker waits for acknowledgements before it sends more, or soon will."""
        announced = self._settings.mqtt_max_inflight
        return self._window < announced or self._unacked >= announced // 2

    @property
    def window_half_empty(self) -> bool:
        """Whether the broker certainly sends more without getting acknowledgements first.

        It is certain if the broker has had twice as many un-acknowledged messages before.
        """
        return 2 * self._unacked <= self._most_unacked

    def acknowledge(self, tags: list[int]) -> None:
        """Acknowledge stored messages."""
        self.client.acknowledge(tags)
        self._unacked -= len(tags)

    @_callback
    def _on_connect(
        self, flags: ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self.end_reason = f"broker refused the connection: {reason}{self._hint(reason)}"
            return
        asked = self._settings.mqtt_session_expiry_seconds
        # The property is only there if the broker chose another value (MQTT 5 §3.2.2.3.2).
        granted = getattr(properties, "SessionExpiryInterval", asked)
        if self._keep_session and granted < asked:
            log.warning(
                "the broker ends the session earlier than IOT_MQTT_SESSION_EXPIRY_SECONDS asks for",
                asked=asked,
                granted=granted,
            )
        self.accepted = True
        self.session_present = flags.session_present
        self.session_start = SessionStart(self, flags.session_present)
        self.subscriptions.start(self.client, self, session_present=flags.session_present)

    @_callback
    def _on_subscribe(self, mid: int, reasons: list[ReasonCode]) -> None:
        self.subscriptions.handle_suback(mid, reasons)

    @_callback
    def _on_unsubscribe(self, mid: int) -> None:
        self.client.handle_unsuback(mid)
        self.subscriptions.handle_unsuback(mid)

    @_callback
    def _on_disconnect(self, reason: ReasonCode) -> None:
        if reason.value == _SESSION_TAKEN_OVER:
            self.end_reason = duplicate_client_id(self._settings)
        fault = self.client.read_error or f"connection ended: {reason}"
        self.end_reason = self.end_reason or f"{fault}{self._hint(reason)}"

    def _hint(self, reason: ReasonCode) -> str:
        """Return what to change, where the reason does not say it."""
        if self._settings.iot_core and reason.value == _NOT_AUTHORIZED:
            return f"; {POLICY_HINT.format(client_id=self._settings.mqtt_client_id)}"
        if self._settings.mqtt_cert_file and not self.accepted:
            # With TLS 1.3 the broker checks it after our side of the handshake is done.
            return "; perhaps it does not accept the client certificate: check IOT_MQTT_CERT_FILE"
        return ""


def duplicate_client_id(settings: Settings) -> str:
    """Return the error text for another client that connects with our client id."""
    return (
        f"another client connects with the client id {settings.mqtt_client_id!r}; "
        "give each collector its own IOT_MQTT_CLIENT_ID"
    )


def set_up_transport(client: Client, settings: Settings) -> "Handshake | None":
    """Set a client's credentials, TLS and WebSocket path from the settings.

    :return: for a signed WebSocket, what can explain why the handshake failed.
    :raises OSError: a secret or TLS file cannot be read, or there are no AWS credentials.
    """
    broker = settings.broker
    if settings.signed:
        from .signing import set_up

        return set_up(client, settings)
    if broker.username is not None:
        client.username_pw_set(broker.username, settings.mqtt_secret)
    if broker.transport == "websockets":
        client.ws_set_options(path=broker.path)
    if broker.tls:
        files = (settings.mqtt_ca_file, settings.mqtt_cert_file, settings.mqtt_key_file)
        ca, cert, key = (str(file) if file else None for file in files)
        # On this port, AWS IoT Core takes MQTT only from a client that asks for it.
        alpn = [ALPN] if settings.iot_core and broker.port == ALPN_PORT else None
        client.tls_set(ca, cert, key, alpn_protocols=alpn)
    return None
