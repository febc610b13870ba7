"""MiniStack with what it lacks for our stacks, in place of the command ``ministack``.

Each missing resource type is made by MiniStack's own API of the service, over HTTP, so that little
here depends on its insides. Beside that, this program

* writes a line for each call (``CALLS``: region, IAM action, access key), for the policy of the
  deploying user and for the test that nothing leaves its region;
* reads ``SCENARIO`` (JSON) before each call and each resource, for bad days:
  ``slow`` (seconds by type), ``fail`` (reason by logical id), ``fail_deletion`` (reason by type),
  ``log_groups_that_come_back`` (names), ``status`` (of stacks, forged), ``expired``,
  ``expired_after`` (an action), ``quotas`` (by code), ``classes_not_offered``, ``cluster``
  (``endpoint`` and ``ca``: where the test's Kubernetes API is).

What AWS does otherwise is said at each shim.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from urllib.parse import parse_qs
from zlib import crc32

import boto3
import ministack.app as app
from ministack.core.iam_actions import extract_iam_action
from ministack.core.responses import get_region
from ministack.core.router import detect_service, extract_access_key_id, extract_region
from ministack.services import ec2
from ministack.services.cloudformation import provisioners, stacks

# The access key of this program's own calls: the account's number stands for its root user.
OURS = "000000000000"


def scenario() -> dict:
    path = Path(os.environ["SCENARIO"])
    return json.loads(path.read_text()) if path.exists() else {}


def client(service: str):
    url = f"http://127.0.0.1:{os.environ['GATEWAY_PORT']}"
    keys = {"aws_access_key_id": OURS, "aws_secret_access_key": OURS}
    return boto3.client(service, region_name=get_region(), endpoint_url=url, **keys)


def tag_list(properties: dict) -> list[dict]:
    tags = properties.get("Tags") or []
    return tags if isinstance(tags, list) else [{"Key": k, "Value": v} for k, v in tags.items()]


def tag_map(properties: dict) -> dict:
    return {tag["Key"]: tag["Value"] for tag in tag_list(properties)}


def tagged(kind: str, properties: dict) -> dict:
    tags = tag_list(properties)
    return {"TagSpecifications": [{"ResourceType": kind, "Tags": tags}]} if tags else {}


# --- resource types: create(logical id, properties, stack) -> (physical id, attributes);
# delete(physical id, properties)


def create_address(_name, properties, _stack):
    made = client("ec2").allocate_address(Domain="vpc", **tagged("elastic-ip", properties))
    return made["PublicIp"], {"AllocationId": made["AllocationId"], "PublicIp": made["PublicIp"]}


def delete_address(public_ip, _properties):
    ec2 = client("ec2")
    for address in ec2.describe_addresses()["Addresses"]:
        if address["PublicIp"] == public_ip:
            ec2.release_address(AllocationId=address["AllocationId"])


def create_nat_gateway(_name, properties, _stack):
    made = client("ec2").create_nat_gateway(
        SubnetId=properties["SubnetId"],
        AllocationId=properties["AllocationId"],
        **tagged("natgateway", properties),
    )["NatGateway"]
    return made["NatGatewayId"], {"NatGatewayId": made["NatGatewayId"]}


def create_flow_log(_name, properties, _stack):
    names = (
        "ResourceType",
        "TrafficType",
        "LogGroupName",
        "DeliverLogsPermissionArn",
        "MaxAggregationInterval",
    )
    made = client("ec2").create_flow_logs(
        ResourceIds=[properties["ResourceId"]],
        **{name: properties[name] for name in names if name in properties},
        **tagged("vpc-flow-log", properties),
    )["FlowLogIds"][0]
    return made, {"Id": made}


def create_oidc_provider(_name, properties, _stack):
    # AWS finds the thumbprint itself where none is given.
    arn = client("iam").create_open_id_connect_provider(
        Url=properties["Url"],
        ClientIDList=properties["ClientIdList"],
        ThumbprintList=properties.get("ThumbprintList", ["0" * 40]),
        Tags=tag_list(properties),
    )["OpenIDConnectProviderArn"]
    return arn, {"Arn": arn}


def delete_oidc_provider(arn, _properties):
    client("iam").delete_open_id_connect_provider(OpenIDConnectProviderArn=arn)


ADDON = {
    "AddonVersion": "addonVersion",
    "ServiceAccountRoleArn": "serviceAccountRoleArn",
    "ConfigurationValues": "configurationValues",
    "ResolveConflicts": "resolveConflicts",
}


def addon_arguments(properties):
    given = {new: properties[old] for old, new in ADDON.items() if properties.get(old)}
    return {"clusterName": properties["ClusterName"], "addonName": properties["AddonName"], **given}


def create_addon(_name, properties, _stack):
    made = client("eks").create_addon(**addon_arguments(properties), tags=tag_map(properties))[
        "addon"
    ]
    return f"{properties['ClusterName']}|{properties['AddonName']}", {"Arn": made["addonArn"]}


def update_addon(physical_id, _old, properties, _stack):
    client("eks").update_addon(**addon_arguments(properties))
    return physical_id, {}


def delete_addon(_physical_id, properties):
    names = {"clusterName": properties["ClusterName"], "addonName": properties["AddonName"]}
    client("eks").delete_addon(**names)


def create_access_entry(_name, properties, _stack):
    eks = client("eks")
    names = {"clusterName": properties["ClusterName"], "principalArn": properties["PrincipalArn"]}
    made = eks.create_access_entry(**names, tags=tag_map(properties))["accessEntry"]
    for policy in properties.get("AccessPolicies", []):
        scope = {"type": policy["AccessScope"]["Type"]}
        eks.associate_access_policy(**names, policyArn=policy["PolicyArn"], accessScope=scope)
    physical_id = f"{properties['PrincipalArn']}|{properties['ClusterName']}"
    return physical_id, {"AccessEntryArn": made["accessEntryArn"]}


def delete_access_entry(_physical_id, properties):
    names = {"clusterName": properties["ClusterName"], "principalArn": properties["PrincipalArn"]}
    client("eks").delete_access_entry(**names)


def remembered(_name, properties, _stack):
    """A type without any API in MiniStack: known to its stack alone."""
    known = (
        properties.get("AccountId")
        or properties.get("Budget", {}).get("BudgetName")
        or "remembered"
    )
    return known, {}


HAVE = provisioners._RESOURCE_HANDLERS
HAVE_INSTANCE = dict(HAVE["AWS::RDS::DBInstance"])
HAVE_CLUSTER = dict(HAVE["AWS::EKS::Cluster"])


def is_true(value) -> bool:
    return str(value).lower() == "true"


def create_instance(name, properties, stack):
    """MiniStack knows no managed master password; AWS makes the secret and rotates it."""
    identifier, attributes = HAVE_INSTANCE["create"](name, properties, stack)
    EXPORTS[identifier] = properties.get("EnableCloudwatchLogsExports", [])
    if (
        properties.get("StorageType") == "gp3"
    ):  # AWS fills these in, and the module rds_instance relies on it
        client("rds").modify_db_instance(
            DBInstanceIdentifier=identifier, Iops=3000, StorageThroughput=125, ApplyImmediately=True
        )
    if is_true(properties.get("ManageMasterUserPassword")):
        secret = client("secretsmanager").create_secret(
            Name=f"rds!db-{identifier}",
            SecretString=json.dumps(
                {"username": properties["MasterUsername"], "password": "of-rds"}
            ),
            Tags=[{"Key": "aws:rds:primaryDBInstanceArn", "Value": identifier}],
        )
        attributes["MasterUserSecret.SecretArn"] = secret["ARN"]
    return identifier, attributes


def update_instance(identifier, old, new, stack, name=None):
    identifier, attributes = HAVE_INSTANCE["update"](identifier, old, new, stack, name)
    if is_true(new.get("ManageMasterUserPassword")):
        secret = client("secretsmanager").describe_secret(SecretId=f"rds!db-{identifier}")
        attributes["MasterUserSecret.SecretArn"] = secret["ARN"]
    return identifier, attributes


def delete_instance(identifier, properties):
    """MiniStack lets a protected instance go; AWS does not."""
    rds = client("rds")
    found = [
        db
        for db in rds.describe_db_instances()["DBInstances"]
        if db["DBInstanceIdentifier"] == identifier
    ]
    if found and found[0].get("DeletionProtection"):
        raise ValueError(
            "Cannot delete protected DB Instance, please disable deletion protection and try again."
        )
    if found:
        HAVE_INSTANCE["delete"](identifier, properties)
    if is_true(properties.get("ManageMasterUserPassword")):
        client("secretsmanager").delete_secret(
            SecretId=f"rds!db-{identifier}", ForceDeleteWithoutRecovery=True
        )


def create_cluster(name, properties, stack):
    """MiniStack drops the encryption of Secrets."""
    identifier, attributes = HAVE_CLUSTER["create"](name, properties, stack)
    if properties.get("EncryptionConfig"):
        configuration = [
            {"resources": entry["Resources"], "provider": {"keyArn": entry["Provider"]["KeyArn"]}}
            for entry in properties["EncryptionConfig"]
        ]
        client("eks").associate_encryption_config(
            clusterName=identifier, encryptionConfig=configuration
        )
    if where := scenario().get("cluster"):  # the test's API server
        attributes |= {"Endpoint": where["endpoint"], "CertificateAuthorityData": where["ca"]}
    return identifier, attributes


EXPORTS: dict[str, list[str]] = {}  # of logs, by instance: MiniStack forgets them


def with_exports(body: bytes) -> bytes:
    for identifier, names in EXPORTS.items():
        if f"<DBInstanceIdentifier>{identifier}<".encode() in body:
            members = "".join(f"<member>{name}</member>" for name in names)
            tag = "EnabledCloudwatchLogsExports"
            body = body.replace(f"<{tag}/>".encode(), f"<{tag}>{members}</{tag}>".encode())
    return body


HANDLERS = {
    "AWS::EC2::EIP": {"create": create_address, "delete": delete_address},
    "AWS::EC2::NatGateway": {
        "create": create_nat_gateway,
        "delete": lambda gateway, _: client("ec2").delete_nat_gateway(NatGatewayId=gateway),
    },
    "AWS::EC2::FlowLog": {
        "create": create_flow_log,
        "delete": lambda flow_log, _: client("ec2").delete_flow_logs(FlowLogIds=[flow_log]),
    },
    "AWS::IAM::OIDCProvider": {"create": create_oidc_provider, "delete": delete_oidc_provider},
    "AWS::EKS::Addon": {"create": create_addon, "update": update_addon, "delete": delete_addon},
    "AWS::EKS::AccessEntry": {"create": create_access_entry, "delete": delete_access_entry},
    "AWS::RDS::DBInstance": {
        **HAVE_INSTANCE,
        "create": create_instance,
        "update": update_instance,
        "delete": delete_instance,
    },
    "AWS::EKS::Cluster": {**HAVE_CLUSTER, "create": create_cluster},
}
# One per account and region; the emulator has no API for either.
for kind in ("AWS::IoT::Logging", "AWS::Budgets::Budget"):
    HANDLERS[kind] = {
        "create": remembered,
        "update": lambda identifier, *_: (identifier, {}),
        "delete": lambda *_: None,
    }

# --- bad days

on_thread, provision = stacks._runs_on_worker_thread, stacks._provision_resource


def provision_or_fail(kind, name, properties, stack):
    today = scenario()
    time.sleep(today.get("slow", {}).get(kind, 0))
    if name in today.get("fail", {}):
        raise ValueError(today["fail"][name])
    return provision(kind, name, properties, stack)


def on_a_thread(kind) -> bool:
    # A call to oneself from the event loop would wait for ever.
    today = scenario()
    returning = kind == "AWS::Logs::LogGroup" and "log_groups_that_come_back" in today
    return on_thread(kind) or kind in HANDLERS or kind in today.get("slow", {}) or returning


delete = stacks._delete_resource


def delete_or_fail(kind, physical_id, *rest, **named):
    today = scenario()
    time.sleep(today.get("slow", {}).get(kind, 0))
    if kind in today.get("fail_deletion", {}):
        raise ValueError(today["fail_deletion"][kind])
    deleted = delete(kind, physical_id, *rest, **named)
    # EKS and RDS write for a while after their deletion, which makes the log group anew.
    if physical_id in today.get("log_groups_that_come_back", []):
        client("logs").create_log_group(logGroupName=physical_id)
    return deleted


# --- calls: recorded, refused on a bad day, and answered where MiniStack has no answer

dispatch = app._dispatch_service_request
QUOTAS = {"L-F678F1CE": 5.0, "L-0263D0A3": 5.0, "L-1216C47A": 32.0, "L-34B43A08": 32.0}
VERSIONS = [
    ("1.36", "STANDARD_SUPPORT"),
    ("1.35", "STANDARD_SUPPORT"),
    ("1.34", "STANDARD_SUPPORT"),
    ("1.31", "EXTENDED_SUPPORT"),
]


def answer(status: int, body: dict) -> tuple:
    return status, {"Content-Type": "application/x-amz-json-1.1"}, json.dumps(body).encode()


def xml(action: str, result: str) -> tuple:
    name = action.split(":")[1]
    text = f"<{name}Response><{name}Result>{result}</{name}Result></{name}Response>"
    return 200, {"Content-Type": "text/xml"}, text.encode()


def action_of(method, path, headers, body, query) -> str:
    target = headers.get("x-amz-target", "")
    if target.startswith("ServiceQuotas"):
        return "servicequotas:" + target.split(".")[-1]
    if path == "/cluster-versions":
        return "eks:DescribeClusterVersions"
    routing = app._routing_params(method, path, headers, body, query)
    service = detect_service(method, path, headers, routing)
    return (
        extract_iam_action(service, method, path, headers, body, routing)
        or f"{service}:{method} {path}"
    )


def expired(action: str, headers: dict) -> tuple:
    message = "The security token included in the request is expired"
    if "x-amz-target" in headers or action.startswith(("eks:", "iot:")):
        return answer(400, {"__type": "ExpiredTokenException", "message": message})
    code = "RequestExpired" if action.startswith("ec2:") else "ExpiredToken"
    error = f"<Error><Type>Sender</Type><Code>{code}</Code><Message>{message}</Message></Error>"
    if action.startswith("ec2:"):
        text = f"<Response><Errors>{error}</Errors></Response>"
    else:
        text = f"<ErrorResponse>{error}</ErrorResponse>"
    return 403, {"Content-Type": "text/xml"}, text.encode()


seen: set[str | None] = set()  # what was asked, for "expired_after"


async def dispatch_with_shims(method, path, headers, body, query_params, request_id):
    key = extract_access_key_id(headers, query_params)
    if key == OURS:
        return await dispatch(method, path, headers, body, query_params, request_id)
    action, today = action_of(method, path, headers, body, query_params), scenario()
    with Path(os.environ["CALLS"]).open("a") as calls:
        calls.write(f"{extract_region(headers, query_params)} {action} {key}\n")
    if today.get("expired_after") in seen:
        return expired(action, headers)
    seen.add(action)
    if today.get("expired"):
        return expired(action, headers)
    if action == "servicequotas:GetServiceQuota":
        code = json.loads(body)["QuotaCode"]
        value = today.get("quotas", {}).get(code, QUOTAS[code])
        return answer(200, {"Quota": {"QuotaCode": code, "Value": value}})
    if action == "eks:DescribeClusterVersions":
        versions = [
            {"clusterVersion": version, "versionStatus": status} for version, status in VERSIONS
        ]
        return answer(200, {"clusterVersions": versions})
    if action == "rds:DescribeOrderableDBInstanceOptions":  # MiniStack offers what AWS did in 2023
        asked = parse_qs(body.decode())
        offered = not today.get("classes_not_offered")
        option = f"<DBInstanceClass>{asked['DBInstanceClass'][0]}</DBInstanceClass>"
        members = f"<OrderableDBInstanceOption>{option}</OrderableDBInstanceOption>" * offered
        return xml(action, f"<OrderableDBInstanceOptions>{members}</OrderableDBInstanceOptions>")
    status, answer_headers, answer_body = await dispatch(
        method, path, headers, body, query_params, request_id
    )
    forged = today.get("status", {})
    if (
        action == "cloudformation:DescribeStacks" and forged
    ):  # for states nobody can bring about here
        for name, state in forged.items():
            if f"<StackName>{name}<".encode() in answer_body:
                answer_body = re.sub(
                    rb"<StackStatus>\w+<", f"<StackStatus>{state}<".encode(), answer_body
                )
    if action == "rds:DescribeDBInstances":
        answer_body = with_exports(answer_body)
    return status, answer_headers, answer_body


# What a change set says of types without a table is "Conditional"; this is AWS's reference.
REPLACING = {
    "AWS::EKS::Cluster": ("Name", "RoleArn", "EncryptionConfig", "AccessConfig"),
    "AWS::EKS::Nodegroup": ("ClusterName", "NodegroupName", "NodeRole", "Subnets", "AmiType"),
    "AWS::EKS::Addon": ("ClusterName", "AddonName"),
    "AWS::EKS::AccessEntry": ("ClusterName", "PrincipalArn"),
    "AWS::IAM::OIDCProvider": ("Url",),
    "AWS::EC2::LaunchTemplate": ("LaunchTemplateName",),
}


physical_name = provisioners._physical_name


def physical_name_of_region(stack: str, logical_id: str, **options) -> str:
    """AWS ends a name with random letters; here two regions would have the same ones."""
    name = physical_name(stack, logical_id, **options)
    ending = format(crc32(get_region().encode()) % 0xFFFF, "04X")
    ending = ending.lower() if options.get("lowercase") else ending
    return name[: -len(ending)] + ending


def describe_network_interfaces(parameters):
    """MiniStack knows no filters here."""
    filters = ec2._parse_filters(parameters)
    wanted_ids = ec2._parse_member_list(parameters, "NetworkInterfaceId")
    fields = {"vpc-id": "VpcId", "status": "Status", "network-interface-id": "NetworkInterfaceId"}
    found = [
        one
        for one in ec2._network_interfaces.values()
        if (not wanted_ids or one["NetworkInterfaceId"] in wanted_ids)
        and all(one[fields[name]] in values for name, values in filters.items() if name in fields)
        and ec2._resource_matches_tag_filters(one["NetworkInterfaceId"], filters)
    ]
    items = "".join(ec2._eni_fields_xml(one) for one in found)
    answer = f"<networkInterfaceSet>{items}</networkInterfaceSet>"
    return ec2._xml(200, "DescribeNetworkInterfacesResponse", answer)


def main() -> None:
    provisioners._physical_name = physical_name_of_region
    ec2._ACTION_MAP["DescribeNetworkInterfaces"] = describe_network_interfaces
    provisioners._REPLACING_PROPERTIES.update(REPLACING)
    provisioners._RESOURCE_HANDLERS.update(HANDLERS)
    # The stack's own tags reach these as well, as on AWS.
    provisioners._STACK_TAG_PROPERTY.update(
        {
            kind: ("Tags", "list")
            for kind in HANDLERS
            if kind not in ("AWS::IoT::Logging", "AWS::Budgets::Budget")
        }
    )
    stacks._provision_resource = provision_or_fail
    stacks._delete_resource = delete_or_fail
    stacks._runs_on_worker_thread = on_a_thread
    app._dispatch_service_request = dispatch_with_shims
    app.main()


if __name__ == "__main__":
    main()
