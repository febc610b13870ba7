"""Print, a line each, the files that a process runs from and that have been replaced on disk.

Usage: replaced_files.py PID

A package upgrade replaces programs and libraries. A process that was started before keeps the old
ones in memory, and may fail when it loads a new one beside them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

# Code that never was in a package: shared memory, and what libffi makes at run time.
NOT_INSTALLED = re.compile(r"/dev/|/memfd:|/SYSV|.*/ffi\w{6}$")


def replaced_files(pid: int) -> list[str]:
    """Return the paths, sorted; none if the process has ended or is another user's.

    /proc/PID/maps is described in proc_pid_maps(5). A file that another one was renamed over, as
    dpkg and pip do, counts as deleted there.
    """
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
    except OSError:
        return []
    found = set()
    for line in lines:
        _, permissions, _, _, _, *rest = line.split(None, 5)
        path, deleted, _ = "".join(rest).partition(" (deleted)")
        # Only code: programs delete data files that they have mapped.
        if deleted and "x" in permissions and not NOT_INSTALLED.match(path):
            found.add(path)
    return sorted(found)


if __name__ == "__main__":
    for replaced in replaced_files(int(sys.argv[1])):
        print(replaced)
