"""The image: built by a real engine, run as Kubernetes runs it, against real services."""

import base64
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from services import Collector, Database, Mosquitto, eventually, publish

pytestmark = pytest.mark.timeout(900)  # seconds: a base and all dependencies are downloaded

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "collector/Dockerfile"
OWN_BASE = "localhost/iot-collector-test-base"  # stays in the engine's store for the next run
IMAGE = "localhost/iot-collector-test"

# An engine asks for more than this by default, and may not have it to give.
LIMITS = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024")
# As a pod that is "restricted", with nothing that can be written to.
RESTRICTED = (
    *("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"),
    *("--network=host", *LIMITS),
)


class EngineError(Exception):
    """A command of an engine failed; the text is the end of what it said."""


class Engine(NamedTuple):
    """Podman or Docker, and an image to build on."""

    command: Sequence[str]
    base: str = ""

    def __call__(self, *arguments: str, timeout: float = 60) -> str:
        """Run a command of the engine and return what it printed.

        :raises EngineError: it failed, or took longer than ``timeout`` seconds.
        """
        return _output([*self.command, *arguments], timeout)

    def has(self, image: str) -> bool:
        """Whether the image is in the engine's store."""
        try:
            return bool(self("image", "inspect", image))
        except EngineError:
            return False

    def inside(self, image: str, program: str, *arguments: str, user: str = "0") -> str:
        """Return what a program prints in a container of the image."""
        options = (*LIMITS, f"--user={user}", f"--entrypoint={program}")
        return self("run", "--rm", *options, image, *arguments)


def _output(command: Sequence[str], timeout: float) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"{command[0]} took longer than {timeout:g} s") from None
    if done.returncode:
        said = (done.stdout + done.stderr).splitlines()[-20:]
        raise EngineError("\n".join([f"{command[0]}: exit status {done.returncode}", *said]))
    return done.stdout


def _base(engine: Engine, folder: Path) -> str:
    """Return the base image that the Dockerfile names, or where it is not reached, one of ours."""
    (official,) = re.findall(r"^ARG BASE_IMAGE=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    for image in (official, OWN_BASE):
        if engine.has(image):
            return image
    try:
        engine("pull", official, timeout=120)
    except EngineError as error:
        if not shutil.which("mmdebstrap"):
            raise EngineError(f"no base: mmdebstrap is not installed, and {error}") from error
        packages = "--include=python3-venv,ca-certificates"
        archive = folder / "base.tar"
        _output(["mmdebstrap", "--variant=essential", packages, "bookworm", str(archive)], 300)
        engine("import", str(archive), OWN_BASE)
        archive.unlink()
        return OWN_BASE
    return official


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The first engine that runs a container; without one, the test is skipped."""
    reasons = {}
    # Podman's own choice of a runtime does not run everywhere that runc does.
    for command in (("podman",), ("podman", "--runtime=runc"), ("docker",)):
        if not shutil.which(command[0]):
            reasons[command[0]] = "not installed"
            continue
        try:
            Engine(command)("info")
            engine = Engine(command, _base(Engine(command), tmp_path_factory.mktemp("base")))
            engine.inside(engine.base, "true")
        except EngineError as error:
            reasons[" ".join(command)] = str(error).splitlines()[-1]
        else:
            return engine
    pytest.skip(f"no container engine works here: {reasons}")


def _build(engine: Engine, folder: Path, *options: str) -> str:
    """Build with the repository as context, and return the id of the image."""
    name = folder / "id"
    options = ("--network=host", LIMITS[0], f"--iidfile={name}", *options)
    engine("build", *options, ".", timeout=600)
    return name.read_text().strip()


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
    return _build(
        engine,
        tmp_path_factory.mktemp("image"),
        f"--file={DOCKERFILE}",
        f"--tag={IMAGE}",
        *(f"--build-arg={name}={value}" for name, value in arguments.items() if value),
    )


class Container(Collector):
    """``iot-collector`` in a container; the process is the engine's, which hands on its status."""

    name = "container"
    engine: Engine
    image: str
    arguments: Sequence[str] = ()  # none: those of the image

    def __init__(self, folder: Path, *parts: Mosquitto | Database, **settings: str) -> None:
        super().__init__(folder, *parts, **settings)
        self.container = f"iot-collector-test-{uuid.uuid4().hex[:8]}"

    def command(self) -> Sequence[str]:
        options = (*RESTRICTED, *(f"--env={name}" for name in self.settings))
        if self.engine.command[0] == "podman":  # or it puts a tmpfs on /tmp, /run and /var/tmp
            options = (*options, "--read-only-tmpfs=false")
        run = ("run", "--rm", f"--name={self.container}", *options)
        return [*self.engine.command, *run, self.image, *self.arguments]

    def stop(self) -> int:
        """Stop it as an engine does: the image's signal, and after 20 s a kill."""
        self.engine("stop", "--time=20", self.container)
        return self.wait()

    def close(self) -> None:
        if self.running:
            self.engine("rm", "--force", self.container)
        super().close()


@pytest.fixture
def make_container(
    engine: Engine, image: str, tmp_path: Path
) -> Iterator[Callable[..., Container]]:
    """Make containers (see `Container`), not started; they end with the test."""
    made: list[Container] = []

    def make(*parts: Mosquitto | Database, arguments: Sequence[str] = ()) -> Container:
        folder = tmp_path / f"container-{len(made)}"
        folder.mkdir()
        container = Container(folder, *parts)
        container.engine, container.image, container.arguments = engine, image, arguments
        made.append(container)
        return container

    yield make
    for container in made:
        container.close()


def test_migrates_stores_and_drains(
    make_container: Callable[..., Container], broker: Mosquitto, empty_database: Database
) -> None:
    migration = make_container(empty_database, arguments=["migrate"]).launch()
    assert migration.wait() == 0, migration.log()

    container = make_container(broker, empty_database).start()  # which is when /readyz is 200
    publish(broker, [("iot/data", b"temperature:23")])
    container.wait_settled(1)
    assert [row.fields for row in empty_database.rows()] == [{"temperature": 23}]

    sent = publish(broker, [("iot/data", b"n:%d" % n) for n in range(5_000)])
    asked = time.monotonic()
    assert container.stop() == 0, container.log()
    assert time.monotonic() - asked < 10
    end = container.events()[-1]
    assert end["event"] == "stopped"
    assert end["received"] == end["stored"] == empty_database.count()
    assert set(empty_database.payloads()) <= sent | {b"temperature:23"}


def test_the_process_has_no_rights(
    engine: Engine, make_container: Callable[..., Container], broker: Mosquitto, database: Database
) -> None:
    container = make_container(broker, database).start()
    status = engine("exec", container.container, "cat", "/proc/1/status")
    found = dict(line.split(":\t", 1) for line in status.splitlines())
    assert {*found["Uid"].split(), *found["Gid"].split()} == {"10001"}
    assert int(found["CapEff"], 16) == int(found["CapBnd"], 16) == 0
    assert found["NoNewPrivs"] == "1"


def test_every_command_ends_when_told(
    make_container: Callable[..., Container], broker: Mosquitto
) -> None:
    container = make_container(broker, arguments=["simulate", "--rate=50"]).launch()
    eventually(lambda: "Received PUBLISH" in broker.log(), what="the simulator publishes")
    assert container.stop() == 128 + signal.SIGTERM, container.log()


def test_describes_itself(engine: Engine, image: str) -> None:
    config: dict[str, Any] = json.loads(engine("image", "inspect", image))[0]["Config"]
    package = importlib.metadata.metadata("iot-collector")
    prefix = "org.opencontainers.image."
    labels = {k.removeprefix(prefix): v for k, v in config["Labels"].items() if prefix in k}
    assert labels == {
        "title": package["Name"],
        "description": package["Summary"],
        "version": package["Version"],
        "licenses": package["License-Expression"],
        "revision": "a-revision",
    }
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["iot-collector"]
    assert config["Cmd"] == ["run"]
    assert list(config["ExposedPorts"]) == ["3000/tcp"]
    assert config["StopSignal"] in ("SIGTERM", "15")


def test_is_the_base_and_the_collector(engine: Engine, image: str, certificates: str) -> None:
    def files(image: str, *expression: str, user: str = "0") -> set[str]:
        return {*engine.inside(image, "find", *expression, user=user).splitlines()}

    added = files(image, "/", "-xdev") - files(engine.base, "/", "-xdev")
    assert {path for path in added if not path.startswith("/opt/iot-collector")} == set()
    assert not {path for path in added if re.search(r"/(pip|wheels|tests?)$|\.(pem|key)$", path)}
    assert not files(image, "/", "-xdev", "-type", "f", "-perm", "/6000")
    assert not files(
        image,
        *("/opt", "/usr", "/etc", "-xdev", "!", "-readable", "-prune"),
        *("-o", "!", "-type", "l", "-writable", "-print"),
        user="10001",
    )
    if certificates:
        assert certificates not in engine("history", "--no-trunc", image)


def test_the_build_sees_what_the_wheel_is_made_of(engine: Engine, tmp_path: Path) -> None:
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text(f"FROM {engine.base}\nCOPY . /context\n")
    found = engine.inside(
        _build(engine, tmp_path, f"--file={dockerfile}"), "find", "/context", "-type", "f"
    )
    packages = (*(ROOT / "collector/iot_collector").rglob("*"),)
    packages += (*(ROOT / "collector/iot_simulator").rglob("*"),)
    expected = {str(f.relative_to(ROOT)) for f in packages if f.is_file()}
    expected |= {"pyproject.toml", "README.md", "LICENSE", "collector/Dockerfile"}
    assert {path.removeprefix("/context/") for path in found.split()} == {
        path for path in expected if "__pycache__" not in path
    }
