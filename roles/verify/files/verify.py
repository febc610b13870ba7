"""Follow one message: published as a device does, found in the table once, counted, seen.

Runs where the collector is installed, with its settings (IOT_*): they say where broker and database
are, and what topic is stored. Where the collector and Prometheus are, VERIFY_COLLECTOR and
VERIFY_PROMETHEUS say, as host:port. Fails with a line that says which step did not happen.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from iot_collector.connection import set_up_transport
from iot_collector.database import connect
from iot_collector.settings import Settings, load
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

PATIENCE = (
    60.0  # seconds: Prometheus looks every 15, and restarts of the collector are quicker than that
)
SETTLED = {"db_inserts_total", "db_duplicates_total", "db_dead_letters_total", "messages_in_flight"}


def other_accounts() -> None:
    """Be a device and a reader; their passwords lie beside the collector's."""
    if "IOT_MQTT_USERNAME" in os.environ:
        os.environ["IOT_MQTT_USERNAME"] = "iot-simulator"
        beside("IOT_MQTT_PASSWORD_FILE", "simulator_mqtt_password")
    os.environ["IOT_DATABASE_URL"] = re.sub(
        "//[^@/]*@", "//iot_reader@", os.environ["IOT_DATABASE_URL"]
    )
    beside("IOT_DATABASE_PASSWORD_FILE", "reader_db_password")


def beside(variable: str, name: str) -> None:
    """Let a variable name another file of the same directory."""
    os.environ[variable] = str(Path(os.environ[variable]).with_name(name))


def eventually(happened: Callable[[], bool], fault: str) -> None:
    """Wait until it has happened; end with the fault otherwise."""
    until = time.monotonic() + PATIENCE
    reason = ""
    while time.monotonic() < until:
        try:
            if happened():
                return
        except OSError as error:
            reason = f" ({error})"
        time.sleep(0.5)
    sys.exit(f"verify: {fault}{reason}")


def get(address: str, path: str) -> bytes:
    """Return the body of an HTTP answer."""
    with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
        return answer.read()


def counts() -> tuple[float, float]:
    """Return the messages that all collectors have received, and those that they account for."""
    host, _, port = os.environ["VERIFY_COLLECTOR"].rpartition(":")
    received = settled = 0.0
    host = host.strip("[]")
    # A name may stand for many pods, each with counters of its own.
    for address in sorted(
        {info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    ):
        where = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        for name, value in re.findall(
            r"^(\w+)(?:{.*})? (\S+)$", get(where, "/metrics").decode(), re.MULTILINE
        ):
            received += float(value) if name == "mqtt_messages_total" else 0
            settled += float(value) if name in SETTLED else 0
    return received, settled


def publish(settings: Settings, payload: bytes) -> str:
    """Publish a message at QoS 1 to a topic that the collector stores; return the topic."""
    topic = re.sub(r"[+#]", "verify", re.sub(r"^\$share/[^/]*/", "", settings.mqtt_topics[0]))
    broker = settings.broker
    client = Client(
        CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5, transport=broker.transport
    )
    set_up_transport(client, settings)
    client.connect(broker.host, broker.port)
    client.loop_start()
    info = client.publish(topic, payload, qos=1)
    try:
        info.wait_for_publish(PATIENCE)
    except RuntimeError as error:
        sys.exit(f"verify: the broker {broker} took no message: {error}")
    if not info.is_published():
        sys.exit(f"verify: the broker {broker} has not acknowledged the message to {topic}")
    client.disconnect()
    client.loop_stop()
    return topic


def rows(settings: Settings, payload: bytes) -> int:
    """Return how many rows have the payload."""
    with closing(connect(settings)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM messages WHERE payload = %s", (payload,))
        return int((cursor.fetchone() or (0,))[0])


def prometheus(path: str, **query: str) -> dict:
    """Return the data of an answer of Prometheus's HTTP API."""
    text = get(os.environ["VERIFY_PROMETHEUS"], f"/api/v1/{path}?{urllib.parse.urlencode(query)}")
    return json.loads(text)["data"]


def seen() -> float:
    """Return how many received messages Prometheus knows of."""
    result = prometheus("query", query="sum(mqtt_messages_total)")["result"]
    return float(result[0]["value"][1]) if result else 0.0


def main() -> None:
    """Take the steps, one after the other."""
    other_accounts()
    settings = load()
    payload = f"verify:{secrets.token_hex(10)}".encode()
    before, _ = counts()

    topic = publish(settings, payload)
    print(f"published {payload.decode()} to {topic}")

    eventually(
        lambda: rows(settings, payload) > 0,
        "the message is not in the table; see /health of the collector",
    )
    found = rows(settings, payload)
    if found != 1:
        sys.exit(f"verify: the message is in the table {found} times")
    print("it is in the table, once")

    eventually(
        lambda: counts()[0] > before, "no collector has counted it; was one restarted meanwhile?"
    )
    eventually(
        lambda: counts()[0] == counts()[1],
        "what the collector received and what it accounts for differ",
    )
    print("the collector has counted it and accounts for every message")

    eventually(lambda: seen() > before, "Prometheus has not seen it; see its page /targets")
    print("Prometheus has seen it")

    rules = [rule for group in prometheus("rules")["groups"] for rule in group["rules"]]
    faults = [
        f"{rule['name']}: {rule.get('lastError')}" for rule in rules if rule["health"] == "err"
    ]
    if faults or not rules:
        sys.exit(f"verify: alert rules do not work: {'; '.join(faults) or 'there are none'}")
    print(f"{len(rules)} alert rules are loaded and none fails")


if __name__ == "__main__":
    main()
