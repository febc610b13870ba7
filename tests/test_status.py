"""The output and exit status of iot-status, with a real collector, broker and database.

Only the supervisor is a stand-in: a script that prints the status.
"""

from __future__ import annotations

import shutil
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from testing.collector import Collector
from testing.mosquitto import Mosquitto
from testing.postgres import Database
from testing.publisher import Publisher
from testing.service import binary, eventually

FILES = Path(__file__).parent.parent / "roles/host_base/files"


class Installation:
    """A state directory like that of the roles, for a running collector."""

    def __init__(self, folder: Path, collector: Collector, database: Database) -> None:
        self.folder = folder
        for name in ("bin", "etc/supervisor.d", "venv/bin"):
            (folder / name).mkdir(parents=True)
        shutil.copy(FILES / "iot_status.py", folder / "bin/iot-status")
        shutil.copy(FILES / "replaced_files.py", folder / "bin")
        self.script(
            "bin/psql",
            f'PGPASSWORD={database.password} exec {binary("psql")} -d {database.url} -X "$@"',
        )
        self.set_status("RUNNING", collector.pid)
        (folder / "etc/supervisor.d/collector.ini").write_text(
            "[program:collector]\npriority = 200\n[status:collector]\n"
            f"url = http://127.0.0.1:{collector.settings['IOT_HTTP_PORT']}\n"
        )

    def script(self, name: str, line: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    def set_status(self, state: str, pid: int) -> None:
        """Make supervisorctl print this status of the collector."""
        self.script(
            "venv/bin/supervisorctl", f"echo 'collector   {state}   pid {pid}, uptime 0:00:09'"
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.folder / "bin/iot-status", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def status(self, *arguments: str) -> tuple[int, str]:
        """Run iot-status; return its exit status and output."""
        with self.start(*arguments) as process:
            printed, _ = process.communicate()
        return process.returncode, printed


@pytest.fixture
def installation(tmp_path: Path, collector: Collector, database: Database) -> Installation:
    return Installation(tmp_path / "state", collector, database)


def test_status_waits_for_the_first_message(installation: Installation, broker: Mosquitto) -> None:
    assert installation.status()[0] == 0
    failed, printed = installation.status("--messages")
    assert (failed, "No message is in the table" in printed) == (1, True), printed

    with installation.start("--messages", "--wait=60") as waiting, Publisher(broker) as device:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(1)
        device.publish("iot/data", b"temperature:23")
        device.settle()
        printed, _ = waiting.communicate()
    assert (waiting.returncode, "1 messages stored in all" in printed) == (0, True), printed


def test_status_leaves_no_query_when_counting_takes_too_long(
    installation: Installation, database: Database
) -> None:
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("BEGIN; LOCK TABLE messages IN ACCESS EXCLUSIVE MODE")
        _, printed = installation.status()
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%count(*) FROM me%'"
            " AND pid <> pg_backend_pid() AND state = 'active'"
        )
        assert cursor.fetchone() == (0,)
    assert "messages   " in printed  # what the collector counted
    assert "stored in all" not in printed


def test_status_shows_the_problem_of_the_collector(
    installation: Installation, collector: Collector, broker: Mosquitto
) -> None:
    broker.stop()
    eventually(lambda: collector.status("/readyz") == 503)
    failed, printed = installation.status("--next", "--wait=0.1")
    assert failed == 1
    assert "collector  failing\n           broker: " in printed
    assert "Next: see the reasons above and" in printed


def test_status_fails_when_a_program_does_not_run(
    installation: Installation, collector: Collector
) -> None:
    installation.set_status("FATAL", collector.pid)
    failed, printed = installation.status("--next")
    assert failed == 1
    assert "playbooks/host.yml` (`make up`) starts the programs that do not run" in printed


def test_status_names_programs_with_replaced_files(
    installation: Installation, tmp_path: Path
) -> None:
    sleep = Path(shutil.copy(binary("sleep"), tmp_path / "sleep"))
    with subprocess.Popen([sleep, "100"]) as process:
        eventually(lambda: Path(f"/proc/{process.pid}/exe").readlink() == sleep)
        installation.set_status("RUNNING", process.pid)
        assert "old" not in installation.status()[1]
        sleep.unlink()
        assert f"collector runs from the old {sleep}\n" in installation.status()[1]
        process.kill()
