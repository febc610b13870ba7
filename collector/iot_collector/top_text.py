"""Makes text from devices safe and short for a terminal, as text.js does for the live page."""

import base64
import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

from rich.cells import cell_len, set_cell_size

_MOST_LEAVES = 50
_DEEPEST = 50


def visible(text: str) -> str:
    """Return a text in which all characters are visible.

    Control characters, and those that change the direction of text, are replaced by their code
    point: ⟨202E⟩.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else f"⟨{ord(c):04X}⟩" for c in text)


def value_text(fields: Any, payload: str, size: int) -> str:
    """Return the content of a message: its fields, else its payload as text or in hexadecimal.

    :param fields: of a small message, else None.
    :param payload: its first bytes, in base64.
    :param size: bytes of the whole payload.
    """
    if fields is not None:
        found = list(itertools.islice(_leaves("", fields, 0), _MOST_LEAVES))
        if len(found) == 1:
            return found[0][1]
        return "  ".join(f"{name} {value}" for name, value in found)
    data = base64.b64decode(payload)
    if not data:
        return "(empty)"
    more = "…" if size > len(data) else ""
    for spare in range(4 if more else 1):  # the last character may be cut
        with contextlib.suppress(UnicodeDecodeError):
            text = data[: len(data) - spare].decode()
            if not re.search(r"[\x00-\x08\x0e-\x1f]", text):
                return re.sub(r"\s+", " ", text) + more
            break
    return data.hex(" ") + more


def _leaves(name: str, value: Any, depth: int) -> Iterator[tuple[str, str]]:
    """Yield the values of a document with their paths, as in the view readings."""
    if depth > _DEEPEST:
        yield name, "…"
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(f"{name}.{key}" if name else key, each, depth + 1)
    elif isinstance(value, list):
        for i, each in enumerate(value):
            yield from _leaves(f"{name}[{i}]", each, depth + 1)
    elif isinstance(value, float):
        yield name, f"{value:.6g}"
    else:
        yield name, value if isinstance(value, str) else json.dumps(value)


def rate_text(per_second: float) -> str:
    """Return a rate per second, or per minute below 0.1/s."""
    if not per_second:
        return "0/s"
    if per_second < 0.1:
        return f"{per_second * 60:.2g}/min"
    return f"{per_second:.2g}/s" if per_second < 99.5 else f"{per_second:,.0f}/s"


def age_text(seconds: float) -> str:
    """Return an age in its largest unit."""
    if seconds < 1:
        return "now"
    for most, length, unit in ((60, 1, "s"), (3600, 60, "min"), (2 * 86400, 3600, "h")):
        if seconds < most:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds // 86400)} d"


def delay_text(seconds: float) -> str:
    """Return a duration."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def cut(text: str, width: int) -> str:
    """Return a visible text of at most ``width`` terminal cells, without its end if too long."""
    text = visible(text[: width + 1])
    return text if cell_len(text) <= width else set_cell_size(text, width - 1) + "…"


def cut_start(text: str, width: int) -> str:
    """Like `cut`, but without the start of the text if too long."""
    return _end(visible(text[-width - 1 :]), width, "…")


def cut_middle(text: str, width: int) -> str:
    """Like `cut`, but without the middle of the text, because topics differ at their end."""
    if len(text) <= width and cell_len(whole := visible(text)) <= width:
        return whole
    start = cut(text, max(1, width // 3))  # ends in the dots
    return start + _end(visible(text[-width:]), width - cell_len(start), "")


def _end(text: str, width: int, dots: str) -> str:
    """Return as much of the end of a text as fits, with dots before it if it was cut."""
    if cell_len(text) <= width:
        return text
    width -= len(dots)
    text = text[-width:] if width > 0 else ""
    while cell_len(text) > width:
        text = text[1:]
    return dots + text
