"""Prometheus metrics of the collector, in prometheus_client's default registry."""

import time
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import (
    REGISTRY,
    Counter,
    Gauge,
    Histogram,
    Info,
    core,
    disable_created_metrics,
)

from . import __version__
from .buffer import Buffer
from .dead_letters import REFUSED_TWICE
from .partitions import PartitionTimes

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
_ROWS = (1, 5, 10, 50, 100, 500, 1_000, 2_500, 5_000, 10_000)

disable_created_metrics()


class WeightedHistogram:
    """A histogram that adds equal observations at once: all messages of a read have one delay."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int) -> None:
        """Add ``count`` observations of ``value``; not thread-safe."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def family(self, name: str, documentation: str) -> core.Metric:
        """Return the histogram as a metric for the registry."""
        bounds = [*map(str, self._bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        return core.HistogramMetricFamily(name, documentation, buckets, self._sum)


class Metrics:
    """All metrics; the counts of messages come from the buffer, as one consistent snapshot."""

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer
        self.message_delay = WeightedHistogram(_SECONDS)
        self.flush_seconds = Histogram(
            "db_flush_seconds", "Time to store a batch, retries included", buckets=_SECONDS
        )
        self.batch_rows = Histogram("db_batch_rows", "Messages in a batch", buckets=_ROWS)
        self.db_errors = Counter("db_errors", "Failed database operations, by kind", ["kind"])
        self.mqtt_errors = Counter("mqtt_errors", "Failed connections to the broker", ["kind"])
        # Make these series exist at 0: increase() does not count the first value of a new series.
        self.db_errors.labels("bug")
        for kind in ("bug", "connection"):
            self.mqtt_errors.labels(kind)
        self.mqtt_connected = Gauge("mqtt_connected", "1 when connected and subscribed")
        self.mqtt_waiting = Gauge(
            "mqtt_waiting", "1 while waiting for another collector to change its subscriptions"
        )
        self.mqtt_reconnects = Counter(
            "mqtt_reconnects", "Connections to the broker after the first"
        )
        Info("build", "Version of the collector").info({"version": __version__})
        self.partition_times: PartitionTimes | None = None  # not known yet
        # Monotonic time until which all messages are in the summaries; None: no updates.
        self.summarized_until: float | None = None
        self.silent_topics: int | None = None
        REGISTRY.register(self)

    def collect(self) -> Iterator[core.Metric]:
        """Yield the metrics that are computed for each scrape (a method of the registry's API)."""
        counts, age = self._buffer.counts(), self._buffer.oldest_age()
        counter, gauge = core.CounterMetricFamily, core.GaugeMetricFamily
        yield counter("mqtt_messages", "Messages received from the broker", counts.received)
        yield counter("db_inserts", "Messages stored", counts.inserted)
        yield counter("db_duplicates", "Messages sent again, not stored again", counts.duplicates)
        refused = counter("db_dead_letters", "Messages the database refused", labels=["reason"])
        # Starts at 0, as above, because an alert uses its increase.
        for reason, count in ({REFUSED_TWICE: 0} | counts.dead_letters).items():
            refused.add_metric([reason], count)
        yield refused
        yield gauge("messages_in_flight", "Messages waiting for their COMMIT", counts.in_flight)
        yield gauge("oldest_unacked_message_seconds", "Age of the oldest uncommitted message", age)
        delay = "Time from receipt of a message to its COMMIT"
        yield self.message_delay.family("message_delay_seconds", delay)
        if (times := self.partition_times) is not None:
            text = "Unix time until which every month has a partition"
            yield gauge("db_partitions_until_timestamp_seconds", text, times.until)
            text = "Unix time when the next partition is due for archiving; +Inf: never"
            yield gauge("db_partition_due_timestamp_seconds", text, times.due)
        if self.summarized_until is not None:
            # Computed here, so that it grows while updates fail or hang.
            text = "Seconds that the summaries are behind the messages"
            behind = time.monotonic() - self.summarized_until
            yield gauge("db_summaries_behind_seconds", text, behind)
        if self.silent_topics is not None:
            text = "Topics that have sent nothing for ten times their usual interval"
            yield gauge("silent_topics", text, self.silent_topics)
