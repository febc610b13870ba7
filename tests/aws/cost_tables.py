"""The cost tables in docs/aws.md. ``python tests/aws/cost_tables.py`` updates them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "plugins/filter"))

from aws_cost import aws_cost  # noqa: E402

PAGE = ROOT / "docs/aws.md"
ROLES = ("network", "ecr", "eks", "rds", "iot_core", "cloudwatch_exporter")
BEGIN, END = "<!-- costs: begin, written by tests/aws/cost_tables.py -->", "<!-- costs: end -->"


def settings() -> dict[str, Any]:
    """The defaults of the roles, with what the inventory sets."""
    files = [f"roles/{role}/defaults/main.yml" for role in ("aws_base", "aws_cost", *ROLES)]
    found: dict[str, Any] = {}
    for file in [*files, "inventories/aws/group_vars/aws/main.yml"]:
        found |= yaml.safe_load((ROOT / file).read_text())
    return found


def table() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "roles/aws_cost/files/prices.yml").read_text())
    return loaded


def estimate() -> dict[str, Any]:
    values = settings()
    usage = {
        "devices": values["aws_cost_devices"],
        "messages": values["aws_cost_messages"],
        "months": 12,
    }
    return aws_cost(values, table(), usage)


def tables() -> str:
    """Both tables and the list of prices without a source, in Markdown."""
    costs, prices = estimate(), table()
    lines = [
        f"List prices of {prices['region']}, {prices['date']}, in USD a month; mean of the first "
        "twelve months.",
        "",
        "| what | how much | USD |",
        "| --- | --- | ---: |",
        *(f"| {one['what']} | {one['quantity']} | {one['usd']:.0f} |" for one in costs["lines"]),
        f"| **together** | {costs['first_month']:.0f} in the first month, "
        f"{costs['last_month']:.0f} in the twelfth | **{costs['total']:.0f}** |",
        "",
        "| what else one could choose | how | USD |",
        "| --- | --- | ---: |",
    ]
    for option in costs["options"]:
        how = ", ".join(f"`{name}: {value}`" for name, value in written(option["how"]).items())
        lines.append(
            f"| {option['what']} | {how or 'nothing to set here'} | {option['change']:+.0f} |"
        )
    remembered = [
        name.replace("_", " ")
        for group in ("prices", "instances", "databases", "discounts")
        for name, price in prices[group].items()
        if price["known"] == "remembered"
    ]
    lines += ["", f"Not looked up, only remembered: {', '.join(remembered)}."]
    return "\n".join(lines)


def written(how: dict[str, Any]) -> dict[str, str]:
    """Values as YAML writes them."""
    return {
        name: yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
        for name, value in how.items()
    }


def with_tables(page: str) -> str:
    """The page with current tables between the two markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
