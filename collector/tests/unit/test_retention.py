"""``iot-collector archive`` and ``restore``, against a real PostgreSQL."""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pytest

from testing.collector import clean_environment, iot_collector, run_command
from testing.postgres import Database, Postgres
from testing.service import IS_ROOT, Service, eventually

OLD = datetime(2020, 2, 1, tzinfo=UTC)
TABLE = "messages_2020_02"
INSERT = (
    "INSERT INTO messages (received_at, topic, payload, fields, properties, qos, retained)"
    " VALUES (%s, %s, %s, %s, %s, %s, %s)"
)
# Random payloads, which do not compress.
INSERT_RANDOM = (
    "INSERT INTO messages (received_at, topic, payload, qos, retained)"
    " SELECT '2020-02-02', 'z', sha512(n::text::bytea), 0, false FROM generate_series(1, %s) n"
)
# Whole rows as text, so that a difference in any column shows.
SELECT_ROWS = "SELECT m::text FROM messages m WHERE received_at < '2020-03-01' ORDER BY id"


def make_month(database: Database, rows: int = 500, month: datetime = OLD) -> list[Any]:
    """Fill an old month with values that are easily damaged; return its rows as text."""
    database.query("SELECT ensure_partitions(%s, 0)", month)
    dice = random.Random(7)
    with contextlib.closing(database.connect()) as connection, connection.cursor() as cursor:
        for n in range(rows):
            received = month.replace(
                day=dice.randint(1, 28),
                hour=dice.randint(0, 23),
                microsecond=dice.randint(0, 999999),
            )
            cursor.execute(
                INSERT,
                (
                    received,
                    dice.choice(
                        ["iot/data", "a", "größe/\u2603", "\U0001f321/x", 'q"uo,te\\N', "\\N"]
                    ),
                    dice.choice([b"", b"temperature:23", dice.randbytes(40), b'\\N\n\r\t\0,"']),
                    dice.choice(
                        [None, '{"n": 1.50, "e": 1e2, "s": "\\u2603\\n\\"", "z": null}', "{}"]
                    ),
                    dice.choice([None, None, '{"user": {"a": ["1", ""]}}']),
                    n % 3,
                    n % 2 == 0,
                ),
            )
        connection.commit()
    return old_rows(database)


def old_rows(database: Database) -> list[Any]:
    return database.query(SELECT_ROWS)


def old_partitions(database: Database) -> list[str]:
    """The partitions of old months, attached or detached."""
    found = database.query(
        "SELECT relname FROM pg_class WHERE relname ~ '^messages_20[012][0-4]'"
        " AND relkind = 'r' ORDER BY 1"
    )
    return [name for (name,) in found]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "archive"
    folder.mkdir()
    return folder


def settings(database: Database, target: object) -> dict[str, str]:
    return {**database.environment(), "IOT_ARCHIVE_TARGET": str(target)}


def archive(
    database: Database, target: object, *arguments: str
) -> subprocess.CompletedProcess[str]:
    return run_command("archive", *arguments, **settings(database, target))


def files(target: Path) -> list[str]:
    return sorted(path.name for path in target.iterdir())


def archived_rows(target: Path) -> int:
    """The number of rows in the archive, counted by DuckDB."""
    [(count,)] = select(f"SELECT count(*) FROM '{target}/*.parquet'")
    return int(count)


def select(sql: str) -> list[Any]:
    """Run a query in DuckDB."""
    with duckdb.connect() as connection:
        return connection.execute(sql).fetchall()


def test_old_month_is_archived_then_dropped(database: Database, target: Path) -> None:
    rows = make_month(database)
    new = datetime.now(UTC)
    database.query(INSERT, new, "iot/data", b"new", None, None, 1, False)
    planned = archive(database, target, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "messages_2020_02: 500 rows" in planned.stdout
    assert "would be archived" in planned.stdout
    assert (files(target), old_partitions(database)) == ([], [TABLE])
    done = archive(database, target)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "messages_2020_02: 500 rows archived, read back and dropped\n"
    assert old_partitions(database) == []
    assert database.payloads() == [b"new"]
    assert files(target) == [f"{TABLE}.json", f"{TABLE}.parquet"]
    manifest = json.loads((target / f"{TABLE}.json").read_text())
    assert manifest["rows"] == len(rows) == 500
    assert manifest["bytes"] == (target / f"{TABLE}.parquet").stat().st_size
    # DuckDB reads the rows sorted by topic, then time.
    found = select(f"SELECT * FROM '{target}/{TABLE}.parquet'")
    assert found == sorted(found, key=lambda row: (row[2].encode(), row[1], row[0]))
    assert manifest["received_from"] == min(row[1] for row in found).isoformat().replace(
        "+00:00", "Z"
    )
    again = archive(database, target)
    assert (again.returncode, again.stdout) == (0, "no month is older than 12 months\n")


def test_months_within_the_retention_are_kept(database: Database, target: Path) -> None:
    [(first_kept, last_due)] = database.query(
        "SELECT date_trunc('month', now() AT TIME ZONE 'UTC') - interval '3 months',"
        " date_trunc('month', now() AT TIME ZONE 'UTC') - interval '4 months'"
    )
    for month in (first_kept, last_due):
        database.query("SELECT ensure_partitions(%s, 0)", month.replace(tzinfo=UTC))
        database.query(INSERT, month.replace(tzinfo=UTC), "t", b"", None, None, 0, False)
    done = archive(database, target, "--keep-months", "3")
    assert done.stdout == f"messages_{last_due:%Y_%m}: 1 rows archived, read back and dropped\n"
    assert database.count() == 1


def test_month_is_dropped_without_archive_only_with_target_none(database: Database) -> None:
    make_month(database, 3)
    done = run_command("archive", **database.environment())
    assert done.returncode == 1
    assert "IOT_ARCHIVE_TARGET is not set" in done.stderr
    assert old_partitions(database) == [TABLE]
    done = archive(database, "none")
    assert (done.returncode, done.stdout) == (0, "messages_2020_02: 3 rows dropped\n")
    assert old_partitions(database) == []


@pytest.mark.parametrize("value", ["relative/path", "s3://", "http://x", "NONE"])
def test_wrong_target_is_refused(value: str, database: Database) -> None:
    done = archive(database, value)
    assert done.returncode == 2
    assert "IOT_ARCHIVE_TARGET" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_target_directory_is_not_created(database: Database, target: Path) -> None:
    """A missing directory can be a volume that is not mounted."""
    make_month(database, 3)
    done = archive(database, target / "missing")
    assert done.returncode == 2
    assert "is not a directory" in done.stderr
    assert old_partitions(database) == [TABLE]


def test_month_stays_when_the_target_is_full(database: Database, tmp_path: Path) -> None:
    """The target is a file system of 64 KiB, smaller than the month."""
    if not IS_ROOT:
        pytest.skip("mounting needs root")
    make_month(database, 10)
    database.query(INSERT_RANDOM, 4000)
    small = tmp_path / "small"
    small.mkdir()
    # The file system is mounted in a new mount namespace, which ends with the command.
    done = subprocess.run(
        [
            "unshare",
            "--mount",
            "sh",
            "-c",
            f'mount -t tmpfs -o size=64k small "{small}" && "{iot_collector()}" archive; echo "$?";'
            f' ls -A "{small}"',
        ],
        env=clean_environment() | settings(database, small),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout == "1\n", done.stdout + done.stderr  # and no file is left
    assert "No space left" in done.stderr
    assert "make room" in done.stderr
    assert old_partitions(database) == [TABLE]
    assert database.count(TABLE) == 4010


def test_month_stays_when_the_target_is_read_only(database: Database, target: Path) -> None:
    make_month(database, 3)
    command = [iot_collector(), "archive"]
    target.chmod(0o555)
    if IS_ROOT:  # with CAP_DAC_OVERRIDE, root may write everywhere
        command = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", *command]
    done = subprocess.run(
        command,
        env=clean_environment() | settings(database, target),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert "ermission denied" in done.stderr
    assert "let the user that runs iot-collector write there" in done.stderr
    assert old_partitions(database) == [TABLE]


@pytest.mark.parametrize(
    ("sql", "named"),
    [
        (f"CREATE VIEW v AS SELECT topic FROM {TABLE}", "view v"),
        (f"CREATE MATERIALIZED VIEW mv AS SELECT topic FROM {TABLE}", "materialized view mv"),
        (
            f"ALTER TABLE {TABLE} ADD UNIQUE (id);"
            f"CREATE TABLE f (id bigint REFERENCES {TABLE} (id))",
            "constraint f_id_fkey on table f",
        ),
        ("CREATE TABLE rest PARTITION OF messages DEFAULT", "the default partition rest"),
    ],
)
def test_month_with_dependent_objects_is_not_dropped(
    sql: str, named: str, database: Database, target: Path
) -> None:
    """Other months are archived nevertheless."""
    make_month(database, 3)
    make_month(database, 3, datetime(2020, 1, 1, tzinfo=UTC))
    database.query(sql)
    done = archive(database, target)
    assert done.returncode == 1
    assert f"{TABLE}: not archived and not dropped, because {named} depends" in done.stderr
    assert TABLE in old_partitions(database)
    assert ("messages_2020_01" in old_partitions(database)) == ("DEFAULT" in sql)


def test_month_with_additional_indexes_and_grants_is_dropped(
    database: Database, target: Path
) -> None:
    make_month(database, 3)
    database.query(
        f"CREATE INDEX mine ON {TABLE} (qos); ANALYZE {TABLE}; GRANT SELECT ON {TABLE} TO PUBLIC;"
        f"CREATE STATISTICS s ON qos, retained FROM {TABLE}"
    )
    assert archive(database, target).returncode == 0
    assert old_partitions(database) == []


def test_tables_that_are_no_partitions_stay(database: Database, target: Path) -> None:
    database.query(
        "CREATE TABLE messages_2020_02 (LIKE messages);"
        "CREATE TABLE messages_2020_03_detached (LIKE messages)"
    )
    done = archive(database, target)
    assert done.stdout == "no month is older than 12 months\n"
    assert len(old_partitions(database)) == 2


DAMAGE = {
    "truncated": "it is truncated or altered",
    "altered": "its SHA-256 differs from its manifest",
    "deleted": "No such file",
    "manifest": "is not a manifest",
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_month_stays_when_its_archive_is_damaged(
    fault: str, database: Database, target: Path
) -> None:
    """The month is already archived and gets a late row. Then its archive is damaged."""
    make_month(database, 50)
    assert archive(database, target).returncode == 0
    make_month(database, 1)
    damage(target / f"{TABLE}.parquet", fault)
    done = archive(database, target)
    assert done.returncode == 1
    assert f"{TABLE}." in done.stderr
    assert DAMAGE[fault] in done.stderr
    assert database.count(TABLE) == 1
    assert "messages_2020_02-2.parquet" not in files(target)


def damage(file: Path, fault: str) -> None:
    data = bytearray(file.read_bytes())
    if fault == "truncated":
        file.write_bytes(data[:-100])
    elif fault == "altered":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif fault == "deleted":
        file.unlink()
    else:
        file.with_suffix(".json").write_text('{"format": 1}')


def test_late_rows_go_to_a_second_file(database: Database, target: Path) -> None:
    make_month(database, 50)
    assert archive(database, target).returncode == 0
    make_month(database, 2)
    done = archive(database, target)
    assert done.stdout == f"{TABLE}: 2 rows archived, read back and dropped\n", done.stderr
    assert files(target) == [
        f"{TABLE}-2.json",
        f"{TABLE}-2.parquet",
        f"{TABLE}.json",
        f"{TABLE}.parquet",
    ]
    assert archived_rows(target) == 52


def test_second_archive_run_at_the_same_time_does_nothing(database: Database, target: Path) -> None:
    make_month(database, 3)
    with contextlib.closing(database.connect()) as other, other.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(hashtext('iot.archive'))")
        done = archive(database, target)
        assert (done.returncode, done.stdout) == (
            0,
            "another archive or restore is running; nothing to do\n",
        )
        assert old_partitions(database) == [TABLE]
    assert archive(database, target).returncode == 0


def test_month_stays_when_the_clock_is_wrong(
    database: Database, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from iot_collector import retention
    from iot_collector.settings import Settings

    make_month(database, 3)
    month_ahead = time.time() + 31 * 86400
    monkeypatch.setattr(time, "time", lambda: month_ahead)
    settings_ = Settings(
        database_url=database.url, database_password=database.password, archive_target=str(target)
    )
    with pytest.raises(retention.RetentionError, match="clock of this machine"):
        list(retention.archive(settings_))
    assert old_partitions(database) == [TABLE]


class Archiver(Service):
    """``iot-collector archive`` as a process."""

    name = "archive"

    def __init__(self, folder: Path, database: Database, target: object, *arguments: str) -> None:
        super().__init__(folder)
        self.environment = clean_environment() | settings(database, target)
        self.arguments = arguments

    def command(self) -> list[str]:
        return [iot_collector(), "archive", *self.arguments]

    def options(self) -> dict[str, Any]:
        return {"env": self.environment}


@pytest.fixture
def archiver(tmp_path: Path, database: Database, target: Path) -> Iterator[Archiver]:
    made = Archiver(tmp_path, database, target)
    yield made
    made.close()


def assert_next_run_completes(database: Database, target: Path, rows: int) -> None:
    """Archive again; assert that each row is in the archive once and the partition is dropped."""
    done = archive(database, target)
    assert done.returncode == 0, done.stdout + done.stderr
    assert old_partitions(database) == []
    assert archived_rows(target) == rows
    assert not [name for name in files(target) if name.startswith(".")]


def waits_for_a_lock(database: Database, what: str) -> Any:
    """Whether a statement that starts with ``what`` waits for a lock."""
    return database.query(
        "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE %s"
        " AND datname = current_database()",
        f"{what}%",
    )


def test_archive_killed_while_writing_is_completed_by_the_next_run(
    database: Database, target: Path, archiver: Archiver
) -> None:
    """It leaves an incomplete file under a temporary name."""
    make_month(database, 400)
    database.query(INSERT_RANDOM, 60_000)
    archiver.launch()
    hidden = target / f".{TABLE}.parquet.tmp"
    eventually(hidden.exists)
    archiver.kill()
    assert files(target) == [hidden.name]
    assert database.count(TABLE) == 60_400
    assert_next_run_completes(database, target, 60_400)


def test_archive_killed_while_detaching_is_completed_by_the_next_run(
    database: Database, target: Path, archiver: Archiver
) -> None:
    """DETACH CONCURRENTLY has started, and waits for a query that uses the partition."""
    make_month(database, 20)
    with contextlib.closing(database.connect()) as reader, reader.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM messages")
        archiver.launch()
        eventually(lambda: waits_for_a_lock(database, "ALTER TABLE messages DETACH"))
        # INSERT does not wait meanwhile.
        database.query(INSERT, datetime.now(UTC), "t", b"meanwhile", None, None, 0, False)
        assert database.query("SELECT inhdetachpending FROM pg_inherits WHERE inhdetachpending")
        archiver.kill()
        # PostgreSQL would notice only with its answer that the client is gone.
        database.query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE query LIKE 'ALTER TABLE messages DETACH%' AND pid <> pg_backend_pid()"
        )
        reader.rollback()
    assert old_partitions(database) == [TABLE]
    assert_next_run_completes(database, target, 20)
    assert database.payloads() == [b"meanwhile"]


def test_archive_killed_before_the_drop_is_completed_by_the_next_run(
    database: Database, target: Path, archiver: Archiver
) -> None:
    """The partition is detached. Reading the archive back hangs, because the file is a FIFO."""
    make_month(database, 20)
    file, away = target / f"{TABLE}.parquet", target / "away"
    with contextlib.closing(database.connect()) as reader, reader.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM messages")
        archiver.launch()
        eventually(lambda: waits_for_a_lock(database, "ALTER TABLE messages DETACH"))
        file.rename(away)
        os.mkfifo(file)
        reader.rollback()
    eventually(lambda: old_partitions(database) == [f"{TABLE}_detached"])
    eventually(lambda: database.query("SELECT 1 FROM pg_locks WHERE mode = 'AccessExclusiveLock'"))
    archiver.kill()
    away.rename(file)
    assert old_partitions(database) == [f"{TABLE}_detached"]
    # A new partition can be created for a late row, which is archived as well.
    make_month(database, 1)
    assert_next_run_completes(database, target, 21)


def test_row_committed_before_detach_is_archived(
    database: Database, target: Path, archiver: Archiver
) -> None:
    """The file was written before the row was committed."""
    make_month(database, 20)
    with contextlib.closing(database.connect()) as late, late.cursor() as cursor:
        cursor.execute(INSERT, (OLD, "late", b"late", None, None, 0, False))
        archiver.launch()
        eventually(lambda: waits_for_a_lock(database, "ALTER TABLE messages DETACH"))
        assert f"{TABLE}.json" in files(target)
        late.commit()
    assert archiver.wait() == 0, archiver.log()
    assert old_partitions(database) == []
    assert archived_rows(target) == 21
    assert select(f"SELECT payload FROM '{target}/{TABLE}-2.parquet'") == [(b"late",)]


def test_archive_gives_up_when_a_query_runs_too_long(database: Database, target: Path) -> None:
    make_month(database, 20)
    with contextlib.closing(database.connect()) as reader, reader.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM messages")
        done = run_command(
            "archive", **settings(database, target), IOT_DATABASE_TIMEOUT_SECONDS="1"
        )
    assert done.returncode == 1
    assert "timeout" in done.stderr
    assert_next_run_completes(database, target, 20)


def make_last_month(database: Database) -> str:
    """Fill last month and this month from 100 topics; return the index name of last month."""
    for months in (1, 0):
        database.query("SELECT ensure_partitions(now() - make_interval(months => %s), 0)", months)
        database.query(
            "INSERT INTO messages (received_at, topic, payload, qos, retained)"
            " SELECT date_trunc('month', now() AT TIME ZONE 'UTC') AT TIME ZONE 'UTC'"
            "        - make_interval(months => %s) + n * interval '1 second',"
            "        'iot/device-' || n %% 100 || '/data', '', 0, false"
            " FROM generate_series(1, 20000) n",
            months,
        )
    [(index,)] = database.query(
        "SELECT 'messages_' || to_char(now() AT TIME ZONE 'UTC' - interval '1 month', 'YYYY_MM')"
        " || '_topic_received_at_idx'"
    )
    return str(index)


def indexes(database: Database) -> dict[str, tuple[int, bool]]:
    """The relfilenode and validity of each index on topic and time."""
    found = database.query(
        "SELECT relname, relfilenode, indisvalid"
        " FROM pg_index JOIN pg_class c ON c.oid = indexrelid"
        " WHERE relname LIKE 'messages_20%_topic_received_at_idx%'"
    )
    return {name: (file, valid) for name, file, valid in found}


def test_only_the_index_of_last_month_is_rebuilt_once(database: Database, target: Path) -> None:
    index = make_last_month(database)
    month, before = index[: len(TABLE)], indexes(database)
    planned = archive(database, target, "--dry-run")
    assert f"{month}: index of " in planned.stdout
    assert "would be rebuilt" in planned.stdout
    assert indexes(database) == before
    size = "SELECT pg_relation_size(%s)"
    [(large,)] = database.query(size, index)
    done = archive(database, target)
    [(small,)] = database.query(size, index)
    assert done.stdout == (
        "no month is older than 12 months\n"
        f"{month}: index rebuilt, {large} bytes before and {small} after\n"
    )
    assert small < 0.8 * large
    after = indexes(database)
    assert {name for name in after if after[name] != before.get(name)} == {index}
    assert archive(database, target).stdout == "no month is older than 12 months\n"
    assert indexes(database) == after


def test_insert_does_not_wait_while_an_index_is_rebuilt(
    database: Database, archiver: Archiver
) -> None:
    """Not even while REINDEX CONCURRENTLY waits for an older transaction."""
    index = make_last_month(database)
    before = indexes(database)
    with contextlib.closing(database.connect()) as reader, reader.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM messages")
        archiver.launch()
        eventually(lambda: waits_for_a_lock(database, "REINDEX"))
        database.query(
            "SET statement_timeout = '10s';"
            "INSERT INTO messages (received_at, topic, payload, qos, retained)"
            " SELECT received_at, topic, 'late', qos, retained FROM messages LIMIT 1"
        )
        reader.rollback()
    assert archiver.wait() == 0, archiver.log()
    assert database.payloads().count(b"late") == 1
    assert indexes(database)[index] != before[index]


def test_failed_index_rebuild_is_cleaned_up_by_the_next_run(
    database: Database, target: Path
) -> None:
    """An older transaction makes the first REINDEX CONCURRENTLY time out."""
    index = make_last_month(database)
    before = indexes(database)
    with contextlib.closing(database.connect()) as reader, reader.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM messages")
        done = run_command(
            "archive", **settings(database, target), IOT_DATABASE_TIMEOUT_SECONDS="1"
        )
    assert done.returncode == 0
    assert "index not rebuilt" in done.stdout
    left = set(indexes(database)) - set(before)
    assert left in ({f"{index}_ccnew"}, {f"{index}_ccold"})
    assert archive(database, target).returncode == 0
    assert set(indexes(database)) == set(before)
    assert all(valid for _, valid in indexes(database).values())


def test_archive_every_hours_runs_again_after_errors(
    tmp_path: Path, database: Database, target: Path
) -> None:
    archiver = Archiver(tmp_path, database, target, "--every", "0.0003")
    archiver.environment["IOT_LOG_FORMAT"] = "json"
    archiver.launch()
    try:
        eventually(lambda: "no month is older" in archiver.log())
        make_month(database, 5)
        eventually(lambda: "5 rows archived, read back and dropped" in archiver.log())
        target.rename(tmp_path / "away")
        eventually(lambda: "is not a directory" in archiver.log())
        (tmp_path / "away").rename(target)
        make_month(database, 6)
        eventually(lambda: "6 rows archived, read back and dropped" in archiver.log())
        assert archiver.running
        archiver.signal(signal.SIGTERM)
        archiver.wait()
    finally:
        archiver.close()
    assert "Traceback" not in archiver.log()


def restore(
    database: Database, target: object, *arguments: str
) -> subprocess.CompletedProcess[str]:
    return run_command("restore", *arguments, **settings(database, target))


def test_restored_rows_are_identical(database: Database, target: Path) -> None:
    rows = make_month(database)
    assert archive(database, target).returncode == 0
    assert old_rows(database) == []
    done = restore(database, target, "2020-02")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("messages_2020_02: 500 of 500 rows restored, kept until 20")
    assert old_rows(database) == rows
    again = restore(database, target, f"{target}/{TABLE}.json", "--keep-days", "1")
    assert again.stdout.startswith("messages_2020_02: 0 of 500 rows restored"), again.stderr
    assert old_rows(database) == rows
    # It is kept for the given number of days.
    assert archive(database, target).stdout == "no month is older than 12 months\n"
    # Then it is dropped. No second file is written, because its rows are already archived.
    database.query(f"COMMENT ON TABLE {TABLE} IS 'iot-collector: kept until 2020-12-31'")
    assert (
        archive(database, target).stdout == f"{TABLE}: 500 rows archived, read back and dropped\n"
    )
    assert files(target) == [f"{TABLE}.json", f"{TABLE}.parquet"]


def test_restore_adds_only_missing_rows(database: Database, target: Path) -> None:
    """The archive has two files, and the table has rows that are in neither of them."""
    rows = make_month(database, 40)
    assert archive(database, target).returncode == 0
    rows += make_month(database, 2)
    assert archive(database, target).returncode == 0
    rows += make_month(database, 3)
    done = restore(database, target, "2020-02")
    assert "42 of 42 rows restored" in done.stdout, done.stderr
    assert old_rows(database) == sorted(rows, key=lambda row: int(row[0][1:].split(",")[0]))


def test_restore_into_another_database(
    database: Database, postgres: Postgres, target: Path
) -> None:
    rows = make_month(database, 40)
    assert archive(database, target).returncode == 0
    other = postgres.database(template="migrated")
    assert restore(other, target, "2020-02").returncode == 0
    assert old_rows(other) == rows
    other.query(INSERT, datetime.now(UTC), "t", b"new", None, None, 0, False)
    assert other.query("SELECT count(*), count(DISTINCT id) FROM messages") == [(41, 41)]


@pytest.mark.parametrize("fault", DAMAGE)
def test_restore_refuses_a_damaged_archive(fault: str, database: Database, target: Path) -> None:
    make_month(database, 50)
    assert archive(database, target).returncode == 0
    damage(target / f"{TABLE}.parquet", fault)
    done = restore(database, target, "2020-02")
    assert done.returncode == 1
    assert f"{TABLE}." in done.stderr
    assert DAMAGE[fault] in done.stderr
    assert old_partitions(database) == []


def test_restore_errors_are_explained(database: Database, target: Path) -> None:
    missing = restore(database, target, "2020-02")
    assert missing.returncode == 1
    assert "there is no archive of 2020-02" in missing.stderr
    assert restore(database, target, "2020-13").returncode == 2
    unset = restore(database, "none", "2020-02")
    assert "IOT_ARCHIVE_TARGET is not set to an archive" in unset.stderr
    make_month(database, 3)
    database.query("ALTER TABLE messages ADD more text")
    assert archive(database, target).returncode == 0
    database.query("ALTER TABLE messages DROP more")
    other_schema = restore(database, target, "2020-02")
    assert "column more of type text" in other_schema.stderr
    database.query("ALTER TABLE messages ADD more text, ADD still_more jsonb")
    assert restore(database, target, "2020-02").returncode == 0
    assert database.count() == 3


def test_killed_restore_can_be_repeated(tmp_path: Path, database: Database, target: Path) -> None:
    """It is killed while it waits for a lock on the partition."""
    rows = make_month(database, 50)
    assert archive(database, target).returncode == 0
    database.query("SELECT ensure_partitions(%s, 0)", OLD)
    restorer = Archiver(tmp_path, database, target)
    restorer.command = lambda: [iot_collector(), "restore", "2020-02"]  # type: ignore[method-assign]
    with contextlib.closing(database.connect()) as other, other.cursor() as cursor:
        cursor.execute(f"LOCK TABLE {TABLE} IN ROW EXCLUSIVE MODE")
        restorer.launch()
        eventually(lambda: waits_for_a_lock(database, "LOCK TABLE"))
        restorer.kill()
        other.rollback()
    assert old_rows(database) == []
    assert (
        archive(database, target).stdout == "no month is older than 12 months\n"
    )  # the empty partition is kept
    assert restore(database, target, "2020-02").returncode == 0
    assert old_rows(database) == rows
