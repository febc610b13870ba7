"""The command ``iot-collector replay``."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Any

import click
import psycopg2

from .aws import AwsError
from .database import explain
from .replay import Progress, Replay, ReplayError, Summary
from .replay_queue import Queue
from .settings import Settings, SettingsError

INCOMPLETE = 1
QUEUE_FAILED = 4
DATABASE_FAILED = 8

_LINE_SECONDS = 10.0  # between two lines of progress without a terminal
_SAFE = "Nothing is lost. Run `iot-collector replay` again: it continues from here."


def _time(text: str) -> float:
    """Parse a past time in ISO 8601, in UTC if it has no offset; return its Unix time."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a time such as 2026-11-25T14:00Z") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    if moment.timestamp() > time.time():
        raise click.BadParameter(f"{text} is in the future")
    return moment.timestamp()


@click.command()
@click.option(
    "--since",
    type=_time,
    metavar="TIME",
    help="Delete older copies without comparing them. Give a time before the outage.",
)
@click.option(
    "--until",
    type=_time,
    metavar="TIME",
    help="Settle all copies until this time. Without it, only copies with an id "
    "(IOT_MESSAGE_ID_KEY) are settled, and copies so old that their message cannot be in the "
    "session any more (8 times IOT_MQTT_SESSION_EXPIRY_SECONDS).",
)
def replay(since: float | None, until: float | None) -> None:
    """Store the messages that the collector missed, from the replay queue.

    Takes all copies from the queue that IOT_REPLAY_QUEUE names, compares them with the database,
    and stores the missing messages, each once. It can be stopped and run again at any time.
    docs/replay.md says what to do after an outage.

    The exit status is 0 if everything was done, 1 if somebody has to act (malformed copies,
    another run in progress), 2 for wrong settings, 4 if the queue failed, 8 if the database failed.
    """
    from .cli import load_settings

    settings = load_settings()
    if settings.replay_queue is None:
        raise SettingsError("IOT_REPLAY_QUEUE: is not set; set it to the ARN of the replay queue")
    if since is not None and until is not None and since >= until:
        raise click.UsageError("--since is not before --until")
    with _progress() as progress:
        status, text = _run(settings, settings.replay_queue, since, until, progress)
    click.echo(text, err=bool(status))
    sys.exit(status)


def _run(
    settings: Settings, arn: str, since: float | None, until: float | None, progress: Progress
) -> tuple[int, str]:
    """Return the exit status, and the text to print."""
    run = None
    try:
        run = Replay(settings, Queue(arn), since, until, progress)
        summary = run.run()
    except AwsError as error:
        status, fault = QUEUE_FAILED, f"queue: {error}"
    except psycopg2.Error as error:
        status, fault = DATABASE_FAILED, f"database: {explain(error)}"
    except ReplayError as error:
        status, fault = INCOMPLETE, str(error)
    except KeyboardInterrupt:
        status, fault = 130, "stopped"
    else:
        return INCOMPLETE if summary.malformed else 0, _text(summary, run.decided_until)
    done = f"{_text(run.summary)}\n" if run else ""
    return status, f"{done}{fault}\n{_SAFE}"


def _text(summary: Summary, decided_until: float | None = None) -> str:
    """Return the summary, a line for each count."""
    dead = "".join(f", {reason} {n}" for reason, n in sorted(summary.dead_letters.items()))
    lines = [
        f"restored        {summary.restored}",
        f"stored already  {summary.stored_already}",
        f"dead letters    {summary.dead_letters.total()}{dead}",
        f"repeated        {summary.repeated}, second copies of a message",
        f"unread          {summary.unread}, older than --since, deleted from the queue",
    ]
    if decided_until is not None:
        until = f"{datetime.fromtimestamp(decided_until, UTC):%Y-%m-%dT%H:%M:%SZ}"
        lines.append(
            f"left            {summary.left}, kept in replay_copies for a later run"
            + (f": IoT Core received them after {until}" if summary.left else "")
        )
    lines.append(f"malformed       {len(summary.malformed)}, left in the queue")
    some = list(summary.malformed.items())[:10]
    lines += [f"  {message_id}: {why}" for message_id, why in some]
    return "\n".join(lines)


@contextmanager
def _progress() -> Iterator[Progress]:
    """Show progress on standard error: a bar on a terminal, otherwise a line every 10 s."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    with ExitStack() as stack:
        bars: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in bars:
                stack.close()  # ends the previous bar
                made = click.progressbar(length=total, label=what, show_pos=True, file=sys.stderr)
                bars[what] = stack.enter_context(made)
            bars[what].length = total
            bars[what].update(done - bars[what].pos)

        yield show


def _lines() -> Callable[[str, int, int], None]:
    last, said_at = "", 0.0

    def show(what: str, done: int, total: int) -> None:
        nonlocal last, said_at
        if what != last or time.monotonic() - said_at > _LINE_SECONDS:
            click.echo(f"{what}: {done} of about {total}", err=True)
            last, said_at = what, time.monotonic()

    return show
