"""``playbooks/verify.yml -e target=aws`` finds what somebody has changed or deleted by hand."""

from __future__ import annotations

import re

import aws_account
import pytest
from deployments import ROOT, Deployment

pytestmark = pytest.mark.timeout(900)


def test_nothing_differs(deployed: Deployment) -> None:
    run = deployed.verify()
    assert run.returncode == 0, run.output
    assert "every resource is as its stack created it" in run.output
    # What follows the message is a Job, which the stand-in for the cluster only says to have run.
    (payload,) = set(re.findall(r"--topic=iot/data: (verify:[0-9a-fA-F]{20})", run.output))
    assert payload
    assert "iot:Publish" in {call.action for call in deployed.account.calls()}


def test_what_was_deleted_and_changed_is_named(deployed: Deployment) -> None:
    iot, logs = deployed.account.client("iot"), deployed.account.client("logs")
    rule = iot.get_topic_rule(ruleName="iot_system_replay_1")["rule"]
    iot.delete_topic_rule(ruleName="iot_system_replay_1")
    logs.put_retention_policy(logGroupName="iot-system-vpc-flow", retentionInDays=1)
    try:
        again = deployed.deploy_stacks()
        assert again.changed == 0, again.output  # a deployment does not see it
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


def test_stack_that_is_gone(deployed: Deployment) -> None:
    other = Deployment(deployed.account, "eu-west-2")
    run = other.verify()
    assert run.returncode == 2
    assert "iot-system-network: there is no such stack" in run.output


# What is not asked for one by one: parts of something that is, or one per account (off by default).
NOT_ASKED = {
    "AWS::EC2::Route",
    "AWS::EC2::VPCGatewayAttachment",
    "AWS::IoT::PolicyPrincipalAttachment",
    "AWS::IoT::ThingPrincipalAttachment",
    "AWS::IoT::Logging",
    "AWS::Budgets::Budget",
}


def test_every_type_of_the_templates_is_asked_for() -> None:
    types = set()
    for template in ROOT.glob("roles/*/files/stack.yml"):
        types |= set(re.findall(r"^    Type: (AWS::\S+)$", template.read_text(), re.MULTILINE))
    parameters = {kind for kind in types if kind.endswith("::Id")}
    assert types - parameters == set(aws_account.ASK) | NOT_ASKED


def test_names_that_preflight_knows_are_those_of_the_stacks(
    deployed: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in deployed.account.environment.items():
        monkeypatch.setenv(name, value)
    account = aws_account.Account("eu-west-1", "iot-system")
    names = [pair for pairs in aws_account.names_of("iot-system").values() for pair in pairs]
    missing = [physical_id for kind, physical_id in names if not account.has(kind, physical_id)]
    # One rule a topic, and there is one topic.
    assert missing == ["iot_system_replay_2", "iot_system_replay_3"]


def test_what_differs_in_writing_alone_is_no_difference() -> None:
    text = {"ExpectedValue": '"{\\"a\\": 1}"', "ActualValue": '{"a":1}'}
    assert aws_account.same(text)
    assert not aws_account.same(text | {"ActualValue": '{"a":2}'})
    assert not aws_account.same({"ExpectedValue": "30", "ActualValue": "1"})
