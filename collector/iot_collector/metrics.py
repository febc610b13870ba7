"""Prometheus metrics of one collector process."""

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from . import __version__
from .flow import Flow

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
_ROWS = (1, 5, 10, 50, 100, 500, 1_000, 2_500, 5_000, 10_000)


disable_created_metrics()  # type: ignore[no-untyped-call]


class WeightedHistogram:
    """A histogram whose observations count many times: all messages of a read share one delay."""

    def __init__(self, name: str, documentation: str, buckets: tuple[float, ...]) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float, count: int) -> None:
        """Add ``count`` observations of ``value``."""
        with self._lock:
            self._counts[bisect_left(self._bounds, value)] += count
            self._sum += value * count

    def collect(self) -> Metric:
        """Return the histogram in the form that the registry exposes."""
        with self._lock:
            bounds = [*map(str, map(float, self._bounds)), "+Inf"]
            buckets = list(zip(bounds, accumulate(self._counts), strict=True))
            return HistogramMetricFamily(self._name, self._documentation, buckets, self._sum)


class Metrics:
    """All metrics; the counts of messages come from the flow, as one consistent snapshot."""

    def __init__(self, flow: Flow) -> None:
        self.registry = CollectorRegistry()
        self._flow = flow
        self.mqtt_connected: Callable[[], bool] = lambda: False
        self.flush_seconds = Histogram(
            "db_flush_seconds",
            "Time to store a batch, retries included",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch_rows = Histogram(
            "db_batch_rows", "Messages in a batch", buckets=_ROWS, registry=self.registry
        )
        self.message_delay = WeightedHistogram(
            "message_delay_seconds", "Time from receipt of a message to its COMMIT", _SECONDS
        )
        self.db_errors = Counter(
            "db_errors", "Failed database operations, by kind", ["kind"], registry=self.registry
        )
        self.mqtt_reconnects = Counter(
            "mqtt_reconnects", "Connections to the broker after the first", registry=self.registry
        )
        Info("build", "Version of the collector", registry=self.registry).info(
            {"version": __version__}
        )
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics that are read off other objects (Prometheus's collector protocol)."""
        account = self._flow.account()
        yield CounterMetricFamily(
            "mqtt_messages", "Messages received from the broker", account.received
        )
        yield CounterMetricFamily("db_inserts", "Messages stored", account.inserted)
        yield CounterMetricFamily(
            "db_duplicates", "Messages sent again by the broker and not stored again",
            account.duplicates,
        )  # fmt: skip
        dead_letters = CounterMetricFamily(
            "db_dead_letters", "Messages the database refused, kept as dead letters",
            labels=["reason"],
        )  # fmt: skip
        for reason, count in account.dead_letters.items():
            dead_letters.add_metric([reason], count)
        yield dead_letters
        yield GaugeMetricFamily(
            "messages_in_flight", "Messages received and not committed yet", account.in_flight
        )
        yield GaugeMetricFamily(
            "oldest_unacked_message_seconds",
            "Age of the oldest message not committed yet",
            self._flow.oldest_age(),
        )
        yield GaugeMetricFamily(
            "mqtt_connected", "1 when connected and subscribed", self.mqtt_connected()
        )
        yield self.message_delay.collect()
