"""BulkClient compared with paho's own reader, and with malformed streams."""

import ast
import base64
import inspect
import socket
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import iot_collector
import orjson
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from iot_collector.client import PAHO_INTERNALS, BulkClient, StockClient, make_client
from iot_collector.connection import Connection
from iot_collector.copy_format import decode_tuple, tuple_start
from iot_collector.settings import Settings
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from testing.service import PATIENCE


@dataclass
class FakeSocket:
    """Returns one chunk for each recv, then blocks. Records each send."""

    chunks: list[bytes]
    sent: list[bytes] = field(default_factory=list)

    def recv(self, size: int) -> bytes:
        if not self.chunks:
            raise BlockingIOError
        chunk = self.chunks.pop(0)
        if len(chunk) > size:
            self.chunks.insert(0, chunk[size:])
        return chunk[:size]

    def send(self, data: bytes) -> int:
        self.sent.append(bytes(data))
        return len(data)

    def close(self) -> None:
        self.chunks.clear()

    def setblocking(self, _flag: bool) -> None:
        pass


def connected(kind: type[StockClient], version: str, chunks: Sequence[bytes]) -> StockClient:
    """Return a client that is connected to a fake socket."""
    client = kind(Settings(mqtt_version=version))
    client._sock = FakeSocket([chunk for chunk in chunks if chunk])  # type: ignore[assignment]
    return client


def socket_of(client: StockClient) -> FakeSocket:
    sock = client.socket()
    assert isinstance(sock, FakeSocket)
    return sock


def read_all(
    kind: type[StockClient], version: str, chunks: Sequence[bytes]
) -> tuple[list[bytes], list[int], StockClient]:
    """Read all chunks with a new client; return rows, tags and the client."""
    client = connected(kind, version, chunks)
    while client.socket() is not None and socket_of(client).chunks:
        client.read()
    rows, tags, _ = client.take_messages()
    return rows, tags, client


def packet(header: int, body: bytes) -> bytes:
    length, digits = len(body), b""
    while True:
        length, digit = divmod(length, 128)
        digits += bytes([digit | 128 if length else digit])
        if not length:
            return bytes([header]) + digits + body


def text16(text: bytes) -> bytes:
    return struct.pack(">H", len(text)) + text


def publish_packet(
    version: str = "5",
    *,
    topic: bytes = b"iot/data",
    payload: bytes = b"temperature:23",
    qos: int = 1,
    dup: bool = False,
    retain: bool = False,
    mid: int = 1,
    properties: bytes = b"\0",
) -> bytes:
    """Return a PUBLISH packet. ``properties`` start with their length; only MQTT 5 has them."""
    body = text16(topic) + (struct.pack(">H", mid) if qos else b"")
    body += (properties if version == "5" else b"") + payload
    return packet(0x30 | dup << 3 | qos << 1 | retain, body)


OTHER_PACKETS = {
    "5": [b"\xd0\0", b"\x40\2\0\7", b"\x40\3\0\7\x10", b"\x90\4\0\1\0\1", b"\xb0\4\0\1\0\0"],
    "3.1.1": [b"\xd0\0", b"\x40\2\0\7", b"\x90\3\0\1\1", b"\xb0\2\0\1", b"\x70\2\0\7"],
}
# Without U+FEFF, which paho rejects, against MQTT 5 §1.5.4.
_text = st.text(
    st.characters(exclude_characters="\0\ufeff", exclude_categories=["Cs"]), max_size=20
)


@st.composite
def _properties(draw: st.DrawFn) -> bytes:
    found = Properties(PacketTypes.PUBLISH)
    found.UserProperty = draw(st.lists(st.tuples(_text, _text), max_size=4))
    for name, values in {
        "ContentType": _text,
        "ResponseTopic": _text,
        "CorrelationData": st.binary(max_size=20),
        "PayloadFormatIndicator": st.integers(0, 1),
        "MessageExpiryInterval": st.integers(0, 2**32 - 1),
    }.items():
        value = draw(st.none() | values)
        if value is not None:
            setattr(found, name, value)
    return bytes(found.pack())


@st.composite
def _packets(draw: st.DrawFn, version: str, *, qos: tuple[int, ...] = (0, 1)) -> bytes:
    if draw(st.integers(0, 4)) == 0:
        return draw(st.sampled_from(OTHER_PACKETS[version]))
    chosen = draw(st.sampled_from(qos))
    return publish_packet(
        version,
        topic=draw(_text.filter(bool)).encode(),
        payload=draw(
            st.binary(max_size=40)
            | st.sampled_from([b"a:1", b'{"a":1}', b"x" * 120, b"x" * 130, b"x" * 17_000])
        ),
        qos=chosen,
        dup=bool(chosen) and draw(st.booleans()),
        retain=draw(st.booleans()),
        mid=draw(st.integers(1, 65_535)),
        properties=draw(st.just(b"\0") | _properties()),
    )


@st.composite
def _streams(draw: st.DrawFn, version: str) -> tuple[list[bytes], list[bytes]]:
    """Packets, and the same bytes split at arbitrary places."""
    packets = draw(st.lists(_packets(version), max_size=12))
    data = b"".join(packets)
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    ends = [0, *cuts, len(data)]
    return packets, [data[a:b] for a, b in pairwise(ends)]


@pytest.mark.parametrize("version", ["5", "3.1.1"])
@given(data=st.data())
def test_bulk_and_stock_client_read_the_same_messages(version: str, data: st.DataObject) -> None:
    packets, chunks = data.draw(_streams(version))
    expected = read_all(StockClient, version, [b"".join(packets)])
    found = read_all(BulkClient, version, chunks)
    assert found[0] == expected[0]
    assert found[1] == expected[1]
    assert len(found[0]) == sum(p[0] & 0xF0 == 0x30 for p in packets)
    for client in (found[2], expected[2]):
        assert client.socket() is not None
        assert client.read_error is None


def example_stream(version: str) -> bytes:
    properties = Properties(PacketTypes.PUBLISH)
    properties.UserProperty = [("a", "b"), ("a", "c")]
    return b"".join(
        [
            publish_packet(version, qos=0, retain=True, payload=b""),
            OTHER_PACKETS[version][0],
            publish_packet(version, mid=65_535, dup=True, properties=bytes(properties.pack())),
            *OTHER_PACKETS[version],
            publish_packet(version, topic="ü/☃".encode(), payload=b"x" * 200),
            publish_packet(version, mid=2),
        ]
    )


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_stream_may_be_split_at_any_byte(version: str) -> None:
    stream = example_stream(version)
    expected = read_all(StockClient, version, [stream])[:2]
    assert len(expected[0]) == 4
    for cut in range(len(stream)):
        assert read_all(BulkClient, version, [stream[:cut], stream[cut:]])[:2] == expected, cut
    single = [stream[i : i + 1] for i in range(len(stream))]
    assert read_all(BulkClient, version, single)[:2] == expected


@pytest.mark.parametrize(
    ("size", "digits"),
    [(0, 1), (100, 1), (128, 2), (16_000, 2), (16_384, 3), (2_000_000, 3), (2_097_152, 4)],
)
def test_packets_with_each_size_of_remaining_length_are_read(size: int, digits: int) -> None:
    first = publish_packet(payload=b"x" * size)
    assert len(first) == size + 14 + digits
    stream = first + publish_packet(payload=b"next")
    chunks = [stream[i : i + 65_536] for i in range(0, len(stream), 65_536)]
    rows, tags, _ = read_all(BulkClient, "5", chunks)
    assert [decode_tuple(tuple_start(0) + row).payload for row in rows] == [b"x" * size, b"next"]
    assert tags == [0x32 << 16 | 1] * 2


def test_one_read_takes_all_tls_records() -> None:
    """With TLS and WebSocket, each recv returns one record or frame, which may be small.

    If a read took only one, each message would need its own batch and transaction.
    """
    packets = [publish_packet(mid=i + 1) for i in range(100)]
    settings = Settings(mqtt_url="wss://127.0.0.1")
    client = BulkClient(settings)
    client._sock = FakeSocket(packets)  # type: ignore[assignment]
    client.read()
    assert len(client.take_messages()[1]) == 100


def test_end_of_stream_drops_an_incomplete_message() -> None:
    client = connected(BulkClient, "5", [publish_packet(), publish_packet()[:-1]])
    client.read()
    client.read()
    socket_of(client).recv = lambda size: b""  # type: ignore[method-assign]
    client.read()
    assert client.socket() is None
    assert len(client.take_messages()[1]) == 1, "the incomplete message is dropped"


GOOD = publish_packet(payload=b"good")
MALFORMED = {
    "no body": b"\x32\0",
    "half a topic length": packet(0x30, b"\0"),
    "topic beyond the packet": packet(0x30, b"\0\x09iot/data"),
    "topic far beyond": packet(0x30, b"\xff\xffiot"),
    "no packet id": packet(0x32, text16(b"iot/data")),
    "half a packet id": packet(0x32, text16(b"iot/data") + b"\0"),
    "no properties length": packet(0x32, text16(b"iot/data") + b"\0\1"),
    "properties beyond the packet": publish_packet(properties=b"\x7f", payload=b""),
    "properties length of 5 bytes": publish_packet(properties=b"\x80\x80\x80\x80\1", payload=b""),
    "topic alias": publish_packet(properties=b"\3\x23\0\1", payload=b""),
    "QoS 3": publish_packet(qos=3),
    "empty topic": publish_packet(topic=b""),
    "topic not UTF-8": publish_packet(topic=b"iot/\xff"),
    "topic with a surrogate": publish_packet(topic=b"\xed\xa0\x80"),
    "topic with NUL": publish_packet(topic=b"iot/\0"),
    "packet id 0": publish_packet(mid=0),
    "length of 5 bytes": b"\x32\x80\x80\x80\x80\x01",
    "packet type 0": b"\x00\0",
    "packet type 15": b"\xf0\2\0\0",
    "CONNECT": b"\x10\0",
    "SUBACK without body": b"\x90\0",
    "PUBREL without packet id": b"\x62\0",
    "PINGRESP with a body": b"\xd0\1\0",
}


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("split", [False, True], ids=["whole", "bytes"])
def test_malformed_packet_closes_the_connection(name: str, split: bool) -> None:
    stream = GOOD + GOOD + MALFORMED[name] + GOOD
    chunks = [stream[i : i + 1] for i in range(len(stream))] if split else [stream]
    ended: list[object] = []
    client = connected(BulkClient, "5", chunks)
    client.on_disconnect = lambda *arguments: ended.append(arguments)
    while client.socket() is not None and socket_of(client).chunks:
        client.read()
    assert client.socket() is None
    assert len(ended) == 1
    assert client.read_error is not None
    assert client.read_error.startswith("malformed packet: ")
    rows, tags, _ = client.take_messages()
    assert [decode_tuple(tuple_start(0) + row).payload for row in rows] == [b"good"] * 2
    assert len(tags) == 2


UNREADABLE = {
    "half a property": publish_packet(properties=b"\2\x02\0", payload=b"good"),
    "unknown property": publish_packet(properties=b"\2\x7f\0", payload=b"good"),
    "property of another packet": publish_packet(properties=b"\3\x21\0\5", payload=b"good"),
    "property twice": publish_packet(properties=b"\4\1\1\1\1", payload=b"good"),
    "user property not UTF-8": publish_packet(properties=b"\7\x26\0\1\xff\0\1b", payload=b"good"),
}


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("split", [False, True], ids=["whole", "bytes"])
def test_unreadable_properties_are_kept_raw(name: str, split: bool) -> None:
    """If they closed the connection, the broker would redeliver the message forever."""
    stream = GOOD + UNREADABLE[name] + GOOD
    chunks = [stream[i : i + 1] for i in range(len(stream))] if split else [stream]
    client = connected(BulkClient, "5", chunks)
    while socket_of(client).chunks:
        client.read()
    assert client.read_error is None
    messages = [decode_tuple(tuple_start(0) + row) for row in client.take_messages()[0]]
    assert [message.payload for message in messages] == [b"good"] * 3
    assert [message.properties is not None for message in messages] == [False, True, False]
    kept = orjson.loads(messages[1].properties or b"")
    assert base64.b64decode(kept["Unreadable"]) in UNREADABLE[name]


_mutations = st.tuples(st.integers(0, 10_000), st.integers(1, 255))


@pytest.mark.parametrize("version", ["5", "3.1.1"])
@given(data=st.data())
def test_damaged_streams_give_only_valid_rows(version: str, data: st.DataObject) -> None:
    """No stream raises an exception, and PostgreSQL can read each row."""
    packets = data.draw(st.lists(_packets(version, qos=(0, 1, 2)) | st.binary(), max_size=8))
    stream = bytearray(b"".join(packets))
    for place, change in data.draw(st.lists(_mutations, max_size=3)):
        if stream:
            stream[place % len(stream)] ^= change
    whole = read_all(BulkClient, version, [bytes(stream)])
    single = read_all(BulkClient, version, [bytes(stream[i : i + 1]) for i in range(len(stream))])
    assert whole[:2] == single[:2], "the result does not depend on how the stream is split"
    assert len(whole[0]) == len(whole[1])
    for row, tag in zip(*whole[:2], strict=True):
        message = decode_tuple(tuple_start(0) + row)
        assert message.topic.decode()
        assert b"\0" not in message.topic
        assert message.qos == tag >> 17 & 3
        assert message.qos in {0, 1, 2}
        assert bool(message.qos) == bool(tag & 0xFFFF)
    assert (whole[2].socket() is None) == (single[2].socket() is None)


@pytest.mark.parametrize("kind", [StockClient, BulkClient])
def test_qos_1_is_acknowledged_and_qos_0_is_not(kind: type[StockClient]) -> None:
    client = connected(kind, "5", [])
    client.acknowledge([0x30 << 16, 0x32 << 16 | 1, 0x3B << 16 | 0xFFFE, 0x31 << 16])
    assert b"".join(socket_of(client).sent) == b"\x40\2\0\1\x40\2\xff\xfe"


def test_acknowledgements_are_sent_with_one_write() -> None:
    client = connected(BulkClient, "5", [])
    client.acknowledge([0x32 << 16 | 1, 0x34 << 16 | 2, 0x30 << 16, 0x32 << 16 | 3])
    assert socket_of(client).sent == [b"\x40\2\0\1\x50\2\0\2\x40\2\0\3"]
    client.acknowledge([0x30 << 16])
    assert len(socket_of(client).sent) == 1, "QoS 0 is not acknowledged"


def test_qos_2_gets_pubrec_when_stored_and_pubcomp_at_pubrel() -> None:
    client = connected(BulkClient, "5", [publish_packet(qos=2, mid=7, payload=b"two")])
    client.read()
    rows, tags, _ = client.take_messages()
    assert decode_tuple(tuple_start(0) + rows[0])[1:] == (
        2,
        False,
        b"iot/data",
        None,
        b'"two"',
        b"two",
    )
    assert socket_of(client).sent == [], "no PUBREC before it is stored"
    client.acknowledge(tags)
    assert socket_of(client).sent == [b"\x50\2\0\7"]
    socket_of(client).chunks.append(b"\x62\2\0\7")
    client.read()
    assert socket_of(client).sent[1:] == [b"\x70\2\0\7"]
    assert client.take_messages() == ([], [], None), "it is not read a second time"


def test_pubrel_with_a_reason_code_gets_pubcomp() -> None:
    client = connected(BulkClient, "5", [b"\x62\4\0\7\x92\0"])
    client.read()
    assert socket_of(client).sent == [b"\x70\2\0\7"]


@pytest.mark.parametrize(
    ("packet", "text"), [(b"\xe0\1\x8e", "IOT_MQTT_CLIENT_ID"), (b"\xe0\1\x8b", "shutting down")]
)
def test_reason_code_of_disconnect_is_reported(packet: bytes, text: str) -> None:
    connection = Connection(Settings())
    connection.client._sock = FakeSocket([packet])  # type: ignore[assignment]
    connection.client.read()
    assert connection.client.socket() is None
    assert text in (connection.end_reason or "")


@pytest.mark.parametrize(
    ("kind", "last_request", "answer"),
    [
        (BulkClient, b"\xc0\0", b"\xd0\0"),  # PINGREQ, PINGRESP
        (
            StockClient,  # UNSUBSCRIBE, UNSUBACK
            b"\xa2\x17\0\1\0\0\x12iot-collector/ping",
            b"\xb0\4\0\1\0\x11",
        ),
    ],
)
def test_disconnect_waits_until_the_broker_has_read_everything(
    kind: type[StockClient], last_request: bytes, answer: bytes
) -> None:
    """The client sends a last request. It sends DISCONNECT only after the broker answered it."""
    client_end, broker_end = socket.socketpair()
    client_end.setblocking(False)
    broker_end.settimeout(PATIENCE)
    client = connected(kind, "5", [])
    client._sock = client_end
    client.acknowledge([0x32 << 16 | 1])
    thread = threading.Thread(target=client.disconnect_gracefully, args=(PATIENCE,), daemon=True)
    thread.start()
    received = b""
    while last_request not in received:
        received += broker_end.recv(100)
    assert received == b"\x40\2\0\1" + last_request
    broker_end.sendall(publish_packet())  # must not be taken any more
    broker_end.setblocking(False)
    with pytest.raises(BlockingIOError):
        broker_end.recv(100)
    broker_end.setblocking(True)
    broker_end.settimeout(PATIENCE)
    broker_end.sendall(answer)
    assert broker_end.recv(100)[0] == 0xE0
    thread.join(PATIENCE)
    assert client.socket() is None
    assert client.take_messages() == ([], [], None)
    broker_end.close()


def test_make_client_returns_a_bulk_client() -> None:
    with structlog.testing.capture_logs() as logs:
        assert type(make_client(Settings())) is BulkClient
    assert logs == []


@pytest.mark.parametrize("name", PAHO_INTERNALS)
def test_make_client_returns_a_stock_client_if_a_paho_internal_is_missing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if hasattr(Client, name):
        monkeypatch.delattr(Client, name)
    else:  # an attribute of the instance
        create = Client.__init__

        def create_without(self: Client, *args: object, **options: object) -> None:
            create(self, *args, **options)  # type: ignore[arg-type]
            delattr(self, name)

        monkeypatch.setattr(Client, "__init__", create_without)
    with structlog.testing.capture_logs() as logs:
        client = make_client(Settings())
    assert type(client) is StockClient
    (entry,) = logs
    assert entry["log_level"] == "warning"
    assert entry["missing"] == [name]


def private_names_of_paho(source: str) -> set[str]:
    """Return the private attributes of paho's Client that Python source code uses.

    These are ``self._x`` in subclasses of Client, and ``client._x`` and ``anything.client._x``
    everywhere.
    """
    found: set[str] = set()

    def visit(node: ast.AST, *, in_client: bool) -> None:
        if isinstance(node, ast.ClassDef):
            bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
            in_client = bool(bases & {"Client", "StockClient", "BulkClient"})
        if isinstance(node, ast.Attribute):
            match node.value:
                case ast.Name(id="self"):
                    is_client = in_client
                case ast.Name(id="client") | ast.Attribute(attr="client"):
                    is_client = True
                case _:
                    is_client = False
            if is_client and node.attr.startswith("_"):
                found.add(node.attr)
        for child in ast.iter_child_nodes(node):
            visit(child, in_client=in_client)

    visit(ast.parse(source), in_client=False)
    return found & set(dir(Client(CallbackAPIVersion.VERSION2)))


def test_paho_internals_lists_exactly_the_internals_used() -> None:
    package = Path(iot_collector.__file__).parent
    used = {
        name for file in package.glob("*.py") for name in private_names_of_paho(file.read_text())
    }
    assert used == set(PAHO_INTERNALS)
    assert len(set(PAHO_INTERNALS)) == len(PAHO_INTERNALS)


def test_stock_reader_uses_no_internals_of_paho() -> None:
    """It replaces BulkClient when they are missing."""
    assert private_names_of_paho(inspect.getsource(StockClient)) == set()


def test_our_attributes_do_not_override_attributes_of_paho() -> None:
    """A name of ours could be the name of a private attribute of paho by accident."""
    intended = {"loop_read"}
    ours = {name for kind in (StockClient, BulkClient) for name in vars(kind)}
    of_paho = set(dir(Client(CallbackAPIVersion.VERSION2)))
    assert {name for name in ours & of_paho if not name.startswith("__")} == intended
