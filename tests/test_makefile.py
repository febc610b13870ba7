"""The Makefile: its list of packages, its help, and the CI pipeline that calls it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent


def tasks(value: object) -> list[dict[str, Any]]:
    """Every mapping in a task file, blocks included."""
    if isinstance(value, dict):
        return [value, *(found for inner in value.values() for found in tasks(inner))]
    if isinstance(value, list):
        return [found for inner in value for found in tasks(inner)]
    return []


def test_packages_are_those_of_the_roles() -> None:
    installed: set[str] = set()
    for path in ROOT.glob("roles/*/tasks/*.yml"):
        for task in tasks(yaml.safe_load(path.read_text())):
            packages = task.get("host_base_packages", [])
            if isinstance(packages, list):
                installed.update(packages)
    (listed,) = re.findall(r"^PACKAGES := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    # Alertmanager is optional, and here the Python of Ansible already has `packaging`.
    assert set(listed.split()) == installed - {"prometheus-alertmanager", "python3-packaging"}


def test_help_lists_the_targets() -> None:
    shown = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for target in ("up", "status", "down", "clean", "test"):
        assert re.search(rf"^  {target} ", shown, re.MULTILINE), target


def test_pipeline_runs_make_test_and_returns_its_status(tmp_path: Path) -> None:
    make = tmp_path / "make"
    make.write_text('#!/bin/sh\necho "make $*"\nexit 3\n')
    make.chmod(0o755)
    done = subprocess.run(
        [ROOT / ".ci/run"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "make test\n")
