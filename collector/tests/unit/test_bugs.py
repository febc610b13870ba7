"""Bugs in the collector itself: logged with their traceback, counted, and nothing is lost."""

import math
import sys
import threading
from collections.abc import Callable
from unittest.mock import Mock

import psycopg2
import pytest
from iot_collector.buffer import Buffer
from iot_collector.connection import Connection
from iot_collector.database import explain, kind_of
from iot_collector.health import Health
from iot_collector.network import NetworkThread
from iot_collector.settings import Settings
from iot_collector.subscriptions import Subscriptions, _Request
from iot_collector.writer import WriterThread

from testing.collector import FAULTY_COLLECTOR, Collector, assert_balanced
from testing.mosquitto import Mosquitto
from testing.postgres import Database
from testing.publisher import publish
from testing.service import PATIENCE, eventually

LAUNCHER = str(FAULTY_COLLECTOR)

MakeCollector = Callable[..., Collector]

# What is built in (see faulty_collector.py) -> the metric that counts it.
WRITER, NETWORK = 'db_errors_total{kind="bug"}', 'mqtt_errors_total{kind="bug"}'
BUGS = {
    "bug in the writer thread": WRITER,
    "bug while copying": WRITER,
    "misuse of psycopg2": WRITER,
    "use of a closed cursor": WRITER,
    "bug in the network thread": NETWORK,
    "bug in a callback of paho": NETWORK,
}


WAITING = [b"n:%d" % n for n in range(50)]


def with_waiting_messages(collector: Collector, broker: Mosquitto) -> Collector:
    """Have the broker queue messages for a collector, which is stopped."""
    collector.start()
    assert collector.stop() == 0
    publish(broker, [("iot/data", payload) for payload in WAITING])
    return collector


def with_bug(collector: Collector, bug: str, times: int) -> Collector:
    collector.command = lambda: [sys.executable, LAUNCHER, bug, str(times)]  # type: ignore[method-assign]
    return collector


@pytest.mark.parametrize("bug", BUGS)
def test_bug(
    bug: str, make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """It happens three times, and is over: all is stored, and it is known what happened."""
    collector = with_waiting_messages(make_collector(broker, database), broker)
    with_bug(collector, bug, 3).launch().wait_listening()
    collector.wait_settled(50)
    eventually(lambda: database.count() == 50, what="all is stored")
    assert sorted(database.payloads()) == sorted(WAITING), "each once"
    collector.wait_ready()
    metrics = collector.metrics()
    assert_balanced(metrics)
    for metric in (WRITER, NETWORK):
        assert metrics[metric] == (3 if metric == BUGS[bug] else 0)
    logged = [e for e in collector.events() if "a bug for the test" in e.get("exception", "")]
    assert len(logged) == 3
    for event in logged:
        assert event["level"] == "error"
        assert "Traceback" in event["exception"]
        assert "faulty_collector.py" in event["exception"], "where it happened"
    assert collector.get("/livez").status == 200, "it is over"


@pytest.mark.parametrize(
    ("bug", "thread"),
    [("bug in the writer thread", "writer"), ("bug in the network thread", "network")],
)
def test_bug_again_and_again(
    bug: str,
    thread: str,
    make_collector: MakeCollector,
    broker: Mosquitto,
    database: Database,
) -> None:
    """A restart may help, so /livez fails; nothing is lost by it."""
    collector = with_waiting_messages(make_collector(broker, database), broker)
    with_bug(collector, bug, 1000).launch().wait_listening()

    def failing() -> bool:
        answer = collector.get("/livez")
        return answer.status == 503 and any(
            thread in problem and "a bug for the test" in problem
            for problem in answer.json()["problems"]
        )

    eventually(failing, what=f"/livez fails\n{collector.log()[-2000:]}")
    assert_balanced(collector.metrics())
    collector.kill()
    with_bug(collector, f"{bug}, and it ends", 1000).launch()
    assert collector.wait() == 1, "where there is no probe, it ends itself"
    assert collector.events()[-1]["event"] == "exiting to be restarted"
    collector.__dict__.pop("command")
    collector.start().wait_settled(50)
    assert database.count() == 50


def test_bug_after_the_commit(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """To try again would store the batch twice; a new process knows it from the ledger."""
    collector = with_waiting_messages(make_collector(broker, database), broker)
    with_bug(collector, "bug after the commit", 1).launch()
    assert collector.wait() == 1
    death, end = collector.events()[-2:]
    assert death["event"] == "a bug ended a thread"
    assert death["thread"] == "writer"
    assert "a bug for the test" in death["exception"]
    assert end["problems"] == ["thread writer is dead"]
    collector.__dict__.pop("command")
    assert collector.start().wait_settled(50)["db_duplicates_total"] > 0
    assert sorted(database.payloads()) == sorted(WAITING), "each once"


def test_writer_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """/livez fails when it has made no step for far longer than a database may make it wait."""
    settings, buffer, metrics = Settings(database_timeout_seconds=10), Buffer(max_bytes=1), Mock()
    network = Mock(
        is_alive=lambda: True, last_progress=math.inf, progress_timeout=60.0, consecutive_bugs=0
    )
    writer = WriterThread(settings, buffer, metrics, lambda _items: None)
    health = Health(settings, buffer, network, writer)
    hangs, go_on = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        hangs.set()
        go_on.wait()
        raise psycopg2.OperationalError("for the test")

    def live_after(seconds: float) -> list[str]:
        later = Mock(monotonic=lambda: writer.last_progress + seconds)
        monkeypatch.setattr("iot_collector.health.time", later)
        problems = health.live()["problems"]
        assert isinstance(problems, list)
        return problems

    monkeypatch.setattr("iot_collector.store.connect", hang)
    writer.start()
    try:
        assert hangs.wait(PATIENCE)
        assert live_after(0) == []
        assert live_after(3 * settings.database_timeout_seconds) == [], "the database is slow"
        assert live_after(1000) == ["thread writer hangs"]
    finally:
        buffer.close()
        go_on.set()
        writer.stop(PATIENCE)
    assert not writer.is_alive()


# psycopg2's errors without an SQLSTATE -----------------------------------------------------------


def closed_connection(database: Database) -> None:
    connection = database.connect()
    connection.close()
    connection.cursor()


def terminated(database: Database) -> None:
    connection = database.connect()
    with connection.cursor() as cursor:
        database.query("SELECT pg_terminate_backend(%s)", connection.info.backend_pid)
        cursor.execute("SELECT 1")


def adapt(database: Database) -> None:
    with database.connect().cursor() as cursor:
        cursor.execute("SELECT %s", (object(),))


def fetch_nothing(database: Database) -> None:
    with database.connect().cursor() as cursor:
        cursor.execute("SET statement_timeout = 0")
        cursor.fetchone()


def too_few_values(database: Database) -> None:
    with database.connect().cursor() as cursor:
        cursor.execute("SELECT %s, %s", (1,))


def refused(_database: Database) -> None:
    psycopg2.connect("host=127.0.0.1 port=1")


def wrong_password(database: Database) -> None:
    database.server.connect(password="wrong")


KINDS = {
    closed_connection: "bug",  # Store opens a new one when its own is closed
    terminated: "connection",
    adapt: "bug",
    fetch_nothing: "bug",
    too_few_values: "bug",
    refused: "connection",
    wrong_password: "authentication",
}


@pytest.mark.parametrize("step", KINDS)
def test_kind_of_an_error_without_sqlstate(
    step: Callable[[Database], None], database: Database
) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - its kind is what is asked
        step(database)
    assert not getattr(caught.value, "pgcode", None)
    assert kind_of(caught.value) == KINDS[step]
    assert ("is PostgreSQL running?" in explain(caught.value)) == (KINDS[step] == "connection")


# Races -------------------------------------------------------------------------------------------


def test_connection_ends_while_another_thread_asks() -> None:
    """The network thread takes the connection away between any two looks at it."""

    class Ending(NetworkThread):
        looks = 0

        @property
        def connection(self) -> Connection | None:
            self.looks += 1
            return Mock() if self.looks == 1 else None

        @connection.setter
        def connection(self, value: Connection | None) -> None:
            pass

    network = Ending(Settings(), Buffer(max_bytes=1), Mock())
    network.subscriptions.active = True
    try:
        assert network.connected
        assert not network.connected
    finally:
        network._wake_reader.close()
        network._wake_writer.close()


def test_refused_subscriptions_change_while_another_thread_reads() -> None:
    """They are replaced, never changed: a dict that grows while it is printed is an error."""
    subscriptions = Subscriptions(Settings(mqtt_topics=["a", "b"]))
    subscriptions._requests = {1: _Request(["a", "b"], [])}
    before = subscriptions.refused
    seen: list[dict[str, str]] = []

    class Reason:
        @property
        def is_failure(self) -> bool:
            seen.append(dict(subscriptions.refused))
            return True

    subscriptions.handle_suback(1, [Reason(), Reason()])  # type: ignore[list-item]
    assert seen == [before, before]
    assert set(subscriptions.refused) == {"a", "b"}
