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

_LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal
_SAFE = "Nothing is lost. Run `iot-collector replay` again: it goes on from here."


def _time(text: str) -> float:
    """Return the Unix time of a time of the past in ISO 8601; without an offset it is UTC."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no time such as 2026-11-25T14:00Z") from None
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
    help="Delete older copies unread, and do not compare them; some time before the outage.",
)
@click.option(
    "--until",
    type=_time,
    metavar="TIME",
    help="Decide about the copies until then. Without it: about those with an id "
    "(IOT_MESSAGE_ID_KEY), and those so old that the session has no such message any more "
    "(8 times IOT_MQTT_SESSION_EXPIRY_SECONDS).",
)
def replay(since: float | None, until: float | None) -> None:
    """Store the messages that the collector missed, from the replay queue.

    Takes all copies from the queue that IOT_REPLAY_QUEUE names, compares them with the database,
    and stores what is missing, each message once. Can be stopped and run again at any time.
    docs/replay.md says what to do after an outage.

    The exit status is 0 if all was done, 1 if something needs a look (malformed copies, another
    run in progress), 2 for settings, 4 if the queue failed, 8 if the database failed.
    """
    from .cli import load_settings

    settings = load_settings()
    if settings.replay_queue is None:
        raise SettingsError("IOT_REPLAY_QUEUE: is not set; it is the ARN of the replay queue")
    if since is not None and until is not None and since >= until:
        raise click.UsageError("--since is not before --until")
    with _progress() as progress:
        status, text = _run(settings, settings.replay_queue, since, until, progress)
    click.echo(text, err=bool(status))
    sys.exit(status)


def _run(
    settings: Settings, arn: str, since: float | None, until: float | None, progress: Progress
) -> tuple[int, str]:
    """Return the exit status, and what to say."""
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
        f"repeated        {summary.repeated}, copies of a message that was copied already",
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
    """Show progress on standard error: a bar on a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    with ExitStack() as stack:
        bars: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in bars:
                stack.close()  # the bar before it
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
