"""The stream of server-sent events for one viewer."""

import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import orjson
import pydantic

from . import queries
from .flat_list import FlatList
from .rates import EVERY, Rates
from .reader import Reader, UnavailableError
from .topics import Topics, oldest

_TICK = 0.5  # seconds between two rounds of queries
_LIFE = 600.0  # seconds that a stream lasts; then the page opens another
_MOST_NODES = 200  # below one node
_MOST_LATEST = 200
_MOST_MESSAGES = 50  # of the chosen topic at once
_OVERLAP = timedelta(seconds=15)  # for messages that are stored late, and clocks that differ
_DEAD_LETTERS = 20
_DEAD_LETTERS_EVERY = 3.0
# Messages are counted in the longest of these windows with at most _MOST_COUNTED messages, because
# the query reads all of them.
_WINDOWS = (60, 30, 10, 5)  # seconds
_MOST_COUNTED = 20_000
_SHARE = 0.03  # largest share of the time that counting may keep the database busy
_EVER = datetime(1970, 1, 1, tzinfo=UTC)


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("a topic must not contain U+0000")
    return text


Topic = Annotated[str, pydantic.Field(max_length=65_535), pydantic.AfterValidator(_no_nul)]


class View(pydantic.BaseModel):
    """What a viewer has on the screen."""

    viewer: str = pydantic.Field(min_length=1, max_length=64)
    open: list[Topic] = pydantic.Field(max_length=40)  # prefixes: empty, or ending in a slash
    watch: list[Topic] = pydantic.Field(default=[], max_length=50)  # topics outside of the tree
    topic: Topic | None = None
    flat: FlatList | None = None  # instead of the tree


class Stream:
    """The events for a view. Used by one thread."""

    def __init__(
        self,
        view: View,
        reader: Reader,
        topics: Topics,
        rates: Rates,
        report: Callable[[], dict[str, Any]],
    ) -> None:
        self._view = view
        self._reader = reader
        self._topics = topics
        self._rates = rates
        self._report = report
        self._sent_ids: dict[int, None] = {}
        self._shown: list[str] = []
        self._leaves: list[str] = []
        self._version = -1
        self._window = 10
        self._due: dict[str, float] = {}
        self._since = _EVER
        self._letters = ""
        self._newest_sample: object = None
        self._failure: str | None = None

    def events(self, stopped: threading.Event) -> Iterator[bytes]:
        """Yield events until ``stopped``, or for `_LIFE` seconds."""
        end = time.monotonic() + _LIFE
        while not stopped.is_set() and time.monotonic() < end:
            began = time.monotonic()
            if self._is_due("pipeline", 1.0):
                # First and without the database, so that an outage shows at once.
                yield self._pipeline()
            try:
                yield from self._from_database()
                if self._failure is not None:
                    self._failure = None
                    yield _event("database", b'{"error":null}')
            except UnavailableError as error:
                # Messages that are stored after an outage may have been received before it.
                self._since = _EVER
                if self._version != self._topics.version:
                    yield self._tree()
                if str(error) != self._failure:
                    self._failure = str(error)
                    yield _event("database", orjson.dumps({"error": self._failure}))
            stopped.wait(max(0.05, _TICK - (time.monotonic() - began)))

    def _is_due(self, what: str, every: float) -> bool:
        now = time.monotonic()
        if now < self._due.get(what, 0.0):
            return False
        self._due[what] = now + every
        return True

    def _pipeline(self) -> bytes:
        content: dict[str, Any] = {"now": time.time(), "health": self._report()}
        samples = self._rates.samples
        newest = samples[-1] if samples else None
        if newest is not self._newest_sample:
            self._newest_sample = newest
            content |= {"rates": list(samples), "every": EVERY}
        return _event("pipeline", orjson.dumps(content))

    def _from_database(self) -> Iterator[bytes]:
        """Yield events for new data in the database.

        :raises UnavailableError: it does not answer.
        """
        asked = datetime.now(UTC)
        if self._view.topic is not None:
            yield from self._messages(self._view.topic)
        self._topics.refresh()
        if self._version != self._topics.version:
            yield self._tree()
        if self._leaves:
            values = {"topics": self._leaves, "since": self._since}
            [[latest]] = self._reader.ask(queries.LATEST, values)
            if latest != "[]":
                yield _event("latest", latest.encode())
        # The next round overlaps with this one, for messages that are stored late.
        self._since = asked - _OVERLAP / 5
        if self._is_due("activity", 1.0):
            yield self._activity() if self._view.flat is None else self._flat(self._view.flat)
        if self._is_due("dead letters", _DEAD_LETTERS_EVERY):
            [[letters]] = self._reader.ask(queries.DEAD_LETTERS, {"limit": _DEAD_LETTERS})
            if letters != self._letters:
                self._letters = letters
                yield _event("dead_letters", letters.encode())

    def _messages(self, topic: str) -> Iterator[bytes]:
        since = _EVER if self._since == _EVER else self._since - _OVERLAP
        values = {"topic": topic, "since": since, "before": "infinity", "limit": _MOST_MESSAGES}
        rows = self._reader.ask(queries.MESSAGES, values)
        new = [message for number, message in rows if number not in self._sent_ids]
        self._sent_ids = dict.fromkeys(number for number, _ in rows)
        if new or self._since == _EVER:
            yield _event("messages", f"[{','.join(new)}]".encode())

    def _tree(self) -> bytes:
        """Return the children of the open nodes; remember which nodes are shown."""
        self._version = self._topics.version
        branches: dict[str, Any] = {}
        self._shown, self._leaves = [], list(self._view.watch)
        for prefix in self._view.open:
            nodes, left_out = self._topics.children(prefix, _MOST_NODES)
            branches[prefix] = {"nodes": nodes, "left_out": left_out}
            self._shown += [node["path"] for node in nodes]
            self._leaves += [node["topic"] for node in nodes if node["topic"]]
        self._leaves = self._leaves[:_MOST_LATEST]
        content = {
            "branches": branches,
            "topics": len(self._topics.names),
            "complete": self._topics.complete,
            "cut": self._topics.cut,
            "since": oldest().timestamp(),
            "silent": self._topics.silent(10),
        }
        return _event("tree", orjson.dumps(content))

    def _activity(self) -> bytes:
        # A topic that was found by search is counted as a child of its parent node.
        prefixes = {*self._view.open, *(t[: t.rfind("/") + 1] for t in self._view.watch)}
        values = {"open": list(prefixes), "shown": [*self._shown, *self._view.watch]}
        return _event("activity", self._count(queries.ACTIVITY, values))

    def _flat(self, flat: FlatList) -> bytes:
        window = self._window
        content = self._count(queries.FLAT_LIST, flat.values(self._topics))
        complete = b"true" if self._topics.complete and window == self._window else b"false"
        return _event("flat", b'{"complete":%b,"list":%b}' % (complete, content))

    def _count(self, query: str, values: dict[str, Any]) -> bytes:
        """Return the result of a query that counts in the window; choose the next window."""
        began, window = time.monotonic(), self._window
        [[count, content]] = self._reader.ask(query, {"window": window, **values})
        rate = count / window
        fitting = (window for window in _WINDOWS if rate * window <= _MOST_COUNTED)
        self._window = next(fitting, _WINDOWS[-1])
        self._due["activity"] = began + max(1.0, (time.monotonic() - began) / _SHARE)
        return bytes(content.encode())


def _event(name: str, content: bytes) -> bytes:
    """Return a server-sent event. Line breaks in JSON are escaped, so the content is one line."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), content)
