"""Checks of an account for responses of AWS that the emulator does not give."""

from __future__ import annotations

from typing import Any

import aws_account
import pytest
from botocore.exceptions import ClientError

Responses = dict[str, Any]


class Stub(aws_account.Account):
    """An account with fixed responses, by operation. A response is a mapping or an error."""

    def __init__(self, responses: Responses) -> None:
        super().__init__("eu-west-1", "iot-system")
        self.responses = responses

    def ask(self, service: str, operation: str, **arguments: Any) -> Responses:
        response = self.responses[operation]
        if callable(response):
            response = response(**arguments)
        if isinstance(response, Exception):
            raise response
        return dict(response)

    def all(self, service: str, operation: str, key: str, **arguments: Any) -> list[Any]:
        return list(self.ask(service, operation, **arguments)[key])


def refused(code: str, message: str = "no") -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": message}}, "AnOperation")


def keys(error: ClientError) -> Stub:
    """An account with two keys: one that cannot be described, and one of the system."""

    def describe(**arguments: Any) -> Responses | ClientError:
        if arguments["KeyId"] == "other":
            return error
        return {"KeyMetadata": {"KeyManager": "CUSTOMER", "KeyState": "Enabled"}}

    return Stub(
        {
            "list_keys": {"Keys": [{"KeyId": "other"}, {"KeyId": "ours"}]},
            "describe_key": describe,
            "list_resource_tags": {"Tags": [{"TagKey": "Project", "TagValue": "iot-system"}]},
        }
    )


def test_keys_with_a_policy_of_their_own_do_not_stop_the_list() -> None:
    """A key's policy can deny kms:DescribeKey to everyone but the key's users."""
    found = list(aws_account.left_in_kms(keys(refused("AccessDeniedException"))))
    assert [one.what for one in found] == ["key ours (Enabled)"]


def test_expired_credentials_stop_the_list_of_keys() -> None:
    with pytest.raises(ClientError, match="ExpiredTokenException"):
        list(aws_account.left_in_kms(keys(refused("ExpiredTokenException"))))


def detection(status: str, **more: str) -> Stub:
    return Stub(
        {
            "describe_stacks": {"Stacks": [{"StackStatus": "CREATE_COMPLETE"}]},
            "detect_stack_drift": {"StackDriftDetectionId": "1"},
            "describe_stack_drift_detection_status": {"DetectionStatus": status, **more},
            "describe_stack_resource_drifts": {"StackResourceDrifts": []},
            "list_stack_resources": {"StackResourceSummaries": []},
        }
    )


def test_resources_that_were_not_compared_are_reported() -> None:
    """CloudFormation then returns results for the other resources only."""
    missed: list[str] = []
    reason = "Failed to detect drift on resource [LogGroup]"
    account = detection("DETECTION_FAILED", DetectionStatusReason=reason)
    assert list(aws_account.drifted(account, "eks", missed)) == []
    assert missed == [f"iot-system-eks: not every resource was compared: {reason}"]


def test_complete_comparison_has_nothing_to_report() -> None:
    missed: list[str] = []
    assert list(aws_account.drifted(detection("DETECTION_COMPLETE"), "eks", missed)) == []
    assert missed == []


@pytest.mark.parametrize(
    ("code", "says", "serious"),
    [
        ("InvalidInstanceType", "(eks_instance_types, in eu-west-1)", True),
        ("UnauthorizedOperation", "vCPUs were not checked", False),
    ],
)
def test_instance_types_that_the_region_does_not_have_are_an_error(
    code: str, says: str, serious: bool
) -> None:
    def stacks(**arguments: Any) -> Responses | ClientError:
        if arguments["StackName"] == "iot-system-network":
            return {"Stacks": [{"StackStatus": "CREATE_COMPLETE"}]}
        return refused("ValidationError", f"Stack {arguments['StackName']} does not exist")

    account = Stub(
        {
            "describe_stacks": stacks,
            "describe_instance_types": refused(code, "m99.large"),
        }
    )
    wants = {"nodes": 3, "instance_types": ["m99.large"]}
    ((text, is_serious),) = aws_account.exceeded(account, wants)
    assert says in text
    assert "m99.large" in text
    assert is_serious is serious


@pytest.mark.parametrize(
    ("arn", "refused_admins"),
    [
        ("arn:aws:iam::111122223333:user/me", ["arn:aws:iam::111122223333:user/me"]),
        (
            "arn:aws:sts::111122223333:assumed-role/platform/me",
            ["arn:aws:iam::111122223333:role/team/platform"],
        ),
        ("arn:aws:sts::444455556666:assumed-role/platform/me", []),
        ("arn:aws:sts::111122223333:assumed-role/form/me", []),
    ],
)
def test_creator_of_the_cluster_is_not_a_second_administrator(
    arn: str, refused_admins: list[str]
) -> None:
    """EKS answers the second access entry with "already in use on this cluster"."""
    admins = ["arn:aws:iam::111122223333:user/me", "arn:aws:iam::111122223333:role/team/platform"]
    new = Stub({"describe_stacks": refused("ValidationError", "Stack does not exist")})
    found = list(aws_account.named_twice(new, {"admins": admins}, arn))
    assert [text.partition(" ")[0] for text in found] == refused_admins
    existing = Stub({"describe_stacks": {"Stacks": [{"StackStatus": "CREATE_COMPLETE"}]}})
    assert list(aws_account.named_twice(existing, {"admins": admins}, arn)) == []


ARN = "arn:aws:{}:eu-west-1:111122223333:{}"
LISTED = [
    ARN.format("ecr", "repository/iot-system/collector"),
    ARN.format("eks", "cluster/iot-system"),
    ARN.format("eks", "nodegroup/iot-system/Nodes-1/0a"),
    ARN.format("iot", "policy/iot-system-device"),
    ARN.format("iot", "rule/iot_system_replay_1"),
    ARN.format("iot", "thinggroup/iot-system-devices"),
    ARN.format("iot", "thingtype/iot-system-device"),
    ARN.format("logs", "log-group:iot-system-vpc-flow"),
    ARN.format("rds", "db:iot-system"),
    ARN.format("rds", "pg:iot-system-rds-parametergroup-1"),
    ARN.format("rds", "subgrp:iot-system-rds-subnetgroup-1"),
    ARN.format("secretsmanager", "secret:CollectorSecret-1Ab-Wx3Yz4"),
    ARN.format("sqs", "iot-system-replay"),
]


def listed(response: Responses | ClientError) -> Stub:
    """An account in which the tagging API lists LISTED, and all services give one response."""

    class Account(Stub):
        def ask(self, service: str, operation: str, **arguments: Any) -> Responses:
            if operation == "get_resources":
                ours = arguments["TagFilters"][0]["Key"] == "Project"
                found = [{"ResourceARN": arn} for arn in LISTED] if ours else []
                return {"ResourceTagMappingList": found}
            if operation in ("describe_log_groups", "list_topic_rules"):
                return {"found": []}  # these list resources by a part of their name
            if isinstance(response, ClientError):
                raise response
            return response

    return Account({})


def test_deleted_resources_that_the_tagging_api_still_lists_are_not_left() -> None:
    """Source: issues 676 of aws/aws-sdk and 3341 of boto/boto3."""
    account = listed(refused("ResourceNotFoundException"))
    assert list(aws_account.left_by_tag(account)) == []


def test_resources_that_cannot_be_checked_count_as_left() -> None:
    found = list(aws_account.left_by_tag(listed(refused("AccessDeniedException"))))
    # For these two, the response above is an empty list.
    assert len(found) == len(LISTED) - 2


def test_existing_resources_from_the_tagging_api_are_left() -> None:
    found = list(aws_account.left_by_tag(listed({"one": {"State": "ACTIVE"}})))
    assert len(found) == len(LISTED) - 2
