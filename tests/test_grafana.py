"""Finding an installed Grafana, and the configuration files for it.

Grafana itself is not used. The stand-in of Molecule reads the configuration, and fails when it
cannot read a file that is named there.
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


# Finding Grafana -----------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A Grafana home directory with the files that find_grafana.sh needs."""
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


def test_grafana_is_found_in_a_directory(home: Path) -> None:
    assert find(home) == [f"{home}/bin/grafana", str(home)]


def test_grafana_is_found_on_the_path(home: Path) -> None:
    assert find(path=home / "bin") == [f"{home}/bin/grafana", str(home)]


def test_grafana_is_found_through_a_symbolic_link(home: Path, tmp_path: Path) -> None:
    (tmp_path / "grafana").symlink_to(home / "bin/grafana")
    assert find(path=tmp_path) == [f"{home}/bin/grafana", str(home)]


def test_given_directory_is_the_only_one_searched(home: Path, tmp_path: Path) -> None:
    assert find(tmp_path, path=home / "bin") == []


def test_grafana_without_its_files_is_not_found(home: Path) -> None:
    (home / "conf/defaults.ini").unlink()
    assert find(home) == []


# Configuration files -------------------------------------------------------------------------


class StandIn(Service):
    """The stand-in with the rendered configuration files."""

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


def test_stand_in_starts_with_the_rendered_files(stand_in: StandIn) -> None:
    stand_in.start()


@pytest.mark.parametrize("number", range(3))
def test_missing_secret_file_stops_the_start(stand_in: StandIn, number: int) -> None:
    stand_in.secrets[number].unlink()
    assert stand_in.launch().wait() != 0
    assert str(stand_in.secrets[number]) in stand_in.log()
