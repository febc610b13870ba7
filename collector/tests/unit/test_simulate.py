"""``iot-collector simulate``: the messages that it reports as published are stored."""

import json
import re
from collections import Counter
from itertools import islice

import pytest
from iot_collector.simulate import Plan, messages

from testing.collector import Collector, run_command
from testing.mosquitto import Mosquitto
from testing.postgres import Database
from testing.service import HOST, eventually, free_port

_SUMMARY = re.compile(r"published (\d+), acknowledged (\d+), failed (\d+) in ")


def simulate(broker: Mosquitto, *options: str) -> tuple[int, int, int]:
    """Run the command; return the numbers of published, acknowledged and failed messages."""
    done = run_command("simulate", *options, **broker.environment())
    assert done.returncode == 0, done.stderr
    found = _SUMMARY.match(done.stdout)
    assert found, done.stdout
    published, acknowledged, failed = map(int, found.groups())
    return published, acknowledged, failed


@pytest.mark.parametrize("payload", ["text", "json", "garbage", "mix"])
def test_each_kind_of_payload_is_stored(
    payload: str, collector: Collector, broker: Mosquitto, database: Database
) -> None:
    options = ("--count", "300", "--devices", "7", "--payload", payload)
    counts = simulate(broker, *options, "--topic", "plant/{device}/t", "--connections", "3")
    assert counts == (300, 300, 0)
    collector.wait_settled(300)
    rows = database.rows()
    plan = Plan(devices=7, topic="plant/{device}/t", payload=payload)
    planned = list(islice(messages(plan), 300))
    assert Counter((row.topic, row.payload) for row in rows) == Counter(planned)
    assert {row.topic for row in rows} == {f"plant/device-{i:04d}/t" for i in range(7)}
    if payload == "text":
        assert all(set(row.fields) == {"temperature"} for row in rows)
    if payload == "json":
        assert all(row.fields == json.loads(row.payload) for row in rows)
        assert sorted(row.fields["seq"] for row in rows) == list(range(300))
    if payload == "garbage":
        assert {row.fields for row in rows} == {None, "NaN"}, "raw, or text"


@pytest.mark.parametrize("qos", ["0", "2"])
def test_qos_0_and_2_are_published(
    qos: str, collector: Collector, broker: Mosquitto, database: Database
) -> None:
    assert simulate(broker, "--count", "1500", "--qos", qos) == (1500, 1500, 0)
    collector.wait_settled(1500)
    assert database.count() == 1500


def test_duration_and_rate_limit_the_messages(
    collector: Collector, broker: Mosquitto, database: Database
) -> None:
    published, acknowledged, failed = simulate(broker, "--duration", "0.5", "--rate", "200")
    assert (acknowledged, failed) == (published, 0)
    assert 0 < published <= 101, "the rate is not exceeded"
    collector.wait_settled(published)
    assert database.count() == published


def test_same_seed_gives_the_same_messages() -> None:
    def some(seed: int) -> list[tuple[str, bytes]]:
        return [
            m for m, _ in zip(messages(Plan(payload="mix", seed=seed)), range(50), strict=False)
        ]

    assert some(1) == some(1)
    assert some(1) != some(2)


def test_unreachable_broker_is_reported() -> None:
    done = run_command("simulate", "--count", "1", IOT_MQTT_URL=f"mqtt://{HOST}:{free_port()}")
    assert done.returncode == 1
    assert "IOT_MQTT_URL" in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_option_is_reported(broker: Mosquitto) -> None:
    done = run_command("simulate", "--payload", "xml", **broker.environment())
    assert done.returncode == 2
    assert "xml" in done.stderr


def test_command_stops_at_the_count(
    collector: Collector, broker: Mosquitto, database: Database
) -> None:
    assert simulate(broker, "--count", "1") == (1, 1, 0)
    eventually(lambda: database.count() == 1, what="it is stored")
