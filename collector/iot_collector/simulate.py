"""Simulated devices that publish, for a first try, for tests and for load tests."""

import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import click
import orjson
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from .connection import set_up_transport
from .settings import Settings

# Un-acknowledged messages per connection: enough for full speed, few enough for any broker.
_WINDOW = 1_000
_TIMEOUT = 30.0  # seconds to wait for the connection, and for the last acknowledgements

_GARBAGE = (b"", b"temperature:", b":5", b"\xff\xfe\x00", b'{"a":', b"NaN", b'{"a":NaN}', b"[" * 99)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to publish; ``rate`` in messages per second, ``duration`` in seconds, None: no limit."""

    devices: int = 5
    rate: float | None = None
    count: int | None = None
    duration: float | None = None
    topic: str = "iot/data"
    payload: str = "text"
    qos: int = 1
    connections: int = 1
    seed: int = 1


def messages(plan: Plan) -> Iterator[tuple[str, bytes]]:
    """Yield (topic, payload) of messages without end, one device after the other."""
    rng = random.Random(plan.seed)  # noqa: S311
    shapes = ["text", "json", "garbage"] if plan.payload == "mix" else [plan.payload]
    sequence = 0
    while True:
        for number in range(plan.devices):
            device = f"device-{number:04d}"
            payload = _payload(shapes[sequence % len(shapes)], device, sequence, rng)
            yield plan.topic.replace("{device}", device), payload
            sequence += 1


def _payload(shape: str, device: str, sequence: int, rng: random.Random) -> bytes:
    temperature = round(rng.gauss(21, 2), 1)
    if shape == "text":
        return f"temperature:{temperature}".encode()
    if shape == "json":
        reading = {
            "device": device,
            "seq": sequence,
            "temperature": temperature,
            "humidity": round(rng.uniform(30, 70), 1),
            "battery": round(rng.uniform(3.3, 4.2), 2),
        }
        return orjson.dumps(reading)
    return rng.choice(_GARBAGE)


class Publisher:
    """One connection with a bounded number of un-acknowledged messages."""

    def __init__(self, settings: Settings, name: str) -> None:
        self.acknowledged = 0
        self.refused: dict[str, int] = {}
        self.error: str | None = None
        self._room = threading.Semaphore(_WINDOW)
        self._connected = threading.Event()
        broker = settings.broker
        self._client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=name,
            protocol=MQTTProtocolVersion.MQTTv5,
            transport=broker.transport,
        )
        self._client.max_inflight_messages_set(_WINDOW)
        self._client.on_connect = self._on_connect
        self._client.on_publish = self._on_publish
        set_up_transport(self._client, settings)
        self._client.connect(broker.host, broker.port, keepalive=30)
        self._client.loop_start()

    def wait_connected(self) -> str | None:
        """Wait for the broker's answer; return why it refused the connection, or None."""
        if not self._connected.wait(_TIMEOUT):
            return "no answer from the broker"
        return self.error

    def publish(self, topic: str, payload: bytes, qos: int, deadline: float) -> bool:
        """Publish as soon as the window has room; return False if it has none by the deadline."""
        if not self._room.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return False
        self._client.publish(topic, payload, qos)
        return True

    def finish(self, published: int, deadline: float) -> None:
        """Wait for the outstanding acknowledgements, then disconnect."""
        while self.answered < published and time.monotonic() < deadline:
            time.sleep(0.01)
        self._client.disconnect()
        self._client.loop_stop()

    @property
    def answered(self) -> int:
        """How many messages the broker has acknowledged or refused."""
        return self.acknowledged + sum(self.refused.values())

    def _on_connect(
        self, _c: Client, _u: object, _f: object, reason: ReasonCode, _p: Properties | None
    ) -> None:
        self.error = str(reason) if reason.is_failure else None
        self._connected.set()

    def _on_publish(
        self, _c: Client, _u: object, _mid: int, reason: ReasonCode, _p: Properties
    ) -> None:
        if reason.is_failure:
            self.refused[str(reason)] = self.refused.get(str(reason), 0) + 1
        else:
            self.acknowledged += 1
        self._room.release()


def simulate(settings: Settings, plan: Plan) -> int:
    """Publish as planned and print the counts; return 0 if all was acknowledged, else 1."""
    name = f"iot-simulator-{random.getrandbits(32):08x}"
    try:
        publishers = [Publisher(settings, f"{name}-{i}") for i in range(plan.connections)]
    except (OSError, ValueError) as error:
        return _give_up(settings, str(error))
    for fault in (publisher.wait_connected() for publisher in publishers):
        if fault is not None:
            return _give_up(settings, fault)
    started = time.monotonic()
    published = [0] * len(publishers)
    try:
        _publish(plan, publishers, published, started)
    except KeyboardInterrupt:
        click.echo("interrupted; waiting for acknowledgements", err=True)
    deadline = time.monotonic() + _TIMEOUT
    for publisher, count in zip(publishers, published, strict=True):
        publisher.finish(count, deadline)
    elapsed = time.monotonic() - started
    acknowledged = sum(publisher.acknowledged for publisher in publishers)
    failed = sum(published) - acknowledged
    click.echo(
        f"published {sum(published)}, acknowledged {acknowledged}, failed {failed} "
        f"in {elapsed:.1f} s ({acknowledged / elapsed:.0f} messages/s)"
    )
    for publisher in publishers:
        for reason, count in publisher.refused.items():
            click.echo(f"refused by the broker: {count} times {reason}", err=True)
    return 1 if failed else 0


def _publish(plan: Plan, publishers: list[Publisher], published: list[int], started: float) -> None:
    end = started + plan.duration if plan.duration is not None else float("inf")
    with _progress_bar(plan) as bar:
        for sequence, (topic, payload) in enumerate(messages(plan)):
            if sequence == plan.count:
                break
            if plan.rate is not None:
                due = started + sequence / plan.rate
                if (wait := min(due, end) - time.monotonic()) > 0:
                    time.sleep(wait)
            if time.monotonic() >= end:
                break
            turn = sequence % len(publishers)
            deadline = min(end, time.monotonic() + _TIMEOUT)
            if not publishers[turn].publish(topic, payload, plan.qos, deadline):
                break
            published[turn] += 1
            if bar is not None:
                bar.update(1)


def _progress_bar(plan: Plan) -> AbstractContextManager[Any]:
    """Return click's progress bar on a terminal if the number of messages is known, else None."""
    if plan.count is None or not sys.stderr.isatty():
        return nullcontext()
    interval = max(1, plan.count // 1000)  # drawing costs more than publishing
    return click.progressbar(
        length=plan.count, label="publishing", file=sys.stderr, update_min_steps=interval
    )


def _give_up(settings: Settings, fault: str) -> int:
    click.echo(f"broker {settings.broker}: {fault}; is it running? See IOT_MQTT_URL", err=True)
    return 1
