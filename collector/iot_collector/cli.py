"""The command ``iot-collector``."""

import os
import signal
import sys

import click
import psycopg2

from . import __version__, log
from .settings import Settings, SettingsError, load, table

SETTINGS_WRONG = 2


@click.group()
@click.version_option(__version__)
def main() -> None:
    """Store every MQTT message in PostgreSQL.

    Settings come from environment variables with the prefix IOT_.
    `iot-collector run --help` lists them.
    """
    if os.getpid() == 1:  # the first process of a container is not ended by a signal it ignores
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _settings() -> Settings:
    try:
        settings = load()
    except SettingsError as error:
        _fail(error)
    log.configure(settings)
    return settings


def _fail(error: SettingsError) -> None:
    for line in str(error).splitlines():
        click.echo(f"wrong setting: {line}", err=True)
    sys.exit(SETTINGS_WRONG)


def _epilog() -> str:
    lines = (
        f"  {name}{f' ({default})' if default else ''}\n      {text}"
        for name, default, text in table()
    )
    return "\b\nSettings, from the environment (with their defaults):\n" + "\n".join(lines)


@main.command(epilog=_epilog())
def run() -> None:
    """Collect messages until told to stop."""
    from .run import run as run_collector

    settings = _settings()
    try:
        sys.exit(run_collector(settings))
    except SettingsError as error:
        _fail(error)


@main.command()
def migrate() -> None:
    """Bring the database's schema up to date."""
    from .migrate import migrate as apply_migrations

    settings = _settings()
    try:
        applied = apply_migrations(settings)
    except psycopg2.Error as error:
        click.echo(f"migration failed, nothing was changed: {error}", err=True)
        sys.exit(1)
    for name in applied:
        click.echo(f"applied {name}")
    if not applied:
        click.echo("up to date")


@main.command()
def check() -> None:
    """Check the settings, reach broker and database, and say what to change.

    The exit status says which failed: 2 settings, 4 broker, 8 database, 12 both.
    """
    from .check import check as run_check

    status = 0
    for right, text, bit in run_check(_settings()):
        click.echo(
            click.style("ok    " if right else "wrong ", fg="green" if right else "red") + text
        )
        status |= bit
    sys.exit(status)


@main.command()
@click.option("--devices", default=5, show_default=True, type=click.IntRange(1, 100_000))
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    help="Messages per second; as fast as can be when left out.",
)
@click.option("--count", type=click.IntRange(1), help="Stop after so many messages.")
@click.option(
    "--duration", type=click.FloatRange(min=0, min_open=True), help="Stop after so many seconds."
)
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
def simulate(**options: object) -> None:
    """Publish as devices do, to the broker of the settings, and count what it acknowledged."""
    from .simulate import Plan
    from .simulate import simulate as run_simulation

    sys.exit(run_simulation(_settings(), Plan(**options)))  # type: ignore[arg-type]
