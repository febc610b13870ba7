"""CPU time and memory of processes, from /proc, and starting and stopping them."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

from testing.service import ServiceError, children

_TICK = os.sysconf("SC_CLK_TCK")
_UTIME = 11  # fields of /proc/<pid>/stat after the command name, see proc(5)
_CUTIME = 13


def _stat(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()  # a command name may contain spaces and parentheses


def cpu_of_tree(pid: int, *, without: int | None = None) -> float:
    """Return CPU seconds of a process and its descendants, ended ones included.

    :param without: a process to exclude, such as the benchmark's own backend.
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
    """Return non-idle CPU seconds of all cores since boot, with steal time."""
    fields = [int(f) for f in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / _TICK


def start(
    command: list[str], log: Path, *, env: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a process. Its output goes to a log file."""
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
    """Stop a process with a signal, and kill it if it does not end in time."""
    if process.poll() is None:
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    if process.poll() is None:
        process.kill()
        process.wait()


def run(command: list[str], **options: object) -> str:
    """Run a command; return its output.

    :raises ServiceError: it is not installed, or it failed; with the end of its output.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    except FileNotFoundError as error:
        raise ServiceError(f"{command[0]} is not installed") from error
    if done.returncode:
        output = (done.stdout + done.stderr).strip().splitlines()
        raise ServiceError(f"{' '.join(command[:3])}…: {' / '.join(output[-3:])}")
    return str(done.stdout)
