"""``iot-collector top``: topics and the state of the pipeline in a terminal."""

import contextlib
import io
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from typing import Any, NoReturn
from urllib.parse import urlsplit

import click
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from .explorer.flat_list import MOST_ROWS
from .settings import Settings, valid_filter
from .top_picture import Layout, draw
from .top_stream import Feed, Picture, TopError
from .top_text import cut_start, visible

__all__ = ["TopError", "default_url", "top", "valid_url"]

_ONCE_SECONDS = 20.0  # the longest wait for a complete list
_FIRST_SECONDS = 0.1  # between two pictures until there is a list
_SORTS = {"r": "rate", "t": "topic", "a": "age"}
_ENTER, _ESCAPE, _BACKSPACE, _END = "\r\n", "\x1b", "\x7f\b", "\x04"


def default_url(settings: Settings) -> str:
    """Return where the collector of these settings serves HTTP."""
    every = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - listens on all addresses
    host = every.get(settings.http_host, settings.http_host)
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.http_port}"


def valid_url(url: str) -> str:
    """Return the URL of a live page without the slash at its end.

    :raises ValueError: it is not valid.
    """
    parts = urlsplit(url)
    _ = parts.port  # urllib checks it only on access
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable():
        raise ValueError(f"{visible(url)!r} is not a URL such as http://127.0.0.1:3000")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("the URL must not have a user name, query or fragment")
    return url.rstrip("/")


def top(url: str, topic_filter: str, sort: str, interval: float, *, once: bool) -> None:
    """Show the topics of a collector until Ctrl-C or q; only once without a terminal.

    :param interval: seconds between two pictures.
    :raises TopError: the collector does not answer at the start, or refuses the request.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # terminals whose encoding is not UTF-8
        sys.stdout.reconfigure(errors="replace")
    # Text from devices must not be read as markup, nor :smile: as an emoji.
    console = Console(markup=False, highlight=False, emoji=False)
    layout, feed = Layout(topic_filter, sort), Feed(url)
    if once or not console.is_terminal or console.is_dumb_terminal:
        _show_once(console, feed, layout)
    else:
        _show(console, feed, layout, interval)


def _view(layout: Layout) -> dict[str, Any]:
    return {"filter": layout.filter, "sort": layout.sort, "limit": MOST_ROWS}


def _show_once(console: Console, feed: Feed, layout: Layout) -> None:
    if console.is_terminal:
        layout.width, layout.height = console.size
    picture, until = Picture(), time.monotonic() + _ONCE_SECONDS
    for picture in feed.pictures(_view(layout)):
        if picture.complete or picture.unread or time.monotonic() > until:
            break
    for line in draw(picture, layout):
        click.echo(line.plain)
    if picture.rows is None:
        reason = visible(picture.unread or "the database does not answer")
        raise TopError(f"the topics cannot be read: {reason}")


def _show(console: Console, feed: Feed, layout: Layout, interval: float) -> None:
    feed.follow(_view(layout), feed.pictures(_view(layout)))
    keys = _Keys(feed, layout)
    # Shells start background programs with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    signal.signal(signal.SIGTSTP, _suspend)
    while not keys.quit:
        try:
            with (
                _keyboard() as read,
                Live(console=console, screen=True, auto_refresh=False) as live,
            ):
                while not keys.quit:
                    layout.width, layout.height = console.size
                    lines = [*draw(feed.picture, layout), keys.line(layout.width)]
                    live.update(Group(*lines), refresh=True)
                    keys.press(read(_FIRST_SECONDS if feed.picture.rows is None else interval))
        except KeyboardInterrupt:
            return
        except _SuspendedError:  # the terminal is as it was before
            os.kill(os.getpid(), signal.SIGSTOP)


class _SuspendedError(Exception):
    """Ctrl-Z was pressed."""


def _suspend(*_: object) -> NoReturn:
    raise _SuspendedError


@contextlib.contextmanager
def _keyboard() -> Iterator[Callable[[float], str]]:
    """Yield a function that waits some seconds for keys, and returns them."""
    if not sys.stdin.isatty():

        def wait(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield wait
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def read(seconds: float) -> str:
        if not select.select([terminal], [], [], seconds)[0]:
            return ""
        try:
            return os.read(terminal, 1024).decode(errors="replace") or _END
        except OSError:  # the terminal is gone
            return _END

    try:
        tty.setcbreak(terminal)
        yield read
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


class _Keys:
    """Handles the keys."""

    def __init__(self, feed: Feed, layout: Layout) -> None:
        self.quit = False
        self._feed = feed
        self._layout = layout
        self._typed: str | None = None  # a filter that is being typed
        self._fault = ""

    def line(self, width: int) -> Text:
        """Return the last line of the screen."""
        if self._typed is not None:
            prompt = "Topic filter, e.g. plant/+/temp or plant/#: " if width >= 80 else "Filter: "
            return Text(prompt + cut_start(self._typed + "▏", width - len(prompt)), style="bold")
        if self._fault:
            return Text(self._fault, style="red")
        return Text("q quit  / filter  sort by: r rate, t topic, a age", style="dim")

    def press(self, keys: str) -> None:
        """Handle one or more typed keys; an arrow key, for example, is an escape sequence."""
        if keys.startswith(_ESCAPE):
            self._typed = None
            return
        for key in keys:
            if key == _END:
                self.quit = True
            elif self._typed is not None:
                self._type(key)
            elif key == "q":
                self.quit = True
            elif key == "/":
                self._typed, self._fault = "", ""
            elif key in _SORTS and self._layout.sort != _SORTS[key]:
                self._layout.sort = _SORTS[key]
                self._feed.follow(_view(self._layout))

    def _type(self, key: str) -> None:
        typed = self._typed or ""
        if key in _ENTER:
            self._typed = None
            try:
                self._layout.filter = valid_filter(typed or "#")
            except ValueError as error:
                self._fault = visible(str(error))
                return
            self._feed.follow(_view(self._layout))
        elif key in _BACKSPACE:
            self._typed = typed[:-1]
        elif key.isprintable():
            self._typed = typed + key
