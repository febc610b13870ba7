"""The README of each role is up to date with its argument_specs.yml."""

from pathlib import Path

import pytest
from role_readmes import readme, roles


@pytest.mark.parametrize("role", roles(), ids=lambda role: role.name)
def test_readme_is_current(role: Path) -> None:
    written = (role / "README.md").read_text()
    assert written == readme(role), "run: .venv/bin/python tests/role_readmes.py"
