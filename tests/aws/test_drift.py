"""``playbooks/verify.yml -e target=aws`` finds resources that were changed or deleted by hand."""

from __future__ import annotations

import argparse
import re

import aws_account
import pytest
from deployments import ROOT, Deployment

pytestmark = pytest.mark.timeout(900)


def test_unchanged_deployment_has_no_drift(deployed: Deployment) -> None:
    run = deployed.verify()
    assert run.returncode == 0, run.output
    assert "every resource is as its stack created it" in run.output
    # A Job follows the message. The stand-in for the cluster does not really run it.
    (payload,) = set(re.findall(r"--topic=iot/data: (verify:[0-9a-fA-F]{20})", run.output))
    assert payload
    assert "iot:Publish" in {call.action for call in deployed.account.calls()}


def test_deleted_and_changed_resources_are_named(deployed: Deployment) -> None:
    iot, logs = deployed.account.client("iot"), deployed.account.client("logs")
    rule = iot.get_topic_rule(ruleName="iot_system_replay_1")["rule"]
    iot.delete_topic_rule(ruleName="iot_system_replay_1")
    logs.put_retention_policy(logGroupName="iot-system-vpc-flow", retentionInDays=1)
    try:
        again = deployed.deploy_stacks()
        assert again.changed == 0, again.output  # a deployment does not detect drift
        run = deployed.verify()
    finally:
        kept = {key: rule[key] for key in ("sql", "actions", "awsIotSqlVersion", "errorAction")}
        iot.create_topic_rule(ruleName="iot_system_replay_1", topicRulePayload=kept)
        logs.put_retention_policy(logGroupName="iot-system-vpc-flow", retentionInDays=30)
    assert run.returncode == 2, run.output
    text = " ".join(run.output.split())
    assert "AWS::IoT::TopicRule ReplayRule1 (iot_system_replay_1) is gone" in text
    assert "differs in /RetentionInDays: 1 instead of 30" in text
    assert "--deployment-mode REVERT_DRIFT" in text


def test_missing_stack_is_reported(deployed: Deployment) -> None:
    other = Deployment(deployed.account, "eu-west-2")
    run = other.verify()
    assert run.returncode == 2
    assert "iot-system-network: there is no such stack" in run.output


# Types that are not checked: parts of a checked resource, or one per account (off by default).
NOT_CHECKED = {
    "AWS::EC2::Route",
    "AWS::EC2::VPCGatewayAttachment",
    "AWS::IoT::PolicyPrincipalAttachment",
    "AWS::IoT::ThingPrincipalAttachment",
    "AWS::IoT::Logging",
    "AWS::Budgets::Budget",
}


def test_all_resource_types_of_the_templates_are_checked() -> None:
    types = set()
    for template in ROOT.glob("roles/*/files/stack.yml"):
        types |= set(re.findall(r"^    Type: (AWS::\S+)$", template.read_text(), re.MULTILINE))
    parameters = {kind for kind in types if kind.endswith("::Id")}
    assert types - parameters == set(aws_account.ASK) | NOT_CHECKED


def test_preflight_knows_the_names_of_all_resources(
    deployed: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in deployed.account.environment.items():
        monkeypatch.setenv(name, value)
    account = aws_account.Account("eu-west-1", "iot-system")
    names = [pair for pairs in aws_account.names_of("iot-system").values() for pair in pairs]
    missing = [physical_id for kind, physical_id in names if not account.has(kind, physical_id)]
    # There is one rule for each topic, and only one topic.
    assert missing == ["iot_system_replay_2", "iot_system_replay_3"]


def test_differences_in_json_formatting_are_ignored() -> None:
    text = {"ExpectedValue": '"{\\"a\\": 1}"', "ActualValue": '{"a":1}'}
    assert aws_account.same(text)
    assert not aws_account.same(text | {"ActualValue": '{"a":2}'})
    assert not aws_account.same({"ExpectedValue": "30", "ActualValue": "1"})


def test_changes_that_rds_makes_by_itself_are_ignored() -> None:
    """It enlarges storage and installs minor versions. CloudFormation reports both as drift."""
    changes = [  # path, expected, actual
        ("/AllocatedStorage", "50", "66"),
        ("/EngineVersion", "17.6", "17.10"),
        ("/AllocatedStorage", "50", "40"),
        ("/EngineVersion", "17.6", "18.1"),
        ("/EngineVersion", "17.6", "17.5"),
        ("/BackupRetentionPeriod", "7", "8"),
    ]
    keys = ("PropertyPath", "ExpectedValue", "ActualValue")
    answers: dict[str, aws_account.Json] = {
        "detect_stack_drift": {"StackDriftDetectionId": "1"},
        "describe_stack_drift_detection_status": {"DetectionStatus": "DETECTION_COMPLETE"},
        "describe_stack_resource_drifts": {
            "StackResourceDrifts": [
                {
                    "LogicalResourceId": "Instance",
                    "StackResourceDriftStatus": "MODIFIED",
                    "PropertyDifferences": [dict(zip(keys, c, strict=True)) for c in changes],
                }
            ]
        },
    }

    class Account(aws_account.Account):
        def stack(self, name: str) -> str:
            return "UPDATE_COMPLETE"

        def ask(self, service: str, operation: str, **arguments: object) -> aws_account.Json:
            return answers[operation]

        def all(self, *_: str, **arguments: object) -> list[aws_account.Json]:
            return [{"LogicalResourceId": "Instance", "ResourceType": "AWS::RDS::DBInstance"}]

        def has(self, kind: str, physical_id: str) -> bool:
            return True

    arguments = argparse.Namespace(command="drift", stacks=["rds"])
    with pytest.raises(SystemExit) as end:
        aws_account.run(Account("eu-west-1", "iot-system"), arguments)
    assert re.findall(r"differs in (.*)", str(end.value)) == [
        f"{path}: {actual} instead of {expected}" for path, expected, actual in changes[2:]
    ]
