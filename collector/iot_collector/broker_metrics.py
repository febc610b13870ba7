"""Metrics of the broker, from the topics that Mosquitto publishes below ``$SYS/broker/``.

A separate connection receives them, with QoS 0 and a session that ends with the connection. This
module therefore never delays, stores or acknowledges a message. A failure shows only in
``mqtt_broker_metrics_connected`` and in the log.

The topics are those of mosquitto(8) and of Mosquitto 2.0.21. A metric exists once the broker has
published its topic. Without a connection there are no metrics of the broker.
"""

import random
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import structlog
from paho.mqtt.client import (
    Client,
    ConnectFlags,
    DisconnectFlags,
    MQTTMessage,
    MQTTv5,
    MQTTv311,
)
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from prometheus_client import REGISTRY, core

from .connection import set_up_transport
from .log import one_line
from .network import backoff
from .settings import Settings

log = structlog.get_logger(__name__)

PREFIX = "$SYS/broker/"
_VERSION = "version"  # the only topic without a number: "mosquitto version 2.0.21"
_STABLE_AFTER = 10.0  # seconds; a connection that lasted longer resets the backoff
_STOP_SECONDS = 2.0  # longest wait for the thread to end


class Topic(NamedTuple):
    """A topic below ``PREFIX``, and its metric."""

    topic: str
    metric: str
    documentation: str
    counter: bool = False
    state: str = ""  # value of the label ``state``; empty: the metric has no labels


TOPICS = (
    Topic("uptime", "mqtt_broker_uptime_seconds", "Time since the broker started"),
    Topic("clients/connected", "mqtt_broker_clients", "Clients with a session", state="connected"),
    Topic(
        "clients/disconnected",
        "mqtt_broker_clients",
        "Clients with a session",
        state="disconnected",
    ),
    Topic(
        "clients/expired",
        "mqtt_broker_clients_expired",
        "Sessions that the broker deleted because their client was away too long",
        counter=True,
    ),
    Topic(
        "publish/messages/received",
        "mqtt_broker_messages_received",
        "PUBLISH packets that the broker received",
        counter=True,
    ),
    Topic(
        "publish/messages/sent",
        "mqtt_broker_messages_sent",
        "PUBLISH packets that the broker sent",
        counter=True,
    ),
    Topic(
        "publish/messages/dropped",
        "mqtt_broker_messages_dropped",
        "Messages that the broker dropped because a client's queue was full",
        counter=True,
    ),
    Topic(
        "store/messages/count",
        "mqtt_broker_stored_messages",
        "Messages in the broker's memory: queued, in flight and retained",
    ),
    Topic(
        "store/messages/bytes",
        "mqtt_broker_stored_bytes",
        "Payload bytes of the messages in the broker's memory",
    ),
    Topic(
        "retained messages/count",
        "mqtt_broker_retained_messages",
        "Retained messages, including those below $SYS",
    ),
    Topic("subscriptions/count", "mqtt_broker_subscriptions", "Subscriptions of all clients"),
    Topic("shared_subscriptions/count", "mqtt_broker_shared_subscriptions", "Shared subscriptions"),
    Topic(
        "bytes/received",
        "mqtt_broker_received_bytes",
        "Bytes of all packets that the broker received",
        counter=True,
    ),
    Topic(
        "bytes/sent",
        "mqtt_broker_sent_bytes",
        "Bytes of all packets that the broker sent",
        counter=True,
    ),
    Topic("heap/current", "mqtt_broker_heap_bytes", "Memory that the broker has allocated"),
    Topic(
        "heap/maximum",
        "mqtt_broker_heap_maximum_bytes",
        "Most memory that the broker has had allocated since it started",
    ),
)
_FILTERS = [(PREFIX + topic, 0) for topic in (_VERSION, *(t.topic for t in TOPICS))]


class BrokerMetricsThread(threading.Thread):
    """Keeps the last value of each topic for Prometheus; registers itself with the registry."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(name="broker-metrics", daemon=True)
        self._settings = settings
        self._stopping = threading.Event()
        self._client: Client | None = None
        self._connected = False
        self._error: str | None = None
        self._values: dict[str, float] = {}
        self._version: str | None = None
        REGISTRY.register(self)

    @property
    def client_id(self) -> str:
        """The client id of this connection, different for each collector."""
        return f"{self._settings.mqtt_client_id}-metrics"

    def collect(self) -> Iterator[core.Metric]:
        """Yield the metrics for a scrape (a method of the registry's API)."""
        text = "1 while the connection that receives the broker's metrics is up"
        yield core.GaugeMetricFamily("mqtt_broker_metrics_connected", text, self._connected)
        if (version := self._version) is not None:
            info = core.InfoMetricFamily("mqtt_broker", "The broker's version")
            info.add_metric([], {"version": version})
            yield info
        values = self._values.copy()  # `run` changes them in another thread
        families: dict[str, core.CounterMetricFamily | core.GaugeMetricFamily] = {}
        for topic in TOPICS:
            if topic.topic not in values:
                continue
            if topic.metric not in families:
                kind = core.CounterMetricFamily if topic.counter else core.GaugeMetricFamily
                labels = ["state"] if topic.state else []
                families[topic.metric] = kind(topic.metric, topic.documentation, labels=labels)
            labels = [topic.state] if topic.state else []
            families[topic.metric].add_metric(labels, values[topic.topic])
        yield from families.values()

    def run(self) -> None:
        """Connect, and reconnect after each failure, until `stop` is called."""
        failures = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            self._error = None
            try:
                self._serve()
            except Exception as error:  # noqa: BLE001  # the next attempt may succeed
                self._error = f"{type(error).__name__}: {one_line(error)}"
            self._connected = False
            self._values, self._version = {}, None  # outdated without a connection
            if self._stopping.is_set():
                return
            failures = 0 if time.monotonic() - started > _STABLE_AFTER else failures + 1
            wait = random.uniform(0, backoff(failures))  # noqa: S311
            log.warning(
                "no connection for the metrics of the broker, will retry",
                broker=str(self._settings.broker),
                error=self._error or "connection ended",
                seconds=round(wait, 2),
            )
            self._stopping.wait(wait)

    def stop(self) -> None:
        """Disconnect, and end the thread."""
        self._stopping.set()
        if self._client is not None:
            self._client.disconnect()
        self.join(_STOP_SECONDS)

    def _serve(self) -> None:
        """Open a connection and receive until it ends."""
        settings, broker = self._settings, self._settings.broker
        newest = settings.mqtt_version == "5"
        # A new client for each connection, so that the credential files are read again.
        self._client = client = Client(
            CallbackAPIVersion.VERSION2,
            self.client_id,
            clean_session=None if newest else True,
            protocol=MQTTv5 if newest else MQTTv311,
            transport=broker.transport,
            reconnect_on_failure=False,
        )
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        client.on_disconnect = self._on_disconnect
        set_up_transport(client, settings)
        client.connect(broker.host, broker.port, settings.mqtt_keepalive_seconds)
        if self._stopping.is_set():
            client.disconnect()
        client.loop_forever()

    def _on_connect(
        self,
        client: Client,
        _userdata: object,
        _flags: ConnectFlags,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        if reason.is_failure:
            self._error = f"broker refused the connection: {reason}"
            return
        client.subscribe(_FILTERS)

    def _on_subscribe(
        self,
        _client: Client,
        _userdata: object,
        _mid: int,
        reasons: list[ReasonCode],
        _properties: Properties | None,
    ) -> None:
        refused = [
            topic
            for (topic, _), reason in zip(_FILTERS, reasons, strict=False)
            if reason.is_failure
        ]
        if refused:
            log.warning("broker refused subscriptions to its metrics", topics=refused)
        self._connected = True
        log.info("connected to broker for its metrics", client_id=self.client_id)

    def _on_disconnect(
        self,
        _client: Client,
        _userdata: object,
        _flags: DisconnectFlags,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        self._error = self._error or f"connection ended: {reason}"

    def _on_message(self, _client: Client, _userdata: object, message: MQTTMessage) -> None:
        topic = message.topic.removeprefix(PREFIX)
        words = message.payload.decode("utf-8", "replace").split()
        if topic == _VERSION:
            self._version = words[-1] if words else None
            return
        try:
            self._values[topic] = float(words[0])  # "123 seconds"
        except (IndexError, ValueError):
            log.warning("the value of a $SYS topic is not a number", topic=message.topic)
            self._values.pop(topic, None)
