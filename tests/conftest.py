"""Fixtures: a container engine and the image of the collector, for tests that run containers."""

import base64
import os
from pathlib import Path

import pytest

from testing.engines import DOCKERFILE, Engine, EngineError, build, find_engine

IMAGE = "localhost/iot-collector-test"


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The first engine that runs a container; without one, the test is skipped."""
    try:
        return find_engine(tmp_path_factory.mktemp("base"))
    except EngineError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def certificates() -> str:
    """What this machine trusts besides the public certificates, as the build wants it."""
    files = sorted(Path("/usr/local/share/ca-certificates").glob("**/*.crt"))
    return base64.b64encode(b"".join(file.read_bytes() for file in files)).decode()


@pytest.fixture(scope="session")
def image(engine: Engine, certificates: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The image of this repository, by its id."""
    arguments = {
        "BASE_IMAGE": engine.base,
        "CA_CERTIFICATES": certificates,
        "PIP_INDEX_URL": os.environ.get("PIP_INDEX_URL", ""),
        "REVISION": "a-revision",
    }
    return build(
        engine,
        tmp_path_factory.mktemp("image"),
        f"--file={DOCKERFILE}",
        f"--tag={IMAGE}",
        *(f"--build-arg={name}={value}" for name, value in arguments.items() if value),
    )
