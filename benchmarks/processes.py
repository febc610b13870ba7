"""What processes cost, read from /proc; starting and ending them."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

from testing.service import ServiceError, children

_TICK = os.sysconf("SC_CLK_TCK")
_UTIME = 11  # fields of /proc/<pid>/stat behind the command's name, see proc(5)
_CUTIME = 13


def _stat(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()  # a command's name may have blanks and brackets


def cpu_of_tree(pid: int, *, without: int | None = None) -> float:
    """Return CPU seconds of a process, its descendants, and those of them that have ended.

    ``without`` is left out: our own database backend is part of PostgreSQL's tree.
    """
    total = 0.0
    todo = [pid]
    while todo:
        current = todo.pop()
        fields = _stat(current)
        if fields is None or current == without:
            continue
        total += sum(int(fields[i]) for i in range(_UTIME, _CUTIME + 2)) / _TICK
        todo += children(current)
    return total


def memory_of(pid: int) -> float:
    """Return the resident set of one process in MB."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0.0


def machine_busy() -> float:
    """Return CPU seconds that all cores together were not idle since boot, stolen ones included."""
    fields = [int(f) for f in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / _TICK


def start(
    command: list[str], log: Path, *, env: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a process whose output goes to a log file."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | (env or {}),
            start_new_session=True,
        )


def stop(
    process: subprocess.Popen[bytes], *, number: int = signal.SIGTERM, patience: float = 15
) -> None:
    """End a process we started, gently if it can be."""
    if process.poll() is None:
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    if process.poll() is None:
        process.kill()
        process.wait()


def run(command: list[str], **options: object) -> str:
    """Run a command to its end and return its output.

    :raises ServiceError: it is not installed or failed, with the end of what it said.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    except FileNotFoundError as error:
        raise ServiceError(f"{command[0]} is not installed") from error
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise ServiceError(f"{' '.join(command[:3])}…: {' / '.join(said[-3:])}")
    return str(done.stdout)
