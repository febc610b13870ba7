"""One run of a competitor: generate load, sample CPU time and memory, and count the rows.

All modes sample CPU time and memory every 50 ms. Afterwards PostgreSQL tells when each row was
committed (``track_commit_timestamp``). The result is the CPU time between two samples, divided by
the rows committed between them, so the start of a competitor is not counted.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

from testing.service import ServiceError, eventually

from . import processes, services, wire
from .competitors import CLIENT_ID, Competitor, Place
from .services import ROWS, Database

_EVERY = 0.05
_TICK = 0.01  # the resolution of CPU times in /proc
_STILL = 0.5  # seconds without growth after which the rows are counted
_GIVEN_UP = 6.0  # seconds without growth after which a run ends
_WARM_UP = 1.0  # seconds of load that are not measured
_CATCH_UP = 20.0  # seconds after a load to store the queued messages
# Slower competitors, in messages per second. At full speed their queue would grow, in the broker or
# in their own memory, which makes each message more expensive. They get half the rate that they can
# handle on an idle machine. Mode drain shows how fast they are.
_SLOW = 10_000
_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Load:
    """The output of a load generator."""

    sent: list[int]  # by device
    began: float
    ended: float
    late: float
    cpu: float


@dataclass(slots=True)
class Sample:
    """CPU seconds used so far, at one time."""

    at: float
    client: float
    database: float
    broker: float
    own: float  # ours: this process, the load generator, and our database backend
    machine: float
    memory: float
    received: int  # only for competitors that store nothing


@dataclass(slots=True)
class Result:
    """The result of one run. A value is None where it does not apply."""

    competitor: str
    mode: str
    sent: int = 0
    stored: int | None = None
    doubled: int = 0
    lost: int = 0
    unfinished: int = 0
    rate: float = 0.0
    client_us: float = 0.0
    database_us: float | None = None
    broker_us: float = 0.0
    rows_per_commit: float | None = None
    delay_ms: dict[int, float] = field(default_factory=dict)  # percentile -> milliseconds
    flush_ms: float | None = None
    memory: list[float] = field(
        default_factory=list
    )  # MB after a tenth, after half, at the end, and the maximum
    idle_percent: float | None = None
    cores_others: float = 0.0
    generator_late_ms: float = 0.0
    offered: float | None = None  # messages per second, if not at full speed
    profile: list[str] = field(default_factory=list)


class Run:
    """A competitor with its broker and database, and the samples of a run."""

    def __init__(
        self, competitor: Competitor, place: Place, database: Database, broker: int
    ) -> None:
        self.competitor = competitor
        self.place = place
        self.database = database
        self._broker = broker
        self.process: subprocess.Popen[bytes] | None = None
        self.generator: subprocess.Popen[bytes] | None = None
        self.samples: list[Sample] = []
        self._flush_before = (0.0, 0)

    def start(self) -> None:
        """Start the competitor."""
        log = self.place.work / f"{self.competitor.name}.log"
        self.place.count_file.write_bytes(b"")
        self._flush_before = self._flushes()
        self.process = processes.start(
            self.competitor.command(self.place), log, env=self.competitor.environment(self.place)
        )

    def until_ready(self) -> None:
        """Wait until a probe message is received or stored, then delete it."""
        wire.publish_one(self.place.broker_port, wire.payload(0, 0, 0))
        self._until(lambda: self._progress() > 0, 20, "nothing arrives")
        if self.competitor.stores:
            self.database.clear()

    def _until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        process = self.process
        assert process is not None
        eventually(lambda: process.poll() is not None or condition(), seconds, self._message(what))
        if process.poll() is not None:
            raise ServiceError(self._message(f"ended with status {process.returncode}"))

    def _message(self, what: str) -> str:
        log = self.place.work / f"{self.competitor.name}.log"
        return f"{self.competitor.name}: {what}; see {log}"

    def _progress(self) -> int:
        if self.competitor.counted:
            return self.competitor.counted(self.place)
        return self.database.size(self.competitor.table)

    def sample(self) -> Sample:
        """Take a sample now."""
        assert self.process is not None
        backend = self.database.backend
        sample = Sample(
            at=time.time(),
            client=processes.cpu_of_tree(self.process.pid),
            database=processes.cpu_of_tree(self.database.server.pid, without=backend),
            broker=processes.cpu_of_tree(self._broker),
            own=time.process_time()
            + processes.cpu_of_tree(backend)
            + (processes.cpu_of_tree(self.generator.pid) if self.generator else 0),
            machine=processes.machine_busy(),
            memory=processes.memory_of(self.process.pid),
            received=self.competitor.counted(self.place) if self.competitor.counted else 0,
        )
        self.samples.append(sample)
        return sample

    def watch_load(self, *options: str) -> Load:
        """Sample while a load generator runs; return its output."""
        with load(self.place.broker_port, *options) as self.generator:
            while self.generator.poll() is None:
                self.sample()
                time.sleep(_EVERY)
            self.sample()
            return _output_of(self.generator)

    def watch_rest(self, expected: int, limit: float) -> None:
        """Sample until all messages are stored, nothing changes any more, or time is up."""
        until = time.time() + limit
        progress = self._progress()
        changed = counted = time.time()
        while (now := self.sample().at) < until:
            latest = self._progress()
            if latest != progress:
                progress, changed = latest, now
            elif self.competitor.stores:
                if now - changed > _STILL and counted <= changed:
                    counted = now
                    if self._rows() >= expected:
                        break
                if now - changed > _GIVEN_UP:
                    break
            elif latest >= expected or now - changed > _GIVEN_UP:
                break
            time.sleep(_EVERY)

    def _rows(self) -> int:
        return int(self.database.query(f"SELECT count(*) FROM {self.competitor.table}")[0][0])

    def _flushes(self) -> tuple[float, int]:
        time_ms, count = self.database.query("SELECT wal_sync_time, wal_sync FROM pg_stat_wal")[0]
        return float(time_ms), int(count)

    def evaluate(self, result: Result, begin: float, end: float) -> None:
        """Calculate the results between two times in Unix seconds."""
        inside = [s for s in self.samples if begin <= s.at <= end]
        if len(inside) < 2:
            raise ServiceError(f"{self.competitor.name}: too short to measure, take more messages")
        first, last = inside[0], inside[-1]
        seconds = last.at - first.at
        rows = last.received - first.received
        if self.competitor.stores:
            commits = self.commits(first.at, last.at)
            rows = sum(count for _, count in commits)
            result.rows_per_commit = rows / max(1, len(commits))
            time_ms, flushes = self._flushes()
            flushes -= self._flush_before[1]
            result.flush_ms = (time_ms - self._flush_before[0]) / max(1, flushes)
        rows = max(rows, 1)
        result.rate = rows / seconds
        result.client_us = (last.client - first.client) / rows * 1e6
        result.broker_us = (last.broker - first.broker) / rows * 1e6
        database = last.database - first.database
        result.database_us = database / rows * 1e6 if self.competitor.stores else None
        known = (last.client - first.client) + database + (last.broker - first.broker)
        others = (last.machine - first.machine) - known - (last.own - first.own)
        result.cores_others = max(0.0, others / seconds)
        memory = [s.memory for s in inside]
        points = (len(memory) // 10, len(memory) // 2, -1)
        result.memory = [*(memory[i] for i in points), max(s.memory for s in self.samples)]

    def commits(self, begin: float, end: float) -> list[tuple[float, int]]:
        """Return (time, rows) of each transaction that committed between two times."""
        rows = self.database.query(
            "SELECT extract(epoch FROM pg_xact_commit_timestamp(xid))::float8, n"
            f" FROM (SELECT xmin AS xid, count(*) AS n FROM {self.competitor.table} GROUP BY 1) t"
            " ORDER BY 1"
        )
        return [(at, n) for at, n in rows if begin < at <= end]

    def delays(self, result: Result, begin: float, end: float) -> None:
        """Calculate the delays from when a message was due to the commit of its row."""
        percentiles = (50, 99, 100)
        values = self.database.query(
            "SELECT percentile_cont(%s::float8[]) WITHIN GROUP (ORDER BY"
            "   extract(epoch FROM pg_xact_commit_timestamp(xmin))::float8 * 1000 - sent_us / 1000)"
            f" FROM {ROWS[self.competitor.table]} WHERE sent_us BETWEEN %s AND %s",
            [p / 100 for p in percentiles],
            begin * 1e6,
            end * 1e6,
        )[0][0]
        result.delay_ms = dict(zip(percentiles, values or [], strict=False))

    def verify(self, result: Result, sent: list[int], *, finished: bool) -> None:
        """Count lost and duplicate messages by the sequence numbers of each device."""
        result.sent = sum(sent)
        if not self.competitor.stores:
            return
        rows, distinct, without_gaps = self.database.query(
            "SELECT coalesce(sum(n), 0), coalesce(sum(d), 0), coalesce(sum(last + 1), 0) FROM ("
            "  SELECT count(*) AS n, count(DISTINCT seq) AS d, max(seq) AS last"
            f" FROM {ROWS[self.competitor.table]} GROUP BY device) devices"
        )[0]
        result.stored = int(rows)
        result.doubled = int(rows - distinct)
        missing = result.sent - int(distinct)
        # When time is up, later messages may still arrive. Gaps before them are lost messages.
        result.lost = missing if finished else int(without_gaps - distinct)
        result.unfinished = 0 if finished else missing

    def stop(self) -> None:
        """Stop the competitor."""
        if self.process:
            # Competitors that acknowledge early would continue to store their messages.
            processes.stop(self.process, patience=8)


@contextmanager
def load(port: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a load generator. It is stopped at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.load", "--port", str(port), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=_ROOT,
    )
    try:
        yield process
    finally:
        processes.stop(process)


def _output_of(generator: subprocess.Popen[bytes]) -> Load:
    out, err = generator.communicate()
    if generator.returncode:
        raise ServiceError(f"load generator failed: {err.decode()[-300:]}")
    return Load(**json.loads(out))


@contextmanager
def _prepared(
    competitor: Competitor, place: Place, database: Database, mosquitto: str
) -> Iterator[Run]:
    with services.broker(mosquitto, place.broker_port, place.work / "broker") as broker:
        wire.make_session(place.broker_port, CLIENT_ID)
        database.clear()
        run = Run(competitor, place, database, broker.pid)
        try:
            yield run
        finally:
            run.stop()


@dataclass(frozen=True)
class Stage:
    """The environment of all runs."""

    place: Place
    database: Database
    mosquitto: str
    py_spy: bool = False


def drain(stage: Stage, competitor: Competitor, count: int, *, limit: float = 120) -> Result:
    """Measure a competitor with a backlog in its session."""
    result = Result(competitor.name, "drain")
    with _prepared(competitor, stage.place, stage.database, stage.mosquitto) as run:
        with load(stage.place.broker_port, "--count", str(count)) as generator:
            sent = _output_of(generator).sent
        run.start()
        with _profiled(run, stage, count / competitor.speed, result):
            run.watch_rest(count, limit)
        if competitor.stores:
            commits = run.commits(0, float("inf"))
            times = (commits[0][0], commits[-1][0]) if commits else (0.0, 0.0)
        else:
            received = [s for s in run.samples if s.received > 0]
            most = received[-1].received if received else 0
            times = (received[0].at, next(s.at for s in received if s.received == most))
        # From the last sample before the broker begins to send to the first one after the last row.
        # Not from the first COMMIT, when a competitor that acknowledges early has read most of it.
        idle_broker = run.samples[0].broker + _TICK
        begin = max((s.at for s in run.samples if s.broker <= idle_broker), default=times[0])
        end = min((s.at for s in run.samples if s.at >= times[1]), default=times[1])
        run.evaluate(result, begin, end)
        if competitor.stores:
            rows = sum(n for _, n in commits[1:])
            result.rate = rows / max(1e-6, times[1] - times[0])
        run.verify(result, sent, finished=run.samples[-1].at - run.samples[0].at < limit)
    return result


def live(
    stage: Stage,
    competitor: Competitor,
    seconds: float = 600,
    rate: float | None = None,
    count: int | None = None,
) -> Result:
    """Measure a competitor with a load generator on the same cores.

    :param count: end after this number of messages, for mode memory.
    """
    mode = f"{rate:.0f}/s" if rate else "memory" if count else "live"
    result = Result(competitor.name, mode)
    if mode == "live" and competitor.speed < _SLOW:
        rate = result.offered = competitor.speed / 2
    with _prepared(competitor, stage.place, stage.database, stage.mosquitto) as run:
        run.start()
        run.until_ready()
        options = ["--seconds", str(seconds + _WARM_UP)]
        if rate:
            options += ["--rate", str(rate), "--connections", "8"]
        else:
            # Mosquitto takes a packet from each busy connection in turn. With several publishers at
            # full speed, the subscriber's PUBACKs would be delayed, and any queue would grow.
            options += ["--connections", "1"]
        if count:
            options += ["--count", str(count)]
        with _profiled(run, stage, seconds, result):
            output = run.watch_load(*options)
        result.generator_late_ms = output.late * 1000
        expected = sum(output.sent) + (0 if competitor.stores else 1)  # the probe
        before = time.time()
        run.watch_rest(expected, _CATCH_UP)
        finished = time.time() - before < _CATCH_UP
        run.evaluate(result, output.began + _WARM_UP, output.ended)
        if competitor.stores and rate and not result.offered:
            run.delays(result, output.began + _WARM_UP, output.ended)
        run.verify(result, output.sent, finished=finished)
        if competitor.metrics and finished:  # else it stores more rows between the two counts
            _check_counts(stage.place, result)
    return result


def idle(stage: Stage, competitor: Competitor, seconds: float) -> Result:
    """Measure a connected competitor without messages."""
    result = Result(competitor.name, "idle")
    with _prepared(competitor, stage.place, stage.database, stage.mosquitto) as run:
        run.start()
        run.until_ready()
        time.sleep(2)
        first = run.sample()
        time.sleep(seconds)
        last = run.sample()
        result.idle_percent = (last.client - first.client) / (last.at - first.at) * 100
        result.memory = [first.memory, first.memory, last.memory, last.memory]
    return result


def _check_counts(place: Place, result: Result) -> None:
    """Compare the collector's own count with the table (the probe message is one more)."""
    with urlopen(f"http://{wire.HOST}:{place.http_port}/metrics", timeout=5) as answer:
        lines = [line.split() for line in answer.read().decode().splitlines() if line[:1] != "#"]
    values = {line[0]: float(line[1]) for line in lines}
    if result.stored is not None and values["db_inserts_total"] != result.stored + 1:
        raise ServiceError(
            f"{result.competitor} counts {values['db_inserts_total']:.0f} rows,"
            f" the table has {result.stored + 1}"
        )


@contextmanager
def _profiled(run: Run, stage: Stage, seconds: float, result: Result) -> Iterator[None]:
    """Profile a Python competitor with py-spy, if requested. This slows it down slightly."""
    if not (stage.py_spy and run.competitor.metrics and run.process):
        yield
        return
    output = stage.place.work / "profile"
    command = [str(Path(sys.executable).with_name("py-spy")), "record", "--format", "raw"]
    command += ["--rate", "250", "--duration", str(int(seconds)), "--output", str(output)]
    spy = processes.start([*command, "--pid", str(run.process.pid)], stage.place.work / "spy.log")
    try:
        yield
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            spy.wait(30)
        processes.stop(spy)
    result.profile = output.read_text().splitlines()
