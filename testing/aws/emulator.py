"""An AWS account for tests: MiniStack with shims.py, as a process on loopback."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import boto3
from botocore.config import Config

from testing.service import HOST, Service, free_port

HERE = Path(__file__).parent
# Made by `make .venv/emulator/.stamp`: MiniStack insists on a release of botocore of its own.
PYTHON = Path(sys.prefix) / "emulator/bin/python"
OBSERVER = "observer"  # the test's own access key
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}


class Call(NamedTuple):
    """An API call to the account: region, and action as IAM names it (``ec2:DescribeVpcs``)."""

    region: str
    action: str
    access_key: str


class Emulator(Service):
    """An empty account. ``folder`` gets its files: log, calls, scenario.

    :param settings: variables of MiniStack's; ``AUTH="true"`` lets it authorise calls.
    """

    name = "emulator"

    def __init__(self, folder: Path, port: int | None = None, **settings: str) -> None:
        super().__init__(folder)
        self.settings = settings
        self.port = port or free_port()
        self.url = f"http://{HOST}:{self.port}"
        (folder / "calls").touch()
        self.rds_certificates.write_text(
            "-----BEGIN CERTIFICATE-----\nof RDS in this account\n-----END CERTIFICATE-----\n"
        )

    def command(self) -> list[str]:
        return [str(PYTHON), str(HERE / "shims.py")]

    def options(self) -> dict[str, Any]:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder),
            "GATEWAY_PORT": str(self.port),
            "BIND_HOST": HOST,
            "IOT_MTLS_ENABLED": "0",  # it would listen on all addresses
            "DOCKER_HOST": "unix:///nonexistent",  # it starts containers where it finds Docker
            "AWS_EC2_METADATA_DISABLED": "true",
            "CALLS": str(self.folder / "calls"),
            "SCENARIO": str(self.folder / "scenario.json"),
            # Of the clusters, as processes of its own group.
            "KUBERNETES_API": str(HERE.parent.parent),
            "KUBERNETES_API_PYTHON": sys.executable,
            # Two keys of the root user, so that the test's calls can be told from the playbook's,
            # which have the emulator's other one.
            **KEYS,
            "AWS_ACCESS_KEY_ID": OBSERVER,
            **self.settings,
        }
        return {"cwd": self.folder, "env": environment, "start_new_session": True}

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/_ministack/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError):
            return False

    @property
    def rds_certificates(self) -> Path:
        """The certificates that AWS serves at truststore.pki.rds.amazonaws.com."""
        return self.folder / "rds-bundle.pem"

    def close(self) -> None:
        # With the APIs of its clusters, which are processes of its group.
        if self.process and self.running:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.wait()

    @property
    def environment(self) -> dict[str, str]:
        """Environment that directs Ansible, boto3 and the AWS CLI to this emulator."""
        return {
            **KEYS,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "PATH": f"{HERE / 'bin'}:{os.environ['PATH']}",
        }

    def client(self, service: str, region: str = "eu-west-1") -> Any:
        return boto3.client(
            service,
            region_name=region,
            endpoint_url=self.url,
            aws_access_key_id=OBSERVER,
            aws_secret_access_key=OBSERVER,
            config=Config(retries={"max_attempts": 2}),
        )

    def scenario(self, **entries: Any) -> None:
        """Set the failures from now on, see shims.py; none by default."""
        temporary = self.folder / "scenario.new"
        temporary.write_text(json.dumps(entries))
        temporary.rename(self.folder / "scenario.json")

    def calls(self) -> list[Call]:
        """Return the API calls of the playbooks."""
        lines = (self.folder / "calls").read_text().splitlines()
        found = [Call(*line.split()) for line in lines]
        return [call for call in found if call.access_key != OBSERVER]

    def stacks(self, region: str = "eu-west-1") -> dict[str, str]:
        """Return the status of each stack by name, without deleted stacks."""
        found = self.client("cloudformation", region).describe_stacks()["Stacks"]
        return {stack["StackName"]: stack["StackStatus"] for stack in found}

    def has_stack(self, name: str, status: str, region: str = "eu-west-1") -> Callable[[], bool]:
        """Return a predicate for `eventually`."""
        return lambda: self.stacks(region).get(name) == status


def main() -> None:
    """Start one for Molecule, and leave it running: its process id is in ``pid``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    options.folder.mkdir(mode=0o700, exist_ok=True)
    emulator = Emulator(options.folder, options.port).start()
    (options.folder / "pid").write_text(f"{emulator.pid}\n")


if __name__ == "__main__":
    main()
