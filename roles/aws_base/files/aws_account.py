"""Checks of an AWS account. They change nothing.

``preflight``  checks that nothing blocks a deployment
``drift``      lists resources that were changed or deleted after their stack created them
``left``       lists the resources of the system that are left, by service

The report is on standard output; that of ``preflight`` is JSON. If there are problems, the exit
code is 1, and standard error lists them with what to do about each.
Credentials and endpoint come from the environment, as boto3 reads them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

try:
    import boto3
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        EndpointConnectionError,
        NoCredentialsError,
    )
except ImportError:
    sys.exit("boto3 is not installed in the Python that runs Ansible: pip install boto3")

Json = dict[str, Any]
Ask = tuple[str, str, Json]  # service, operation, arguments


class Account:
    """The APIs of an account in one region."""

    def __init__(self, region: str, name: str) -> None:
        self.region, self.name = region, name
        self._session = boto3.Session(region_name=region)
        self._clients: dict[str, Any] = {}

    def client(self, service: str) -> Any:
        if service not in self._clients:
            self._clients[service] = self._session.client(service)
        return self._clients[service]

    def ask(self, service: str, operation: str, **arguments: Any) -> Json:
        """Return the response of one API call."""
        answer: Json = getattr(self.client(service), operation)(**arguments)
        answer.pop("ResponseMetadata", None)
        return answer

    def all(self, service: str, operation: str, key: str, **arguments: Any) -> list[Any]:
        """Return the list ``key`` of the responses, from all pages."""
        client = self.client(service)
        if not client.can_paginate(operation):
            return list(self.ask(service, operation, **arguments)[key])
        pages = client.get_paginator(operation).paginate(**arguments)
        return [one for page in pages for one in page.get(key, [])]

    def has(self, kind: str, physical_id: str) -> bool | None:
        """Whether a resource of a stack exists; None if ASK has no call for its type."""
        return self.exists(ASK[kind](physical_id), physical_id) if kind in ASK else None

    def exists(self, ask: Ask, physical_id: str) -> bool:
        """Whether a call returns a resource that is not being deleted."""
        service, operation, arguments = ask
        try:
            answer = self.ask(service, operation, **arguments)
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if any(word in code for word in ("NotFound", "NoSuch", "NonExistent", "DoesNotExist")):
                return False
            raise
        return not gone(answer, physical_id)

    def stack(self, name: str) -> str | None:
        """Status of the stack ``<our name>-<name>``; None if it does not exist."""
        try:
            found = self.ask("cloudformation", "describe_stacks", StackName=f"{self.name}-{name}")
        except ClientError as error:
            if "does not exist" in str(error):
                return None
            raise
        return str(found["Stacks"][0]["StackStatus"])


# --- resources of stacks ---


def gone(answer: Json, physical_id: str) -> bool:
    """Whether a response has no resource, or only deleted ones."""
    values = [value for key, value in answer.items() if key not in ("NextToken", "nextToken")]
    if len(values) == 1 and isinstance(values[0], list):
        found = values[0]
        # Some operations return more resources than requested.
        for key in ("logGroupName", "ruleName"):
            found = [one for one in found if one.get(key, physical_id) == physical_id]
        return all(ended(one) for one in found)
    if len(values) == 1 and isinstance(values[0], dict):
        return ended(values[0])
    return ended(answer)


def ended(resource: Json) -> bool:
    states = (resource.get(key) for key in ("State", "KeyState", "state", "DBInstanceStatus"))
    ends = {"deleted", "deleting", "terminated", "PendingDeletion"}
    return "DeletedDate" in resource or any(
        state in ends for state in states if isinstance(state, str)
    )


def one_of(service: str, operation: str, argument: str) -> Callable[[str], Ask]:
    """A call for an operation that takes one identifier, or a list of them."""
    return lambda physical_id: (
        service,
        operation,
        {argument: [physical_id] if argument.endswith("s") else physical_id},
    )


def filtered(operation: str, name: str, separator: str = "", part: int = 0) -> Callable[[str], Ask]:
    """A call for EC2 resources that only a filter finds, by a part of their physical ID."""

    def ask(physical_id: str) -> Ask:
        value = physical_id.split(separator)[part] if separator else physical_id
        return "ec2", operation, {"Filters": [{"Name": name, "Values": [value]}]}

    return ask


def parts(operation: str, separator: str, *names: str) -> Callable[[str], Ask]:
    """A call for EKS resources, whose physical ID consists of several identifiers."""
    return lambda physical_id: (
        "eks",
        operation,
        dict(zip(names, physical_id.split(separator), strict=True)),
    )


# The API call that returns a resource, by its type. It takes the physical ID.
ASK: dict[str, Callable[[str], Ask]] = {
    "AWS::EC2::VPC": one_of("ec2", "describe_vpcs", "VpcIds"),
    "AWS::EC2::Subnet": one_of("ec2", "describe_subnets", "SubnetIds"),
    "AWS::EC2::InternetGateway": one_of("ec2", "describe_internet_gateways", "InternetGatewayIds"),
    "AWS::EC2::RouteTable": one_of("ec2", "describe_route_tables", "RouteTableIds"),
    "AWS::EC2::SubnetRouteTableAssociation": filtered(
        "describe_route_tables", "association.route-table-association-id"
    ),
    "AWS::EC2::SecurityGroup": one_of("ec2", "describe_security_groups", "GroupIds"),
    "AWS::EC2::VPCEndpoint": one_of("ec2", "describe_vpc_endpoints", "VpcEndpointIds"),
    "AWS::EC2::EIP": one_of("ec2", "describe_addresses", "PublicIps"),
    "AWS::EC2::NatGateway": one_of("ec2", "describe_nat_gateways", "NatGatewayIds"),
    "AWS::EC2::FlowLog": one_of("ec2", "describe_flow_logs", "FlowLogIds"),
    "AWS::EC2::LaunchTemplate": one_of("ec2", "describe_launch_templates", "LaunchTemplateIds"),
    "AWS::Logs::LogGroup": one_of("logs", "describe_log_groups", "logGroupNamePrefix"),
    "AWS::IAM::Role": one_of("iam", "get_role", "RoleName"),
    "AWS::IAM::OIDCProvider": one_of(
        "iam", "get_open_id_connect_provider", "OpenIDConnectProviderArn"
    ),
    "AWS::KMS::Key": one_of("kms", "describe_key", "KeyId"),
    "AWS::ECR::Repository": one_of("ecr", "describe_repositories", "repositoryNames"),
    "AWS::RDS::DBInstance": one_of("rds", "describe_db_instances", "DBInstanceIdentifier"),
    "AWS::RDS::DBSubnetGroup": one_of("rds", "describe_db_subnet_groups", "DBSubnetGroupName"),
    "AWS::RDS::DBParameterGroup": one_of(
        "rds", "describe_db_parameter_groups", "DBParameterGroupName"
    ),
    "AWS::SecretsManager::Secret": one_of("secretsmanager", "describe_secret", "SecretId"),
    "AWS::EKS::Cluster": one_of("eks", "describe_cluster", "name"),
    "AWS::EKS::Nodegroup": parts("describe_nodegroup", "/", "clusterName", "nodegroupName"),
    "AWS::EKS::Addon": parts("describe_addon", "|", "clusterName", "addonName"),
    "AWS::EKS::AccessEntry": parts("describe_access_entry", "|", "principalArn", "clusterName"),
    "AWS::IoT::Policy": one_of("iot", "get_policy", "policyName"),
    "AWS::IoT::ThingType": one_of("iot", "describe_thing_type", "thingTypeName"),
    "AWS::IoT::ThingGroup": one_of("iot", "describe_thing_group", "thingGroupName"),
    "AWS::IoT::Thing": one_of("iot", "describe_thing", "thingName"),
    "AWS::IoT::Certificate": one_of("iot", "describe_certificate", "certificateId"),
    # For a rule that does not exist, GetTopicRule returns "access denied".
    "AWS::IoT::TopicRule": lambda _: ("iot", "list_topic_rules", {"maxResults": 1000}),
    "AWS::SQS::Queue": one_of("sqs", "get_queue_attributes", "QueueUrl"),
}


# --- preflight ---


def names_of(name: str) -> dict[str, list[tuple[str, str]]]:
    """Resources with fixed names, by stack: (type, physical ID)."""
    return {
        "network": [("AWS::Logs::LogGroup", f"{name}-vpc-flow")],
        "ecr": [("AWS::ECR::Repository", f"{name}/collector")],
        "rds": [
            ("AWS::RDS::DBInstance", name),
            ("AWS::Logs::LogGroup", f"/aws/rds/instance/{name}/postgresql"),
            ("AWS::Logs::LogGroup", f"/aws/rds/instance/{name}/upgrade"),
        ],
        "eks": [
            ("AWS::EKS::Cluster", name),
            ("AWS::Logs::LogGroup", f"/aws/eks/{name}/cluster"),
        ],
        "iot-core": [
            ("AWS::IoT::ThingType", f"{name}-device"),
            ("AWS::IoT::ThingGroup", f"{name}-devices"),
            ("AWS::IoT::Policy", f"{name}-device"),
            ("AWS::IoT::Policy", f"{name}-collector"),
            ("AWS::IoT::Thing", f"{name}-example"),
            *(
                ("AWS::IoT::TopicRule", f"{name.replace('-', '_')}_replay_{number}")
                for number in (1, 2, 3)
            ),
            ("AWS::Logs::LogGroup", f"{name}-iot-rule-errors"),
        ],
    }


class Quota(NamedTuple):
    """A quota of the account, its usage, and what the deployment would add."""

    service: str
    code: str
    title: str
    used: Callable[[Account], float]
    added: float


def used_vcpus(account: Account, spot: bool) -> int:
    """vCPUs of the running standard instances (families A, C, D, H, I, M, R, T, Z)."""
    states = [{"Name": "instance-state-name", "Values": ["pending", "running"]}]
    used = 0
    for reservation in account.all("ec2", "describe_instances", "Reservations", Filters=states):
        for instance in reservation["Instances"]:
            standard = re.match(r"[acdhimrtz]\d", instance.get("InstanceType", ""))
            if standard and (instance.get("InstanceLifecycle") == "spot") == spot:
                cpus = instance.get("CpuOptions", {})
                used += cpus.get("CoreCount", 1) * cpus.get("ThreadsPerCore", 1)
    return used


def vcpus_of(account: Account, types: list[str]) -> int:
    """vCPUs of the largest of these instance types; 0 if EC2 returns none of them."""
    found = account.all("ec2", "describe_instance_types", "InstanceTypes", InstanceTypes=types)
    return max((one["VCpuInfo"]["DefaultVCpus"] for one in found), default=0)


def exceeded(account: Account, wants: Json) -> Iterator[tuple[str, bool]]:
    """A message for each quota that is too low (True) or cannot be read (False)."""
    quotas: list[Quota] = []
    if account.stack("network") is None:
        vpcs = "L-F678F1CE"
        quotas.append(
            Quota("vpc", vpcs, "VPCs", lambda one: len(one.all("ec2", "describe_vpcs", "Vpcs")), 1)
        )
        quotas.append(
            Quota(
                "ec2",
                "L-0263D0A3",
                "Elastic IP addresses",
                lambda one: len(one.all("ec2", "describe_addresses", "Addresses")),
                wants.get("addresses", 0),
            )
        )
    if wants.get("nodes") and account.stack("eks") is None:
        spot = bool(wants.get("spot"))
        code, what = ("L-34B43A08", "spot") if spot else ("L-1216C47A", "on-demand")
        try:
            each = vcpus_of(account, wants["instance_types"])
        except ClientError as error:
            if error.response["Error"]["Code"] == "InvalidInstanceType":
                yield (
                    f"{error} (eks_instance_types, in {account.region}). Choose other types.",
                    True,
                )
            else:
                yield f"vCPUs were not checked: {error}", False
        else:
            quotas.append(
                Quota(
                    "ec2",
                    code,
                    f"vCPUs of {what} standard instances",
                    lambda one: used_vcpus(one, spot),
                    each * wants["nodes"],
                )
            )
    for quota in quotas:
        try:
            asked = account.ask(
                "service-quotas",
                "get_service_quota",
                ServiceCode=quota.service,
                QuotaCode=quota.code,
            )
            limit, used = asked["Quota"]["Value"], quota.used(account)
        except ClientError as error:
            yield f"{quota.title} were not checked: {error}", False
            continue
        if used + quota.added > limit:
            yield (
                f"{quota.title}: {used:g} of {limit:g} are in use in {account.region} and "
                f"{quota.added:g} more are needed. Delete some, or request an increase: aws "
                f"service-quotas request-service-quota-increase --region {account.region} "
                f"--service-code {quota.service} --quota-code {quota.code} "
                f"--desired-value {used + quota.added:g}",
                True,
            )


def versions_missing(account: Account, wants: Json) -> Iterator[str]:
    """A message for each version or class that the region does not offer."""
    if wanted := wants.get("kubernetes_version"):
        found = account.all("eks", "describe_cluster_versions", "clusterVersions")
        standard = "STANDARD_SUPPORT"
        usable = sorted(
            (
                one["clusterVersion"]
                for one in found
                if wants.get("support_type") == "EXTENDED"
                or (one.get("versionStatus") or one.get("status", "")).upper() == standard
            ),
            key=version_key,
        )
        if wanted not in usable:
            yield (
                f"Kubernetes {wanted} (eks_kubernetes_version) is not offered in {account.region} "
                f"with this support (eks_support_type). Offered: {', '.join(usable)}."
            )
    if wanted := wants.get("postgres_version"):
        found = account.all(
            "rds", "describe_db_engine_versions", "DBEngineVersions", Engine="postgres"
        )
        offered = sorted((one["EngineVersion"] for one in found), key=version_key)
        fitting = [one for one in offered if one == wanted or one.startswith(f"{wanted}.")]
        if not fitting:
            yield (
                f"PostgreSQL {wanted} (rds_engine_version) is not offered in {account.region}. "
                f"Offered: {', '.join(offered)}."
            )
        elif wants.get("instance_class"):
            options = account.ask(
                "rds",
                "describe_orderable_db_instance_options",
                Engine="postgres",
                EngineVersion=fitting[-1],
                DBInstanceClass=wants["instance_class"],
            )
            if not options["OrderableDBInstanceOptions"]:
                yield (
                    f"{wants['instance_class']} (rds_instance_class) is not offered for PostgreSQL "
                    f"{fitting[-1]} in {account.region}. Choose another class."
                )


def version_key(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def names_taken(account: Account) -> Iterator[str]:
    """A message for each name that a resource outside our stacks already has."""
    for stack, names in names_of(account.name).items():
        if account.stack(stack) is not None:
            continue
        for kind, physical_id in names:
            if account.has(kind, physical_id):
                yield (
                    f"{kind} {physical_id} exists, and the stack {account.name}-{stack}, which "
                    "would create it, does not. If it is left from an earlier deployment, delete "
                    "it; otherwise choose another aws_base_name."
                )


def named_twice(account: Account, wants: Json, arn: str) -> Iterator[str]:
    """A message if an administrator also creates the cluster. EKS allows one access entry each."""
    if account.stack("eks") is not None:
        return
    session = re.fullmatch(r"(arn:[^:]+):sts::(\d+):assumed-role/([^/]+)/.+", arn)
    for admin in wants.get("admins", []):
        is_role = (
            session is not None
            and admin.startswith(f"{session[1]}:iam::{session[2]}:role/")
            and admin.endswith(f"/{session[3]}")
        )
        if admin == arn or is_role:
            yield (
                f"{admin} (eks_admin_arns) creates the cluster and administers it for that reason "
                "(eks_creator_is_admin); EKS refuses a second access entry for it. Remove it from "
                "eks_admin_arns, or set eks_creator_is_admin to false."
            )


def preflight(account: Account, wants: Json) -> tuple[Json, list[str]]:
    """Return the account and the problems.

    Raises ClientError if a permission is missing.
    """
    identity = account.ask("sts", "get_caller_identity")
    about = {"account": identity["Account"], "arn": identity["Arn"], "notes": []}
    regions = account.ask("ec2", "describe_regions", AllRegions=True)["Regions"]
    states = {region["RegionName"]: region["OptInStatus"] for region in regions}
    if account.region not in states:
        return about, [f"There is no region {account.region}. One of: {', '.join(sorted(states))}."]
    if states[account.region] == "not-opted-in":
        return about, [
            f"The region {account.region} is not enabled for this account. Enable it: "
            f"aws account enable-region --region-name {account.region}"
        ]
    if not wants:  # nothing will be created
        return about, []
    problems = [
        *versions_missing(account, wants),
        *names_taken(account),
        *named_twice(account, wants, identity["Arn"]),
    ]
    for text, serious in exceeded(account, wants):
        (problems if serious else about["notes"]).append(text)
    return about, problems


# --- drift ---


def drifted(
    account: Account, stack: str, not_compared: list[str], poll: float = 2
) -> Iterator[str]:
    """A line for each resource of a stack that is changed or gone.

    If CloudFormation could not compare all resources, its reason is appended to ``not_compared``.
    """
    name = f"{account.name}-{stack}"
    status = account.stack(stack)
    if status is None:
        yield f"{name}: there is no such stack. Deploy it: ansible-playbook playbooks/aws.yml"
        return
    detection = account.ask("cloudformation", "detect_stack_drift", StackName=name)
    while True:
        state = account.ask(
            "cloudformation",
            "describe_stack_drift_detection_status",
            StackDriftDetectionId=detection["StackDriftDetectionId"],
        )
        if state["DetectionStatus"] != "DETECTION_IN_PROGRESS":
            break
        time.sleep(poll)
    if state["DetectionStatus"] == "DETECTION_FAILED":
        reason = state.get("DetectionStatusReason", "CloudFormation gives no reason")
        not_compared.append(f"{name}: not every resource was compared: {reason}")
    differing = {}
    # Not paginated by boto3, although there is a token.
    asked: Json = {"StackName": name}
    while True:
        page = account.ask("cloudformation", "describe_stack_resource_drifts", **asked)
        for drift in page["StackResourceDrifts"]:
            differing[drift["LogicalResourceId"]] = drift
        if not page.get("NextToken"):
            break
        asked["NextToken"] = page["NextToken"]
    resources = account.all(
        "cloudformation", "list_stack_resources", "StackResourceSummaries", StackName=name
    )
    for resource in resources:
        logical_id, kind = resource["LogicalResourceId"], resource["ResourceType"]
        physical_id = resource.get("PhysicalResourceId", "")
        # For some types, the API does not take the physical ID of the stack.
        if kind == "AWS::EKS::Nodegroup":
            physical_id = f"{account.name}/{physical_id.split('/')[-1]}"
        if kind == "AWS::IoT::ThingGroup":
            physical_id = f"{account.name}-devices"
        what = f"{name}: {kind} {logical_id} ({physical_id})"
        drift = differing.get(logical_id, {})
        if drift.get("StackResourceDriftStatus") == "DELETED" or (
            account.has(kind, physical_id) is False
        ):
            yield f"{what} is gone"
        elif drift.get("StackResourceDriftStatus") == "MODIFIED":
            differences = drift.get("PropertyDifferences", [])
            for one in (one for one in differences if not (same(one) or by_rds(one))):
                yield (
                    f"{what} differs in {one['PropertyPath']}: "
                    f"{one['ActualValue']} instead of {one['ExpectedValue']}"
                )


def same(difference: Json) -> bool:
    """Whether two values differ only in the formatting of their JSON."""
    try:
        values = [json.loads(difference[key]) for key in ("ExpectedValue", "ActualValue")]
        # A template may contain a document as a string.
        documents = [json.loads(one) if isinstance(one, str) else one for one in values]
    except ValueError:
        return False
    return bool(documents[0] == documents[1])


def by_rds(difference: Json) -> bool:
    """Whether RDS made the change: it enlarges storage and installs minor versions by itself."""
    path = difference["PropertyPath"]
    if path not in ("/AllocatedStorage", "/EngineVersion"):
        return False
    old, new = (version_key(difference[key]) for key in ("ExpectedValue", "ActualValue"))
    return new > old and (path == "/AllocatedStorage" or new[0] == old[0])


WHAT_TO_DO = """
A deployment does not detect this, because CloudFormation compares templates, not resources. For
each stack in the list, either correct the resources by hand, or let CloudFormation do it. Read the
change set before you execute it:
  aws cloudformation create-change-set --region {region} --stack-name NAME \\
    --change-set-name revert --use-previous-template --deployment-mode REVERT_DRIFT \\
    --capabilities CAPABILITY_IAM --parameters (ParameterKey=...,UsePreviousValue=true for each)
  aws cloudformation describe-change-set --region {region} --stack-name NAME \\
    --change-set-name revert
  aws cloudformation execute-change-set --region {region} --stack-name NAME \\
    --change-set-name revert"""


# --- what is left ---


class Left(NamedTuple):
    """A resource that still exists; ``fine`` is the reason if it may, and empty otherwise."""

    service: str
    what: str
    fine: str = ""


EC2 = [
    ("describe_vpcs", "Vpcs", "VpcId"),
    ("describe_subnets", "Subnets", "SubnetId"),
    ("describe_route_tables", "RouteTables", "RouteTableId"),
    ("describe_internet_gateways", "InternetGateways", "InternetGatewayId"),
    ("describe_nat_gateways", "NatGateways", "NatGatewayId"),
    ("describe_addresses", "Addresses", "AllocationId"),
    ("describe_security_groups", "SecurityGroups", "GroupId"),
    ("describe_vpc_endpoints", "VpcEndpoints", "VpcEndpointId"),
    ("describe_network_interfaces", "NetworkInterfaces", "NetworkInterfaceId"),
    ("describe_flow_logs", "FlowLogs", "FlowLogId"),
    ("describe_launch_templates", "LaunchTemplates", "LaunchTemplateId"),
    ("describe_volumes", "Volumes", "VolumeId"),
]


def pairs_of(tags: Iterable[Json]) -> dict[str, str]:
    """Tags as a mapping, from either of the formats that the services use."""
    return {
        str(tag.get("Key", tag.get("TagKey"))): str(tag.get("Value", tag.get("TagValue")))
        for tag in tags
    }


def left(account: Account) -> Iterator[Left]:
    """Everything that still exists, found by our tag or by a name that only we use."""
    name = account.name
    for stack in names_of(name):
        if status := account.stack(stack):
            yield Left("cloudformation", f"stack {name}-{stack} ({status})")
    yield from left_in_ec2(account)
    yield from left_by_name(account)
    yield from left_in_rds(account)
    yield from left_in_iam(account)
    yield from left_in_kms(account)
    yield from left_by_tag(account)


def left_in_ec2(account: Account) -> Iterator[Left]:
    tag = [{"Name": "tag:Project", "Values": [account.name]}]
    for operation, key, identifier in EC2:
        # Two operations have another name for this argument.
        argument = (
            "Filter" if operation in ("describe_flow_logs", "describe_nat_gateways") else "Filters"
        )
        for one in account.all("ec2", operation, key, **{argument: tag}):
            ours = pairs_of(one.get("Tags", one.get("TagSet", []))).get("Project") == account.name
            if ours and not ended(one):
                yield Left("ec2", f"{key} {one[identifier]}")
    for reservation in account.all("ec2", "describe_instances", "Reservations", Filters=tag):
        for instance in reservation["Instances"]:
            if instance["State"]["Name"] not in ("terminated", "shutting-down"):
                yield Left("ec2", f"instance {instance['InstanceId']}")


def left_by_name(account: Account) -> Iterator[Left]:
    for names in names_of(account.name).values():
        for kind, physical_id in names:
            if account.has(kind, physical_id):
                service = kind.split("::")[1].lower()
                yield Left(service, f"{kind} {physical_id}")


def left_in_rds(account: Account) -> Iterator[Left]:
    groups = [
        ("describe_db_subnet_groups", "DBSubnetGroups", "DBSubnetGroupName"),
        ("describe_db_parameter_groups", "DBParameterGroups", "DBParameterGroupName"),
    ]
    for operation, key, identifier in groups:
        for one in account.all("rds", operation, key):
            # CloudFormation derives these names from the stack's name.
            if one[identifier].startswith(f"{account.name}-rds-"):
                yield Left("rds", f"{key} {one[identifier]}")
    for one in account.all("rds", "describe_db_snapshots", "DBSnapshots"):
        if one["DBInstanceIdentifier"] == account.name and one["SnapshotType"] == "manual":
            yield Left(
                "rds", f"snapshot {one['DBSnapshotIdentifier']}", "the data, kept on purpose"
            )


def left_in_iam(account: Account) -> Iterator[Left]:
    """IAM is global: resources of the same system in another region have another Region tag."""
    wanted = {"Project": account.name, "Region": account.region}
    for role in account.all("iam", "list_roles", "Roles"):
        if role["RoleName"].startswith(f"{account.name}-"):
            tags = account.ask("iam", "list_role_tags", RoleName=role["RoleName"])["Tags"]
            if wanted.items() <= pairs_of(tags).items():
                yield Left("iam", f"role {role['RoleName']}")
    providers = account.ask("iam", "list_open_id_connect_providers")
    for provider in providers["OpenIDConnectProviderList"]:
        asked = {"OpenIDConnectProviderArn": provider["Arn"]}
        tags = account.ask("iam", "get_open_id_connect_provider", **asked).get("Tags", [])
        if wanted.items() <= pairs_of(tags).items():
            yield Left("iam", f"OIDC provider {provider['Arn']}")


def left_in_kms(account: Account) -> Iterator[Left]:
    for key in account.all("kms", "list_keys", "Keys"):
        try:
            about = account.ask("kms", "describe_key", KeyId=key["KeyId"])["KeyMetadata"]
            if about.get("KeyManager") == "AWS":
                continue
            tags = account.ask("kms", "list_resource_tags", KeyId=key["KeyId"])["Tags"]
        except ClientError as error:
            if error.response["Error"]["Code"] != "AccessDeniedException":
                raise
            continue  # the key's policy does not let us read it, so it is not ours
        if pairs_of(tags).get("Project") == account.name:
            pending = about["KeyState"] == "PendingDeletion"
            until = about.get("DeletionDate", "")
            fine = f"AWS deletes it automatically {until}".strip() if pending else ""
            yield Left("kms", f"key {key['KeyId']} ({about['KeyState']})", fine)


# `left` queries these services themselves.
ASKED_ELSEWHERE = ("cloudformation", "ec2", "iam", "kms")


def tagged(account: Account, key: str, value: str) -> set[str]:
    """The ARNs of all resources with a tag."""
    found = account.all(
        "resourcegroupstaggingapi",
        "get_resources",
        "ResourceTagMappingList",
        TagFilters=[{"Key": key, "Values": [value]}],
    )
    return {str(one["ResourceARN"]) for one in found}


# The API call that returns a resource, by its ARN without partition, region and account. It takes
# the part in parentheses. Parts of a cluster, such as node groups, are deleted with it, so the
# cluster is asked for.
BY_ARN: dict[str, Callable[[str], Ask]] = {
    r"ecr:repository/(.+)": ASK["AWS::ECR::Repository"],
    r"eks:[a-z-]+/([^/]+).*": ASK["AWS::EKS::Cluster"],
    r"iot:policy/(.+)": ASK["AWS::IoT::Policy"],
    r"iot:rule/(.+)": ASK["AWS::IoT::TopicRule"],
    r"iot:thinggroup/(.+)": ASK["AWS::IoT::ThingGroup"],
    r"iot:thingtype/(.+)": ASK["AWS::IoT::ThingType"],
    r"logs:log-group:([^:]+).*": ASK["AWS::Logs::LogGroup"],
    r"rds:db:(.+)": ASK["AWS::RDS::DBInstance"],
    r"rds:pg:(.+)": ASK["AWS::RDS::DBParameterGroup"],
    r"rds:subgrp:(.+)": ASK["AWS::RDS::DBSubnetGroup"],
    # AWS adds six characters to the name of a secret.
    r"secretsmanager:secret:(.+)-.{6}": ASK["AWS::SecretsManager::Secret"],
    r"sqs:(.+)": one_of("sqs", "get_queue_url", "QueueName"),
}


def deleted(account: Account, service: str, rest: str) -> bool:
    """Whether a resource that the tagging API lists no longer exists; False if that is unknown."""
    for pattern, ask in BY_ARN.items():
        if match := re.fullmatch(pattern, f"{service}:{rest}"):
            try:
                return not account.exists(ask(match[1]), match[1])
            except ClientError as error:
                if "AccessDenied" not in error.response["Error"]["Code"]:
                    raise
    return False


def left_by_tag(account: Account) -> Iterator[Left]:
    """Resources from the tagging API, which still lists deleted ones for hours."""
    arns = tagged(account, "Project", account.name)
    # Controllers in the cluster use their own tags.
    for key, value in (
        (f"kubernetes.io/cluster/{account.name}", "owned"),
        ("elbv2.k8s.aws/cluster", account.name),
    ):
        made = tagged(account, key, value)
        arns |= {arn for arn in made if arn.split(":")[2] == "elasticloadbalancing"}
    for arn in sorted(arns):
        service, rest = arn.split(":")[2], arn.split(":", 5)[5]
        if service in ASKED_ELSEWHERE or (service == "rds" and rest.startswith("snapshot:")):
            continue
        if not deleted(account, service, rest):
            yield Left(service, rest)


# --- the program ---


def explain(error: Exception, account: Account) -> str:
    """What to do about an error of a call."""
    text = str(error)
    if isinstance(error, NoCredentialsError):
        return (
            "No AWS credentials were found. Log in (`aws sso login`), name a profile with "
            "AWS_PROFILE, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; check with "
            "`aws sts get-caller-identity`."
        )
    if isinstance(error, EndpointConnectionError):
        return f"{text}. Is {account.region} the name of a region, and does this machine reach AWS?"
    if isinstance(error, ClientError):
        code = error.response["Error"]["Code"]
        if "Expired" in code:
            return (
                f"The AWS credentials have expired ({code}). Log in again (`aws sso login`), check "
                "with `aws sts get-caller-identity`, and run this again."
            )
        if code in (
            "InvalidClientTokenId",
            "UnrecognizedClientException",
            "SignatureDoesNotMatch",
            "AuthFailure",
        ):
            return (
                f"AWS does not accept the credentials ({code}). Are they complete, does their "
                "account exist, and is the region enabled? Check with "
                "`aws sts get-caller-identity`."
            )
        if "AccessDenied" in code or "Unauthorized" in code:
            return f"{text}. The deploying user needs this permission."
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("preflight", "drift", "left"):
        command = commands.add_parser(name)
        command.add_argument("--region", required=True)
        command.add_argument("--name", required=True)
        if name == "preflight":
            command.add_argument("--wants", type=json.loads, default={})
        if name == "drift":
            command.add_argument("stacks", nargs="+")
    arguments = parser.parse_args()
    account = Account(arguments.region, arguments.name)
    try:
        run(account, arguments)
    except (BotoCoreError, ClientError) as error:
        sys.exit(explain(error, account))


def run(account: Account, arguments: argparse.Namespace) -> None:
    if arguments.command == "preflight":
        about, problems = preflight(account, arguments.wants)
        print(json.dumps(about))
        if problems:
            sys.exit("\n".join(problems))
    elif arguments.command == "drift":
        missed: list[str] = []
        lines = [line for stack in arguments.stacks for line in drifted(account, stack, missed)]
        if lines:
            sys.exit("\n".join(lines + missed) + WHAT_TO_DO.format(region=account.region))
        which = "every compared resource" if missed else "every resource"
        missed.append(f"{', '.join(arguments.stacks)}: {which} is as its stack created it.")
        print("\n".join(missed))
    else:
        found = list(dict.fromkeys(left(account)))
        for one in found:
            print(f"{one.service}: {one.what}{f': {one.fine}' if one.fine else ''}")
        print(f"{len(found)} left of {account.name} in {account.region}")
        if bad := [one for one in found if not one.fine]:
            sys.exit(
                "These resources are left. They cost money or block the next deployment:\n"
                + "\n".join(f"  {one.service}: {one.what}" for one in bad)
                + "\nRun the teardown again; delete by hand what it cannot delete."
            )


if __name__ == "__main__":
    main()
