"""Renamed settings: an old name stops the run, and CHANGELOG.md lists all of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from ansible_runs import ROOT, playbook

RENAMED = yaml.safe_load((ROOT / "roles/preflight/vars/main.yml").read_text())[
    "__preflight_renamed"
]
DEFAULTS = {
    name
    for path in ROOT.glob("roles/*/defaults/main.yml")
    for name in yaml.safe_load(path.read_text())
}


def test_only_new_names_are_settings() -> None:
    assert set(RENAMED.values()) <= DEFAULTS
    assert not RENAMED.keys() & DEFAULTS


def test_changelog_lists_renamed_settings() -> None:
    listed = re.findall(r"^\| `(\w+)` \| `(\w+)` \|$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert dict(listed) == RENAMED


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("host", ["--check"]),
        ("host", ["--check", "--tags=run"]),
        ("local", ["--check", "-e", "minikube_enabled=false"]),
        ("verify", []),
        ("teardown", []),
    ],
)
def test_old_names_stop_the_run(name: str, options: list[str], tmp_path: Path) -> None:
    old = dict.fromkeys(RENAMED, "") | {"iot_state_dir": f"{tmp_path}/nothing"}
    done = playbook(f"playbooks/{name}.yml", *options, "-e", json.dumps(old))
    assert done.returncode == 2, done.stdout
    for before, now in RENAMED.items():
        assert f"{before} is now {now}\n" in done.stdout
    assert "changed=0" in done.stdout


def test_variable_with_an_old_name_as_prefix_is_allowed() -> None:
    done = playbook(
        "playbooks/teardown.yml",
        *("--check", "-e", json.dumps({"common_state_dir_of_mine": 1})),
        *("-e", "iot_state_dir=/nonexistent/iot-test"),
    )
    assert done.returncode == 0, done.stdout
