"""The $SYS topics of Mosquitto become metrics of the collector."""

from collections.abc import Callable

from testing.collector import Collector, Metrics
from testing.mosquitto import NO_LIMITS, DynamicSecurity, Mosquitto
from testing.postgres import Database
from testing.publisher import publish
from testing.service import eventually

MakeCollector = Callable[..., Collector]
MakeBroker = Callable[..., Mosquitto]

DROPPED = "mqtt_broker_messages_dropped_total"
CONNECTED = "mqtt_broker_metrics_connected"


def broker_metrics(collector: Collector) -> Metrics:
    return {
        name: value
        for name, value in collector.metrics().items()
        if name.startswith("mqtt_broker_") and name != CONNECTED
    }


def test_metrics_follow_the_broker(
    make_collector: MakeCollector, make_broker: MakeBroker, database: Database
) -> None:
    limits = ("max_queued_messages 10", "max_inflight_messages 5", "log_type all")
    broker = make_broker("sys_interval 1", limits=limits).start()
    away = make_collector(broker, database, IOT_MQTT_CLIENT_ID="away").start()
    away.stop()
    collector = make_collector(broker, database, IOT_BROKER_METRICS="true").start()
    publish(broker, [("iot/data", b"n:%d" % i) for i in range(40)])

    def complete_metrics() -> Metrics | None:
        found = broker_metrics(collector)
        return found if found.get(DROPPED) and found["mqtt_broker_uptime_seconds"] else None

    found = eventually(complete_metrics, what="the broker drops messages of a full queue")
    assert found[DROPPED] >= 40 - 15  # from the full queue of the session `away`
    assert found["mqtt_broker_messages_received_total"] == 40
    assert found["mqtt_broker_messages_sent_total"] >= 40
    assert found['mqtt_broker_clients{state="disconnected"}'] == 1
    assert found['mqtt_broker_clients{state="connected"}'] >= 2
    assert found["mqtt_broker_subscriptions"] >= 3
    assert found["mqtt_broker_heap_maximum_bytes"] >= found["mqtt_broker_heap_bytes"] > 0
    (info,) = (name for name in found if name.startswith("mqtt_broker_info{"))
    assert 'version="2.' in info
    at_least = {
        *("mqtt_broker_received_bytes_total", "mqtt_broker_sent_bytes_total"),
        *("mqtt_broker_stored_messages", "mqtt_broker_stored_bytes"),
        *("mqtt_broker_retained_messages", "mqtt_broker_shared_subscriptions"),
        "mqtt_broker_clients_expired_total",
    }
    assert at_least <= found.keys()
    # The connection for metrics has no persistent session.
    assert database.query("SELECT client_id FROM sessions ORDER BY 1") == [
        ("away",),
        ("collector",),
    ]

    # Without a broker there are no broker metrics.
    broker.stop()
    eventually(lambda: not broker_metrics(collector), what="the metrics are gone")
    assert collector.metrics()[CONNECTED] == 0
    broker.start()
    eventually(lambda: broker_metrics(collector), what="the metrics are back")
    assert collector.metrics()[CONNECTED] == 1
    assert collector.stop() == 0


def test_only_the_refused_topic_is_missing(
    make_collector: MakeCollector, make_broker: MakeBroker, database: Database, tmp_path: object
) -> None:
    broker = make_broker("sys_interval 1", limits=NO_LIMITS)
    security = DynamicSecurity(broker.folder, "$SYS/broker/uptime")
    with broker.config.open("a") as config:
        config.write("\n".join([*security.settings, ""]))
    broker.start()
    collector = make_collector(broker, database, IOT_BROKER_METRICS="true").start()
    found = eventually(lambda: broker_metrics(collector), what="there are metrics")
    eventually(lambda: DROPPED in broker_metrics(collector), what="the other metrics arrive")
    assert "mqtt_broker_uptime_seconds" not in found
    (warning,) = (
        event for event in collector.events() if "refused subscriptions" in event["event"]
    )
    assert warning["topics"] == ["$SYS/broker/uptime"]
    assert collector.health()["problems"] == []


def test_messages_are_stored_without_permission_to_read_sys_topics(
    make_collector: MakeCollector, make_broker: MakeBroker, database: Database
) -> None:
    """There are no broker metrics, and the collector is healthy."""
    broker = make_broker("sys_interval 1", limits=NO_LIMITS)
    acl = broker.folder / "acl"
    acl.write_text("topic readwrite #\n")
    with broker.config.open("a") as config:
        config.write(f"acl_file {acl}\n")
    broker.start()
    collector = make_collector(broker, database, IOT_BROKER_METRICS="true").start()
    eventually(lambda: collector.metrics()[CONNECTED] == 1, what="it is connected")
    publish(broker, [("iot/data", b"n:1")])
    collector.wait_settled(1)
    assert broker_metrics(collector) == {}
    assert collector.status("/health") == 200


def test_broker_metrics_are_off_by_default(collector: Collector) -> None:
    assert not any(name.startswith("mqtt_broker") for name in collector.metrics())
