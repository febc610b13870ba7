"""The picture that `iot-collector top` draws: the state of the pipeline, and topics."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from .explorer.flat_list import MOST_ROWS
from .top_stream import Picture, Row
from .top_text import age_text, cut, cut_middle, delay_text, rate_text, visible

_OLD_SECONDS = 600.0  # after this time without a message, a topic's numbers are dim
_MOST_TOPIC, _MOST_VALUE = 1000, 100  # cells
_MOST_INDENT = 40  # of the tree; deeper levels are not indented further
_FEWEST_ROWS = 3
_MOST_FAULT = 300  # characters
_NARROW = 60  # cells; then the count of messages is left out
_CONSOLE = Console(width=80)  # needed by Text.wrap


@dataclass
class Layout:
    """What is shown, and the space for it. Without a width, lines have any length."""

    filter: str
    sort: str
    width: int | None = None
    height: int | None = None


def draw(picture: Picture, layout: Layout) -> list[Text]:
    """Return the lines of a picture; with a height, one line fewer than that."""
    lines = [*_wrapped(_header(picture), layout.width), Text(_about(picture, layout), style="bold")]
    room = MOST_ROWS
    if layout.height is not None:
        room = max(_FEWEST_ROWS, layout.height - len(lines) - 2)
    table = _table(picture, layout, room)
    if layout.height is not None:
        table += [Text()] * (room + 1 - len(table))
    lines += table
    for line in lines:
        line.no_wrap = True
        if layout.width is not None:
            line.truncate(layout.width, overflow="ellipsis")
    return lines


def _wrapped(lines: list[Text], width: int | None) -> list[Text]:
    if width is None:
        return lines
    return [part for line in lines for part in line.wrap(_CONSOLE, width)]


def _header(picture: Picture) -> list[Text]:
    """Return the state of the pipeline, in the words of the live page (pipeline.js)."""
    health = picture.health
    if health is None:
        return [Text(picture.lost or "Waiting for the collector …", style="bold")]
    broker, database, counts = health["broker"], health["database"], health["accounting"]
    faults = [*health["problems"], *health["warnings"]]
    if picture.unread is not None:
        faults.append(f"topics may be out of date, the database cannot be read: {picture.unread}")
    if picture.lost is not None:
        faults = [f"the values below are old: {picture.lost}"]
        status = Text("No connection to the collector", style="bold red")
    elif health["status"] == "ok":
        status = Text("Every message is being stored", style="bold green")
        if picture.unread is not None:
            status = Text("The database cannot be read", style="bold yellow")
    elif not database["connected"]:
        status = Text("The database cannot be reached: messages wait", style="bold red")
    elif not broker["connected"]:
        status = Text("The broker cannot be reached", style="bold red")
    else:
        status = Text("Something is wrong", style="bold red")
    totals = f"{counts['inserted']:,} stored of {counts['received']:,} received"
    for name, what in (("duplicates", "sent again"), ("dead_letters", "dead letters")):
        totals += f", {counts[name]:,} {what}" if counts[name] else ""
    waits = ""
    if counts["in_flight"]:
        waits = f", the oldest for {delay_text(health['oldest_unacked_seconds'])}"
    lines = [
        f"This collector ({broker['client_id']}, version {health['version']}): "
        f"broker {broker['address']} {_connected(broker)}, database {_connected(database)}",
        f"{_rates(picture.sample)}; {counts['in_flight']:,} in flight{waits}; {totals}",
    ]
    return [
        status,
        *(Text(visible(fault[:_MOST_FAULT]), style="red") for fault in faults),
        *(Text(visible(line)) for line in lines),
    ]


def _connected(dependency: dict[str, Any]) -> str:
    return "connected" if dependency["connected"] else "not connected"


def _rates(sample: list[Any] | None) -> str:
    if sample is None:
        return "Measuring the rates …"
    _, received, stored, _, delay = sample
    delays = "" if delay is None else f", delay {delay_text(delay)}"
    return f"Stored {rate_text(stored)}, received {rate_text(received)}{delays}"


def _about(picture: Picture, layout: Layout) -> str:
    if picture.rows is None:
        return ""
    topics = f"{picture.matching:,} topic{'' if picture.matching == 1 else 's'} of all collectors"
    matching = "" if layout.filter == "#" else f" matching {cut_middle(layout.filter, 30)}"
    return f"{topics}{matching}, by {layout.sort}"


def _table(picture: Picture, layout: Layout, room: int) -> list[Text]:
    if not picture.rows:
        return _wrapped([Text(_why_empty(picture, layout))], layout.width)
    now = time.time() + picture.offset
    entries = list(itertools.islice(_entries(picture.rows, layout.sort), room))
    narrow = layout.width is not None and layout.width < _NARROW
    head, *numbers = _numbers([row for _, row in entries], picture.window, now, narrow=narrow)

    longest = max(cell_len(visible(label[:_MOST_TOPIC])) for label, _ in entries)
    topic_width, value_width = min(max(5, longest), _MOST_TOPIC), _MOST_VALUE
    if layout.width is not None:
        room = layout.width - len(head) - 2
        values = max([10, *(len(row.value) for _, row in entries if row)])
        topic_width = min(topic_width, max(8, room * 3 // 5, room - values))
        value_width = max(1, room - topic_width)
    lines = [Text(f"{head}{'TOPIC':{topic_width}}  LAST VALUE", style="reverse")]
    for start, (label, row) in zip(numbers, entries, strict=True):
        old = row is not None and now - row.at > _OLD_SECONDS
        line = Text(start, style="dim" if old else "")
        topic = set_cell_size(cut_middle(label, topic_width), topic_width)
        line.append(topic, style="cyan" if row else "")
        line.append("  " + cut(row.value, value_width) if row else "")
        line.rstrip()
        lines.append(line)
    return lines


def _why_empty(picture: Picture, layout: Layout) -> str:
    if picture.rows is None:
        return "The topics cannot be read" if picture.unread else "Reading the topics …"
    if layout.filter != "#":
        return "No topic matches: + stands for one level, # for the rest"
    stored = ", ".join(picture.health["broker"]["topics"]) if picture.health else ""
    return (
        "No message has been stored since the start of last month; the collector subscribes to "
        f"{visible(stored[:_MOST_FAULT])}"
    )


def _numbers(rows: list[Row | None], window: int, now: float, *, narrow: bool) -> list[str]:
    """Return the headings of the columns of numbers, and a line for each row."""
    cells = [(f"LAST {window} s", "RATE", "AGE")]
    for row in rows:
        if row is None:
            cells.append(("", "", ""))
        else:
            rate = rate_text(row.messages / window)
            cells.append((f"{row.messages:,}", rate, age_text(now - row.at)))
    columns = [_right(column) for column in zip(*cells, strict=True)]
    return ["  ".join(line) + "  " for line in zip(*columns[narrow:], strict=True)]


def _right(column: tuple[str, ...]) -> list[str]:
    width = max(map(len, column))
    return [cell.rjust(width) for cell in column]


def _entries(rows: list[Row], sort: str) -> Iterator[tuple[str, Row | None]]:
    """Yield labels with their row, if they are a topic. Sorted by topic, they are a tree."""
    if sort == "topic":
        levels = sorted((row.topic.split("/"), row) for row in rows)
        yield from _tree(levels, 0)
        return
    if sort == "age":
        ordered = sorted(rows, key=lambda row: (-row.at, row.topic))
    else:
        ordered = sorted(rows, key=lambda row: (-row.messages, -row.at, row.topic))
    yield from ((row.topic, row) for row in ordered)


def _tree(
    rows: list[tuple[list[str], Row]], depth: int, indent: str = ""
) -> Iterator[tuple[str, Row | None]]:
    for _, group in itertools.groupby(rows, key=lambda row: row[0][depth]):
        found = list(group)
        if len(found) == 1 or len(indent) >= _MOST_INDENT:
            yield from ((indent + "/".join(levels[depth:]), row) for levels, row in found)
            continue
        # Levels with a single child share a line with it. Rows are sorted, so the levels that the
        # first and the last have in common are those of all.
        (first, row), (last, _) = found[0], found[-1]
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
        common = [level for level, _ in same]
        is_topic = len(first) == len(common)
        label = indent + "/".join(common[depth:])
        yield (label, row) if is_topic else (f"{label}/", None)
        yield from _tree(found[is_topic:], len(common), indent + "  ")
