"""The policies of the deploying user: valid, narrow, and enough for what the deployment calls.

What a resource type needs inside CloudFormation is written here from AWS's documentation of its
API and of IAM: no emulator authorises those calls.
"""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from ansible_runs import ROOT
from botocore.exceptions import UnknownServiceError
from cfnlint.schema import PROVIDER_SCHEMA_MANAGER
from deployments import Deployment
from test_templates import ROLES, TEMPLATES

FOLDER = ROOT / "docs/aws-deploy-policy"
POLICIES: dict[str, Any] = {
    path.name: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))
}
STATEMENTS: list[dict[str, Any]] = [
    statement for policy in POLICIES.values() for statement in policy["Statement"]
]
# No service of botocore has the prefix that IAM uses.
PREFIXES = {"servicequotas": "service-quotas", "tag": "resourcegroupstaggingapi"}
# Actions without an operation of the same name.
PERMISSIONS_ONLY = {
    "iot:Publish",  # an operation of the service iot-data
    *("iam:PassRole", "budgets:ModifyBudget", "budgets:ViewBudget"),
    *("logs:CreateLogDelivery", "logs:DeleteLogDelivery"),
    *("cloudformation:TagResource", "cloudformation:UntagResource"),
}
SESSION = botocore.session.get_session()


def actions(text: str, service: str) -> set[str]:
    return {f"{service}:{word}" for word in text.split()}


TAGS = {
    "ec2": actions("CreateTags DeleteTags", "ec2"),
    "iam": actions("TagRole UntagRole ListRoleTags", "iam"),
    "eks": actions("TagResource UntagResource", "eks"),
    "iot": actions("TagResource UntagResource ListTagsForResource", "iot"),
    "rds": actions("AddTagsToResource RemoveTagsFromResource ListTagsForResource", "rds"),
}
# What CloudFormation calls, with the rights of whoever runs the playbook, to create, update and
# delete a resource. Describe* of EC2 and RDS is allowed as a whole.
HANDLERS: dict[str, set[str]] = {
    "AWS::EC2::VPC": TAGS["ec2"] | actions("CreateVpc DeleteVpc ModifyVpcAttribute", "ec2"),
    "AWS::EC2::InternetGateway": actions("CreateInternetGateway DeleteInternetGateway", "ec2"),
    "AWS::EC2::VPCGatewayAttachment": actions("AttachInternetGateway DetachInternetGateway", "ec2"),
    "AWS::EC2::Subnet": actions("CreateSubnet DeleteSubnet ModifySubnetAttribute", "ec2"),
    "AWS::EC2::EIP": actions(
        "AllocateAddress AssociateAddress DisassociateAddress ReleaseAddress", "ec2"
    ),
    "AWS::EC2::NatGateway": actions("CreateNatGateway DeleteNatGateway", "ec2"),
    "AWS::EC2::RouteTable": actions("CreateRouteTable DeleteRouteTable", "ec2"),
    "AWS::EC2::Route": actions("CreateRoute DeleteRoute ReplaceRoute", "ec2"),
    "AWS::EC2::SubnetRouteTableAssociation": actions(
        "AssociateRouteTable DisassociateRouteTable ReplaceRouteTableAssociation", "ec2"
    ),
    "AWS::EC2::SecurityGroup": actions(
        "CreateSecurityGroup DeleteSecurityGroup GetSecurityGroupsForVpc "
        "AuthorizeSecurityGroupEgress AuthorizeSecurityGroupIngress "
        "RevokeSecurityGroupEgress RevokeSecurityGroupIngress",
        "ec2",
    ),
    "AWS::EC2::VPCEndpoint": actions(
        "CreateVpcEndpoint DeleteVpcEndpoints ModifyVpcEndpoint", "ec2"
    ),
    "AWS::EC2::FlowLog": actions("CreateFlowLogs DeleteFlowLogs", "ec2")
    | actions("CreateLogDelivery DeleteLogDelivery", "logs")
    | {"iam:PassRole"},
    "AWS::EC2::LaunchTemplate": actions(
        "CreateLaunchTemplate CreateLaunchTemplateVersion DeleteLaunchTemplate "
        "DeleteLaunchTemplateVersions ModifyLaunchTemplate",
        "ec2",
    ),
    "AWS::Logs::LogGroup": actions(
        "CreateLogGroup DeleteLogGroup PutRetentionPolicy DeleteRetentionPolicy TagResource "
        "UntagResource ListTagsForResource DescribeLogGroups",
        "logs",
    ),
    "AWS::IAM::Role": TAGS["iam"]
    | actions(
        "CreateRole DeleteRole GetRole UpdateRole UpdateAssumeRolePolicy AttachRolePolicy "
        "DetachRolePolicy PutRolePolicy GetRolePolicy DeleteRolePolicy ListRolePolicies "
        "ListAttachedRolePolicies ListInstanceProfilesForRole",
        "iam",
    ),
    "AWS::IAM::OIDCProvider": actions(
        "CreateOpenIDConnectProvider DeleteOpenIDConnectProvider GetOpenIDConnectProvider "
        "AddClientIDToOpenIDConnectProvider RemoveClientIDFromOpenIDConnectProvider "
        "UpdateOpenIDConnectProviderThumbprint ListOpenIDConnectProviderTags "
        "TagOpenIDConnectProvider UntagOpenIDConnectProvider",
        "iam",
    ),
    "AWS::KMS::Key": actions(
        "CreateKey DescribeKey EnableKeyRotation DisableKeyRotation GetKeyPolicy PutKeyPolicy "
        "GetKeyRotationStatus ListResourceTags ScheduleKeyDeletion TagResource UntagResource "
        "UpdateKeyDescription",
        "kms",
    ),
    # The creator makes the grants by which ECR and EKS use the key.
    "AWS::ECR::Repository": actions(
        "CreateRepository DeleteRepository DescribeRepositories GetLifecyclePolicy "
        "PutLifecyclePolicy DeleteLifecyclePolicy GetRepositoryPolicy "
        "PutImageScanningConfiguration PutImageTagMutability TagResource UntagResource "
        "ListTagsForResource ListImages BatchDeleteImage",
        "ecr",
    )
    | actions("CreateGrant RetireGrant RevokeGrant ListGrants DescribeKey", "kms"),
    "AWS::EKS::Cluster": TAGS["eks"]
    | actions(
        "CreateCluster DeleteCluster DescribeCluster UpdateClusterConfig UpdateClusterVersion "
        "AssociateEncryptionConfig DescribeUpdate ListUpdates",
        "eks",
    )
    | actions("PassRole CreateServiceLinkedRole", "iam")
    | actions("CreateGrant DescribeKey", "kms"),
    "AWS::EKS::AccessEntry": actions(
        "CreateAccessEntry DeleteAccessEntry DescribeAccessEntry UpdateAccessEntry "
        "AssociateAccessPolicy DisassociateAccessPolicy ListAssociatedAccessPolicies",
        "eks",
    ),
    # EKS tries whether the creator may start instances from the launch template.
    "AWS::EKS::Nodegroup": actions(
        "CreateNodegroup DeleteNodegroup DescribeNodegroup UpdateNodegroupConfig "
        "UpdateNodegroupVersion DescribeUpdate",
        "eks",
    )
    | actions("RunInstances CreateTags", "ec2")
    | actions("PassRole CreateServiceLinkedRole", "iam"),
    "AWS::EKS::Addon": actions(
        "CreateAddon DeleteAddon DescribeAddon UpdateAddon DescribeUpdate DescribeAddonVersions",
        "eks",
    )
    | {"iam:PassRole"},
    "AWS::RDS::DBSubnetGroup": TAGS["rds"]
    | actions("CreateDBSubnetGroup DeleteDBSubnetGroup ModifyDBSubnetGroup", "rds"),
    "AWS::RDS::DBParameterGroup": actions(
        "CreateDBParameterGroup DeleteDBParameterGroup ModifyDBParameterGroup "
        "ResetDBParameterGroup",
        "rds",
    ),
    # The secret of the master's password is made with the rights of the creator.
    "AWS::RDS::DBInstance": actions(
        "CreateDBInstance DeleteDBInstance ModifyDBInstance RebootDBInstance CreateDBSnapshot",
        "rds",
    )
    | actions("CreateSecret RotateSecret TagResource DescribeSecret", "secretsmanager")
    | actions("PassRole CreateServiceLinkedRole", "iam"),
    "AWS::SecretsManager::Secret": actions(
        "CreateSecret DeleteSecret DescribeSecret GetSecretValue PutSecretValue UpdateSecret "
        "GetRandomPassword TagResource UntagResource",
        "secretsmanager",
    ),
    "AWS::IoT::ThingType": TAGS["iot"]
    | actions("CreateThingType DeprecateThingType DeleteThingType DescribeThingType", "iot"),
    "AWS::IoT::ThingGroup": actions(
        "CreateThingGroup DeleteThingGroup DescribeThingGroup UpdateThingGroup", "iot"
    ),
    "AWS::IoT::Policy": actions(
        "CreatePolicy DeletePolicy GetPolicy CreatePolicyVersion DeletePolicyVersion "
        "ListPolicyVersions SetDefaultPolicyVersion ListTargetsForPolicy",
        "iot",
    ),
    "AWS::IoT::Thing": actions(
        "CreateThing DeleteThing DescribeThing UpdateThing ListThingPrincipals", "iot"
    ),
    "AWS::IoT::Certificate": actions(
        "CreateCertificateFromCsr DescribeCertificate UpdateCertificate DeleteCertificate", "iot"
    ),
    "AWS::IoT::ThingPrincipalAttachment": actions(
        "AttachThingPrincipal DetachThingPrincipal ListPrincipalThings", "iot"
    ),
    "AWS::IoT::PolicyPrincipalAttachment": actions(
        "AttachPolicy DetachPolicy AttachPrincipalPolicy DetachPrincipalPolicy "
        "ListPrincipalPolicies",
        "iot",
    ),
    "AWS::IoT::TopicRule": actions(
        "CreateTopicRule DeleteTopicRule GetTopicRule ReplaceTopicRule ListTopicRules", "iot"
    )
    | {"iam:PassRole"},
    "AWS::IoT::Logging": actions("GetV2LoggingOptions SetV2LoggingOptions", "iot")
    | {"iam:PassRole"},
    "AWS::SQS::Queue": actions(
        "CreateQueue DeleteQueue GetQueueAttributes GetQueueUrl SetQueueAttributes TagQueue "
        "UntagQueue ListQueueTags",
        "sqs",
    ),
    "AWS::Budgets::Budget": actions(
        "ModifyBudget ViewBudget TagResource UntagResource ListTagsForResource", "budgets"
    ),
}


def listed(statement: dict[str, Any], key: str) -> list[str]:
    value = statement[key]
    return value if isinstance(value, list) else [value]


def allowed() -> set[str]:
    return {action for statement in STATEMENTS for action in listed(statement, "Action")}


def missing(wanted: set[str]) -> set[str]:
    patterns = allowed()
    return {one for one in wanted if not any(fnmatchcase(one, pattern) for pattern in patterns)}


def recorded() -> set[str]:
    lines = (Path(__file__).parent / "calls.txt").read_text().splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def kinds() -> set[str]:
    return {
        resource["Type"] for role in ROLES for resource in TEMPLATES[role]["Resources"].values()
    }


# --- the files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_policy_is_one_that_iam_takes(name: str) -> None:
    policy = POLICIES[name]
    assert policy["Version"] == "2012-10-17"
    assert set(policy) == {"Version", "Statement"}
    # The quota of a managed policy, white space not counted.
    assert len(re.sub(r"\s", "", json.dumps(policy))) <= 6144
    for statement in policy["Statement"]:
        assert set(statement) - {"Condition"} == {"Sid", "Effect", "Action", "Resource"}
        assert statement["Effect"] == "Allow"
        assert re.fullmatch(r"[A-Za-z0-9]+", statement["Sid"])
        for resource in listed(statement, "Resource"):
            assert re.fullmatch(r"\*|arn:aws:[a-z0-9-]+:[a-z0-9-]*:\d{12}:.+", resource)


def test_statements_have_names_of_their_own() -> None:
    names = [statement["Sid"] for statement in STATEMENTS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("action", sorted(allowed()))
def test_action_exists(action: str) -> None:
    assert re.fullmatch(r"[a-z0-9-]+:(Describe\*|[A-Za-z0-9]+)", action)
    prefix, _, operation = action.partition(":")
    try:
        names = SESSION.get_service_model(PREFIXES.get(prefix, prefix)).operation_names
    except UnknownServiceError:
        pytest.fail(f"no service {prefix}")
    if not operation.endswith("*"):
        assert (operation in names) == (action not in PERMISSIONS_ONLY)


# --- narrow ---------------------------------------------------------------------------------------


def test_all_resources_only_with_a_reason() -> None:
    """The table in docs/aws.md says why; the region or our tag is asked for instead."""
    page = (ROOT / "docs/aws.md").read_text()
    _, _, table = page.partition("| statement | why `*` |")
    rows = table.partition("\n\n")[0].splitlines()[2:]
    explained = {name.strip() for row in rows for name in row.split("|")[1].split(",")}
    wide = [one for one in STATEMENTS if one["Resource"] == "*"]
    assert {one["Sid"] for one in wide} == explained
    for statement in wide:
        if {action.split(":")[0] for action in listed(statement, "Action")} != {"iam"}:
            assert statement["Condition"]["StringEquals"]["aws:RequestedRegion"] == "eu-west-1"


def test_what_has_no_name_of_ours_needs_our_tag() -> None:
    # CloudFormation gives launch templates no tags (their schema says `taggable: false`).
    wide = re.compile(r"arn:aws:(ec2|kms):[^:]*:[^:]*:(?!launch-template).*\*$")
    for statement in STATEMENTS:
        if any(wide.match(resource) for resource in listed(statement, "Resource")):
            (condition,) = statement["Condition"]["StringEquals"].items()
            assert condition[0].startswith("aws:ResourceTag/")
            assert condition[1] == "iot-system"


def test_roles_are_passed_to_named_services_and_take_named_policies() -> None:
    by_action = {listed(one, "Action")[0]: one for one in STATEMENTS if "iam:" in str(one)}
    trusted = {
        "ec2.amazonaws.com",
        "eks.amazonaws.com",
        "iot.amazonaws.com",
        "monitoring.rds.amazonaws.com",
        "vpc-flow-logs.amazonaws.com",
    }
    passed = by_action["iam:PassRole"]["Condition"]["StringEquals"]["iam:PassedToService"]
    assert set(passed) == trusted
    text = "".join((ROOT / "roles" / role / "files/stack.yml").read_text() for role in ROLES)
    used = set(re.findall(r"iam::aws:policy/(\S+)", text))
    attached = by_action["iam:AttachRolePolicy"]["Condition"]["ArnEquals"]["iam:PolicyARN"]
    assert {arn.removeprefix("arn:aws:iam::aws:policy/") for arn in attached} == used


# --- enough, and no more --------------------------------------------------------------------------


def test_handlers_are_those_of_our_resource_types() -> None:
    assert set(HANDLERS) == kinds()


@pytest.mark.parametrize("kind", sorted(HANDLERS))
def test_covers_what_a_resource_needs(kind: str) -> None:
    assert missing(HANDLERS[kind]) == set()


@pytest.mark.parametrize("kind", sorted(HANDLERS))
def test_covers_tags(kind: str) -> None:
    """CloudFormation gives the stack's tags to each resource; its schemas say what that takes."""
    schema = PROVIDER_SCHEMA_MANAGER.get_resource_schema("eu-west-1", kind).schema
    assert missing(set(schema["tagging"].get("permissions", []))) == set()


def test_covers_the_calls_of_the_playbooks() -> None:
    assert missing(recorded()) == set()


def test_allows_nothing_else() -> None:
    needed = recorded().union(*HANDLERS.values())
    # To see and undo what one has started, and tags of stacks.
    by_hand = {
        *("cloudformation:GetTemplateSummary", "cloudformation:DetectStackResourceDrift"),
        *("cloudformation:TagResource", "cloudformation:UntagResource"),
        "iot:AddThingToThingGroup",
    }
    extra = {
        action
        for action in allowed() - by_hand
        if not any(fnmatchcase(one, action) for one in needed)
    }
    assert extra == set()


def test_record_is_complete(deployed: Deployment) -> None:
    """What a deployment in this run has called is in calls.txt."""
    called = {call.action for call in deployed.account.calls()}
    # Needs no permission.
    assert called - recorded() - {"sts:GetCallerIdentity"} == set()
