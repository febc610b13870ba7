"""Real broker, collector and database: every acknowledged message is stored exactly once."""

import base64
import contextlib
import json
import random
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from testing.certificates import make_certificates
from testing.collector import Collector, assert_balanced
from testing.mosquitto import DynamicSecurity, Mosquitto, write_passwords
from testing.postgres import Database, Letter, Postgres, Row
from testing.proxy import Proxy
from testing.publisher import Stream, publish
from testing.service import HOST, eventually

MakeCollector = Callable[..., Collector]
MakeBroker = Callable[..., Mosquitto]


def numbered(count: int, topic: str = "iot/data", start: int = 0) -> list[tuple[str, bytes]]:
    return [(topic, b"n:%d" % i) for i in range(start, start + count)]


def payloads(messages: list[tuple[str, bytes]]) -> list[bytes]:
    return [payload for _, payload in messages]


def each_once(database: Database, acknowledged: set[bytes]) -> None:
    """Assert that what the broker acknowledged is stored, each message once."""
    stored = database.payloads()
    assert len(stored) == len(set(stored)), f"{len(stored) - len(set(stored))} doubles"
    assert set(stored) >= acknowledged, f"{len(acknowledged - set(stored))} lost"


def settled(collector: Collector, database: Database, acknowledged: set[bytes]) -> None:
    """Wait until everything is stored, then assert `each_once`."""
    eventually(
        lambda: database.count() + database.count("dead_letters") >= len(acknowledged),
        what=f"{len(acknowledged)} messages are stored\n{collector.log()[-2000:]}",
    )
    eventually(lambda: not collector.metrics()["messages_in_flight"], what="nothing is in flight")
    assert_balanced(collector.metrics())
    each_once(database, acknowledged)


def problem(collector: Collector, text: str, path: str = "/readyz") -> None:
    """Wait until the collector says that it has a problem, naming ``text``."""

    def says_so() -> bool:
        answer = collector.get(path)
        return answer.status == 503 and text in " ".join(answer.json()["problems"])

    eventually(says_so, what=f"{path} says {text!r}\n{collector.log()[-2000:]}")
    assert collector.get("/livez").status == 200, "no reason to restart"


@contextlib.contextmanager
def limited_user(database: Database, **options: str) -> Iterator[Database]:
    """The database as a user that may do what the collector needs, and nothing more."""
    role = f"{database.name}_collector"
    database.query(f"CREATE ROLE {role} LOGIN PASSWORD 'first'")
    database.query(
        f"GRANT INSERT ON messages, dead_letters, dead_letters_fallback TO {role};"
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ledger, sessions, message_ids TO {role};"
        f"GRANT EXECUTE ON FUNCTION ensure_partitions TO {role}"
    )
    yield Database(database.server, database.name, role, "first")
    database.query(f"DROP OWNED BY {role}")


def cut(database: Database) -> None:
    """End the sessions of all collectors on the database."""
    database.query(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = %s AND application_name = 'iot-collector'",
        database.name,
    )


# Content -------------------------------------------------------------------------------------


DEEP = [b'{"a":' * 300 + b"1" + b"}" * 300, b"[" * 300 + b"]" * 300]
BAD: list[tuple[bytes, Any]] = [
    (b"temperature:23", {"temperature": 23}),
    (b"", None),
    (b"temperature:", None),
    (b":5", None),
    (b"temperature:abc", {"temperature": "abc"}),
    (b"temperature:NaN", {"temperature": "NaN"}),
    (b"temperature:1e999", {"temperature": "1e999"}),
    # Valid for JSON, but beyond PostgreSQL's numeric: stored without fields.
    (b"temperature:1e-20000", None),
    (b'{"temperature":1e-20000}', None),
    (b"temperature:" + b"9" * 300, {"temperature": int("9" * 300)}),
    (b"just text", "just text"),
    (b"\x00", None),
    (b"temperature:\x0023", None),
    (b"\xff\xfe\xfd", None),
    (b"name:\xe9", None),
    (b'{"a":', None),
    (b'{"a":NaN}', None),
    (b'{"a":Infinity}', None),
    (b'{"a":1e400}', None),
    (b'{"a":"\\u0000"}', None),
    (b'{"a":"\\ud800"}', None),
    (b'{"a":1,"a":2}', {"a": 2}),
    (b'{"a":{"b":1}}', {"a": {"b": 1}}),
    (b'{"a":[1]}', {"a": [1]}),
    (b"[1,{}]", [1, {}]),
    (b"23.5", 23.5),
    (b"on", "on"),
    (b"1e-20000", None),
    (b"'a':1", "'a':1"),
    *((payload, json.loads(payload)) for payload in DEEP),
    (b"[" * 10_000, None),
    (b'{"a":' * 10_000, None),
    (b"null", None),
    (b"'); DROP TABLE messages; --", "'); DROP TABLE messages; --"),
    (b"x" * (128 << 10), None),
    (b"a:x" + b" " * (127 << 10) + b"x", {"a": "x" + " " * (127 << 10) + "x"}),
    (bytes(range(256)) * 512, None),
    (b"last:1", {"last": 1}),
]


def test_every_payload_is_stored(
    collector: Collector, broker: Mosquitto, database: Database
) -> None:
    publish(broker, [("iot/data", payload) for payload, _ in BAD])
    metrics = collector.wait_settled(len(BAD))
    rows = database.rows()
    assert [row.payload for row in rows] == [payload for payload, _ in BAD], "all, raw, in order"
    assert [row.fields for row in rows] == [fields for _, fields in BAD]
    assert metrics["db_inserts_total"] == len(BAD)
    assert database.dead_letters() == []
    assert collector.get("/health").status == 200


TOPICS = [
    "/",
    "//",
    "a//b",
    " ",
    " spaces / around ",
    "ü/☃/𝄞",
    "\ufeffbom",
    "e\u0301",  # stays decomposed
    "quote\"'/back\\slash",
    "tab-free/%s/{}/$1",
    "x" * 2000,
    "\\N",
]


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_every_topic_is_stored(
    version: str, make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    collector = make_collector(broker, database, IOT_MQTT_VERSION=version).start()
    publish(broker, [(topic, b"x") for topic in TOPICS])
    collector.wait_settled(len(TOPICS))
    assert [row.topic for row in database.rows()] == TOPICS


def test_topic_too_long_for_the_index(
    collector: Collector, broker: Mosquitto, database: Database
) -> None:
    topic = "t/" + random.Random(1).randbytes(8000).hex()  # random: it does not compress
    publish(broker, [*numbered(50), (topic, b"long"), *numbered(50, start=50)])
    metrics = collector.wait_settled(101)
    assert database.payloads() == payloads(numbered(100))
    (letter,) = database.dead_letters()
    assert (letter.topic, letter.payload) == (topic.encode(), b"long")
    assert letter.sqlstate.startswith("54")
    assert metrics['db_dead_letters_total{reason="too_large"}'] == 1


TRIGGER = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF NEW.payload = 'poison' THEN RAISE EXCEPTION 'no poison here' {using}; END IF;
    RETURN NEW;
END $$;
CREATE {kind} TRIGGER refuse {when} INSERT ON messages {deferred}
    FOR EACH ROW EXECUTE FUNCTION refuse();
"""
REFUSALS = {
    "check": (
        "ALTER TABLE messages ADD CONSTRAINT no_poison CHECK (payload <> 'poison'::bytea)",
        "23514",
        "constraint",
    ),
    "trigger": (
        TRIGGER.format(using="", kind="", when="BEFORE", deferred=""),
        "P0001",
        "refused",
    ),
    "at commit": (
        TRIGGER.format(
            using="USING ERRCODE = 'check_violation'",
            kind="CONSTRAINT",
            when="AFTER",
            deferred="DEFERRABLE INITIALLY DEFERRED",
        ),
        "23514",
        "constraint",
    ),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_refused_row(
    kind: str, make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    sql, sqlstate, reason = REFUSALS[kind]
    database.query(sql)
    # A long linger, so that the refused row is in the middle of a batch.
    collector = make_collector(broker, database, IOT_BATCH_LINGER_MS="200").start()
    messages = numbered(100)
    publish(broker, [*messages[:40], ("iot/poison", b"poison"), *messages[40:]])
    metrics = collector.wait_settled(101)
    assert database.payloads() == payloads(messages), "the rest, in order"
    (letter,) = database.dead_letters()
    assert letter == Letter(b"iot/poison", b"poison", 1, False, letter.reason, sqlstate)
    assert "poison" in letter.reason
    assert metrics["db_inserts_total"] == 100
    assert metrics[f'db_dead_letters_total{{reason="{reason}"}}'] == 1
    assert collector.get("/health").status == 200
    publish(broker, numbered(10, start=100))
    collector.wait_settled(111)
    assert database.count() == 110, "the flow goes on"


DEFERRED = TRIGGER.format(
    using="", kind="CONSTRAINT", when="AFTER", deferred="DEFERRABLE INITIALLY DEFERRED"
)
TWICE_REFUSED = {
    "check": "ALTER TABLE messages ADD CHECK (payload <> 'poison'::bytea);"
    "ALTER TABLE dead_letters ADD CHECK (payload <> 'poison'::bytea)",
    "trigger": DEFERRED
    + "CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON dead_letters DEFERRABLE INITIALLY DEFERRED"
    " FOR EACH ROW EXECUTE FUNCTION refuse()",
}


@pytest.mark.parametrize("kind", TWICE_REFUSED)
def test_row_refused_by_dead_letters_too(
    kind: str, make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """A constraint on dead_letters: the message goes to the fallback table, and others follow."""
    database.query(TWICE_REFUSED[kind])
    poison = Properties(PacketTypes.PUBLISH)
    poison.UserProperty = [("site", "a")]
    with limited_user(database) as user:
        collector = make_collector(broker, user, IOT_BATCH_LINGER_MS="200").start()
        metric = 'db_dead_letters_total{reason="refused_twice"}'
        assert collector.metrics()[metric] == 0, "from the start, so that an increase is seen"
        publish(broker, numbered(10))
        publish(broker, [("iot/poison", b"poison")], properties=poison)
        publish(broker, numbered(10, start=10))
        metrics = collector.wait_settled(21)
        assert database.payloads() == payloads(numbered(20)), "the rest, in order"
        assert database.count("dead_letters") == 0
        ((topic, payload, properties, reason, second),) = database.query(
            "SELECT topic, payload, properties, reason, refusal FROM dead_letters_fallback"
        )
        assert (bytes(topic), bytes(payload)) == (b"iot/poison", b"poison")
        assert json.loads(bytes(properties)) == {"user": {"site": ["a"]}}
        assert "messages" in reason or "no poison here" in reason
        assert "dead_letters" in second or "no poison here" in second
        assert metrics[metric] == 1
        health = collector.get("/health")
        assert health.status == 200
        assert "dead_letters_fallback" in " ".join(health.json()["warnings"])
        (event,) = [e for e in collector.events() if "dead_letters_fallback" in e["event"]]
        assert event["level"] == "error"
        assert event["topic"] == "b'iot/poison'"
        collector.close()


def test_dead_letters_that_cannot_be_written_are_retried(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """If the table and not the message is at fault, the collector waits until it is repaired."""
    database.query("ALTER TABLE messages ADD CHECK (payload <> 'poison'::bytea)")
    with limited_user(database) as user:
        database.query(f"REVOKE INSERT ON dead_letters FROM {user.user}")
        collector = make_collector(broker, user).start()
        publish(broker, [("iot/data", b"poison")])
        problem(collector, "permission denied for table dead_letters", "/health")
        assert database.count("dead_letters_fallback") == 0
        database.query(f"GRANT INSERT ON dead_letters TO {user.user}")
        collector.wait_settled(1)
        assert [letter.payload for letter in database.dead_letters()] == [b"poison"]
        collector.close()


def test_row_refused_with_a_custom_sqlstate(
    collector: Collector, broker: Mosquitto, database: Database
) -> None:
    using = "USING ERRCODE = 'IOT01'"
    database.query(TRIGGER.format(using=using, kind="", when="BEFORE", deferred=""))
    publish(broker, [("iot/data", b"good"), ("iot/data", b"poison"), ("iot/data", b"good")])
    collector.wait_settled(3, timeout=3)
    assert [letter.sqlstate for letter in database.dead_letters()] == ["IOT01"]


def test_missing_partition_is_not_a_data_error(
    collector: Collector, broker: Mosquitto, database: Database
) -> None:
    """A row without a partition waits until there is one; it is no dead letter."""
    publish(broker, numbered(1))  # creates today's partitions
    collector.wait_settled(1)
    for (partition,) in database.query("SELECT inhrelid::regclass::text FROM pg_inherits"):
        if len(partition) == len("messages_2026_11"):
            database.query(f"ALTER TABLE messages DETACH PARTITION {partition}")
            database.query(f"DROP TABLE {partition}")
    publish(broker, numbered(10, start=1))
    collector.wait_settled(11)
    assert database.payloads() == payloads(numbered(10, start=1))
    assert database.dead_letters() == []


def test_whole_batch_refused(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    database.query("ALTER TABLE messages ADD CONSTRAINT nothing CHECK (qos = 0)")
    collector = make_collector(broker, database, IOT_BATCH_LINGER_MS="100").start()
    publish(broker, numbered(33))
    collector.wait_settled(33)
    assert [letter.payload for letter in database.dead_letters()] == payloads(numbered(33))
    assert database.count() == 0


def test_properties(collector: Collector, broker: Mosquitto, database: Database) -> None:
    properties = Properties(PacketTypes.PUBLISH)
    properties.UserProperty = [("unit", "°C"), ("site", "a"), ("site", "b")]
    properties.ContentType = "text/plain"
    properties.ResponseTopic = "answers/1"
    properties.CorrelationData = b"\x00\xff"
    properties.PayloadFormatIndicator = 1
    properties.MessageExpiryInterval = 600
    publish(broker, [("iot/data", b"with")], properties=properties)
    publish(broker, [("iot/data", b"without")])
    collector.wait_settled(2)
    with_properties, without = database.rows()
    assert with_properties.properties == {
        "ContentType": "text/plain",
        "ResponseTopic": "answers/1",
        "CorrelationData": "AP8=",
        "PayloadFormatIndicator": 1,
        "user": {"unit": ["°C"], "site": ["a", "b"]},
    }
    assert without.properties is None


@pytest.mark.parametrize("text", ["\ufffd", "☃𝄞", "e\u0301", "", "x" * 60_000])
def test_property_text(
    text: str, collector: Collector, broker: Mosquitto, database: Database
) -> None:
    """A message that ended the connection would be sent again for ever."""
    properties = Properties(PacketTypes.PUBLISH)
    properties.UserProperty = [("name", text), (text, "value")]
    publish(broker, [("iot/data", b"x")], properties=properties)
    collector.wait_settled(1)
    (row,) = database.rows()
    assert row.properties == {"user": {"name": [text], text: ["value"]}}


def test_property_that_paho_refuses(
    collector: Collector, broker: Mosquitto, database: Database
) -> None:
    """MQTT 5 §1.5.4 allows U+FEFF and paho does not: the message is kept, its properties raw."""
    properties = Properties(PacketTypes.PUBLISH)
    properties.UserProperty = [("name", "\ufeffbom")]
    publish(broker, [("iot/data", b"x")], properties=properties)
    collector.wait_settled(1)
    (row,) = database.rows()
    raw = properties.pack()
    assert row.properties == {"Unreadable": base64.b64encode(raw).decode()}


def test_qos_and_retain(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    publish(broker, [("state/1", b"old")], retain=True)
    collector = make_collector(broker, database, IOT_MQTT_QOS="2").start()
    for qos in (0, 1, 2):
        publish(broker, [(f"q/{qos}", b"x")] * 10, qos=qos)
    metrics = collector.wait_settled(31)
    rows = database.rows()
    assert rows[0] == Row("state/1", b"old", 1, True, "old", None)
    assert [row.qos for row in rows[1:]] == [0] * 10 + [1] * 10 + [2] * 10
    assert not any(row.retained for row in rows[1:])
    assert metrics["db_inserts_total"] == 31
    # Nothing is left to acknowledge, PUBCOMP included, and the retained message stays stored once.
    assert collector.stop() == 0
    collector.start()
    publish(broker, [("iot/data", b"end")])
    assert collector.wait_settled(1)["db_duplicates_total"] == 0
    assert database.payloads()[31:] == [b"end"]


def test_mqtt_311(make_collector: MakeCollector, broker: Mosquitto, database: Database) -> None:
    collector = make_collector(broker, database, IOT_MQTT_VERSION="3.1.1").start()
    acknowledged = publish(broker, numbered(500))
    settled(collector, database, acknowledged)
    assert collector.stop() == 0
    acknowledged |= publish(broker, numbered(500, start=500))  # queued in the session
    collector.start()
    settled(collector, database, acknowledged)


def test_shared_subscription(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    pair = [
        make_collector(
            broker,
            database,
            IOT_MQTT_CLIENT_ID=f"collector-{i}",
            IOT_MQTT_TOPICS="$share/collectors/iot/#",
        ).start()
        for i in range(2)
    ]
    acknowledged = publish(broker, numbered(1000))
    eventually(lambda: database.count() >= 1000, what="all is stored")
    each_once(database, acknowledged)
    shares = [collector.wait_settled(1)["db_inserts_total"] for collector in pair]
    assert sum(shares) == 1000
    assert all(shares), shares


def test_pod_waits_for_another(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """It is ready meanwhile; otherwise the StatefulSet would never replace the pod it waits for."""
    first, second = (
        make_collector(
            broker,
            database,
            IOT_MQTT_CLIENT_ID=f"collector-{ordinal}",
            IOT_MQTT_TOPICS=topics,
            IOT_SESSION_ON_STOP="ordinal",
        )
        for ordinal, topics in enumerate(["iot/data", "$share/g/iot/data"])
    )
    first.start()
    second.start()
    assert second.get("/readyz").json()["waiting_for"] == ["collector-0"]
    assert second.health()["broker"]["waiting_for"] == ["collector-0"]
    assert second.metrics()["mqtt_waiting"] == 1
    assert second.status("/health") == 200
    assert "waiting until other pods" in second.log()
    settled(first, database, publish(broker, numbered(100)))
    assert second.metrics()["mqtt_messages_total"] == 0
    broker.stop()
    eventually(lambda: second.status("/readyz") == 503, what="it has no connection")
    broker.start()
    second.wait_ready()
    assert second.stop() == 0
    assert database.query("SELECT client_id FROM sessions") == [("collector-0",)]


# Counts ---------------------------------------------------------------------------------


def test_counts_add_up_in_every_scrape(
    collector: Collector, broker: Mosquitto, database: Database
) -> None:
    with Stream(broker, every=0.0005) as stream:
        stream.more()
        seen = 0
        for _ in range(100):
            metrics = collector.metrics()
            assert_balanced(metrics)
            seen = max(seen, int(metrics["messages_in_flight"]))
            accounting = collector.health()["accounting"]
            assert accounting["received"] == (
                accounting["inserted"]
                + accounting["duplicates"]
                + accounting["dead_letters"]
                + accounting["in_flight"]
            )
        acknowledged = stream.finish()
    assert seen, "some scrape saw messages in flight, or this proves nothing"
    settled(collector, database, acknowledged)
    metrics = collector.metrics()
    assert metrics["mqtt_messages_total"] == len(acknowledged)
    assert metrics["message_delay_seconds_count"] == len(acknowledged)
    assert metrics["db_batch_rows_sum"] == len(acknowledged)
    assert metrics["mqtt_connected"] == 1
    assert metrics["mqtt_reconnects_total"] == 0


def test_http(collector: Collector) -> None:
    health = collector.get("/health")
    assert health.status == 200
    assert health.json()["status"] == "ok"
    assert health.json()["problems"] == []
    assert b"<html" in collector.get("/").body
    assert collector.get("/nothing").status == 404
    assert 'build_info{version="' in collector.get("/metrics").body.decode()


# Failures of the database ----------------------------------------------------------------------


def test_database_absent_at_start(
    make_collector: MakeCollector, broker: Mosquitto, own_database: Database
) -> None:
    server = own_database.server
    server.stop()
    collector = make_collector(broker, own_database).launch().wait_listening()
    problem(collector, "database: connection")
    problem(collector, "database: connection", "/health")
    eventually(lambda: collector.metrics()["mqtt_connected"], what="it subscribes all the same")
    acknowledged = publish(broker, numbered(300))
    eventually(lambda: collector.metrics()["messages_in_flight"] == 300, what="they wait")
    assert_balanced(collector.metrics())
    server.start()
    settled(collector, own_database, acknowledged)
    collector.wait_ready()
    assert own_database.payloads() == payloads(numbered(300)), "in order"


@pytest.mark.parametrize("end", [Postgres.stop, Postgres.kill], ids=["stopped", "killed"])
def test_database_stops_under_load(
    end: Callable[[Postgres], object],
    make_collector: MakeCollector,
    broker: Mosquitto,
    own_database: Database,
) -> None:
    collector = make_collector(broker, own_database).start()
    with Stream(broker) as stream:
        for _ in range(3):
            stream.more()
            end(own_database.server)
            stream.more()
            problem(collector, "database: ")
            own_database.server.start()
        stream.more()
        acknowledged = stream.finish()
    settled(collector, own_database, acknowledged)
    assert collector.metrics()['db_errors_total{kind="connection"}'] >= 1


def test_session_cut_again_and_again(
    collector: Collector, broker: Mosquitto, database: Database
) -> None:
    """Whether a COMMIT took place whose answer is lost: the ledger knows."""
    with Stream(broker, every=0.0005) as stream:
        for _ in range(20):
            stream.more(20)
            cut(database)
        acknowledged = stream.finish()
    settled(collector, database, acknowledged)
    assert database.dead_letters() == []


def test_read_only_database(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    collector = make_collector(broker, database).start()
    acknowledged = publish(broker, numbered(50))
    settled(collector, database, acknowledged)
    server = database.server
    server.query(f"ALTER DATABASE {database.name} SET default_transaction_read_only = on")
    cut(database)
    acknowledged |= publish(broker, numbered(50, start=50))
    problem(collector, "database: read_only")
    eventually(lambda: collector.metrics()["messages_in_flight"] == 50, what="all wait")
    server.query(f"ALTER DATABASE {database.name} RESET default_transaction_read_only")
    settled(collector, database, acknowledged)
    assert database.dead_letters() == []


def test_too_many_connections(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    with limited_user(database) as user:
        collector = make_collector(broker, user).start()
        database.query(f"ALTER ROLE {user.user} CONNECTION LIMIT 0")
        cut(database)
        acknowledged = publish(broker, numbered(50))
        problem(collector, "too many connections")
        database.query(f"ALTER ROLE {user.user} CONNECTION LIMIT 5")
        settled(collector, database, acknowledged)
        collector.close()


def test_rotated_database_password(
    make_collector: MakeCollector, broker: Mosquitto, database: Database, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text("first\n")
    with limited_user(database) as user:
        collector = make_collector(
            broker,
            user,
            IOT_DATABASE_PASSWORD="",
            IOT_DATABASE_PASSWORD_FILE=str(file),
        ).start()
        database.query(f"ALTER ROLE {user.user} PASSWORD 'brand-new'")
        cut(database)
        acknowledged = publish(broker, numbered(50))
        problem(collector, "database: authentication")
        assert "brand-new" not in collector.get("/health").body.decode()
        file.write_bytes(b"\xff")  # half written, or not text at all
        file.unlink()  # away for a moment
        problem(collector, "password file")
        file.write_text("brand-new\n")
        settled(collector, database, acknowledged)
        collector.close()


def test_password_file_that_is_not_text(
    make_collector: MakeCollector, broker: Mosquitto, database: Database, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_bytes(b"\xff\xfe")
    collector = make_collector(
        broker, database, IOT_DATABASE_PASSWORD="", IOT_DATABASE_PASSWORD_FILE=str(file)
    )
    collector.launch().wait_listening()
    problem(collector, "password file")
    assert collector.running
    file.write_text(database.password)
    collector.wait_ready()


def test_database_without_schema(
    make_collector: MakeCollector, broker: Mosquitto, empty_database: Database
) -> None:
    collector = make_collector(broker, empty_database).launch().wait_listening()
    problem(collector, "database: schema")
    assert "iot-collector migrate" in collector.log()


def test_statement_timeout(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """A statement that takes longer is cancelled and repeated until it succeeds."""
    collector = make_collector(broker, database, IOT_DATABASE_TIMEOUT_SECONDS="1").start()
    collector.wait_settled(len(publish(broker, numbered(1))))
    with contextlib.closing(database.connect()) as holder, holder.cursor() as cursor:
        cursor.execute("LOCK TABLE messages IN ACCESS EXCLUSIVE MODE")
        acknowledged = publish(broker, numbered(50, start=1))
        problem(collector, "timeout: canceling statement due to statement timeout")
        problem(collector, "IOT_DATABASE_TIMEOUT_SECONDS", "/health")
        eventually(
            lambda: collector.metrics()['db_errors_total{kind="timeout"}'] >= 3, what="again"
        )
        assert collector.get("/livez").status == 200
    settled(collector, database, acknowledged)
    assert database.count() == 51


def test_shorter_statement_timeout_of_the_role_is_kept(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    for timeout in ("250", "60000"):
        database.query(f"ALTER DATABASE {database.name} SET statement_timeout = {timeout}")
        collector = make_collector(broker, database, IOT_DATABASE_TIMEOUT_SECONDS="1").start()
        collector.wait_settled(len(publish(broker, numbered(1))))
        with contextlib.closing(database.connect()) as holder, holder.cursor() as cursor:
            cursor.execute("SET statement_timeout = 0; LOCK TABLE messages")
            publish(broker, numbered(1))
            problem(collector, "statement timeout")
        assert collector.stop() == 0


def test_daily_work_is_not_timed_out(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """Creating partitions and deleting ids may take long; waiting for a lock is repeated."""
    database.query(
        "ALTER FUNCTION ensure_partitions RENAME TO ensure_partitions_at_once;"
        "CREATE FUNCTION ensure_partitions(timestamptz, integer) RETURNS integer LANGUAGE sql AS"
        " 'SELECT ensure_partitions_at_once($1, $2) FROM pg_sleep(3)'"
    )
    collector = make_collector(broker, database, IOT_DATABASE_TIMEOUT_SECONDS="1").start()
    settled(collector, database, publish(broker, numbered(10)))
    assert sum(v for k, v in collector.metrics().items() if k.startswith("db_errors_total")) == 0
    assert collector.stop() == 0
    with contextlib.closing(database.connect()) as holder, holder.cursor() as cursor:
        cursor.execute("LOCK TABLE message_ids")
        collector.start()
        publish(broker, numbered(10, start=10))
        problem(collector, "timeout: canceling statement due to lock timeout")
    collector.wait_settled(10)
    assert database.count() == 20


def test_database_that_accepts_everything_and_never_answers(
    make_collector: MakeCollector,
    make_proxy: Callable[[int], Proxy],
    broker: Mosquitto,
    database: Database,
) -> None:
    """Neither statement_timeout nor TCP ends the wait, so the collector does."""
    proxy = make_proxy(database.server.port)
    url = database.url.replace(f":{database.server.port}/", f":{proxy.port}/")
    settings = {"IOT_DATABASE_URL": url, "IOT_DATABASE_TIMEOUT_SECONDS": "1"}
    collector = make_collector(broker, database, **settings).start()
    acknowledged = publish(broker, numbered(10))
    settled(collector, database, acknowledged)
    proxy.up = proxy.down = "drop"
    acknowledged |= publish(broker, numbered(40, start=10))
    problem(collector, "database: connection")
    assert "the database does not answer, breaking the connection" in collector.log()
    proxy.up = proxy.down = "pass"
    proxy.cut()  # attempts to connect that were swallowed
    settled(collector, database, acknowledged)
    assert database.count() == 50


# Failures of the broker ------------------------------------------------------------------------


def test_broker_absent_at_start(
    make_collector: MakeCollector, make_broker: MakeBroker, database: Database
) -> None:
    broker = make_broker()
    collector = make_collector(broker, database).launch().wait_listening()
    problem(collector, "broker: ")
    problem(collector, "Connection refused", "/health")
    assert collector.metrics()["mqtt_connected"] == 0
    broker.start()
    collector.wait_ready()
    settled(collector, database, publish(broker, numbered(10)))


def test_broker_restarted(collector: Collector, broker: Mosquitto, database: Database) -> None:
    acknowledged: set[bytes] = set()
    for i in range(3):
        acknowledged |= publish(broker, numbered(200, start=i * 200))
        broker.stop()
        problem(collector, "broker: ")
        broker.start()
        collector.wait_ready()
    settled(collector, database, acknowledged)
    assert collector.metrics()["mqtt_reconnects_total"] >= 3


def test_wrong_broker_password(
    make_collector: MakeCollector, make_broker: MakeBroker, database: Database, tmp_path: Path
) -> None:
    """The log says so, and the password file is read again at each attempt."""
    users, secret = tmp_path / "users", tmp_path / "secret"
    write_passwords(users, {"me": "right-one"})
    broker = make_broker(f"password_file {users}", anonymous=False).start()
    secret.write_text("wrong-one")
    collector = make_collector(
        broker, database, IOT_MQTT_USERNAME="me", IOT_MQTT_PASSWORD_FILE=str(secret)
    )
    collector.launch().wait_listening()
    problem(collector, "Not authorized")
    secret.write_text("right-one\n")
    collector.wait_ready()
    assert "wrong-one" not in collector.log()
    assert "right-one" not in collector.log()


def test_window_of_the_broker_smaller_than_ours(
    make_collector: MakeCollector, make_broker: MakeBroker, database: Database
) -> None:
    """It sends 20 and waits: with a linger after each read, there would be 20 messages a linger."""
    broker = make_broker("max_inflight_messages 20").start()
    # With MQTT 5, Mosquitto's window is the one that we ask for.
    settings = {"IOT_MQTT_VERSION": "3.1.1", "IOT_BATCH_LINGER_MS": "500"}
    collector = make_collector(broker, database, **settings).start()
    messages = numbered(2000)  # 50 s at 20 in half a second
    publish(broker, messages)
    collector.wait_settled(2000, timeout=20)
    assert database.payloads() == payloads(messages)


def test_same_client_id_twice(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """Each ends the other's connection until one is stopped; no message is lost."""
    first = make_collector(broker, database).start()
    with Stream(broker) as stream:
        second = make_collector(broker, database).launch()
        for collector in (first, second):
            eventually(
                lambda c=collector: "no connection to broker" in c.log(),  # type: ignore[misc]
                what="it loses its connection",
            )
        eventually(
            lambda: "IOT_MQTT_CLIENT_ID" in first.log() + second.log(), what="the setting is named"
        )
        stream.more()
        second.kill()
        acknowledged = stream.finish()
    first.wait_ready()
    eventually(lambda: set(database.payloads()) >= acknowledged, what="all is stored")
    assert first.get("/livez").status == 200


# Shutdown -------------------------------------------------------------------------------------


def test_sigterm_drains(collector: Collector, broker: Mosquitto, database: Database) -> None:
    """All that was received is stored and acknowledged: the broker has nothing to send again."""
    with Stream(broker, every=0.0005) as stream:
        for _ in range(3):
            stream.more(200)
            assert collector.stop() == 0
            stored = database.count()
            stream.more(50)
            assert database.count() == stored, "it is gone"
            collector.start()
            assert collector.health()["broker"]["session_present"] is True
        stream.more()
        acknowledged = stream.finish()
    settled(collector, database, acknowledged)
    duplicates = [e for e in collector.events() if e["event"] == "stopped"]
    assert len(duplicates) == 3
    assert collector.metrics()["db_duplicates_total"] == 0


def test_sigterm_with_the_database_down(
    make_collector: MakeCollector, broker: Mosquitto, own_database: Database
) -> None:
    collector = make_collector(broker, own_database, IOT_DRAIN_SECONDS="1").start()
    settled(collector, own_database, acknowledged := publish(broker, numbered(100)))
    own_database.server.stop()
    acknowledged |= publish(broker, numbered(100, start=100))
    eventually(lambda: collector.metrics()["messages_in_flight"] == 100, what="they wait")
    collector.signal(signal.SIGTERM)
    assert collector.wait(15) == 0
    own_database.server.start()
    collector.start()
    settled(collector, own_database, acknowledged)


def test_sigint_without_broker_and_database(
    make_collector: MakeCollector, make_broker: MakeBroker, own_database: Database
) -> None:
    own_database.server.stop()
    collector = make_collector(make_broker(), own_database, IOT_DRAIN_SECONDS="1")
    collector.launch().wait_listening()
    collector.signal(signal.SIGINT)
    assert collector.wait(15) == 0


def test_killed_under_load(collector: Collector, broker: Mosquitto, database: Database) -> None:
    """Between COMMIT and PUBACK too: the broker sends again, and each message is stored once."""
    with Stream(broker, every=0.0005) as stream:
        for _ in range(5):
            stream.more(100)
            collector.kill()
            stream.more(20)
            collector.start()
        acknowledged = stream.finish()
    settled(collector, database, acknowledged)


COMMIT_WAITS = """
CREATE FUNCTION wait_for_test() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    PERFORM pg_advisory_xact_lock_shared(1); RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER wait_for_test AFTER INSERT ON messages DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION wait_for_test();
"""


def committing(database: Database) -> int:
    """How many transactions wait in their COMMIT, where the trigger above runs."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND wait_event = 'advisory'"
    count: int = database.query(waiting, database.name)[0][0]
    return count


@contextlib.contextmanager
def waiting_commit(database: Database) -> Iterator[Callable[[], None]]:
    """Make every COMMIT of messages wait until the end of the block.

    Yields a function that waits until a COMMIT waits.
    """
    database.query(COMMIT_WAITS)
    with contextlib.closing(database.connect()) as holder, holder.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(1)")

        def wait() -> None:
            eventually(lambda: committing(database), what="it commits")

        yield wait


@pytest.mark.parametrize("late", [False, True], ids=["before the retry", "during the retry"])
def test_answer_to_commit_is_lost(
    late: bool,
    make_collector: MakeCollector,
    make_proxy: Callable[[int], Proxy],
    broker: Mosquitto,
    database: Database,
) -> None:
    """The COMMIT took place although its connection broke: nothing is stored a second time."""
    proxy = make_proxy(database.server.port)
    url = database.url.replace(f":{database.server.port}/", f":{proxy.port}/")
    collector = make_collector(broker, database, IOT_DATABASE_URL=url).start()
    with waiting_commit(database) as commit_waits:
        acknowledged = publish(broker, numbered(50))
        commit_waits()
        proxy.refusing = True
        proxy.cut()
        problem(collector, "database: connection")
        if late:
            proxy.refusing = False
            eventually(lambda: "ledger" in blocked(database), what="the retry waits for it")
    eventually(database.count, what="the COMMIT takes place")
    proxy.refusing = False
    settled(collector, database, acknowledged)
    assert collector.metrics()["mqtt_messages_total"] == 50


def test_commit_that_takes_longer_than_the_timeout(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """statement_timeout does not end a COMMIT: the collector does, and later finds it done."""
    collector = make_collector(broker, database, IOT_DATABASE_TIMEOUT_SECONDS="1").start()
    with waiting_commit(database) as commit_waits:
        acknowledged = publish(broker, numbered(50))
        commit_waits()
        problem(collector, "database: connection")
        assert "the database does not answer" in collector.log()
        problem(collector, "database: timeout")  # the retry waits for the COMMIT
    settled(collector, database, acknowledged)
    assert database.count() == 50
    assert collector.metrics()["mqtt_messages_total"] == 50


def blocked(database: Database) -> str:
    """The statements that wait for a lock of another transaction."""
    found = database.query(
        "SELECT string_agg(query, ' ') FROM pg_stat_activity"
        " WHERE datname = %s AND wait_event_type = 'Lock' AND wait_event = 'transactionid'",
        database.name,
    )
    return found[0][0] or ""


def test_acknowledgements_are_lost(
    make_collector: MakeCollector,
    make_proxy: Callable[[int], Proxy],
    broker: Mosquitto,
    database: Database,
) -> None:
    """What is stored and not acknowledged is sent again, counted, and not stored again."""
    proxy = make_proxy(broker.port)
    url = f"mqtt://{HOST}:{proxy.port}"
    collector = make_collector(broker, database, IOT_MQTT_URL=url).start()
    proxy.up = "drop"
    acknowledged = publish(broker, numbered(50))
    collector.wait_settled(50)
    proxy.up = "pass"
    proxy.cut()
    metrics = collector.wait_settled(100)
    assert metrics["db_duplicates_total"] == 50, "in the same process"
    eventually(lambda: broker.log().count("Received PUBACK") >= 50, what="acknowledged now")
    proxy.up = "drop"
    acknowledged |= publish(broker, numbered(50, start=50))
    collector.wait_settled(150)
    collector.kill()
    proxy.up = "pass"
    collector.start()
    metrics = collector.wait_settled(50)
    assert metrics["db_duplicates_total"] == 50, "and in the next"
    settled(collector, database, acknowledged)
    assert database.count() == 100


def test_sigterm_waits_for_a_commit(
    collector: Collector, broker: Mosquitto, database: Database
) -> None:
    """It is stored and acknowledged before the process ends: nothing is sent again."""
    with waiting_commit(database) as commit_waits:
        publish(broker, numbered(50))
        commit_waits()
        collector.signal(signal.SIGTERM)
        eventually(lambda: '"draining"' in collector.log(), what="it drains")
        assert collector.running
    assert collector.wait() == 0
    assert database.payloads() == payloads(numbered(50))
    collector.start()
    publish(broker, numbered(1, start=50))
    assert collector.wait_settled(1)["mqtt_messages_total"] == 1


def test_killed_while_a_commit_takes_place(
    collector: Collector, broker: Mosquitto, database: Database
) -> None:
    """PostgreSQL finishes the COMMIT of a dead process: the next process has to wait for it."""
    database.query(COMMIT_WAITS)
    with contextlib.closing(database.connect()) as holder, holder.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(1)")
        acknowledged = publish(broker, numbered(50))
        eventually(lambda: committing(database) == 1, what="it commits")
        collector.kill()
        collector.start()
        eventually(lambda: collector.metrics()["messages_in_flight"] == 50, what="sent again")
    settled(collector, database, acknowledged)
    assert collector.metrics()["db_duplicates_total"] > 0, "the batch of that COMMIT"


def test_message_ids(make_collector: MakeCollector, broker: Mosquitto, database: Database) -> None:
    """A device gives its messages ids and publishes some again: each is stored once."""
    collector = make_collector(broker, database, IOT_MESSAGE_ID_KEY="id").start()
    messages = [("iot/data", json.dumps({"id": i, "n": n}).encode()) for i in "ab" for n in (1, 2)]
    publish(broker, [*messages, ("iot/data", b"no id"), ("iot/data", b"no id")])
    metrics = collector.wait_settled(6)
    assert metrics["db_duplicates_total"] == 2
    assert sorted(database.payloads()) == sorted(
        [messages[0][1], messages[2][1], b"no id", b"no id"]
    )


DAY = 86400
NEVER = 0xFFFFFFFF  # MQTT 5 §3.1.2.11.2: the session does not expire


@pytest.mark.parametrize(
    ("session_expiry", "kept", "forgotten"),
    [
        (60, 7, 9),
        (7 * DAY, 7, 9),
        (30 * DAY, 30, 32),
        (NEVER - 1, 49_000, None),
        (NEVER, 100_000, None),
    ],
)
def test_message_ids_are_kept_as_long_as_the_session(
    session_expiry: int,
    kept: int,
    forgotten: int | None,
    make_collector: MakeCollector,
    broker: Mosquitto,
    database: Database,
) -> None:
    """A message that is sent again right before the session expires is still recognised."""
    days = {"kept": kept, "forgotten": forgotten}
    for name, age in days.items():
        if age is not None:
            database.query(
                "INSERT INTO message_ids VALUES (%s, now() - make_interval(days => %s))", name, age
            )
    collector = make_collector(
        broker,
        database,
        IOT_MESSAGE_ID_KEY="id",
        IOT_MQTT_SESSION_EXPIRY_SECONDS=str(session_expiry),
    ).start()
    publish(broker, numbered(1))  # the day's first batch: old ids are forgotten
    collector.wait_settled(1)
    assert database.query("SELECT id FROM message_ids") == [("kept",)]
    publish(broker, [("iot/data", b'{"id": "kept"}'), ("iot/data", b'{"id": "forgotten"}')])
    assert collector.wait_settled(3)["db_duplicates_total"] == 1


# Settings and logs ---------------------------------------------------------------------------


def test_port_in_use(make_collector: MakeCollector, broker: Mosquitto, database: Database) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = str(taken.getsockname()[1])
        collector = make_collector(broker, database, IOT_HTTP_PORT=port).launch()
        assert collector.wait() == 2
    assert collector.log().startswith("wrong setting: IOT_HTTP_PORT: ")
    assert f"{HOST}:{port}" in collector.log()


def test_wrong_settings(make_collector: MakeCollector) -> None:
    collector = make_collector(IOT_MQTT_QOS="7", IOT_BATCHROWS="5").launch()
    assert collector.wait() == 2
    lines = collector.log().splitlines()
    assert [line.split(": ")[1] for line in lines] == ["IOT_BATCHROWS", "IOT_MQTT_QOS"]


def test_logs(
    make_collector: MakeCollector, make_broker: MakeBroker, database: Database, tmp_path: Path
) -> None:
    """Each line is JSON, at every level, with and without failures, and none has a secret."""
    users = tmp_path / "users"
    write_passwords(users, {"me": "broker-secret"})
    broker = make_broker(f"password_file {users}", anonymous=False).start()
    database.query("ALTER TABLE messages ADD CONSTRAINT c CHECK (payload <> 'poison'::bytea)")
    with limited_user(database) as user:
        url = user.url.replace("@", f":{user.password}@")
        collector = make_collector(
            broker,
            IOT_MQTT_URL=broker.url.replace("://", "://me:broker-secret@"),
            IOT_DATABASE_URL=url,
            IOT_DRAIN_SECONDS="0.5",
        ).start()
        publish(
            broker,
            [("iot/data", b"poison"), ("new\u2028line", b"poison")],
            username="me",
            password="broker-secret",
        )
        collector.wait_settled(2)
        database.query(f"ALTER ROLE {user.user} PASSWORD 'brand-new'")
        cut(database)
        publish(broker, numbered(1), username="me", password="broker-secret")
        problem(collector, "database: authentication")
        broker.stop()
        problem(collector, "broker: ")
        pages = [collector.get(path).body.decode() for path in ("/health", "/metrics", "/readyz")]
        assert collector.stop() == 0
    for event in collector.events():
        assert {"event", "level", "logger", "timestamp"} <= set(event), event
    for shown in (collector.log(), *pages):
        for secret in ("broker-secret", ":first@", "'first'", "brand-new"):
            assert secret not in shown
    letters = [e for e in collector.events() if e["event"] == "message kept as dead letter"]
    assert len(letters) == 2


# Transports ----------------------------------------------------------------------------------


def test_tls(
    make_collector: MakeCollector, make_broker: MakeBroker, database: Database, tmp_path: Path
) -> None:
    certificates = make_certificates(tmp_path)
    broker = make_broker(
        scheme="mqtts",
        listener=[
            f"certfile {certificates.server}",
            f"keyfile {certificates.server_key}",
            f"cafile {certificates.ca}",
            "require_certificate true",
        ],
    ).start()
    files = {
        "IOT_MQTT_CA_FILE": str(certificates.ca),
        "IOT_MQTT_CERT_FILE": str(certificates.client),
        "IOT_MQTT_KEY_FILE": str(certificates.client_key),
    }
    collector = make_collector(broker, database, **files).start()
    messages = [*numbered(3000), ("iot/large", b"x" * 3_000_000), *numbered(100, start=3000)]
    settled(collector, database, publish(broker, messages))
    assert database.payloads() == payloads(messages)
    assert collector.stop() == 0


def test_tls_with_an_untrusted_certificate(
    make_collector: MakeCollector, make_broker: MakeBroker, database: Database, tmp_path: Path
) -> None:
    certificates = make_certificates(tmp_path)
    listener = [f"certfile {certificates.server}", f"keyfile {certificates.server_key}"]
    broker = make_broker(scheme="mqtts", listener=listener).start()
    collector = make_collector(broker, database).launch().wait_listening()
    problem(collector, "certificate verify failed")


def test_websocket(
    make_collector: MakeCollector, make_broker: MakeBroker, database: Database
) -> None:
    broker = make_broker(scheme="ws", listener=["protocol websockets"]).start()
    collector = make_collector(broker, database).start()
    messages = [*numbered(3000), ("iot/large", b"x" * 300_000), *numbered(100, start=3000)]
    settled(collector, database, publish(broker, messages))
    assert database.payloads() == payloads(messages)
    assert collector.stop() == 0


def test_refused_subscription(
    make_collector: MakeCollector, make_broker: MakeBroker, database: Database, tmp_path: Path
) -> None:
    security = DynamicSecurity(tmp_path, deny_subscribe="secret/+")
    broker = make_broker(*security.settings).start()
    collector = make_collector(broker, database, IOT_MQTT_TOPICS="iot/data,secret/+")
    collector.launch().wait_listening()
    problem(collector, "secret/+")
    problem(collector, "secret/+", "/health")
    assert "iot/data" not in collector.health()["broker"]["error"], "that one was granted"
    security.allow(broker, "secret/+")
    collector.wait_ready()
    settled(collector, database, publish(broker, [("secret/1", b"x"), ("iot/data", b"y")]))


def test_refused_replacement_of_a_subscription(
    make_collector: MakeCollector, make_broker: MakeBroker, database: Database, tmp_path: Path
) -> None:
    """The old one stays until the new one is granted."""
    security = DynamicSecurity(tmp_path, deny_subscribe="$share/g/iot/data")
    broker = make_broker(*security.settings).start()
    collector = make_collector(broker, database, IOT_MQTT_TOPICS="iot/data").start()
    assert collector.stop() == 0
    collector.settings["IOT_MQTT_TOPICS"] = "$share/g/iot/data"
    collector.launch().wait_listening()
    problem(collector, "$share/g/iot/data")
    acknowledged = publish(broker, numbered(100))
    settled(collector, database, acknowledged)
    security.allow(broker, "$share/g/iot/data")
    collector.wait_ready()
    query = "SELECT filters FROM sessions"
    eventually(lambda: database.query(query) == [(["$share/g/iot/data"],)], what="replaced")
    settled(collector, database, acknowledged | publish(broker, numbered(100, start=100)))
