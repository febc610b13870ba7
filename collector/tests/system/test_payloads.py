"""The readings of payloads that common devices send, and the settings for payloads."""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from testing.collector import Collector
from testing.mosquitto import Mosquitto
from testing.postgres import Database
from testing.publisher import Publisher, publish

ROOT = Path(__file__).parents[3]
CORPUS: list[dict[str, Any]] = yaml.safe_load((ROOT / "collector/tests/payloads.yml").read_text())

MakeCollector = Callable[..., Collector]


class Reading(NamedTuple):
    """The columns of ``readings`` that come from the payload."""

    name: str
    value: float | None
    text: str


def payload_of(shape: dict[str, Any]) -> bytes:
    return bytes.fromhex(shape["hex"]) if "hex" in shape else shape["payload"].encode()


def expected(shape: dict[str, Any]) -> set[Reading]:
    found = set()
    for name, value in shape["readings"].items():
        if isinstance(value, str):
            found.add(Reading(name, None, value))
        else:
            text = str(value).lower() if isinstance(value, bool) else str(value)
            found.add(Reading(name, float(value), text))
    return found


def content_type(name: str) -> Properties:
    properties = Properties(PacketTypes.PUBLISH)
    properties.ContentType = name
    return properties


def test_payloads_of_common_devices_become_readings(
    broker: Mosquitto, database: Database, make_collector: MakeCollector
) -> None:
    collector = make_collector(broker, database, IOT_MQTT_TOPICS="#,$aws/#").start()
    with Publisher(broker) as device:
        for shape in CORPUS:
            named = shape.get("content_type")
            properties = content_type(named) if named else None
            device.publish(shape["topic"], payload_of(shape), properties=properties)
        device.settle()
    collector.wait_settled(len(CORPUS))
    assert database.payloads() == [payload_of(shape) for shape in CORPUS], (
        "payloads are stored unchanged"
    )
    for shape in CORPUS:
        rows = database.query(
            "SELECT name, value::float8, text FROM readings WHERE topic = %s", shape["topic"]
        )
        assert set(map(Reading._make, rows)) == expected(shape), shape["what"]
    queries = re.findall(r"```sql\n(.*?)```", (ROOT / "docs/payloads.md").read_text(), re.DOTALL)
    assert [len(database.query(sql)) for sql in queries] == [1, 1, 1]


def test_binary_topics_select_the_decoder(
    broker: Mosquitto, database: Database, make_collector: MakeCollector
) -> None:
    """For devices with MQTT 3.1.1. With MQTT 5, the content type takes precedence."""
    collector = make_collector(
        broker,
        database,
        IOT_MQTT_TOPICS="#",
        IOT_CBOR_TOPICS="+/cbor",
        IOT_MESSAGEPACK_TOPICS="a/msgpack/#",
        IOT_MESSAGE_ID_KEY="id",
    ).start()
    cbor, again = b"\xa2\x61t\x18\x2a\x62id\x611", b"\xa1\x61t\x18\x2b"
    publish(broker, [("a/cbor", cbor), ("a/cbor", cbor), ("b/cbor", again), ("b/cbor", b"\xff")])
    publish(broker, [("a/msgpack", b"\x81\xa1t\x2c"), ("other", again), ("other", b"on")])
    publish(broker, [("b/cbor", b"\x81\xa1t\x2d")], properties=content_type("application/msgpack"))
    collector.wait_settled(8)
    assert [row.fields for row in database.rows()] == [
        {"t": 42, "id": "1"},
        {"t": 43},
        None,
        {"t": 44},
        None,
        "on",
        {"t": 45},
    ]
    assert collector.metrics()["db_duplicates_total"] == 1, "the message id is read from CBOR"


def test_readings_have_topic_levels_and_device_time(
    broker: Mosquitto, database: Database, make_collector: MakeCollector
) -> None:
    settings = {
        "IOT_MQTT_TOPICS": "#",
        "IOT_TOPIC_TEMPLATES": "plant/{site}/{device}/{channel}, +/{device}/#",
        "IOT_DEVICE_TIME_KEYS": "time:iso8601, data.ts[1]:ms",
    }
    collector = make_collector(broker, database, **settings).start()
    sent = [
        ("plant/north/pump-3/state", b'{"t":1,"time":"2026-11-24T10:00:00+02:00"}'),
        ("plant/north/pump-3", b'{"t":2,"data":{"ts":[0,1795507200000]},"time":"soon"}'),
        ("pump-3", b'{"t":3,"time":"1970-01-01T00:00:12Z"}'),
    ]
    publish(broker, sent)
    collector.wait_settled(len(sent))

    def found() -> list[tuple[Any, ...]]:
        return database.query(
            "SELECT value::integer, levels, device_time FROM readings WHERE name = 't' ORDER BY 1"
        )

    at = datetime(2026, 11, 24, 8, tzinfo=UTC)
    assert found() == [
        (1, {"site": "north", "device": "pump-3", "channel": "state"}, at),
        (2, {"device": "north"}, at),
        (3, None, None),
    ]
    # The device time is used for nothing else.
    assert database.query(
        "SELECT count(*) FROM readings WHERE time > now() - interval '1 minute' AND name = 't'"
    ) == [(3,)]
    collector.stop()
    # The settings of the last start also apply to old messages.
    settings["IOT_TOPIC_TEMPLATES"] = "plant/{site}/#,{device.}"
    failed = make_collector(broker, database, **settings).launch()
    assert failed.wait() == 2
    assert "IOT_TOPIC_TEMPLATES: '{device.}' is not a valid topic level" in failed.log()
    settings |= {"IOT_TOPIC_TEMPLATES": "plant/{site}/#", "IOT_DEVICE_TIME_KEYS": ""}
    make_collector(broker, database, **settings).start()
    assert found() == [(1, {"site": "north"}, None), (2, {"site": "north"}, None), (3, None, None)]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT avg(value) FROM readings WHERE topic = 't' AND name = 'n'"
        " AND time >= '2031-01-01 00:00+00' AND time < '2031-01-08 00:00+00'",
        "SELECT time, value, levels, device_time FROM readings WHERE topic = 't'"
        " AND time >= '2031-01-01 00:00+00' AND time < '2031-02-01 00:00+00'"
        " ORDER BY time DESC LIMIT 1",
    ],
)
def test_queries_of_readings_use_the_index_of_one_partition(sql: str, database: Database) -> None:
    """The newest row is found without a sort."""
    database.query("SELECT ensure_partitions('2031-01-01 00:00+00', 3)")
    database.query(
        "INSERT INTO messages (received_at, topic, payload, fields, qos, retained)"
        " SELECT '2031-01-01 00:00+00'::timestamptz + i * interval '1 min',"
        " CASE WHEN i % 10 = 0 THEN 't' ELSE i::text END, '',"
        " jsonb_build_object('n', i, 'nested', jsonb_build_object('m', i)), 1, false"
        " FROM generate_series(1, 40000) i"
    )
    database.query("ANALYZE messages")
    plan = "\n".join(line for (line,) in database.query(f"EXPLAIN {sql}"))
    assert "messages_2031_01_topic_received_at_idx" in plan
    assert "messages_2031_02" not in plan
    assert "Sort Key: m.received_at" not in plan
    assert "Seq Scan on messages" not in plan
    assert "JIT" not in plan
