"""Subscriptions are replaced: who waits for whom, and which copies are dropped."""

import itertools
import time
from collections import Counter
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from iot_collector import sessions
from iot_collector.buffer import ReadBatch, SessionStart, SubscriptionsChanged
from iot_collector.copy_format import RowPrefixes, encode_rows
from iot_collector.fields import fields_of
from iot_collector.sessions import Claim, conflicts
from iot_collector.settings import Settings
from iot_collector.subscriptions import Subscriptions
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from testing.postgres import Database

PLAIN, SHARED = "iot/data", "$share/g/iot/data"
GRANTED = ReasonCode(PacketTypes.SUBACK, "Granted QoS 1")
REFUSED = ReasonCode(PacketTypes.SUBACK, "Not authorized")


def pod(ordinal: int, *filters: str, name: str = "collector", **more: Any) -> Settings:
    return Settings(
        mqtt_client_id=f"{name}-{ordinal}",
        mqtt_topics=list(filters),
        session_on_stop="ordinal",
        **more,
    )


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([PLAIN], [SHARED], True),
        ([SHARED], ["$share/h/iot/data"], True),
        ([PLAIN], [PLAIN], False),
        ([SHARED], [SHARED], False),
        (["iot/#"], [SHARED], False),
        (["a", PLAIN], ["b", SHARED], True),
        ([], [SHARED], False),
    ],
)
def test_conflicts(one: list[str], other: list[str], expected: bool) -> None:
    assert conflicts(one, other) is expected
    assert conflicts(other, one) is expected


# Who waits for whom --------------------------------------------------------------------------


class Table:
    """The table ``sessions`` of a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def claim(self, settings: Settings, *, present: bool = False, force: bool = False) -> Claim:
        with self._database.connect() as connection, connection.cursor() as cursor:
            return sessions.claim(cursor, settings, present=present, force=force)

    def save(self, client_id: str, *filters: str) -> None:
        with self._database.connect() as connection, connection.cursor() as cursor:
            sessions.save_filters(cursor, client_id, list(filters))

    def rows(self) -> dict[str, list[str]]:
        return dict(self._database.query("SELECT client_id, filters FROM sessions"))


def test_scaling_out_and_in(database: Database) -> None:
    table = Table(database)
    assert table.claim(pod(0, PLAIN)) == Claim()
    # 1 → 3: the new pods wait for pod 0, even when they ask first.
    for ordinal in (1, 2):
        assert table.claim(pod(ordinal, SHARED)) == Claim(waiting_for=["collector-0"])
    assert table.rows() == {"collector-0": [PLAIN]}, "who waits has claimed nothing"
    assert table.claim(pod(0, SHARED), present=True) == Claim(held=[PLAIN], stale=[PLAIN])
    assert table.claim(pod(1, SHARED)).waiting_for == ["collector-0"], "it has both for a moment"
    table.save("collector-0", SHARED)
    for ordinal in (1, 2):
        assert table.claim(pod(ordinal, SHARED)) == Claim()
    # Started again, each has what it had.
    assert table.claim(pod(1, SHARED), present=True) == Claim(held=[SHARED])
    # 3 → 1: pod 0 waits for the others, and keeps what it has.
    waits = Claim(held=[SHARED], waiting_for=["collector-1", "collector-2"])
    assert table.claim(pod(0, PLAIN), present=True) == waits
    table.save("collector-2")
    assert table.claim(pod(0, PLAIN), present=True).waiting_for == ["collector-1"]
    table.save("collector-1")
    assert table.claim(pod(0, PLAIN), present=True) == Claim(held=[SHARED], stale=[SHARED])
    assert table.rows() == {"collector-0": [SHARED, PLAIN]}


def test_group_is_renamed(database: Database) -> None:
    """Pods are replaced from the highest ordinal down, each when the last one is ready."""
    table, other = Table(database), "$share/h/iot/data"
    for ordinal in range(3):
        table.claim(pod(ordinal, SHARED))
    for ordinal in (2, 1):
        table.save(f"collector-{ordinal}")  # stopped
        assert table.claim(pod(ordinal, other)).waiting_for == ["collector-0"]
    assert table.claim(pod(0, other), present=True).stale == [SHARED]
    table.save("collector-0", other)
    assert table.claim(pod(1, other)) == table.claim(pod(2, other)) == Claim()


@pytest.mark.parametrize("on_stop", ["keep", "leave"])
def test_collectors_outside_a_statefulset_do_not_wait(
    on_stop: Literal["keep", "leave"], database: Database
) -> None:
    """Two collectors may have different forms on purpose; only a StatefulSet's pods agree."""
    table = Table(database)
    for client_id in ("archive-0", "collector-0", "collector", "collector-x"):
        table.save(client_id, PLAIN)
    apart = Settings(mqtt_client_id="collector-1", mqtt_topics=[SHARED], session_on_stop=on_stop)
    assert table.claim(apart) == Claim()
    assert table.claim(pod(1, SHARED, name="other")) == Claim()
    assert table.claim(pod(0, SHARED, name="collector")) == Claim()


def test_force_does_not_wait(database: Database) -> None:
    table = Table(database)
    table.save("collector-2", SHARED)
    table.save("collector-0", SHARED, "old")
    assert table.claim(pod(0, PLAIN), present=True).waiting_for == ["collector-2"]
    claim = table.claim(pod(0, PLAIN), present=True, force=True)
    assert claim == Claim(held=[SHARED, "old"], stale=[SHARED, "old"])


def test_a_lost_session_holds_nothing(database: Database) -> None:
    table = Table(database)
    table.save("collector-0", PLAIN)
    table.save("collector-1", SHARED)
    assert table.claim(pod(0, PLAIN), present=False).waiting_for == ["collector-1"]
    assert table.rows() == {"collector-1": [SHARED]}


# How it subscribes ---------------------------------------------------------------------------


class Client:
    """Stands in for the client: takes down what is asked of the broker."""

    max_qos = 2
    message_count = 0

    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, int] | list[str]]] = []

    def subscribe(self, asked: list[tuple[str, Any]]) -> tuple[int, int]:
        qos = {f: options if isinstance(options, int) else options.QoS for f, options in asked}
        self.sent.append(("subscribe", qos))
        return 0, len(self.sent)

    def unsubscribe(self, filters: list[str]) -> tuple[int, int]:
        self.sent.append(("unsubscribe", filters))
        return 0, len(self.sent)

    def news(self) -> list[tuple[str, dict[str, int] | list[str]]]:
        sent = self.sent[self._seen :]
        self._seen = len(self.sent)
        return sent

    _seen = 0


def begun(settings: Settings, *, present: bool) -> tuple[Subscriptions, Any]:
    subs, client = Subscriptions(settings), Client()
    subs.start(client, None, session_present=present)  # type: ignore[arg-type]
    assert client.sent == [], "the database is asked first"
    return subs, client


def replaced(version: Literal["5", "3.1.1"] = "5") -> tuple[Subscriptions, Any]:
    """In the middle: SUBSCRIBE is answered, UNSUBSCRIBE is not."""
    subs, client = begun(pod(0, SHARED, mqtt_version=version), present=True)
    subs.handle_claim(Claim(held=[PLAIN], stale=[PLAIN]))
    demoted = {SHARED: 1, PLAIN: 0} if version == "5" else {SHARED: 1}
    assert client.news() == [("subscribe", demoted)]
    subs.handle_suback(1, [GRANTED, GRANTED])
    assert client.news() == [("unsubscribe", [PLAIN])]
    return subs, client


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_replacement(version: Literal["5", "3.1.1"]) -> None:
    subs, client = replaced(version)
    assert subs.replacing is (version == "5"), "Mosquitto sends one copy to older clients"
    assert subs.events == []
    subs.handle_unsuback(2)
    assert [n.filters for n in subs.events if isinstance(n, SubscriptionsChanged)] == [[SHARED]]
    subs.start(client, None, session_present=True)
    assert client.news() == [("subscribe", {SHARED: 1})], "on every later connection at once"


def test_refused_replacement_keeps_the_old_subscription() -> None:
    subs, client = begun(pod(0, SHARED, "b"), present=True)
    subs.handle_claim(Claim(held=[PLAIN, "c"], stale=[PLAIN, "c"]))
    client.news()
    subs.handle_suback(1, [REFUSED, GRANTED])
    assert client.news() == [("subscribe", {PLAIN: 1}), ("unsubscribe", ["c"])]
    assert not subs.active
    subs.handle_suback(2, [GRANTED])
    subs.handle_unsuback(3)
    assert isinstance(subs.events[0], SubscriptionsChanged)
    assert subs.events[0].filters == [SHARED, "b", PLAIN], "the old one is still in the way"
    assert SHARED in subs.refused


def test_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr("time.monotonic", lambda: now)
    subs, client = begun(pod(0, PLAIN), present=True)
    waits = Claim(held=[SHARED], waiting_for=["collector-1"])
    subs.handle_claim(waits)
    assert client.news() == [("subscribe", {SHARED: 1})], "it may be lost in a restarted broker"
    subs.handle_suback(1, [GRANTED])
    assert subs.active
    forced = []
    for _ in range(70):
        now += 1
        subs.check_due()
        (event,) = subs.events
        subs.events.clear()
        assert isinstance(event, SessionStart)
        forced.append(event.force)
        subs.handle_claim(waits)
        assert subs.waiting_for == ["collector-1"]
    assert client.news() == []
    assert forced.index(True) == 60, "longer than a pod gets to end"
    subs.handle_claim(Claim(held=[SHARED], stale=[SHARED]))
    assert client.news() == [("subscribe", {PLAIN: 1, SHARED: 0})]
    assert subs.waiting_for == []


@pytest.mark.parametrize(
    ("ordinal", "present", "limit"), [(0, False, 2), (0, True, 10), (1, False, 600)]
)
def test_database_that_does_not_answer(
    ordinal: int, present: bool, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not cost messages: it is subscribed without an answer."""
    now = time.monotonic()
    monkeypatch.setattr("time.monotonic", lambda: now)
    subs, client = begun(pod(ordinal, SHARED), present=present)
    now += limit - 0.1
    subs.check_due()
    assert client.news() == []
    now += 0.2
    subs.check_due()
    assert client.news() == [("subscribe", {SHARED: 1})]
    subs.handle_claim(Claim(waiting_for=["collector-9"]))
    (event,) = subs.events
    assert isinstance(event, SessionStart)
    assert event.force, "too late to wait"
    subs.handle_claim(Claim(held=[PLAIN], stale=[PLAIN]))
    assert client.news() == [("subscribe", {SHARED: 1, PLAIN: 0})]


def test_leaving_while_it_waits() -> None:
    subs, client = begun(pod(1, SHARED), present=False)
    subs.handle_claim(Claim(waiting_for=["collector-0"]))
    subs.unsubscribe_all()
    subs.handle_claim(Claim())
    assert client.news() == [("unsubscribe", [SHARED])]
    subs.handle_unsuback(1)
    (event,) = subs.events
    assert isinstance(event, SubscriptionsChanged)
    assert event.filters == []


# Which copies are dropped --------------------------------------------------------------------

Packet = tuple[str, bytes, int]  # topic, payload, QoS


def row(packet: Packet) -> bytes:
    topic, payload, qos = packet
    prefix = RowPrefixes(qos << 1)[topic.encode()]
    return encode_rows([prefix], [payload], [fields_of(payload)])[0]


def read(subs: Subscriptions, packets: list[Packet]) -> list[Packet]:
    """Let it read packets; return those that it keeps."""
    rows, tags = [row(p) for p in packets], [(0x30 | p[2] << 1) << 16 for p in packets]
    kept = subs.drop_copies(ReadBatch(None, rows, tags, 0.0, 0.0)).rows
    rest = iter(zip(rows, packets, strict=True))
    return [next(p for r, p in rest if r == one) for one in kept]  # in their order


publishes = st.lists(
    st.tuples(
        st.sampled_from(["iot/data", "iot/data", "iot/data", "other"]),
        st.sampled_from([b"1", b"2"]),
        st.integers(0, 2),
        st.booleans(),  # whether the group's message is ours
    ),
    max_size=30,
)


@settings(max_examples=500)
@given(publishes, st.booleans(), st.lists(st.integers(1, 5)))
def test_no_message_is_dropped_or_doubled(
    published: list[tuple[str, bytes, int, bool]], old_first: bool, reads: list[int]
) -> None:
    """Whatever is published, with equal payloads, however it is split into reads."""
    subs, _ = replaced()
    stream: list[Packet] = []
    expected: list[Packet] = []
    for topic, payload, qos, ours in published:
        if topic == "other":
            stream.append((topic, payload, qos))
            expected.append((topic, payload, qos))
            continue
        copies = [(topic, payload, 0)] + [(topic, payload, min(qos, 1))] * ours
        stream += copies if old_first else copies[::-1]
        expected += [(topic, payload, min(qos, 1))] * ours
    # A lone copy before a pair is the one case that cannot be told: it is stored.
    unsure = sum(
        1 for a, b in itertools.pairwise(published) if a[:2] == b[:2] and not (a[3] and b[3])
    )
    found: list[Packet] = []
    while stream:
        size = reads.pop() if reads else len(stream)
        found += read(subs, stream[:size])
        stream = stream[size:]
    lost, more = Counter(expected) - Counter(found), Counter(found) - Counter(expected)
    assert not lost
    assert more.total() <= unsure


def test_copies_end_with_the_answer() -> None:
    subs, client = replaced()
    assert read(subs, [("iot/data", b"1", 0)]) == []
    client.message_count = 1
    subs.handle_unsuback(2)
    after = [("iot/data", b"2", 0)] * 3
    assert read(subs, [("iot/data", b"2", 0), *after]) == after
    assert not subs.replacing


def test_copies_begin_with_the_answer() -> None:
    subs, client = begun(pod(0, SHARED), present=True)
    subs.handle_claim(Claim(held=[PLAIN], stale=[PLAIN]))
    client.message_count = 2
    subs.handle_suback(1, [GRANTED, GRANTED])
    before = [("iot/data", b"1", 0), ("iot/data", b"2", 1)]
    assert read(subs, [*before, ("iot/data", b"3", 0)]) == before
