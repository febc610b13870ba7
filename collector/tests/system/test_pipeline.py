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


def assert_stored_once(database: Database, acknowledged: set[bytes]) -> None:
    """Assert that each message that the broker acknowledged is stored once."""
    stored = database.payloads()
    assert len(stored) == len(set(stored)), f"{len(stored) - len(set(stored))} stored twice"
    assert set(stored) >= acknowledged, f"{len(acknowledged - set(stored))} lost"


def wait_stored_once(collector: Collector, database: Database, acknowledged: set[bytes]) -> None:
    """Wait until everything is stored and nothing is in flight, then `assert_stored_once`."""
    eventually(
        lambda: database.count() + database.count("dead_letters") >= len(acknowledged),
        what=f"{len(acknowledged)} messages are stored\n{collector.log()[-2000:]}",
    )
    eventually(lambda: not collector.metrics()["messages_in_flight"], what="nothing is in flight")
    assert_balanced(collector.metrics())
    assert_stored_once(database, acknowledged)


def wait_problem(collector: Collector, text: str, path: str = "/readyz") -> None:
    """Wait until the collector reports a problem that contains ``text``."""

    def reported() -> bool:
        answer = collector.get(path)
        return answer.status == 503 and text in " ".join(answer.json()["problems"])

    eventually(reported, what=f"{path} reports {text!r}\n{collector.log()[-2000:]}")
    assert collector.get("/livez").status == 200, "the problem is no reason to restart"


@contextlib.contextmanager
def limited_user(database: Database, **options: str) -> Iterator[Database]:
    """The database, with a user that has only the privileges that the collector needs."""
    role = f"{database.name}_collector"
    database.query(f"CREATE ROLE {role} LOGIN PASSWORD 'first'")
    database.query(
        f"GRANT INSERT ON messages, dead_letters, dead_letters_fallback TO {role};"
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ledger, sessions, message_ids TO {role};"
        f"GRANT EXECUTE ON FUNCTION ensure_partitions TO {role}"
    )
    yield Database(database.server, database.name, role, "first")
    database.query(f"DROP OWNED BY {role}")


def terminate_sessions(database: Database) -> None:
    """Terminate the sessions of all collectors on the database."""
    database.query(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = %s AND application_name = 'iot-collector'",
        database.name,
    )


# Content -------------------------------------------------------------------------------------


DEEPLY_NESTED = [b'{"a":' * 300 + b"1" + b"}" * 300, b"[" * 300 + b"]" * 300]
PAYLOADS: list[tuple[bytes, Any]] = [
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
    *((payload, json.loads(payload)) for payload in DEEPLY_NESTED),
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
    publish(broker, [("iot/data", payload) for payload, _ in PAYLOADS])
    metrics = collector.wait_settled(len(PAYLOADS))
    rows = database.rows()
    assert [row.payload for row in rows] == [payload for payload, _ in PAYLOADS], (
        "all, raw, in order"
    )
    assert [row.fields for row in rows] == [fields for _, fields in PAYLOADS]
    assert metrics["db_inserts_total"] == len(PAYLOADS)
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


def test_topic_too_long_for_the_index_becomes_a_dead_letter(
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
def test_refused_row_becomes_a_dead_letter(
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
    assert database.count() == 110, "later messages are stored"


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
def test_row_refused_by_dead_letters_goes_to_the_fallback_table(
    kind: str, make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    database.query(TWICE_REFUSED[kind])
    poison = Properties(PacketTypes.PUBLISH)
    poison.UserProperty = [("site", "a")]
    with limited_user(database) as user:
        collector = make_collector(broker, user, IOT_BATCH_LINGER_MS="200").start()
        metric = 'db_dead_letters_total{reason="refused_twice"}'
        assert collector.metrics()[metric] == 0, "present from the start, for increase()"
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


def test_dead_letters_are_retried_without_insert_privilege(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """Without INSERT on dead_letters, the message waits until the privilege is granted."""
    database.query("ALTER TABLE messages ADD CHECK (payload <> 'poison'::bytea)")
    with limited_user(database) as user:
        database.query(f"REVOKE INSERT ON dead_letters FROM {user.user}")
        collector = make_collector(broker, user).start()
        publish(broker, [("iot/data", b"poison")])
        wait_problem(collector, "permission denied for table dead_letters", "/health")
        assert database.count("dead_letters_fallback") == 0
        database.query(f"GRANT INSERT ON dead_letters TO {user.user}")
        collector.wait_settled(1)
        assert [letter.payload for letter in database.dead_letters()] == [b"poison"]
        collector.close()


def test_row_refused_with_a_custom_sqlstate_becomes_a_dead_letter(
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
    """A row without a partition waits until its partition exists."""
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


def test_each_row_of_a_refused_batch_becomes_a_dead_letter(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    database.query("ALTER TABLE messages ADD CONSTRAINT nothing CHECK (qos = 0)")
    collector = make_collector(broker, database, IOT_BATCH_LINGER_MS="100").start()
    publish(broker, numbered(33))
    collector.wait_settled(33)
    assert [letter.payload for letter in database.dead_letters()] == payloads(numbered(33))
    assert database.count() == 0


def test_mqtt_5_properties_are_stored(
    collector: Collector, broker: Mosquitto, database: Database
) -> None:
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
def test_user_properties_with_any_text_are_stored(
    text: str, collector: Collector, broker: Mosquitto, database: Database
) -> None:
    """A message that broke the connection would be redelivered forever."""
    properties = Properties(PacketTypes.PUBLISH)
    properties.UserProperty = [("name", text), (text, "value")]
    publish(broker, [("iot/data", b"x")], properties=properties)
    collector.wait_settled(1)
    (row,) = database.rows()
    assert row.properties == {"user": {"name": [text], text: ["value"]}}


def test_properties_that_paho_rejects_are_stored_raw(
    collector: Collector, broker: Mosquitto, database: Database
) -> None:
    """MQTT 5 §1.5.4 allows U+FEFF, but paho does not."""
    properties = Properties(PacketTypes.PUBLISH)
    properties.UserProperty = [("name", "\ufeffbom")]
    publish(broker, [("iot/data", b"x")], properties=properties)
    collector.wait_settled(1)
    (row,) = database.rows()
    raw = properties.pack()
    assert row.properties == {"Unreadable": base64.b64encode(raw).decode()}


def test_qos_and_retain_flag_are_stored(
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
    # Everything is acknowledged, with PUBCOMP too, and the retained message is not stored again.
    assert collector.stop() == 0
    collector.start()
    publish(broker, [("iot/data", b"end")])
    assert collector.wait_settled(1)["db_duplicates_total"] == 0
    assert database.payloads()[31:] == [b"end"]


def test_mqtt_3_1_1_messages_are_stored_live_and_from_the_queue(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    collector = make_collector(broker, database, IOT_MQTT_VERSION="3.1.1").start()
    acknowledged = publish(broker, numbered(500))
    wait_stored_once(collector, database, acknowledged)
    assert collector.stop() == 0
    acknowledged |= publish(broker, numbered(500, start=500))  # queued in the session
    collector.start()
    wait_stored_once(collector, database, acknowledged)


def test_collectors_share_a_subscription(
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
    assert_stored_once(database, acknowledged)
    shares = [collector.wait_settled(1)["db_inserts_total"] for collector in pair]
    assert sum(shares) == 1000
    assert all(shares), shares


def test_pod_is_ready_while_it_waits_for_another(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """Otherwise the StatefulSet would never replace the pod that it waits for."""
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
    wait_stored_once(first, database, publish(broker, numbered(100)))
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
    assert seen, "no scrape saw messages in flight, so the test proves nothing"
    wait_stored_once(collector, database, acknowledged)
    metrics = collector.metrics()
    assert metrics["mqtt_messages_total"] == len(acknowledged)
    assert metrics["message_delay_seconds_count"] == len(acknowledged)
    assert metrics["db_batch_rows_sum"] == len(acknowledged)
    assert metrics["mqtt_connected"] == 1
    assert metrics["mqtt_reconnects_total"] == 0


def test_http_endpoints(collector: Collector) -> None:
    health = collector.get("/health")
    assert health.status == 200
    assert health.json()["status"] == "ok"
    assert health.json()["problems"] == []
    assert b"<html" in collector.get("/").body
    assert collector.get("/nothing").status == 404
    assert 'build_info{version="' in collector.get("/metrics").body.decode()


# Failures of the database ----------------------------------------------------------------------


def test_messages_wait_when_the_database_is_down_at_start(
    make_collector: MakeCollector, broker: Mosquitto, own_database: Database
) -> None:
    server = own_database.server
    server.stop()
    collector = make_collector(broker, own_database).launch().wait_listening()
    wait_problem(collector, "database: connection")
    wait_problem(collector, "database: connection", "/health")
    eventually(lambda: collector.metrics()["mqtt_connected"], what="it subscribes nevertheless")
    acknowledged = publish(broker, numbered(300))
    eventually(lambda: collector.metrics()["messages_in_flight"] == 300, what="they wait")
    assert_balanced(collector.metrics())
    server.start()
    wait_stored_once(collector, own_database, acknowledged)
    collector.wait_ready()
    assert own_database.payloads() == payloads(numbered(300)), "in order"


@pytest.mark.parametrize("end", [Postgres.stop, Postgres.kill], ids=["stopped", "killed"])
def test_messages_wait_while_the_database_is_down(
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
            wait_problem(collector, "database: ")
            own_database.server.start()
        stream.more()
        acknowledged = stream.finish()
    wait_stored_once(collector, own_database, acknowledged)
    assert collector.metrics()['db_errors_total{kind="connection"}'] >= 1


def test_messages_are_stored_once_when_database_sessions_are_terminated(
    collector: Collector, broker: Mosquitto, database: Database
) -> None:
    """If the answer to a COMMIT is lost, the ledger shows whether it succeeded."""
    with Stream(broker, every=0.0005) as stream:
        for _ in range(20):
            stream.more(20)
            terminate_sessions(database)
        acknowledged = stream.finish()
    wait_stored_once(collector, database, acknowledged)
    assert database.dead_letters() == []


def test_messages_wait_while_the_database_is_read_only(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    collector = make_collector(broker, database).start()
    acknowledged = publish(broker, numbered(50))
    wait_stored_once(collector, database, acknowledged)
    server = database.server
    server.query(f"ALTER DATABASE {database.name} SET default_transaction_read_only = on")
    terminate_sessions(database)
    acknowledged |= publish(broker, numbered(50, start=50))
    wait_problem(collector, "database: read_only")
    eventually(lambda: collector.metrics()["messages_in_flight"] == 50, what="all wait")
    server.query(f"ALTER DATABASE {database.name} RESET default_transaction_read_only")
    wait_stored_once(collector, database, acknowledged)
    assert database.dead_letters() == []


def test_messages_wait_while_the_connection_limit_is_reached(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    with limited_user(database) as user:
        collector = make_collector(broker, user).start()
        database.query(f"ALTER ROLE {user.user} CONNECTION LIMIT 0")
        terminate_sessions(database)
        acknowledged = publish(broker, numbered(50))
        wait_problem(collector, "too many connections")
        database.query(f"ALTER ROLE {user.user} CONNECTION LIMIT 5")
        wait_stored_once(collector, database, acknowledged)
        collector.close()


def test_rotated_database_password_is_read_from_its_file(
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
        terminate_sessions(database)
        acknowledged = publish(broker, numbered(50))
        wait_problem(collector, "database: authentication")
        assert "brand-new" not in collector.get("/health").body.decode()
        file.write_bytes(b"\xff")  # not UTF-8
        file.unlink()
        wait_problem(collector, "password file")
        file.write_text("brand-new\n")
        wait_stored_once(collector, database, acknowledged)
        collector.close()


def test_unreadable_password_file_is_reported_and_read_again(
    make_collector: MakeCollector, broker: Mosquitto, database: Database, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_bytes(b"\xff\xfe")
    collector = make_collector(
        broker, database, IOT_DATABASE_PASSWORD="", IOT_DATABASE_PASSWORD_FILE=str(file)
    )
    collector.launch().wait_listening()
    wait_problem(collector, "password file")
    assert collector.running
    file.write_text(database.password)
    collector.wait_ready()


def test_missing_schema_is_reported(
    make_collector: MakeCollector, broker: Mosquitto, empty_database: Database
) -> None:
    collector = make_collector(broker, empty_database).launch().wait_listening()
    wait_problem(collector, "database: schema")
    assert "iot-collector migrate" in collector.log()


def test_statement_is_cancelled_at_its_timeout_and_retried(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    collector = make_collector(broker, database, IOT_DATABASE_TIMEOUT_SECONDS="1").start()
    collector.wait_settled(len(publish(broker, numbered(1))))
    with contextlib.closing(database.connect()) as holder, holder.cursor() as cursor:
        cursor.execute("LOCK TABLE messages IN ACCESS EXCLUSIVE MODE")
        acknowledged = publish(broker, numbered(50, start=1))
        wait_problem(collector, "timeout: canceling statement due to statement timeout")
        wait_problem(collector, "IOT_DATABASE_TIMEOUT_SECONDS", "/health")
        eventually(
            lambda: collector.metrics()['db_errors_total{kind="timeout"}'] >= 3, what="again"
        )
        assert collector.get("/livez").status == 200
    wait_stored_once(collector, database, acknowledged)
    assert database.count() == 51


def test_shorter_of_two_statement_timeouts_applies(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    for timeout in ("250", "60000"):
        database.query(f"ALTER DATABASE {database.name} SET statement_timeout = {timeout}")
        collector = make_collector(broker, database, IOT_DATABASE_TIMEOUT_SECONDS="1").start()
        collector.wait_settled(len(publish(broker, numbered(1))))
        with contextlib.closing(database.connect()) as holder, holder.cursor() as cursor:
            cursor.execute("SET statement_timeout = 0; LOCK TABLE messages")
            publish(broker, numbered(1))
            wait_problem(collector, "statement timeout")
        assert collector.stop() == 0


def test_daily_maintenance_has_no_statement_timeout(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """Creating partitions and deleting old ids may take long. A lock timeout is retried."""
    database.query(
        "ALTER FUNCTION ensure_partitions RENAME TO ensure_partitions_at_once;"
        "CREATE FUNCTION ensure_partitions(timestamptz, integer) RETURNS integer LANGUAGE sql AS"
        " 'SELECT ensure_partitions_at_once($1, $2) FROM pg_sleep(3)'"
    )
    collector = make_collector(broker, database, IOT_DATABASE_TIMEOUT_SECONDS="1").start()
    wait_stored_once(collector, database, publish(broker, numbered(10)))
    assert sum(v for k, v in collector.metrics().items() if k.startswith("db_errors_total")) == 0
    assert collector.stop() == 0
    with contextlib.closing(database.connect()) as holder, holder.cursor() as cursor:
        cursor.execute("LOCK TABLE message_ids")
        collector.start()
        publish(broker, numbered(10, start=10))
        wait_problem(collector, "timeout: canceling statement due to lock timeout")
    collector.wait_settled(10)
    assert database.count() == 20


def test_connection_is_closed_when_the_database_never_answers(
    make_collector: MakeCollector,
    make_proxy: Callable[[int], Proxy],
    broker: Mosquitto,
    database: Database,
) -> None:
    """Neither statement_timeout nor TCP ends this wait, so the collector closes the connection."""
    proxy = make_proxy(database.server.port)
    url = database.url.replace(f":{database.server.port}/", f":{proxy.port}/")
    settings = {"IOT_DATABASE_URL": url, "IOT_DATABASE_TIMEOUT_SECONDS": "1"}
    collector = make_collector(broker, database, **settings).start()
    acknowledged = publish(broker, numbered(10))
    wait_stored_once(collector, database, acknowledged)
    proxy.up = proxy.down = "drop"
    acknowledged |= publish(broker, numbered(40, start=10))
    wait_problem(collector, "database: connection")
    assert "the database does not answer, breaking the connection" in collector.log()
    proxy.up = proxy.down = "pass"
    proxy.cut()  # drops connection attempts that got no answer
    wait_stored_once(collector, database, acknowledged)
    assert database.count() == 50


# Failures of the broker ------------------------------------------------------------------------


def test_collector_connects_when_the_broker_starts_later(
    make_collector: MakeCollector, make_broker: MakeBroker, database: Database
) -> None:
    broker = make_broker()
    collector = make_collector(broker, database).launch().wait_listening()
    wait_problem(collector, "broker: ")
    wait_problem(collector, "Connection refused", "/health")
    assert collector.metrics()["mqtt_connected"] == 0
    broker.start()
    collector.wait_ready()
    wait_stored_once(collector, database, publish(broker, numbered(10)))


def test_messages_are_stored_once_when_the_broker_restarts(
    collector: Collector, broker: Mosquitto, database: Database
) -> None:
    acknowledged: set[bytes] = set()
    for i in range(3):
        acknowledged |= publish(broker, numbered(200, start=i * 200))
        broker.stop()
        wait_problem(collector, "broker: ")
        broker.start()
        collector.wait_ready()
    wait_stored_once(collector, database, acknowledged)
    assert collector.metrics()["mqtt_reconnects_total"] >= 3


def test_broker_password_file_is_read_at_each_attempt(
    make_collector: MakeCollector, make_broker: MakeBroker, database: Database, tmp_path: Path
) -> None:
    """The problem is reported, and no password is logged."""
    users, secret = tmp_path / "users", tmp_path / "secret"
    write_passwords(users, {"me": "right-one"})
    broker = make_broker(f"password_file {users}", anonymous=False).start()
    secret.write_text("wrong-one")
    collector = make_collector(
        broker, database, IOT_MQTT_USERNAME="me", IOT_MQTT_PASSWORD_FILE=str(secret)
    )
    collector.launch().wait_listening()
    wait_problem(collector, "Not authorized")
    secret.write_text("right-one\n")
    collector.wait_ready()
    assert "wrong-one" not in collector.log()
    assert "right-one" not in collector.log()


def test_linger_does_not_delay_a_broker_with_a_small_window(
    make_collector: MakeCollector, make_broker: MakeBroker, database: Database
) -> None:
    """The broker sends 20 messages, then waits for PUBACK: the collector must not wait as well."""
    broker = make_broker("max_inflight_messages 20").start()
    # With MQTT 5, Mosquitto uses the client's Receive Maximum.
    settings = {"IOT_MQTT_VERSION": "3.1.1", "IOT_BATCH_LINGER_MS": "500"}
    collector = make_collector(broker, database, **settings).start()
    messages = numbered(2000)  # would take 50 s with a linger of 0.5 s for each 20
    publish(broker, messages)
    collector.wait_settled(2000, timeout=20)
    assert database.payloads() == payloads(messages)


def test_two_collectors_with_one_client_id_lose_nothing(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """The two take over the session from each other until one is stopped."""
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


def test_sigterm_stores_and_acknowledges_received_messages(
    collector: Collector, broker: Mosquitto, database: Database
) -> None:
    """The broker redelivers nothing afterwards."""
    with Stream(broker, every=0.0005) as stream:
        for _ in range(3):
            stream.more(200)
            assert collector.stop() == 0
            stored = database.count()
            stream.more(50)
            assert database.count() == stored, "the process has ended"
            collector.start()
            assert collector.health()["broker"]["session_present"] is True
        stream.more()
        acknowledged = stream.finish()
    wait_stored_once(collector, database, acknowledged)
    stops = [e for e in collector.events() if e["event"] == "stopped"]
    assert len(stops) == 3
    assert collector.metrics()["db_duplicates_total"] == 0


def test_sigterm_ends_the_process_while_the_database_is_down(
    make_collector: MakeCollector, broker: Mosquitto, own_database: Database
) -> None:
    collector = make_collector(broker, own_database, IOT_DRAIN_SECONDS="1").start()
    wait_stored_once(collector, own_database, acknowledged := publish(broker, numbered(100)))
    own_database.server.stop()
    acknowledged |= publish(broker, numbered(100, start=100))
    eventually(lambda: collector.metrics()["messages_in_flight"] == 100, what="they wait")
    collector.signal(signal.SIGTERM)
    assert collector.wait(15) == 0
    own_database.server.start()
    collector.start()
    wait_stored_once(collector, own_database, acknowledged)


def test_sigint_ends_the_process_without_broker_and_database(
    make_collector: MakeCollector, make_broker: MakeBroker, own_database: Database
) -> None:
    own_database.server.stop()
    collector = make_collector(make_broker(), own_database, IOT_DRAIN_SECONDS="1")
    collector.launch().wait_listening()
    collector.signal(signal.SIGINT)
    assert collector.wait(15) == 0


def test_messages_are_stored_once_when_the_collector_is_killed(
    collector: Collector, broker: Mosquitto, database: Database
) -> None:
    """A kill can fall between COMMIT and PUBACK. Then the broker redelivers the messages."""
    with Stream(broker, every=0.0005) as stream:
        for _ in range(5):
            stream.more(100)
            collector.kill()
            stream.more(20)
            collector.start()
        acknowledged = stream.finish()
    wait_stored_once(collector, database, acknowledged)


COMMIT_WAITS = """
CREATE FUNCTION wait_for_test() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    PERFORM pg_advisory_xact_lock_shared(1); RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER wait_for_test AFTER INSERT ON messages DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION wait_for_test();
"""


def committing(database: Database) -> int:
    """The number of transactions that wait in COMMIT, where the deferred trigger runs."""
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
            eventually(lambda: committing(database), what="a COMMIT waits")

        yield wait


@pytest.mark.parametrize("late", [False, True], ids=["before the retry", "during the retry"])
def test_messages_are_stored_once_when_the_answer_to_commit_is_lost(
    late: bool,
    make_collector: MakeCollector,
    make_proxy: Callable[[int], Proxy],
    broker: Mosquitto,
    database: Database,
) -> None:
    """PostgreSQL finishes the COMMIT although the connection is broken."""
    proxy = make_proxy(database.server.port)
    url = database.url.replace(f":{database.server.port}/", f":{proxy.port}/")
    collector = make_collector(broker, database, IOT_DATABASE_URL=url).start()
    with waiting_commit(database) as commit_waits:
        acknowledged = publish(broker, numbered(50))
        commit_waits()
        proxy.refusing = True
        proxy.cut()
        wait_problem(collector, "database: connection")
        if late:
            proxy.refusing = False
            eventually(
                lambda: "ledger" in blocked_statements(database), what="the retry waits for a lock"
            )
    eventually(database.count, what="the COMMIT succeeds")
    proxy.refusing = False
    wait_stored_once(collector, database, acknowledged)
    assert collector.metrics()["mqtt_messages_total"] == 50


def test_messages_are_stored_once_when_commit_exceeds_the_timeout(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """statement_timeout does not end a COMMIT. The collector closes the connection and retries."""
    collector = make_collector(broker, database, IOT_DATABASE_TIMEOUT_SECONDS="1").start()
    with waiting_commit(database) as commit_waits:
        acknowledged = publish(broker, numbered(50))
        commit_waits()
        wait_problem(collector, "database: connection")
        assert "the database does not answer" in collector.log()
        wait_problem(collector, "database: timeout")  # the retry waits for the COMMIT
    wait_stored_once(collector, database, acknowledged)
    assert database.count() == 50
    assert collector.metrics()["mqtt_messages_total"] == 50


def blocked_statements(database: Database) -> str:
    """The statements that wait for another transaction to end, as one text."""
    found = database.query(
        "SELECT string_agg(query, ' ') FROM pg_stat_activity"
        " WHERE datname = %s AND wait_event_type = 'Lock' AND wait_event = 'transactionid'",
        database.name,
    )
    return found[0][0] or ""


def test_messages_are_stored_once_when_pubacks_are_lost(
    make_collector: MakeCollector,
    make_proxy: Callable[[int], Proxy],
    broker: Mosquitto,
    database: Database,
) -> None:
    """Redelivered messages are counted as duplicates, in the same process and in the next one."""
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
    eventually(lambda: broker.log().count("Received PUBACK") >= 50, what="50 PUBACKs arrive")
    proxy.up = "drop"
    acknowledged |= publish(broker, numbered(50, start=50))
    collector.wait_settled(150)
    collector.kill()
    proxy.up = "pass"
    collector.start()
    metrics = collector.wait_settled(50)
    assert metrics["db_duplicates_total"] == 50, "in the next process"
    wait_stored_once(collector, database, acknowledged)
    assert database.count() == 100


def test_sigterm_waits_for_a_commit(
    collector: Collector, broker: Mosquitto, database: Database
) -> None:
    """The batch is stored and acknowledged before the process ends; nothing is redelivered."""
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


def test_messages_are_stored_once_when_killed_during_commit(
    collector: Collector, broker: Mosquitto, database: Database
) -> None:
    """PostgreSQL finishes the COMMIT of a killed process. The next process waits for it."""
    database.query(COMMIT_WAITS)
    with contextlib.closing(database.connect()) as holder, holder.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(1)")
        acknowledged = publish(broker, numbered(50))
        eventually(lambda: committing(database) == 1, what="a COMMIT waits")
        collector.kill()
        collector.start()
        eventually(lambda: collector.metrics()["messages_in_flight"] == 50, what="50 redelivered")
    wait_stored_once(collector, database, acknowledged)
    assert collector.metrics()["db_duplicates_total"] > 0, "the batch of that COMMIT"


def test_messages_with_equal_ids_are_stored_once(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    """Messages without an id are always stored."""
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
    """A message redelivered right before the session expires is still recognised."""
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
    publish(broker, numbered(1))  # the first batch of the day deletes old ids
    collector.wait_settled(1)
    assert database.query("SELECT id FROM message_ids") == [("kept",)]
    publish(broker, [("iot/data", b'{"id": "kept"}'), ("iot/data", b'{"id": "forgotten"}')])
    assert collector.wait_settled(3)["db_duplicates_total"] == 1


# Settings and logs ---------------------------------------------------------------------------


def test_port_in_use_stops_the_start(
    make_collector: MakeCollector, broker: Mosquitto, database: Database
) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = str(taken.getsockname()[1])
        collector = make_collector(broker, database, IOT_HTTP_PORT=port).launch()
        assert collector.wait() == 2
    assert collector.log().startswith("wrong setting: IOT_HTTP_PORT: ")
    assert f"{HOST}:{port}" in collector.log()


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_address_of_another_machine_stops_the_start(
    make_collector: MakeCollector, broker: Mosquitto, database: Database, host: str
) -> None:
    collector = make_collector(broker, database, IOT_HTTP_HOST=host).launch()
    assert collector.wait() == 2
    assert collector.log().startswith(
        f"wrong setting: IOT_HTTP_HOST: this machine has no address {host}"
    )


def test_all_wrong_settings_are_named(make_collector: MakeCollector) -> None:
    collector = make_collector(IOT_MQTT_QOS="7", IOT_BATCHROWS="5").launch()
    assert collector.wait() == 2
    lines = collector.log().splitlines()
    assert [line.split(": ")[1] for line in lines] == ["IOT_BATCHROWS", "IOT_MQTT_QOS"]


def test_logs_are_json_without_passwords(
    make_collector: MakeCollector, make_broker: MakeBroker, database: Database, tmp_path: Path
) -> None:
    """Each line is JSON, also during failures. Neither logs nor pages contain a password."""
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
        terminate_sessions(database)
        publish(broker, numbered(1), username="me", password="broker-secret")
        wait_problem(collector, "database: authentication")
        broker.stop()
        wait_problem(collector, "broker: ")
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


def test_messages_are_stored_over_mutual_tls(
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
    wait_stored_once(collector, database, publish(broker, messages))
    assert database.payloads() == payloads(messages)
    assert collector.stop() == 0


def test_untrusted_broker_certificate_is_reported(
    make_collector: MakeCollector, make_broker: MakeBroker, database: Database, tmp_path: Path
) -> None:
    certificates = make_certificates(tmp_path)
    listener = [f"certfile {certificates.server}", f"keyfile {certificates.server_key}"]
    broker = make_broker(scheme="mqtts", listener=listener).start()
    collector = make_collector(broker, database).launch().wait_listening()
    wait_problem(collector, "certificate verify failed")


def test_messages_are_stored_over_websocket(
    make_collector: MakeCollector, make_broker: MakeBroker, database: Database
) -> None:
    broker = make_broker(scheme="ws", listener=["protocol websockets"]).start()
    collector = make_collector(broker, database).start()
    messages = [*numbered(3000), ("iot/large", b"x" * 300_000), *numbered(100, start=3000)]
    wait_stored_once(collector, database, publish(broker, messages))
    assert database.payloads() == payloads(messages)
    assert collector.stop() == 0


def test_refused_subscription_is_reported_until_granted(
    make_collector: MakeCollector, make_broker: MakeBroker, database: Database, tmp_path: Path
) -> None:
    security = DynamicSecurity(tmp_path, deny_subscribe="secret/+")
    broker = make_broker(*security.settings).start()
    collector = make_collector(broker, database, IOT_MQTT_TOPICS="iot/data,secret/+")
    collector.launch().wait_listening()
    wait_problem(collector, "secret/+")
    wait_problem(collector, "secret/+", "/health")
    assert "iot/data" not in collector.health()["broker"]["error"], "iot/data was granted"
    security.allow(broker, "secret/+")
    collector.wait_ready()
    wait_stored_once(collector, database, publish(broker, [("secret/1", b"x"), ("iot/data", b"y")]))


def test_old_subscription_stays_until_the_new_one_is_granted(
    make_collector: MakeCollector, make_broker: MakeBroker, database: Database, tmp_path: Path
) -> None:
    security = DynamicSecurity(tmp_path, deny_subscribe="$share/g/iot/data")
    broker = make_broker(*security.settings).start()
    collector = make_collector(broker, database, IOT_MQTT_TOPICS="iot/data").start()
    assert collector.stop() == 0
    collector.settings["IOT_MQTT_TOPICS"] = "$share/g/iot/data"
    collector.launch().wait_listening()
    wait_problem(collector, "$share/g/iot/data")
    acknowledged = publish(broker, numbered(100))
    wait_stored_once(collector, database, acknowledged)
    security.allow(broker, "$share/g/iot/data")
    collector.wait_ready()
    query = "SELECT filters FROM sessions"
    eventually(
        lambda: database.query(query) == [(["$share/g/iot/data"],)],
        what="the subscription is replaced",
    )
    wait_stored_once(collector, database, acknowledged | publish(broker, numbered(100, start=100)))
