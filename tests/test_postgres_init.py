"""The init script of the PostgreSQL pod, which runs before each start, with a real PostgreSQL."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest
from ansible_runs import playbook

from testing.postgres import Postgres, postgres_binary
from testing.service import IS_ROOT


class Pod(Postgres):
    """The files of the PostgreSQL pod: configuration, passwords, volume and socket."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.data = folder / "volume/postgres"
        self.etc = folder / "etc"
        self.secrets = folder / "secrets"
        for made in (self.etc, self.secrets, self.data.parent, folder / "run"):
            made.mkdir()
        here = {
            "listen": "127.0.0.1",
            "etc": str(self.etc),
            "data": str(self.data),
            "socket_dir": str(folder / "run"),
            "secrets": str(self.secrets),
            "admins": ["postgres" if IS_ROOT else getpass.getuser()],
        }
        variables = {
            "__postgres_here": here,
            "postgres_port": self.port,
            "render_to": str(self.etc),
        }
        done = playbook(
            "tests/render.yml", "-etarget=local", f"-e{json.dumps(variables)}", "--skip-tags=never"
        )
        assert done.returncode == 0, done.stdout
        self.set_passwords("first")

    def set_passwords(self, word: str) -> None:
        for role in ("collector", "reader", "monitor"):
            (self.secrets / f"{role}_db_password").write_text(f"{role}-{word}")
        if IS_ROOT:
            for path in [self.folder, *self.folder.rglob("*")]:
                shutil.chown(path, "postgres", "postgres")

    def init(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", self.etc / "init.sh"],
            env={"PATH": f"{Path(postgres_binary('postgres')).parent}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            **self.options(),
        )

    def ready(self) -> bool:
        try:
            self.connect(
                "iot", "iot_collector", (self.secrets / "collector_db_password").read_text()
            ).close()
        except psycopg2.OperationalError:
            return False
        return True

    def left_running(self) -> bool:
        """Whether a server still uses the volume."""
        return (self.data / "postmaster.pid").exists()

    def command(self) -> list[str]:
        return [postgres_binary("postgres"), "-D", str(self.etc)]


@pytest.fixture(scope="module")
def pod() -> Iterator[Pod]:
    with Postgres.directory() as folder:
        pod = Pod(folder)
        yield pod
        pod.close()


def test_init_creates_the_database_and_applies_new_passwords(pod: Pod) -> None:
    # Leftovers of an interrupted run.
    (pod.data.parent / "postgres.new").mkdir()
    (pod.data.parent / "postgres.new/half").touch()
    pod.set_passwords("first")
    done = pod.init()
    assert done.returncode == 0, done.stdout
    assert "collector-first" not in done.stdout

    pod.start()
    with pod.connect("iot", "iot_collector", "collector-first") as connection:
        connection.cursor().execute("CREATE TABLE kept (id int)")
    with pod.connect("iot", "iot_reader", "reader-first") as connection:
        connection.cursor().execute("SELECT * FROM kept")
    with pytest.raises(psycopg2.OperationalError, match="rejects connection"):
        pod.connect("iot", "postgres", "postgres")
    pod.stop()

    pod.set_passwords("second")
    pod.data.chmod(0o770)  # as with fsGroup
    done = pod.init()
    assert done.returncode == 0, done.stdout
    pod.start()
    with pod.connect("iot", "iot_collector", "collector-second") as connection:
        connection.cursor().execute("SELECT * FROM kept")
    with pytest.raises(psycopg2.OperationalError, match="authentication failed"):
        pod.connect("iot", "iot_collector", "collector-first")


def test_missing_password_stops_the_init(pod: Pod) -> None:
    pod.stop()
    (pod.secrets / "reader_db_password").unlink()
    done = pod.init()
    assert done.returncode != 0
    assert "a password is missing" in done.stdout
    assert not pod.left_running()


def test_image_of_another_major_version_stops_the_init(pod: Pod) -> None:
    (pod.data / "PG_VERSION").write_text("9\n")
    done = pod.init()
    assert done.returncode == 1
    assert "created by PostgreSQL 9" in done.stdout
    assert "postgres_image" in done.stdout
