"""Faults: processes killed, networks cut, databases that hang; see docs/faults.md.

After each fault: each message that the broker acknowledged to the devices is stored once, the
counts add up, nothing stays in flight and both threads are alive. ``make test`` runs a short form,
``make test-faults`` (FAULTS=full) the same with more repetitions, messages and variants.
"""

import contextlib
import itertools
import os
import random
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Self, TypeVar

import psycopg2
import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from testing.certificates import make_certificates
from testing.collector import FAULTY_COLLECTOR, Collector, assert_balanced
from testing.mosquitto import Mosquitto
from testing.postgres import Database
from testing.proxy import Proxy, Wire
from testing.publisher import publish
from testing.service import HOST, PATIENCE, eventually

FULL = os.environ.get("FAULTS") == "full"
SEED = int(os.environ.get("FAULTS_SEED", "1"))
LAUNCHER = str(FAULTY_COLLECTOR)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900 if FULL else 120)]

MakeCollector = Callable[..., Collector]
MakeBroker = Callable[..., Mosquitto]
T = TypeVar("T")


def times(short: T, full: T) -> T:
    return full if FULL else short


def seeded_random() -> random.Random:
    """A random number generator. The seed is printed, so that a failed run can be repeated."""
    print(f"FAULTS_SEED={SEED}")
    return random.Random(SEED)


class Load:
    """Devices that publish numbered messages in the background, each of them once.

    A message that the broker did not acknowledge is not published again. So the devices never
    cause a message to be stored twice.

    :param rate: about how many messages per second.
    :param payload: returns the n-th payload. All payloads must be different.
    """

    def __init__(
        self,
        broker: Mosquitto,
        rate: float = 1000,
        payload: Callable[[int], bytes] = b"n:%d".__mod__,
        topic: str = "iot/data",
        qos: int = 1,
    ) -> None:
        self._port = broker.port
        self._every = 5 / rate
        self._payload = payload
        self._topic = topic
        self._qos = qos
        self._unacknowledged: dict[int, bytes] = {}  # sent on this connection and not acknowledged
        self._pubacks: deque[tuple[int, float]] = deque()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.sent: set[bytes] = set()
        self.acknowledged: dict[bytes, float] = {}  # payload -> Unix time, to compare with mtimes

    def __enter__(self) -> Self:
        self._thread.start()
        self.more(1)
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def more(self, count: int) -> None:
        """Wait until ``count`` more messages are acknowledged."""
        goal = len(self.acknowledged) + count
        eventually(lambda: len(self.acknowledged) >= goal, what=f"{count} more are acknowledged")

    def finish(self) -> set[bytes]:
        """Stop; return the payloads that were acknowledged."""
        self._stop.set()
        self._thread.join(2 * PATIENCE)
        assert not self._thread.is_alive()
        return set(self.acknowledged)

    def _run(self) -> None:
        numbers = itertools.count()
        while not self._stop.is_set():
            client = Client(CallbackAPIVersion.VERSION2, reconnect_on_failure=False)
            client.max_inflight_messages_set(0)
            client.on_publish = lambda _c, _u, mid, *_: self._pubacks.append((mid, time.time()))
            self._unacknowledged, self._pubacks = {}, deque()
            try:
                client.connect(HOST, self._port)
            except OSError:
                self._stop.wait(0.02)
                continue
            client.loop_start()
            with contextlib.suppress(AssertionError):
                eventually(client.is_connected, 5)
                due = time.monotonic()
                while client.is_connected() and not self._stop.wait(
                    max(0.0, due - time.monotonic())
                ):
                    due = max(due, time.monotonic() - 0.1) + self._every
                    if len(self._unacknowledged) < 1000:
                        for n in itertools.islice(numbers, 5):
                            self._publish(client, self._payload(n))
                    self._record()
                eventually(lambda c=client: self._record() or not c.is_connected(), 10)  # type: ignore[misc]
            client.disconnect()
            client.loop_stop()
            self._record()

    def _publish(self, client: Client, payload: bytes) -> None:
        self.sent.add(payload)
        self._unacknowledged[client.publish(self._topic, payload, self._qos).mid] = payload

    def _record(self) -> bool:
        """Record acknowledgements; return whether all messages are acknowledged."""
        while self._pubacks:
            mid, at = self._pubacks.popleft()
            self.acknowledged[self._unacknowledged.pop(mid)] = at
        return not self._unacknowledged


def stored(database: Database) -> Counter[bytes]:
    """How often each payload is stored, as a message or a dead letter."""
    tables = "SELECT payload FROM messages UNION ALL SELECT payload FROM dead_letters"
    found = database.query(tables)
    return Counter(bytes(payload) for (payload,) in found)


def assert_healthy(*collectors: Collector) -> None:
    """Wait until nothing is in flight; assert that the counts add up and the threads are alive."""
    for collector in collectors:
        eventually(
            lambda c=collector: not c.metrics()["messages_in_flight"],  # type: ignore[misc]
            what=f"nothing is in flight\n{collector.log()[-2000:]}",
        )
        metrics = collector.metrics()
        assert_balanced(metrics)
        bugs = {name: count for name, count in metrics.items() if 'kind="bug"' in name and count}
        assert not bugs, collector.log()[-2000:]
        assert collector.get("/livez").status == 200


_markers = itertools.count()


def assert_stored_once(
    load: Load,
    broker: Mosquitto,
    database: Database,
    *collectors: Collector,
    lost: Callable[[], set[bytes]] = set,
    twice: set[bytes] | None = None,
) -> Counter[bytes]:
    """Stop the load; assert that each acknowledged message is stored once.

    :param lost: returns the messages that may be missing.
    :param twice: the messages that may be stored more than once.
    :returns: how often each payload is stored.
    """
    acknowledged = load.finish()
    # Published last, so stored last: all redelivered messages are stored before it.
    end = b"end:%d" % next(_markers)
    publish(broker, [("iot/data", end)])

    def all_stored() -> bool:
        query = "SELECT count(*) FROM messages WHERE topic = 'iot/data' AND payload = %s"
        return bool(database.query(query, psycopg2.Binary(end))[0][0]) and (
            acknowledged - lost() <= set(stored(database))
        )

    try:
        eventually(all_stored, 60, what="all acknowledged messages are stored")
    except AssertionError:
        missing = acknowledged - lost() - set(stored(database))
        logs = "\n".join(c.log()[-3000:] for c in collectors)
        raise AssertionError(f"{len(missing)} lost of {len(acknowledged)}\n{logs}") from None
    assert_healthy(*collectors)
    found = stored(database)
    del found[end]
    assert set(found) <= load.sent, "only sent messages are stored"
    repeated = {payload for payload, count in found.items() if count > 1}
    assert repeated <= (twice or set()), f"{len(repeated)} of {len(acknowledged)} stored twice"
    return found


def with_fault(collector: Collector, fault: str, number: int = 1) -> Collector:
    """Make a collector start with a built-in fault (see faulty_collector.py)."""
    collector.command = lambda: [sys.executable, LAUNCHER, fault, str(number)]  # type: ignore[method-assign]
    return collector


def without_fault(collector: Collector) -> Collector:
    collector.__dict__.pop("command", None)
    return collector


def through(proxy: Proxy, part: Mosquitto | Database) -> dict[str, str]:
    """The settings that connect a collector to a broker or a database through a proxy."""
    if isinstance(part, Mosquitto):
        return {"IOT_MQTT_URL": f"mqtt://{HOST}:{proxy.port}"}
    url = part.url.replace(f":{part.server.port}/", f":{proxy.port}/")
    return {"IOT_DATABASE_URL": url}


# The collector is killed ---------------------------------------------------------------------

VARIANTS = {"5": {}, "3.1.1": {"IOT_MQTT_VERSION": "3.1.1"}, "QoS 2": {"IOT_MQTT_QOS": "2"}}


@pytest.mark.parametrize("variant", times(["5"], ["5", "3.1.1", "QoS 2", "TLS"]))
def test_messages_are_stored_once_when_the_collector_is_killed(
    variant: str,
    make_broker: MakeBroker,
    make_collector: MakeCollector,
    database: Database,
    tmp_path: Path,
) -> None:
    """The kills come at random moments, also while the collector starts."""
    random = seeded_random()
    if variant == "TLS":
        files = make_certificates(tmp_path)
        listener = [f"certfile {files.server}", f"keyfile {files.server_key}"]
        broker = make_broker(scheme="mqtts", listener=listener).start()
        settings = {"IOT_MQTT_CA_FILE": str(files.ca)}
    else:
        broker = make_broker().start()
        settings = VARIANTS[variant]
    collector = make_collector(broker, database, **settings).start()
    duplicates = 0.0
    with Load(broker, qos=2 if variant == "QoS 2" else 1) as load:
        for _ in range(times(8, 100 if variant == "5" else 25)):
            load.more(random.randint(1, 300))
            duplicates += collector.metrics()["db_duplicates_total"]
            load.more(random.randint(1, 20))
            collector.kill()
            collector.launch()
            if random.random() < 0.2:
                load.more(random.randint(1, 500))  # meanwhile the collector starts
                collector.kill()
                collector.launch()
            collector.wait_ready()
        found = assert_stored_once(load, broker, database, collector)
    print(f"{len(found)} messages, {duplicates:.0f} recognised as sent again")


MOMENTS = [
    "copying",
    "before commit",
    "after commit",
    "half acknowledged",
    "before acknowledging",  # last, so that the broker redelivers the whole batch
]


def test_messages_are_stored_once_when_killed_at_each_step_of_a_batch(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """The collector kills itself at each of these moments."""
    random = seeded_random()
    collector = make_collector(broker, database).start()
    collector.kill()
    with Load(broker) as load:
        for moment in MOMENTS * times(1, 8):
            with_fault(collector, moment, random.randint(1, 6)).launch()
            assert collector.wait() == -signal.SIGKILL, collector.log()
        without_fault(collector).start()
        assert collector.wait_settled(1)["db_duplicates_total"], "the last batch is redelivered"
        assert_stored_once(load, broker, database, collector)


def test_messages_are_stored_once_when_killed_during_bisection(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """Bisection finds the rows that PostgreSQL refuses."""
    random = seeded_random()
    database.query("ALTER TABLE messages ADD CHECK (substr(payload, 1, 6) <> 'poison'::bytea)")
    collector = make_collector(broker, database, IOT_BATCH_LINGER_MS="100").start()
    collector.kill()
    kinds = (b"n:%d", b"n:%d", b"{%d", b"n:%d", b"poison %d", b"n:%d", b"\xff%d", b"n:1e-20000%d")
    with Load(broker, payload=lambda n: kinds[n % len(kinds)] % n) as load:
        for _ in range(times(1, 20)):
            with_fault(collector, "bisecting", random.randint(1, 60)).launch()
            assert collector.wait() == -signal.SIGKILL, collector.log()
            without_fault(collector).start()
            load.more(random.randint(1, 300))
            collector.kill()
        collector.start()
        found = assert_stored_once(load, broker, database, collector)
    letters = Counter(letter.payload for letter in database.dead_letters())
    assert set(letters) == {payload for payload in found if payload.startswith(b"poison")}
    assert max(letters.values()) == 1


def test_nothing_is_redelivered_after_sigterm(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """The broker receives every PUBACK before the process ends, so it redelivers nothing."""
    random = seeded_random()
    collector = make_collector(broker, database).start()
    duplicates = 0.0
    with Load(broker) as load:
        for _ in range(times(3, 20)):
            load.more(random.randint(1, 300))
            assert collector.stop() == 0
            collector.start()
            duplicates += collector.wait_settled(1)["db_duplicates_total"]
        assert_stored_once(load, broker, database, collector)
    assert duplicates == 0


# PostgreSQL is killed ------------------------------------------------------------------------


def test_messages_are_stored_once_when_postgres_stops_or_is_killed(
    make_collector: MakeCollector, broker: Mosquitto, own_database: Database
) -> None:
    random = seeded_random()
    server = own_database.server
    collector = make_collector(broker, own_database).start()
    with Load(broker, rate=500) as load:
        for i in range(times(3, 20)):
            load.more(random.randint(1, 300))
            if i % 3 == 1:
                server.stop()
            else:
                server.kill()
            load.more(random.randint(1, 100))
            server.start()
            collector.wait_ready()
        assert_stored_once(load, broker, own_database, collector)


# CopyDone of PostgreSQL's protocol. The collector has already sent the COMMIT that follows it.
COPY_DONE = b"c\0\0\0\4"
AT_COMMIT = ["answer lost", "request lost", "connection reset", "server killed"]


def test_messages_are_stored_once_when_commit_gets_no_answer(
    make_collector: MakeCollector,
    make_proxy: Callable[[int], Proxy],
    broker: Mosquitto,
    own_database: Database,
) -> None:
    """The COMMIT may have succeeded, failed, or still be running."""
    random = seeded_random()
    server = own_database.server
    proxy = make_proxy(server.port)
    collector = make_collector(broker, own_database, **through(proxy, own_database)).start()
    happened = Counter[str]()

    def arm(kind: str) -> None:
        left = random.randint(1, 20)

        def at(wire: Wire, data: bytes) -> None:
            nonlocal left
            if not data.endswith(COPY_DONE) or (left := left - 1) > 0:
                return
            proxy.on_up = None
            happened[kind] += 1
            if kind == "request lost":
                wire.up = "lose"
            elif kind == "answer lost":
                wire.down = "lose"
            else:
                wire.down = "drop"

        proxy.on_up = at

    with Load(broker) as load:
        for i in range(times(6, 80)):
            kind = AT_COMMIT[i % 3] if i % 8 < 7 else AT_COMMIT[3]
            arm(kind)
            eventually(lambda: proxy.on_up is None, what="a COMMIT is sent")
            if kind == "connection reset":
                proxy.cut()
            elif kind == "server killed":
                server.kill()
                proxy.cut()
                server.start()
            load.more(random.randint(1, 50))
        collector.wait_ready()
        assert_stored_once(load, broker, own_database, collector)
    print(dict(happened))


# The database does not answer, or refuses ----------------------------------------------------


def resident_bytes(pid: int) -> int:
    """The resident memory of a process (VmRSS)."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) << 10


def test_connections_stay_up_while_the_database_hangs_beyond_keepalive(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """QoS 1 stops at Receive Maximum, QoS 0 when the buffer is full. Both stay connected."""
    keepalive = times(5, 10)
    common = {"IOT_MQTT_KEEPALIVE_SECONDS": str(keepalive)}
    qos1 = make_collector(
        broker,
        database,
        IOT_MQTT_CLIENT_ID="qos1",
        IOT_MQTT_TOPICS="iot/#",
        IOT_MQTT_MAX_INFLIGHT="500",
        **common,
    ).start()
    qos0 = make_collector(
        broker,
        database,
        IOT_MQTT_CLIENT_ID="qos0",
        IOT_MQTT_TOPICS="flood",
        IOT_BUFFER_BYTES=str(1 << 20),
        **common,
    ).start()
    flood = [("flood", b"%d:" % i + bytes(4000)) for i in range(10_000)]  # 40 MB
    size = len(flood[-1][1])
    publish(broker, flood[:10], qos=0)
    qos0.wait_settled(10)
    before = resident_bytes(qos0.pid)
    with Load(broker, rate=300) as load, contextlib.closing(database.connect()) as holder:
        load.more(100)
        assert_healthy(qos1)
        with holder.cursor() as cursor:
            cursor.execute("LOCK TABLE messages IN ACCESS EXCLUSIVE MODE")
            publish(broker, flood[10:], qos=0)
            for collector in (qos1, qos0):
                eventually(
                    lambda c=collector: (  # type: ignore[misc]
                        c.metrics()["oldest_unacked_message_seconds"] > 2.1 * keepalive
                    ),
                    what="a message has waited for more than twice the keepalive",
                )
                assert_balanced(collector.metrics())
                assert collector.get("/livez").status == 200
            waiting, grown = qos0.metrics()["messages_in_flight"], resident_bytes(qos0.pid) - before
            window = qos1.metrics()["messages_in_flight"]
            holder.rollback()
        # Besides its payload, a message takes about 150 bytes for its row and objects.
        assert waiting * (size + 150) >= 1 << 20, "the buffer was full before reading stopped"
        assert waiting * 4000 <= 4 << 20, "about as much as the buffer size is held"
        assert grown < 20 << 20, f"{grown >> 20} MiB more memory for 40 MB of messages"
        # Mosquitto before 2.0.21 sends more than its window. Then only the buffer limits it.
        assert window > 100
        assert window <= 500 or "sends more un-acknowledged messages" in qos1.log()
        load.more(100)

        def over() -> bool:
            count = qos0.metrics()["mqtt_messages_total"]
            time.sleep(1)
            return 0.5 * len(flood) <= count == qos0.metrics()["mqtt_messages_total"]

        eventually(over, what="the rest of the flood arrives")
        assert_healthy(qos1, qos0)
        flooded = database.query("SELECT count(*) FROM messages WHERE topic = 'flood'")[0][0]
        assert qos0.metrics()["mqtt_messages_total"] == flooded, "all received messages are stored"
        database.query("DELETE FROM messages WHERE topic = 'flood'")
        qos0.stop()
        assert_stored_once(load, broker, database, qos1)
        assert qos1.metrics()["mqtt_reconnects_total"] == 0
    assert "no connection to broker" not in qos0.log() + qos1.log()
    print(f"held: {waiting:.0f} at QoS 0, {window:.0f} at QoS 1; {grown >> 10} KiB more memory")


CUT_SESSIONS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = %s AND application_name = 'iot-collector'
"""


def test_messages_are_stored_once_after_refused_connections_and_read_only(
    make_collector: MakeCollector, broker: Mosquitto, own_database: Database
) -> None:
    """First the server refuses connections, then it becomes read-only."""
    server = own_database.server
    collector = make_collector(broker, own_database).start()

    def fails(text: str) -> None:
        eventually(
            lambda: text in str(collector.health()["database"]["error"]),
            what=f"{text}\n{collector.log()[-1000:]}",
        )
        assert collector.get("/livez").status == 200
        assert collector.get("/readyz").status == 503
        assert_balanced(collector.metrics())

    with Load(broker) as load:
        load.more(100)
        with contextlib.ExitStack() as taken:
            own = taken.enter_context(contextlib.closing(own_database.connect()))
            own.autocommit = True

            def none_is_left() -> bool:
                # Without a pause, or the collector takes the connection again.
                with own.cursor() as cursor:
                    cursor.execute(CUT_SESSIONS, (own_database.name,))
                until = time.monotonic() + 0.5
                while time.monotonic() < until:
                    with contextlib.suppress(psycopg2.OperationalError):
                        taken.enter_context(contextlib.closing(own_database.connect()))
                return "too many clients" in str(collector.health()["database"]["error"])

            eventually(none_is_left, what="no connection is left for the collector")
            fails("too many clients")
            load.more(100)
        collector.wait_ready()
        load.more(100)
        server.query(f"ALTER DATABASE {own_database.name} SET default_transaction_read_only = on")
        own_database.query(CUT_SESSIONS, own_database.name)
        fails("read_only")
        load.more(100)
        server.query(f"ALTER DATABASE {own_database.name} RESET default_transaction_read_only")
        assert_stored_once(load, broker, own_database, collector)


# The network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("silence", times(["none"], ["both", "up", "down", "stuck"]))
def test_messages_are_stored_once_over_a_bad_network_to_the_broker(
    silence: str,
    make_collector: MakeCollector,
    make_proxy: Callable[[int], Proxy],
    broker: Mosquitto,
    database: Database,
) -> None:
    """The connection is reset, goes silent until keepalive notices it, and is slow."""
    random = seeded_random()
    proxy = make_proxy(broker.port)
    settings = through(proxy, broker) | {"IOT_MQTT_KEEPALIVE_SECONDS": "5"}
    collector = make_collector(broker, database, **settings).start()
    with Load(broker, rate=300) as load:
        # Each reset doubles the longest wait before the next attempt, unless a connection lasted.
        for _ in range(times(1, 6)):
            load.more(random.randint(1, 300))
            proxy.cut()
            collector.wait_ready()
        load.more(100)
        if silence != "none":
            stay_silent(silence, proxy, collector)
        proxy.rate = 20_000  # bytes per second: the queued messages take seconds
        load.more(times(100, 1000))
        proxy.rate = None
        assert_stored_once(load, broker, database, collector)


def stay_silent(way: str, proxy: Proxy, collector: Collector) -> None:
    """Forward nothing until keepalive notices it, then everything."""
    before = collector.metrics()["mqtt_reconnects_total"]
    if way in ("both", "up"):
        proxy.up = "drop"
    if way in ("both", "down"):
        proxy.down = "drop"
    if way == "stuck":
        proxy.up = proxy.down = "stuck"
    eventually(lambda: collector.get("/readyz").status == 503, what="the silence is noticed")
    assert collector.get("/livez").status == 200
    proxy.up = proxy.down = "pass"
    proxy.cut()  # drops connection attempts that got no answer
    eventually(lambda: collector.metrics()["mqtt_reconnects_total"] > before, what="it reconnects")


def test_messages_are_stored_once_over_a_bad_network_to_the_database(
    make_collector: MakeCollector,
    make_proxy: Callable[[int], Proxy],
    broker: Mosquitto,
    database: Database,
) -> None:
    """The connection is reset, stalls, loses all data, and is slow."""
    random = seeded_random()
    proxy = make_proxy(database.server.port)
    collector = make_collector(broker, database, **through(proxy, database)).start()

    def waits() -> None:
        eventually(
            lambda: collector.metrics()["oldest_unacked_message_seconds"] > 1, what="messages wait"
        )
        assert collector.get("/livez").status == 200

    with Load(broker) as load:
        for _ in range(times(3, 20)):
            load.more(random.randint(1, 300))
            proxy.cut()
        for _ in range(times(1, 5)):
            load.more(random.randint(1, 300))
            proxy.up = proxy.down = "stuck"
            waits()
            proxy.up = proxy.down = "pass"
            assert_healthy(collector)
            load.more(random.randint(1, 300))
            proxy.up = proxy.down = "drop"
            waits()
            proxy.cut()
            proxy.up = proxy.down = "pass"
            collector.wait_ready()
        proxy.rate = 50_000
        load.more(times(100, 1000))
        proxy.rate = None
        assert_stored_once(load, broker, database, collector)


# Several collectors --------------------------------------------------------------------------


@pytest.mark.parametrize("end", times(["killed"], ["killed", "stopped"]))
def test_two_collectors_with_one_client_id_lose_nothing(
    end: str, make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """They take over the session from each other until one ends.

    A message that one of them received and the other one stored may be stored twice.
    """
    first = make_collector(broker, database).start()
    with Load(broker, rate=300) as load:
        for _ in range(times(1, 5)):
            second = make_collector(broker, database).launch().wait_listening()
            for collector in (first, second, first):
                seen = collector.metrics()["mqtt_messages_total"]
                eventually(
                    lambda c=collector, n=seen: c.metrics()["mqtt_messages_total"] > n,  # type: ignore[misc]
                    what="it takes over the session",
                )
            if end == "killed":
                second.kill()
            else:
                assert second.stop() == 0
            first.wait_ready()
        found = assert_stored_once(load, broker, database, first, twice=load.sent)
    print(f"{found.total() - len(found)} of {len(found)} stored twice")


def test_messages_are_stored_once_while_scaling_out_and_in(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """A StatefulSet scales the members of a shared subscription from 1 to 3 and back to 1.

    One member is killed in between. The highest ordinals are stopped first.
    """
    members = [
        make_collector(
            broker,
            database,
            IOT_MQTT_CLIENT_ID=f"collector-{i}",
            IOT_MQTT_TOPICS="$share/collectors/iot/#",
            IOT_SESSION_ON_STOP="ordinal",
        )
        for i in range(3)
    ]
    members[0].start()

    def wait_received(member: Collector) -> None:
        eventually(lambda: member.metrics()["mqtt_messages_total"], what="a member gets messages")

    with Load(broker) as load:
        for _ in range(times(1, 8)):
            load.more(100)
            for member in members[1:]:
                member.start()
                wait_received(member)
            members[1].kill()
            load.more(100)
            members[1].start()
            wait_received(members[1])
            for member in reversed(members[1:]):
                assert member.stop() == 0
                assert "session kept" not in member.log()
            load.more(100)
        assert members[0].stop() == 0
        load.more(100)  # the broker keeps these for member 0
        members[0].start()
        assert members[0].health()["broker"]["session_present"]
        assert_stored_once(load, broker, database, members[0])


PLAIN, SHARED = "iot/data", "$share/collectors/iot/data"


class StatefulSet:
    """The pods of the collector as processes, changed in the order of the StatefulSet controller.

    With podManagementPolicy Parallel it creates missing pods, and deletes surplus pods, all at
    once. It replaces a pod of an old template when all pods with higher ordinals are ready.
    """

    def __init__(self, make: Callable[..., Collector]) -> None:
        self._make = make
        self.pods: list[Collector] = []

    def apply(self, replicas: int, filters: str) -> None:
        """Change the number of pods and their template; return when the rollout is complete."""
        old, surplus = self.pods[:replicas], self.pods[replicas:]
        for pod in surplus:
            pod.signal(signal.SIGTERM)
        new = [
            self._make(
                IOT_MQTT_CLIENT_ID=f"collector-{ordinal}",
                IOT_MQTT_TOPICS=filters,
                IOT_SESSION_ON_STOP="ordinal",
            ).launch()
            for ordinal in range(len(old), replicas)
        ]
        for pod in reversed(new):
            pod.wait_listening().wait_ready()
        for pod in reversed(old):
            if pod.settings["IOT_MQTT_TOPICS"] != filters:
                assert pod.stop() == 0
                pod.settings["IOT_MQTT_TOPICS"] = filters
                pod.start()
        self.pods = old + new
        for pod in surplus:
            assert pod.wait() == 0
            assert "session kept" not in pod.log()

    def wait_subscribed(self, database: Database) -> None:
        """Wait until each session has exactly the filters of the template."""
        wanted = {
            p.settings["IOT_MQTT_CLIENT_ID"]: p.settings["IOT_MQTT_TOPICS"] for p in self.pods
        }
        query = "SELECT client_id, array_to_string(filters, ',') FROM sessions"
        eventually(
            lambda: dict(database.query(query)) == wanted,
            90,
            what=f"sessions are {wanted}\n" + "\n".join(p.log()[-1500:] for p in self.pods),
        )
        eventually(lambda: all(p.metrics()["mqtt_connected"] for p in self.pods), what="subscribed")


@pytest.mark.parametrize("version", times(["5"], ["5", "3.1.1"]))
@pytest.mark.parametrize("replicas", [3, 1], ids=["1-3-1", "autoscaler"])
def test_messages_are_stored_once_when_filters_become_shared_or_plain(
    replicas: int,
    version: str,
    make_collector: MakeCollector,
    broker: Mosquitto,
    database: Database,
) -> None:
    """Plain with one pod, shared with several pods or an autoscaler, and back, under load."""
    pods = StatefulSet(
        lambda **settings: make_collector(broker, database, IOT_MQTT_VERSION=version, **settings)
    )
    pods.apply(1, PLAIN)
    began = time.monotonic()
    with Load(broker, rate=times(500, 2200)) as load:
        for _ in range(times(1, 10)):
            for count, filters in ((replicas, SHARED), (1, PLAIN)):
                load.more(100)
                pods.apply(count, filters)
                pods.wait_subscribed(database)
                load.more(100)
        rate = len(load.acknowledged) / (time.monotonic() - began)
        found = assert_stored_once(load, broker, database, *pods.pods)
    print(f"{len(found)} messages, {rate:.0f}/s")


@pytest.mark.parametrize(
    "moment",
    times(
        ["replacement granted"],
        ["replacement asked for", "replacement granted", "old filter given up"],
    ),
)
def test_nothing_is_lost_when_killed_while_filters_become_shared_or_plain(
    moment: str, make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """Nothing is lost. Between SUBSCRIBE and UNSUBSCRIBE the session has both filters.

    Messages that arrive before the next process unsubscribes may be stored twice.
    """
    pods = StatefulSet(lambda **settings: make_collector(broker, database, **settings))
    pods.apply(1, PLAIN)
    pod = pods.pods[0]
    twice: set[bytes] = set()
    with Load(broker, rate=times(500, 2000)) as load:
        for filters in (SHARED, PLAIN) * times(1, 5):
            load.more(100)
            assert pod.stop() == 0
            pod.settings["IOT_MQTT_TOPICS"] = filters
            before = load.sent.copy()
            assert with_fault(pod, moment).launch().wait() == -signal.SIGKILL, pod.log()
            without_fault(pod).start()
            pods.wait_subscribed(database)
            twice |= load.sent - before
            load.more(100)
        found = assert_stored_once(load, broker, database, pod, twice=twice)
    print(f"{found.total() - len(found)} of {len(found)} stored twice")


# The clock -----------------------------------------------------------------------------------


def test_messages_are_stored_once_when_the_clock_jumps(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """The clock jumps a year ahead, where no partition exists, and back."""
    collector = with_fault(make_collector(broker, database), "clock").start()
    years = "SELECT count(DISTINCT date_trunc('month', received_at)) FROM messages"
    future = "SELECT count(*) FROM messages WHERE received_at > now() + interval '300 days'"
    with Load(broker) as load:
        for _ in range(times(1, 5)):
            load.more(100)
            ahead = database.query(future)[0][0]
            collector.signal(signal.SIGUSR1)
            eventually(lambda n=ahead: database.query(future)[0][0] > n, what="a row of next year")  # type: ignore[misc]
            load.more(100)
            collector.signal(signal.SIGUSR2)
            load.more(100)
        assert_stored_once(load, broker, database, collector)
    assert database.query(years)[0][0] >= 2
    assert collector.metrics()["mqtt_reconnects_total"] == 0
    assert database.count("dead_letters") == 0


# The broker ----------------------------------------------------------------------------------


def saved_at(broker: Mosquitto) -> float:
    """When the broker last saved its state."""
    file = broker.folder / "mosquitto.db"
    return file.stat().st_mtime if file.exists() else 0.0


def save(broker: Mosquitto) -> None:
    """Make the broker save its state now (SIGUSR1)."""
    before = saved_at(broker)
    broker.signal(signal.SIGUSR1)
    eventually(lambda: saved_at(broker) > before, what="the broker saves its state")


def test_messages_are_stored_once_when_the_broker_restarts(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """A broker that is stopped saves its state first."""
    random = seeded_random()
    collector = make_collector(broker, database).start()
    with Load(broker) as load:
        for _ in range(times(2, 20)):
            load.more(random.randint(1, 500))
            assert broker.stop() == 0
            broker.start()
        assert_stored_once(load, broker, database, collector)


def test_only_unsaved_messages_are_lost_when_the_broker_is_killed(
    make_collector: MakeCollector, make_broker: MakeBroker, database: Database
) -> None:
    """Only messages that it had neither saved nor delivered are lost.

    Messages that were queued when it saved, and delivered later, are sent again without DUP.
    """
    random = seeded_random()
    interval = times(1, 3)
    broker = make_broker(f"autosave_interval {interval}").start()
    collector = make_collector(broker, database).start()
    gaps: list[tuple[float, float]] = []
    twice: set[bytes] = set()

    def at_risk() -> set[bytes]:
        """The messages that were acknowledged between a save and the kill that followed."""
        known = load.acknowledged.copy().items()
        return {p for p, at in known if any(saved <= at <= killed for saved, killed in gaps)}

    save(broker)
    with Load(broker) as load:
        for n in range(times(2, 10)):
            if n % 2:
                collector.stop()  # the broker queues new messages
                load.more(random.randint(1, 200))
                before = saved_at(broker)
                eventually(lambda b=before: saved_at(broker) > b, what="it saves its state")  # type: ignore[misc]
            load.more(random.randint(1, int(1500 * interval)))
            broker.kill()
            # On a busy machine, saving takes a while, and the last PUBACKs arrive late.
            gaps.append((saved_at(broker) - 0.5, time.time() + 0.5))
            twice |= load.sent
            broker.start()
            if not collector.running:
                collector.start()
            collector.wait_ready()
            load.more(10)
        found = assert_stored_once(load, broker, database, collector, lost=at_risk, twice=twice)
    lost = len(load.acknowledged.keys() - found.keys())
    repeated = found.total() - len(found)
    print(
        f"{len(load.acknowledged)} acknowledged, {lost} lost, {repeated} stored twice; at risk: "
        + ", ".join(f"{killed - saved:.1f} s" for saved, killed in gaps)
    )


def test_messages_requeued_by_a_killed_broker_are_stored_again(
    make_collector: MakeCollector, make_broker: MakeBroker, database: Database
) -> None:
    """It sends all messages that it had saved as queued again, without DUP.

    They are stored again, because they may be new messages: twice is better than never.
    """
    broker = make_broker("autosave_interval 0").start()
    collector = make_collector(broker, database).start()
    messages = [("iot/data", b"%d" % n) for n in range(100)]
    publish(broker, messages[:50])
    collector.wait_settled(50)
    assert collector.stop() == 0
    publish(broker, messages[50:])
    save(broker)
    collector.start()
    collector.wait_settled(50)
    broker.kill()
    broker.start()
    metrics = collector.wait_settled(100)
    assert metrics["mqtt_messages_total"] == 100, "the 50 queued messages were sent again"
    assert metrics["db_duplicates_total"] == 0
    assert stored(database) == Counter({p: 1 + (n >= 50) for n, (_, p) in enumerate(messages)})


LOCK_MESSAGES = "LOCK TABLE messages IN ACCESS EXCLUSIVE MODE"


LOSS = pytest.mark.xfail(
    strict=True,
    reason="has DUP, and packet id and content of a stored message: looks redelivered (ADR 1)",
)


@pytest.mark.parametrize(
    ("contents", "committed"),
    [
        ("distinct", 0),
        ("distinct", 1),
        pytest.param("equal", 0, marks=LOSS),
        pytest.param("equal", 1, marks=LOSS),
    ],
)
def test_messages_with_packet_ids_reused_by_a_killed_broker_are_stored(
    contents: str,
    committed: int,
    make_collector: MakeCollector,
    make_broker: MakeBroker,
    database: Database,
) -> None:
    """A killed broker continues from the packet id of its last save, so it uses ids again.

    If the collector is killed before it stores such messages, they are redelivered with DUP.
    """
    broker = make_broker("autosave_interval 0").start()
    collector = make_collector(broker, database).start()
    distinct = contents == "distinct"
    messages = [("iot/data", b"%d" % n if distinct else b"temperature:23") for n in range(40)]
    save(broker)
    publish(broker, messages[:30])
    collector.wait_settled(30)
    broker.kill()
    broker.start()
    eventually(lambda: collector.metrics()["mqtt_reconnects_total"], what="it reconnects")
    collector.wait_ready()
    publish(broker, messages[30 : 30 + committed])
    collector.wait_settled(30 + committed)
    with contextlib.closing(database.connect()) as holder, holder.cursor() as cursor:
        cursor.execute(LOCK_MESSAGES)
        publish(broker, messages[30 + committed :])
        eventually(
            lambda: collector.metrics()["mqtt_messages_total"] == 40, what="all are received"
        )
        collector.kill()
    collector.start()
    collector.wait_settled(10 - committed)
    assert database.count() == 40


@pytest.mark.skipif(not FULL, reason="sends 65 535 messages; in make test-faults")
def test_equal_messages_with_reused_packet_ids_are_stored(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """After 65 535 messages, new messages have the packet ids and the content of stored ones."""
    collector = make_collector(broker, database).start()
    assert collector.stop() == 0
    many = 65_535
    publish(broker, [("iot/data", b"temperature:23")] * many)  # queued in the broker
    collector.start()
    collector.wait_settled(many)
    batches = database.query("SELECT count(*) FROM ledger")[0][0]
    with contextlib.closing(database.connect()) as holder, holder.cursor() as cursor:
        cursor.execute(LOCK_MESSAGES)
        publish(broker, [("iot/data", b"temperature:23")] * 100)
        eventually(
            lambda: collector.metrics()["mqtt_messages_total"] == many + 100, what="received"
        )
        collector.kill()
    collector.start()
    collector.wait_settled(100)
    assert database.count() == many + 100, f"{batches} batches in the ledger"
