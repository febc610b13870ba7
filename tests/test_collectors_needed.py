"""How many collectors a rate of messages needs: the filter, and the table in docs/aws.md."""

from __future__ import annotations

import re

import pytest
from ansible.errors import AnsibleFilterError
from ansible_runs import ROOT
from collectors_needed import HEADROOM, MESSAGES_PER_CONNECTION, collectors_needed


def test_the_table_says_what_the_filter_computes() -> None:
    page = (ROOT / "docs/aws.md").read_text()
    _, _, table = page.partition("| messages per second | collectors |\n| ---: | ---: |\n")
    rows = re.findall(r"^\| (\d+) \| (\d+) \|$", table.partition("\n\n")[0], re.MULTILINE)
    assert len(rows) > 3
    assert [int(count) for _, count in rows] == [collectors_needed(int(rate)) for rate, _ in rows]
    planned = f"We plan with {MESSAGES_PER_CONNECTION * HEADROOM:.0f},"
    assert planned in page
    assert f"at most [{MESSAGES_PER_CONNECTION} messages a second]" in page


@pytest.mark.parametrize("rate", [0.5, 19, 69.9, 70, 70.1, 140, 210, 2100, 2101, 10_000])
def test_as_few_as_take_the_rate(rate: float) -> None:
    count = collectors_needed(rate)
    planned = MESSAGES_PER_CONNECTION * HEADROOM
    assert (count - 1) * planned < rate <= count * planned + 1e-6


def test_text_is_a_number() -> None:
    assert collectors_needed("100") == 2  # type: ignore[arg-type]  # as -e gives it


@pytest.mark.parametrize("rate", [0, -1, "many", None, float("inf"), float("nan")])
def test_what_is_no_rate(rate: float) -> None:
    with pytest.raises(AnsibleFilterError, match="iot_core_messages_per_second is"):
        collectors_needed(rate)
