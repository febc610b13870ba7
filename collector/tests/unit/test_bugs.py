"""Bugs in the collector are logged with a traceback and counted, and no message is lost."""

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

# Built-in bug (see faulty_collector.py) -> the metric that counts it.
WRITER, NETWORK = 'db_errors_total{kind="bug"}', 'mqtt_errors_total{kind="bug"}'
BUGS = {
    "bug in the writer thread": WRITER,
    "bug while copying": WRITER,
    "misuse of psycopg2": WRITER,
    "use of a closed cursor": WRITER,
    "bug in the network thread": NETWORK,
    "bug in a callback of paho": NETWORK,
}


QUEUED = [b"n:%d" % n for n in range(50)]


def queue_messages(collector: Collector, broker: Mosquitto) -> Collector:
    """Stop a collector after its first start, and publish messages that the broker queues."""
    collector.start()
    assert collector.stop() == 0
    publish(broker, [("iot/data", payload) for payload in QUEUED])
    return collector


def with_bug(collector: Collector, bug: str, times: int) -> Collector:
    collector.command = lambda: [sys.executable, LAUNCHER, bug, str(times)]  # type: ignore[method-assign]
    return collector


@pytest.mark.parametrize("bug", BUGS)
def test_messages_are_stored_once_after_a_temporary_bug(
    bug: str, make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """The bug occurs three times. Each time it is logged and counted."""
    collector = queue_messages(make_collector(broker, database), broker)
    with_bug(collector, bug, 3).launch().wait_listening()
    collector.wait_settled(50)
    eventually(lambda: database.count() == 50, what="all is stored")
    assert sorted(database.payloads()) == sorted(QUEUED), "each once"
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
        assert "faulty_collector.py" in event["exception"], "the traceback has the location"
    assert collector.get("/livez").status == 200, "the bug no longer occurs"


@pytest.mark.parametrize(
    ("bug", "thread"),
    [("bug in the writer thread", "writer"), ("bug in the network thread", "network")],
)
def test_permanent_bug_fails_the_liveness_probe(
    bug: str,
    thread: str,
    make_collector: MakeCollector,
    broker: Mosquitto,
    database: Database,
) -> None:
    """A restart may help, so /livez fails. Without a probe, the process exits by itself."""
    collector = queue_messages(make_collector(broker, database), broker)
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
    assert collector.wait() == 1, "the process exits by itself"
    assert collector.events()[-1]["event"] == "exiting to be restarted"
    collector.__dict__.pop("command")
    collector.start().wait_settled(50)
    assert database.count() == 50


def test_bug_after_the_commit_ends_the_process(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """A retry would store the batch twice. A new process finds the batch in the ledger."""
    collector = queue_messages(make_collector(broker, database), broker)
    with_bug(collector, "bug after the commit", 1).launch()
    assert collector.wait() == 1
    # The thread may end before or after the event "collector started".
    (death,) = (e for e in collector.events() if e["event"] == "a bug ended a thread")
    end = collector.events()[-1]
    assert death["thread"] == "writer"
    assert "a bug for the test" in death["exception"]
    assert end["problems"] == ["thread writer is dead"]
    collector.__dict__.pop("command")
    assert collector.start().wait_settled(50)["db_duplicates_total"] > 0
    assert sorted(database.payloads()) == sorted(QUEUED), "each once"


def test_hanging_writer_fails_the_liveness_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """/livez fails when the writer makes no progress for far longer than the database timeout."""
    settings, buffer, metrics = Settings(database_timeout_seconds=10), Buffer(max_bytes=1), Mock()
    network = Mock(
        is_alive=lambda: True, last_progress=math.inf, progress_timeout=60.0, consecutive_bugs=0
    )
    writer = WriterThread(settings, buffer, metrics, lambda _items: None)
    health = Health(settings, buffer, network, writer)
    hanging, resume = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        hanging.set()
        resume.wait()
        raise psycopg2.OperationalError("for the test")

    def problems_after(seconds: float) -> list[str]:
        later = Mock(monotonic=lambda: writer.last_progress + seconds)
        monkeypatch.setattr("iot_collector.health.time", later)
        problems = health.live()["problems"]
        assert isinstance(problems, list)
        return problems

    monkeypatch.setattr("iot_collector.store.connect", hang)
    writer.start()
    try:
        assert hanging.wait(PATIENCE)
        assert problems_after(0) == []
        assert problems_after(3 * settings.database_timeout_seconds) == [], "the database is slow"
        assert problems_after(1000) == ["thread writer hangs"]
    finally:
        buffer.close()
        resume.set()
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
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the kind is checked below
        step(database)
    assert not getattr(caught.value, "pgcode", None)
    assert kind_of(caught.value) == KINDS[step]
    assert ("is PostgreSQL running?" in explain(caught.value)) == (KINDS[step] == "connection")


# Races -------------------------------------------------------------------------------------------


def test_connected_is_false_when_the_connection_ends_meanwhile() -> None:
    """The network thread can set the connection to None between two accesses of a reader."""

    class EndingNetwork(NetworkThread):
        accesses = 0

        @property
        def connection(self) -> Connection | None:
            self.accesses += 1
            return Mock() if self.accesses == 1 else None

        @connection.setter
        def connection(self, value: Connection | None) -> None:
            pass

    network = EndingNetwork(Settings(), Buffer(max_bytes=1), Mock())
    network.subscriptions.active = True
    try:
        assert network.connected
        assert not network.connected
    finally:
        network._wake_reader.close()
        network._wake_writer.close()


def test_dict_of_refused_subscriptions_is_replaced_not_changed() -> None:
    """Another thread may iterate over it; a dict that changes meanwhile raises an error."""
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
