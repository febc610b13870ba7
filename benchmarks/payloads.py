"""The cost of parsing payloads, before and after a commit: `python -m benchmarks.payloads main`.

Two collectors run side by side, one of the working tree ("after") and one of the given commit
("before"), each with its own database. They get the same messages in turns, at full speed: flat
JSON of 123 bytes, and payloads of common devices (collector/tests/payloads.yml; among them binary
payloads, which are stored raw without their content type). A third collector, of the working tree,
has the settings IOT_CBOR_TOPICS and IOT_MESSAGEPACK_TOPICS ("binary"). It gets flat JSON too, and
the same documents in CBOR and MessagePack. The summaries are turned off. The results are the CPU
time per message of the collector and of PostgreSQL (medians, and for the collector minimum to
maximum), and the size of a message in the table with its indexes.

Then a table is filled, and queries of the view `readings` run in turns with the same queries of the
view of the first release. Writes PAYLOADS.md.
"""

import argparse
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import cbor2
import msgpack
import yaml

from testing.collector import Collector, clean_environment
from testing.mosquitto import Mosquitto
from testing.postgres import TEST_SETTINGS, Database, Postgres
from testing.service import eventually

from . import processes, wire

_ROOT = Path(__file__).parent.parent
_QUIET = ("max_inflight_messages 10000", "max_queued_messages 0", "log_type error")
_SETTINGS = TEST_SETTINGS.replace("32MB", "256MB")

# The view of the first release.
_OLD_VIEW = """
CREATE VIEW readings_before AS
SELECT m.received_at AS time, m.topic, f.key AS name, (f.value #>> '{}')::numeric AS value
FROM messages m, jsonb_each(m.fields) f
WHERE jsonb_typeof(f.value) = 'number'"""
_FILL = """
INSERT INTO messages (received_at, topic, payload, fields, qos, retained)
SELECT now() - i * interval '1 s', 'plant/north/device-' || i % 100, '',
       jsonb_build_object('temperature', i % 50, 'humidity', i % 100, 'unit', 'C', 'seq', i,
                          'ts', extract(epoch FROM now())::bigint - i), 1, false
FROM generate_series(1, 500000) i"""
_SIZE = (
    "SELECT sum(pg_total_relation_size(inhrelid)) FROM pg_inherits"
    " WHERE inhparent = 'messages'::regclass"
)
_KINDS = {
    "before": ["flat JSON", "corpus"],
    "after": ["flat JSON", "corpus"],
    "binary": ["flat JSON", "flat CBOR", "flat MessagePack"],
}
_BINARY = {"IOT_CBOR_TOPICS": "binary/cbor", "IOT_MESSAGEPACK_TOPICS": "binary/messagepack"}
_QUERIES = {
    "one topic and name, a day (864 messages)": (
        "SELECT time, value FROM {view} WHERE topic = 'plant/north/device-7'"
        " AND name = 'temperature' AND time > now() - interval '1 day' ORDER BY time"
    ),
    "the newest value of a topic and name": (
        "SELECT time, value FROM {view} WHERE topic = 'plant/north/device-7'"
        " AND name = 'temperature' ORDER BY time DESC LIMIT 1"
    ),
    "hourly averages of all topics, a day (86 400 messages)": (
        "SELECT date_trunc('hour', time), avg(value) FROM {view}"
        " WHERE name = 'temperature' AND time > now() - interval '1 day' GROUP BY 1"
    ),
}
_NEW_QUERIES = {
    "the same by a level of the topic": (
        "SELECT levels->>'site', avg(value) FROM {view}"
        " WHERE name = 'temperature' AND time > now() - interval '1 day' GROUP BY 1"
    ),
    "the same by device time": (
        "SELECT date_trunc('hour', device_time), avg(value) FROM {view}"
        " WHERE name = 'temperature' AND time > now() - interval '1 day' GROUP BY 1"
    ),
}


class _Collector(Collector):
    """The collector of a source tree."""

    def __init__(
        self, source: Path, folder: Path, *parts: Mosquitto | Database, **settings: str
    ) -> None:
        super().__init__(folder, *parts, **settings)
        self._source = source

    def command(self) -> Sequence[str]:
        return [sys.executable, "-c", "from iot_collector.cli import main; main()", "run"]

    def options(self) -> dict[str, Any]:
        return {"env": clean_environment() | self.settings | self.path}

    @property
    def path(self) -> dict[str, str]:
        """The environment that makes Python import this tree."""
        return {"PYTHONPATH": str(self._source / "collector")}


class _Cost(NamedTuple):
    """CPU microseconds per message, and its bytes in the table with indexes."""

    collector: float
    database: float
    size: float


class _Side:
    """A collector with its database."""

    def __init__(
        self, name: str, source: Path, work: Path, broker: Mosquitto, **settings: str
    ) -> None:
        self.name = name
        self.broker = broker
        (work / name).mkdir()
        self.server = Postgres(_directory(work / f"{name}-postgres")).create(_SETTINGS)
        self.server.start()
        self.database: Database = self.server.database()
        self.collector = _Collector(
            source,
            work / name,
            broker,
            self.database,
            IOT_MQTT_TOPICS=f"{name}/#",
            IOT_MQTT_CLIENT_ID=name,
            IOT_LOG_LEVEL="warning",
            **settings,
        )
        command = [*self.collector.command()[:-1], "migrate"]
        subprocess.run(command, env=self.collector.options()["env"], check=True, stdout=-3)
        self.collector.start()

    def round(self, messages: Sequence[tuple[str, bytes]]) -> _Cost:
        """Publish messages at full speed, and wait until they are stored."""
        self.database.query("TRUNCATE messages")
        before = self.collector.metrics()["db_inserts_total"]
        client = processes.cpu_of_tree(self.collector.pid)
        server = processes.cpu_of_tree(self.server.pid)
        _flood(self.broker.port, f"{self.name}/".encode(), messages)
        eventually(
            lambda: self._stored(before + len(messages)), 120, what="all messages are stored"
        )
        client = processes.cpu_of_tree(self.collector.pid) - client
        server = processes.cpu_of_tree(self.server.pid) - server
        [(size,)] = self.database.query(_SIZE)
        count = len(messages)
        return _Cost(client / count * 1e6, server / count * 1e6, float(size) / count)

    def _stored(self, goal: float) -> bool:
        time.sleep(0.2)  # each scrape costs the collector CPU time
        return self.collector.metrics()["db_inserts_total"] >= goal

    def close(self) -> None:
        """Stop both."""
        self.collector.close()
        self.server.close()


def _sides(source: Path, work: Path, broker: Mosquitto) -> list[_Side]:
    summaries = {"IOT_SUMMARY_SECONDS": "0"}  # GROWTH.md has their cost
    known = "summary_seconds" in (source / "collector/iot_collector/settings.py").read_text()
    return [
        _Side("before", source, work, broker, **(summaries if known else {})),
        _Side("after", _ROOT, work, broker, **summaries),
        _Side("binary", _ROOT, work, broker, **summaries, **_BINARY),
    ]


def _directory(path: Path) -> Path:
    path.mkdir()
    identity = Postgres.identity()
    if identity:
        subprocess.run(["chown", identity["user"], str(path)], check=True)
    return path


def _flood(port: int, prefix: bytes, messages: Sequence[tuple[str, bytes]]) -> None:
    """Publish with QoS 1, and wait until the broker has acknowledged all messages."""
    packets = []
    for n, (topic, payload) in enumerate(messages):
        name = prefix + topic.encode()
        body = len(name).to_bytes(2) + name + (n % 65_535 + 1).to_bytes(2) + payload
        size, length = len(body), b""
        while size >= 0x80:
            length += bytes([size & 0x7F | 0x80])
            size >>= 7
        packets.append(b"\x32" + length + bytes([size]) + body)
    with wire.connect(port, "benchmark-device", clean=True) as sock:
        sock.settimeout(120)
        acknowledged = threading.Thread(target=_receive, args=(sock, 4 * len(packets)))
        acknowledged.start()
        for start in range(0, len(packets), 64):
            sock.sendall(b"".join(packets[start : start + 64]))
        acknowledged.join()
        sock.sendall(b"\xe0\0")


def _receive(sock: socket.socket, size: int) -> None:
    while size > 0:
        size -= len(sock.recv(1 << 16)) or size


def _messages(count: int) -> dict[str, list[tuple[str, bytes]]]:
    payloads = [wire.payload(n % 100, n, time.time_ns() // 1000) for n in range(count)]
    documents = [json.loads(payload) for payload in payloads]
    shapes = yaml.safe_load((_ROOT / "collector/tests/payloads.yml").read_text())
    corpus = [
        (s["topic"], bytes.fromhex(s["hex"]) if "hex" in s else s["payload"].encode())
        for s in shapes
    ]
    return {
        "flat JSON": [("json", payload) for payload in payloads],
        "flat CBOR": [("cbor", cbor2.dumps(document)) for document in documents],
        "flat MessagePack": [("messagepack", msgpack.packb(document)) for document in documents],
        "corpus": list(itertools.islice(itertools.cycle(corpus), count)),
    }


def _milliseconds(database: Database, sql: str) -> float:
    started = time.perf_counter()
    database.query(sql)
    return (time.perf_counter() - started) * 1000


def _queries(database: Database) -> list[str]:
    database.query("TRUNCATE messages")
    database.query(
        "SELECT ensure_partitions(now() - interval '1 month', 1);"
        "INSERT INTO topic_templates VALUES (1, '', '^plant/([^/]*)/([^/]*)$', '{site,device}');"
        "INSERT INTO device_time_keys VALUES (1, '{ts}', 's')"
    )
    database.query(_OLD_VIEW)
    database.query(_FILL)
    database.query("VACUUM (ANALYZE) messages")
    lines = []
    for name, sql in (_QUERIES | _NEW_QUERIES).items():
        views = ["readings_before", "readings"] if name in _QUERIES else ["readings"]
        times: dict[str, list[float]] = {view: [] for view in views}
        for _ in range(7):
            for view in views:
                times[view].append(_milliseconds(database, sql.format(view=view)))
        medians = [statistics.median(times[view]) for view in views]
        before = f"{medians[0]:.1f}" if len(medians) == 2 else ""
        ratio = f"{medians[1] / medians[0]:.2f}" if len(medians) == 2 else ""
        lines.append(f"| {name} | {before} | {medians[-1]:.1f} | {ratio} |")
        print(lines[-1], flush=True)
    return lines


def _page(ref: str, count: int, costs: dict[tuple[str, str], list[_Cost]], rows: list[str]) -> str:
    def median(kind: str, side: str) -> _Cost:
        return _Cost(*map(statistics.median, zip(*costs[kind, side], strict=True)))

    def spread(kind: str, side: str) -> str:
        values = [cost.collector for cost in costs[kind, side]]
        return f"{min(values):.2f} to {max(values):.2f}"

    rounds = len(costs["corpus", "after"])
    lines = [
        "# The cost of parsing payloads",
        "",
        f"Written by `python -m benchmarks.payloads` on {datetime.now(UTC):%Y-%m-%d}, "
        f"{os.cpu_count()} cores. The head of payloads.py describes the method. "
        f"Before: {ref}; {rounds} rounds of {count} messages each, in turns.",
        "",
        "| messages | collector µs before | after | ratio | PostgreSQL µs before | after |"
        " bytes before | after |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for kind in _KINDS["before"]:
        old, new = median(kind, "before"), median(kind, "after")
        lines.append(
            f"| {kind} | {spread(kind, 'before')} | {spread(kind, 'after')}"
            f" | {new.collector / old.collector:.2f} | {old.database:.1f} | {new.database:.1f}"
            f" | {old.size:.0f} | {new.size:.0f} |"
        )
    lines += [
        "",
        "| messages | collector µs | ratio to flat JSON after | PostgreSQL µs | bytes |",
        "|---|---:|---:|---:|---:|",
    ]
    flat = median("flat JSON", "after").collector
    for kind, side in [("corpus", "after"), *((kind, "binary") for kind in _KINDS["binary"])]:
        cost = median(kind, side)
        lines.append(
            f"| {kind}, {side} | {spread(kind, side)} | {cost.collector / flat:.2f}"
            f" | {cost.database:.1f} | {cost.size:.0f} |"
        )
    lines += [
        "",
        "Queries of a table of 500 000 flat messages, medians of seven, in turns:",
        "",
        "| query | view of the first release, ms | view of today, ms | ratio |",
        "|---|---:|---:|---:|",
        *rows,
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure the collectors, then the queries."""
    parser = argparse.ArgumentParser()
    parser.add_argument("before", help="a commit, for example main")
    parser.add_argument("--count", type=int, default=60_000, help="messages of a round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    messages = _messages(options.count)
    costs: dict[tuple[str, str], list[_Cost]] = {}
    git = ["git", "-C", str(_ROOT)]
    ref = processes.run([*git, "rev-parse", "--short", options.before]).strip()
    with tempfile.TemporaryDirectory(prefix="iot-payloads-") as folder:
        work = Path(folder)
        work.chmod(0o755)
        source = work / "source"
        processes.run([*git, "worktree", "add", "--detach", str(source), ref])
        broker = Mosquitto(_directory(work / "mosquitto"), limits=_QUIET)
        broker.start()
        sides = _sides(source, work, broker)
        try:
            for n in range(options.rounds + 1):
                for kind, side in itertools.product(messages, sides[:: 1 if n % 2 else -1]):
                    if kind not in _KINDS[side.name]:
                        continue
                    cost = side.round(messages[kind])
                    if n:  # the first round warms up
                        costs.setdefault((kind, side.name), []).append(cost)
                        print(kind, side.name, cost, flush=True)
            sides[1].collector.close()
            rows = _queries(sides[1].database)
        finally:
            for side in sides:
                side.close()
            broker.close()
            processes.run([*git, "worktree", "remove", "--force", str(source)])
    page = _page(ref, options.count, costs, rows)
    (Path(__file__).parent / "PAYLOADS.md").write_text(page)


if __name__ == "__main__":
    main()
