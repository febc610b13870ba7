"""The README of each role says what its argument_specs.yml says."""

from pathlib import Path

import pytest
from role_readmes import readme, roles


@pytest.mark.parametrize("role", roles(), ids=lambda role: role.name)
def test_is_current(role: Path) -> None:
    written = (role / "README.md").read_text()
    assert written == readme(role), "run: .venv/bin/python tests/role_readmes.py"
