"""The SQL of docs/data.md, run by DuckDB on an archive."""

import re
from datetime import datetime
from pathlib import Path

import duckdb
import pytest

from testing.collector import run_command
from testing.postgres import Database

DOCS = Path(__file__).parents[3] / "docs/data.md"
RECIPES = re.findall(r"```sql\n(.*?)```", DOCS.read_text(), re.DOTALL)
FILL = (
    "SELECT ensure_partitions('2020-02-01 00:00+00', 0);"
    "INSERT INTO messages (received_at, topic, payload, fields, qos, retained)"
    " SELECT '2020-02-03 10:00+00'::timestamptz + make_interval(mins => n),"
    "   CASE WHEN n % 3 = 0 THEN 'other' ELSE 'iot/data' END, 'x',"
    "   jsonb_build_object('temperature', 20 + n % 2), 1, false"
    " FROM generate_series(0, 119) n"
)


def test_queries_on_an_archive_are_correct(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.query(FILL)
    done = run_command("archive", **database.environment(), IOT_ARCHIVE_TARGET=str(tmp_path))
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    top_talkers, hourly = RECIPES
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        found = connection.execute(top_talkers).fetchall()
        assert [row[:2] for row in found] == [("iot/data", 80), ("other", 40)]
        found = connection.execute(hourly).fetchall()
    hours = [(hour.replace(tzinfo=None), value) for hour, value in found]
    assert hours == [(datetime(2020, 2, 3, 10), 20.5), (datetime(2020, 2, 3, 11), 20.5)]
