"""Devices: MQTT clients that publish and record the acknowledged messages."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, Self

from paho.mqtt.client import Client, ConnectFlags
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from .service import HOST, PATIENCE, eventually


class Broker(Protocol):
    """Where to publish: a broker on 127.0.0.1."""

    port: int


@dataclass
class Publisher:
    """A device: an MQTT client that records the messages that the broker has acknowledged.

    It reconnects and sends again, as paho does, when the broker goes away.
    """

    broker: Broker
    username: str | None = None
    password: str | None = None
    acknowledged: set[bytes] = field(default_factory=set)

    def __enter__(self) -> Self:
        self._payloads: dict[int, bytes] = {}
        self._sent = 0
        self._answers: list[int] = []
        self._connected = threading.Event()
        self._client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self._client.max_inflight_messages_set(200)
        self._client.reconnect_delay_set(1, 1)
        self._client.username_pw_set(self.username, self.password)
        self._client.on_connect = self._on_connect
        self._client.on_publish = self._on_publish
        self._client.connect(HOST, self.broker.port)
        self._client.loop_start()
        assert self._connected.wait(PATIENCE), "the broker does not let the publisher in"
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        properties: Properties | None = None,
    ) -> None:
        """Publish without waiting."""
        info = self._client.publish(topic, payload, qos, retain, properties)
        self._payloads[info.mid] = payload
        self._sent += 1

    def settle(self, timeout: float = PATIENCE) -> set[bytes]:
        """Wait for all acknowledgements; return the payloads that were acknowledged."""
        eventually(lambda: len(self._answers) >= self._sent, timeout, "all is acknowledged")
        self.acknowledged |= {self._payloads[mid] for mid in self._answers}
        self._payloads, self._answers, self._sent = {}, [], 0
        return self.acknowledged

    def _on_connect(
        self, _c: Client, _u: object, _f: ConnectFlags, reason: ReasonCode, _p: Properties | None
    ) -> None:
        if not reason.is_failure:
            self._connected.set()

    def _on_publish(
        self, _c: Client, _u: object, mid: int, reason: ReasonCode, _p: Properties
    ) -> None:
        assert not reason.is_failure, f"the broker refused a message: {reason}"
        self._answers.append(mid)


def publish(
    broker: Broker,
    messages: Iterable[tuple[str, bytes]],
    *,
    qos: int = 1,
    retain: bool = False,
    properties: Properties | None = None,
    username: str | None = None,
    password: str | None = None,
) -> set[bytes]:
    """Publish (topic, payload) pairs; return the payloads that the broker acknowledged."""
    with Publisher(broker, username, password) as publisher:
        for topic, payload in messages:
            publisher.publish(topic, payload, qos=qos, retain=retain, properties=properties)
        return publisher.settle()


class Stream:
    """A device that publishes numbered messages in the background until the block ends."""

    def __init__(
        self,
        broker: Broker,
        topic: str = "iot/data",
        every: float = 0.002,
        message: bytes = b"n:%d",
    ) -> None:
        self._publisher = Publisher(broker)
        self._topic, self._message = topic, message
        self._every = every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.sent = 0

    def __enter__(self) -> Self:
        self._publisher.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()
        self._publisher.__exit__()

    def finish(self) -> set[bytes]:
        """Stop; return the payloads that the broker acknowledged."""
        self._stop.set()
        self._thread.join(PATIENCE)
        return self._publisher.settle()

    def more(self, count: int = 50) -> None:
        """Wait until ``count`` more messages have been sent."""
        goal = self.sent + count
        eventually(lambda: self.sent >= goal, what=f"{count} more messages are sent")

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            self._publisher.publish(self._topic, self._message % self.sent)
            self.sent += 1
