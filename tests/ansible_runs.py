"""Runs of Ansible, as a person would start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


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
    """Run a playbook of the project."""
    return run_ansible("ansible-playbook", ROOT / path, *arguments, directory=ROOT, **environment)
