"""Prometheus's own tool accepts the alert rules, and they fire when they should and only then."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
RULES = ROOT / "roles/prometheus/files/rules"


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_are_valid() -> None:
    promtool("check", "rules", *sorted(RULES.glob("*.yml")))


def test_rules_fire_when_they_should() -> None:
    promtool("test", "rules", ROOT / "tests/pipeline_rules_test.yml")
