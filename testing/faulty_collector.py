"""``iot-collector run`` with a fault built in: python faulty_collector.py FAULT [N].

The product has no hooks for tests; this script replaces parts of it before it starts. What makes
the process kill itself does so at the N-th time that it gets there; a bug is met the first N times.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import psycopg2
import psycopg2.extensions
from iot_collector import cli, run, store
from iot_collector.buffer import Buffer, ReadBatch
from iot_collector.client import BulkClient, Messages
from iot_collector.database import WatchedCursor
from iot_collector.subscriptions import Subscriptions

FAULT = sys.argv[1]
YEAR = 366 * 86400
MOMENTS = {"copying", "before commit"}  # of COPY
_left = int(sys.argv[2]) if len(sys.argv) > 2 else 1


def die_at(fault: str) -> None:
    """Exit without any cleanup, as in a power cut, if this is the chosen moment."""
    global _left
    if fault != FAULT:
        return
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def bug_at(fault: str, error: type[Exception] = ValueError) -> None:
    """Raise an error, as a bug would, if this is the chosen moment."""
    global _left
    if fault == FAULT and _left > 0:
        _left -= 1
        raise error("a bug for the test")


class Halves:
    """A file that is read in two halves. The process can exit half-way and at the end.

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


class Cursor(WatchedCursor):
    """A cursor that can exit the process before or after a statement."""

    def execute(self, query: Any, values: Any = None) -> None:
        super().execute(query, values)
        if isinstance(query, str) and query.startswith("SAVEPOINT"):
            die_at("bisecting")

    def copy_expert(self, sql: Any, file: Any, size: int = 8192) -> None:
        bug_at("bug in the writer thread", KeyError)
        bug_at("misuse of psycopg2", psycopg2.ProgrammingError)
        bug_at("use of a closed cursor", psycopg2.InterfaceError)
        super().copy_expert(sql, Halves(file, size) if FAULT in MOMENTS else file, size)
        die_at("after commit")


_connect = psycopg2.connect
_acknowledge, _take = BulkClient.acknowledge, BulkClient.take_messages
_complete = Buffer.complete
_pieces = store._pieces


def connect(*args: Any, **options: Any) -> Any:
    return _connect(*args, cursor_factory=Cursor, **options)


def acknowledge(self: BulkClient, tags: list[int]) -> None:
    die_at("before acknowledging")
    if FAULT == "half acknowledged" and _left == 1 and len(tags) > 1:
        tags = tags[: len(tags) // 2]
    _acknowledge(self, tags)
    die_at("half acknowledged")


def pieces(batch: list[ReadBatch]) -> Iterator[bytes]:
    for piece in _pieces(batch):
        yield piece
        bug_at("bug while copying")


def take(self: BulkClient) -> Messages:
    messages = _take(self)
    if messages.rows:
        bug_at("bug in the network thread")
    return messages


def complete(self: Buffer, *arguments: Any) -> None:
    bug_at("bug after the commit")
    _complete(self, *arguments)


class Asked(list[str]):
    """Topic filters that make the SUBACK callback raise an error."""

    def __iter__(self) -> Iterator[str]:
        bug_at("bug in a callback of paho")
        return super().__iter__()


def subscribe(self: Subscriptions, filters: list[str], stale: list[str]) -> None:
    _subscribe(self, filters, stale)
    for request in self._requests.values():
        request.filters = Asked(request.filters)
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
if FAULT.endswith(", and it ends"):
    FAULT = FAULT.removesuffix(", and it ends")
    run.MAX_FAILED_CHECKS = 1
if FAULT == "clock":
    signal.signal(signal.SIGUSR1, set_clock)
    signal.signal(signal.SIGUSR2, set_clock)
psycopg2.connect = connect
BulkClient.acknowledge, BulkClient.take_messages = acknowledge, take  # type: ignore[method-assign, assignment]
store._pieces = pieces
Buffer.complete = complete  # type: ignore[method-assign, assignment]
sys.argv[1:] = ["run"]
cli.main()
