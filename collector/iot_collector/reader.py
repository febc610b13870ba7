"""A paho client that reads in bulk.

paho reads a packet with about seven system calls and hands it over through an object, two locks
and a callback. This subclass reads up to 256 KiB at once, turns every PUBLISH straight into a COPY
tuple, and hands every other packet to paho. What that gains is measured in benchmarks/.

It uses a few of paho's internals. So pyproject.toml pins paho's minor release, a test compares
both readers byte by byte, and `make_client` falls back to the stock reader, which uses none of
them, when one is missing.
"""

import base64
import struct
import time

import structlog
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.exception import MQTTException
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from .rows import Prefixes, properties_json, tuples, with_properties
from .settings import Settings

log = structlog.get_logger(__name__)

_READ_SIZE = 1 << 18
_READ_MESSAGES = 1_000  # so that acknowledgements are not kept waiting
# Every private attribute of paho's Client that is used in this package (a test compares).
INTERNALS = [
    *("_in_packet", "_last_bytes_received", "_loop_rc_handle", "_msgtime_mutex", "_packet_handle"),
    *("_packet_queue", "_ping_t", "_send_pingreq", "_send_pubcomp", "_sock_recv"),
]

# Packet types, MQTT 5 §2.1.2, as the first byte of their packets.
_PUBLISH = 0x30
_PUBACK = 0x40
_PUBREC = 0x50
_DUP = 0x08 << 16  # the flags in a tag: the packet's first byte shifted by 16
_QOS1 = 0x02 << 16
_QOS2 = 0x04 << 16


class StockClient(Client):
    """paho's own reader; the fallback, and the measure of the other."""

    max_qos = 1  # paho acknowledges at QoS 2 (PUBREC) before the message can be stored

    def __init__(self, settings: Settings, *, keep_session: bool = True) -> None:
        v5 = settings.mqtt_version == "5"
        super().__init__(
            CallbackAPIVersion.VERSION2,
            client_id=settings.mqtt_client_id,
            clean_session=None if v5 else not keep_session,
            protocol=MQTTProtocolVersion.MQTTv5 if v5 else MQTTProtocolVersion.MQTTv311,
            transport=settings.broker.transport,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        self.on_message = self._receive_message
        self.on_unsubscribe = lambda _c, _u, mid, _r, _p: self._unsubscribed(mid)
        self._asked: int | None = None  # packet id of the UNSUBSCRIBE that `ping` sent
        self._known = [Prefixes(flags) for flags in range(8)]  # by QoS and RETAIN
        self._prefixes: list[bytes] = []
        self._payloads: list[bytes] = []
        self._tags: list[int] = []
        self.fault: str | None = None  # why a packet from the broker could not be read

    def read(self) -> None:
        """Read what the socket has, or much of it; see `take`."""
        # paho gives a packet at a time, TLS and WebSocket a record or frame, with a packet in each.
        count = -1
        while self.socket() is not None and count < len(self._tags) < _READ_MESSAGES:
            count = len(self._tags)
            self.loop_read()

    def take(self) -> tuple[list[bytes], list[int]]:
        """Return the rows and tags (see `flow.Chunk`) of what was read since the last call."""
        rows, tags = tuples(self._prefixes, self._payloads), self._tags
        self._prefixes, self._payloads, self._tags = [], [], []
        return rows, tags

    @property
    def pending(self) -> int:
        """How many messages `take` would return now."""
        return len(self._tags)

    def acknowledge(self, tags: list[int]) -> None:
        """Acknowledge stored messages."""
        for tag in tags:
            if tag & (_QOS1 | _QOS2):
                self.ack(tag & 0xFFFF, 1 if tag & _QOS1 else 2)

    def excuse_ping(self) -> None:
        """Forget an outstanding PINGREQ: its answer may be behind what we do not read for now."""
        # paho has no public way to do so: a database that hangs may cost the connection.

    def ping(self) -> None:
        """Ask the broker for a sign that it has read everything sent before; see `answered`."""
        # paho sends no PINGREQ on demand; a broker answers each UNSUBSCRIBE (MQTT 5 §3.10.4).
        _, self._asked = self.unsubscribe("iot-collector/ping")

    @property
    def answered(self) -> bool:
        """Whether every ping has been answered."""
        return self._asked is None

    def _unsubscribed(self, mid: int) -> None:
        if mid == self._asked:
            self._asked = None

    def finish(self, seconds: float, *, end_session: bool = False) -> None:
        """Disconnect when the broker has read all that was sent to it, or after ``seconds``.

        Closing a socket with unread input resets the connection, and a reset discards what the
        peer has not read yet: the last acknowledgements. A PINGRESP says it has read them.
        """
        until = time.monotonic() + seconds
        self.ping()
        while self.socket() is not None and not self.answered and time.monotonic() < until:
            self.loop(0.1)
            self.take()
        properties = None
        if end_session and self.protocol == MQTTProtocolVersion.MQTTv5:
            properties = Properties(PacketTypes.DISCONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = 0
        self.disconnect(properties=properties)

    def _receive_message(self, _client: Client, _userdata: object, message: MQTTMessage) -> None:
        flags = message.qos << 1 | message.retain
        prefix = self._known[flags][message.topic.encode()]
        if message.properties and (properties := _properties(message.properties)):
            prefix = with_properties(prefix, properties)
        self._prefixes.append(prefix)
        self._payloads.append(bytes(message.payload))
        self._tags.append((_PUBLISH | message.dup << 3 | flags) << 16 | message.mid)


class BulkClient(StockClient):
    """Reads many packets with one system call; acknowledges many with one."""

    max_qos = 2

    def __init__(self, settings: Settings, *, keep_session: bool = True) -> None:
        super().__init__(settings, keep_session=keep_session)
        self._v5 = settings.mqtt_version == "5"
        self._parts: list[bytes] = []  # the beginning of a packet whose end is not read yet
        self._missing = 0  # how many bytes that packet needs at least to go on

    def excuse_ping(self) -> None:
        """Forget an outstanding PINGREQ: its answer may be behind what we do not read for now."""
        self._ping_t = 0.0

    def ping(self) -> None:
        """Ask the broker for a sign that it has read everything sent before; see `answered`."""
        self._send_pingreq()

    @property
    def answered(self) -> bool:
        """Whether every ping has been answered."""
        return self._ping_t == 0

    def loop_read(self, max_packets: int = 1) -> MQTTErrorCode:
        """Do one read, of however many packets there are."""
        del max_packets  # paho ignores it, too
        try:
            data = self._sock_recv(_READ_SIZE)
        except BlockingIOError:
            return MQTTErrorCode.MQTT_ERR_SUCCESS
        except OSError as error:
            self.fault = str(error)
            data = b""
        if not data:
            return self._loop_rc_handle(MQTTErrorCode.MQTT_ERR_CONN_LOST)
        with self._msgtime_mutex:
            self._last_bytes_received = time.monotonic()
        self._parts.append(data)
        self._missing -= len(data)
        if self._missing > 0:
            return MQTTErrorCode.MQTT_ERR_SUCCESS
        if len(self._parts) > 1:
            data = b"".join(self._parts)
        try:
            at = self._parse(data)
        except (ValueError, LookupError, struct.error, MQTTException) as error:
            # MQTT 5 §4.13.1: a malformed packet ends the connection. The messages before it
            # are whole; the broker sends the rest again.
            self.fault = f"malformed packet: {error}"
            return self._loop_rc_handle(MQTTErrorCode.MQTT_ERR_PROTOCOL)
        self._parts = [data[at:]] if at < len(data) else []
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _parse(self, data: bytes) -> int:
        """Take the whole packets at the start of ``data``; return where the rest begins."""
        known, prefixes, payloads, tags = self._known, self._prefixes, self._payloads, self._tags
        v5 = self._v5
        size = len(data)
        at = 0
        while size - at >= 2:
            header = data[at]
            length = data[at + 1]
            body = at + 2
            if length >= 0x80:
                if size - at > 2 and data[body] < 0x80:  # two bytes, as most have
                    length += (data[body] - 1) << 7
                    body += 1
                else:
                    length, body = _variable_length(data, at + 1)
                if not body:
                    self._missing = 1
                    return at
            end = body + length
            if end > size:
                self._missing = end - size
                return at
            if header & 0xF0 == _PUBLISH:
                topic_at = body + 2
                middle = topic_at + (data[body] << 8 | data[body + 1])
                prefix = known[header & 7][data[topic_at:middle]]
                tag = header << 16
                if header & 0x06:
                    mid = data[middle] << 8 | data[middle + 1]
                    middle += 2
                    tag |= mid
                    if not mid or header & 0x06 == 0x06:
                        raise ValueError("PUBLISH with QoS 3, or without packet id")
                if v5:
                    if data[middle]:
                        middle, properties = self._properties(data, middle, end)
                        if properties is not None:
                            prefix = with_properties(prefix, properties)
                    else:
                        middle += 1
                if middle > end:
                    raise ValueError("PUBLISH with impossible lengths")
                prefixes.append(prefix)
                payloads.append(data[middle:end])
                tags.append(tag)
            else:
                self._hand_over(header, data[body:end])
                if self.socket() is None:
                    return size
            at = end
        self._missing = 1 if at < size else 0
        return at

    def _properties(self, data: bytes, at: int, end: int) -> tuple[int, bytes | None]:
        length, start = _variable_length(data, at)
        if not start or start + length > end:
            raise ValueError("PUBLISH with properties beyond its end")
        raw = data[at : start + length]
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        try:
            properties.unpack(raw)  # type: ignore[no-untyped-call]
        except (ValueError, LookupError, struct.error, MQTTException):
            # The message is whole, and the broker let it through; ending the connection would
            # bring it back for ever. (paho refuses texts that MQTT allows, as one with U+FEFF.)
            return start + length, properties_json([], {"Unreadable": _base64(raw)})
        if hasattr(properties, "TopicAlias"):
            raise ValueError("topic alias, though we allowed none")
        return start + length, _properties(properties)

    def _hand_over(self, header: int, body: bytes) -> None:
        """Have paho handle a packet that is no PUBLISH, as if it had read it itself."""
        if header & 0xF0 == 0x60:  # PUBREL: its message is stored, or PUBREC had not been sent
            self._send_pubcomp(body[0] << 8 | body[1])
            return
        self._in_packet.update(
            {"command": header, "remaining_length": len(body), "packet": bytearray(body), "pos": 0}
        )
        rc = self._packet_handle()
        if rc == MQTTErrorCode.MQTT_ERR_PROTOCOL:
            raise ValueError(f"unexpected packet of type {header >> 4}, {len(body)} bytes long")
        if rc > 0:
            self._loop_rc_handle(rc)

    def acknowledge(self, tags: list[int]) -> None:
        """Acknowledge stored messages, with one write for all."""
        # PUBACK, and PUBREC for QoS 2, of length 2 (in MQTT 5 too: reason "success").
        words = [
            (_PUBACK if tag & _QOS1 else _PUBREC) << 24 | 2 << 16 | tag & 0xFFFF
            for tag in tags
            if tag & (_QOS1 | _QOS2)
        ]
        if words:
            packets = struct.pack(f">{len(words)}I", *words)
            self._packet_queue(_PUBACK, packets, 0, 1)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _variable_length(data: bytes, at: int) -> tuple[int, int]:
    """Return a length of 1 to 4 bytes (MQTT 5 §1.5.5) and where it ends; 0 when it is cut off."""
    length = shift = 0
    for i in range(at, at + 4):
        if i >= len(data):
            return 0, 0
        length |= (data[i] & 0x7F) << shift
        shift += 7
        if data[i] < 0x80:
            return length, i + 1
    raise ValueError("length of more than 4 bytes")


def _properties(properties: Properties) -> bytes | None:
    """Return the MQTT 5 properties of a PUBLISH that a reader of the row may need, as JSON."""
    values = vars(properties)
    other: dict[str, object] = {
        name: values[name]
        for name in ("ContentType", "ResponseTopic", "PayloadFormatIndicator")
        if name in values
    }
    if "CorrelationData" in values:
        other["CorrelationData"] = _base64(values["CorrelationData"])
    return properties_json(values.get("UserProperty", []), other)


def make_client(settings: Settings, *, keep_session: bool = True) -> StockClient:
    """Return the bulk client, or the stock one when paho has changed below us."""
    client = BulkClient(settings, keep_session=keep_session)
    missing = [name for name in INTERNALS if not hasattr(client, name)]
    if not missing:
        return client
    log.warning("reading packet by packet: this paho-mqtt has changed", missing=missing)
    return StockClient(settings, keep_session=keep_session)
