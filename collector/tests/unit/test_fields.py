"""The fields of payloads: the examples of docs/payloads.md, and random payloads."""

import json
import math
import string
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from iot_collector.fields import fields_of, fields_of_all

# None: JSON, which is stored unchanged.
WITH_FIELDS = [
    (b"temperature:23", {"temperature": 23}),
    (b"temperature:-23.50", {"temperature": -23.5}),
    (b"temperature:1e3", {"temperature": 1000.0}),
    (b"temperature: 23 ", {"temperature": 23}),
    (b"  temperature : 23\r\n", {"temperature": 23}),
    (b"state:on", {"state": "on"}),
    (b"state:23 C", {"state": "23 C"}),
    (b"room.1-a b:x", {"room.1-a b": "x"}),
    (b"url:http://x:80/", {"url": "http://x:80/"}),
    (b'say:"hi\\', {"say": '"hi\\'}),
    ("ort:Köln".encode(), {"ort": "Köln"}),
    (b"lines:a\nb", {"lines": "a\nb"}),
    (b'gps: {"lat":1.50,"sat":[1,2]}', {"gps": {"lat": 1.5, "sat": [1, 2]}}),
    (b"values:[1,2.5]", {"values": [1, 2.5]}),
    (b"list:[1,2", {"list": "[1,2"}),
    # These look like numbers, but are not valid in JSON. They stay text.
    (b"temperature:+5", {"temperature": "+5"}),
    (b"temperature:05", {"temperature": "05"}),
    (b"temperature:.5", {"temperature": ".5"}),
    (b"temperature:5.", {"temperature": "5."}),
    (b"temperature:0x10", {"temperature": "0x10"}),
    (b"temperature:1_000", {"temperature": "1_000"}),
    (b"temperature:NaN", {"temperature": "NaN"}),
    (b"temperature:Infinity", {"temperature": "Infinity"}),
    (b"temperature:-Infinity", {"temperature": "-Infinity"}),
    (b"temperature:1e400", {"temperature": "1e400"}),
    (b"true:true", {"true": "true"}),
    # A single value.
    (b"on", "on"),
    (b" on\r\n", "on"),
    (b"hello", "hello"),
    ("23 °C".encode(), "23 °C"),
    (b"NaN", "NaN"),
    (b"1e400", "1e400"),
    (b"007", "007"),
    (b"12:30:05", "12:30:05"),
    (b"1st:5", "1st:5"),
    (b"a/b:5", "a/b:5"),
    (b"23.5,40,1012", "23.5,40,1012"),
    (b"a" * 129 + b":5", "a" * 129 + ":5"),
    (b"x" * 255, "x" * 255),
    (b"23.50", None),
    (b" -1e3\n", None),
    (b"true", None),
    (b'"text"', None),
    # Documents.
    (b'{"temperature":23,"ok":true,"no":null,"s":"x"}', None),
    (b"{}", None),
    (b"[]", None),
    (b'{ "a" : 1 }\n', None),
    (b'{"a":"{[}"}', None),
    (b'{"a":1,"a":2}', None),
    (b'{"a":{"b":1},"a":2}', None),
    ('{"ä":"€"}'.encode(), None),
    (b'{"n":123456789012345678901234567890}', None),
    (b'{"n":0.1234567890123456789012345678901234567890}', None),
    (b'{"a":{"b":[1,{"c":null}]}}', None),
    (b"[1,2]", None),
    (b'{"a":' * 500 + b"1" + b"}" * 500, None),
]

WITHOUT_FIELDS = [
    b"",
    b" ",
    b"null",
    b"temperature:",
    b"temperature: ",
    b":5",
    b" : ",
    b"x" * 256,
    b"two\nlines",
    b"tab\tbed",
    b"temperature:2\x003",
    b"temp\x00erature:23",
    b"temperature:\xff\xfe",
    b"temp\xe9rature:23",
    b"\xef\xbb\xbftemperature:23",
    b"\x00",
    b"\xff\xfe\x00",
    b'{"a":',
    b'{"a":NaN}',
    b'{"a":Infinity}',
    b'{"a":1e400}',
    b'{"a":01}',
    b'{"a":1}x',
    b'{"a":1}{"a":2}',
    b"{'a':1}",
    b"[1,2",
    b"[NaN]",
    b'"text',
    b'{"a":"\\u0000"}',
    b'{"a\\u0000":1}',
    b'{"a":{"b":["\\u0000"]}}',
    b'a:["\\u0000"]',
    b'"\\u0000"',
    b'{"a":"\x00"}',
    b'{"a":"\xff"}',
    b'{"a":"\\ud800"}',
    b'{"a":"\\udc00\\ud800"}',
    b'{"a":' * 100_000,
    b"[" * 100_000,
    b'{"a":' + b"[" * 5_000 + b"]" * 5_000 + b"}",
]


@pytest.mark.parametrize(("payload", "expected"), WITH_FIELDS, ids=repr)
def test_fields_of_payloads(payload: bytes, expected: dict[str, object] | None) -> None:
    found = fields_of(payload)
    assert found is not None
    if expected is None:
        assert found == payload, "JSON is unchanged, with every digit"
    else:
        assert json.loads(found) == expected


@pytest.mark.parametrize("payload", WITHOUT_FIELDS, ids=lambda payload: repr(payload[:24]))
def test_payloads_that_have_no_fields(payload: bytes) -> None:
    assert fields_of(payload) is None


def test_large_payloads_have_fields() -> None:
    """128 KiB is the largest payload of AWS IoT Core."""
    text = b"x" * (128 << 10)
    assert json.loads(fields_of(b"a:" + text) or b"") == {"a": text.decode()}
    document = json.dumps({f"key{i}": i for i in range(10_000)}).encode()
    assert fields_of(document) == document
    digits = b"9" * (128 << 10)
    assert fields_of(b"a:" + digits) is not None


@pytest.mark.parametrize(
    "payload",
    [
        b"a:x" + b" " * (128 << 10) + b"x",
        b"a" + b" " * (128 << 10),
        b" " * (128 << 10) + b"!",
        b"a:" + b" x" * (64 << 10),
        b"a" + b" " * 100 + b":" + b"\n" * (128 << 10),
        b"a:" + b"1" * (128 << 10) + b"x",
    ],
    ids=["gap in value", "gap in name", "gap before", "many gaps", "no value", "digits"],
)
@pytest.mark.timeout(10)  # quadratic time would take a minute
def test_parsing_takes_linear_time(payload: bytes) -> None:
    """Otherwise one message could delay other messages and the keepalive."""
    fields_of(payload)


# Bytes with characters of the formats, which plain random bytes rarely contain.
_pieces = st.one_of(
    st.binary(max_size=4),
    st.text(max_size=4).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from([bytes([c]) for c in b'{}[]:,"\\ \n-+.eE019untrfls']),
    st.sampled_from([b"\\u0000", b"\\ud800", b'"a"', b"null", b"true", b"1e999", b'"a":', b"a:"]),
)
payloads = st.one_of(
    st.binary(max_size=64),
    st.lists(_pieces, max_size=12).map(b"".join),
    st.lists(_pieces, max_size=8).map(lambda parts: b'{"a":' + b"".join(parts) + b"}"),
    st.lists(_pieces, max_size=8).map(lambda parts: b"a:" + b"".join(parts)),
)


def _no_constant(name: str) -> object:
    raise AssertionError(f"{name} is not JSON")


@given(payloads)
def test_any_payload_gives_valid_jsonb_or_none(payload: bytes) -> None:
    found = fields_of(payload)
    if found is None:
        return
    document = json.loads(found.decode(), parse_constant=_no_constant)
    assert document is not None
    for value in _values(document):
        assert not (isinstance(value, float) and math.isinf(value))
        assert not isinstance(value, str) or "\0" not in value


def _values(document: object) -> Iterator[object]:
    """Yield all keys and values at any depth."""
    if isinstance(document, dict):
        yield from document
        document = list(document.values())
    if isinstance(document, list):
        for value in document:
            yield from _values(value)
    else:
        yield document


_names = st.text(string.ascii_letters + "_", min_size=1, max_size=128)
_numbers = st.one_of(
    st.integers(), st.floats(allow_nan=False, allow_infinity=False).map(lambda x: x or 0.0)
)


@given(_names, _numbers)
def test_any_number_is_preserved(name: str, number: float) -> None:
    assert json.loads(fields_of(f"{name}:{number!r}".encode()) or b"") == {name: number}


_texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


_documents = st.recursive(
    st.one_of(_numbers, _texts, st.booleans(), st.none()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_texts, inner, max_size=4),
)


@given(st.dictionaries(_texts, _documents) | st.lists(_documents))
def test_any_document_is_preserved(document: object) -> None:
    payload = json.dumps(document, ensure_ascii=False).encode()
    # The test for \u0000 looks at the bytes, so it also refuses an escaped backslash before u0000.
    expected = None if b"\\u0000" in payload else payload
    assert fields_of(payload) == expected


@given(st.lists(payloads | st.sampled_from([payload for payload, _ in WITH_FIELDS]), max_size=5))
@example([b"null"])
@example([b'{"a":1}', b"null"])
@example([b'{"a":1},{"b":2', b'"c":3}'])
@example([b'{"a":"\\u0000"}', b"5"])
@example([b'{"a":"\\u00', b'00"}'])
def test_fields_of_all_equals_fields_of_each(many: list[bytes]) -> None:
    assert list(fields_of_all(many)) == [fields_of(payload) for payload in many]
