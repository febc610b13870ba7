"""Replacing subscriptions: which pods wait, and which duplicate copies are dropped."""

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
def test_plain_and_shared_forms_of_a_filter_conflict(
    one: list[str], other: list[str], expected: bool
) -> None:
    assert conflicts(one, other) is expected
    assert conflicts(other, one) is expected


# Which pod waits for which -------------------------------------------------------------------


class Table:
    """The table ``sessions`` in a database."""

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


def test_pods_wait_while_scaling_out_and_in(database: Database) -> None:
    table = Table(database)
    assert table.claim(pod(0, PLAIN)) == Claim()
    # 1 → 3: the new pods wait for pod 0, even if they ask first.
    for ordinal in (1, 2):
        assert table.claim(pod(ordinal, SHARED)) == Claim(waiting_for=["collector-0"])
    assert table.rows() == {"collector-0": [PLAIN]}, "a waiting pod claims nothing"
    assert table.claim(pod(0, SHARED), present=True) == Claim(held=[PLAIN], stale=[PLAIN])
    assert table.claim(pod(1, SHARED)).waiting_for == ["collector-0"], "pod 0 has both filters now"
    table.save("collector-0", SHARED)
    for ordinal in (1, 2):
        assert table.claim(pod(ordinal, SHARED)) == Claim()
    # After a restart, a pod still has its filter.
    assert table.claim(pod(1, SHARED), present=True) == Claim(held=[SHARED])
    # 3 → 1: pod 0 waits for the others and keeps its filter.
    waits = Claim(held=[SHARED], waiting_for=["collector-1", "collector-2"])
    assert table.claim(pod(0, PLAIN), present=True) == waits
    table.save("collector-2")
    assert table.claim(pod(0, PLAIN), present=True).waiting_for == ["collector-1"]
    table.save("collector-1")
    assert table.claim(pod(0, PLAIN), present=True) == Claim(held=[SHARED], stale=[SHARED])
    assert table.rows() == {"collector-0": [SHARED, PLAIN]}


def test_pods_wait_while_the_group_is_renamed(database: Database) -> None:
    """Pods are replaced from the highest ordinal down, each when the previous one is ready."""
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
    """Independent collectors may use both forms of a filter on purpose."""
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


def test_lost_session_has_no_filters(database: Database) -> None:
    table = Table(database)
    table.save("collector-0", PLAIN)
    table.save("collector-1", SHARED)
    assert table.claim(pod(0, PLAIN), present=False).waiting_for == ["collector-1"]
    assert table.rows() == {"collector-1": [SHARED]}


# SUBSCRIBE and UNSUBSCRIBE -------------------------------------------------------------------


class Client:
    """A client that records SUBSCRIBE and UNSUBSCRIBE."""

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

    def new_packets(self) -> list[tuple[str, dict[str, int] | list[str]]]:
        sent = self.sent[self._seen :]
        self._seen = len(self.sent)
        return sent

    _seen = 0


def started(settings: Settings, *, present: bool) -> tuple[Subscriptions, Any]:
    subs, client = Subscriptions(settings), Client()
    subs.start(client, None, session_present=present)  # type: ignore[arg-type]
    assert client.sent == [], "it waits for the database first"
    return subs, client


def started_replacement(version: Literal["5", "3.1.1"] = "5") -> tuple[Subscriptions, Any]:
    """A replacement with SUBACK, and without UNSUBACK yet."""
    subs, client = started(pod(0, SHARED, mqtt_version=version), present=True)
    subs.handle_claim(Claim(held=[PLAIN], stale=[PLAIN]))
    demoted = {SHARED: 1, PLAIN: 0} if version == "5" else {SHARED: 1}
    assert client.new_packets() == [("subscribe", demoted)]
    subs.handle_suback(1, [GRANTED, GRANTED])
    assert client.new_packets() == [("unsubscribe", [PLAIN])]
    return subs, client


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_old_filter_is_unsubscribed_after_suback(version: Literal["5", "3.1.1"]) -> None:
    subs, client = started_replacement(version)
    assert subs.replacing is (version == "5"), "Mosquitto sends only one copy with MQTT 3.1.1"
    assert subs.events == []
    subs.handle_unsuback(2)
    assert [n.filters for n in subs.events if isinstance(n, SubscriptionsChanged)] == [[SHARED]]
    subs.start(client, None, session_present=True)
    assert client.new_packets() == [("subscribe", {SHARED: 1})], (
        "later connections subscribe at once"
    )


def test_refused_replacement_keeps_the_old_subscription() -> None:
    subs, client = started(pod(0, SHARED, "b"), present=True)
    subs.handle_claim(Claim(held=[PLAIN, "c"], stale=[PLAIN, "c"]))
    client.new_packets()
    subs.handle_suback(1, [REFUSED, GRANTED])
    assert client.new_packets() == [("subscribe", {PLAIN: 1}), ("unsubscribe", ["c"])]
    assert not subs.active
    subs.handle_suback(2, [GRANTED])
    subs.handle_unsuback(3)
    assert isinstance(subs.events[0], SubscriptionsChanged)
    assert subs.events[0].filters == [SHARED, "b", PLAIN], "the old filter is still in the session"
    assert SHARED in subs.refused


def test_collector_waits_a_minute_for_other_pods(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr("time.monotonic", lambda: now)
    subs, client = started(pod(0, PLAIN), present=True)
    waits = Claim(held=[SHARED], waiting_for=["collector-1"])
    subs.handle_claim(waits)
    assert client.new_packets() == [("subscribe", {SHARED: 1})], (
        "a restarted broker may have lost it"
    )
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
    assert client.new_packets() == []
    assert forced.index(True) == 60, "longer than the grace period of a pod"
    subs.handle_claim(Claim(held=[SHARED], stale=[SHARED]))
    assert client.new_packets() == [("subscribe", {PLAIN: 1, SHARED: 0})]
    assert subs.waiting_for == []


@pytest.mark.parametrize(
    ("ordinal", "present", "limit"), [(0, False, 2), (0, True, 10), (1, False, 600)]
)
def test_collector_subscribes_without_an_answer_of_the_database(
    ordinal: int, present: bool, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a subscription, messages would be lost."""
    now = time.monotonic()
    monkeypatch.setattr("time.monotonic", lambda: now)
    subs, client = started(pod(ordinal, SHARED), present=present)
    now += limit - 0.1
    subs.check_due()
    assert client.new_packets() == []
    now += 0.2
    subs.check_due()
    assert client.new_packets() == [("subscribe", {SHARED: 1})]
    subs.handle_claim(Claim(waiting_for=["collector-9"]))
    (event,) = subs.events
    assert isinstance(event, SessionStart)
    assert event.force, "too late to wait"
    subs.handle_claim(Claim(held=[PLAIN], stale=[PLAIN]))
    assert client.new_packets() == [("subscribe", {SHARED: 1, PLAIN: 0})]


def test_waiting_collector_can_unsubscribe() -> None:
    subs, client = started(pod(1, SHARED), present=False)
    subs.handle_claim(Claim(waiting_for=["collector-0"]))
    subs.unsubscribe_all()
    subs.handle_claim(Claim())
    assert client.new_packets() == [("unsubscribe", [SHARED])]
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
    """Pass packets to `drop_copies`; return those that it keeps."""
    rows, tags = [row(p) for p in packets], [(0x30 | p[2] << 1) << 16 for p in packets]
    kept = subs.drop_copies(ReadBatch(None, rows, tags, 0.0, 0.0)).rows
    rest = iter(zip(rows, packets, strict=True))
    return [next(p for r, p in rest if r == one) for one in kept]  # in their order


publishes = st.lists(
    st.tuples(
        st.sampled_from(["iot/data", "iot/data", "iot/data", "other"]),
        st.sampled_from([b"1", b"2"]),
        st.integers(0, 2),
        st.booleans(),  # whether we get the message of the shared subscription
    ),
    max_size=30,
)


@settings(max_examples=500)
@given(publishes, st.booleans(), st.lists(st.integers(1, 5)))
def test_copies_are_dropped_and_messages_are_not(
    published: list[tuple[str, bytes, int, bool]], old_first: bool, reads: list[int]
) -> None:
    """With any messages, also with equal payloads, and split into reads in any way."""
    subs, _ = started_replacement()
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
    # A single copy before a pair of equal copies cannot be recognised. It is stored.
    unrecognised = sum(
        1 for a, b in itertools.pairwise(published) if a[:2] == b[:2] and not (a[3] and b[3])
    )
    found: list[Packet] = []
    while stream:
        size = reads.pop() if reads else len(stream)
        found += read(subs, stream[:size])
        stream = stream[size:]
    lost, more = Counter(expected) - Counter(found), Counter(found) - Counter(expected)
    assert not lost
    assert more.total() <= unrecognised


def test_copies_are_dropped_until_unsuback() -> None:
    subs, client = started_replacement()
    assert read(subs, [("iot/data", b"1", 0)]) == []
    client.message_count = 1
    subs.handle_unsuback(2)
    after = [("iot/data", b"2", 0)] * 3
    assert read(subs, [("iot/data", b"2", 0), *after]) == after
    assert not subs.replacing


def test_copies_are_dropped_from_suback_on() -> None:
    subs, client = started(pod(0, SHARED), present=True)
    subs.handle_claim(Claim(held=[PLAIN], stale=[PLAIN]))
    client.message_count = 2
    subs.handle_suback(1, [GRANTED, GRANTED])
    before = [("iot/data", b"1", 0), ("iot/data", b"2", 1)]
    assert read(subs, [*before, ("iot/data", b"3", 0)]) == before
