"""CBOR and MessagePack become JSON; malformed payloads have no fields."""

import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import cbor2
import msgpack
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from iot_collector import binary_payloads
from iot_collector.binary_payloads import (
    BinaryTopics,
    PrefixDecoders,
    cbor,
    decoder_of,
    fields_of_binary,
    message_pack,
    senml_cbor,
)
from iot_collector.client import BulkClient, StockClient
from iot_collector.copy_format import RowPrefixes, decode_tuple, tuple_start
from iot_collector.message_ids import fields_and_ids
from iot_collector.settings import Settings
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from test_client import FakeSocket, publish_packet

_UUID = UUID(int=1)
_NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
NOT_IN_JSON = [
    ({1: "a", -2: [True, None]}, {"1": "a", "-2": [True, None]}),
    ([float("nan"), float("inf")], [None, None]),
    (b"\xff\xfe\xfd", "__79"),
    (_NOON, "2026-11-24T12:00:00+00:00"),
    (Decimal("21.57"), 21.57),
    (_UUID, str(_UUID)),
    (cbor2.CBORTag(4711, {"t": 1}), {"t": 1}),
    ([cbor2.undefined, cbor2.CBORSimpleValue(99)], [None, None]),
    (2**63, 2**63),
]


@pytest.mark.parametrize(("value", "expected"), NOT_IN_JSON, ids=repr)
def test_cbor_types_without_json_equivalent(value: object, expected: object) -> None:
    found = fields_of_binary(cbor2.dumps(value), cbor)
    assert found is not None
    assert json.loads(found) == expected


def test_tag_of_self_described_cbor_is_ignored() -> None:
    assert (
        fields_of_binary(b"\xd9\xd9\xf7" + cbor2.dumps({"t": {"u": 1}}), cbor) == b'{"t":{"u":1}}'
    )


def test_messagepack_becomes_json() -> None:
    document = {
        "t": 1.5,
        7: [b"\x01", msgpack.ExtType(9, b"\x02"), msgpack.Timestamp(0, 500000000)],
    }
    found = fields_of_binary(msgpack.packb(document), message_pack)
    assert json.loads(found or b"") == {
        "t": 1.5,
        "7": ["AQ", "Ag", "1970-01-01T00:00:00.500000+00:00"],
    }


# CBOR in hexadecimal that is refused quickly and without much memory.
HOSTILE = [
    "",
    "ff",
    "f6",  # null
    "0102",  # two items
    "a1",  # ends too early
    "7b7fffffffffffffff",
    "5b7fffffffffffffff00",
    "9b7fffffffffffffff00",
    "bb7fffffffffffffff0000",
    "9f" * 100_000,
    "81" * 100_000 + "00",
    "d90100" * 100_000 + "00",
    "a1" + "a10000" + "00",  # a map as a key
    "6100",  # U+0000
    "61ff",  # not UTF-8
    "c4821b7fffffffffffffff01",  # 1e9223372036854775807
    "c5821b7fffffffffffffff01",  # 2**9223372036854775807
    "d81e820100",  # 1/0
    "c2590400" + "ff" * 1024,  # an integer of 2467 digits
    "c1fb7fefffffffffffff",  # a time of 1e308 seconds
    "c06130",  # not a valid time
    "d8236228" + "28",  # a regular expression
    "d81c80",  # shared references
    "d81c81d81d00",  # a list that contains itself
    "d90100826161d81900",  # references to strings
    "9a00040001" + "00" * (256 * 1024 + 1),  # more than 256 KiB
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:24])
@pytest.mark.timeout(10)
def test_hostile_cbor_has_no_fields(text: str) -> None:
    assert fields_of_binary(bytes.fromhex(text), cbor) is None
    assert fields_of_binary(bytes.fromhex(text), senml_cbor) is None


@pytest.mark.parametrize(
    "text",
    [
        *("", "c0", "c1", "0102", "81", "ddffffffff", "dfffffffff", "c6ffffffff00", "a1ff", "a100"),
        *("818000", "81810000", "91" * 100_000, "d6ff" + "00" * 3, "c70cff" + "ff" * 12),
    ],
    ids=lambda text: text[:24],
)
@pytest.mark.timeout(10)
def test_hostile_messagepack_has_no_fields(text: str) -> None:
    assert fields_of_binary(bytes.fromhex(text), message_pack) is None


_documents = st.recursive(
    st.one_of(
        st.integers(-(2**63), 2**64 - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
        st.booleans(),
    ),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("ab\\u0"), inner, max_size=4)
    ),
)


@given(_documents)
def test_any_document_is_preserved(document: object) -> None:
    for data, decoder in ((cbor2.dumps(document), cbor), (msgpack.packb(document), message_pack)):
        found = fields_of_binary(data, decoder)
        assert (found is None and "u0000" in json.dumps(document)) or json.loads(
            found or b""
        ) == document


@given(st.binary(max_size=64), st.sampled_from([cbor, senml_cbor, message_pack]))
def test_any_payload_gives_json_or_none(payload: bytes, decoder: Any) -> None:
    found = fields_of_binary(payload, decoder)
    assert found is None or json.loads(found) is not Ellipsis


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        ("application/cbor", cbor),
        ("Application/CBOR; charset=x", cbor),
        ("application/cloudevents+cbor", cbor),
        ("application/senml+cbor", senml_cbor),
        ("application/msgpack", message_pack),
        ("application/x-msgpack", message_pack),
        ("application/vnd.msgpack", message_pack),
        ("application/json", None),
        ("cbor", None),
        ("", None),
    ],
)
def test_content_type_selects_the_decoder(content_type: str, expected: object) -> None:
    assert decoder_of(content_type) is expected


def test_topic_selects_the_decoder() -> None:
    topics = BinaryTopics(Settings(cbor_topics=["$share/g/a/+"], messagepack_topics=["a/#"]))
    assert topics.decoder_of(b"a/b") is cbor
    assert topics.decoder_of(b"a/b/c") is message_pack
    assert topics.decoder_of(b"b") is None
    assert not BinaryTopics(Settings())


@pytest.mark.parametrize("kind", [StockClient, BulkClient])
def test_content_type_applies_to_its_message_only(kind: type[StockClient]) -> None:
    """Not to other messages of the same read, and not to the next read."""

    def fields_of_next(*content_types: str | None) -> list[bytes | None]:
        packets = []
        for mid, content_type in enumerate(content_types, 1):
            properties = Properties(PacketTypes.PUBLISH)
            if content_type:
                properties.ContentType = content_type
            packed = bytes(properties.pack())
            packets.append(publish_packet(mid=mid, payload=b"\x61\x62", properties=packed))
        client._sock = FakeSocket([b"".join(packets)])  # type: ignore[assignment]
        while client._sock is not None and client.message_count < len(packets):
            client.read()
        rows = client.take_messages().rows
        return [decode_tuple(tuple_start(0) + row).fields for row in rows]

    client = kind(Settings(messagepack_topics=["iot/#"]))
    assert fields_of_next("application/cbor", "text/plain") == [b'"b"', None]
    assert fields_of_next(None, "application/cbor") == [None, b'"b"']
    client = kind(Settings())
    assert fields_of_next("application/cbor", None) == [b'"b"', b'"ab"']
    assert fields_of_next(None) == [b'"ab"']


def test_cache_of_decoders_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary_payloads, "_MAX_PREFIXES", 2)
    prefixes = RowPrefixes(0x32)
    decoders = PrefixDecoders(BinaryTopics(Settings(cbor_topics=["a/+"])))
    assert decoders[prefixes[b"a/" + b"x" * 600]] is cbor
    assert len(decoders) == 0
    for topic, expected in [(b"a/1", cbor), (b"b", None), (b"a/2", cbor), (b"b", None)]:
        assert decoders[prefixes[topic]] is expected
        assert len(decoders) <= 2


@pytest.mark.parametrize("key", [None, "id"])
def test_binary_and_json_payloads_can_be_mixed(key: str | None) -> None:
    documents = [{"id": "0"}, {"id": "1"}, {"id": "2"}, {"id": "3"}]
    encode = [orjson.dumps, cbor2.dumps, orjson.dumps, msgpack.packb]
    payloads = [e(d) for e, d in zip(encode, documents, strict=True)]
    fields, ids = fields_and_ids(payloads, key, {3: message_pack, 1: cbor})
    assert [json.loads(f or b"") for f in fields] == documents
    assert ids == (key and ["0", "1", "2", "3"])
