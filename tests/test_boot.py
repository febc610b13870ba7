"""The systemd unit: its syntax, and its behaviour in a container that systemd boots."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_runs import WITHOUT_MITOGEN, playbook
from rendering import render

from testing.engines import ROOT, Engine, EngineError, machine_image, start_machine
from testing.service import eventually, free_port

STATE = "/var/lib/iot-system"
UNIT = "iot-system.service"
SUPERVISORD = (f"{STATE}/venv/bin/supervisord", "-c", f"{STATE}/etc/supervisord.conf")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


@pytest.mark.parametrize("scope", ["system", "user"])
@pytest.mark.parametrize("state", [STATE, '/srv/50% of "it"/a$b'])
def test_unit_is_valid_for_systemd(tmp_path: Path, scope: str, state: str) -> None:
    analyze = shutil.which("systemd-analyze")
    if not analyze:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / UNIT
    unit.write_text(
        render(
            "host_base/iot-system.service.j2",
            iot_state_dir=state,
            __host_base_as_root=scope == "system",
            __host_base_supervisor_command=["/usr/bin/env", f"{state}/supervisord"],
            __host_base_supervisorctl=[f"{state}/supervisorctl"],
            __host_base_supervisor_conf=f"{state}/supervisord.conf",
            __host_base_unit_target="multi-user.target",
        )
    )

    def verify() -> tuple[int, str]:
        done = subprocess.run(
            [analyze, f"--{scope}", "verify", "--man=no", unit],
            env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        # It also checks other units, and may have warnings about them.
        return done.returncode, "\n".join(x for x in done.stdout.splitlines() if UNIT in x)

    assert verify() == (0, "")
    unit.write_text(unit.read_text().replace("KillMode=process", "KillMode=orderly"))
    assert "kill mode" in verify()[1], "the check finds an error"


class Machine:
    """A container that systemd has booted, with the system deployed on it."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine = engine
        self.name = f"iot-machine-test-{uuid.uuid4().hex[:8]}"
        self.port = free_port()
        (folder / "hosts.yml").write_text(
            json.dumps(
                {
                    "host": {
                        "hosts": {self.name: {}},
                        "vars": {
                            # Also for Podman, because Podman's plugin has no pipelining.
                            "ansible_connection": "community.docker.docker",
                            "ansible_python_interpreter": "/usr/bin/python3",
                            "mosquitto_port": self.port,
                            "postgres_port": free_port(),
                            "postgres_exporter_enabled": False,
                            "collector_http_port": free_port(),
                        },
                    }
                }
            )
        )
        (folder / "group_vars").symlink_to(ROOT / "inventories/host/group_vars")
        (folder / "docker").symlink_to(shutil.which(engine.command[0]) or "")
        self.folder = folder

    def playbook(self, path: str, *arguments: str) -> str:
        """Run a playbook on the machine and return the last line of what it printed."""
        done = playbook(
            path,
            f"-i{self.folder}",
            *arguments,
            PATH=f"{self.folder}:{os.environ['PATH']}",
            ANSIBLE_ROLES_PATH=str(ROOT / "roles"),
            **WITHOUT_MITOGEN,  # which does not support this connection
        )
        assert done.returncode == 0, done.stdout
        return done.stdout.strip().splitlines()[-1]

    def __call__(self, *command: str) -> str:
        """Run a command on the machine.

        :raises EngineError: it failed.
        """
        return self.engine("exec", self.name, *command)

    def succeeds(self, *command: str) -> bool:
        try:
            self(*command)
        except EngineError:
            return False
        return True

    def reboot(self) -> None:
        self.engine("restart", "--time=90", self.name, timeout=120)
        self.wait_for_systemd()

    def wait_for_systemd(self) -> None:
        """Wait until systemd has started multi-user.target."""
        eventually(
            lambda: self.succeeds("systemctl", "is-active", "multi-user.target"),
            timeout=120,
            what="systemd has booted",
        )

    def unit(self, name: str) -> str:
        """A property of the unit."""
        return self("systemctl", "show", f"--property={name}", "--value", UNIT).strip()

    def log(self, program: str) -> str:
        return self("cat", f"{STATE}/log/{program}.log")

    def stores_message(self) -> bool:
        """Publish a message; wait until it is stored."""
        text = uuid.uuid4().hex
        count = f"SELECT count(*) FROM messages WHERE payload = '{text}'"
        eventually(
            lambda: self.succeeds(f"{STATE}/bin/iot-status"), timeout=60, what="all programs run"
        )
        self("mosquitto_pub", "-p", f"{self.port}", "-q", "1", "-t", "iot/data", "-m", text)
        return eventually(lambda: self(f"{STATE}/bin/psql", "-Atc", count) == "1\n", timeout=60)


@pytest.fixture(scope="module")
def machine(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("machine")
    machine = Machine(engine, folder)
    options = [f"--env=PIP_CERT={CERTIFICATES}"]
    if CERTIFICATES.exists():  # the container trusts the same CAs as this machine
        options += [f"--volume={CERTIFICATES}:{CERTIFICATES}:ro"]
    if index := os.environ.get("PIP_INDEX_URL"):
        options += [f"--env=PIP_INDEX_URL={index}"]
    try:
        image = machine_image(engine, tmp_path_factory.mktemp("image"))
        start_machine(engine, image, machine.name, *options)
        machine.wait_for_systemd()
    except (EngineError, AssertionError) as error:
        machine.engine("rm", "--force", machine.name)
        pytest.skip(f"no container that systemd boots: {error}")
    try:
        machine.playbook("tests/boot.yml")
        yield machine
    finally:
        machine.engine("rm", "--force", machine.name)


@pytest.mark.timeout(900)  # seconds, including the build and the deployment of the machine
def test_system_runs_after_a_reboot(machine: Machine) -> None:
    assert machine.stores_message()
    machine.reboot()
    assert machine.stores_message()
    assert machine.unit("NRestarts") == "0"
    assert machine.log("supervisord").count("exit status 0") >= 3  # each program stopped cleanly
    assert "was interrupted" not in machine.log("postgres")


@pytest.mark.timeout(300)
def test_system_runs_after_the_supervisor_is_killed(machine: Machine) -> None:
    machine("systemctl", "kill", "--kill-who=main", "--signal=KILL", UNIT)
    eventually(
        lambda: machine.unit("NRestarts") == "1" and machine.unit("ActiveState") == "active",
        timeout=60,
        what="systemd has restarted the supervisor",
    )
    assert machine.stores_message()
    # The programs were stopped, not killed.
    assert "was interrupted" not in machine.log("postgres")


@pytest.mark.timeout(600)
def test_unit_takes_over_a_supervisor_of_an_earlier_version(machine: Machine) -> None:
    machine("systemctl", "disable", "--now", UNIT)
    machine("rm", f"/etc/systemd/system/{UNIT}")
    machine("systemctl", "daemon-reload")
    machine(*SUPERVISORD)
    machine.playbook("tests/boot.yml")
    assert machine.unit("ActiveState") == "active"
    assert machine.unit("UnitFileState") == "enabled"
    assert machine.unit("MainPID") == machine("cat", f"{STATE}/run/supervisord.pid").strip()
    assert machine.stores_message()
    assert " changed=0 " in machine.playbook("tests/boot.yml")


@pytest.mark.timeout(300)
def test_teardown_removes_the_unit(machine: Machine) -> None:
    machine.playbook("playbooks/teardown.yml")
    assert machine.unit("LoadState") == "not-found"
    machine.reboot()
    assert not machine.succeeds(f"{STATE}/venv/bin/supervisorctl", *SUPERVISORD[1:], "pid")
    assert " changed=0 " in machine.playbook("playbooks/teardown.yml")
