"""Programs whose files were replaced by an upgrade are found and restarted once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_runs import playbook

from testing.postgres import Postgres
from testing.service import eventually

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "roles/host_base/files/replaced_files.py"


def replaced(pid: int) -> list[str]:
    done = subprocess.run(
        [sys.executable, SCRIPT, str(pid)], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def replace(path: Path) -> None:
    """Replace a file as dpkg does, with a new file."""
    new = path.with_name(f"{path.name}.dpkg-new")
    shutil.copy(path, new)
    new.rename(path)


def library_of(program: str) -> Path:
    """The C library that a program is linked to."""
    shown = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    return next(Path(word) for word in shown.split() if word.endswith("/libc.so.6"))


@pytest.mark.parametrize("part", ["program", "library"])
def test_replaced_file_is_found(tmp_path: Path, part: str) -> None:
    sleep = tmp_path / "sleep"
    libc = tmp_path / "libc.so.6"
    program = str(shutil.which("sleep"))
    shutil.copy(program, sleep)
    shutil.copy(library_of(program), libc)
    process = subprocess.Popen([sleep, "100"], env={"LD_LIBRARY_PATH": str(tmp_path)})
    try:
        eventually(lambda: str(libc) in Path(f"/proc/{process.pid}/maps").read_text())
        assert replaced(process.pid) == []
        replace({"program": sleep, "library": libc}[part])
        assert replaced(process.pid) == [str({"program": sleep, "library": libc}[part])]
    finally:
        process.kill()
        process.wait()
    assert replaced(process.pid) == []


def test_deleted_data_and_shared_memory_are_ignored(own_postgres: Postgres, tmp_path: Path) -> None:
    assert "(deleted)" in Path(f"/proc/{own_postgres.pid}/maps").read_text()  # /dev/zero
    assert replaced(own_postgres.pid) == []
    data = tmp_path / "data"
    data.write_bytes(b"x")
    code = """
import ctypes, mmap, os, sys
with open(sys.argv[1], "r+b") as file:
    data = mmap.mmap(file.fileno(), 1)
os.unlink(sys.argv[1])
descriptor = os.memfd_create("jit")
os.truncate(descriptor, 4096)
memory = mmap.mmap(descriptor, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)
print(flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, data], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert f"{data} (deleted)" in maps
        assert "memfd:jit (deleted)" in maps
        assert replaced(process.pid) == []
        process.communicate(b"\n")


PROGRAM = """
- hosts: localhost
  connection: local
  gather_facts: true
  gather_subset: ["!all", min]
  roles:
    - role: iot.platform.host_base
  tasks:
    - ansible.builtin.include_role:
        name: iot.platform.host_base
        tasks_from: program
      vars:
        host_base_program:
          name: sleeper
          command: "{{ program }} 1000"
          user: "{{ ansible_facts['user_id'] }}"
          stopsignal: TERM
          stopwaitsecs: 5
          priority: 100
          url: none
          ready_command: ["true"]
"""


class Machine:
    """A supervisor with one program, run by the role host_base."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.play = folder / "play.yml"
        self.play.write_text(PROGRAM)
        self.program = folder / "sleeper"
        shutil.copy(str(shutil.which("sleep")), self.program)
        self.python = folder / "python3"
        shutil.copy("/usr/bin/python3", self.python)
        self.variables = {
            "iot_platform": "host",
            "iot_state_dir": str(self.state),
            "iot_python": str(self.python),
            "ansible_python_interpreter": sys.executable,
            "program": str(self.program),
        }

    def run(self, *arguments: str) -> tuple[str, bool]:
        """Run the play; return what it printed, and whether it changed anything."""
        done = playbook(str(self.play), f"-e{json.dumps(self.variables)}", *arguments)
        assert done.returncode == 0, done.stdout
        return done.stdout, "changed=0 " not in done.stdout

    def pid(self, *name: str) -> int:
        control = self.state / "venv/bin/supervisorctl"
        done = subprocess.run(
            [control, "-c", self.state / "etc/supervisord.conf", "pid", *name],
            capture_output=True,
            text=True,
            check=True,
        )
        return int(done.stdout)

    def close(self) -> None:
        playbook("playbooks/teardown.yml", "-econfirm=true", f"-eiot_state_dir={self.state}")


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Postgres.directory() as folder:  # other users can access it
        folder.chmod(0o755)
        machine = Machine(folder)
        yield machine
        machine.close()


@pytest.mark.timeout(300)  # seconds: it installs the supervisor
def test_role_restarts_programs_with_replaced_files(machine: Machine) -> None:
    machine.run()
    supervisor, program = machine.pid(), machine.pid("sleeper")

    replace(machine.program)
    printed, changed = machine.run()
    assert changed
    assert f"so it is restarted: {machine.program}" in " ".join(printed.split())
    assert machine.pid() == supervisor
    assert machine.pid("sleeper") != program
    assert replaced(machine.pid("sleeper")) == []

    program = machine.pid("sleeper")
    replace(machine.python)
    printed, changed = machine.run()
    assert changed
    assert f"so it is restarted with all programs: {machine.python}" in " ".join(printed.split())
    assert machine.pid() != supervisor
    assert machine.pid("sleeper") not in (0, program)

    assert not machine.run()[1], "a run after that changes nothing"

    # Its configuration is from an earlier version. `supervisorctl reload` would return before the
    # programs have stopped, and the supervisor accepts no command until then.
    slow = machine.play.with_name("slow")
    slow.write_text("#!/bin/sh\ntrap 'sleep 4; exit' TERM\nsleep 1000 & wait\n")
    slow.chmod(0o755)
    machine.variables["program"] = str(slow)
    machine.run()
    configuration = machine.state / "etc/supervisord.conf"
    expected = configuration.read_text()
    configuration.write_text(f"{expected}; old\n")
    program = machine.pid("sleeper")
    assert machine.run()[1]
    assert configuration.read_text() == expected
    assert machine.pid("sleeper") not in (0, program)
    assert not machine.run()[1]
