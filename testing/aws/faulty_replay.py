"""``iot-collector replay`` with a fault built in: python faulty_replay.py FAULT [options].

It kills itself at the moment that FAULT names, or not at "none". What SQS hides from a killed run
for half a minute is hidden for a second here. A run waits that long with WAIT=1 in its environment.
"""

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import psycopg2
import psycopg2.extensions
from iot_collector import cli, replay, replay_queue
from iot_collector.database import WatchedCursor
from iot_collector.replay_queue import Copy, Queue

FAULT = sys.argv.pop(1)


def die_at(moment: str) -> None:
    """Exit without any cleanup, as in a power cut, if this is the chosen moment."""
    if moment == FAULT:
        os.kill(os.getpid(), signal.SIGKILL)


class Cursor(WatchedCursor):
    """A cursor that can exit the process before or after a statement."""

    def execute(self, query: Any, values: Any = None) -> None:
        if isinstance(query, str) and query.startswith("UPDATE replay_copies"):
            die_at("settling")
        if query == "COMMIT":
            die_at("before commit")
        super().execute(query, values)
        if query == "COMMIT":
            die_at("settled")


_connect, _keep, _delete = psycopg2.connect, replay.Replay._keep, Queue.delete


def connect(*args: Any, **options: Any) -> Any:
    return _connect(*args, cursor_factory=Cursor, **options)


def keep(self: replay.Replay, cursor: psycopg2.extensions.cursor, copies: list[Copy]) -> int:
    die_at("received")
    new = _keep(self, cursor, copies)
    die_at("taken")
    return new


def delete(self: Queue, handles: Sequence[str]) -> None:
    _delete(self, handles)
    die_at("half deleted")


psycopg2.connect = connect
replay.Replay._keep = keep  # type: ignore[method-assign]
Queue.delete = delete  # type: ignore[method-assign]
replay_queue.HIDDEN_SECONDS, replay_queue._WAIT_SECONDS = 1, 0
replay._LEAST_SECONDS = 2 if os.environ.get("WAIT") else 0
replay._BATCH = 20
cli.main(["replay", *sys.argv[1:]])
