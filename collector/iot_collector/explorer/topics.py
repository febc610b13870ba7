"""The topics in the database, as a tree. They are kept in memory, up to a limit."""

import heapq
import threading
import time
from bisect import bisect_left
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson

from .queries import TOPICS
from .reader import Reader

MOST = 50_000  # topics, some 10 MB
SILENT_SECONDS = 600.0  # after this time without a message, a topic is listed as silent
_AT_ONCE = 5_000
_SHARE = 0.03  # largest share of the time that this list may keep the database busy
_SHORTEST, _LONGEST = 1.0, 60.0  # seconds between two reads of the list


class Topics:
    """All topics of this and the last month, with the time of their last message."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._busy = threading.Lock()
        self._due = 0.0
        self._found: dict[str, float] = {}
        self._after = ""
        self._cost = 0.0
        # What viewers read; replaced as a whole.
        self.names: list[str] = []
        self.last: dict[str, float] = {}
        self.version = 0
        self.complete = False  # whether the list has been read to its end, or to its limit
        self.cut = False

    def refresh(self) -> None:
        """Read the list, or its next part, if it is due; one viewer does it for all.

        :raises UnavailableError: the database does not answer.
        """
        if time.monotonic() < self._due or not self._busy.acquire(blocking=False):
            return
        try:
            began = time.monotonic()
            values = {"after": self._after, "oldest": oldest(), "limit": _AT_ONCE}
            [[after, found]] = self._reader.ask(TOPICS, values)
            self._cost += time.monotonic() - began
            part: dict[str, float] = orjson.loads(found) if found else {}
            self._found |= part
            self.cut = len(self._found) >= MOST
            end = len(part) < _AT_ONCE or self.cut
            if end or not self.complete:
                self.names, self.last = sorted(self._found), dict(self._found)
                self.version += 1
            self._after = after
            if end:
                self.complete = True
                self._due = time.monotonic() + min(_LONGEST, max(_SHORTEST, self._cost / _SHARE))
                self._found, self._after, self._cost = {}, "", 0.0
        finally:
            self._busy.release()

    def children(self, prefix: str, limit: int) -> tuple[list[dict[str, Any]], int]:
        """Return the nodes below a prefix (empty, or ending in a slash), and how many are left out.

        A node is its ``path`` to the end of the level, ``topic``, ``below`` (how many topics are
        under it) and ``last``, the time of its last message. ``topic`` is the path if that is a
        topic, else the only topic below it, or None if there are several.
        """
        names, last = self.names, self.last
        at, end = bisect_left(names, prefix), _end(names, prefix)
        nodes: dict[str, dict[str, Any]] = {}
        left_out = 0
        while at < end:
            name = names[at]
            slash = name.find("/", len(prefix))
            if slash < 0:
                found, after, below = [name], at + 1, 0
            else:
                after = _end(names, name[: slash + 1])
                found, below = names[at:after], after - at
            path = name if slash < 0 else name[:slash]
            at = after
            # A topic may be apart from the topics below it in the list: "a", "a b", "a/b".
            if path not in nodes and len(nodes) >= limit:
                left_out += 1
                continue
            node = nodes.setdefault(path, {"path": path, "topic": None, "below": 0, "last": 0})
            if slash < 0 or (below == 1 and node["topic"] is None):
                node["topic"] = found[0]
            node["below"] += below
            node["last"] = max(node["last"], max(last[topic] for topic in found))
        for node in nodes.values():
            if node["topic"] not in (None, node["path"]):
                node["below"] = 0
        return list(nodes.values()), left_out

    def search(self, text: str, limit: int) -> tuple[list[dict[str, Any]], int]:
        """Return the topics that contain a text, ignoring case, and how many are left out."""
        text = text.casefold()
        found = [name for name in self.names if text in name.casefold()]
        last = self.last
        nodes = [
            {"path": name, "topic": name, "below": 0, "last": last.get(name, 0)}
            for name in found[:limit]
        ]
        return nodes, len(found) - len(nodes)

    def silent(self, limit: int) -> dict[str, Any]:
        """Return how many topics are silent, and those that became silent last."""
        before = time.time() - SILENT_SECONDS
        silent = [(at, name) for name, at in self.last.items() if at < before]
        latest = [[name, at] for at, name in heapq.nlargest(limit, silent)]
        return {"count": len(silent), "after": SILENT_SECONDS, "latest": latest}


def oldest() -> datetime:
    """Return the time from which topics are listed: the start of last month's partition."""
    this_month = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return (this_month - timedelta(days=1)).replace(day=1)


def _end(names: list[str], prefix: str) -> int:
    """Return the index after the last name with a prefix."""
    if not prefix:
        return len(names)
    # Prefixes end in a slash, and the next character in the order is the digit zero.
    return bisect_left(names, prefix[:-1] + "0")
