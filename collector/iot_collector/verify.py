"""Follows one message through the running system, to prove that all of it works.

The message is published as by a device. It must be in the table exactly once, be counted by the
collector, and be seen by Prometheus. The settings say where broker and database are. The broker
must allow its user to publish, and the database role must be allowed to read.
"""

import json
import re
import secrets
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from prometheus_client.parser import text_string_to_metric_families

from .connection import set_up_transport
from .database import connect
from .settings import Settings

# Prometheus scrapes every 15 s, and the collector takes less than that to restart.
_TIMEOUT = 60.0
# Every received message is counted in exactly one of these.
_ACCOUNTED = {
    "db_inserts_total",
    "db_duplicates_total",
    "db_dead_letters_total",
    "messages_in_flight",
}


class VerificationError(Exception):
    """A step failed; the text says which, and where to look."""


def verify(
    settings: Settings, collector: str, prometheus: str, published: str | None = None
) -> Iterator[str]:
    """Yield a line for each step that succeeded.

    :param collector: ``host:port`` of the collector; a name may stand for several pods.
    :param prometheus: ``host:port`` of Prometheus.
    :param published: payload of a message that somebody else has published; None: publish one.
    :raises VerificationError: a step failed, or did not succeed within a minute.
    """
    try:
        before, _ = _message_counts(collector)
    except OSError as error:
        raise VerificationError(f"the collector at {collector} does not answer: {error}") from error

    if published is None:
        payload = f"verify:{secrets.token_hex(10)}".encode()
        topic = _publish(settings, payload)
        yield f"published {payload.decode()} to {topic}"
    else:
        # It may have been counted before our first look at the counts.
        payload, before = published.encode(), 0.0

    _wait_until(
        lambda: _count_rows(settings, payload) > 0,
        "the message is not in the table; see /health of the collector",
    )
    rows = _count_rows(settings, payload)
    if rows != 1:
        raise VerificationError(f"the message is in the table {rows} times")
    yield "it is in the table, once"

    _wait_until(
        lambda: _message_counts(collector)[0] > before,
        "no collector has counted it; was one restarted meanwhile?",
    )
    _wait_until(
        lambda: len({*_message_counts(collector)}) == 1,
        "the collector does not account for every message that it received",
    )
    yield "the collector has counted it and accounts for every message"

    if published is not None:  # it is in the table, so it is counted in this number
        before = _message_counts(collector)[0] - 1
    _wait_until(
        lambda: _scraped_count(prometheus) > before,
        "Prometheus has not seen it; see its page /targets",
    )
    yield "Prometheus has seen it"

    groups = _query(prometheus, "rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    faults = [f"{r['name']}: {r.get('lastError')}" for r in rules if r["health"] == "err"]
    if faults or not rules:
        raise VerificationError(f"alert rules do not work: {'; '.join(faults) or 'there are none'}")
    yield f"{len(rules)} alert rules are loaded and none fails"


def _wait_until(condition: Callable[[], bool], fault: str) -> None:
    deadline = time.monotonic() + _TIMEOUT
    reason = ""
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except OSError as error:
            reason = f" ({error})"
        time.sleep(0.5)
    raise VerificationError(f"{fault}{reason}")


def _publish(settings: Settings, payload: bytes) -> str:
    """Publish a message at QoS 1 to a topic that the collector stores; return the topic."""
    topic = re.sub(r"[+#]", "verify", re.sub(r"^\$share/[^/]*/", "", settings.mqtt_topics[0]))
    broker = settings.broker
    client = Client(
        CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5, transport=broker.transport
    )
    set_up_transport(client, settings)
    try:
        client.connect(broker.host, broker.port)
    except OSError as error:
        raise VerificationError(f"cannot connect to the broker {broker}: {error}") from error
    client.loop_start()
    try:
        info = client.publish(topic, payload, qos=1)
        info.wait_for_publish(_TIMEOUT)
    except RuntimeError as error:
        raise VerificationError(f"cannot publish to the broker {broker}: {error}") from error
    finally:
        client.disconnect()
        client.loop_stop()
    if not info.is_published():
        raise VerificationError(f"the broker {broker} has not acknowledged the message to {topic}")
    return topic


def _count_rows(settings: Settings, payload: bytes) -> int:
    with closing(connect(settings)) as connection, connection.cursor() as cursor:
        # Only the last hour: there is no index on the payload, and reading a table of years would
        # take longer than the reader's statement_timeout.
        cursor.execute(
            "SELECT count(*) FROM messages"
            " WHERE payload = %s AND received_at > now() - interval '1 hour'",
            (payload,),
        )
        return int((cursor.fetchone() or (0,))[0])


def _message_counts(collector: str) -> tuple[float, float]:
    """Return how many messages all collectors have received, and how many they account for.

    :raises OSError: one of them cannot be reached.
    """
    host, _, port = collector.rpartition(":")
    found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    received = accounted = 0.0
    for ip in sorted({str(address[0]) for *_, address in found}):
        where = f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"
        for family in text_string_to_metric_families(_get(where, "/metrics").decode()):
            for sample in family.samples:
                received += sample.value if sample.name == "mqtt_messages_total" else 0
                accounted += sample.value if sample.name in _ACCOUNTED else 0
    return received, accounted


def _scraped_count(prometheus: str) -> float:
    """Return how many received messages Prometheus knows of."""
    result = _query(prometheus, "query", query="sum(mqtt_messages_total)")["result"]
    return float(result[0]["value"][1]) if result else 0.0


def _query(prometheus: str, path: str, **parameters: str) -> dict[str, Any]:
    """Return the ``data`` of a response of the HTTP API of Prometheus."""
    answer = _get(prometheus, f"/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
    data: dict[str, Any] = json.loads(answer)["data"]
    return data


def _get(address: str, path: str) -> bytes:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
        body: bytes = answer.read()
        return body
