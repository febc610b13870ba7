"""MQTT clients: paho's, and one that reads in bulk.

For each packet, paho needs about seven system calls, an object, two locks and a callback.
`BulkClient` reads up to 256 KiB at once, turns every PUBLISH directly into a row of the COPY
format, and leaves every other packet to paho. benchmarks/ measures the difference.

`BulkClient` uses private attributes of paho. Therefore pyproject.toml pins paho's minor release, a
test compares both clients byte by byte, and `make_client` falls back to `StockClient`, which uses
none of these attributes, if one is missing.
"""

import base64
import struct
import time
from typing import NamedTuple

import structlog
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.exception import MQTTException
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from .binary_payloads import BinaryTopics, Decoder, PrefixDecoders, decoder_of
from .buffer import FLAGS_SHIFT, PACKET_ID, QOS, QOS_1
from .copy_format import RowPrefixes, encode_rows, properties_json, with_properties
from .message_ids import fields_and_ids, valid_id
from .settings import Settings

log = structlog.get_logger(__name__)

_READ_SIZE = 1 << 18
_READ_MESSAGES = 1_000  # at most per read, so that acknowledgements are not delayed
# Every private attribute of paho's Client that this package uses (a test checks the list).
PAHO_INTERNALS = [
    *("_in_packet", "_last_bytes_received", "_loop_rc_handle", "_msgtime_mutex", "_packet_handle"),
    *("_packet_queue", "_ping_t", "_send_pingreq", "_send_pubcomp", "_sock_recv"),
]

# First byte of a packet: its type (MQTT 5 §2.1.2), with all flags 0.
_PUBLISH = 0x30
_PUBACK = 0x40
_PUBREC = 0x50


class Messages(NamedTuple):
    """The messages that a client has read. `buffer.ReadBatch` describes the three lists."""

    rows: list[bytes]
    tags: list[int]
    ids: list[str | None] | None


class StockClient(Client):
    """A client that reads as paho does: the fallback, and the reference for `BulkClient`."""

    max_qos = 1  # at QoS 2, paho sends PUBREC before the message can be stored

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
        self.on_unsubscribe = lambda _c, _u, mid, _r, _p: self.handle_unsuback(mid)
        self._ping_packet_id: int | None = None  # of the UNSUBSCRIBE that `ping` sent
        self._row_prefixes = [RowPrefixes(flags) for flags in range(8)]  # by QoS and RETAIN
        self._id_key = settings.message_id_key
        self._binary_topics = BinaryTopics(settings)
        self._topic_decoders = PrefixDecoders(self._binary_topics)
        # The messages that were read and not taken yet:
        self._prefixes: list[bytes] = []
        self._payloads: list[bytes] = []
        self._tags: list[int] = []
        self._property_ids: dict[int, str | None] = {}  # index of a message -> its id
        self._decoders: dict[int, Decoder] = {}  # index of a message -> decoder of its payload
        self.read_error: str | None = None  # why the broker's bytes could not be read

    def read(self) -> None:
        """Read from the socket, at most about 1000 messages; `take_messages` returns them."""
        # paho's loop_read() reads one packet. With TLS or WebSocket, that of `BulkClient` reads one
        # record or frame, which often has only one packet.
        count = -1
        while self.socket() is not None and count < len(self._tags) < _READ_MESSAGES:
            count = len(self._tags)
            self.loop_read()

    def take_messages(self) -> Messages:
        """Return the messages that were read since the last call."""
        if self._binary_topics:
            for index, decoder in enumerate(map(self._topic_decoders.__getitem__, self._prefixes)):
                if decoder:
                    self._decoders.setdefault(index, decoder)
        fields, ids = fields_and_ids(self._payloads, self._id_key, self._decoders)
        if ids is not None:
            for index, message_id in self._property_ids.items():
                ids[index] = message_id
        self._property_ids, self._decoders = {}, {}
        messages = Messages(encode_rows(self._prefixes, self._payloads, fields), self._tags, ids)
        self._prefixes, self._payloads, self._tags = [], [], []
        return messages

    @property
    def message_count(self) -> int:
        """How many messages `take_messages` would return now."""
        return len(self._tags)

    def acknowledge(self, tags: list[int]) -> None:
        """Acknowledge stored messages."""
        for tag in tags:
            if tag & QOS:
                self.ack(tag & PACKET_ID, 1 if tag & QOS_1 else 2)

    def forget_ping(self) -> None:
        """Stop waiting for a PINGRESP: it may be behind messages that are not read for now."""
        # paho has no public method for this. If the database hangs, the connection may be lost.

    def ping(self) -> None:
        """Send a packet that the broker answers once it has read everything sent before."""
        # paho has no public method to send a PINGREQ. A broker answers any UNSUBSCRIBE (MQTT 5
        # §3.10.4).
        _, self._ping_packet_id = self.unsubscribe("iot-collector/ping")

    @property
    def ping_answered(self) -> bool:
        """Whether the broker has answered the last `ping`."""
        return self._ping_packet_id is None

    def handle_unsuback(self, packet_id: int) -> None:
        """Handle an UNSUBACK: it may answer `ping`. A new ``on_unsubscribe`` must call this."""
        if packet_id == self._ping_packet_id:
            self._ping_packet_id = None

    def disconnect_gracefully(self, timeout: float, *, end_session: bool = False) -> None:
        """Disconnect when the broker has read everything sent to it, or after ``timeout`` seconds.

        Closing a socket with unread input resets the connection. A reset discards data that the
        peer has not read yet, here the last acknowledgements. The answer to a ping shows that the
        broker has read them. Messages that arrive meanwhile are dropped and not acknowledged.

        :param end_session: tell the broker to end the session (MQTT 5 only).
        """
        deadline = time.monotonic() + timeout
        self.ping()
        while self.socket() is not None and not self.ping_answered and time.monotonic() < deadline:
            self.loop(0.1)
            self.take_messages()
        properties = None
        if end_session and self.protocol == MQTTProtocolVersion.MQTTv5:
            properties = Properties(PacketTypes.DISCONNECT)
            properties.SessionExpiryInterval = 0
        self.disconnect(properties=properties)

    def _receive_message(self, _client: Client, _userdata: object, message: MQTTMessage) -> None:
        flags = message.qos << 1 | message.retain
        prefix = self._row_prefixes[flags][message.topic.encode()]
        if message.properties and (properties := self._stored_properties(message.properties)):
            prefix = with_properties(prefix, properties)
        self._prefixes.append(prefix)
        self._payloads.append(bytes(message.payload))
        self._tags.append((_PUBLISH | message.dup << 3 | flags) << FLAGS_SHIFT | message.mid)

    def _stored_properties(self, properties: Properties) -> bytes | None:
        """Return the properties to store with a message, as JSON.

        Keep the decoder for their content type and their message id for `take_messages`.
        """
        stored = _properties_json(properties)
        if decoder := decoder_of(vars(properties).get("ContentType", "")):
            self._decoders[len(self._tags)] = decoder
        if stored is not None and self._id_key is not None:
            user = dict(reversed(vars(properties).get("UserProperty", [])))  # the first one wins
            if self._id_key in user:
                self._property_ids[len(self._tags)] = valid_id(user[self._id_key])
        return stored


class BulkClient(StockClient):
    """A client that reads many packets with one system call, and acknowledges many with one."""

    max_qos = 2

    def __init__(self, settings: Settings, *, keep_session: bool = True) -> None:
        super().__init__(settings, keep_session=keep_session)
        self._v5 = settings.mqtt_version == "5"
        self._parts: list[bytes] = []  # the start of a packet that is not complete yet
        self._missing = 0  # minimum number of bytes until it may be complete

    def forget_ping(self) -> None:
        """Stop waiting for a PINGRESP: it may be behind messages that are not read for now."""
        self._ping_t = 0.0

    def ping(self) -> None:
        """Send a packet that the broker answers once it has read everything sent before."""
        self._send_pingreq()

    @property
    def ping_answered(self) -> bool:
        """Whether the broker has answered the last `ping`."""
        return self._ping_t == 0

    def loop_read(self, max_packets: int = 1) -> MQTTErrorCode:
        """Receive once, and handle all packets that are complete."""
        del max_packets  # paho ignores it too
        try:
            data = self._sock_recv(_READ_SIZE)
        except BlockingIOError:
            return MQTTErrorCode.MQTT_ERR_SUCCESS
        except OSError as error:
            self.read_error = str(error)
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
            # A malformed packet ends the connection (MQTT 5 §4.13.1). The messages before it are
            # complete; the broker sends the others again.
            self.read_error = f"malformed packet: {error}"
            return self._loop_rc_handle(MQTTErrorCode.MQTT_ERR_PROTOCOL)
        self._parts = [data[at:]] if at < len(data) else []
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _parse(self, data: bytes) -> int:
        """Handle the complete packets at the start of ``data``; return the offset of the rest."""
        row_prefixes = self._row_prefixes
        prefixes, payloads, tags = self._prefixes, self._payloads, self._tags
        v5 = self._v5
        size = len(data)
        at = 0
        while size - at >= 2:
            header = data[at]
            length = data[at + 1]
            body = at + 2
            if length >= 0x80:
                if size - at > 2 and data[body] < 0x80:  # a length of two bytes is most common
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
                prefix = row_prefixes[header & 7][data[topic_at:middle]]
                tag = header << FLAGS_SHIFT
                if header & 0x06:
                    mid = data[middle] << 8 | data[middle + 1]
                    middle += 2
                    tag |= mid
                    if not mid or header & 0x06 == 0x06:
                        raise ValueError("PUBLISH with QoS 3, or without packet id")
                if v5:
                    if data[middle]:
                        middle, properties = self._read_properties(data, middle, end)
                        if properties is not None:
                            prefix = with_properties(prefix, properties)
                    else:
                        middle += 1
                if middle > end:
                    raise ValueError("PUBLISH with inconsistent lengths")
                prefixes.append(prefix)
                payloads.append(data[middle:end])
                tags.append(tag)
            else:
                self._handle_by_paho(header, data[body:end])
                if self.socket() is None:
                    return size
            at = end
        self._missing = 1 if at < size else 0
        return at

    def _read_properties(self, data: bytes, at: int, end: int) -> tuple[int, bytes | None]:
        """Return the offset after the properties of a PUBLISH, and the properties to store."""
        length, start = _variable_length(data, at)
        if not start or start + length > end:
            raise ValueError("PUBLISH with properties beyond its end")
        raw = data[at : start + length]
        properties = Properties(PacketTypes.PUBLISH)
        try:
            properties.unpack(raw)
        except (ValueError, LookupError, struct.error, MQTTException):
            # Keep the connection: the message is complete and the broker accepted it, so it would
            # send it again on every new connection. (paho refuses some strings that MQTT allows,
            # such as those with U+FEFF.)
            return start + length, properties_json([], {"Unreadable": _base64(raw)})
        if hasattr(properties, "TopicAlias"):
            raise ValueError("PUBLISH with a topic alias, although CONNECT allows none")
        return start + length, self._stored_properties(properties)

    def _handle_by_paho(self, header: int, body: bytes) -> None:
        """Let paho handle a packet other than PUBLISH, as if paho had read it."""
        if header & 0xF0 == 0x60:  # PUBREL answers PUBREC, so its message is stored
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
        # PUBACK, or PUBREC for QoS 2, with a length of 2. In MQTT 5 too: without a reason code they
        # mean "success".
        words = [
            (_PUBACK if tag & QOS_1 else _PUBREC) << 24 | 2 << 16 | tag & PACKET_ID
            for tag in tags
            if tag & QOS
        ]
        if words:
            packets = struct.pack(f">{len(words)}I", *words)
            self._packet_queue(_PUBACK, packets, 0, 1)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _variable_length(data: bytes, at: int) -> tuple[int, int]:
    """Decode a variable byte integer (MQTT 5 §1.5.5); return it and the offset after it.

    The offset is 0 if the integer is not complete.

    :raises ValueError: the integer has more than 4 bytes.
    """
    length = shift = 0
    for i in range(at, at + 4):
        if i >= len(data):
            return 0, 0
        length |= (data[i] & 0x7F) << shift
        shift += 7
        if data[i] < 0x80:
            return length, i + 1
    raise ValueError("length of more than 4 bytes")


def _properties_json(properties: Properties) -> bytes | None:
    """Return the MQTT 5 properties of a PUBLISH to store, as JSON; None if there are none."""
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
    """Return a `BulkClient`, or a `StockClient` if paho lacks an attribute of `PAHO_INTERNALS`."""
    client = BulkClient(settings, keep_session=keep_session)
    missing = [name for name in PAHO_INTERNALS if not hasattr(client, name)]
    if not missing:
        return client
    log.warning("reading packet by packet: paho-mqtt lacks private attributes", missing=missing)
    return StockClient(settings, keep_session=keep_session)
