"""``playbooks/aws.yml``: first run, second run, check mode, changes and replacements."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import boto3
import kubernetes
import pytest
import yaml
from ansible_runs import WITHOUT_MITOGEN
from deployments import Deployment

from testing.aws.emulator import PYTHON, Emulator

pytestmark = pytest.mark.timeout(900)

STACKS = ["network", "ecr", "rds", "eks", "iot-core"]


def test_first_run_creates_all_stacks_and_shows_progress(deployed: Deployment) -> None:
    run = deployed.first_run
    assert run.returncode == 0, run.output
    assert deployed.account.stacks() == {f"iot-system-{name}": "CREATE_COMPLETE" for name in STACKS}
    vpc, cluster = (
        f"CREATE_COMPLETE AWS::{what}" for what in ("EC2::VPC Vpc", "EKS::Cluster Cluster")
    )
    assert run.events.index(vpc) < run.events.index(cluster)
    assert "registry.invalid/collector:1 is used, as ecr_image says" in run.output


def test_only_the_database_stack_has_termination_protection(deployed: Deployment) -> None:
    described = deployed.account.client("cloudformation").describe_stacks()["Stacks"]
    protected = [one["StackName"] for one in described if one["EnableTerminationProtection"]]
    assert protected == ["iot-system-rds"]


def test_address_of_the_deploying_machine_is_allowed(deployed: Deployment, tmp_path: Path) -> None:
    (tmp_path / "address").write_text("198.51.100.7\n")
    options = (
        "-e",
        "eks_deployer_access=true",
        "-e",
        f"eks_deployer_address_url=file://{tmp_path}/address",
    )
    run = deployed.deploy_stacks("--check", *options)
    assert run.returncode == 0, run.output
    # The emulator's change set also has the resources that refer to the cluster.
    assert "Modify AWS::EKS::Cluster Cluster (ResourcesVpcConfig)" in run.planned
    assert ": REPLACED" not in run.output


def test_second_run_changes_nothing(deployed: Deployment) -> None:
    run = deployed.deploy(**WITHOUT_MITOGEN)
    assert (run.returncode, run.changed, run.events) == (0, 0, []), run.output


def test_check_mode_names_the_properties_that_would_change(deployed: Deployment) -> None:
    run = deployed.deploy_stacks(
        "--check",
        "-erds_instance_class=db.m8g.large",
        "-ecollector_archive_target=s3://my-bucket/months/",
    )
    assert run.returncode == 0, run.output
    assert run.planned == [
        "Modify AWS::RDS::DBInstance Instance (DBInstanceClass)",
        "Modify AWS::IAM::Role CollectorRole (Policies)",
    ]
    assert run.changed == 2


def test_changed_value_changes_only_its_resource(deployed: Deployment) -> None:
    run = deployed.deploy_stacks("-e", "ecr_untagged_days=3")
    assert (run.returncode, run.changed) == (0, 1), run.output
    # The emulator also updates the unchanged key of the stack.
    assert set(run.events) - {"UPDATE_COMPLETE AWS::KMS::Key Key"} == {
        "UPDATE_COMPLETE AWS::ECR::Repository Repository"
    }
    assert deployed.deploy_stacks().changed == 1  # set it back


@pytest.mark.parametrize(
    ("role", "options", "resource"),
    [
        ("rds", ["rds_database=other"], "AWS::RDS::DBInstance Instance, because of DBName"),
        (
            "eks",
            [
                "eks_creator_is_admin=false",
                '{"eks_admin_arns": ["arn:aws:iam::000000000000:role/x"]}',
            ],
            "AWS::EKS::Cluster Cluster, because of AccessConfig",
        ),
    ],
)
def test_database_and_cluster_are_not_replaced(
    deployed: Deployment, role: str, options: list[str], resource: str
) -> None:
    before = deployed.account.stacks()
    run = deployed.deploy(*(f"-e{option}" for option in options), "--tags", f"{role}_run")
    assert run.returncode == 2, run.output
    assert resource in run.output
    assert f"-e aws_base_allow_replacement={role}" in run.output
    assert ": REPLACED" in run.output
    assert deployed.account.stacks() == before


def test_database_and_cluster_are_replaced_when_allowed(account: Emulator) -> None:
    deployment = Deployment(account)
    assert deployment.deploy("--tags", "network_run,rds_run,eks_run").returncode == 0
    api = kubernetes.client.ApiClient(kubernetes.client.Configuration(host=deployment.cluster.url))
    kubernetes.client.CoreV1Api(api).create_namespace({"metadata": {"name": "iot-system"}})
    changes = {
        "rds_database": "other",
        "eks_creator_is_admin": False,
        "eks_admin_arns": ["arn:aws:iam::000000000000:role/x"],
        "aws_base_allow_replacement": ["rds", "eks"],
    }
    run = deployment.deploy("-e", json.dumps(changes), "--tags", "rds_run,eks_run")
    assert run.returncode == 0, run.output
    assert "DELETE_COMPLETE AWS::RDS::DBInstance Instance" in run.events
    assert "DELETE_COMPLETE AWS::EKS::Cluster Cluster" in run.events
    # The namespace is deleted first, or its volumes would be left behind.
    assert "changed: [aws-account] => (item=iot-system)" in run.output
    (database,) = account.client("rds").describe_db_instances()["DBInstances"]
    assert database["DBName"] == "other"
    assert [line for line in deployment.left() if line.startswith("rds: snapshot")]


def test_check_mode_works_in_an_empty_and_a_partly_deployed_account(account: Emulator) -> None:
    deployment = Deployment(account)
    empty = deployment.deploy("--check")
    assert empty.returncode == 0, empty.output
    for resource in ("EC2::VPC Vpc", "RDS::DBInstance Instance", "EKS::Cluster Cluster"):
        assert f"Add AWS::{resource}" in empty.planned
    assert account.stacks() == {}
    assert not list(deployment.home.glob("*/.kube/*"))

    assert deployment.deploy("--tags", "network_run").returncode == 0
    half = deployment.deploy("--check")
    assert half.returncode == 0, half.output
    assert not [line for line in half.planned if " AWS::EC2::VPC" in line]
    assert "Add AWS::RDS::DBInstance Instance" in half.planned


def test_every_call_is_in_the_region(deployed: Deployment) -> None:
    assert {call.region for call in deployed.first_calls} == {"eu-west-1"}
    assert len(deployed.first_calls) > 100


def test_other_region_stays_empty(deployed: Deployment) -> None:
    assert deployed.account.stacks("eu-central-1") == {}
    assert deployed.left("eu-central-1") == []


def test_kubeconfig_is_private_and_gets_tokens(deployed: Deployment) -> None:
    path = deployed.home / ".kube/iot-system-eu-west-1"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    config = yaml.safe_load(path.read_text())
    assert "token" not in path.read_text().replace("get-token", "")
    (user,) = config["users"]
    command = user["user"]["exec"]
    assert command["command"] == "aws"
    made = subprocess.run(
        [PYTHON.with_name("aws"), *command["args"]],
        env=deployed.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    credential = json.loads(made.stdout)
    assert credential["status"]["token"].startswith("k8s-aws-v1.")
    assert credential["apiVersion"] == command["apiVersion"]


def test_device_key_is_only_in_its_file(deployed: Deployment) -> None:
    folder = deployed.home / ".local/state/iot-system-eu-west-1/device"
    key = (folder / "device.key").read_text()
    assert stat.S_IMODE((folder / "device.key").stat().st_mode) == 0o600
    secret = key.splitlines()[1]
    assert secret not in deployed.first_run.output
    described = deployed.account.client("cloudformation").describe_stacks()
    assert secret not in json.dumps(described, default=str)
    assert "BEGIN CERTIFICATE" in (folder / "device.pem").read_text()


def test_iot_endpoint_is_shown(deployed: Deployment) -> None:
    endpoint = deployed.account.client("iot").describe_endpoint(endpointType="iot:Data-ATS")
    assert f"mqtts://{endpoint['endpointAddress']}:8883" in deployed.first_run.output


def test_calls_are_recorded_for_the_policy(deployed: Deployment) -> None:
    """AWS_CALLS=file writes the recorded calls, with which the deploy policies are compared."""
    actions = {call.action for call in deployed.account.calls()}
    assert {
        "cloudformation:CreateStack",
        "sts:GetCallerIdentity",
        "iot:DescribeEndpoint",
    } <= actions
    assert all(":" in action and " " not in action for action in actions)
    if folder := os.environ.get("AWS_CALLS"):
        Path(folder).write_text("\n".join(sorted(actions)) + "\n")


def test_calls_of_the_test_are_not_recorded(account: Emulator) -> None:
    account.client("ec2").describe_vpcs()
    assert account.calls() == []
    session = boto3.Session("test", "test", region_name="eu-west-1")
    session.client("ec2", endpoint_url=account.url).describe_vpcs()
    assert [call.action for call in account.calls()] == ["ec2:DescribeVpcs"]
