"""Migrations, partitions and the functions of the schema."""

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from iot_collector.buffer import ReadBatch
from iot_collector.copy_format import RowPrefixes, encode_rows
from iot_collector.fields import fields_of_all
from iot_collector.migrate import migrate, migrations
from iot_collector.partitions import MONTHS_AHEAD
from iot_collector.sessions import Claim
from iot_collector.settings import Settings
from iot_collector.store import Store

from testing.collector import Collector, run_command
from testing.mosquitto import Mosquitto
from testing.postgres import Database
from testing.publisher import publish
from testing.service import eventually


def settings_for(database: Database, **more: Any) -> Settings:
    return Settings(database_url=database.url, database_password=database.password, **more)


def partitions(database: Database) -> list[str]:
    found = database.query(
        "SELECT inhrelid::regclass::text FROM pg_inherits"
        " WHERE inhparent = 'messages'::regclass ORDER BY 1"
    )
    return [name for (name,) in found]


def months(start: datetime, count: int) -> list[str]:
    first = start.year * 12 + start.month - 1
    return [f"messages_{m // 12:04d}_{m % 12 + 1:02d}" for m in range(first, first + count)]


def read_at(moment: datetime, *payloads: bytes) -> ReadBatch:
    prefixes = [RowPrefixes(0x32)[b"iot/data"]] * len(payloads)
    rows = encode_rows(prefixes, list(payloads), fields_of_all(list(payloads)))
    tags = [0x32 << 16 | i + 1 for i in range(len(rows))]
    return ReadBatch(None, rows, tags, time.monotonic(), moment.timestamp())


def test_second_migrate_changes_nothing(empty_database: Database) -> None:
    settings = empty_database.environment()
    first = run_command("migrate", **settings)
    assert first.returncode == 0, first.stderr
    names = [name for name, _ in migrations()]
    assert names == sorted(names)
    assert len(names) >= 3
    assert first.stdout.splitlines() == [f"applied {name}" for name in names]
    again = run_command("migrate", **settings)
    assert (again.returncode, again.stdout) == (0, "up to date\n")
    assert empty_database.query("SELECT count(*) FROM schema_migrations") == [(len(names),)]


def test_concurrent_migrates_apply_each_migration_once(empty_database: Database) -> None:
    barrier = threading.Barrier(4)

    def run() -> list[str]:
        barrier.wait()
        return migrate(settings_for(empty_database))

    with ThreadPoolExecutor(4) as pool:
        results = [future.result() for future in [pool.submit(run) for _ in range(4)]]
    names = [name for name, _ in migrations()]
    assert sorted(results, key=len) == [[], [], [], names]


def test_failed_migration_changes_nothing(empty_database: Database) -> None:
    empty_database.query("CREATE TABLE dead_letters (somebody_elses text)")
    failed = run_command("migrate", **empty_database.environment())
    assert failed.returncode == 1
    assert "nothing was changed" in failed.stderr
    assert "dead_letters" in failed.stderr
    found = empty_database.query(
        "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace"
    )
    assert found == [("dead_letters",)]


def test_refused_login_is_explained(empty_database: Database) -> None:
    settings = {**empty_database.environment(), "IOT_DATABASE_PASSWORD": "wrong-one"}
    failed = run_command("migrate", **settings)
    assert failed.returncode == 1
    assert "password authentication failed" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert "wrong-one" not in failed.stderr


def test_partitions_are_created_ahead(database: Database) -> None:
    assert partitions(database) == months(datetime.now(UTC), MONTHS_AHEAD + 1)
    bounds = database.query(
        "SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE relispartition AND relkind = 'r'"
    )
    assert not [text for (text,) in bounds if "DEFAULT" in text]


def test_ensure_partitions_creates_missing_months(database: Database) -> None:
    made = "SELECT ensure_partitions(%s, %s)"
    before = partitions(database)
    start = datetime(2031, 11, 30, 23, 59, 59, tzinfo=UTC)
    assert database.query(made, start, 3) == [(4,)]
    assert database.query(made, start, 3) == [(0,)], "they exist already"
    assert database.query(made, start, 4) == [(1,)]
    assert set(partitions(database)) - set(before) == set(months(start, 5))
    # Months are in UTC, also with another time zone: there is no gap and no overlap.
    for moment in ("2031-11-01 00:00+00", "2031-11-30 23:59:59.999999+00", "2032-03-31 23:59+00"):
        database.query(
            "INSERT INTO messages (received_at, topic, payload, qos, retained)"
            " VALUES (%s, 't', '', 0, false)",
            moment,
        )
    with pytest.raises(psycopg2.errors.CheckViolation, match="no partition"):
        database.query(
            "INSERT INTO messages (received_at, topic, payload, qos, retained)"
            " VALUES ('2031-10-31 23:59:59.999999+00', 't', '', 0, false)"
        )


def test_concurrent_ensure_partitions_create_each_month_once(database: Database) -> None:
    barrier = threading.Barrier(4)

    def run() -> int:
        barrier.wait()
        made: int = database.query("SELECT ensure_partitions('2035-01-01', 3)")[0][0]
        return made

    with ThreadPoolExecutor(4) as pool:
        assert sorted(f.result() for f in [pool.submit(run) for _ in range(4)]) == [0, 0, 0, 4]


@pytest.mark.parametrize("year", [1970, 2000, 2049, 2120])
def test_rows_are_stored_when_the_clock_is_years_off(year: int, database: Database) -> None:
    """A wrong clock creates unusual partitions, but no message is lost."""
    moment = datetime(year, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
    store = Store(settings_for(database))
    stored = store.write([read_at(moment, b"a:1"), read_at(datetime.now(UTC), b"a:2")])
    store.close()
    assert stored.inserted == 2
    assert database.query("SELECT received_at FROM messages WHERE payload = 'a:1'") == [(moment,)]


def test_readings_has_a_row_for_each_field(database: Database) -> None:
    database.query(
        "INSERT INTO messages (received_at, topic, payload, fields, qos, retained) VALUES"
        """ (now(), 'a', '', '{"t": 23.5, "s": "on", "b": true, "n": null, "h": 1e2}', 0, false),"""
        " (now(), 'b', '', null, 0, false), (now(), 'c', '', '{}', 0, false)"
    )
    found = database.query("SELECT topic, name, value::text, text FROM readings ORDER BY name")
    assert found == [
        ("a", "b", "1", "true"),
        ("a", "h", "100", "100"),
        ("a", "s", None, "on"),
        ("a", "t", "23.5", "23.5"),
    ]


LEAVES: list[tuple[str, dict[str, str]]] = [
    ('{"a": {"b": 1, "c": {}}, "d": [], "e": null, "f": 2}', {"a.b": "1", "f": "2"}),
    (
        '{"v": [1, [2, "x"], {"y": true}]}',
        {"v[0]": "1", "v[1][0]": "2", "v[1][1]": "x", "v[2].y": "true"},
    ),
    ('[{"n": 1}, 2, null]', {"[0].n": "1", "[1]": "2"}),
    ('"on"', {"state": "on"}),
    ("23.50", {"state": "23.50"}),
    ("false", {"state": "false"}),
    ("null", {}),
    ("{}", {}),
    ("[" * 32 + "1" + "]" * 32, {"[0]" * 32: "1"}),
    ("[" * 33 + "1" + "]" * 33, {}),
    ('{"a":' * 1000 + "1" + "}" * 1000, {}),
]


def test_json_leaves_flattens_documents(database: Database) -> None:
    for document, expected in LEAVES:
        found = database.query(
            "SELECT name, value #>> '{}' FROM json_leaves('plant/pump/state', %s::jsonb)", document
        )
        assert sorted(found) == sorted(expected.items()), document[:80]


TIMES: list[tuple[str, str, str | None]] = [
    ('"2026-11-24T10:00:00Z"', "iso8601", "2026-11-24 10:00:00+00"),
    ('"2026-11-24 10:00:00.5+0130"', "iso8601", "2026-11-24 08:30:00.5+00"),
    ('"2026-11-24T10:00:00,25-05"', "iso8601", "2026-11-24 15:00:00.25+00"),
    ('"2026-11-24t10:00z"', "iso8601", "2026-11-24 10:00:00+00"),
    ('"2026-11-24T10:00:00"', "iso8601", "2026-11-24 10:00:00+00"),
    ('"2028-02-29T10:00:00Z"', "iso8601", "2028-02-29 10:00:00+00"),
    ("1795514400", "s", "2026-11-24 10:00:00+00"),
    ("1795514400.25", "s", "2026-11-24 10:00:00.25+00"),
    ('"1795514400"', "s", "2026-11-24 10:00:00+00"),
    ("1795514400123", "ms", "2026-11-24 10:00:00.123+00"),
    ("1795514400123456", "us", "2026-11-24 10:00:00.123456+00"),
    *(
        (json.dumps(text), "iso8601", None)
        for text in (
            *("0001-01-01T00:00:00Z", "1970-01-01T00:00:12Z", "20000-01-01T00:00:00Z"),
            *("2027-02-29T00:00:00Z", "2026-04-31T00:00:00Z", "2026-13-01T00:00:00Z", "now"),
            *("2026-11-24T24:00:00Z", "2026-11-24T10:60:00Z", "2026-11-24T10:00:00+16:00"),
            *("2026-11-24", "2026-11-24T10:00:00 PST", "2026-11-24T10:00:00Z\n", "infinity", ""),
        )
    ),
    *((text, "iso8601", None) for text in ("2026", "true", "null", "[]", '{"a": 1}')),
    *(
        (text, unit, None)
        for unit in ("s", "ms", "us")
        for text in ("0", "-5", "1e300", "1e-300", '"x"', '"1e9"', "true", "null", "[1]", "12")
    ),
    ("4102444800", "s", None),
    ("946684799", "s", None),
]


def test_device_time_reads_each_unit(database: Database) -> None:
    values, units, expected = zip(*TIMES, strict=True)
    found = database.query(
        "SELECT device_time(value::jsonb, unit), wanted::timestamptz"
        " FROM unnest(%s, %s, %s) t(value, unit, wanted)",
        list(values),
        list(units),
        list(expected),
    )
    for case, (time_found, wanted) in zip(TIMES, found, strict=True):
        assert time_found == wanted, case


def test_collector_works_with_few_privileges(database: Database) -> None:
    """It needs INSERT, its own tables, and EXECUTE on ensure_partitions."""
    role = f"{database.name}_limited"
    database.query(f"CREATE ROLE {role} LOGIN PASSWORD 'x'")
    user = Database(database.server, database.name, role, "x")
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        user.query("SELECT ensure_partitions(now(), 1)")
    database.query(
        f"GRANT INSERT ON messages, dead_letters, dead_letters_fallback TO {role};"
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ledger, sessions, message_ids TO {role};"
        f"GRANT EXECUTE ON FUNCTION ensure_partitions TO {role}"
    )
    database.query("ALTER TABLE messages ADD CONSTRAINT c CHECK (payload <> 'poison'::bytea)")
    store = Store(settings_for(user, mqtt_topics=["a"]))
    store.ping()
    assert store.start_session(session_present=False) == Claim()
    stored = store.write([read_at(datetime.now(UTC), b"a:1", b"poison", b"a:2")])
    assert (stored.inserted, stored.dead_letters) == (2, {"constraint": 1})
    assert store.start_session(session_present=True) == Claim(held=["a"])
    store.save_filters([])
    assert database.count("sessions") == 0
    store.write([read_at(datetime(2040, 5, 1, tzinfo=UTC), b"a:3")])
    store.close()
    assert database.payloads() == [b"a:1", b"a:2", b"a:3"]
    assert "messages_2040_05" in partitions(database)
    wanted = settings_for(user, topic_templates="{site}/#", device_time_keys="t:s")
    for granted in (False, True):  # these privileges are optional
        if granted:
            database.query(
                f"GRANT SELECT, INSERT, DELETE ON topic_templates, device_time_keys TO {role}"
            )
        store = Store(wanted)
        store.ping()
        store.close()
        assert database.count("topic_templates") == database.count("device_time_keys") == granted
    for forbidden in ("SELECT 1 FROM messages", "DELETE FROM messages", "TRUNCATE messages"):
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            user.query(forbidden)


def test_newer_schema_is_refused(
    database: Database, broker: Mosquitto, make_collector: Callable[..., Collector]
) -> None:
    """All commands that write refuse it, for example after a downgrade."""
    collector = make_collector(broker, database).start()
    database.query("INSERT INTO schema_migrations (name) VALUES ('9999_new'), ('9998_new')")
    before = database.query("SELECT * FROM schema_migrations ORDER BY 1")
    said = "newer than this iot-collector"
    migrating = run_command("migrate", **database.environment())
    assert migrating.returncode == 1
    assert said in migrating.stderr
    assert "9998_new, 9999_new" in migrating.stderr
    assert database.query("SELECT * FROM schema_migrations ORDER BY 1") == before
    checking = run_command("check", **database.environment(), **broker.environment())
    assert checking.returncode == 8
    assert said in checking.stdout
    assert "install the version of iot-collector" in checking.stdout
    # A running collector continues, because in a rolling update the first new pod migrates.
    publish(broker, [("a", b"1")])
    eventually(lambda: database.payloads() == [b"1"])
    collector.stop()
    # A new process leaves the messages in the broker and reports the reason.
    publish(broker, [("a", b"2")])
    collector.launch().wait_listening()
    eventually(lambda: said in str(collector.health()))
    assert collector.status("/readyz") == 503
    assert database.payloads() == [b"1"]
    database.query("DELETE FROM schema_migrations WHERE name LIKE '999%'")
    eventually(lambda: database.payloads() == [b"1", b"2"])


# Rows of each table as they were written under the schema of migration 0004.
FILLED = Path(__file__).with_name("filled_0004.sql")


def test_upgrade_keeps_all_rows(
    empty_database: Database, broker: Mosquitto, make_collector: Callable[..., Collector]
) -> None:
    """From the schema of the first release. The collector then works with the new schema."""
    with contextlib.closing(empty_database.connect()) as connection, connection.cursor() as cursor:
        cursor.execute(FILLED.read_text())
        connection.commit()
    old = {
        table: empty_database.query(f"SELECT * FROM {table} ORDER BY 1, 2")
        for table in ("messages", "dead_letters", "dead_letters_fallback", "ledger", "message_ids")
    }
    assert all(old.values())
    readings = empty_database.query("SELECT topic, name, value FROM readings")
    assert readings
    empty_database.query("CREATE VIEW theirs AS SELECT * FROM readings")
    barrier = threading.Barrier(3)

    def run() -> list[str]:
        barrier.wait()
        return migrate(settings_for(empty_database))

    with ThreadPoolExecutor(3) as pool:
        results = [future.result() for future in [pool.submit(run) for _ in range(3)]]
    assert sorted(results, key=len)[:2] == [[], []], "only one of them migrates"
    for table, rows in old.items():
        columns = len(rows[0])
        now = empty_database.query(f"SELECT * FROM {table} ORDER BY 1, 2")
        assert [row[:columns] for row in now] == rows, table
    collector = make_collector(broker, empty_database).start()
    publish(broker, [("new", b'{"a":{"b":23}}')])
    collector.wait_settled(1)
    now = empty_database.query("SELECT topic, name, value, text FROM readings ORDER BY id, name")
    assert now[-1] == ("new", "a.b", 23, "23")
    assert set(readings) <= {row[:3] for row in now}, "text and booleans are new"
    [(newest, count)] = empty_database.query("SELECT max(id), count(*) FROM messages")
    assert (newest > 4, count) == (True, len(old["messages"]) + 1)


def test_partition_metrics(
    database: Database, broker: Mosquitto, make_collector: Callable[..., Collector]
) -> None:
    database.query("SELECT ensure_partitions('2020-02-01 00:00+00', 0)")
    collector = make_collector(broker, database, IOT_ARCHIVE_TARGET="none").start()
    metrics = collector.metrics()
    [(until, due)] = database.query(
        "SELECT extract(epoch FROM (date_trunc('month', now() AT TIME ZONE 'UTC')"
        " + make_interval(months => %s)) AT TIME ZONE 'UTC')::float8,"
        " extract(epoch FROM timestamptz '2021-03-01 00:00+00')::float8",
        MONTHS_AHEAD + 1,
    )
    assert metrics["db_partitions_until_timestamp_seconds"] == until
    assert metrics["db_partition_due_timestamp_seconds"] == due  # 12 months are kept
    collector.stop()
    # A restored month is due after its last day. Months after a gap do not count.
    database.query("COMMENT ON TABLE messages_2020_02 IS 'iot-collector: kept until 2050-01-02'")
    month = datetime.fromtimestamp(until, UTC) - timedelta(days=40)
    database.query(f"DROP TABLE messages_{month:%Y_%m}")
    metrics = collector.start().metrics()
    assert metrics["db_partitions_until_timestamp_seconds"] < until
    assert metrics["db_partition_due_timestamp_seconds"] > due
    collector.stop()
    collector = make_collector(broker, database).start()
    assert collector.metrics()["db_partition_due_timestamp_seconds"] == math.inf
