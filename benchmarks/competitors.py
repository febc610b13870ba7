"""The competitors, and how each is built and started."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from testing.service import ServiceError

from . import processes, wire

PEERS = Path(__file__).parent / "peers"
CLIENT_ID = "benchmark-collector"


@dataclass(frozen=True)
class Place:
    """Paths, ports and database of a run."""

    work: Path
    broker_port: int
    http_port: int
    database_url: str

    @property
    def count_file(self) -> Path:
        """The file to which a competitor that stores nothing writes its count or messages."""
        return self.work / "count"


@dataclass(frozen=True)
class Competitor:
    """A program that stores messages of a broker in a database."""

    name: str
    title: str
    command: Callable[[Place], list[str]]
    prepare: Callable[[Place], str]  # returns versions; raises ServiceError if it cannot run here
    speed: int  # estimated messages per second, to keep runs of slow ones short
    environment: Callable[[Place], dict[str, str]]
    counted: Callable[[Place], int] | None = None  # only for those that store nothing
    metrics: bool = False
    table: str = "messages"

    @property
    def stores(self) -> bool:
        """Whether it writes to the database."""
        return self.counted is None


def _ours(place: Place) -> dict[str, str]:
    return {
        "IOT_MQTT_URL": f"mqtt://{wire.HOST}:{place.broker_port}",
        "IOT_MQTT_CLIENT_ID": CLIENT_ID,
        "IOT_MQTT_TOPICS": wire.TOPIC.decode(),
        "IOT_DATABASE_URL": place.database_url,
        "IOT_HTTP_PORT": str(place.http_port),
    }


def _peer(place: Place) -> dict[str, str]:
    return {
        "PEER_HOST": wire.HOST,
        "PEER_PORT": str(place.broker_port),
        "PEER_CLIENT": CLIENT_ID,
        "PEER_TOPIC": wire.TOPIC.decode(),
        "PEER_DATABASE": place.database_url,
        "PEER_COUNT": str(place.count_file),
    }


def _collector(*arguments: str) -> list[str]:
    """Return a command line for the collector in the environment of this Python."""
    return [str(Path(sys.executable).with_name("iot-collector")), *arguments]


def migrate(place: Place) -> None:
    """Create the schema, which all competitors use."""
    processes.run(_collector("migrate"), env=os.environ | _ours(place))


def _python_versions(_place: Place) -> str:
    packages = ("iot-collector", "paho-mqtt", "psycopg2-binary")
    python = f"Python {sys.version.split()[0]}"
    return ", ".join([python, *(f"{name} {version(name)}" for name in packages)])


def _build_node(place: Place) -> str:
    folder = place.work / "node"
    shutil.copytree(PEERS / "node", folder, dirs_exist_ok=True)
    processes.run(
        ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--silent"], cwd=folder
    )
    node = processes.run(["node", "--version"]).strip()
    versions = [f"Node {node}"]
    for package in ("mqtt", "pg"):
        text = (folder / "node_modules" / package / "package.json").read_text()
        versions.append(f"{package} {json.loads(text)['version']}")
    return ", ".join(versions)


# The directory with the sources of Debian's golang-*-dev packages.
_GO_PATH = "/usr/share/gocode"
_GO_PACKAGES = {
    "golang-github-eclipse-paho.mqtt.golang-dev": "github.com/eclipse/paho.mqtt.golang",
    "golang-github-jackc-pgx-v4-dev": "github.com/jackc/pgx/v4",
}


def _build_go(place: Place) -> str:
    for package, path in _GO_PACKAGES.items():
        if not (Path(_GO_PATH) / "src" / path).exists():
            raise ServiceError(f"apt-get install golang-go {' '.join(_GO_PACKAGES)} ({package})")
    folder = place.work / "go"
    folder.mkdir(exist_ok=True)
    # Without modules, Go uses the sources of Debian's packages and downloads nothing.
    go = {
        "GO111MODULE": "off",
        "GOPATH": _GO_PATH,
        "GOCACHE": str(folder / "cache"),
        "GOFLAGS": "",
    }
    processes.run(
        ["go", "build", "-o", str(folder / "peer"), str(PEERS / "go" / "main.go")],
        env=os.environ | go,
    )
    versions = [processes.run(["go", "version"]).split()[2]]
    versions += [f"{package} {_debian_version(package)}" for package in _GO_PACKAGES]
    return ", ".join(versions)


def _debian_version(package: str) -> str:
    return processes.run(["dpkg-query", "-W", "-f", "${Version}", package])


def _find_bridge(_place: Place) -> str:
    try:
        return f"mq-bridge {version('mq-bridge')}"
    except PackageNotFoundError as error:
        raise ServiceError("pip install mq-bridge") from error


def _build_limit(place: Place) -> str:
    processes.run(["cc", "-O2", "-Wall", "-o", str(place.work / "limit"), str(PEERS / "limit.c")])
    return processes.run(["cc", "--version"]).split("\n", 1)[0]


def _find_mosquitto_sub(_place: Place) -> str:
    if not shutil.which("mosquitto_sub"):
        raise ServiceError("apt-get install mosquitto-clients")
    return f"mosquitto-clients {_debian_version('mosquitto-clients')}"


def _count_of_limit(place: Place) -> int:
    return int.from_bytes(place.count_file.read_bytes() or b"\0", sys.byteorder)


def _mosquitto_sub(place: Place) -> list[str]:
    command = ["mosquitto_sub", "-h", wire.HOST, "-p", str(place.broker_port), "-i", CLIENT_ID]
    command += ["-c", "-q", "1", "-t", wire.TOPIC.decode()]
    return ["sh", "-c", 'exec "$@" > "$PEER_COUNT"', "sh", *command]


def _count_of_mosquitto_sub(place: Place) -> int:
    return place.count_file.stat().st_size // (wire.PAYLOAD_SIZE + 1)


ALL = [
    Competitor(
        name="collector",
        title="**this collector**",
        command=lambda _: _collector("run"),
        prepare=_python_versions,
        speed=60_000,
        environment=_ours,
        metrics=True,
    ),
    Competitor(
        name="ids",
        title="this collector, with message ids",
        command=lambda _: _collector("run"),
        prepare=_python_versions,
        speed=40_000,
        environment=lambda place: _ours(place) | {"IOT_MESSAGE_ID_KEY": "id"},
        metrics=True,
    ),
    Competitor(
        name="stock",
        title="this collector, paho's own reader",
        command=lambda _: [sys.executable, str(PEERS / "stock.py"), "run"],
        prepare=_python_versions,
        speed=20_000,
        environment=_ours,
        metrics=True,
    ),
    Competitor(
        name="naive",
        title="Python, paho, INSERT + COMMIT per message",
        command=lambda _: [sys.executable, str(PEERS / "naive.py")],
        prepare=_python_versions,
        speed=1_200,
        environment=_peer,
    ),
    Competitor(
        name="node",
        title="Node, mqtt.js + pg, INSERT per message, early ack",
        command=lambda place: ["node", str(place.work / "node" / "peer.js")],
        prepare=_build_node,
        speed=6_000,
        environment=_peer,
    ),
    Competitor(
        name="go",
        title="Go, paho + pgx COPY in batches, early ack",
        command=lambda place: [str(place.work / "go" / "peer")],
        prepare=_build_go,
        speed=40_000,
        environment=_peer,
    ),
    Competitor(
        name="bridge",
        title="mq-bridge (Rust), COPY of four JSON fields only",
        command=lambda _: [sys.executable, str(PEERS / "bridge.py")],
        prepare=_find_bridge,
        speed=40_000,
        environment=_peer,
        table="bridge",
    ),
    Competitor(
        name="sub",
        title="mosquitto_sub into a file, stores no rows",
        command=_mosquitto_sub,
        prepare=_find_mosquitto_sub,
        speed=60_000,
        environment=_peer,
        counted=_count_of_mosquitto_sub,
    ),
    Competitor(
        name="limit",
        title="C, bulk reads, stores nothing",
        command=lambda place: [str(place.work / "limit")],
        prepare=_build_limit,
        speed=60_000,
        environment=_peer,
        counted=_count_of_limit,
    ),
]
BY_NAME = {competitor.name: competitor for competitor in ALL}
