"""The playbooks for AWS, run against an emulated account."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ansible_runs import MITOGEN

from testing.aws.emulator import Call, Emulator
from testing.kubernetes_api.process import StandIn
from testing.service import eventually, kill_tree

ROOT = Path(__file__).parents[2]
PATIENCE = 600.0  # seconds a playbook may take on a busy machine


class Run(NamedTuple):
    """A finished run of a playbook."""

    returncode: int
    output: str

    @property
    def changed(self) -> int:
        """How many tasks changed something."""
        (count,) = re.findall(r"^aws-account .* changed=(\d+)", self.output, re.MULTILINE)
        return int(count)

    @property
    def events(self) -> list[str]:
        """What the screen showed of resources: ``CREATE_COMPLETE AWS::EC2::VPC Vpc``."""
        lines = re.findall(r"^ +\d+ s  (\S+) +(AWS::\S+ \S+)", self.output, re.MULTILINE)
        return [" ".join(line) for line in lines]

    @property
    def planned(self) -> list[str]:
        """What a check would change: ``Modify AWS::EC2::VPC Vpc (CidrBlock): REPLACED``."""
        found = re.findall(r"^  would (\w+) +(.*)$", self.output, re.MULTILINE)
        return [" ".join(line) for line in found]


class Deployment:
    """The system in one region of an account."""

    first_run: Run
    first_calls: list[Call]

    def __init__(self, account: Emulator, region: str = "eu-west-1") -> None:
        self.account, self.region = account, region
        self.home = account.folder / f"home-{region}"
        self.home.mkdir(exist_ok=True)

    def command(self, playbook: str, *options: str) -> list[str | Path]:
        return [
            Path(sys.executable).with_name("ansible-playbook"),
            ROOT / "playbooks" / playbook,
            f"--extra-vars=region={self.region}",
            "--extra-vars=aws_base_poll_seconds=1",
            f"--extra-vars=rds_ca_bundle_url=file://{self.account.rds_certificates}",
            "--extra-vars=eks_deployer_access=false",
            *options,
        ]

    @property
    def environment(self) -> dict[str, str]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("AWS_", "PYTHONDONTWRITEBYTECODE"))
        }
        ours = {"ANSIBLE_NOCOLOR": "1", "LC_ALL": "C.UTF-8", "HOME": str(self.home)}
        return inherited | ours | MITOGEN | self.account.environment

    def run(self, playbook: str, *options: str, **environment: str) -> Run:
        done = subprocess.run(
            self.command(playbook, *options),
            cwd=ROOT,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
        return Run(done.returncode, done.stdout)

    def deploy(self, *options: str, **environment: str) -> Run:
        return self.run(
            "aws.yml",
            "--extra-vars=ecr_image=registry.invalid/collector:1",
            *options,
            **environment,
        )

    def deploy_stacks(self, *options: str, **environment: str) -> Run:
        """The stacks alone: nothing on the cluster, which takes as long again."""
        tags = ",".join(f"{role}_run" for role in ("network", "ecr", "rds", "eks", "iot_core"))
        return self.deploy("--tags", tags, *options, **environment)

    @property
    def cluster(self) -> StandIn:
        """The API of the deployed cluster."""
        described = self.account.client("cloudformation", self.region).describe_stacks(
            StackName="iot-system-eks"
        )["Stacks"][0]
        outputs = {one["OutputKey"]: one["OutputValue"] for one in described["Outputs"]}
        return StandIn(outputs["Endpoint"], self.home / f".kube/iot-system-{self.region}")

    def teardown(self, *options: str, **environment: str) -> Run:
        confirm = "--extra-vars=confirm=true"
        return self.run("teardown.yml", "--extra-vars=target=aws", confirm, *options, **environment)

    def verify(self) -> Run:
        return self.run("verify.yml", "--extra-vars=target=aws")

    def kill_when(self, playbook: str, condition: Callable[[], bool], *options: str) -> None:
        """Start a playbook and ``kill -9`` it, with all its processes, once the condition holds."""
        with (self.account.folder / "killed").open("ab") as log:
            process = subprocess.Popen(
                self.command(playbook, *options),
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            eventually(lambda: condition() or process.poll() is not None, PATIENCE, "the condition")
            assert process.poll() is None, (self.account.folder / "killed").read_text()[-3000:]
        finally:
            kill_tree(process.pid)
            process.wait()

    def left(self, region: str | None = None) -> list[str]:
        """What the account has of the system, as teardown lists it; without its last line."""
        done = subprocess.run(
            [
                sys.executable,
                ROOT / "roles/aws_base/files/aws_account.py",
                "left",
                f"--region={region or self.region}",
                "--name=iot-system",
            ],
            env=self.environment,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        return done.stdout.splitlines()[:-1]
