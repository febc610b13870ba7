"""The cost of a viewer of the live page: ``python -m benchmarks.explorer``.

There is a constant load on many topics. Segments without and with a viewer take turns, so that
other load on the machine affects both. The viewer has three levels of the tree expanded and a topic
selected, and reads its event stream like a browser. Writes EXPLORER.md.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import struct
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.synchronize import Event
from pathlib import Path

from iot_collector.migrate import migrate
from iot_collector.settings import Settings
from prometheus_client.parser import text_string_to_metric_families

from testing.service import eventually

from . import processes, services, wire

_PORT = 31_970
_CONNECTIONS = 8
_FIELDS = b'{"temperature":%d.%02d,"humidity":55.1,"battery":3.71,"pad":"0123456789abcdef"}'


def _topic(number: int) -> str:
    return f"plant/{number // 100:02d}/device-{number % 100:02d}"


def _generate(rate: int, topics: int, stop: Event) -> None:
    """Publish at a constant rate, to each topic in turn, until ``stop`` is set."""
    heads = []
    for number in range(topics):
        topic = _topic(number).encode()
        size = 2 + len(topic) + 2 + len(_FIELDS % (20, 0))
        assert size < 128
        heads.append(bytes((0x32, size)) + struct.pack(">H", len(topic)) + topic)
    sockets = [wire.connect(_PORT, f"load-{n}", clean=True) for n in range(_CONNECTIONS)]
    for sock in sockets:
        sock.setblocking(False)
    sent, start = 0, time.monotonic()
    while not stop.is_set():
        due = int((time.monotonic() - start) * rate) - sent
        parts: list[list[bytes]] = [[] for _ in sockets]
        for number in range(sent, sent + due):
            identifier = (number // _CONNECTIONS % 60_000 + 1).to_bytes(2)
            payload = _FIELDS % (15 + number % 12, number % 100)
            parts[number % _CONNECTIONS].append(heads[number % topics] + identifier + payload)
        for sock, part in zip(sockets, parts, strict=True):
            sock.setblocking(True)
            sock.sendall(b"".join(part))
            sock.setblocking(False)
            try:
                sock.recv(1 << 16)  # acknowledgements
            except BlockingIOError:
                continue
        sent += due
        time.sleep(0.005)


class _Viewer(threading.Thread):
    """Reads the event stream until ``done`` is set."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()
        self.events = 0
        self.size = 0

    def run(self) -> None:
        view = {
            "viewer": "benchmark",
            "open": ["", "plant/", "plant/07/"],
            "topic": _topic(742),
        }
        request = urllib.request.Request(
            f"http://{wire.HOST}:{_PORT + 2}/explorer/stream",
            json.dumps(view).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            for line in answer:
                self.events += line.startswith(b"event:")
                self.size += len(line)
                if self.done.is_set():
                    return


@dataclass
class _Segment:
    viewer: bool
    rate: float
    collector: float  # milliseconds of CPU time per second, as for the next two
    database: float
    broker: float
    delay: float  # mean, milliseconds
    memory: float  # MB
    http: float  # threads of the collector that neither receive nor store
    others: float  # ms of CPU time per second of other programs
    events: float = 0.0  # per second
    kilobytes: float = 0.0


def _metrics() -> dict[str, float]:
    with urllib.request.urlopen(f"http://{wire.HOST}:{_PORT + 2}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _measure(seconds: float, viewer: bool, pids: dict[str, int]) -> _Segment:
    watcher = _Viewer() if viewer else None
    if watcher:
        watcher.start()
    time.sleep(2)  # the first events are larger
    before, cpu, began = _metrics(), _cpu(pids), time.monotonic()
    machine = processes.machine_busy() - processes.cpu_of_tree(os.getpid())
    threads = _threads(pids["collector"])
    events, size = (watcher.events, watcher.size) if watcher else (0, 0)
    time.sleep(seconds)
    after, spent, lasted = _metrics(), _cpu(pids), time.monotonic() - began

    machine = processes.machine_busy() - processes.cpu_of_tree(os.getpid()) - machine
    changes = sorted(
        spent - threads.get(number, 0) for number, spent in _threads(pids["collector"]).items()
    )

    def change(name: str) -> float:
        return after[name] - before[name]

    segment = _Segment(
        viewer=viewer,
        rate=change("db_inserts_total") / lasted,
        delay=1000 * change("message_delay_seconds_sum") / change("message_delay_seconds_count"),
        memory=processes.memory_of(pids["collector"]),
        http=1000 * sum(changes[:-2]) / lasted,
        others=1000 * machine / lasted,
        **{name: 1000 * (spent[name] - cpu[name]) / lasted for name in pids},
    )
    if watcher:
        segment.events = (watcher.events - events) / lasted
        segment.kilobytes = (watcher.size - size) / lasted / 1000
        assert watcher.is_alive(), "the viewer's stream ended"
        watcher.done.set()
        watcher.join(10)
    return segment


def _threads(pid: int) -> dict[str, float]:
    """Return CPU seconds by thread, from nanoseconds in schedstat (proc(5))."""
    folders = Path(f"/proc/{pid}/task").iterdir()
    return {f.name: int((f / "schedstat").read_text().split()[0]) / 1e9 for f in folders}


def _cpu(pids: dict[str, int]) -> dict[str, float]:
    return {name: processes.cpu_of_tree(pid) for name, pid in pids.items()}


def main() -> None:
    """Measure, print and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=int, default=10_000)
    parser.add_argument("--topics", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "EXPLORER.md")
    options = parser.parse_args()
    stop = multiprocessing.Event()
    load = multiprocessing.Process(target=_generate, args=(options.rate, options.topics, stop))
    with (
        tempfile.TemporaryDirectory(prefix="iot-explorer-", dir="/var/tmp") as work,
        _open(work),
        services.database(_PORT + 1, Path(work) / "postgresql") as database,
        services.broker("mosquitto", _PORT, Path(work) / "mosquitto") as broker,
    ):
        # As in production, autovacuum keeps the index on received_at up to date.
        database.query("ALTER SYSTEM SET autovacuum = on")
        database.query("SELECT pg_reload_conf()")
        migrate(Settings(database_url=database.url))
        settings = {
            "IOT_MQTT_URL": f"mqtt://{wire.HOST}:{_PORT}",
            "IOT_MQTT_TOPICS": "plant/#",
            "IOT_DATABASE_URL": database.url,
            "IOT_HTTP_PORT": str(_PORT + 2),
        }
        collector = processes.start(
            ["iot-collector", "run"], Path(work) / "collector.log", env=settings
        )
        pids = {
            "collector": collector.pid,
            "database": database.server.pid,
            "broker": broker.pid,
        }
        segments = []
        try:
            eventually(_ready, 20, "the collector is ready")
            load.start()
            time.sleep(5)
            for number in range(2 * options.repetitions):
                segment = _measure(options.seconds, number % 2 == 1, pids)
                segments.append(segment)
                print(segment, flush=True)
        finally:
            stop.set()
            if load.pid is not None:
                load.join(20)
            processes.stop(collector)
    text = _page(segments, options)
    print(text)
    options.output.write_text(text)


@contextlib.contextmanager
def _open(work: str) -> Iterator[None]:
    """Make the directory accessible to the users of broker and database."""
    Path(work).chmod(0o755)
    yield


def _ready() -> bool:
    try:
        _metrics()
    except OSError:
        return False
    return True


def _page(segments: list[_Segment], options: argparse.Namespace) -> str:
    sides = {viewer: [s for s in segments if s.viewer is viewer] for viewer in (False, True)}

    of_all = statistics.median(segment.collector for segment in sides[False])

    def cells(name: str, digits: int = 1) -> list[str]:
        found = []
        for side in sides.values():
            values = [getattr(segment, name) for segment in side]
            found.append(f"{min(values):,.{digits}f} to {max(values):,.{digits}f}")
        without, with_one = (
            statistics.median(getattr(segment, name) for segment in side) for side in sides.values()
        )
        if name == "http":
            return [*found, f"{100 * (with_one - without) / of_all:+.1f} % of the collector's"]
        return [*found, f"{100 * (with_one / without - 1):+.1f} %"]

    rows = [
        ("messages stored per second", *cells("rate", 0)),
        ("collector, ms of CPU time per second", *cells("collector")),
        ("of which threads that neither receive nor store", *cells("http", 2)),
        ("PostgreSQL, ms of CPU time per second", *cells("database")),
        ("Mosquitto, ms of CPU time per second", *cells("broker")),
        ("mean delay from receipt to COMMIT, ms", *cells("delay", 2)),
        ("collector's memory, MB", *cells("memory")),
        ("other programs on the machine, ms of CPU time per second", *cells("others", 0)),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    events = statistics.median(segment.events for segment in sides[True])
    kilobytes = statistics.median(segment.kilobytes for segment in sides[True])
    command = f"--rate {options.rate} --topics {options.topics} --seconds {options.seconds:g}"
    return f"""# The cost of a viewer of the live page

Written by `python -m benchmarks.explorer {command} --repetitions {options.repetitions}`
on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; {os.cpu_count()} cores, everything on one machine.

There is a constant load of {options.rate:,} messages a second on {options.topics:,} topics. \
Segments of {options.seconds:g} s without and with a viewer take turns.
The viewer has three levels of the tree expanded, which shows 201 nodes, and one topic selected. \
It gets {events:.1f} events and {kilobytes:.0f} kB a second.
Ranges are from minimum to maximum. The change is between the medians.

| | without | with one viewer | change |
|---|---:|---:|---:|
{table}
"""


if __name__ == "__main__":
    main()
