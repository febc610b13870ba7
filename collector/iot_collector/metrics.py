"""Prometheus metrics of the collector, in prometheus_client's own registry."""

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
from .dead_letters import REFUSED_TWICE
from .flow import Flow

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
_ROWS = (1, 5, 10, 50, 100, 500, 1_000, 2_500, 5_000, 10_000)

disable_created_metrics()  # type: ignore[no-untyped-call]


class WeightedHistogram:
    """A histogram whose observations count many times: all messages of a read share one delay."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int) -> None:
        """Add ``count`` observations of ``value``; one thread only."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def family(self, name: str, documentation: str) -> core.Metric:
        """Return the histogram in the form that the registry exposes."""
        bounds = [*map(str, self._bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        return core.HistogramMetricFamily(name, documentation, buckets, self._sum)


class Metrics:
    """All metrics; the counts of messages come from the flow, as one consistent snapshot."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self.message_delay = WeightedHistogram(_SECONDS)
        self.flush_seconds = Histogram(
            "db_flush_seconds", "Time to store a batch, retries included", buckets=_SECONDS
        )
        self.batch_rows = Histogram("db_batch_rows", "Messages in a batch", buckets=_ROWS)
        self.db_errors = Counter("db_errors", "Failed database operations, by kind", ["kind"])
        self.mqtt_errors = Counter("mqtt_errors", "Failed connections to the broker", ["kind"])
        # From the start, because Prometheus sees no increase in a series that begins with 1.
        self.db_errors.labels("bug")
        for kind in ("bug", "connection"):
            self.mqtt_errors.labels(kind)
        self.mqtt_connected = Gauge("mqtt_connected", "1 when connected and subscribed")
        self.mqtt_reconnects = Counter("mqtt_reconnects", "Connections to the broker but the first")
        Info("build", "Version of the collector").info({"version": __version__})
        REGISTRY.register(self)

    def collect(self) -> Iterator[core.Metric]:
        """Yield the metrics that are read off other objects (Prometheus's collector protocol)."""
        account, age = self._flow.account(), self._flow.oldest_age()
        counter, gauge = core.CounterMetricFamily, core.GaugeMetricFamily
        yield counter("mqtt_messages", "Messages received from the broker", account.received)
        yield counter("db_inserts", "Messages stored", account.inserted)
        yield counter("db_duplicates", "Messages sent again, not stored again", account.duplicates)
        refused = counter("db_dead_letters", "Messages the database refused", labels=["reason"])
        # From the start, as above, what there is an alert for.
        for reason, count in ({REFUSED_TWICE: 0} | account.dead_letters).items():
            refused.add_metric([reason], count)
        yield refused
        yield gauge("messages_in_flight", "Messages waiting for their COMMIT", account.in_flight)
        yield gauge("oldest_unacked_message_seconds", "Age of the oldest uncommitted message", age)
        delay = "Time from receipt of a message to its COMMIT"
        yield self.message_delay.family("message_delay_seconds", delay)
