"""The preflight check of ports: it names the process that uses a port, and ignores our own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "roles/host_base/files/ports_in_use.py"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def conflicts(pidfile: Path, address: str, port: int) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, SCRIPT, pidfile, f"some_port={address}={port}"],
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "0.0.0.0", "::"])
def test_process_that_uses_the_port_is_named(
    listener: socket.socket, tmp_path: Path, address: str
) -> None:
    port = listener.getsockname()[1]
    (conflict,) = conflicts(tmp_path / "none", address, port)
    assert conflict["variable"] == "some_port"
    assert conflict["port"] == port
    assert f"process {os.getpid()}" in conflict["holder"]
    assert conflict["suggestion"] != port


def test_free_port_is_no_conflict(listener: socket.socket, tmp_path: Path) -> None:
    port = listener.getsockname()[1]
    listener.close()
    assert conflicts(tmp_path / "none", "127.0.0.1", port) == []


def test_port_on_another_address_is_no_conflict(listener: socket.socket, tmp_path: Path) -> None:
    assert conflicts(tmp_path / "none", "127.0.0.2", listener.getsockname()[1]) == []


def test_ipv6_listener_on_all_addresses_is_a_conflict(tmp_path: Path) -> None:
    try:
        server = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    except OSError:
        pytest.skip("no IPv6 on this machine")
    with server:
        assert conflicts(tmp_path / "none", "127.0.0.1", server.getsockname()[1])


def test_our_own_process_is_no_conflict(tmp_path: Path) -> None:
    """Our processes are children of the supervisor, which is identified by its command line."""
    pidfile = tmp_path / "run/supervisord.pid"
    pidfile.parent.mkdir()
    child = (
        "import socket, sys; server = socket.create_server(('127.0.0.1', 0));"
        "print(server.getsockname()[1], flush=True); sys.stdin.read()"
    )
    supervisor = (
        "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', sys.argv[2]]))"
    )
    config = str(tmp_path / "etc/supervisord.conf")
    with subprocess.Popen(
        [sys.executable, "-c", supervisor, config, child],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        assert conflicts(pidfile, "127.0.0.1", port), "without a pidfile it is an unknown process"
        pidfile.write_text(f"{process.pid}\n")
        assert conflicts(pidfile, "127.0.0.1", port) == []
        # A stale pidfile with the process id of another program.
        pidfile.write_text(f"{os.getpid()}\n")
        assert conflicts(pidfile, "127.0.0.1", port)
        process.communicate("")
