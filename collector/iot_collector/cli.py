"""The command ``iot-collector``."""

import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import click
import psycopg2

from . import __version__, log
from .replay_command import replay
from .settings import VARIABLES, Settings, SettingsError, load, valid_filter, valid_target


class _WrongSetting(click.ClickException):
    """Makes click print a SettingsError."""

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
    if os.getpid() == 1:  # in a container: the kernel ignores SIGTERM for process 1 by default
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


main.add_command(replay)


def load_settings() -> Settings:
    """Read the settings and configure logging."""
    settings = load()
    log.configure(settings)
    return settings


def _table_of_settings() -> str:
    lines = ["\b\nSettings (environment variables), with their defaults:"]
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
    """Check the settings, broker and database, and name the setting to change.

    The exit status is 0 if all checks succeed, 2 for wrong settings, or the sum of the failures:
    4 for the broker, 8 for the database, 16 for the replay queue.
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
    help="HTTP address of the collector. Default: 127.0.0.1 and the port IOT_HTTP_PORT.",
)
@click.option(
    "--prometheus",
    metavar="HOST:PORT",
    default="127.0.0.1:9090",
    show_default=True,
    help="HTTP address of Prometheus.",
)
@click.option(
    "--published",
    metavar="PAYLOAD",
    help="Do not publish. Follow a message that was already published with this payload.",
)
def verify(collector: str | None, prometheus: str, published: str | None) -> None:
    """Follow one message from the broker to the table and to Prometheus.

    Publishes it to the first topic in IOT_MQTT_TOPICS. The broker's user must be allowed to
    publish, and the database's user to read the table. Those of a collector usually are not.
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
@click.option("--rate", type=_POSITIVE, help="Messages per second. Default: as fast as possible.")
@click.option("--count", type=click.IntRange(1), help="Stop after this many messages.")
@click.option("--duration", type=_POSITIVE, help="Stop after this many seconds.")
@click.option(
    "--topic",
    default="iot/data",
    show_default=True,
    help="{device} is replaced with the name of the device.",
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
    help="Number of connections that the devices share.",
)
@click.option("--seed", default=1, show_default=True, help="The same seed sends the same messages.")
def simulate(**options: Any) -> None:
    """Publish messages as devices do, and count those that the broker acknowledged."""
    from .simulate import Plan
    from .simulate import simulate as run_simulation

    sys.exit(run_simulation(load_settings(), Plan(**options)))


def _checked(_context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Validate the URL or the topic filter of the command `top`."""
    from .top import valid_url

    try:
        return value and (valid_url if parameter.name == "url" else valid_filter)(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _seconds(_context: click.Context, _parameter: click.Parameter, value: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?s?", value)
    if match is None or not 0.2 <= float(match[1]) <= 3600:
        raise click.BadParameter(f"{value!r} is not a time from 0.2s to 3600s")
    return float(match[1])


@main.command()
@click.argument("topic_filter", metavar="[FILTER]", default="#", callback=_checked)
@click.option(
    "--url",
    callback=_checked,
    help="URL of the live page. Default: IOT_HTTP_HOST and IOT_HTTP_PORT.",
)
@click.option(
    "--sort", default="rate", show_default=True, type=click.Choice(["rate", "topic", "age"])
)
@click.option(
    "--interval", default="1s", show_default=True, callback=_seconds, help="Time between updates."
)
@click.option("--once", is_flag=True, help="Print the current state as plain text, and exit.")
def top(topic_filter: str, url: str | None, sort: str, interval: float, *, once: bool) -> None:
    """Show the topics and the state of the pipeline, as the live page does.

    FILTER is a topic filter, for example 'plant/+/temperature' or 'plant/#'. With --sort topic, the
    topics are shown as a tree. Ctrl-C or q quits. If standard output is not a terminal, the command
    prints the current state and exits, as with --once.
    """
    from .top import TopError, default_url
    from .top import top as show

    try:
        show(url or default_url(load_settings()), topic_filter, sort, interval, once=once)
    except TopError as error:
        raise click.ClickException(str(error)) from error


@contextmanager
def _errors_explained(*expected: type[Exception]) -> Iterator[None]:
    """Turn a PostgreSQL error or an expected error into a message without a traceback."""
    from .database import explain

    try:
        yield
    except psycopg2.Error as error:
        raise click.ClickException(f"database: {explain(error)}") from error
    except expected as error:
        raise click.ClickException(str(error)) from error


def _target(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    try:
        return value and valid_target(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


_TARGET = click.option(
    "--target",
    callback=_target,
    help="Directory, s3://bucket/prefix, or none. Default: IOT_ARCHIVE_TARGET.",
)


@main.command()
@click.option("--dry-run", is_flag=True, help="Only print what would be archived and dropped.")
@click.option("--keep-months", type=click.IntRange(1), help="Default: IOT_ARCHIVE_KEEP_MONTHS.")
@_TARGET
@click.option(
    "--every",
    type=click.FloatRange(0, 8760, min_open=True),
    metavar="HOURS",
    help="Keep running as a service, and archive at this interval.",
)
def archive(
    *, dry_run: bool, keep_months: int | None, target: str | None, every: float | None
) -> None:
    """Archive the months that are older than the retention, then drop them.

    A month is dropped only after its archive was read back and has every row. If the command is
    killed, nothing is lost, and the next run continues. The exit status is 1 if a month is left.
    """
    from .archive_files import ArchiveError
    from .retention import RetentionError, archive_for_ever
    from .retention import archive as run_archive

    settings = load_settings()
    given = {"archive_keep_months": keep_months, "archive_target": target}
    settings = settings.model_copy(update={k: v for k, v in given.items() if v is not None})
    if every is not None:
        archive_for_ever(settings, every)
    failed = False
    with _errors_explained(ArchiveError, RetentionError):
        for done, text in run_archive(settings, dry_run=dry_run, progress=_progress):
            failed |= not done
            click.echo(text, err=not done)
    sys.exit(1 if failed else 0)


def _month(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    # The name of a manifest file is accepted too.
    match = re.fullmatch(
        r"(?:.*/)?(?:messages_)?(\d{4})[-_](0[1-9]|1[0-2])(?:-\d+)?(?:\.json)?", value
    )
    if match is None:
        raise click.BadParameter(f"{value!r} is not a month such as 2025-01")
    return f"{match[1]}-{match[2]}"


@main.command()
@click.argument("month", callback=_month)
@click.option(
    "--keep-days",
    default=30,
    show_default=True,
    type=click.IntRange(1, 36500),
    help="Time during which the month is not archived again.",
)
@_TARGET
def restore(month: str, keep_days: int, target: str | None) -> None:
    """Restore an archived MONTH (2025-01) to the table messages, each row once.

    The archive is verified first. If it is truncated or altered, nothing is changed.
    """
    from .archive_files import ArchiveError
    from .restore import restore as run_restore
    from .retention import RetentionError

    settings = load_settings()
    if target is not None:
        settings = settings.model_copy(update={"archive_target": target})
    with _errors_explained(ArchiveError, RetentionError):
        click.echo(run_restore(settings, month, keep_days, _progress))


def _progress(rows: Iterable[Any], what: str, total: int) -> Iterator[Any]:
    # Without a terminal, click draws no progress bar but still prints the label.
    if not sys.stderr.isatty():
        yield from rows
        return
    with click.progressbar(
        rows, length=total, label=what, file=sys.stderr, update_min_steps=10_000, show_pos=True
    ) as bar:
        yield from bar


@main.group(name="dead-letters")
def dead_letters() -> None:
    """Messages that PostgreSQL refused to store in the table messages."""


@dead_letters.command(name="list")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1))
def list_dead_letters(limit: int) -> None:
    """List the newest dead letters, newest first."""
    from .dead_letter_commands import newest

    with _errors_explained():
        letters, total, fallback = newest(load_settings(), limit)
    if letters:
        click.echo(f"{'id':>8}  {'received':<19}  {'bytes':>9}  {'topic':<24}  reason")
    for letter in letters:
        received = f"{letter.received_at:%Y-%m-%d %H:%M:%S}"
        reason = f"{letter.sqlstate} {_printable(letter.reason.encode())}"
        click.echo(
            f"{letter.id:>8}  {received}  {len(letter.payload):>9}  "
            f"{_printable(letter.topic):<24}  {reason}"
        )
    click.echo(f"{len(letters)} of {total} dead letters, received times in UTC")
    if fallback:
        click.echo(f"{fallback} more messages are in dead_letters_fallback: see docs/data.md")


@dead_letters.command(name="show")
@click.argument("letter_id", metavar="ID", type=int)
@click.option("--raw", is_flag=True, help="Write only the bytes of the payload.")
def show_dead_letter(letter_id: int, *, raw: bool) -> None:
    """Show all columns of one dead letter."""
    from .dead_letter_commands import find

    with _errors_explained():
        letter = find(load_settings(), letter_id)
    if letter is None:
        raise click.ClickException(f"there is no dead letter {letter_id}")
    if raw:
        click.echo(letter.payload, nl=False)
        return
    for name, value in (
        ("id", letter.id),
        ("received", letter.received_at.isoformat()),
        ("stored", letter.stored_at.isoformat()),
        ("topic", _printable(letter.topic)),
        ("qos", letter.qos),
        ("retained", letter.retained),
        ("properties", _printable(letter.properties or b"")),
        ("reason", _printable(letter.reason.encode())),
        ("sqlstate", letter.sqlstate),
        ("bytes", len(letter.payload)),
        ("payload", _printable(letter.payload)),
    ):
        click.echo(f"{name:<11}{value}".rstrip())


_LETTER_IDS = click.argument("letter_ids", metavar="[ID]...", nargs=-1, type=int)
_ALL = click.option("--all", "everything", is_flag=True, help="All dead letters.")


def _chosen(settings: Settings, letter_ids: tuple[int, ...], *, everything: bool) -> list[int]:
    """Return the ids of the dead letters that the arguments of a command select."""
    from .dead_letter_commands import ids

    if bool(letter_ids) == everything:
        raise click.UsageError("give the ids of dead letters, or --all")
    found = ids(settings, None if everything else letter_ids)
    if missing := sorted(set(letter_ids) - set(found)):
        raise click.ClickException(f"there is no dead letter {', '.join(map(str, missing))}")
    return found


@dead_letters.command(name="retry")
@_LETTER_IDS
@_ALL
def retry_dead_letters(letter_ids: tuple[int, ...], *, everything: bool) -> None:
    """Store dead letters in the table messages, after their cause was removed.

    A message that is refused again stays a dead letter with the new reason. The exit status is
    then 1.
    """
    from .dead_letter_commands import retry

    settings = load_settings()
    stored = refused = 0
    with _errors_explained():
        for letter_id, refusal in retry(
            settings, _chosen(settings, letter_ids, everything=everything)
        ):
            stored, refused = stored + (refusal is None), refused + (refusal is not None)
            if refusal is not None:
                click.echo(f"{letter_id}: refused again: {refusal}", err=True)
    click.echo(f"{stored} stored, {refused} refused again")
    sys.exit(1 if refused else 0)


@dead_letters.command(name="purge")
@_LETTER_IDS
@_ALL
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
def purge_dead_letters(letter_ids: tuple[int, ...], *, everything: bool, yes: bool) -> None:
    """Delete dead letters for good, after a confirmation."""
    from .dead_letter_commands import purge

    settings = load_settings()
    with _errors_explained():
        chosen = _chosen(settings, letter_ids, everything=everything)
        if chosen and not yes:
            click.confirm(f"Delete {len(chosen)} dead letters for good?", abort=True)
        click.echo(f"{purge(settings, chosen)} deleted")


def _printable(text: bytes) -> str:
    """Return bytes as text, with control characters and invalid UTF-8 escaped."""
    decoded = text.decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in decoded)
