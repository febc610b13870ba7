"""A stand-in for YACE, the CloudWatch exporter: what it would export for a configuration.

The exporter itself cannot run here: it is in no package registry that the tests reach. Names and
labels follow ``BuildMetricName`` and ``createPrometheusLabels`` in its pkg/promutil/migrate.go,
0.67.0. The values are made up.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from testing.service import HOST

# Of the exporter itself; the second is not there before the first failure.
OWN = """\
yace_cloudwatch_requests_total{api_name="GetMetricStatistics"} 52
yace_cloudwatch_request_errors{api_name="GetMetricStatistics"} 1
"""


def snake_case(text: str) -> str:
    """``CPUUtilization`` is ``cpuutilization``, ``Connect.AuthError`` is ``connect_auth_error``."""
    text = re.sub(r"[ ,\t/\\.:=@<>()“-]", "_", text).replace("%", "_percent")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text).lower()


def metric_name(namespace: str, metric: str, statistic: str) -> str:
    return "_".join((snake_case(namespace.lower()), snake_case(metric), snake_case(statistic)))


def series(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """Return name and labels of each series of the static jobs."""
    for job in config["static"]:
        labels = {"name": job["name"], "account_id": "111122223333", "region": job["regions"][0]}
        labels |= {f"dimension_{d['name']}": d["value"] for d in job["dimensions"]}
        for metric in job["metrics"]:
            for statistic in metric["statistics"]:
                yield metric_name(job["namespace"], metric["name"], statistic), labels


def exposition(config: dict[str, Any]) -> str:
    """Return the response of /metrics if CloudWatch has a value for each metric."""
    lines = []
    for name, labels in series(config):
        inner = ",".join(f'{label}="{value}"' for label, value in labels.items())
        lines.append(f"{name}{{{inner}}} {len(name)}\n")
    return "".join(lines) + OWN


class StandIn:
    """The stand-in on a port of its own, until it is closed."""

    def __init__(self, config: dict[str, Any]) -> None:
        text = exposition(config).encode()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                """Print nothing."""

        self.server = ThreadingHTTPServer((HOST, 0), Handler)
        self.address = f"{HOST}:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
