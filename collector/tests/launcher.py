"""``iot-collector run`` with a fault built in: python launcher.py FAULT [N].

The product has no hooks for tests; this script replaces parts of it before it starts. What makes
the process kill itself does so at the N-th time that it gets there.
"""

import os
import signal
import sys
import time
from typing import Any

import psycopg2
import psycopg2.extensions
from iot_collector import cli
from iot_collector.reader import BulkClient
from iot_collector.subscriptions import Subscriptions

FAULT = sys.argv[1]
YEAR = 366 * 86400
_left = int(sys.argv[2]) if len(sys.argv) > 2 else 1


def die_at(fault: str) -> None:
    """End like in a power cut, if it is the time for it."""
    global _left
    if fault != FAULT:
        return
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


class Halves:
    """A file that is read in two halves, with places to die at: half-way, and at its end.

    The end of the file is what ends COPY, and with it lets the COMMIT take place.
    """

    def __init__(self, file: Any, size: int) -> None:
        data = b"".join(iter(lambda: file.read(size), b""))
        middle = len(data) // 2
        self._parts = [(b"", "before commit"), (data[middle:], "copying"), (data[:middle], "")]

    def read(self, size: int = -1) -> bytes:
        part, moment = self._parts.pop()
        die_at(moment)
        return part


class Cursor(psycopg2.extensions.cursor):
    """A cursor with places to die at."""

    def execute(self, query: Any, values: Any = None) -> None:
        super().execute(query, values)
        if isinstance(query, str) and query.startswith("SAVEPOINT"):
            die_at("bisecting")

    def copy_expert(self, sql: Any, file: Any, size: int = 8192) -> None:
        super().copy_expert(sql, Halves(file, size), size)
        die_at("after commit")


_connect = psycopg2.connect
_acknowledge = BulkClient.acknowledge


def connect(*args: Any, **options: Any) -> Any:
    return _connect(*args, cursor_factory=Cursor, **options)


def acknowledge(self: BulkClient, tags: list[int]) -> None:
    die_at("before acknowledging")
    if FAULT == "half acknowledged" and _left == 1 and len(tags) > 1:
        tags = tags[: len(tags) // 2]
    _acknowledge(self, tags)
    die_at("half acknowledged")


def subscribe(self: Subscriptions, filters: list[str], stale: list[str]) -> None:
    _subscribe(self, filters, stale)
    if stale:
        die_at("replacement asked for")


def remove(self: Subscriptions, stale: list[str]) -> None:
    die_at("replacement granted")
    _remove(self, stale)
    die_at("old filter given up")


_subscribe = Subscriptions._subscribe
_remove = Subscriptions._remove
Subscriptions._subscribe = subscribe  # type: ignore[method-assign]
Subscriptions._remove = remove  # type: ignore[method-assign]


def set_clock(number: int, _frame: object) -> None:
    """SIGUSR1 sets the clock a year ahead, SIGUSR2 back again."""
    time.time = lambda: _time() + (YEAR if number == signal.SIGUSR1 else 0)


_time = time.time
if FAULT == "clock":
    signal.signal(signal.SIGUSR1, set_clock)
    signal.signal(signal.SIGUSR2, set_clock)
psycopg2.connect = connect
BulkClient.acknowledge = acknowledge  # type: ignore[method-assign]
sys.argv[1:] = ["run"]
cli.main()
