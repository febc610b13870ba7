"""The number of collectors for a message rate: the filter, and the table in docs/aws.md."""

from __future__ import annotations

import re

import pytest
from ansible.errors import AnsibleFilterError
from ansible_runs import ROOT
from collectors_needed import HEADROOM, MESSAGES_PER_CONNECTION, collectors_needed


def test_table_agrees_with_the_filter() -> None:
    page = (ROOT / "docs/aws.md").read_text()
    _, _, table = page.partition("| messages per second | collectors |\n| ---: | ---: |\n")
    rows = re.findall(r"^\| (\d+) \| (\d+) \|$", table.partition("\n\n")[0], re.MULTILINE)
    assert len(rows) > 3
    assert [int(count) for _, count in rows] == [collectors_needed(int(rate)) for rate, _ in rows]
    planned = f"We plan with {MESSAGES_PER_CONNECTION * HEADROOM:.0f},"
    assert planned in page
    assert f"at most [{MESSAGES_PER_CONNECTION} messages a second]" in page


@pytest.mark.parametrize("rate", [0.5, 19, 69.9, 70, 70.1, 140, 210, 2100, 2101, 10_000])
def test_number_of_collectors_is_the_smallest_sufficient_one(rate: float) -> None:
    count = collectors_needed(rate)
    planned = MESSAGES_PER_CONNECTION * HEADROOM
    assert (count - 1) * planned < rate <= count * planned + 1e-6


def test_rate_may_be_a_string() -> None:
    assert collectors_needed("100") == 2  # type: ignore[arg-type]  # as from -e


@pytest.mark.parametrize("rate", [0, -1, "many", None, float("inf"), float("nan")])
def test_invalid_rate_is_refused(rate: float) -> None:
    with pytest.raises(AnsibleFilterError, match="iot_core_messages_per_second is"):
        collectors_needed(rate)
