"""Grafana is found where it is installed, and gets files that lead to each other.

Grafana itself takes no part: the stand-in that Molecule uses reads its configuration. It fails when
a file that is named there cannot be read.
"""

import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from rendering import ROLES, render

from testing.service import HOST, Service, free_port

FIND = ROLES / "grafana/files/find_grafana.sh"
STAND_IN = ROLES.parent / "molecule/default/files/grafana_stand_in.py"


# Where it is ---------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Grafana as its archive unpacks, as far as it matters here."""
    home = tmp_path / "opt/grafana 12"
    for name in ("bin/grafana", "conf/defaults.ini"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch(0o755)
    return home


def find(directory: Path | str = "", *, path: Path | None = None) -> list[str]:
    done = subprocess.run(
        ["sh", FIND, directory],
        env={"PATH": f"{path}:/usr/bin:/bin" if path else "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_found_in_a_directory(home: Path) -> None:
    assert find(home) == [f"{home}/bin/grafana", str(home)]


def test_found_on_the_path(home: Path) -> None:
    assert find(path=home / "bin") == [f"{home}/bin/grafana", str(home)]


def test_found_through_a_link(home: Path, tmp_path: Path) -> None:
    (tmp_path / "grafana").symlink_to(home / "bin/grafana")
    assert find(path=tmp_path) == [f"{home}/bin/grafana", str(home)]


def test_a_directory_that_is_named_is_the_only_one(home: Path, tmp_path: Path) -> None:
    assert find(tmp_path, path=home / "bin") == []


def test_not_found_without_its_files(home: Path) -> None:
    (home / "conf/defaults.ini").unlink()
    assert find(home) == []


# What it is given ----------------------------------------------------------------------------


class StandIn(Service):
    """The stand-in, with the files that the templates make of some paths and addresses."""

    name = "grafana"

    def __init__(self, folder: Path, home: Path) -> None:
        super().__init__(folder)
        self.home = home
        self.port = free_port()
        names = ("grafana_admin_password", "grafana_secret_key", "reader_db_password")
        self.secrets = [folder / name for name in names]
        for secret in self.secrets:
            secret.write_text("secret\n")
        variables = {
            "__grafana_here": {
                "etc": str(folder / "etc"),
                "data": str(folder / "data"),
                "listen": HOST,
                "port": self.port,
                "secrets": str(folder),
            },
            "__grafana_dashboards": str(folder / "dashboards"),
            "grafana_prometheus_url": "http://prometheus-service:9090",
            "grafana_database_address": "postgres-service:5432",
            "grafana_database_name": "iot",
            "grafana_database_user": "iot_reader",
            "grafana_database_sslmode": "verify-full",
            "iot_database_ca_file": "/etc/iot-database/ca.pem",
        }
        for template, name in {
            "grafana.ini": "grafana.ini",
            "datasources.yml": "provisioning/datasources/iot-system.yml",
            "dashboards.yml": "provisioning/dashboards/iot-system.yml",
        }.items():
            file = folder / "etc" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(render(f"grafana/{template}.j2", **variables))
        shutil.copytree(ROLES / "grafana/files/dashboards", folder / "dashboards")
        (folder / "data").mkdir()

    def command(self) -> Sequence[str]:
        config = f"--config={self.folder}/etc/grafana.ini"
        return [sys.executable, str(STAND_IN), "server", config, f"--homepath={self.home}"]

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self.port}/api/health") as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@pytest.fixture
def stand_in(tmp_path: Path, home: Path) -> Iterator[StandIn]:
    stand_in = StandIn(tmp_path, home)
    yield stand_in
    stand_in.close()


def test_starts_with_the_files_of_the_templates(stand_in: StandIn) -> None:
    stand_in.start()


@pytest.mark.parametrize("number", range(3))
def test_needs_each_of_its_secrets(stand_in: StandIn, number: int) -> None:
    stand_in.secrets[number].unlink()
    assert stand_in.launch().wait() != 0
    assert str(stand_in.secrets[number]) in stand_in.log()
