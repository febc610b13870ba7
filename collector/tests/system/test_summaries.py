"""The collector updates the summaries."""

from __future__ import annotations

from collections.abc import Callable

from testing.collector import Collector
from testing.mosquitto import Mosquitto
from testing.postgres import Database
from testing.publisher import publish
from testing.service import eventually

SECONDS = {"IOT_SUMMARY_SECONDS": "0.2"}


def test_latest_values_follow_the_messages(
    make_collector: Callable[..., Collector], broker: Mosquitto, database: Database
) -> None:
    collector = make_collector(broker, database, **SECONDS).start().wait_ready()
    publish(broker, [("iot/data", b"t:%d" % n) for n in range(500)])
    eventually(
        lambda: database.query("SELECT value FROM latest") == [(499,)],
        what=f"the latest value is from the last message\n{collector.log()[-2000:]}",
    )
    assert database.query("SELECT topic, messages FROM topics") == [("iot/data", 500)]
    assert database.query("SELECT count, average FROM readings_by_hour") == [(500, 249.5)]
    metrics = collector.metrics()
    assert metrics["db_summaries_behind_seconds"] < 60
    assert metrics["silent_topics"] == 0


def test_messages_are_stored_without_summaries(
    make_collector: Callable[..., Collector], broker: Mosquitto, database: Database
) -> None:
    """The function is missing, which is like a user without EXECUTE on it."""
    database.query("ALTER FUNCTION update_summaries RENAME TO gone")
    collector = make_collector(broker, database, **SECONDS).start().wait_ready()
    eventually(lambda: "summaries are not updated" in collector.log(), what="the log says so")
    publish(broker, [("iot/data", b"t:1")])
    collector.wait_settled(1)
    assert collector.get("/health").status == 200
    # It grows, so that the alert SummariesBehind fires.
    behind = collector.metrics()["db_summaries_behind_seconds"]
    assert behind > 0
    eventually(
        lambda: collector.metrics()["db_summaries_behind_seconds"] > behind,
        what="the metric grows while updates fail",
    )
