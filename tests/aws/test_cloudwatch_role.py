"""The IAM role of the CloudWatch exporter, created in the emulator."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from test_templates import FILES

from testing.aws.emulator import Emulator
from testing.service import eventually

ARN = "arn:aws:iot:eu-west-1:123456789012"
PARAMETERS = {
    "Prefix": "iot-system",
    "SubnetIds": "subnet-1,subnet-2",
    "NodeSecurityGroupId": "sg-1",
    "SubscribeArns": f"{ARN}:topicfilter/iot/data",
    "ReceiveArns": f"{ARN}:topic/iot/data",
    "DatabaseSecretArn": "arn:aws:secretsmanager:eu-west-1:123456789012:secret:collector",
}


@pytest.mark.timeout(120)
def test_exporter_role_is_created_and_removed_by_its_parameter(account: Emulator) -> None:
    cloudformation = account.client("cloudformation")

    def apply(call: Callable[..., Any], service_account: str) -> dict[str, str]:
        """Create or update the stack; return its outputs."""
        given = PARAMETERS | {"CloudWatchExporterServiceAccount": service_account}
        call(
            StackName="eks",
            TemplateBody=FILES["eks"].read_text(),
            Parameters=[{"ParameterKey": k, "ParameterValue": v} for k, v in given.items()],
            Capabilities=["CAPABILITY_IAM"],
        )
        eventually(lambda: account.stacks()["eks"].endswith("_COMPLETE"), 60, "the stack is ready")
        assert "ROLLBACK" not in account.stacks()["eks"]
        (stack,) = cloudformation.describe_stacks(StackName="eks")["Stacks"]
        return {one["OutputKey"]: one["OutputValue"] for one in stack["Outputs"]}

    outputs = apply(cloudformation.create_stack, "iot-system:cloudwatch-exporter")
    iam = account.client("iam")
    name = outputs["CloudWatchExporterRoleArn"].rpartition("/")[2]
    trust = json.dumps(iam.get_role(RoleName=name)["Role"]["AssumeRolePolicyDocument"])
    assert "system:serviceaccount:iot-system:cloudwatch-exporter" in trust
    assert iam.list_attached_role_policies(RoleName=name)["AttachedPolicies"] == []
    assert iam.list_role_policies(RoleName=name)["PolicyNames"] == ["read-metrics"]
    policy = iam.get_role_policy(RoleName=name, PolicyName="read-metrics")["PolicyDocument"]
    (statement,) = policy["Statement"]
    assert statement["Action"] == "cloudwatch:GetMetricStatistics"
    assert statement["Condition"] == {"StringEquals": {"aws:RequestedRegion": "eu-west-1"}}

    outputs = apply(cloudformation.update_stack, "")
    assert "CloudWatchExporterRoleArn" not in outputs
    assert name not in [role["RoleName"] for role in iam.list_roles()["Roles"]]
