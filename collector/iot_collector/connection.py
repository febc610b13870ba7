"""One connection to the broker, from CONNECT to its end: its session and in-flight window.

Used by the network thread only. Messages are acknowledged only on the connection that they came
from. On another connection, their packet ids may belong to other messages.
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
# assumed to be the broker's window.
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
    """An MQTT client and the state of its connection and session."""

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
        self._window = settings.mqtt_max_inflight  # the broker's window, as assumed so far
        # Whether the log has the warning of `count_received`. IoT Core sends a message repeatedly
        # until it is acknowledged, so the count can be higher there
        # (https://docs.aws.amazon.com/iot/latest/developerguide/mqtt.html#mqtt-qos).
        self._warned = settings.iot_core

    def open(self) -> None:
        """Connect, with the current content of the credential files.

        :raises OSError: the broker cannot be reached, TLS fails or a file cannot be read.
        :raises ValueError: client certificate and key do not match.
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
        # The broker may use a smaller window than the announced one, and does not tell. If it does
        # not, and the number was the same only because the traffic was regular, `_unacked` soon
        # exceeds the assumed window.
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
                    "Mosquitto before 2.0.21 does (each PUBACK releases a whole window): the "
                    "setting does not limit memory, and after a crash more messages may be stored "
                    "twice; use Mosquitto 2.0.21 or newer",
                    unacked=self._unacked,
                )

    @property
    def window_nearly_full(self) -> bool:
        """Whether the broker needs acknowledgements before it sends more, or soon will."""
        announced = self._settings.mqtt_max_inflight
        return self._window < announced or self._unacked >= announced // 2

    @property
    def window_half_empty(self) -> bool:
        """Whether the broker certainly sends more before it gets acknowledgements.

        It is certain if twice as many messages have been un-acknowledged before.
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
        # The broker sends the property only if it uses another value (MQTT 5 §3.2.2.3.2).
        granted = getattr(properties, "SessionExpiryInterval", asked)
        if self._keep_session and granted < asked:
            log.warning(
                "the broker keeps the session for less than IOT_MQTT_SESSION_EXPIRY_SECONDS",
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
        """Return what to check, if the reason code does not tell; else an empty string."""
        if self._settings.iot_core and reason.value == _NOT_AUTHORIZED:
            return f"; {POLICY_HINT.format(client_id=self._settings.mqtt_client_id)}"
        if self._settings.mqtt_cert_file and not self.accepted:
            # With TLS 1.3, the broker checks the certificate after the client's handshake is done.
            return "; perhaps it does not accept the client certificate: check IOT_MQTT_CERT_FILE"
        return ""


def duplicate_client_id(settings: Settings) -> str:
    """Return the error text for when another client connects with this client id."""
    return (
        f"another client connects with the client id {settings.mqtt_client_id!r}; "
        "give each collector its own IOT_MQTT_CLIENT_ID"
    )


def set_up_transport(client: Client, settings: Settings) -> "Handshake | None":
    """Set a client's credentials, TLS and WebSocket path from the settings.

    :return: for a signed WebSocket, an object that explains why the handshake failed; else None.
    :raises OSError: a password or TLS file cannot be read, or there are no AWS credentials.
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
        # On port 443, AWS IoT Core accepts MQTT only with this ALPN protocol name.
        alpn = [ALPN] if settings.iot_core and broker.port == ALPN_PORT else None
        client.tls_set(ca, cert, key, alpn_protocols=alpn)
    return None
