"""``iot-collector verify`` follows a message and reports the step that failed."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from iot_collector import verify as verify_module
from iot_collector.settings import Settings
from iot_collector.verify import VerificationError, verify

from testing.collector import Collector, run_command
from testing.mosquitto import Mosquitto
from testing.postgres import Database
from testing.publisher import publish
from testing.service import HOST, eventually, free_port

RULE = {"name": "CollectorDown", "health": "ok"}


@contextmanager
def prometheus(*rules: dict[str, str], scraped: int = 1_000_000) -> Iterator[str]:
    """A stand-in for two endpoints of the Prometheus HTTP API; yields its address."""
    answers: dict[str, object] = {
        "query": {"result": [{"value": [0, str(scraped)]}]},
        "rules": {"groups": [{"rules": rules}]},
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.removeprefix("/api/v1/").partition("?")[0]
            body = json.dumps({"data": answers[name]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer((HOST, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"{HOST}:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def settings(
    monkeypatch: pytest.MonkeyPatch,
    broker: Mosquitto,
    database: Database,
    make_collector: Callable[..., Collector],
) -> Settings:
    collector = make_collector(broker, database, IOT_MQTT_TOPICS="iot/data").start()
    for name, value in {**broker.environment(), **database.environment()}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("IOT_HTTP_PORT", collector.settings["IOT_HTTP_PORT"])
    return Settings()


def address(settings: Settings) -> str:
    return f"{HOST}:{settings.http_port}"


def test_message_is_followed_from_broker_to_prometheus(
    settings: Settings, database: Database
) -> None:
    with prometheus(RULE, RULE) as where:
        done = run_command(
            "verify",
            f"--prometheus={where}",
            IOT_MQTT_URL=settings.mqtt_url,
            IOT_HTTP_PORT=str(settings.http_port),
            **database.environment(),
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1:] == [
        "it is in the table, once",
        "the collector has counted it and accounts for every message",
        "Prometheus has seen it",
        "2 alert rules are loaded and none fails",
    ]
    assert database.count() == 1


def test_message_of_another_publisher_is_followed(
    settings: Settings, broker: Mosquitto, database: Database
) -> None:
    """For accounts that may not publish. The message can be stored before verify starts."""
    publish(broker, [("iot/data", b"of somebody else")])
    eventually(lambda: database.count() == 1)
    # An older message is not read: the table may be too large.
    database.query("SELECT ensure_partitions(now() - interval '2 hours', 0)")
    database.query(
        "INSERT INTO messages (received_at, topic, payload, qos, retained)"
        " SELECT now() - interval '2 hours', topic, payload, qos, retained FROM messages"
    )
    with prometheus(RULE, scraped=1) as where:
        done = run_command(
            "verify",
            f"--prometheus={where}",
            "--published=of somebody else",
            IOT_MQTT_URL="mqtt://127.0.0.1:1",  # no broker listens there
            IOT_HTTP_PORT=str(settings.http_port),
            **database.environment(),
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == "it is in the table, once"
    assert len(done.stdout.splitlines()) == 4


def test_missing_message_of_another_publisher_is_reported(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "_TIMEOUT", 1.0)
    with prometheus(RULE) as where, pytest.raises(VerificationError, match="not in the table"):
        list(verify(settings, address(settings), where, "never published"))


def test_message_that_is_not_stored_is_reported(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "_TIMEOUT", 2.0)
    elsewhere = settings.model_copy(update={"mqtt_topics": ["not/stored"]})
    with prometheus(RULE) as where, pytest.raises(VerificationError, match="not in the table"):
        list(verify(elsewhere, address(settings), where))


def test_prometheus_that_scrapes_nothing_is_reported(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "_TIMEOUT", 2.0)
    with (
        prometheus(RULE, scraped=0) as where,
        pytest.raises(VerificationError, match="Prometheus has not seen it"),
    ):
        list(verify(settings, address(settings), where))


@pytest.mark.parametrize(
    ("rules", "fault"),
    [
        ([], "there are none"),
        ([RULE, {"name": "Broken", "health": "err", "lastError": "no"}], "Broken: no"),
    ],
)
def test_missing_or_failing_alert_rules_are_reported(
    rules: list[dict[str, str]], fault: str, settings: Settings
) -> None:
    with prometheus(*rules) as where, pytest.raises(VerificationError, match=fault):
        list(verify(settings, address(settings), where))


def test_stopped_collector_is_reported(database: Database) -> None:
    done = run_command("verify", f"--collector={HOST}:{free_port()}", **database.environment())
    assert done.returncode == 1
    assert done.stderr.startswith("verify: the collector at ")
    assert "Traceback" not in done.stderr
