"""Message ids: how they are read from payloads and user properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from iot_collector.client import BulkClient, StockClient
from iot_collector.fields import fields_of
from iot_collector.message_ids import fields_and_ids
from iot_collector.settings import Settings
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from test_client import FakeSocket, publish_packet

IDS = [
    (b'{"id":"a","t":1}', "a"),
    (b'{"id":7}', "7"),
    (b'{"id":-7}', "-7"),
    (b'{"id":"a","t":{"nested":1}}', "a"),
    (b'{"id":["a"]}', None),
    (b'{"id":true}', None),
    (b'{"id":1.0}', None),
    (b'{"id":null}', None),
    (b'{"id":""}', None),
    (b'{"id":"\\u0000"}', None),
    (b'{"id":"' + b"x" * 255 + b'"}', "x" * 255),
    (b'{"id":"' + b"x" * 256 + b'"}', None),
    (b'{"other":"a"}', None),
    (b'{"id":', None),
    (b"id:a", None),
    (b"", None),
    (b"\xff", None),
]


@pytest.mark.parametrize(("payload", "expected"), IDS, ids=lambda value: repr(value)[:30])
def test_id_is_read_from_the_payload(payload: bytes, expected: str | None) -> None:
    assert fields_and_ids([payload], "id", {}) == ([fields_of(payload)], [expected])


@given(st.lists(st.sampled_from(IDS)))
def test_ids_are_read_from_many_payloads(cases: list[tuple[bytes, str | None]]) -> None:
    payloads = [payload for payload, _ in cases]
    fields, ids = fields_and_ids(payloads, "id", {})
    assert list(fields) == list(map(fields_of, payloads))
    assert ids == [expected for _, expected in cases]


@pytest.mark.parametrize("kind", [StockClient, BulkClient])
def test_user_property_takes_precedence(kind: type[StockClient]) -> None:
    def packet(packet_id: int, *user: tuple[str, str]) -> bytes:
        properties = Properties(PacketTypes.PUBLISH)
        if user:
            properties.UserProperty = list(user)
        packed = bytes(properties.pack())
        return publish_packet(mid=packet_id, payload=b'{"id":"json"}', properties=packed)

    client = kind(Settings(message_id_key="id"))
    stream = [packet(1), packet(2, ("a", "b"), ("id", "first"), ("id", "second")), packet(3)]
    client._sock = FakeSocket([b"".join(stream)])  # type: ignore[assignment]
    while client._sock is not None and client.message_count < len(stream):
        client.read()
    assert client.take_messages().ids == ["json", "first", "json"]
    assert client.take_messages().ids == []
    client._sock = FakeSocket([packet(4)])  # type: ignore[assignment]
    client.read()
    assert client.take_messages().ids == ["json"], "the user property is not used for later reads"
