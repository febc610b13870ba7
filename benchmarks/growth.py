"""Inserts and queries while the table grows: `python -m benchmarks.growth 1 10 25` (millions).

Rows are stored with the collector's own `Store`, in batches of 5000, of reads of 50. Their times
are those of 4 messages a second from 100 devices, so a million rows are three days, and there is a
partition for each month. At each size, the indexes of past months are rebuilt, as
`iot-collector archive` does, and typical queries run five times. At the last size, the summaries of
the last 31 days are computed, one day at a time, and the SQL of docs/queries.md runs. Writes
GROWTH.md.
"""

import argparse
import re
import statistics
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from iot_collector.buffer import ReadBatch
from iot_collector.copy_format import RowPrefixes, encode_rows
from iot_collector.fields import fields_of_all
from iot_collector.migrate import migrate
from iot_collector.settings import Settings
from iot_collector.store import Store

from . import processes, services

_BATCH, _READ = 5_000, 50
_EVERY = 0.25  # seconds of the table's time between two messages
_START = datetime(2026, 1, 1, tzinfo=UTC)
_PORT = 31990

_QUERIES = {
    "latest message of a device": (
        "SELECT fields FROM messages WHERE topic = %(topic)s ORDER BY received_at DESC LIMIT 1"
    ),
    "a device's temperature, last 6 hours": (
        "SELECT time, value FROM readings WHERE topic = %(topic)s AND name = 'temperature'"
        " AND time > %(now)s - interval '6 hours' ORDER BY time"
    ),
    "messages a minute, last 6 hours": (
        "SELECT date_trunc('minute', received_at), count(*) FROM messages"
        " WHERE received_at > %(now)s - interval '6 hours' GROUP BY 1 ORDER BY 1"
    ),
    "messages a device, last 24 hours": (
        "SELECT topic, count(*) FROM messages"
        " WHERE received_at > %(now)s - interval '24 hours' GROUP BY 1"
    ),
    "all messages, counted": "SELECT count(*) FROM messages",
}


_PAGE = Path(__file__).parents[1] / "docs/queries.md"
_RECIPE = r"## ([^\n]+)\n[^#]*?```sql\n(.*?)```"


def _summarize(database: services.Database, now: datetime) -> float:
    """Compute the summaries of the last 31 days; return CPU µs of PostgreSQL per message."""
    before = processes.cpu_of_tree(database.server.pid)
    for day in range(31, 0, -1):
        start = now - timedelta(days=day)
        with database.connection.cursor() as cursor:
            cursor.execute(
                "SELECT add_to_summaries(%s, %s, false)", (start, start + timedelta(days=1))
            )
    database.query("ANALYZE")
    messages = float(database.query("SELECT sum(messages) FROM topics")[0][0])
    return (processes.cpu_of_tree(database.server.pid) - before) / messages * 1e6


def _recipes(database: services.Database, now: datetime) -> dict[str, float]:
    """Run the queries of docs/queries.md with ``now`` for now(); return milliseconds by heading."""
    recipes = re.findall(_RECIPE, _PAGE.read_text(), re.DOTALL)
    return {
        name: _milliseconds(database, sql.replace("now()", "%(now)s::timestamptz"), now)
        for name, sql in recipes
    }


def _read(first: int, prefixes: RowPrefixes) -> ReadBatch:
    numbers = range(first, first + _READ)
    payloads = [
        b'{"device":"device-%04d","seq":%d,"temperature":%d.%d,"humidity":55.1,"battery":3.71}'
        % (i % 100, i, 15 + i % 12, i % 10)
        for i in numbers
    ]
    topics = [b"iot/device-%04d/data" % (i % 100) for i in numbers]
    rows = encode_rows([prefixes[t] for t in topics], payloads, fields_of_all(payloads))
    tags = [0x32 << 16 | i % 65_535 + 1 for i in numbers]
    return ReadBatch(None, rows, tags, 0.0, _START.timestamp() + first * _EVERY)


def _fill(store: Store, first: int, last: int) -> None:
    prefixes = RowPrefixes(0x32)
    for begin in range(first, last, _BATCH):
        store.write([_read(i, prefixes) for i in range(begin, begin + _BATCH, _READ)])


def _rebuild_indexes(database: services.Database) -> None:
    for (index,) in database.query(_INDEXES)[:-1]:
        database.query(f"REINDEX INDEX CONCURRENTLY {index}")


def _milliseconds(database: services.Database, sql: str, now: datetime) -> float:
    times = []
    for i in range(5):
        values = {"topic": f"iot/device-{i * 7:04d}/data", "now": now}
        started = time.perf_counter()
        with database.connection.cursor() as cursor:
            cursor.execute(sql, values)
            cursor.fetchall()
        times.append((time.perf_counter() - started) * 1000)
    return statistics.median(times)


def main() -> None:
    """Fill the table step by step, and write the results for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("millions", nargs="+", type=float)
    sizes = [int(m * 1e6) // _BATCH * _BATCH for m in parser.parse_args().millions]
    table: dict[str, list[str]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="iot-growth-", dir="/var/tmp") as work,
        services.database(_PORT, Path(work)) as database,
    ):
        settings = Settings(database_url=database.url, mqtt_client_id="growth")
        migrate(settings)
        store = Store(settings)
        done = 0
        for size in sizes:
            cpu, started = processes.cpu_of_tree(database.server.pid), time.perf_counter()
            _fill(store, done, size)
            elapsed = time.perf_counter() - started
            cpu = processes.cpu_of_tree(database.server.pid) - cpu
            _rebuild_indexes(database)
            database.query("VACUUM (ANALYZE) messages")  # as autovacuum does
            now = _START + timedelta(seconds=size * _EVERY)
            column = [
                f"{(size - done) / elapsed:,.0f}",
                f"{cpu / (size - done) * 1e6:.1f}",
                f"{(total := float(database.query(_SIZE)[0][0])) / 1e9:.2f}",
                f"{total / size:.0f}",
                str(database.query(_PARTITIONS)[0][0]),
                *(f"{_milliseconds(database, sql, now):.1f}" for sql in _QUERIES.values()),
            ]
            table[f"{size / 1e6:g} M"] = column
            done = size
            print(f"{size / 1e6:g} M rows:", ", ".join(column), flush=True)
        cpu = _summarize(database, now)
        recipes = _recipes(database, now)
    (Path(__file__).parent / "GROWTH.md").write_text(_page(table, cpu, recipes))


_SIZE = (
    "SELECT sum(pg_total_relation_size(inhrelid)) FROM pg_inherits"
    " WHERE inhparent = 'messages'::regclass"
)
_INDEXES = (  # of months with rows, oldest first
    "SELECT inhrelid::regclass FROM pg_inherits WHERE inhparent = 'messages_topic'::regclass"
    " AND pg_relation_size(inhrelid) > 8192 ORDER BY inhrelid::regclass::text"
)
_PARTITIONS = "SELECT count(DISTINCT tableoid) FROM messages"


def _page(table: dict[str, list[str]], cpu: float, recipes: dict[str, float]) -> str:
    names = [
        "inserted rows/s, one writer",
        "PostgreSQL CPU µs/row",
        "GB with indexes",
        "bytes a row",
        "months",
        *(f"{name}, ms" for name in _QUERIES),
    ]
    lines = [
        "# How the table grows",
        "",
        f"Written by `python -m benchmarks.growth` on {datetime.now(UTC):%Y-%m-%d}. The head of "
        "growth.py describes the method. Times are medians of five, in one run.",
        "",
        "| rows | " + " | ".join(table) + " |",
        "|---|" + "---:|" * len(table),
        *(
            f"| {name} | " + " | ".join(column[i] for column in table.values()) + " |"
            for i, name in enumerate(names)
        ),
        "",
        f"At the last size, the summaries took {cpu:.1f} µs of PostgreSQL's CPU per message (with "
        "three values each). The first query under each heading of "
        "[docs/queries.md](../docs/queries.md) took:",
        "",
        "| query | ms |",
        "|---|---:|",
        *(f"| {name} | {milliseconds:.1f} |" for name, milliseconds in recipes.items()),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
