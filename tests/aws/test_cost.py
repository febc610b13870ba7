"""The cost estimate: its arithmetic, its price table, and where it is shown."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleFilterError
from aws_cost import Estimate, aws_cost
from cost_tables import PAGE, ROOT, estimate, settings, table, with_tables
from rendering import ROLES, render

USAGE = {"devices": 10_000, "messages": 50_000_000, "months": 12}
GROUPS = ("prices", "instances", "databases", "discounts")


class Recorder(dict[str, Any]):
    """A mapping that remembers which of its keys were read."""

    def __init__(self, content: dict[str, Any], read: set[str]) -> None:
        super().__init__(content)
        self.read = read

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def __or__(self, other: Any) -> Recorder:  # type: ignore[override]
        return Recorder(dict(self) | other, self.read)


def lines(changed: dict[str, Any] | None = None, **usage: Any) -> dict[str, float]:
    """The first month's bill in USD, by line, with the defaults and ``changed``."""
    bill = Estimate(settings() | (changed or {}), table(), USAGE | usage).month(1)
    return {line.what: line.usd for line in bill}


def difference(settings_changed: dict[str, Any] | None = None, **usage: Any) -> float:
    """The difference in USD that changed settings and usage make to the total."""
    before = aws_cost(settings(), table(), USAGE)["total"]
    after = aws_cost(settings() | (settings_changed or {}), table(), USAGE | usage)["total"]
    return float(after - before)


def test_tables_of_the_page_are_current() -> None:
    assert PAGE.read_text() == with_tables(PAGE.read_text()), "python tests/aws/cost_tables.py"


def test_defaults_cost_at_most_1000_usd_a_month() -> None:
    assert estimate()["last_month"] <= 1000
    assert estimate()["notes"] == []


def test_bill_equals_a_manual_calculation() -> None:
    """Calculated from prices.yml by hand, to find wrong units."""
    bill = lines()
    expected = {
        "EKS control plane": 0.10 * 730,
        "Nodes": 2 * 0.107 * 730,
        "RDS for PostgreSQL": 2 * 0.07 * 730,
        "RDS storage gp3": 2 * 50 * 0.127,
        # 10 000 devices, 43 800 minutes
        "IoT Core connections": 438 * 0.08,
        # from device to IoT Core, from IoT Core to collector, and PUBACK of the collector
        "IoT Core messages": 150 * 1.00,
        "IoT Core rule": 50 * 0.30,
        "SQS": 50 * 0.40,
        "KMS": 2.00,
    }
    assert {name: bill[name] for name in expected} == pytest.approx(expected)
    # 45 GB: 50 million times 500 bytes, and 20 GB of images and calls
    assert bill["NAT gateway with address"] == pytest.approx(0.053 * 730 + 45 * 0.048)


def test_storage_growth_equals_the_benchmark() -> None:
    growth = (ROOT / "benchmarks/GROWTH.md").read_text()
    (rows,) = re.findall(r"^\| rows \|.* (\d+) M \|$", growth, re.MULTILINE)
    (size,) = re.findall(r"^\| GB with indexes \|.* ([\d.]+) \|$", growth, re.MULTILINE)
    measured = float(size) * 1e9 / (float(rows) * 1e6)
    assert table()["assumptions"]["stored_bytes"] == pytest.approx(measured, rel=0.01)
    one = Estimate(settings(), table(), USAGE)
    assert one.stored_gib(12) == pytest.approx(12 * 50e6 * 372 / 2**30)
    assert one.allocated_gib(1) == 50  # rds_storage_gib
    assert one.allocated_gib(12) == pytest.approx(one.stored_gib(12) / 0.9, abs=1)


def test_full_storage_is_noted() -> None:
    costs = aws_cost(settings() | {"rds_max_storage_gib": 100}, table(), USAGE)
    assert costs["notes"] == ["rds_max_storage_gib: 100 GiB are full in month 6"]


def test_instance_class_without_a_price_is_noted() -> None:
    costs = aws_cost(settings() | {"rds_instance_class": "db.x9g.large"}, table(), USAGE)
    (note,) = costs["notes"]
    assert "rds_instance_class: db.x9g.large" in note
    assert "missing in the total" in note


@pytest.mark.parametrize(
    ("changed", "usage", "usd"),
    [
        ({"network_nat_gateways": "per-zone"}, {}, 0.053 * 730),
        ({"network_nat_gateways": "per-zone", "network_zone_count": 3}, {}, 2 * 0.053 * 730),
        ({"rds_instance_class": "db.t4g.small"}, {}, -2 * 0.035 * 730),
        ({"eks_capacity_type": "SPOT"}, {}, -0.6 * 2 * 0.107 * 730),
        ({"eks_capacity_type": "SPOT"}, {"reserved": True}, -0.6 * 156.22 - 0.28 * 102.2),
        ({}, {"reserved": True}, -0.3 * 156.22 - 0.28 * 102.2),
        ({"iot_core_replay": False}, {}, -50 * 0.70),
        ({"network_interface_endpoints": True}, {}, 12 * 730 * 0.011 + 20 * (0.01 - 0.048)),
        ({"rds_insights_mode": "advanced"}, {}, 4 * 730 * 0.0125),
        ({"eks_support_type": "EXTENDED"}, {}, 0.50 * 730),
        ({"cloudwatch_exporter_enabled": True}, {}, 26 * 12 * 730 / 1000 * 0.01),
    ],
)
def test_each_choice_changes_the_total(
    changed: dict[str, Any], usage: dict[str, Any], usd: float
) -> None:
    assert difference(changed, **usage) == pytest.approx(usd)


def test_exporter_makes_the_estimated_number_of_requests() -> None:
    config = render(
        "cloudwatch_exporter/cloudwatch-exporter.yml.j2",
        aws_base_name="iot-system",
        aws_base_region="eu-west-1",
        cloudwatch_exporter_replay_rules=1,
    )
    metrics = [metric for job in yaml.safe_load(config)["static"] for metric in job["metrics"]]
    assert table()["assumptions"]["cloudwatch_metrics"] == len(metrics)
    manifest = ROLES / "cloudwatch_exporter/templates/kubernetes-cloudwatch-exporter.yml.j2"
    (seconds,) = re.findall(r"--scraping-interval=(\d+)", manifest.read_text())
    assert table()["assumptions"]["cloudwatch_rounds_hour"] == 3600 / int(seconds)


def test_single_az_halves_instance_and_storage() -> None:
    one, two = lines({"rds_multi_az": False}), lines()
    for line in ("RDS for PostgreSQL", "RDS storage gp3"):
        assert 2 * one[line] == pytest.approx(two[line])


def test_archive_stops_storage_growth() -> None:
    one = Estimate(settings(), table(), {**USAGE, "keep_months": 3})
    assert one.allocated_gib(12) == one.allocated_gib(3)
    assert -20 < difference(keep_months=3) < -10


def test_options_change_the_total() -> None:
    """The options that should save money do."""
    for option in estimate()["options"]:
        assert abs(option["change"]) > 1, option
    saving = [option["what"] for option in estimate()["options"] if option["change"] < 0]
    for word in ("one zone", "Spot", "reserved", "S3", "Smaller nodes", "Smaller database"):
        assert any(word in what for what in saving), word


@pytest.mark.parametrize("name", ["devices", "messages", "months"])
@pytest.mark.parametrize("value", [0, -1, "many", None])
def test_wrong_usage_is_named(name: str, value: Any) -> None:
    with pytest.raises(AnsibleFilterError, match=f"{name} is {value!r}"):
        aws_cost(settings(), table(), USAGE | {name: value})


def test_wrong_setting_is_named() -> None:
    with pytest.raises(AnsibleFilterError, match="SOME"):
        aws_cost(settings() | {"network_flow_log_traffic": "SOME"}, table(), USAGE)


# --- the table of prices ------------------------------------------------------------------------


def prices() -> Iterator[tuple[str, dict[str, Any]]]:
    for group in GROUPS:
        yield from table()[group].items()


def test_each_price_has_its_source() -> None:
    for name, price in prices():
        assert price["known"] in ("read", "derived", "remembered"), name
        assert price["page"].startswith("aws.amazon.com/"), name
        assert ("seen" in price) == (price["known"] != "remembered"), name


def test_each_price_and_assumption_is_used() -> None:
    read: set[str] = set()
    content = table()
    for group in ("prices", "discounts", "assumptions"):
        content[group] = Recorder(content[group], read)
    aws_cost(settings(), content, USAGE)
    for group in ("prices", "discounts", "assumptions"):
        assert set(content[group]) <= read


def test_role_passes_all_settings_that_the_estimate_reads() -> None:
    """aws_cost_settings lists exactly the variables that the filter reads."""
    read: set[str] = set()
    aws_cost(Recorder(settings(), read), table(), USAGE)
    assert set(settings()["aws_cost_settings"]) == read
    assert read <= set(settings())


def test_playbook_prints_the_total(tmp_path: Path) -> None:
    roles = [
        {"role": f"iot.platform.{name}", "when": False}
        for name in ("network", "ecr", "eks", "rds", "iot_core")
    ]
    include = {"name": "iot.platform.aws_cost"}
    play = {
        "hosts": "aws",
        "gather_facts": False,
        "roles": [{"role": "iot.platform.aws_base"}, *roles],
        "post_tasks": [{"name": "Costs", "ansible.builtin.include_role": include}],
    }
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
    done = subprocess.run(
        [
            *(Path(sys.executable).with_name("ansible-playbook"), tmp_path / "play.yml"),
            # -e passes all values as strings.
            *("-e", "region=us-east-1", "-e", "rds_multi_az=false", "-e", "eks_nodes_min=3"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    changed = settings() | {"rds_multi_az": False, "eks_nodes_min": 3}
    total = aws_cost(changed, table(), USAGE)["total"]
    said = " ".join(done.stdout.split())
    assert f"About {round(total)} USD a month" in said
    assert "those of us-east-1 differ" in said
