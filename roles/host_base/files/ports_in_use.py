"""Print as JSON which of the given ports a process that is not ours listens on.

Usage: ports_in_use.py PIDFILE VARIABLE=ADDRESS=PORT...

Reads /proc only: a fresh Debian has neither ss nor lsof nor psutil.
"""

from __future__ import annotations

import ipaddress
import json
import pwd
import socket
import sys
from pathlib import Path

PROC = Path("/proc")
LISTEN = "0A"


def listeners() -> list[tuple[int, str, int, str]]:
    """(port, address, uid, inode) of every listening TCP socket."""
    found = []
    for table, family in (("net/tcp", socket.AF_INET), ("net/tcp6", socket.AF_INET6)):
        try:
            lines = (PROC / table).read_text().splitlines()[1:]
        except OSError:  # no IPv6
            continue
        for line in lines:
            field = line.split()
            if field[3] != LISTEN:
                continue
            hex_address, hex_port = field[1].split(":")
            # Words of 32 bits, each in the byte order of the machine.
            words = [hex_address[i : i + 8] for i in range(0, len(hex_address), 8)]
            raw = b"".join(int(word, 16).to_bytes(4, sys.byteorder) for word in words)
            found.append(
                (int(hex_port, 16), socket.inet_ntop(family, raw), int(field[7]), field[9])
            )
    return found


def overlap(ours: str, theirs: str) -> bool:
    """Whether a socket on the address `theirs` prevents us from listening on `ours`."""
    any_address = {"0.0.0.0", "::", "*"}  # noqa: S104 -- compared with, not bound to
    if ours in any_address or theirs in any_address:
        return True
    mine = "127.0.0.1" if ours == "localhost" else ours
    other = ipaddress.ip_address(theirs)
    mapped = getattr(other, "ipv4_mapped", None)
    return mine in (theirs, str(mapped))


def process_of(inode: str) -> int | None:
    """ID of the process that holds the socket, if we are allowed to see it."""
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            for fd in (entry / "fd").iterdir():
                if str(fd.readlink()) == f"socket:[{inode}]":
                    return int(entry.name)
        except OSError:  # it has ended, or belongs to another user
            continue
    return None


def ancestors(pid: int) -> list[int]:
    """The process and its ancestors."""
    line = [pid]
    while pid > 1:
        try:
            # The name in parentheses may contain any character, so split after the last one.
            pid = int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            break
        line.append(pid)
    return line


def supervisor(pidfile: Path) -> int | None:
    """Process ID of our supervisor; None if it does not run or another program has the ID."""
    try:
        pid = int(pidfile.read_text())
        command = (PROC / str(pid) / "cmdline").read_text()
    except (OSError, ValueError):
        return None
    return pid if str(pidfile.parent.parent / "etc/supervisord.conf") in command else None


def describe(pid: int | None, uid: int) -> str:
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    if pid is None:
        return f"a process of user {user}"
    name = (PROC / str(pid) / "comm").read_text().strip()
    return f"{name} (process {pid} of user {user})"


def main() -> None:
    ours = supervisor(Path(sys.argv[1]))
    listening = listeners()
    taken = {port for port, *_ in listening}
    conflicts = []
    for argument in sys.argv[2:]:
        variable, address, number = argument.split("=")
        port = int(number)
        for theirs, where, uid, inode in listening:
            if theirs != port or not overlap(address, where):
                continue
            pid = process_of(inode)
            if ours is not None and pid is not None and ours in ancestors(pid):
                continue
            suggestion = next(p for p in range(10000 + port % 10000, 65535) if p not in taken)
            conflicts.append(
                {
                    "variable": variable,
                    "port": port,
                    "holder": describe(pid, uid),
                    "suggestion": suggestion,
                }
            )
            break
    json.dump(conflicts, sys.stdout)


if __name__ == "__main__":
    main()
