"""The rates of the last quarter of an hour, sampled from the collector's own metrics."""

import threading
import time
from collections import deque

from prometheus_client import REGISTRY

EVERY = 5.0  # seconds
_KEPT = 180  # samples: 15 minutes
_NAMES = {
    "received": "mqtt_messages_total",
    "stored": "db_inserts_total",
    "in_flight": "messages_in_flight",
    "delay_sum": "message_delay_seconds_sum",
    "delay_count": "message_delay_seconds_count",
}


class Rates(threading.Thread):
    """Samples the metrics every few seconds, which costs no measurable CPU time."""

    def __init__(self) -> None:
        super().__init__(name="rates", daemon=True)
        # [Unix time, received per second, stored per second, in flight, mean delay or None]
        self.samples: deque[list[float | None]] = deque(maxlen=_KEPT)

    def run(self) -> None:
        """Sample until the process ends."""
        before, then = _read(), time.monotonic()
        while True:
            time.sleep(EVERY)
            now, seen = time.monotonic(), _read()
            change = {name: seen[name] - before[name] for name in _NAMES}
            rates = [change[name] / (now - then) for name in ("received", "stored")]
            count = change["delay_count"]
            delay = round(change["delay_sum"] / count, 6) if count else None
            stored_rates = [round(rate, 2) for rate in rates]
            self.samples.append([round(time.time(), 1), *stored_rates, seen["in_flight"], delay])
            before, then = seen, now


def _read() -> dict[str, float]:
    wanted = REGISTRY.restricted_registry([*_NAMES.values(), "message_delay_seconds"])
    found = {sample.name: sample.value for family in wanted.collect() for sample in family.samples}
    return {name: found.get(metric, 0.0) for name, metric in _NAMES.items()}
