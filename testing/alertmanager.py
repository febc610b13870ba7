"""Alertmanager, with a configuration file."""

import urllib.request
from collections.abc import Sequence
from pathlib import Path

from .service import HOST, Service, binary, free_port


class Alertmanager(Service):
    """Debian's Alertmanager."""

    name = "alertmanager"

    def __init__(self, folder: Path, config: Path) -> None:
        super().__init__(folder)
        self.address = f"{HOST}:{free_port()}"
        self.config = config

    def command(self) -> Sequence[str]:
        return [
            binary("prometheus-alertmanager"),
            f"--config.file={self.config}",
            f"--storage.path={self.folder / 'alertmanager-data'}",
            "--cluster.listen-address=",
            f"--web.listen-address={self.address}",
        ]

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=10):
                return True
        except OSError:
            return False
