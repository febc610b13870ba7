"""A flat list of the topics that match a filter: what `iot-collector top` shows."""

import heapq
import re
from typing import Annotated, Any, Literal

import pydantic

from ..sessions import without_share
from ..settings import valid_filter
from .topics import Topics

_MOST_FILTER = 1_000  # characters: it becomes a regular expression
MOST_ROWS = 200

Filter = Annotated[
    str, pydantic.Field(max_length=_MOST_FILTER), pydantic.AfterValidator(valid_filter)
]


class FlatList(pydantic.BaseModel):
    """Which topics a viewer wants: the first ``limit`` of those that match ``filter``."""

    filter: Filter
    sort: Literal["rate", "topic", "age"]
    limit: int = pydantic.Field(ge=1, le=MOST_ROWS)

    _version: int = -1
    _matching: int = 0
    _first: list[str] = []

    def values(self, topics: Topics) -> dict[str, Any]:
        """Return the values of the query FLAT_LIST."""
        expression = pattern(self.filter)
        if self._version != topics.version:
            self._version = topics.version
            matches, last = re.compile(expression, re.DOTALL).fullmatch, topics.last
            names = [name for name in topics.names if matches(name)]
            self._matching = len(names)
            if self.sort == "topic":
                self._first = names[: self.limit]
            else:  # by rate, topics without a message in the window follow the others
                self._first = heapq.nlargest(self.limit, names, key=lambda n: last.get(n, 0.0))
        return {
            "pattern": expression,
            "busiest": self.limit if self.sort == "rate" else 0,
            "others": self._first,
            "matching": self._matching,
        }


def pattern(topic_filter: str) -> str:
    """Return a topic filter as a regular expression, for PostgreSQL and for Python with DOTALL.

    A wildcard in the first level matches no topic that begins with $ (MQTT 5 §4.7.2).
    """
    levels = without_share(topic_filter).split("/")
    hidden = r"(?!\$)" if levels[0] in ("+", "#") else ""
    if levels[-1] != "#":
        return f"^{hidden}{_exactly(levels)}$"
    # "a/#" matches "a" as well.
    return f"^{hidden}{_exactly(levels[:-1])}(/.*)?$" if levels[1:] else f"^{hidden}.*$"


def _exactly(levels: list[str]) -> str:
    return "/".join("[^/]*" if level == "+" else re.escape(level) for level in levels)
