"""Fixtures: empty AWS accounts, and one with the whole system in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ansible_runs import WITHOUT_MITOGEN
from deployments import Deployment

from testing.aws.emulator import PYTHON, Emulator


@pytest.fixture(scope="session")
def make_account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Emulator]]:
    """Make accounts with nothing in them; they end with the tests."""
    if not PYTHON.exists():
        pytest.fail("the emulator is not installed: make .venv/emulator/.stamp")
    made: list[Emulator] = []

    def make(**settings: str) -> Emulator:
        made.append(Emulator(tmp_path_factory.mktemp("account"), None, **settings).start())
        return made[-1]

    yield make
    for emulator in made:
        emulator.close()


@pytest.fixture
def account(make_account: Callable[..., Emulator]) -> Emulator:
    """An account of the test's own."""
    return make_account()


@pytest.fixture(scope="session")
def deployed(make_account: Callable[..., Emulator]) -> Deployment:
    """The system in eu-west-1, after its first run. Tests that change it set it back.

    The account authorises calls, for those that are not the root user's.
    """
    deployment = Deployment(make_account(AUTH="true"))
    deployment.first_run = deployment.deploy(**WITHOUT_MITOGEN)
    deployment.first_calls = deployment.account.calls()
    return deployment


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home directory without AWS's files."""
    return tmp_path
