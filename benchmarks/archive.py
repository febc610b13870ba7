"""The cost of archiving a month: `python -m benchmarks.archive 2 10` (millions of messages).

The messages are from `iot-collector simulate`, with text and with JSON payloads, from 100 devices
at a constant rate over one month. `iot-collector archive` and `restore` run as processes. During
archive, and for 10 seconds before, a thread inserts single rows. Writes ARCHIVE.md.
"""

import argparse
import contextlib
import itertools
import os
import random
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import psycopg2
from iot_collector.copy_format import copy_pieces
from iot_collector.fields import fields_of_all
from iot_collector.migrate import migrate
from iot_collector.settings import Settings
from iot_collector.simulate import Plan, messages

from testing.collector import iot_collector

from . import services

_PORT = 31991
_MONTH = datetime(2020, 2, 1, tzinfo=UTC)
_SECONDS = 29 * 86_400
_TOPIC = "plant/berlin/{device}/telemetry"
_SIZE = "SELECT pg_total_relation_size('messages_2020_02')"


def _lines(count: int, payload: str) -> Iterator[bytes]:
    """Yield the messages in COPY's text format."""
    rng = random.Random(1)
    source = messages(Plan(devices=100, payload=payload, topic=_TOPIC))
    for n, (topic, body) in enumerate(itertools.islice(source, count)):
        # Real messages do not arrive at exactly regular times.
        received = _MONTH.timestamp() + (n + rng.random()) * _SECONDS / (count + 1)
        moment = datetime.fromtimestamp(received, UTC).isoformat()
        [fields] = fields_of_all([body])
        text = "\\N" if fields is None else fields.decode().replace("\\", "\\\\")
        yield f"{moment}\t{topic}\t\\\\x{body.hex()}\t{text}\t1\tf\n".encode()


class _Inserter(threading.Thread):
    """Inserts a row with the current time every 5 ms, and records the milliseconds of each."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._stop_event = threading.Event()
        self.times: list[float] = []

    def run(self) -> None:
        with contextlib.closing(psycopg2.connect(self._url)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                while not self._stop_event.wait(0.005):
                    started = time.perf_counter()
                    cursor.execute(
                        "INSERT INTO messages (received_at, topic, payload, qos, retained)"
                        " VALUES (now(), 'a', 'x', 0, false)"
                    )
                    self.times.append((time.perf_counter() - started) * 1000)

    def finish(self) -> str:
        """Stop; return the median and the longest time."""
        self._stop_event.set()
        self.join()
        return f"{statistics.median(self.times):.1f} / {max(self.times):.0f}"


def _run(settings: dict[str, str], *arguments: str) -> tuple[float, float]:
    """Run iot-collector; return its duration in seconds and its maximum memory in MB."""
    started = time.perf_counter()
    process = subprocess.Popen([iot_collector(), *arguments], env=os.environ | settings)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"iot-collector {arguments[0]} failed")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def _measure(database: services.Database, count: int, payload: str, work: Path) -> list[str]:
    database.query("SELECT ensure_partitions('2020-02-01 00:00+00', 0)")
    with psycopg2.connect(database.url) as connection, connection.cursor() as cursor:
        copy_pieces(
            cursor,
            b"COPY messages (received_at, topic, payload, fields, qos, retained) FROM STDIN",
            _lines(count, payload),
        )
    connection.close()
    in_table = int(str(database.query(_SIZE)[0][0]))
    target = work / f"{payload}-{count}"
    target.mkdir()
    settings = {"IOT_DATABASE_URL": database.url, "IOT_ARCHIVE_TARGET": str(target)}
    inserter = _Inserter(database.url)
    inserter.start()
    time.sleep(10)
    idle = inserter.finish()
    inserter = _Inserter(database.url)
    inserter.start()
    archiving, memory = _run(settings, "archive")
    busy = inserter.finish()
    restoring, _ = _run(settings, "restore", "2020-02")
    database.query("DROP TABLE messages_2020_02")
    archived = (target / "messages_2020_02.parquet").stat().st_size
    return [
        f"{in_table / count:.0f}",
        f"{archived / count:.1f}",
        f"{count / archiving:,.0f}",
        f"{count / restoring:,.0f}",
        f"{memory:.0f}",
        idle,
        busy,
    ]


def main() -> None:
    """Archive and restore months of several sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("millions", nargs="+", type=float)
    rows = []
    with (
        tempfile.TemporaryDirectory(prefix="iot-archive-", dir="/var/tmp") as work,
        services.database(_PORT, Path(work)) as database,
    ):
        migrate(Settings(database_url=database.url))
        for millions in parser.parse_args().millions:
            for payload in ("text", "json"):
                row = _measure(database, int(millions * 1e6), payload, Path(work))
                print(f"{millions:g} M {payload}:", ", ".join(row), flush=True)
                rows.append(f"| {millions:g} M | {payload} | " + " | ".join(row) + " |")
    (Path(__file__).parent / "ARCHIVE.md").write_text(_page(rows))


def _page(rows: list[str]) -> str:
    return "\n".join(
        [
            "# The cost of archiving a month",
            "",
            f"Written by `python -m benchmarks.archive` on {datetime.now(UTC):%Y-%m-%d}. The head "
            "of archive.py describes the method.",
            "",
            "| messages | payload | bytes in the table, with indexes | bytes in the archive |"
            " archived/s | restored/s | memory of archive, MB |"
            " an INSERT, ms, median / longest | the same while archiving |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
