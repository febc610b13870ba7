"""The preflight checks for AWS. Each error says how to fix it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deployments import ROOT, Deployment

from testing.aws.emulator import Emulator

pytestmark = pytest.mark.timeout(300)

DEFAULT_WANTS = {
    "kubernetes_version": "1.35",
    "support_type": "STANDARD",
    "postgres_version": "17",
    "instance_class": "db.t4g.medium",
    "addresses": 1,
    "nodes": 3,
    "instance_types": ["m7i-flex.large"],
    "spot": False,
}


@pytest.fixture(scope="module")
def account(make_account: Callable[[], Emulator]) -> Emulator:
    return make_account()


@pytest.fixture(autouse=True)
def _no_faults(account: Emulator) -> None:
    account.scenario()


def preflight(
    account: Emulator,
    region: str = "eu-west-1",
    wants: dict[str, Any] | None = None,
    **environment: str,
) -> tuple[int, str]:
    """Run the preflight checks; return the exit status and the errors."""
    own = Deployment(account)
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "roles/aws_base/files/aws_account.py",
            "preflight",
            f"--region={region}",
            "--name=iot-system",
            f"--wants={json.dumps(DEFAULT_WANTS | (wants or {}))}",
        ],
        env=own.environment | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


def test_empty_account_passes(account: Emulator) -> None:
    assert preflight(account) == (0, "")


@pytest.mark.parametrize(
    ("scenario", "wants", "environment", "says", "fix"),
    [
        pytest.param(
            {},
            {},
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
            "No AWS credentials were found",
            "aws sso login",
            id="no credentials",
        ),
        pytest.param(
            {"expired": True}, {}, {}, "have expired (ExpiredToken)", "aws sso login", id="expired"
        ),
        pytest.param(
            {},
            {"kubernetes_version": "1.31"},
            {},
            "Kubernetes 1.31 (eks_kubernetes_version) is not offered",
            "Offered: 1.34, 1.35, 1.36",
            id="Kubernetes",
        ),
        pytest.param(
            {},
            {"postgres_version": "99"},
            {},
            "PostgreSQL 99 (rds_engine_version) is not offered",
            "17.5",
            id="PostgreSQL",
        ),
        pytest.param(
            {"classes_not_offered": True},
            {},
            {},
            "db.t4g.medium (rds_instance_class) is not offered",
            "Choose another class",
            id="class",
        ),
        pytest.param(
            {"quotas": {"L-F678F1CE": 1}},
            {},
            {},
            "VPCs: 1 of 1 are in use",
            "--quota-code L-F678F1CE --desired-value 2",
            id="VPCs",
        ),
        pytest.param(
            {"quotas": {"L-0263D0A3": 0}},
            {},
            {},
            "Elastic IP addresses: 0 of 0",
            "request-service-quota-increase",
            id="addresses",
        ),
        pytest.param(
            {"quotas": {"L-1216C47A": 2}},
            {},
            {},
            "vCPUs of on-demand standard instances",
            "--quota-code L-1216C47A",
            id="vCPUs",
        ),
    ],
)
def test_each_obstacle_is_named_with_its_fix(
    account: Emulator,
    scenario: dict[str, Any],
    wants: dict[str, Any],
    environment: dict[str, str],
    says: str,
    fix: str,
) -> None:
    account.scenario(**scenario)
    returncode, message = preflight(account, wants=wants, **environment)
    assert returncode == 1
    assert says in message
    assert fix in message
    assert "Traceback" not in message


def test_unknown_region_is_refused(account: Emulator) -> None:
    returncode, message = preflight(account, region="eu-west-9")
    assert returncode == 1
    assert "There is no region eu-west-9" in message
    assert "eu-west-1" in message


def test_extended_support_can_be_chosen(account: Emulator) -> None:
    assert (
        preflight(account, wants={"kubernetes_version": "1.31", "support_type": "EXTENDED"})[0] == 0
    )


def create_database(account: Emulator) -> None:
    account.client("rds").create_db_instance(
        DBInstanceIdentifier="iot-system",
        Engine="postgres",
        DBInstanceClass="db.t3.micro",
        MasterUsername="someone",
        MasterUserPassword="something-long",
        AllocatedStorage=20,
    )


def create_cluster(account: Emulator) -> None:
    account.client("eks").create_cluster(
        name="iot-system", roleArn="arn:aws:iam::000000000000:role/x", resourcesVpcConfig={}
    )


def create_log_group(account: Emulator) -> None:
    account.client("logs").create_log_group(logGroupName="/aws/eks/iot-system/cluster")


def create_repository(account: Emulator) -> None:
    account.client("ecr").create_repository(repositoryName="iot-system/collector")


def create_policy(account: Emulator) -> None:
    account.client("iot").create_policy(
        policyName="iot-system-device", policyDocument='{"Version": "2012-10-17", "Statement": []}'
    )


@pytest.mark.parametrize(
    ("create", "what"),
    [
        (create_database, "AWS::RDS::DBInstance iot-system"),
        (create_cluster, "AWS::EKS::Cluster iot-system"),
        (create_log_group, "AWS::Logs::LogGroup /aws/eks/iot-system/cluster"),
        (create_repository, "AWS::ECR::Repository iot-system/collector"),
        (create_policy, "AWS::IoT::Policy iot-system-device"),
    ],
    ids=["database", "cluster", "log group", "repository", "policy"],
)
def test_existing_name_is_refused(
    account: Emulator, create: Callable[[Emulator], None], what: str
) -> None:
    # All cases share an account, so errors of earlier cases may be there as well.
    create(account)
    returncode, message = preflight(account)
    assert returncode == 1
    assert f"{what} exists" in message
    assert "choose another aws_base_name" in message


def test_playbook_stops_before_it_creates_anything(make_account: Callable[[], Emulator]) -> None:
    account = make_account()
    account.scenario(quotas={"L-F678F1CE": 1})
    run = Deployment(account).deploy()
    assert run.returncode == 2
    assert "VPCs: 1 of 1 are in use in eu-west-1" in run.output
    assert account.stacks() == {}


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("aws_base_name=Iot_System", "aws_base_name is 'Iot_System'"),
        ("region=europe", "region is 'europe'"),
        ("aws_base_account=123456789012", "The credentials belong to account 000000000000"),
        ('{"iot_core_topics": ["#"]}', "none of them matching everything"),
        ("rds_ca_bundle_url=file:///nowhere.pem", "set the file: -e rds_ca_bundle_url=file:///"),
        ("rds_ca_bundle_url=file:///etc/hostname", "the file has no certificate in PEM format"),
        (
            '{"eks_deployer_access": true, "eks_deployer_address_url": "file:///etc/hostname"}',
            "is no IPv4 address. Name it, with -e eks_deployer_access=false",
        ),
    ],
)
def test_wrong_setting_stops_the_playbook(
    make_account: Callable[[], Emulator], option: str, says: str
) -> None:
    account = make_account()
    run = Deployment(account).deploy("-e", option)
    assert run.returncode == 2
    assert says in " ".join(run.output.split())
    assert account.stacks() == {}


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (None, "The program aws is not on the PATH"),
        (
            "#!/bin/sh\necho aws-cli/1.45.0 Python/3.11.2 botocore/1.43.0\n",
            "This is aws-cli/1.45.0",
        ),
    ],
    ids=["none", "version 1"],
)
def test_missing_or_old_aws_cli_stops_the_playbook(
    make_account: Callable[[], Emulator], script: str | None, says: str
) -> None:
    account = make_account()
    path = bin_without_engine(account.folder)
    if script:
        (path / "aws").write_text(script)
        (path / "aws").chmod(0o755)
    run = Deployment(account).deploy(PATH=str(path))
    assert run.returncode == 2
    text = " ".join(run.output.split())
    assert "The AWS CLI v2 is needed on this machine" in text
    assert says in text
    assert account.stacks() == {}


def test_missing_image_and_engine_stop_the_playbook(make_account: Callable[[], Emulator]) -> None:
    account = make_account()
    without = f"{ROOT}/testing/aws/bin:/nonexistent"
    run = Deployment(account).deploy(
        "-e", "ecr_image=", PATH=f"{without}:{bin_without_engine(account.folder)}"
    )
    assert run.returncode == 2
    assert "podman: " in run.output
    assert "-e ecr_image=registry/name:tag" in run.output
    assert account.stacks() == {}


def bin_without_engine(folder: Path) -> Path:
    """A directory for PATH with the programs that the playbook needs, but no container engine."""
    path = folder / "tools"
    path.mkdir()
    for name in ("sh", "dirname"):
        (path / name).symlink_to(shutil.which(name) or "")
    return path
