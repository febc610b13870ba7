"""Faults: processes killed, networks cut, databases that hang; see docs/faults.md.

After each of them: what the broker acknowledged to the devices is stored, each message once, the
account balances, nothing stays in flight and both threads live. ``make test`` runs a short form,
``make test-faults`` (FAULTS=full) the same with far more of everything.
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


def dice() -> random.Random:
    """Random numbers that a failed run shows how to get again."""
    print(f"FAULTS_SEED={SEED}")
    return random.Random(SEED)


class Load:
    """Devices that publish numbered messages in the background, each of them once.

    What a broker that goes away has not acknowledged is not sent again: a message that is stored
    twice is not the devices' doing.

    :param rate: messages per second, about.
    :param payload: makes the n-th payload; they have to differ.
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
        self._open: dict[int, bytes] = {}  # sent on this connection and not acknowledged
        self._answers: deque[tuple[int, float]] = deque()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.sent: set[bytes] = set()
        self.acknowledged: dict[bytes, float] = {}  # payload -> when, as files have it

    def __enter__(self) -> Self:
        self._thread.start()
        self.more(1)
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def more(self, count: int) -> None:
        """Wait until so many more messages have been acknowledged."""
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
            client.on_publish = lambda _c, _u, mid, *_: self._answers.append((mid, time.time()))
            self._open, self._answers = {}, deque()
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
                    if len(self._open) < 1000:
                        for n in itertools.islice(numbers, 5):
                            self._publish(client, self._payload(n))
                    self._book()
                eventually(lambda c=client: self._book() or not c.is_connected(), 10)  # type: ignore[misc]
            client.disconnect()
            client.loop_stop()
            self._book()

    def _publish(self, client: Client, payload: bytes) -> None:
        self.sent.add(payload)
        self._open[client.publish(self._topic, payload, self._qos).mid] = payload

    def _book(self) -> bool:
        """Take note of acknowledgements; return whether there is nothing to wait for."""
        while self._answers:
            mid, at = self._answers.popleft()
            self.acknowledged[self._open.pop(mid)] = at
        return not self._open


def stored(database: Database) -> Counter[bytes]:
    """How often each payload is stored, as a message or a dead letter."""
    tables = "SELECT payload FROM messages UNION ALL SELECT payload FROM dead_letters"
    found = database.query(tables)
    return Counter(bytes(payload) for (payload,) in found)


def well(*collectors: Collector) -> None:
    """Wait until nothing is in flight; assert that the account balances and the threads live."""
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


_ends = itertools.count()


def complete(
    load: Load,
    broker: Mosquitto,
    database: Database,
    *collectors: Collector,
    lost: Callable[[], set[bytes]] = set,
    doubles: set[bytes] | None = None,
) -> Counter[bytes]:
    """End the load; assert what is promised after each fault; return what is stored.

    :param lost: what may be missing.
    :param doubles: what may be stored more than once.
    """
    acknowledged = load.finish()
    # Sent last, so stored last, and whatever was to be sent again is there by then.
    end = b"end:%d" % next(_ends)
    publish(broker, [("iot/data", end)])

    def all_there() -> bool:
        query = "SELECT count(*) FROM messages WHERE topic = 'iot/data' AND payload = %s"
        return bool(database.query(query, psycopg2.Binary(end))[0][0]) and (
            acknowledged - lost() <= set(stored(database))
        )

    try:
        eventually(all_there, 60, what="all that was acknowledged is stored")
    except AssertionError:
        missing = acknowledged - lost() - set(stored(database))
        logs = "\n".join(c.log()[-3000:] for c in collectors)
        raise AssertionError(f"{len(missing)} lost of {len(acknowledged)}\n{logs}") from None
    well(*collectors)
    found = stored(database)
    del found[end]
    assert set(found) <= load.sent, "stored, and never sent"
    twice = {payload for payload, count in found.items() if count > 1}
    assert twice <= (doubles or set()), f"{len(twice)} doubles of {len(acknowledged)}"
    return found


def with_fault(collector: Collector, fault: str, number: int = 1) -> Collector:
    """Have a collector start with a fault built in (see faulty_collector.py)."""
    collector.command = lambda: [sys.executable, LAUNCHER, fault, str(number)]  # type: ignore[method-assign]
    return collector


def without_fault(collector: Collector) -> Collector:
    collector.__dict__.pop("command", None)
    return collector


def through(proxy: Proxy, part: Mosquitto | Database) -> dict[str, str]:
    """The settings that lead a collector through a proxy to a broker or a database."""
    if isinstance(part, Mosquitto):
        return {"IOT_MQTT_URL": f"mqtt://{HOST}:{proxy.port}"}
    url = part.url.replace(f":{part.server.port}/", f":{proxy.port}/")
    return {"IOT_DATABASE_URL": url}


# The collector is killed ---------------------------------------------------------------------

VARIANTS = {"5": {}, "3.1.1": {"IOT_MQTT_VERSION": "3.1.1"}, "QoS 2": {"IOT_MQTT_QOS": "2"}}


@pytest.mark.parametrize("variant", times(["5"], ["5", "3.1.1", "QoS 2", "TLS"]))
def test_collector_killed(
    variant: str,
    make_broker: MakeBroker,
    make_collector: MakeCollector,
    database: Database,
    tmp_path: Path,
) -> None:
    """At random moments, its start included."""
    random = dice()
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
                load.more(random.randint(1, 500))  # it is somewhere in its start
                collector.kill()
                collector.launch()
            collector.wait_ready()
        found = complete(load, broker, database, collector)
    print(f"{len(found)} messages, {duplicates:.0f} recognised as sent again")


MOMENTS = [
    "copying",
    "before commit",
    "after commit",
    "half acknowledged",
    "before acknowledging",  # last, so that all of its batch is sent again
]


def test_collector_killed_exactly_at(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """Killed by itself at each moment of a batch."""
    random = dice()
    collector = make_collector(broker, database).start()
    collector.kill()
    with Load(broker) as load:
        for moment in MOMENTS * times(1, 8):
            with_fault(collector, moment, random.randint(1, 6)).launch()
            assert collector.wait() == -signal.SIGKILL, collector.log()
        without_fault(collector).start()
        assert collector.wait_settled(1)["db_duplicates_total"], "none was acknowledged"
        complete(load, broker, database, collector)


def test_killed_while_refused_rows_are_searched(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """Also while it looks for the row that the database refuses."""
    random = dice()
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
        found = complete(load, broker, database, collector)
    letters = Counter(letter.payload for letter in database.dead_letters())
    assert set(letters) == {payload for payload in found if payload.startswith(b"poison")}
    assert max(letters.values()) == 1


def test_sigterm_again_and_again(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """The broker reads every acknowledgement before the process ends: nothing is sent again."""
    random = dice()
    collector = make_collector(broker, database).start()
    duplicates = 0.0
    with Load(broker) as load:
        for _ in range(times(3, 20)):
            load.more(random.randint(1, 300))
            assert collector.stop() == 0
            collector.start()
            duplicates += collector.wait_settled(1)["db_duplicates_total"]
        complete(load, broker, database, collector)
    assert duplicates == 0


# PostgreSQL is killed ------------------------------------------------------------------------


def test_postgres_killed(
    make_collector: MakeCollector, broker: Mosquitto, own_database: Database
) -> None:
    random = dice()
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
        complete(load, broker, own_database, collector)


COPY_DONE = b"c\0\0\0\4"  # PostgreSQL's protocol; the COMMIT that follows has been sent before
AT_COMMIT = ["answer lost", "request lost", "cut at once", "server killed"]


def test_commit_without_an_answer(
    make_collector: MakeCollector,
    make_proxy: Callable[[int], Proxy],
    broker: Mosquitto,
    own_database: Database,
) -> None:
    """Whether it took place or not, and whether it is through yet: each row is there once."""
    random = dice()
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
            eventually(lambda: proxy.on_up is None, what="it commits")
            if kind == "cut at once":
                proxy.cut()
            elif kind == "server killed":
                server.kill()
                proxy.cut()
                server.start()
            load.more(random.randint(1, 50))
        collector.wait_ready()
        complete(load, broker, own_database, collector)
    print(dict(happened))


# The database does not do its work -----------------------------------------------------------


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) << 10


def test_database_hangs_beyond_keepalive(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """QoS 1 stops at its window, a flood of QoS 0 at the buffer; both connections stay up."""
    keepalive = times(5, 10)
    common = {"IOT_MQTT_KEEPALIVE_SECONDS": str(keepalive)}
    one = make_collector(
        broker,
        database,
        IOT_MQTT_CLIENT_ID="one",
        IOT_MQTT_TOPICS="iot/#",
        IOT_MQTT_MAX_INFLIGHT="500",
        **common,
    ).start()
    nil = make_collector(
        broker,
        database,
        IOT_MQTT_CLIENT_ID="nil",
        IOT_MQTT_TOPICS="flood",
        IOT_BUFFER_BYTES=str(1 << 20),
        **common,
    ).start()
    flood = [("flood", b"%d:" % i + bytes(4000)) for i in range(10_000)]  # 40 MB
    size = len(flood[-1][1])
    publish(broker, flood[:10], qos=0)
    nil.wait_settled(10)
    before = resident(nil.pid)
    with Load(broker, rate=300) as load, contextlib.closing(database.connect()) as holder:
        load.more(100)
        well(one)
        with holder.cursor() as cursor:
            cursor.execute("LOCK TABLE messages IN ACCESS EXCLUSIVE MODE")
            publish(broker, flood[10:], qos=0)
            for collector in (one, nil):
                eventually(
                    lambda c=collector: (  # type: ignore[misc]
                        c.metrics()["oldest_unacked_message_seconds"] > 2.1 * keepalive
                    ),
                    what="a message has waited for more than twice the keepalive",
                )
                assert_balanced(collector.metrics())
                assert collector.get("/livez").status == 200
            waiting, grown = nil.metrics()["messages_in_flight"], resident(nil.pid) - before
            window = one.metrics()["messages_in_flight"]
            holder.rollback()
        # A message takes about 150 bytes besides its payload: the rest of its row, and objects.
        assert waiting * (size + 150) >= 1 << 20, "the buffer was full before reading stopped"
        assert waiting * 4000 <= 4 << 20, "about the buffer's size is held"
        assert grown < 20 << 20, f"{grown >> 20} MiB more for a flood of 40 MB"
        # Mosquitto before 2.0.21 sends more; then only the buffer bounds it, and the log says so.
        assert window > 100
        assert window <= 500 or "sends more un-acknowledged messages" in one.log()
        load.more(100)

        def over() -> bool:
            count = nil.metrics()["mqtt_messages_total"]
            time.sleep(1)
            return 0.5 * len(flood) <= count == nil.metrics()["mqtt_messages_total"]

        eventually(over, what="the flood goes on, and ends")
        well(one, nil)
        flooded = database.query("SELECT count(*) FROM messages WHERE topic = 'flood'")[0][0]
        assert nil.metrics()["mqtt_messages_total"] == flooded, "what was received is stored"
        database.query("DELETE FROM messages WHERE topic = 'flood'")
        nil.stop()
        complete(load, broker, database, one)
        assert one.metrics()["mqtt_reconnects_total"] == 0
    assert "no connection to broker" not in nil.log() + one.log()
    print(f"held: {waiting:.0f} at QoS 0, {window:.0f} at QoS 1; {grown >> 10} KiB more memory")


CUT_SESSIONS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = %s AND application_name = 'iot-collector'
"""


def test_no_connections_left_and_read_only(
    make_collector: MakeCollector, broker: Mosquitto, own_database: Database
) -> None:
    """Refused logins, then a server that has become a read-only one."""
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
                # Without a rest, or the collector is back in the place that it has just lost.
                with own.cursor() as cursor:
                    cursor.execute(CUT_SESSIONS, (own_database.name,))
                until = time.monotonic() + 0.5
                while time.monotonic() < until:
                    with contextlib.suppress(psycopg2.OperationalError):
                        taken.enter_context(contextlib.closing(own_database.connect()))
                return "too many clients" in str(collector.health()["database"]["error"])

            eventually(none_is_left, what="its connection has been taken by others")
            fails("too many clients")
            load.more(100)
        collector.wait_ready()
        load.more(100)
        server.query(f"ALTER DATABASE {own_database.name} SET default_transaction_read_only = on")
        own_database.query(CUT_SESSIONS, own_database.name)
        fails("read_only")
        load.more(100)
        server.query(f"ALTER DATABASE {own_database.name} RESET default_transaction_read_only")
        complete(load, broker, own_database, collector)


# The network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("silence", times(["none"], ["both", "up", "down", "stuck"]))
def test_network_to_broker(
    silence: str,
    make_collector: MakeCollector,
    make_proxy: Callable[[int], Proxy],
    broker: Mosquitto,
    database: Database,
) -> None:
    """Resets, silence that only keepalive notices, and a line that is slow."""
    random = dice()
    proxy = make_proxy(broker.port)
    settings = through(proxy, broker) | {"IOT_MQTT_KEEPALIVE_SECONDS": "5"}
    collector = make_collector(broker, database, **settings).start()
    with Load(broker, rate=300) as load:
        # Each doubles the longest wait before the next attempt, unless the connection lasted.
        for _ in range(times(1, 6)):
            load.more(random.randint(1, 300))
            proxy.cut()
            collector.wait_ready()
        load.more(100)
        if silence != "none":
            stay_silent(silence, proxy, collector)
        proxy.rate = 20_000  # bytes per second: what waits takes seconds
        load.more(times(100, 1000))
        proxy.rate = None
        complete(load, broker, database, collector)


def stay_silent(way: str, proxy: Proxy, collector: Collector) -> None:
    """Let nothing through until keepalive notices, then everything."""
    before = collector.metrics()["mqtt_reconnects_total"]
    if way in ("both", "up"):
        proxy.up = "drop"
    if way in ("both", "down"):
        proxy.down = "drop"
    if way == "stuck":
        proxy.up = proxy.down = "stuck"
    eventually(lambda: collector.get("/readyz").status == 503, what="silence is noticed")
    assert collector.get("/livez").status == 200
    proxy.up = proxy.down = "pass"
    proxy.cut()  # attempts that were swallowed
    eventually(lambda: collector.metrics()["mqtt_reconnects_total"] > before, what="it reconnects")


def test_network_to_database(
    make_collector: MakeCollector,
    make_proxy: Callable[[int], Proxy],
    broker: Mosquitto,
    database: Database,
) -> None:
    """Resets, a line that stands still for a while, one that swallows, and one that is slow."""
    random = dice()
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
            well(collector)
            load.more(random.randint(1, 300))
            proxy.up = proxy.down = "drop"
            waits()
            proxy.cut()
            proxy.up = proxy.down = "pass"
            collector.wait_ready()
        proxy.rate = 50_000
        load.more(times(100, 1000))
        proxy.rate = None
        complete(load, broker, database, collector)


# Several collectors --------------------------------------------------------------------------


@pytest.mark.parametrize("end", times(["killed"], ["killed", "stopped"]))
def test_two_with_one_client_id(
    end: str, make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """They take the session from each other, until one ends. It is a mistake, and loses nothing.

    What one has received and the other has stored may be stored twice.
    """
    first = make_collector(broker, database).start()
    with Load(broker, rate=300) as load:
        for _ in range(times(1, 5)):
            second = make_collector(broker, database).launch().wait_listening()
            for collector in (first, second, first):
                seen = collector.metrics()["mqtt_messages_total"]
                eventually(
                    lambda c=collector, n=seen: c.metrics()["mqtt_messages_total"] > n,  # type: ignore[misc]
                    what="it has the session",
                )
            if end == "killed":
                second.kill()
            else:
                assert second.stop() == 0
            first.wait_ready()
        found = complete(load, broker, database, first, doubles=load.sent)
    print(f"{found.total() - len(found)} doubles of {len(found)}")


def test_scale_out_and_in(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """1 → 3 → 1 members of a shared subscription, as a StatefulSet does it.

    One is killed in between; the highest ordinals are stopped first.
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

    def received(member: Collector) -> None:
        eventually(lambda: member.metrics()["mqtt_messages_total"], what="it has its share")

    with Load(broker) as load:
        for _ in range(times(1, 8)):
            load.more(100)
            for member in members[1:]:
                member.start()
                received(member)
            members[1].kill()
            load.more(100)
            members[1].start()
            received(members[1])
            for member in reversed(members[1:]):
                assert member.stop() == 0
                assert "session kept" not in member.log()
            load.more(100)
        assert members[0].stop() == 0
        load.more(100)  # waits for the first one, which comes back
        members[0].start()
        assert members[0].health()["broker"]["session_present"]
        complete(load, broker, database, members[0])


PLAIN, SHARED = "iot/data", "$share/collectors/iot/data"


class StatefulSet:
    """The collector's pods as processes, and what the controller does to them, in its order.

    With podManagementPolicy Parallel it makes, or ends, at once all pods that are too few or too
    many. It replaces a pod of an old template as soon as all with higher ordinals are ready.
    """

    def __init__(self, make: Callable[..., Collector]) -> None:
        self._make = make
        self.pods: list[Collector] = []

    def apply(self, replicas: int, filters: str) -> None:
        """Change the number of pods and their template; return when the roll-out is done."""
        old, condemned = self.pods[:replicas], self.pods[replicas:]
        for pod in condemned:
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
        for pod in condemned:
            assert pod.wait() == 0
            assert "session kept" not in pod.log()

    def wait_subscribed(self, database: Database) -> None:
        """Wait until the sessions have the filters of the template, and no others."""
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
def test_subscription_changes_its_form(
    replicas: int,
    version: str,
    make_collector: MakeCollector,
    broker: Mosquitto,
    database: Database,
) -> None:
    """Plain with one pod, shared with more or with an autoscaler, and back, under load."""
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
        found = complete(load, broker, database, *pods.pods)
    print(f"{len(found)} messages, {rate:.0f}/s")


@pytest.mark.parametrize(
    "moment",
    times(
        ["replacement granted"],
        ["replacement asked for", "replacement granted", "old filter given up"],
    ),
)
def test_killed_while_the_subscription_changes_its_form(
    moment: str, make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """Nothing is lost. Between SUBSCRIBE and UNSUBSCRIBE the session has both forms.

    What comes before the next process has changed them may be stored twice.
    """
    pods = StatefulSet(lambda **settings: make_collector(broker, database, **settings))
    pods.apply(1, PLAIN)
    pod = pods.pods[0]
    doubles: set[bytes] = set()
    with Load(broker, rate=times(500, 2000)) as load:
        for filters in (SHARED, PLAIN) * times(1, 5):
            load.more(100)
            assert pod.stop() == 0
            pod.settings["IOT_MQTT_TOPICS"] = filters
            before = load.sent.copy()
            assert with_fault(pod, moment).launch().wait() == -signal.SIGKILL, pod.log()
            without_fault(pod).start()
            pods.wait_subscribed(database)
            doubles |= load.sent - before
            load.more(100)
        found = complete(load, broker, database, pod, doubles=doubles)
    print(f"{found.total() - len(found)} doubles of {len(found)}")


# The clock -----------------------------------------------------------------------------------


def test_clock_jumps(make_collector: MakeCollector, broker: Mosquitto, database: Database) -> None:
    """A year ahead, for which there is no partition, and back."""
    collector = with_fault(make_collector(broker, database), "clock").start()
    years = "SELECT count(DISTINCT date_trunc('month', received_at)) FROM messages"
    future = "SELECT count(*) FROM messages WHERE received_at > now() + interval '300 days'"
    with Load(broker) as load:
        for _ in range(times(1, 5)):
            load.more(100)
            ahead = database.query(future)[0][0]
            collector.signal(signal.SIGUSR1)
            eventually(lambda n=ahead: database.query(future)[0][0] > n, what="a year ahead")  # type: ignore[misc]
            load.more(100)
            collector.signal(signal.SIGUSR2)
            load.more(100)
        complete(load, broker, database, collector)
    assert database.query(years)[0][0] >= 2
    assert collector.metrics()["mqtt_reconnects_total"] == 0
    assert database.count("dead_letters") == 0


# The broker ----------------------------------------------------------------------------------


def saved_at(broker: Mosquitto) -> float:
    """When the broker last saved its state."""
    file = broker.folder / "mosquitto.db"
    return file.stat().st_mtime if file.exists() else 0.0


def save(broker: Mosquitto) -> None:
    """Have the broker save its state now."""
    before = saved_at(broker)
    broker.signal(signal.SIGUSR1)
    eventually(lambda: saved_at(broker) > before, what="the broker saves")


def test_broker_restarted(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """In order: it saves everything, and nothing is lost."""
    random = dice()
    collector = make_collector(broker, database).start()
    with Load(broker) as load:
        for _ in range(times(2, 20)):
            load.more(random.randint(1, 500))
            assert broker.stop() == 0
            broker.start()
        complete(load, broker, database, collector)


def test_broker_killed(
    make_collector: MakeCollector, make_broker: MakeBroker, database: Database
) -> None:
    """It loses what it had neither saved nor delivered; nothing else, and nothing that arrived.

    What was still queued when it saved, and delivered after that, it sends again as new.
    """
    random = dice()
    interval = times(1, 3)
    broker = make_broker(f"autosave_interval {interval}").start()
    collector = make_collector(broker, database).start()
    gaps: list[tuple[float, float]] = []
    doubles: set[bytes] = set()

    def at_risk() -> set[bytes]:
        """What was acknowledged after a save and before the kill that followed."""
        known = load.acknowledged.copy().items()
        return {p for p, at in known if any(saved <= at <= killed for saved, killed in gaps)}

    save(broker)
    with Load(broker) as load:
        for n in range(times(2, 10)):
            if n % 2:
                collector.stop()  # what is published waits in the broker
                load.more(random.randint(1, 200))
                before = saved_at(broker)
                eventually(lambda b=before: saved_at(broker) > b, what="it saves")  # type: ignore[misc]
            load.more(random.randint(1, int(1500 * interval)))
            broker.kill()
            # Saving takes a while on a busy machine, and so do the last acknowledgements on their
            # way to the publisher.
            gaps.append((saved_at(broker) - 0.5, time.time() + 0.5))
            doubles |= load.sent
            broker.start()
            if not collector.running:
                collector.start()
            collector.wait_ready()
            load.more(10)
        found = complete(load, broker, database, collector, lost=at_risk, doubles=doubles)
    lost = len(load.acknowledged.keys() - found.keys())
    doubled = found.total() - len(found)
    print(
        f"{len(load.acknowledged)} acknowledged, {lost} lost, {doubled} doubles; at risk: "
        + ", ".join(f"{killed - saved:.1f} s" for saved, killed in gaps)
    )


def test_queue_of_a_killed_broker(
    make_collector: MakeCollector, make_broker: MakeBroker, database: Database
) -> None:
    """After the kill it sends again, without DUP, what it had saved as queued, stored or not.

    That is stored again, because it may be a new message: a double is better than a loss.
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
    assert metrics["mqtt_messages_total"] == 100, "all 50 that were queued came again"
    assert metrics["db_duplicates_total"] == 0
    assert stored(database) == Counter({p: 1 + (n >= 50) for n, (_, p) in enumerate(messages)})


BLOCKED = "LOCK TABLE messages IN ACCESS EXCLUSIVE MODE"


LOSS = pytest.mark.xfail(
    strict=True,
    reason="equal to a stored message, under its id, and with DUP: taken for it (ADR 1)",
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
def test_packet_ids_of_a_killed_broker(
    contents: str,
    committed: int,
    make_collector: MakeCollector,
    make_broker: MakeBroker,
    database: Database,
) -> None:
    """A killed broker counts packet ids on from its last save: new messages get ids of stored ones.

    If the collector is then killed with such messages received and not stored, they come with DUP.
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
        cursor.execute(BLOCKED)
        publish(broker, messages[30 + committed :])
        eventually(
            lambda: collector.metrics()["mqtt_messages_total"] == 40, what="all are received"
        )
        collector.kill()
    collector.start()
    collector.wait_settled(10 - committed)
    assert database.count() == 40


@pytest.mark.skipif(not FULL, reason="sends 65 535 messages; in make test-faults")
def test_equal_messages_when_packet_ids_are_reused(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """After 65 535 messages the ids are those of stored ones, and so are the messages."""
    collector = make_collector(broker, database).start()
    assert collector.stop() == 0
    many = 65_535
    publish(broker, [("iot/data", b"temperature:23")] * many)  # waits in the broker
    collector.start()
    collector.wait_settled(many)
    batches = database.query("SELECT count(*) FROM ledger")[0][0]
    with contextlib.closing(database.connect()) as holder, holder.cursor() as cursor:
        cursor.execute(BLOCKED)
        publish(broker, [("iot/data", b"temperature:23")] * 100)
        eventually(
            lambda: collector.metrics()["mqtt_messages_total"] == many + 100, what="received"
        )
        collector.kill()
    collector.start()
    collector.wait_settled(100)
    assert database.count() == many + 100, f"{batches} batches in the ledger"
