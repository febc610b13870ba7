"""Prometheus metrics of one collector process."""

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import prometheus_client as prometheus
from prometheus_client import core

from . import __version__
from .flow import Flow

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
_ROWS = (1, 5, 10, 50, 100, 500, 1_000, 2_500, 5_000, 10_000)


prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]


class WeightedHistogram:
    """A histogram whose observations count many times: all messages of a read share one delay."""

    def __init__(self, name: str, documentation: str, buckets: tuple[float, ...]) -> None:
        self._names = (name, documentation)
        self._bounds = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float, count: int) -> None:
        """Add ``count`` observations of ``value``."""
        with self._lock:
            self._counts[bisect_left(self._bounds, value)] += count
            self._sum += value * count

    def collect(self) -> core.Metric:
        """Return the histogram in the form that the registry exposes."""
        with self._lock:
            bounds = [*map(str, map(float, self._bounds)), "+Inf"]
            buckets = list(zip(bounds, accumulate(self._counts), strict=True))
            return core.HistogramMetricFamily(*self._names, buckets, self._sum)


class Metrics:
    """All metrics; the counts of messages come from the flow, as one consistent snapshot."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self.mqtt_connected: Callable[[], bool] = lambda: False
        self.registry = prometheus.CollectorRegistry()
        here: dict[str, Any] = {"registry": self.registry}
        text = "Time to store a batch, retries included"
        self.flush_seconds = prometheus.Histogram(
            "db_flush_seconds", text, buckets=_SECONDS, **here
        )
        text = "Messages in a batch"
        self.batch_rows = prometheus.Histogram("db_batch_rows", text, buckets=_ROWS, **here)
        text = "Time from receipt of a message to its COMMIT"
        self.message_delay = WeightedHistogram("message_delay_seconds", text, _SECONDS)
        text = "Failed database operations, by kind"
        self.db_errors = prometheus.Counter("db_errors", text, ["kind"], **here)
        text = "Connections to the broker after the first"
        self.mqtt_reconnects = prometheus.Counter("mqtt_reconnects", text, **here)
        prometheus.Info("build", "Version of the collector", **here).info({"version": __version__})
        prometheus.ProcessCollector(**here)
        prometheus.PlatformCollector(**here)
        self.registry.register(self)

    def collect(self) -> Iterator[core.Metric]:
        """Yield the metrics that are read off other objects (Prometheus's collector protocol)."""
        account = self._flow.account()
        counter, gauge = core.CounterMetricFamily, core.GaugeMetricFamily
        yield counter("mqtt_messages", "Messages received from the broker", account.received)
        yield counter("db_inserts", "Messages stored", account.inserted)
        text = "Messages sent again by the broker and not stored again"
        yield counter("db_duplicates", text, account.duplicates)
        text = "Messages the database refused, kept as dead letters"
        refused = counter("db_dead_letters", text, labels=["reason"])
        for reason, count in account.dead_letters.items():
            refused.add_metric([reason], count)
        yield refused
        text = "Messages received and not committed yet"
        yield gauge("messages_in_flight", text, account.in_flight)
        text = "Age of the oldest message not committed yet"
        yield gauge("oldest_unacked_message_seconds", text, self._flow.oldest_age())
        yield gauge("mqtt_connected", "1 when connected and subscribed", self.mqtt_connected())
        yield self.message_delay.collect()
