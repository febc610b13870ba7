"""The command ``iot-collector``."""

import os
import signal
import sys
from typing import IO, Any

import click
import psycopg2

from . import __version__, log
from .replay_command import replay
from .settings import VARIABLES, Settings, SettingsError, load


class _WrongSetting(click.ClickException):
    """A SettingsError as click shows it."""

    exit_code = 2

    def show(self, file: IO[str] | None = None) -> None:
        """Print a line for each fault; click calls this and exits."""
        for fault in self.message.splitlines():
            click.echo(f"wrong setting: {fault}", file, err=True)


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; a wrong setting ends it with status 2."""
        try:
            return super().invoke(ctx)
        except SettingsError as error:
            raise _WrongSetting(str(error)) from error


@click.group(cls=_Commands)
@click.version_option(__version__)
def main() -> None:
    """Store every MQTT message in PostgreSQL.

    Settings come from environment variables with the prefix IOT_.
    `iot-collector run --help` lists them.
    """
    if os.getpid() == 1:  # in a container: the kernel sends process 1 no signal without a handler
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


main.add_command(replay)


def load_settings() -> Settings:
    """Read the settings and set up the log."""
    settings = load()
    log.configure(settings)
    return settings


def _table_of_settings() -> str:
    lines = ["\b\nSettings, from the environment (with their defaults):"]
    for variable, field in VARIABLES.items():
        default = ",".join(field.default) if isinstance(field.default, list) else field.default
        shown = "" if default in (None, "") else f" ({default})"
        lines.append(f"  {variable}{shown}\n      {field.description}")
    return "\n".join(lines)


@main.command(epilog=_table_of_settings())
def run() -> None:
    """Collect messages until SIGTERM or SIGINT."""
    from .run import run as run_collector

    sys.exit(run_collector(load_settings()))


@main.command()
def migrate() -> None:
    """Bring the database's schema up to date."""
    from .migrate import migrate as apply_migrations

    try:
        applied = apply_migrations(load_settings())
    except psycopg2.Error as error:
        raise click.ClickException(f"migration failed, nothing was changed: {error}") from error
    click.echo("\n".join(f"applied {name}" for name in applied) or "up to date")


@main.command()
def check() -> None:
    """Check the settings, broker and database, and say what to change.

    The exit status is 2 for wrong settings, or the sum of what failed: 4 broker, 8 database,
    16 replay queue.
    """
    from .check import check as run_check

    status = 0
    for bit, text in run_check(load_settings()):
        sign = click.style("wrong ", fg="red") if bit else click.style("ok    ", fg="green")
        click.echo(sign + text)
        status |= bit
    sys.exit(status)


@main.command()
@click.option(
    "--collector",
    metavar="HOST:PORT",
    help="Where its /metrics are; by default those of this machine, on the port of the settings.",
)
@click.option("--prometheus", metavar="HOST:PORT", default="127.0.0.1:9090", show_default=True)
@click.option(
    "--published",
    metavar="PAYLOAD",
    help="Publish nothing: follow a message that has been published with this payload.",
)
def verify(collector: str | None, prometheus: str, published: str | None) -> None:
    """Follow one message from the broker to the table and to Prometheus.

    Publishes it to the first topic of the settings. Their accounts have to be allowed to publish
    and to read the table; those of a collector usually are not.
    """
    from .database import explain
    from .verify import VerificationError
    from .verify import verify as run_verify

    settings = load_settings()
    try:
        for line in run_verify(
            settings, collector or f"127.0.0.1:{settings.http_port}", prometheus, published
        ):
            click.echo(line)
    except psycopg2.Error as error:
        sys.exit(f"verify: database: {explain(error)}")
    except (VerificationError, OSError) as error:
        sys.exit(f"verify: {error}")


_POSITIVE = click.FloatRange(min=0, min_open=True)


@main.command()
@click.option("--devices", default=5, show_default=True, type=click.IntRange(1, 100_000))
@click.option(
    "--rate", type=_POSITIVE, help="Messages per second; without it, as fast as possible."
)
@click.option("--count", type=click.IntRange(1), help="Stop after this many messages.")
@click.option("--duration", type=_POSITIVE, help="Stop after this many seconds.")
@click.option(
    "--topic", default="iot/data", show_default=True, help="{device} stands for the device's name."
)
@click.option(
    "--payload",
    default="text",
    show_default=True,
    type=click.Choice(["text", "json", "garbage", "mix"]),
)
@click.option("--qos", default=1, show_default=True, type=click.IntRange(0, 2))
@click.option(
    "--connections",
    default=1,
    show_default=True,
    type=click.IntRange(1, 1000),
    help="Devices share this many connections.",
)
@click.option("--seed", default=1, show_default=True, help="The same seed sends the same messages.")
def simulate(**options: Any) -> None:
    """Publish as devices do, and count what the broker acknowledged."""
    from .simulate import Plan
    from .simulate import simulate as run_simulation

    sys.exit(run_simulation(load_settings(), Plan(**options)))
