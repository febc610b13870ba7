"""Generates the examples in docs/payloads.md from collector/tests/payloads.yml.

Run this file to write them: python tests/payloads_page.py

A system test publishes these payloads, and compares the rows of `readings`.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/payloads.md"
CORPUS = ROOT / "collector/tests/payloads.yml"
MARK = "<!-- From here on written by tests/payloads_page.py. -->\n"
_WIDTH = 110


def _payload(shape: dict[str, Any]) -> str:
    if "hex" in shape:
        return f"{shape['hex']}   (hexadecimal)"
    text: str = shape["payload"]
    try:
        document = json.loads(text)
    except json.JSONDecodeError:
        return text
    if not isinstance(document, dict | list):
        return text
    # One space after each comma, so that it can be wrapped there.
    return json.dumps(document, ensure_ascii=False, separators=(", ", ":"))


def _example(shape: dict[str, Any]) -> str:
    lines = [f"### {shape['what']}", "", "```text", shape["topic"]]
    if "content_type" in shape:
        lines.append(f"content type {shape['content_type']}")
    lines += textwrap.wrap(_payload(shape), _WIDTH, break_on_hyphens=False)
    lines += ["```", ""]
    if not shape["readings"]:
        return "\n".join([*lines, "No readings.", ""])
    lines += ["| name | value | text |", "| --- | ---: | --- |"]
    for name, value in shape["readings"].items():
        if isinstance(value, bool):
            columns = f"{value:d} | `{str(value).lower()}`"
        else:
            columns = f" | `{value}`" if isinstance(value, str) else f"{value} | "
        lines.append(f"| `{name}` | {columns} |")
    return "\n".join([*lines, ""])


def page() -> str:
    """The content of docs/payloads.md."""
    written, mark, _ = PAGE.read_text().partition(MARK)
    shapes = yaml.safe_load(CORPUS.read_text())
    return written + mark + "\n" + "\n".join(map(_example, shapes))


if __name__ == "__main__":
    PAGE.write_text(page())
