"""Prometheus's own tool accepts the alert rules, and they fire when they should and only then."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
RULES = ROOT / "roles/prometheus/files/rules"


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_are_valid() -> None:
    promtool("check", "rules", *sorted(RULES.glob("*.yml")))


@pytest.mark.parametrize("rules", sorted(RULES.glob("*.yml")), ids=lambda path: path.stem)
def test_rules_fire_when_they_should(rules: Path) -> None:
    promtool("test", "rules", ROOT / f"tests/{rules.stem}_rules_test.yml")


@pytest.mark.parametrize("rules", sorted(RULES.glob("*.yml")), ids=lambda path: path.stem)
def test_each_alert_is_seen_firing_and_silent(rules: Path) -> None:
    alerts = re.findall(r"- alert: (\w+)", rules.read_text())
    assert alerts
    cases = yaml.safe_load((ROOT / f"tests/{rules.stem}_rules_test.yml").read_text())["tests"]
    tried = [check for case in cases for check in case["alert_rule_test"]]
    for alert in alerts:
        outcomes = {bool(check.get("exp_alerts")) for check in tried if check["alertname"] == alert}
        assert outcomes == {True, False}, alert
