"""Deployment over SSH with inventories/remote.

The remote machine is this machine, with another user and an sshd of the test.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from ansible_runs import ROOT, WITHOUT_MITOGEN, playbook

from testing.service import HOST, IS_ROOT, eventually, free_port

PORTS = (
    *("mosquitto_port", "postgres_port", "postgres_exporter_port"),
    *("collector_http_port", "prometheus_port", "prometheus_node_exporter_port"),
)
# Environment variables with which pip reaches the package index.
NEEDED_BY_PIP = ("PIP_", "SSL_CERT", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")


@pytest.fixture
def user() -> Iterator[pwd.struct_passwd]:
    """A new user with a home directory if the test runs as root, else the current user."""
    if not IS_ROOT:
        yield pwd.getpwuid(os.geteuid())
        return
    name = f"iot-test-{uuid.uuid4().hex[:8]}"
    # No password matches `*`. Without a password, sshd would see the account as locked.
    subprocess.run(
        ["useradd", "--system", "--create-home", "--shell=/bin/sh", "--password=*", name],
        check=True,
    )
    try:
        yield pwd.getpwnam(name)
    finally:
        # userdel fails until the last process of the user, the SSH connection, has ended.
        remove = ["userdel", "--remove", name]
        eventually(lambda: subprocess.run(remove, capture_output=True, check=False).returncode == 0)


def make_key(path: Path) -> Path:
    """Make a key pair."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path


@pytest.fixture
def inventory(user: pwd.struct_passwd, tmp_path: Path) -> Iterator[list[str]]:
    """Inventory options for inventories/remote, with the address of an sshd for `user`."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if not sshd:
        pytest.skip("sshd is not installed; `make packages` installs it")
    port = free_port()
    # Not below tmp_path, which other users cannot read.
    with TemporaryDirectory(prefix="iot-ssh-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        host_key, key = make_key(folder / "host_key"), make_key(folder / "key")
        key.with_suffix(".pub").rename(folder / "authorized_keys")
        environment = " ".join(
            f'"{name}={value}"'
            for name, value in os.environ.items()
            if name.startswith(NEEDED_BY_PIP)
        )
        config = folder / "sshd_config"
        config.write_text(
            f"ListenAddress {HOST}:{port}\n"
            f"HostKey {host_key}\n"
            f"AuthorizedKeysFile {folder}/authorized_keys\n"
            f"AllowUsers {user.pw_name}\n"
            "PidFile none\n"
            "UsePAM no\n"
            "StrictModes no\n"  # /tmp is writable by all users
            "Subsystem sftp internal-sftp\n" + (f"SetEnv {environment}\n" if environment else "")
        )
        known_hosts = folder / "known_hosts"
        known_hosts.write_text(f"[{HOST}]:{port} {host_key.with_suffix('.pub').read_text()}")
        machine = {
            "ansible_host": HOST,
            "ansible_port": port,
            "ansible_user": user.pw_name,
            "ansible_ssh_private_key_file": str(key),
            "ansible_ssh_common_args": f"-F none -o UserKnownHostsFile={known_hosts}",
            "ansible_control_path": str(folder / "connection"),
            "iot_state_dir": f"{user.pw_dir}/{uuid.uuid4().hex[:8]}",
            "iot_install_packages": False,
            "collector_first_messages": True,
            "collector_topics": ["plant/+/telemetry"],
        } | {name: free_port() for name in PORTS}
        here = tmp_path / "here.yml"
        here.write_text(yaml.safe_dump({"host": {"hosts": {"iot-host": machine}}}))
        if IS_ROOT:
            Path("/run/sshd").mkdir(exist_ok=True)  # sshd's empty directory
        log = (tmp_path / "sshd.log").open("w")
        with log, subprocess.Popen([sshd, "-D", "-e", "-f", config], stderr=log) as server:
            try:
                eventually(lambda: "listening" in (tmp_path / "sshd.log").read_text())
                yield [f"-i{ROOT / 'inventories/remote'}", f"-i{here}"]
            finally:
                # Ansible keeps its connection open for a minute.
                options = ("-F", "none", "-o", f"ControlPath={folder}/connection", "-O", "exit")
                subprocess.run(["ssh", *options, HOST], capture_output=True, check=False)
                server.terminate()


@pytest.mark.timeout(400)
def test_remote_host_is_deployed_verified_and_removed(
    inventory: list[str], user: pwd.struct_passwd, tmp_path: Path
) -> None:
    def play(name: str, *arguments: str) -> str:
        done = playbook(
            f"playbooks/{name}.yml",
            *inventory,
            *arguments,
            **WITHOUT_MITOGEN,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    (machine,) = yaml.safe_load((tmp_path / "here.yml").read_text())["host"]["hosts"].values()
    state = Path(machine["iot_state_dir"])
    try:
        shown = play("host")
        assert f"http://127.0.0.1:{machine['collector_http_port']}" in shown
        assert "100 messages stored in all" in shown
        assert state.owner() == (state / "data/postgres").owner() == user.pw_name
        assert "it is in the table, once" in play("verify")
    finally:
        removed = play("teardown", "-e", "remove_data=true", "-e", "confirm=true")
    assert "failed=0" in removed
    assert not state.exists()
