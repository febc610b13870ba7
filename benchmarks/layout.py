"""The cost of a row of ``messages`` in other table layouts: `python -m benchmarks.layout`.

Each variant stores the same messages of `iot-collector simulate` in a partitioned table, with
binary COPY and 5000 rows per transaction. Each 50 messages have the same time, as if they came from
one read. The variants take turns three times, each with an empty table. The tables show medians.
CPU is the CPU time of all PostgreSQL processes, including a checkpoint at the end of each turn.
Queries run after VACUUM (ANALYZE), five times each. "Rebuild" is the cost of REINDEX CONCURRENTLY
after that. Appends its tables to LAYOUT.md.
"""

import argparse
import statistics
import struct
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iot_collector.copy_format import HEADER, TRAILER, copy_pieces
from iot_collector.fields import fields_of
from iot_collector.simulate import Plan, messages

from . import processes, services

_BATCH, _READ = 5_000, 50
_BASE = 1_000_000  # number of different messages, which are then repeated
_EVERY = 0.25  # seconds of the table's time between two messages
_START = 820_540_800  # 2026-01-01 UTC, in seconds since 2000-01-01
_ROUNDS = 3
_PORT = 31991
_PAGE = Path(__file__).with_name("LAYOUT.md")

_TYPES = {
    "received_at": "timestamptz NOT NULL",
    "qos": "smallint NOT NULL",
    "retained": "boolean NOT NULL",
    "topic": "text NOT NULL",
    "topic_id": "integer NOT NULL",
    "payload": "bytea NOT NULL",
    "fields": "jsonb",
    "properties": "jsonb",
}
_TODAY = ("topic", "payload", "fields", "properties", "qos", "retained")
_ORDERED = ("qos", "retained", "topic", "payload", "fields", "properties")
_BY_ID = ("topic_id", "qos", "retained", "payload", "fields", "properties")
_BRIN = "CREATE INDEX ON stored USING brin (received_at) WITH (autosummarize = on)"
_BTREE = "CREATE INDEX ON stored (topic, received_at DESC)"
_BTREE_UP = "CREATE INDEX ON stored (topic, received_at)"
_BTREE_ID = "CREATE INDEX ON stored (topic_id, received_at DESC)"
# Marks a row with a JSON payload and without stored fields. It is part of an existing column: with
# a ninth column, the NULL bitmap would make the header of each row 8 bytes longer.
_IS_JSON = 4  # added to qos
_PARSED = "convert_from(payload, 'UTF8')::jsonb"
_COLLATE_C = 'ALTER TABLE stored ALTER topic TYPE text COLLATE "C"'
_LZ4 = "ALTER TABLE stored ALTER payload SET COMPRESSION lz4, ALTER fields SET COMPRESSION lz4"
_CHECK = f"ALTER TABLE stored ADD CHECK (qos < {_IS_JSON} OR {_PARSED} IS NOT NULL)"


@dataclass(frozen=True)
class Variant:
    """A layout. ``columns`` are the columns after ``received_at``, in the order of the table."""

    columns: tuple[str, ...] = _TODAY
    indexes: tuple[str, ...] = (_BTREE, _BRIN)
    with_id: bool = True
    more: str = ""  # SQL after CREATE TABLE
    derived: bool = False  # fields of JSON are not stored, but parsed by the view
    sort: bool = False  # sort the rows of each COPY by topic

    @property
    def dictionary(self) -> bool:
        """Whether topics are in a separate table."""
        return "topic_id" in self.columns

    @property
    def create(self) -> list[str]:
        """The statements that create the tables, and the views for the queries."""
        definitions = [f"{name} {_TYPES[name]}" for name in ("received_at", *self.columns)]
        if self.with_id:
            definitions.insert(0, "id bigint NOT NULL GENERATED ALWAYS AS IDENTITY (CACHE 1000)")
        source = "stored JOIN topics USING (topic_id)" if self.dictionary else "stored"
        parsed = f"CASE WHEN qos >= {_IS_JSON} THEN {_PARSED} ELSE fields END"
        return [
            "DROP TABLE IF EXISTS stored, topics CASCADE",
            f"CREATE TABLE stored ({', '.join(definitions)}) PARTITION BY RANGE (received_at)",
            "CREATE TABLE stored_2026 PARTITION OF stored FOR VALUES FROM ('2026-01-01 00:00+00')"
            " TO ('2027-01-01 00:00+00')",
            "CREATE TABLE topics (topic_id integer PRIMARY KEY, topic text NOT NULL UNIQUE)",
            *([self.more] if self.more else []),
            *self.indexes,
            "CREATE VIEW shown AS SELECT received_at, topic, payload,"
            f" {parsed if self.derived else 'fields'} AS fields FROM {source}",
            "CREATE VIEW readings AS SELECT m.received_at AS time, m.topic, f.key AS name,"
            " (f.value #>> '{}')::numeric AS value FROM shown m, jsonb_each(m.fields) f"
            " WHERE jsonb_typeof(f.value) = 'number'",
        ]


VARIANTS = {
    "today": Variant(),
    "columns of fixed size first": Variant(_ORDERED),
    "without id": Variant(with_id=False),
    "lz4 instead of pglz": Variant(more=_LZ4),
    "topic COLLATE C": Variant(more=_COLLATE_C),
    "b-tree ascending": Variant(indexes=(_BTREE_UP, _BRIN)),
    "each COPY sorted by topic": Variant(sort=True),
    "without the BRIN": Variant(indexes=(_BTREE,)),
    "without the b-tree": Variant(indexes=(_BRIN,)),
    "topic dictionary": Variant(_BY_ID, (_BTREE_ID, _BRIN)),
    "fields derived": Variant(derived=True),
    "fields derived, checked by the table": Variant(derived=True, more=_CHECK),
    "fields derived, topic dictionary": Variant(_BY_ID, (_BTREE_ID, _BRIN), derived=True),
    "the same without id": Variant(_BY_ID, (_BTREE_ID, _BRIN), with_id=False, derived=True),
}

_QUERIES = {
    "latest message of a device": (
        "SELECT fields FROM shown WHERE topic = %(topic)s ORDER BY received_at DESC LIMIT 1"
    ),
    "a device's temperature, 6 hours": (
        "SELECT time, value FROM readings WHERE topic = %(topic)s AND name = 'temperature'"
        " AND time > %(until)s::timestamptz - interval '6 hours' ORDER BY time"
    ),
    "messages a device, 24 hours": (
        "SELECT topic, count(*) FROM shown"
        " WHERE received_at > %(until)s::timestamptz - interval '24 hours' GROUP BY 1"
    ),
    "hourly means of all devices, 24 hours, readings": (
        "SELECT date_trunc('hour', time), avg(value) FROM readings WHERE name = 'temperature'"
        " AND time > %(until)s::timestamptz - interval '24 hours' GROUP BY 1"
    ),
    "the same, fields": (
        "SELECT date_trunc('hour', received_at), avg((fields->>'temperature')::numeric) FROM shown"
        " WHERE received_at > %(until)s::timestamptz - interval '24 hours' GROUP BY 1"
    ),
}


class Data:
    """The messages, with each column encoded for binary COPY."""

    def __init__(self, rows: int, topics: int, payload: str) -> None:
        plan = Plan(devices=topics, topic="iot/{device}/data", payload=payload)
        self.rows = rows
        self.topics: dict[str, int] = {}
        self.columns: dict[str, list[bytes]] = {
            name: [] for name in ("topic", "topic_id", "payload", "fields")
        }
        for _, (topic, data) in zip(range(min(rows, _BASE)), messages(plan), strict=False):
            number = self.topics.setdefault(topic, len(self.topics) + 1)
            self.columns["topic"].append(_value(topic.encode()))
            self.columns["topic_id"].append(_value(struct.pack(">i", number)))
            self.columns["payload"].append(_value(data))
            fields = fields_of(data)
            self.columns["fields"].append(_value(fields and b"\1" + fields))
        self.is_json = payload == "json"

    def batches(self, variant: Variant) -> Iterator[Iterator[bytes]]:
        """Yield the data of each COPY."""
        derived = variant.derived and self.is_json
        constant = {
            "qos": _value(struct.pack(">h", 1 + _IS_JSON * derived)),
            "retained": _value(b"\0"),
            "properties": _value(None),
        } | ({"fields": _value(None)} if derived else {})
        for begin in range(0, self.rows, _BATCH):
            pieces = []
            for first in range(begin, min(begin + _BATCH, self.rows), _READ):
                micros = round((_START + first * _EVERY) * 1_000_000)
                start = struct.pack(">hiq", len(variant.columns) + 1, 8, micros)
                span = slice(first % _BASE, first % _BASE + _READ)
                columns = [
                    [constant[name]] * _READ if name in constant else self.columns[name][span]
                    for name in variant.columns
                ]
                pieces += [start + b"".join(row) for row in zip(*columns, strict=False)]
            if variant.sort:
                topics = self.columns["topic"][begin % _BASE :]
                pieces = [p for _, p in sorted(zip(topics, pieces, strict=False))]
            yield iter([HEADER, b"".join(pieces), TRAILER])


def _value(data: bytes | None) -> bytes:
    return b"\xff\xff\xff\xff" if data is None else struct.pack(">i", len(data)) + data


_SIZES = """
SELECT (SELECT sum(pg_relation_size(c.oid))::bigint FROM pg_class c
        WHERE c.relname = 'stored_2026'),
       coalesce(sum(pg_relation_size(indexrelid)) FILTER (WHERE amname = 'btree'), 0)::bigint,
       coalesce(sum(pg_relation_size(indexrelid)) FILTER (WHERE amname = 'brin'), 0)::bigint,
       pg_total_relation_size('stored_2026') + pg_total_relation_size('topics')
FROM pg_index JOIN pg_class i ON i.oid = indexrelid JOIN pg_am a ON a.oid = i.relam
WHERE indrelid = 'stored_2026'::regclass
"""


def _turn(database: services.Database, variant: Variant, data: Data) -> dict[str, float]:
    """Fill the table of a variant; return bytes and CPU µs per row, and milliseconds of queries."""
    for sql in variant.create:
        database.query(sql)
    database.query("CHECKPOINT")
    tree = database.server.pid
    [(begin,)] = database.query("SELECT pg_current_wal_insert_lsn()")
    cpu, backend, started = processes.cpu_of_tree(tree), _backend_cpu(database), time.monotonic()
    if variant.dictionary:
        with database.connection.cursor() as cursor:
            pairs = [f"{number}\t{topic}\n".encode() for topic, number in data.topics.items()]
            copy_pieces(cursor, b"COPY topics FROM STDIN", pairs)
    names = ", ".join(("received_at", *variant.columns))
    for pieces in data.batches(variant):
        with database.connection.cursor() as cursor:
            copy_pieces(cursor, f"COPY stored ({names}) FROM STDIN BINARY".encode(), pieces)
    seconds, backend = time.monotonic() - started, _backend_cpu(database) - backend
    [(wal,)] = database.query("SELECT pg_current_wal_insert_lsn() - %s::pg_lsn", begin)
    database.query("CHECKPOINT")
    cpu = processes.cpu_of_tree(tree) - cpu
    database.query("VACUUM (ANALYZE) stored, topics")
    heap, btree, brin, total = database.query(_SIZES)[0]
    result = {
        "bytes": float(total) / data.rows,
        "table": heap / data.rows,
        "b-tree": btree / data.rows,
        "BRIN": brin / data.rows,
        "WAL": float(wal) / data.rows,
        "CPU µs": cpu / data.rows * 1e6,
        "of the backend": backend / data.rows * 1e6,
        "rows/s": data.rows / seconds,
    }
    for name, query in _QUERIES.items():
        result[name] = _milliseconds(database, query, data)
    cpu = processes.cpu_of_tree(tree)
    database.query("REINDEX TABLE CONCURRENTLY stored_2026")
    result["rebuild µs"] = (processes.cpu_of_tree(tree) - cpu) / data.rows * 1e6
    result["b-tree rebuilt"] = database.query(_SIZES)[0][1] / data.rows
    return result


def _backend_cpu(database: services.Database) -> float:
    return processes.cpu_of_tree(database.backend)


def _milliseconds(database: services.Database, sql: str, data: Data) -> float:
    times, names = [], list(data.topics)
    [(until,)] = database.query("SELECT max(received_at) FROM shown")
    for i in range(5):
        values: dict[str, Any] = {"topic": names[i * 7], "until": until}
        started = time.perf_counter()
        with database.connection.cursor() as cursor:
            cursor.execute(sql, values)
            cursor.fetchall()
        times.append((time.perf_counter() - started) * 1000)
    return statistics.median(times)


def _table(results: dict[str, list[dict[str, float]]], columns: list[str], digits: int) -> str:
    lines = [
        "| layout | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for name, turns in results.items():
        medians = [statistics.median(turn[column] for turn in turns) for column in columns]
        texts = [f"{m:,.{digits if m < 1000 else 0}f}" for m in medians]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the variants, and append the tables to LAYOUT.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--topics", type=int, default=1_000)
    parser.add_argument("--payload", choices=["json", "text"], default="json")
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_args()
    data = Data(options.rows, options.topics, options.payload)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    with (
        tempfile.TemporaryDirectory(prefix="iot-layout-", dir="/var/tmp") as work,
        services.database(_PORT, Path(work)) as database,
    ):
        for turn in range(options.rounds):
            for name in options.only:
                results[name].append(_turn(database, VARIANTS[name], data))
                shown = {k: round(v, 2) for k, v in results[name][-1].items()}
                print(turn, name, shown, flush=True)
    costs = [
        "bytes",
        "table",
        "b-tree",
        "b-tree rebuilt",
        "BRIN",
        "WAL",
        "CPU µs",
        "of the backend",
        "rebuild µs",
        "rows/s",
    ]
    title = f"{options.rows / 1e6:g} M rows, {options.topics:,} topics, payload {options.payload}"
    text = "\n".join(
        [
            f"\n### {title}\n",
            "Bytes and CPU a row:\n",
            _table(results, costs, 1),
            "Queries, ms:\n",
            _table(results, list(_QUERIES), 1),
        ]
    )
    with _PAGE.open("a") as page:
        page.write(text)


if __name__ == "__main__":
    main()
