"""The stand-in as a process that a test starts, tells what to break, and ends."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

ROOT = Path(__file__).parents[2]


def command(*options: str | Path) -> dict[str, Any]:
    """Arguments for subprocess.run and Popen."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    module = "testing.kubernetes_api"
    return {"args": [sys.executable, "-m", module, *options], "env": environment, "text": True}


@dataclass
class StandIn:
    url: str
    kubeconfig: Path

    def ask(self, path: str, body: Any = None) -> Any:
        """GET, or PUT of `body`, at one of its own endpoints (server.py): the JSON it answers."""
        data = None if body is None else json.dumps(body).encode()
        method = "GET" if body is None else "PUT"
        with urlopen(Request(f"{self.url}/stand-in/{path}", data, method=method)) as answer:
            return json.load(answer)


@contextmanager
def running(kubeconfig: Path) -> Iterator[StandIn]:
    """A stand-in on a free port, for as long as the block lasts; it writes `kubeconfig`."""
    options = command("--kubeconfig", kubeconfig)
    with subprocess.Popen(**options, stdout=subprocess.PIPE) as process:
        assert process.stdout
        try:
            yield StandIn(process.stdout.readline().strip(), kubeconfig)
        finally:
            process.terminate()
