"""The command ``iot-collector``."""

import os
import signal
import sys

import click
import psycopg2
from iot_simulator.command import simulate

from . import __version__, log
from .settings import VARIABLES, Settings, load


@click.group()
@click.version_option(__version__)
def main() -> None:
    """Store every MQTT message in PostgreSQL.

    Settings come from environment variables with the prefix IOT_.
    `iot-collector run --help` lists them.
    """
    if os.getpid() == 1:  # the first process of a container is not ended by a signal it ignores
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


main.add_command(simulate)


def load_settings() -> Settings:
    """Return the settings, with the log set up as they say."""
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
    """Collect messages until told to stop."""
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
    """Check the settings, reach broker and database, and say what to change.

    The exit status says which failed: 2 settings, 4 broker, 8 database, 12 both.
    """
    from .check import check as run_check

    status = 0
    for bit, text in run_check(load_settings()):
        sign = click.style("wrong ", fg="red") if bit else click.style("ok    ", fg="green")
        click.echo(sign + text)
        status |= bit
    sys.exit(status)
