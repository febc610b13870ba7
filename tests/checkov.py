"""Runs checkov from its own virtual environment, which the Makefile creates."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ansible_runs import ROOT


def checkov(framework: str, files: Iterable[Path]) -> dict[str, Any]:
    """Check files; return the report of checkov."""
    done = subprocess.run(
        [
            # Without --skip-download, checkov tries to reach a host on the internet.
            *(ROOT / ".venv/checkov/bin/checkov", "--skip-download", "--quiet"),
            *("--framework", framework, "--output", "json"),
            *(word for file in files for word in ("--file", str(file))),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    report: dict[str, Any] = json.loads(done.stdout)
    return report
