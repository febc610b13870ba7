"""The output of ``iot-collector top``, and its escaping of text from devices."""

import base64
import io
import json
import re
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from iot_collector.explorer.flat_list import FlatList, pattern
from iot_collector.settings import Settings, valid_filter
from iot_collector.top import _Keys, default_url, valid_url
from iot_collector.top_picture import Layout, draw
from iot_collector.top_stream import Feed, Picture, Row
from iot_collector.top_text import age_text, cut_middle, rate_text, value_text
from paho.mqtt.client import topic_matches_sub
from rich.cells import cell_len
from rich.console import Console, Group

from testing.postgres import Database

HEALTH: dict[str, Any] = {
    "status": "ok",
    "problems": [],
    "warnings": [],
    "broker": {
        "address": "127.0.0.1:1883",
        "connected": True,
        "topics": ["iot/data", "plant/#"],
        "client_id": "collector-0",
        "error": None,
    },
    "database": {"connected": True, "error": None},
    "oldest_unacked_seconds": 0.0,
    "accounting": {
        "received": 1300,
        "inserted": 1234,
        "duplicates": 0,
        "dead_letters": 0,
        "in_flight": 0,
    },
    "version": "1.2.3",
}

HOSTILE = [
    "[red]markup[/red][/]",
    ":smile:",
    "\x1b]0;title\x07\x1b[31mred\x1b[2J",
    "\u009b31m",
    "\u202eright-to-left\u2066",
    "\u200e\u200f\u061c",
    "line\nbreak\r\ttab\b\x7f",
    "\ud800",
    "温" * 300,
    "e\u0301\u0301",
    "/" * 300,
    "",
]


def picture(*rows: Row, **changes: Any) -> Picture:
    return Picture(
        HEALTH | changes, [0, 3.0, 2.5, 0, 0.004], 0.0, list(rows), 60, len(rows), complete=True
    )


def row(topic: str, messages: int = 1, age: float = 5.5, value: str = "23") -> Row:
    return Row(topic, messages, time.time() - age, value)


def lines(shown: Picture, **layout: Any) -> list[str]:
    return [line.plain for line in draw(shown, Layout(**{"filter": "#", "sort": "rate", **layout}))]


def topics(shown: Picture, sort: str) -> list[str]:
    """The topic column of a picture, with indentation."""
    found = lines(shown, sort=sort)
    head = next(i for i, line in enumerate(found) if "TOPIC" in line)
    start, end = found[head].index("TOPIC"), found[head].index("  LAST VALUE")
    return [line[start:end].rstrip() for line in found[head + 1 :]]


@given(
    st.lists(st.text() | st.sampled_from(HOSTILE), min_size=1, max_size=5),
    st.sampled_from(["rate", "topic", "age"]),
    st.none() | st.integers(20, 130),
    st.integers(1, 40),
)
def test_lines_are_printable_and_fit_the_width(
    texts: list[str], sort: str, width: int | None, height: int
) -> None:
    fault = texts[0]
    shown = picture(*(row(f"{i}/{text}", value=text) for i, text in enumerate(texts)))
    broker = HEALTH["broker"] | {"client_id": fault}
    shown = Picture(
        HEALTH | {"broker": broker, "problems": texts, "status": "failing"},
        rows=shown.rows,
        window=60,
        unread=fault,
    )
    found = lines(shown, sort=sort, width=width, height=height if width else None)
    for line in found:
        assert line.isprintable(), line
        line.encode()
        assert width is None or cell_len(line) <= width
    assert any("TOPIC" in line for line in found)


def test_markup_and_emoji_names_are_shown_as_text() -> None:
    shown = picture(*(row(f"{i}/{text}", value=text) for i, text in enumerate(HOSTILE)))
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, color_system="standard", width=150)
    console.print(Group(*draw(shown, Layout("#", "rate", 150, 40))))
    text = output.getvalue()
    assert text.count("[red]markup[/red][/]") == 2
    assert text.count(":smile:") == 2
    # Apart from colours and attributes such as bold, everything is printable.
    rest = re.sub(r"\x1b\[[0-9;]*m|\n", "", text)
    assert rest.isprintable()
    assert "⟨001B⟩]0;title⟨0007⟩" in rest
    assert "⟨202E⟩right-to-left⟨2066⟩" in rest


def test_topics_are_sorted_by_rate_age_and_name() -> None:
    shown = picture(
        row("b/x/2", 5, age=100),
        row("b/x/1", 7, age=50),
        row("a", 0, age=3000),
        row("b/y", 5, age=10),
        row("lonely/deep/topic", 1, age=20),
        row("b", 1, age=30),
        row("c/d/e", 2),
        row("c/d/f", 2, age=6),
    )
    assert topics(shown, "rate") == [
        *("b/x/1", "b/y", "b/x/2", "c/d/e", "c/d/f", "lonely/deep/topic", "b", "a"),
    ]
    assert topics(shown, "age") == [
        *("c/d/e", "c/d/f", "b/y", "lonely/deep/topic", "b", "b/x/1", "b/x/2", "a"),
    ]
    # The same tree as on the live page: levels with only one child share a line.
    assert topics(shown, "topic") == [
        *("a", "b", "  x/", "    1", "    2", "  y", "c/d/", "  e", "  f", "lonely/deep/topic"),
    ]


def test_deep_tree_is_drawn() -> None:
    """Topics differ in up to 2 000 levels, which is more than Python's recursion limit."""
    shown = picture(*(row("a/" * depth + "b") for depth in range(0, 2000, 10)))
    assert len(topics(shown, "topic")) >= 200


def test_row_shows_count_rate_and_age() -> None:
    shown = picture(row("plant/1", 180, 65, "temperature 23"), row("old", 0, 7200))
    assert lines(shown)[-3:] == [
        "LAST 60 s  RATE    AGE  TOPIC    LAST VALUE",
        "      180   3/s  1 min  plant/1  temperature 23",
        "        0   0/s    2 h  old      23",
    ]


def test_table_fits_the_terminal() -> None:
    shown = picture(*(row(f"plant/hall-{i}/line-3/temperature") for i in range(100)))
    for width in (50, 80, 120):
        found = lines(shown, width=width, height=24)
        assert len(found) == 23  # one line is for the keys
        rows = [line for line in found if line.endswith("23")]
        assert len(rows) >= 12
        assert all(re.search(r"plant/\S+/temperature ", line) for line in rows)
        assert width == 50 or len(set(rows)) == len(rows)
    assert "LAST 60 s" not in "".join(lines(shown, width=50))


def test_head_describes_the_state() -> None:
    assert lines(picture(row("a")))[:4] == [
        "Every message is being stored",
        "This collector (collector-0, version 1.2.3): broker 127.0.0.1:1883 connected, "
        "database connected",
        "Stored 2.5/s, received 3/s, delay 4 ms; 0 in flight; 1,234 stored of 1,300 received",
        "1 topic of all collectors, by rate",
    ]
    counts = HEALTH["accounting"] | {"in_flight": 60, "duplicates": 2, "dead_letters": 4}
    failing = {
        "status": "failing",
        "problems": ["database: it is down"],
        "database": {"connected": False, "error": "it is down"},
        "accounting": counts,
        "oldest_unacked_seconds": 12.3,
    }
    found = lines(picture(row("a"), **failing), filter="plant/#")
    assert found[:2] == ["The database cannot be reached: messages wait", "database: it is down"]
    assert found[3].endswith(
        "60 in flight, the oldest for 12.3 s; 1,234 stored of 1,300 received, 2 sent again, "
        "4 dead letters"
    )
    assert found[4] == "1 topic of all collectors matching plant/#, by rate"
    away = {"status": "failing", "broker": HEALTH["broker"] | {"connected": False}}
    assert lines(picture(**away))[0] == "The broker cannot be reached"
    assert "Measuring the rates" in lines(Picture(HEALTH))[2]


def test_empty_list_is_explained() -> None:
    assert "No topic matches" in lines(picture(), filter="plant/#")[-1]
    assert lines(picture())[-1].endswith("collector subscribes to iot/data, plant/#")
    assert lines(Picture(HEALTH))[-1] == "Reading the topics …"
    assert lines(Picture(HEALTH, unread="it is down"))[-1] == "The topics cannot be read"
    assert lines(Picture(lost="no collector answers"))[0] == "no collector answers"


@pytest.mark.parametrize(
    ("fields", "payload", "text"),
    [
        ({"temperature": 23}, b"", "23"),
        (
            {"a": {"b": [1, True, None]}, "s": "on"},
            b"",
            "a.b[0] 1  a.b[1] true  a.b[2] null  s on",
        ),
        ({"x": 1.23456789}, b"", "1.23457"),
        (None, b"", "(empty)"),
        (None, b"two\n words", "two words"),
        (None, b"\x00\x01", "00 01"),
        (None, b"\xff", "ff"),
        (None, "ab€".encode()[:-1], "61 62 e2 82"),
    ],
)
def test_value_is_shown_as_text(fields: Any, payload: bytes, text: str) -> None:
    assert value_text(fields, base64.b64encode(payload).decode(), len(payload)) == text


def test_long_value_is_truncated() -> None:
    assert value_text(None, base64.b64encode("ab€".encode()[:-1]).decode(), 9) == "ab…"
    deep: Any = 1
    for _ in range(500):
        deep = [deep]
    assert value_text(deep, "", 1000) == "…"


def test_number_with_too_many_digits_is_shown_as_inf() -> None:
    event = (
        b'event: flat\ndata: {"complete":true,"list":{"window":60,"matching":1,"rows":[%b]}}\n\n'
    )
    message = b'["a",1,1.5,{"n":%b},"",9]' % (b"1" * 5000)
    answer: Any = io.BytesIO(event % message)
    [shown] = Feed("http://127.0.0.1:1")._read(answer)
    assert shown.rows == [Row("a", 1, 1.5, "inf")]


def test_rates_and_ages_have_units() -> None:
    rates = {0: "0/s", 1 / 60: "1/min", 0.5: "0.5/s", 99.7: "100/s", 12_345.6: "12,346/s"}
    assert {rate: rate_text(rate) for rate in rates} == rates
    ages = {-3: "now", 0.9: "now", 59: "59 s", 61: "1 min", 90_000: "25 h", 200_000: "2 d"}
    assert {age: age_text(age) for age in ages} == ages


@given(st.text(max_size=60), st.integers(5, 40))
def test_cut_middle_keeps_both_ends(text: str, width: int) -> None:
    found = cut_middle(text, width)
    assert cell_len(found) <= width
    if "…" not in text:
        assert ("…" in found) == (cell_len(cut_middle(text, 1000)) > width)


LEVELS = st.sampled_from(["", "a", "b", "$SYS", "a b", ".*", "(", "\\", "€", "a\nb", "%s"])
TOPICS = st.lists(LEVELS, min_size=1, max_size=4).map("/".join)
FILTERS = st.lists(LEVELS | st.just("+"), min_size=1, max_size=4).flatmap(
    lambda levels: st.sampled_from(["/".join(levels), "/".join([*levels, "#"]), "#"])
)


@given(FILTERS, TOPICS)
@example("#", "$SYS/a")
@example("+/a", "$SYS/a")
@example("a/#", "a")
def test_filters_match_as_in_mqtt(topic_filter: str, topic: str) -> None:
    expected = topic_matches_sub(topic_filter, topic)
    assert bool(re.fullmatch(pattern(topic_filter), topic, re.DOTALL)) == expected


def test_filters_match_equally_in_postgresql(empty_database: Database) -> None:
    filters = ["#", "+", "+/+", "a/#", "a/+", "a b/#", ".*/(", "$SYS/#", "€/\\/%s", "+/a\nb", "/#"]
    names = ["a", "a/b", "a/b/c", "ab", "a b/c", ".*/(", "$SYS/x", "€/\\/%s", "a/a\nb", "", "/"]
    pairs = [[pattern(valid_filter(f)), name] for f in filters for name in names]
    [(found,)] = empty_database.query(
        "SELECT json_agg((p->>1) ~ (p->>0) ORDER BY i)"
        " FROM json_array_elements(%s::json) WITH ORDINALITY AS all_pairs(p, i)",
        json.dumps(pairs),
    )
    assert found == [topic_matches_sub(f, name) for f in filters for name in names]
    assert pattern("$share/group/a/+") == pattern("a/+")


def test_limits_of_a_list_are_checked() -> None:
    for wrong in ({"limit": 201}, {"limit": 0}, {"filter": "a/#/b"}, {"filter": "a" * 1001}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FlatList.model_validate({"filter": "#", "sort": "rate", "limit": 200} | wrong)


def test_default_url_and_valid_urls() -> None:
    for host, url in {
        "127.0.0.1": "http://127.0.0.1:3100",
        "0.0.0.0": "http://127.0.0.1:3100",
        "::": "http://[::1]:3100",
        "iot.example": "http://iot.example:3100",
    }.items():
        assert default_url(Settings(http_host=host, http_port=3100)) == url
    assert valid_url("https://iot.example/iot/") == "https://iot.example/iot"
    for wrong in (
        "",
        "127.0.0.1:3000",
        "ftp://x",
        "http://",
        "http://x:y",
        "http://u:p@x",
        "http://x\x1b",
    ):
        with pytest.raises(ValueError, match=r"."):
            valid_url(wrong)


class Followed(Feed):
    """Records the requested lists, and makes no requests."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:1")
        self.asked: list[tuple[str, str]] = []

    def follow(self, flat: dict[str, Any], pictures: object = None) -> None:
        self.asked.append((flat["filter"], flat["sort"]))


def test_keys_change_sort_and_filter() -> None:
    feed, layout = Followed(), Layout("#", "rate")
    keys = _Keys(feed, layout)
    for typed in (
        "t",
        "t",
        "a",
        "\x1b[A",
        "/",
        "plant/",
        "q\x7f+",
        "\r",
        "/",
        "x\x1b",
        "\x1b",
        "r",
    ):
        keys.press(typed)
    assert feed.asked == [("#", "topic"), ("#", "age"), ("plant/+", "age"), ("plant/+", "rate")]
    keys.press("/a/#/b\n")
    assert "is not a topic filter" in keys.line(80).plain
    keys.press("/")
    keys.press("温" * 100)
    assert cell_len(keys.line(50).plain) <= 50
    assert not keys.quit
    keys.press("\n")
    keys.press("q")
    assert keys.quit
