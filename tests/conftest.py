"""What several tests of the deployment share."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest


@dataclass
class StandIn:
    """A running stand-in for the Kubernetes API (see kubernetes_api/__init__.py)."""

    url: str
    kubeconfig: Path
    process: subprocess.Popen[str]

    def ask(self, path: str, body: Any = None) -> Any:
        """GET, or PUT of `body`, at one of the stand-in's own endpoints: its JSON."""
        data = None if body is None else json.dumps(body).encode()
        method = "GET" if body is None else "PUT"
        with urlopen(Request(f"{self.url}/stand-in/{path}", data, method=method)) as answer:
            return json.load(answer)

    @property
    def objects(self) -> list[dict[str, Any]]:
        """What clients created and is still there."""
        return self.ask("objects")


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    kubeconfig = tmp_path_factory.mktemp("kubernetes_api") / "kubeconfig"
    process = subprocess.Popen(
        [sys.executable, "-m", "kubernetes_api", "--kubeconfig", kubeconfig],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield StandIn(process.stdout.readline().strip(), kubeconfig, process)
        finally:
            process.terminate()
