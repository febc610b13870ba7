"""Prometheus, scraping one target."""

import json
import math
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .service import HOST, Service, binary, free_port

SCRAPE_SECONDS = 1


class Prometheus(Service):
    """A Prometheus that scrapes one address, a collector's or another one.

    :param more: the addresses of other jobs, by their name.
    """

    name = "prometheus"

    def __init__(self, folder: Path, target: str, job_name: str = "collector", **more: str) -> None:
        super().__init__(folder)
        self.address = f"{HOST}:{free_port()}"
        self.target = target
        self.config = folder / "prometheus.yml"
        jobs = [
            {"job_name": name, "static_configs": [{"targets": [address]}]}
            for name, address in {job_name: target, **more}.items()
        ]
        self.config.write_text(
            yaml.safe_dump(
                {"global": {"scrape_interval": f"{SCRAPE_SECONDS}s"}, "scrape_configs": jobs}
            )
        )

    def command(self) -> Sequence[str]:
        return [
            binary("prometheus"),
            f"--config.file={self.config}",
            f"--storage.tsdb.path={self.folder / 'data'}",
            f"--web.listen-address={self.address}",
        ]

    def get(self, path: str, **parameters: object) -> Any:
        """Send a request to its API; return the data of the response."""
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def ready(self) -> bool:
        try:
            return bool(self.get("query", query="up == 1")["result"])
        except OSError:
            return False

    def numbers(self, query: str, start: float, end: float) -> list[float]:
        """Return all values of all series of a query from start to end, without NaN."""
        result = self.get("query_range", query=query, start=start, end=end, step=1)["result"]
        values = [float(value) for series in result for _, value in series["values"]]
        return [value for value in values if not math.isnan(value)]
