"""The SQL of docs/queries.md: its results, and how many rows it reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from testing.postgres import Database

PAGE = Path(__file__).parents[3] / "docs/queries.md"
RECIPES = dict(re.findall(r"## ([^\n]+)\n(?:[^#]*?)```sql\n(.*?)```", PAGE.read_text(), re.DOTALL))
ALL = re.findall(r"```sql\n(.*?)```", PAGE.read_text(), re.DOTALL)
# Two months of 20 devices, with a message every 10 minutes. Device 7 has a gap of two hours.
FILL = """
SELECT ensure_partitions(now() - interval '2 months', 2);
INSERT INTO messages (received_at, topic, payload, fields, qos, retained)
SELECT at, 'iot/device-00' || lpad(device::text, 2, '0') || '/data', 'x',
       jsonb_build_object('temperature', 20 + device, 'on', true), 1, false
FROM generate_series(now() - interval '2 months', now() - interval '1 second', '10 minutes') at,
     generate_series(1, 20) device
WHERE device <> 7 OR at NOT BETWEEN now() - interval '30 hours' AND now() - interval '28 hours';
SELECT add_to_summaries(now() - interval '4 months', now(), false);
ANALYZE
"""
DEVICE = "iot/device-0007/data"


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(node for child in plan.get("Plans", []) for node in nodes(child))]


def rows_read(database: Database, sql: str) -> tuple[set[str], int]:
    """Run a query; return the tables that it scans sequentially, and the rows that it reads."""
    ((plan,),) = database.query(f"EXPLAIN (ANALYZE, FORMAT JSON) {sql}")
    scans = [
        node
        for node in nodes((json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"])
        if node["Node Type"].endswith("Scan") and node["Actual Loops"]
    ]
    whole = {
        node["Relation Name"]
        for node in scans
        if node["Node Type"] == "Seq Scan"
        and node["Actual Rows"] + node.get("Rows Removed by Filter", 0)  # the table is not empty
    }
    rows = sum(
        node["Actual Rows"] * node["Actual Loops"] for node in scans if "Relation Name" in node
    )
    return whole, rows


def test_queries_are_correct_and_read_few_rows(own_database: Database) -> None:
    own_database.query(FILL)
    messages = own_database.count()
    assert messages > 150_000
    assert own_database.query("SELECT sum(messages) FROM topics") == [(messages,)]

    found = own_database.query(RECIPES["Latest value of each device"])
    assert len(found) == 40
    assert found[12][:4] == (DEVICE, "on", 1, "true")
    assert own_database.query(RECIPES["Who is silent"]) == []
    hours = own_database.query(RECIPES["Hourly averages"])
    # A gap of two hours, and the last message is ten minutes old: the current hour may have none.
    assert 717 <= len(hours) <= 720
    assert {row[1:] for row in hours} == {(27.0, 27.0, 27.0)}
    day = own_database.query(RECIPES["A day of one device"])
    assert len(day) in (2 * 143, 2 * 144)
    ((_, _, gap),) = own_database.query(RECIPES["Gaps"])
    assert 120 <= gap.total_seconds() / 60 <= 140
    assert len(own_database.query(RECIPES["Top talkers"])) == 20

    for sql in ALL:
        whole, rows = rows_read(own_database, sql)
        # A query for all topics of the last hour may scan a small partition sequentially.
        months = {table for table in whole if table.startswith("messages")}
        assert len(months) <= (0 if "topic = " in sql else 1), f"{months}\n{sql}"
        assert rows < 20_000, f"{rows} rows read of {messages}\n{sql}"
