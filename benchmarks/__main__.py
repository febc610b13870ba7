"""The command: ``python -m benchmarks``."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import click
import iot_collector

from testing.service import ServiceError

from . import processes, report, services, trial, wire
from .competitors import ALL, BY_NAME, Competitor, Place, migrate
from .trial import Result

_HERE = Path(__file__).parent
_QUICK = "collector,stock,naive,sub,limit"
_PACED = ("collector", "node", "go", "bridge")  # the competitors for mode fixed
_MODES = ("drain", "live", "fixed", "idle", "memory")


def _list_of(
    known: list[str],
) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    def parse(_context: click.Context, _parameter: click.Parameter, value: str) -> list[str]:
        names = list(BY_NAME) if value == "all" and known == list(BY_NAME) else value.split(",")
        for name in names:
            if name not in known:
                raise click.BadParameter(f"{name!r}; known are {', '.join(known)}")
        return names

    return parse


@click.command(context_settings={"show_default": True})
@click.option("--competitors", default=_QUICK, callback=_list_of(list(BY_NAME)), help="or: all")
@click.option("--modes", default="drain,live", callback=_list_of(list(_MODES)))
@click.option("--count", default=150_000, help="Messages of a backlog, for the fast ones.")
@click.option("--seconds", default=5.0, help="Length of a live or fixed run.")
@click.option("--rates", default="1000,10000,20000", help="Messages per second of fixed runs.")
@click.option("--memory-count", default=10_000_000, help="Messages of mode memory.")
@click.option("--idle-seconds", default=20.0)
@click.option("--repetitions", default=1)
@click.option("--full", is_flag=True, help="All competitors and modes, three times, longer runs.")
@click.option("--profile", is_flag=True, help="Profile the collector with py-spy.")
@click.option("--mosquitto", default="mosquitto", help="The broker to start.")
@click.option("--port", default=31_001, help="The first of three ports on 127.0.0.1.")
@click.option("--work", type=click.Path(path_type=Path), default=_HERE / ".work")
@click.option("--output", type=click.Path(path_type=Path), help="Where to write the report.")
def main(
    competitors: list[str],
    modes: list[str],
    count: int,
    seconds: float,
    rates: str,
    memory_count: int,
    idle_seconds: float,
    repetitions: int,
    full: bool,
    profile: bool,
    mosquitto: str,
    port: int,
    work: Path,
    output: Path | None,
) -> None:
    """Run the collector and others side by side against a fresh Mosquitto and PostgreSQL.

    The report goes to benchmarks/RESULTS.md with --full, else to benchmarks/.work/RESULTS.md.
    """
    if full:
        competitors, modes = list(BY_NAME), list(_MODES)
        count, seconds, repetitions = max(count, 300_000), max(seconds, 6.0), max(repetitions, 3)
    output = output or (_HERE if full else work) / "RESULTS.md"
    work = work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    place = Place(work, port, port + 2, f"postgresql://postgres@{wire.HOST}:{port + 1}/postgres")
    try:
        versions, chosen = _prepare(competitors, place, mosquitto)
        with services.database(port + 1, work / "postgresql") as database:
            versions["PostgreSQL"] = database.query("SHOW server_version")[0][0]
            migrate(place)
            database.add_bridge()
            stage = trial.Stage(place, database, mosquitto, profile)
            plan = _plan(
                modes,
                count,
                seconds,
                [float(r) for r in rates.split(",")],
                memory_count,
                idle_seconds,
            )
            source = _source()  # now, because commits may be made during the run
            results, failed = _run(stage, chosen, plan, repetitions)
    except ServiceError as error:
        raise click.ClickException(str(error)) from error
    text = report.tables(results) + report.failures(failed)
    click.echo("\n" + text)
    output.write_text(_header(versions, repetitions, source) + text)
    click.echo(f"written to {output}")
    for result in results:
        if result.profile:
            path = work / f"profile-{result.competitor}-{result.mode.replace('/', '-')}.txt"
            path.write_text("\n".join(result.profile))
            click.echo(f"profile (collapsed stacks) in {path}")


def _prepare(
    names: list[str], place: Place, mosquitto: str
) -> tuple[dict[str, str], list[Competitor]]:
    versions = {"Mosquitto": services.version_of_broker(mosquitto)}
    chosen = []
    for competitor in ALL:
        if competitor.name not in names:
            continue
        try:
            versions[competitor.name] = competitor.prepare(place)
            chosen.append(competitor)
        except ServiceError as error:
            versions[competitor.name] = f"skipped: {error}"
            click.echo(f"{competitor.name} skipped: {error}", err=True)
    return versions, chosen


@dataclass(frozen=True)
class Step:
    """A mode with its parameters."""

    name: str
    run: Callable[[trial.Stage, Competitor], Result]
    fits: Callable[[Competitor], bool] = lambda _: True


def _plan(
    modes: list[str],
    count: int,
    seconds: float,
    rates: list[float],
    memory_count: int,
    idle_seconds: float,
) -> list[Step]:
    def fixed(rate: float) -> Step:
        return Step(
            f"{rate:.0f}/s",
            lambda stage, c: trial.live(stage, c, seconds, rate),
            lambda c: c.name in _PACED and c.speed > rate,
        )

    steps = {
        # Slow competitors get a backlog of at most ten seconds.
        "drain": [Step("drain", lambda s, c: trial.drain(s, c, min(count, c.speed * 10)))],
        "live": [Step("live", lambda stage, c: trial.live(stage, c, seconds))],
        "fixed": [fixed(rate) for rate in rates],
        "idle": [Step("idle", lambda s, c: trial.idle(s, c, idle_seconds), lambda c: c.stores)],
        "memory": [
            Step(
                "memory",
                lambda stage, c: trial.live(stage, c, count=memory_count),
                lambda c: c.name == "collector",
            )
        ],
    }
    return [step for mode in modes for step in steps[mode]]


def _run(
    stage: trial.Stage, competitors: list[Competitor], plan: list[Step], repetitions: int
) -> tuple[list[Result], list[str]]:
    """Run everything. Competitors take turns, so that changes over time affect all of them."""
    results, failed = [], []
    for step in plan:
        for repetition in range(repetitions if step.name not in ("idle", "memory") else 1):
            for competitor in filter(step.fits, competitors):
                label = f"{step.name} {repetition + 1}: {competitor.name}"
                try:
                    result = step.run(stage, competitor)
                except ServiceError as error:
                    click.echo(f"{label}: failed: {error}", err=True)
                    failed.append(f"{label}: {error}")
                    continue
                results.append(result)
                click.echo(f"{label}: {report.line(result)}")
    return results, failed


def _source() -> str:
    """Name the commit of the installed collector, which may differ from the working tree."""
    git = ["git", "-C", str(_HERE.parent)]
    installed = Path(iot_collector.__file__).parent
    files = {
        file.relative_to(installed).as_posix(): file.read_bytes()
        for file in installed.rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }
    try:
        commits = processes.run([*git, "log", "-30", "--format=%h"]).split()
    except ServiceError:
        return "a collector of an unknown commit"
    for commit in commits:
        if all(
            _holds([*git, "show", f"{commit}:collector/iot_collector/{n}"], files[n]) for n in files
        ):
            return f"the collector of commit {commit}"
    return f"a collector that is not committed, last commit {commits[0]}"


def _holds(command: list[str], content: bytes) -> bool:
    done = subprocess.run(command, capture_output=True, check=False)
    return done.returncode == 0 and done.stdout == content


def _header(versions: dict[str, str], repetitions: int, source: str) -> str:
    """Describe the command, the machine and the versions."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / (1 << 20)
    names = "\n".join(f"- {name}: {version}" for name, version in versions.items())
    return f"""# Results

Written by `python -m benchmarks {shlex.join(sys.argv[1:])}`
on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, with {source}. Method: [README](README.md).

{os.cpu_count()} cores ({cpu}), {memory:.0f} GB, {platform.system()} {platform.release()}; \
{repetitions} repetitions; ranges are from minimum to maximum.

{names}

The ranges come from few runs on a shared machine. Where other programs used more than some tenths
of a core, differences below a factor of two are noise. In mode live, the C subscriber is not an
upper limit: it reads each message at once, and so takes more CPU time from the broker than
competitors that wait and read many messages together.

"""


if __name__ == "__main__":
    main()
