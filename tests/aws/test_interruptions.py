"""After an interruption, the next run completes the deployment, and teardown removes it.

Each test interrupts some stacks. ``make test-faults`` (FAULTS=full) interrupts all of them.
"""

from __future__ import annotations

import os

import pytest
from deployments import Deployment

from testing.aws.emulator import Emulator
from testing.service import eventually

pytestmark = [pytest.mark.timeout(1800), pytest.mark.faults]

STACKS = ["network", "ecr", "rds", "eks", "iot-core"]
# For each stack, one of its last resources. If it fails, there is something to roll back.
LATE = {
    "network": ("AWS::EC2::NatGateway", "NatA"),
    "ecr": ("AWS::ECR::Repository", "Repository"),
    "rds": ("AWS::RDS::DBInstance", "Instance"),
    "eks": ("AWS::EKS::Nodegroup", "Nodes"),
    "iot-core": ("AWS::IoT::TopicRule", "ReplayRule1"),
}


# One plugin creates all stacks, and the role ecr does nothing else. The other roles also handle a
# password, a kubeconfig, namespaces, a certificate or a snapshot.
FULL = os.environ.get("FAULTS") == "full"
KILLED = ["network", "rds", "eks", "iot-core"] if FULL else ["network", "eks"]
KILLED_IN_TEARDOWN = ["iot-core", "rds", "eks", "network"] if FULL else ["rds"]
FAILED = ["network", "rds", "eks", "iot-core"] if FULL else ["rds", "iot-core"]
FAILED_IN_TEARDOWN = ["iot-core", "network"] if FULL else ["network"]


def tags(interrupted: list[str], stack: str) -> str:
    """Tags of the tasks that create the stacks from the last interrupted one up to ``stack``."""
    index = interrupted.index(stack)
    first = STACKS.index(interrupted[index - 1]) if index else 0
    return ",".join(
        f"{name.replace('-', '_')}_run" for name in STACKS[first : STACKS.index(stack) + 1]
    )


def all_stacks_complete(deployment: Deployment) -> dict[str, str]:
    return {f"iot-system-{name}": "CREATE_COMPLETE" for name in STACKS}


def test_next_run_completes_stacks_after_a_kill(account: Emulator) -> None:
    """Each run completes the stack of the last kill, and is killed in the next stack."""
    deployment = Deployment(account)
    for stack in KILLED:
        account.scenario(slow={LATE[stack][0]: 4})
        deployment.kill_when(
            "aws.yml",
            account.has_stack(f"iot-system-{stack}", "CREATE_IN_PROGRESS"),
            "--extra-vars=ecr_image=x/y:1",
            f"--tags={tags(KILLED, stack)}",
        )
    account.scenario()
    run = deployment.deploy_stacks()
    assert run.returncode == 0, run.output
    assert account.stacks() == all_stacks_complete(deployment)
    assert deployment.deploy_stacks().changed == 0

    # The same for teardown, in its order of deletion.
    for stack in KILLED_IN_TEARDOWN:
        account.scenario(slow={LATE[stack][0]: 4})
        deployment.kill_when(
            "teardown.yml",
            account.has_stack(f"iot-system-{stack}", "DELETE_IN_PROGRESS"),
            "--extra-vars=target=aws",
            "--extra-vars=confirm=true",
        )
    account.scenario()
    run = deployment.teardown()
    assert run.returncode == 0, run.output
    assert account.stacks() == {}


def test_failed_resource_is_named_and_the_next_run_continues(account: Emulator) -> None:
    deployment = Deployment(account)
    for stack in FAILED:
        kind, resource = LATE[stack]
        account.scenario(fail={resource: f"planted in {stack}"})
        run = deployment.deploy("--tags", tags(FAILED, stack))
        assert run.returncode == 2, run.output
        assert f"First cause: {kind} {resource}: planted in {stack}" in " ".join(run.output.split())
        done = [f"iot-system-{name}" for name in STACKS[: STACKS.index(stack)]]
        assert {name: account.stacks()[name] for name in done} == dict.fromkeys(
            done, "CREATE_COMPLETE"
        )
    account.scenario()
    run = deployment.deploy_stacks()
    assert run.returncode == 0, run.output
    assert account.stacks() == all_stacks_complete(deployment)

    # The next teardown continues after a failed deletion.
    for stack in FAILED_IN_TEARDOWN:
        account.scenario(fail_deletion={LATE[stack][0]: f"in the way of {stack}"})
        run = deployment.teardown("-e", "final_snapshot=false")
        assert run.returncode == 2, run.output
        assert f"in the way of {stack}" in run.output
    account.scenario()
    run = deployment.teardown("-e", "final_snapshot=false")
    assert run.returncode == 0, run.output
    assert not [line for line in deployment.left() if "snapshot" in line]


def create_broken_stacks(account: Emulator, kinds: dict[str, str]) -> None:
    """Create stacks in the given states, with small templates."""
    cloudformation = account.client("cloudformation")
    queue = "Resources: {Thing: {Type: 'AWS::SQS::Queue', Properties: {}}}"
    for stack, kind in kinds.items():
        name = f"iot-system-{stack}"
        if kind == "REVIEW_IN_PROGRESS":
            cloudformation.create_change_set(
                StackName=name, ChangeSetName="x", ChangeSetType="CREATE", TemplateBody=queue
            )
            continue
        failing = {"OnFailure": "DO_NOTHING" if kind == "CREATE_FAILED" else "ROLLBACK"}
        if kind == "DELETE_FAILED":
            failing = {}
        else:
            account.scenario(fail={"Thing": "planted"})
        cloudformation.create_stack(StackName=name, TemplateBody=queue, **failing)
        if kind == "DELETE_FAILED":
            eventually(account.has_stack(name, "CREATE_COMPLETE"))
            account.scenario(fail_deletion={"AWS::SQS::Queue": "planted"})
            cloudformation.delete_stack(StackName=name)
        eventually(account.has_stack(name, kind), what=f"{name} to be {kind}")
        account.scenario()


STATES = {
    "network": "REVIEW_IN_PROGRESS",
    "ecr": "ROLLBACK_COMPLETE",
    "rds": "CREATE_FAILED",
    "eks": "DELETE_FAILED",
    "iot-core": "ROLLBACK_COMPLETE",
}


def test_stacks_that_cannot_be_updated_are_replaced(account: Emulator) -> None:
    create_broken_stacks(account, STATES)
    deployment = Deployment(account)
    check = deployment.deploy("--check")
    assert check.returncode == 0, check.output
    run = deployment.deploy_stacks()
    assert run.returncode == 0, run.output
    assert account.stacks() == all_stacks_complete(deployment)


def test_stacks_that_cannot_be_updated_are_deleted(account: Emulator) -> None:
    create_broken_stacks(account, STATES)
    run = Deployment(account).teardown()
    assert run.returncode == 0, run.output
    assert account.stacks() == {}


def test_failed_update_rollback_is_explained(account: Emulator) -> None:
    deployment = Deployment(account)
    assert deployment.deploy("--tags", "network_run").returncode == 0
    account.scenario(status={"iot-system-network": "UPDATE_ROLLBACK_FAILED"})
    run = deployment.deploy("--tags", "network_run")
    assert run.returncode == 2
    assert (
        "continue-update-rollback --region eu-west-1 --stack-name iot-system-network" in run.output
    )


def test_next_run_continues_after_credentials_expire(account: Emulator) -> None:
    deployment = Deployment(account)
    account.scenario(slow={"AWS::EC2::NatGateway": 4}, expired_after="cloudformation:CreateStack")
    run = deployment.deploy("--tags", "network_run")
    assert run.returncode == 2, run.output
    text = " ".join(run.output.split())
    assert "The AWS credentials are missing or no longer valid. Log in again" in text
    assert "it continues where it stopped" in text
    account.scenario()
    run = deployment.deploy("--tags", "network_run")
    assert run.returncode == 0, run.output
    assert account.stacks() == {"iot-system-network": "CREATE_COMPLETE"}
