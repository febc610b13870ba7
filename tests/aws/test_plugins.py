"""The action plugin cloudformation_stack, without AWS: its progress lines and error messages."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any

import cloudformation_stack as plugin
import pytest
from botocore.exceptions import ClientError

NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


class CloudFormation:
    """A boto3 client with one stack. Events are returned newest first, as by AWS."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.statuses: list[str] = []

    def add_event(self, status: str, kind: str = "AWS::EKS::Cluster", reason: str = "") -> None:
        event = {
            "EventId": str(len(self.events)),
            "StackId": "arn:stack",
            "Timestamp": NOW,
            "ResourceStatus": status,
            "ResourceType": kind,
            "LogicalResourceId": kind.split("::")[-1],
            "PhysicalResourceId": "id",
        }
        self.events.insert(0, event | ({"ResourceStatusReason": reason} if reason else {}))

    def get_paginator(self, _operation: str) -> CloudFormation:
        return self

    def paginate(self, StackName: str) -> Iterator[dict[str, Any]]:  # noqa: N803 - as boto3
        yield {"StackEvents": self.events}

    def describe_stacks(self, StackName: str) -> dict[str, Any]:  # noqa: N803 - as boto3
        if not self.statuses:
            message = f"Stack with id {StackName} does not exist"
            raise ClientError({"Error": {"Code": "ValidationError", "Message": message}}, "x")
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        return {"Stacks": [{"StackStatus": status}]}


class Watched:
    """The progress of a stack, with a clock that the test sets."""

    def __init__(self) -> None:
        self.stack, self.lines, self.now = CloudFormation(), [], 0.0
        self.progress = plugin.Progress(self.stack, "s", self.lines.append, lambda: self.now)

    lines: list[str]

    def look(self, after: float = 0) -> list[str]:
        self.now += after
        self.progress.look()
        shown, self.lines[:] = list(self.lines), []
        return [" ".join(line.split()) for line in shown]


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_completed_resources_are_shown(watched: Watched) -> None:
    watched.stack.add_event("CREATE_IN_PROGRESS")
    assert watched.look(5) == []
    watched.stack.add_event("CREATE_COMPLETE")
    assert watched.look(10) == ["15 s CREATE_COMPLETE AWS::EKS::Cluster Cluster"]
    assert watched.look(5) == []


def test_resources_in_progress_are_shown_once_a_minute(watched: Watched) -> None:
    watched.stack.add_event("CREATE_IN_PROGRESS")
    assert watched.look(59) == []
    assert watched.look(2) == ["61 s IN_PROGRESS AWS::EKS::Cluster Cluster"]
    assert watched.look(58) == []
    assert watched.look(3) == ["122 s IN_PROGRESS AWS::EKS::Cluster Cluster"]


def test_earlier_events_are_not_shown() -> None:
    stack = CloudFormation()
    stack.add_event("CREATE_COMPLETE")
    lines: list[str] = []
    progress = plugin.Progress(stack, "s", lines.append, lambda: 0)
    progress.look()
    assert lines == []


def test_first_cause_is_not_a_cancelled_resource(watched: Watched) -> None:
    watched.stack.add_event("CREATE_FAILED", "AWS::IAM::Role", "Resource creation cancelled")
    watched.stack.add_event("CREATE_FAILED", "AWS::RDS::DBInstance", "no such class")
    watched.look()
    result = {"msg": "Unknown error", "output": "Stack create failed. Delete complete."}
    message = plugin.explain("iot-system-rds", result, watched.progress.failures)
    assert message == (
        "iot-system-rds: Stack create failed. Delete complete. "
        "First cause: AWS::RDS::DBInstance DBInstance: no such class"
    )


def test_cause_is_read_from_the_module_without_events() -> None:
    log = [
        "AWS::X::Y B CREATE_FAILED: Resource creation cancelled",
        "AWS::X::Y A CREATE_FAILED: why",
    ]
    assert plugin.explain("s", {"output": "failed", "log": log}, []).endswith(
        "First cause: AWS::X::Y A CREATE_FAILED: why"
    )
    assert plugin.explain("s", {"msg": "No permission"}, []).endswith("First cause: No permission")
    assert "gives no reason" in plugin.explain("s", {"msg": "Unknown error"}, [])


def test_settle_waits_for_an_operation_in_progress(watched: Watched) -> None:
    watched.stack.statuses = ["UPDATE_IN_PROGRESS", "UPDATE_IN_PROGRESS", "UPDATE_COMPLETE"]
    found = plugin.settle(watched.stack, "s", watched.progress, 0)
    assert (found["status"], found["alive"]) == ("UPDATE_COMPLETE", True)
    assert "waiting for an operation that was started earlier" in watched.lines[0]


@pytest.mark.parametrize(
    ("status", "alive"),
    [
        ("REVIEW_IN_PROGRESS", False),
        ("ROLLBACK_COMPLETE", False),
        ("DELETE_FAILED", False),
        ("CREATE_FAILED", False),
        ("UPDATE_ROLLBACK_COMPLETE", True),
        ("UPDATE_ROLLBACK_FAILED", True),
        ("IMPORT_COMPLETE", True),
    ],
)
def test_settle_tells_whether_the_stack_can_be_updated(
    watched: Watched, status: str, alive: bool
) -> None:
    watched.stack.statuses = [status]
    assert plugin.settle(watched.stack, "s", watched.progress, 0)["alive"] is alive


def test_settle_without_a_stack(watched: Watched) -> None:
    found = plugin.settle(watched.stack, "s", watched.progress, 0)
    assert (found["status"], found["alive"], found["outputs"]) == (None, False, {})


def test_changes_are_shown_with_properties_and_replacement() -> None:
    change = {
        "Action": "Modify",
        "ResourceType": "AWS::RDS::DBInstance",
        "LogicalResourceId": "Instance",
        "Replacement": "True",
        "Details": [{"Target": {"Attribute": "Properties", "Name": "DBName"}}],
    }
    line = plugin.line_of(plugin.change_of({"ResourceChange": change}))
    assert line == "  would Modify  AWS::RDS::DBInstance Instance (DBName): REPLACED"
    template = "Resources: {A: {Type: 'AWS::X::Y', Condition: C, Properties: {B: !Ref D}}}"
    assert plugin.line_of(plugin.additions(template)[0]) == "  would Add     AWS::X::Y A (if C)"


@pytest.mark.parametrize(
    "text",
    [
        "An error occurred (ExpiredToken) when calling the DescribeStacks operation",
        "Unable to locate credentials",
        "Error loading SSO Token: Token for x does not exist",
        "The SSO session associated with this profile has expired",
    ],
)
def test_credential_errors_are_recognised(text: str) -> None:
    assert plugin.CREDENTIALS.search(text)
    assert not plugin.CREDENTIALS.search("Token bucket exhausted")
