"""Print the files that a process runs from and that have been replaced on disk, one per line.

Usage: replaced_files.py PID

A package upgrade replaces programs and libraries. A process that was started before the upgrade
keeps the old files in memory, and may fail when it loads one of the new ones.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

# Code that is in no package: shared memory, and code that libffi generates at run time.
NOT_INSTALLED = re.compile(r"/dev/|/memfd:|/SYSV|.*/ffi\w{6}$")


def replaced_files(pid: int) -> list[str]:
    """Return the paths, sorted; none if the process has ended or is another user's.

    /proc/PID/maps is described in proc_pid_maps(5). dpkg and pip rename a new file over the old
    one, which then appears there as deleted.
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
