"""A process that a test starts, waits for, signals and ends."""

import contextlib
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

HOST = "127.0.0.1"
IS_ROOT = os.geteuid() == 0
PATIENCE = 60.0  # seconds; far more than anything takes, even on a slow machine

T = TypeVar("T")


class ServiceError(AssertionError):
    """A program is missing, has ended, or was too slow. The text names the program and the problem.

    A failure for pytest, and for the benchmark the one thing that it shows.
    """


def eventually(predicate: Callable[[], T | None], timeout: float = PATIENCE, what: str = "") -> T:
    """Call the predicate until its value is true; return the value. Fail after ``timeout`` seconds.

    Tests wait in no other way.
    """
    until = time.monotonic() + timeout
    while not (value := predicate()):
        if time.monotonic() > until:
            raise ServiceError(f"not in {timeout:g} s: {what or predicate}; last: {value!r}")
        time.sleep(0.02)
    return value


# Each worker of pytest-xdist has its own range of ports, so that no other process takes a port
# between `free_port` and the start of the service. The ranges are below the ephemeral ports of
# Linux and the ports of the Molecule scenarios.
_RANGE = 1000
_FIRST = 20000 + _RANGE * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 8)
_offsets = itertools.count(random.randrange(_RANGE))


def free_port() -> int:
    """Return a TCP port that nothing listens on, a different one each time."""
    for offset in itertools.islice(_offsets, _RANGE):
        port = _FIRST + offset % _RANGE
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind((HOST, port))
            return port
    raise ServiceError(f"all ports from {_FIRST} to {_FIRST + _RANGE - 1} are in use")


def binary(name: str, *folders: str) -> str:
    """Return the path of a program; fail if it is not installed."""
    path = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))
    if path is None:
        raise ServiceError(
            f"{name} is not installed; `make test` installs what the tests need "
            "(Debian packages mosquitto, mosquitto-clients, postgresql, prometheus, "
            "prometheus-alertmanager and prometheus-postgres-exporter)"
        )
    return path


def children(pid: int) -> list[int]:
    """Return the process ids of the children of a process."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):  # those of each thread
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += map(int, file.read_text().split())
    return found


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants, also those in other process groups and sessions."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)  # so that it starts no more children
        for child in children(pid):
            kill_tree(child)
        os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Service:
    """A process that can be started and killed repeatedly, with the same files and port."""

    name = "service"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log_file = folder / f"{self.name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> Sequence[str]:
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """Additional arguments of Popen."""
        return {}

    def ready(self) -> bool:
        """Whether the process is ready for use."""
        return True

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def launch(self) -> Self:
        """Start the process and do not wait for it."""
        assert not self.running, f"{self.name} runs already"
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, **self.options()
            )
        return self

    def start(self) -> Self:
        """Start the process and wait until it is ready."""
        self.launch()

        def ready_or_dead() -> bool:
            if not self.running:
                raise ServiceError(f"{self.name} ended at its start:\n{self.log()}")
            return self.ready()

        eventually(ready_or_dead, what=f"{self.name} is ready")
        return self

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for the end of the process and return its exit status."""
        assert self.process is not None
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ServiceError(f"{self.name} does not end:\n{self.log()}") from None

    def stop(self) -> int:
        """Ask the process to end, and wait."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """Kill the process (SIGKILL)."""
        self.signal(signal.SIGKILL)
        self.wait()

    def close(self) -> None:
        """Kill the process if it runs."""
        if self.running:
            self.kill()
