"""The container image: built with a real engine and run with the restrictions of Kubernetes."""

import importlib.metadata
import json
import re
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from testing.collector import Collector
from testing.engines import LIMITS, ROOT, Engine, build
from testing.mosquitto import Mosquitto
from testing.postgres import Database
from testing.publisher import publish
from testing.service import eventually

pytestmark = pytest.mark.timeout(900)  # seconds, including the download of all dependencies

# Like a pod with Pod Security Standard "restricted".
RESTRICTED = (
    *("--cap-drop=ALL", "--security-opt=no-new-privileges"),
    *("--network=host", *LIMITS),
)


class Container(Collector):
    """``iot-collector`` in a container. The engine passes on its exit status."""

    name = "container"
    engine: Engine
    image: str
    arguments: Sequence[str] = ()  # empty: the CMD of the image

    def __init__(self, folder: Path, *parts: Mosquitto | Database, **settings: str) -> None:
        super().__init__(folder, *parts, **settings)
        self.container = f"iot-collector-test-{uuid.uuid4().hex[:8]}"

    def command(self) -> Sequence[str]:
        settings = (f"--env={name}" for name in self.settings)
        options = (*self.engine.read_only, *RESTRICTED, *settings)
        run = ("run", "--rm", f"--name={self.container}", *options)
        return [*self.engine.command, *run, self.image, *self.arguments]

    def stop(self) -> int:
        """Stop the container with the signal of the image, and kill it after 20 s."""
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
    """Make containers (see `Container`), not started. They are removed after the test."""
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


def test_image_migrates_stores_and_stops_cleanly(
    make_container: Callable[..., Container], broker: Mosquitto, empty_database: Database
) -> None:
    migration = make_container(empty_database, arguments=["migrate"]).launch()
    assert migration.wait() == 0, migration.log()

    container = make_container(broker, empty_database).start()  # waits for /readyz
    publish(broker, [("iot/data", b"temperature:23")])
    container.wait_settled(1)
    assert [row.fields for row in empty_database.rows()] == [{"temperature": 23}]

    sent = publish(broker, [("iot/data", b"n:%d" % n) for n in range(5_000)])
    started = time.monotonic()
    assert container.stop() == 0, container.log()
    assert time.monotonic() - started < 10
    end = container.events()[-1]
    assert end["event"] == "stopped"
    assert end["received"] == end["stored"] == empty_database.count()
    assert set(empty_database.payloads()) <= sent | {b"temperature:23"}


def test_process_has_no_capabilities(
    engine: Engine, make_container: Callable[..., Container], broker: Mosquitto, database: Database
) -> None:
    container = make_container(broker, database).start()
    found = engine.effective_rights(container.container)
    assert {*found["Uid"].split(), *found["Gid"].split()} == {"10001"}
    assert int(found["CapEff"], 16) == int(found["CapBnd"], 16) == 0
    assert found["NoNewPrivs"] == "1"


def test_other_commands_end_on_sigterm(
    make_container: Callable[..., Container], broker: Mosquitto
) -> None:
    container = make_container(broker, arguments=["simulate", "--rate=50"]).launch()
    eventually(lambda: "Received PUBLISH" in broker.log(), what="the simulator publishes")
    assert container.stop() == 128 + signal.SIGTERM, container.log()


def test_image_has_labels_and_defaults(engine: Engine, image: str) -> None:
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


def test_image_adds_only_the_collector_to_its_base(
    engine: Engine, image: str, certificates: str
) -> None:
    def files(image: str, *expression: str, user: str = "0") -> set[str]:
        return {*engine.inside(image, "find", *expression, user=user).splitlines()}

    added = files(image, "/", "-xdev") - files(engine.base, "/", "-xdev")
    assert {path for path in added if not path.startswith("/opt/iot-collector")} == set()
    # The CA certificates of botocore are public.
    build = re.compile(r"/(pip|wheels|tests?)$|(?<!/botocore/cacert)\.(pem|key)$")
    assert not {path for path in added if build.search(path)}
    assert not files(image, "/", "-xdev", "-type", "f", "-perm", "/6000")
    assert not files(
        image,
        *("/opt", "/usr", "/etc", "-xdev", "!", "-readable", "-prune"),
        *("-o", "!", "-type", "l", "-writable", "-print"),
        user="10001",
    )
    if certificates:
        assert certificates not in engine("history", "--no-trunc", image)


def test_build_context_has_only_the_sources_of_the_wheel(engine: Engine, tmp_path: Path) -> None:
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text(f"FROM {engine.base}\nCOPY . /context\n")
    found = engine.inside(
        build(engine, tmp_path, f"--file={dockerfile}"), "find", "/context", "-type", "f"
    )
    package = (ROOT / "collector/iot_collector").rglob("*")
    expected = {str(f.relative_to(ROOT)) for f in package if f.is_file()}
    expected |= {"pyproject.toml", "README.md", "LICENSE", "collector/Dockerfile"}
    assert {path.removeprefix("/context/") for path in found.split()} == {
        path for path in expected if "__pycache__" not in path
    }
