"""The Molecule scenarios: each platform is deployed twice, verified and torn down."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from ansible_runs import MITOGEN, ROOT, run_ansible

SCENARIOS = sorted(path.parent.name for path in ROOT.glob("molecule/*/molecule.yml"))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_molecule_scenario_succeeds(scenario: str) -> None:
    # Molecule finds ansible-playbook on the PATH.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, **MITOGEN}
    done = run_ansible("molecule", "test", "-s", scenario, directory=ROOT, **environment)
    assert done.returncode == 0, done.stdout
