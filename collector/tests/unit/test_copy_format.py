"""The binary COPY format: encoding and decoding, and the rows that PostgreSQL stores."""

import io
import json
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import NamedTuple

import orjson
import psycopg2.extensions
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from iot_collector import copy_format
from iot_collector.fields import fields_of, fields_of_all

from testing.postgres import Postgres

_text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Case(NamedTuple):
    """A message before it is encoded."""

    microseconds: int
    qos: int
    retained: bool
    topic: str
    payload: bytes
    properties: bytes | None


def encode(cases: list[Case]) -> list[bytes]:
    prefixes = []
    for case in cases:
        prefix = copy_format.RowPrefixes(0x30 | case.qos << 1 | case.retained)[case.topic.encode()]
        if case.properties is not None:
            prefix = copy_format.with_properties(prefix, case.properties)
        prefixes.append(prefix)
    payloads = [case.payload for case in cases]
    made = copy_format.encode_rows(prefixes, payloads, fields_of_all(payloads))
    return [
        copy_format.tuple_start(case.microseconds / 1_000_000) + row
        for case, row in zip(cases, made, strict=True)
    ]


def _json(user: list[tuple[str, str]], content_type: str | None) -> bytes | None:
    other: dict[str, object] = {} if content_type is None else {"ContentType": content_type}
    return copy_format.properties_json(user, other)


_documents = st.recursive(
    st.one_of(_text, st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans())
    | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_text, inner, max_size=4),
)

cases = st.builds(
    Case,
    # Within the partitions that the fixture creates.
    st.integers(1_760_000_000_000_000, 1_799_999_999_999_999),
    st.integers(0, 2),
    st.booleans(),
    _text.filter(bool),
    st.one_of(
        st.binary(max_size=60),
        st.floats(width=32).map(lambda x: f"temperature:{x}".encode()),
        st.from_regex(rb"a:-?[0-9]{1,30}(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,3})?", fullmatch=True),
        st.tuples(_text, _text).map(lambda pair: f"{pair[0]}:{pair[1]}".encode()),
        st.dictionaries(_text, _text | st.integers(-(2**63), 2**63) | st.booleans()).map(
            lambda document: orjson.dumps(document, option=orjson.OPT_NON_STR_KEYS)
        ),
        _documents.map(lambda document: json.dumps(document).encode()),
    ),
    st.builds(_json, st.lists(st.tuples(_text, _text), max_size=3), st.none() | _text),
)


@given(st.lists(cases, max_size=5))
def test_encoded_rows_decode_to_the_same_message(messages: list[Case]) -> None:
    for case, row in zip(messages, encode(messages), strict=True):
        message = copy_format.decode_tuple(row)
        assert round(message.timestamp * 1_000_000) == case.microseconds
        assert message[1:] == (
            case.qos,
            case.retained,
            case.topic.encode(),
            case.properties,
            fields_of(case.payload),
            case.payload,
        )
        bare = copy_format.without_fields(row)
        assert copy_format.decode_tuple(bare) == message._replace(fields=None)
        assert copy_format.without_fields(bare) is bare


@pytest.mark.parametrize("topic", [b"", b"a\0b", b"\xff", b"\xed\xa0\x80"])
def test_invalid_topics_are_refused(topic: bytes) -> None:
    prefixes = copy_format.RowPrefixes(0x30)
    for _ in range(2):  # twice, because an invalid topic must not be cached
        with pytest.raises(ValueError, match=r"NUL|utf-8"):
            prefixes[topic]


def test_cache_of_topics_is_limited() -> None:
    """A topic that was evicted gets the same prefix again."""
    prefixes = copy_format.RowPrefixes(0x32)
    first = prefixes[b"t/0"]
    assert all(prefixes[b"t/%d" % i] for i in range(25_000))
    assert len(prefixes) <= 10_000
    assert prefixes[b"t/0"] == first


def test_user_properties_are_grouped_by_name() -> None:
    assert copy_format.properties_json([], {}) is None
    assert copy_format.properties_json(
        [("a", "1"), ("b", "2"), ("a", "3")], {"ContentType": "x"}
    ) == (b'{"ContentType":"x","user":{"a":["1","3"],"b":["2"]}}')
    assert copy_format.properties_json([("a", "\0")], {}) is None, "jsonb cannot hold U+0000"


@pytest.fixture(scope="module")
def cursor(postgres: Postgres) -> Iterator[psycopg2.extensions.cursor]:
    database = postgres.database(template="migrated")
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT ensure_partitions('2025-10-01', 20)")
        yield cursor


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=st.lists(cases, min_size=1, max_size=20))
def test_postgresql_stores_the_encoded_message(
    messages: list[Case], cursor: psycopg2.extensions.cursor
) -> None:
    data = b"".join(encode(messages))
    cursor.execute("DELETE FROM messages")
    cursor.copy_expert(
        f"COPY messages ({copy_format.COLUMNS}) FROM STDIN BINARY",
        io.BytesIO(copy_format.HEADER + data + copy_format.TRAILER),
    )
    cursor.execute(
        "SELECT received_at, qos, retained, topic, payload, properties, fields::text,"
        " num_nulls(fields) FROM messages ORDER BY id"
    )
    found = cursor.fetchall()
    assert len(found) == len(messages)
    for case, (received_at, qos, retained, topic, payload, properties, fields, null) in zip(
        messages, found, strict=True
    ):
        assert received_at == _EPOCH + timedelta(microseconds=case.microseconds)
        assert (qos, retained, topic) == (case.qos, case.retained, case.topic)
        assert bytes(payload) == case.payload
        assert properties == (case.properties and orjson.loads(case.properties))
        expected = fields_of(case.payload)
        assert null == (expected is None)
        if expected is not None:
            assert _exact(fields) == _exact(expected)


def _exact(text: str | bytes) -> object:
    """The document with exact numbers, and with types, because in Python 1 == True."""
    return _typed(json.loads(text, parse_float=Decimal, parse_int=Decimal))


def _typed(document: object) -> object:
    if isinstance(document, dict):
        return {name: _typed(value) for name, value in document.items()}
    if isinstance(document, list):
        return [_typed(value) for value in document]
    return type(document), document
