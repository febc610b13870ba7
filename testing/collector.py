"""The collector: its commands, and ``iot-collector run`` as a process."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from prometheus_client.parser import text_string_to_metric_families

from .mosquitto import Mosquitto
from .postgres import Database
from .service import HOST, PATIENCE, Service, binary, eventually, free_port


class Answer(NamedTuple):
    """A response of the collector's HTTP server."""

    status: int
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


Metrics = dict[str, float]


def assert_balanced(metrics: Metrics) -> None:
    """Assert that the counts balance: received = stored + duplicates + dead letters + in flight."""
    settled = (
        metrics["db_inserts_total"]
        + metrics["db_duplicates_total"]
        + sum(value for name, value in metrics.items() if name.startswith("db_dead_letters_total"))
    )
    received = metrics["mqtt_messages_total"]
    assert received == settled + metrics["messages_in_flight"], metrics


# A collector with a built-in fault, started like `Collector`.
FAULTY_COLLECTOR = Path(__file__).with_name("faulty_collector.py")


def iot_collector() -> str:
    """Return the path of the installed console script."""
    return binary("iot-collector", str(Path(sys.executable).parent))


def clean_environment() -> dict[str, str]:
    """Return the environment without the settings of the user who runs the tests."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("IOT_", "PG"))}


def run_command(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run ``iot-collector`` with settings; return its output and exit status."""
    return subprocess.run(
        [iot_collector(), *arguments],
        env=clean_environment() | settings,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


class Collector(Service):
    """``iot-collector run`` as a process."""

    name = "collector"

    def __init__(self, folder: Path, *parts: Mosquitto | Database, **settings: str) -> None:
        super().__init__(folder)
        self.settings = {
            "IOT_HTTP_PORT": str(free_port()),
            "IOT_MQTT_CLIENT_ID": "collector",
            "IOT_MQTT_TOPICS": "#",
            "IOT_LOG_FORMAT": "json",
            "IOT_LOG_LEVEL": "debug",
        }
        for part in parts:
            self.settings |= part.environment()
        self.settings |= settings

    def command(self) -> Sequence[str]:
        return [iot_collector(), "run"]

    def options(self) -> dict[str, Any]:
        return {"env": clean_environment() | self.settings}

    def ready(self) -> bool:
        return self.status("/readyz") == 200

    def get(self, path: str) -> Answer:
        """Send a GET request to its HTTP server."""
        url = f"http://{HOST}:{self.settings['IOT_HTTP_PORT']}{path}"
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE) as response:
                return Answer(response.status, response.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.read())

    def status(self, path: str) -> int:
        """Return the HTTP status of a path, or 0 if nothing listens yet."""
        try:
            return self.get(path).status
        except (urllib.error.URLError, ConnectionError):
            return 0

    def wait_listening(self) -> Self:
        """Wait until its HTTP server responds, with any status."""

        def answers() -> int:
            assert self.running, f"the collector ended:\n{self.log()}"
            return self.status("/livez")

        eventually(answers, what="the collector listens")
        return self

    def wait_ready(self) -> Self:
        """Wait until it is ready."""
        eventually(self.ready, what="the collector is ready")
        return self

    def health(self) -> Any:
        return self.get("/health").json()

    def metrics(self) -> Metrics:
        """Return the metrics by name, or by name{label="value"} if they have labels."""
        found: Metrics = {}
        for family in text_string_to_metric_families(self.get("/metrics").body.decode()):
            for sample in family.samples:
                labels = ",".join(f'{k}="{v}"' for k, v in sample.labels.items())
                found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
        return found

    def wait_settled(self, received: int, timeout: float = PATIENCE) -> Metrics:
        """Wait until it has received so many messages and none is in flight; return the metrics."""

        def settled() -> Metrics | None:
            metrics = self.metrics()
            assert_balanced(metrics)
            done = metrics["mqtt_messages_total"] >= received and not metrics["messages_in_flight"]
            return metrics if done else None

        return eventually(
            settled, timeout, f"{received} messages are settled\n{self.log()[-2000:]}"
        )

    def events(self) -> list[dict[str, Any]]:
        """Return its log, one dict for each line."""
        return [json.loads(line) for line in self.log().splitlines()]
