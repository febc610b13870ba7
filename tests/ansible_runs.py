"""Runs of Ansible, as a person would start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

# Mitogen keeps one Python for all tasks of a run. Ansible alone starts a Python for each task,
# which takes more CPU time. Users do not have Mitogen, so some tests run without it: the collection
# in an empty directory, the machine behind SSH, the machine that systemd boots, and on AWS the
# first and second run.
_MITOGEN = find_spec("ansible_mitogen")
assert _MITOGEN is not None
assert _MITOGEN.origin is not None
MITOGEN = {
    "ANSIBLE_STRATEGY": "mitogen_linear",
    "ANSIBLE_STRATEGY_PLUGINS": str(Path(_MITOGEN.origin).parent / "plugins/strategy"),
}
WITHOUT_MITOGEN = {"ANSIBLE_STRATEGY": "linear"}


def run_ansible(
    program: str, *arguments: str | Path, directory: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run one of Ansible's programs; return what it printed, both streams in one."""
    inherited = os.environ | {"ANSIBLE_NOCOLOR": "1", "LC_ALL": "C.UTF-8"}
    # Each task starts a Python; compiling what it imports takes longer than most of them.
    inherited.pop("PYTHONDONTWRITEBYTECODE", None)
    return subprocess.run(
        [Path(sys.executable).with_name(program), *arguments],
        cwd=directory,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def playbook(path: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a playbook of the project, with Mitogen."""
    settings = MITOGEN | environment
    return run_ansible("ansible-playbook", ROOT / path, *arguments, directory=ROOT, **settings)


def preflight_outcomes(
    role: str, attempts: Sequence[dict[str, Any]], folder: Path, *arguments: str
) -> tuple[list[str], str]:
    """Run the preflight tasks of a role on this machine, once with each of these variables.

    All attempts are in one run, because a run takes seconds.

    :return: for each attempt the output that begins with the error, or with "accepted"; and the
        output of the whole run.
    """
    attempt = {
        "block": [
            {
                "ansible.builtin.include_role": {
                    "name": f"iot.platform.{role}",
                    "tasks_from": "preflight",
                }
            },
            {"ansible.builtin.debug": {"msg": "outcome: accepted"}},
        ],
        "rescue": [{"ansible.builtin.debug": {"msg": "outcome: {{ ansible_failed_result.msg }}"}}],
    }
    tasks = [attempt | {"vars": variables} for variables in attempts]
    play = {"hosts": "host", "gather_facts": True, "gather_subset": ["!all", "min"], "tasks": tasks}
    file = folder / "attempts.yml"
    file.write_text(json.dumps([play]))
    done = playbook(str(file), *arguments)
    _, *outcomes = " ".join(done.stdout.split()).split("outcome: ")
    assert len(outcomes) == len(attempts), done.stdout
    return outcomes, done.stdout
