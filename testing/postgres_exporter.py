"""prometheus-postgres-exporter, for one database."""

import os
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .postgres import Database
from .service import HOST, Service, binary, free_port


class PostgresExporter(Service):
    """The exporter, logged in as the user of ``database`` with a password file."""

    name = "postgres-exporter"

    def __init__(self, folder: Path, database: Database, password_file: Path) -> None:
        super().__init__(folder)
        self.address = f"{HOST}:{free_port()}"
        self.source = {
            "DATA_SOURCE_URI": f"{HOST}:{database.server.port}/{database.name}?sslmode=disable",
            "DATA_SOURCE_USER": database.user,
            "DATA_SOURCE_PASS_FILE": str(password_file),
        }

    def command(self) -> Sequence[str]:
        return [binary("prometheus-postgres-exporter"), f"--web.listen-address={self.address}"]

    def options(self) -> dict[str, Any]:
        return {"env": os.environ | self.source}

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.address}/metrics", timeout=10) as answer:
                return b"pg_up 1" in answer.read()
        except OSError:
            return False
