"""The five CloudFormation templates without an AWS account: linters and security controls.

Controls are from AWS Security Hub (AWS Foundational Security Best Practices). A test of a control
has the id of the control in its name, such as rds_2.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_runs import ROOT, playbook
from cfnlint.schema import PROVIDER_SCHEMA_MANAGER
from checkov import checkov
from places import keep_places
from rendering import render

ROLES = ("network", "ecr", "rds", "eks", "iot_core")
REGIONS = ("eu-west-1", "us-east-1")
FILES = {role: ROOT / "roles" / role / "files/stack.yml" for role in ROLES}


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML with CloudFormation's short forms. The loader of cfn-lint takes seconds to import."""


def _long_form(loader: yaml.SafeLoader, name: str, node: yaml.Node) -> dict[str, Any]:
    """Load ``!Sub text`` as ``{"Fn::Sub": "text"}``, and so on."""
    value: Any
    if isinstance(node, yaml.ScalarNode):
        value = loader.construct_scalar(node)
        if name == "GetAtt":
            value = value.split(".", 1)
    else:
        value = loader.construct_sequence(node, deep=True)
    return {name if name in ("Ref", "Condition") else f"Fn::{name}": value}


_Loader.add_multi_constructor("!", _long_form)
TEMPLATES: dict[str, Any] = {
    role: yaml.load(file.read_text(), _Loader) for role, file in FILES.items()
}

# Failed checks of checkov that we accept, with their resources and the reason.
CHECKOV_SKIPS = {
    # CloudWatch Logs encrypts each log group with its own key. A customer managed key would be
    # deleted with the stack, and retained logs could no longer be read.
    "CKV_AWS_158": {
        *("network.FlowLogGroup", "rds.LogGroup", "rds.UpgradeLogGroup"),
        *("eks.LogGroup", "iot_core.ErrorLogGroup"),
    },
    # The key aws/secretsmanager is enough, because no other account reads the secret.
    "CKV_AWS_149": {"rds.CollectorSecret", "rds.ReaderSecret"},
    # The check accepts only KMS keys. The queue uses SSE-SQS, which needs no permission on a key.
    "CKV_AWS_27": {"iot_core.ReplayQueue"},
}
# Actions without resource-level permissions, by role.
WITHOUT_RESOURCE_LEVEL = {"eks.CloudWatchExporterRole": "cloudwatch:GetMetricStatistics"}
# The properties that are the name of a resource.
NAMES = {
    *("DBInstanceIdentifier", "LogGroupName", "Name", "PolicyName", "QueueName", "RepositoryName"),
    *("RuleName", "ThingGroupName", "ThingName", "ThingTypeName"),
}


def resources(role: str, kind: str = "") -> dict[str, Any]:
    """The properties of the resources in a template, by logical id; all types if no ``kind``."""
    found: dict[str, Any] = {
        name: resource.get("Properties", {})
        for name, resource in TEMPLATES[role]["Resources"].items()
        if kind in ("", resource["Type"])
    }
    assert found, f"{role} has no {kind}"
    return found


def all_resources(kind: str) -> dict[str, Any]:
    """The properties of all resources of type ``kind``, by ``role.logical id``."""
    return {
        f"{role}.{name}": resource.get("Properties", {})
        for role in ROLES
        for name, resource in TEMPLATES[role]["Resources"].items()
        if resource["Type"] == kind
    }


def resolve_default(role: str, value: Any) -> Any:
    """``value``, or the default of the parameter that it refers to."""
    if isinstance(value, dict) and set(value) == {"Ref"}:
        return TEMPLATES[role]["Parameters"][value["Ref"]]["Default"]
    return value


def parameter(role: str, name: str) -> Any:
    return TEMPLATES[role]["Parameters"][name]


def walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield each key and value, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner)


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def statements(kind: str, document: str) -> Iterator[tuple[str, Any]]:
    """Yield ``role.logical id`` and each statement of the policies in property ``document``."""
    for place, properties in all_resources(kind).items():
        for key, policy in walk(properties):
            if key != document:
                continue
            if "Fn::Sub" in policy:  # a trust policy with references in its keys
                policy = json.loads(policy["Fn::Sub"][0])
            for statement in policy["Statement"]:
                yield place, statement


def accepts(role: str, name: str, value: str) -> bool:
    return re.fullmatch(parameter(role, name)["AllowedPattern"], value) is not None


# --- linters --------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_cfn_lint_has_no_findings() -> None:
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("cfn-lint")),
            *("--format", "json"),
            *("--include-checks", "I"),  # informational findings as well
            *("--regions", *REGIONS),
            *("--template", *map(str, FILES.values())),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, json.loads(done.stdout or "null")) == (0, []), done.stderr


@pytest.mark.timeout(300)
def test_checkov_has_only_accepted_findings() -> None:
    report = checkov("cloudformation", FILES.values())
    failed: dict[str, set[str]] = {}
    for check in report["results"]["failed_checks"]:
        role = Path(check["file_path"]).parts[-3]
        place = f"{role}.{check['resource'].rpartition('.')[2]}"
        failed.setdefault(check["check_id"], set()).add(place)
    assert failed == CHECKOV_SKIPS
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["passed"] > 80


# --- all templates --------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_template_fits_into_the_request(role: str) -> None:
    # A larger template has to be uploaded to a bucket first.
    assert FILES[role].stat().st_size < 51_200
    assert "Transform" not in TEMPLATES[role]  # needs CAPABILITY_AUTO_EXPAND


@pytest.mark.parametrize("role", ROLES)
def test_each_parameter_is_described_and_constrained(role: str) -> None:
    for name, spec in TEMPLATES[role]["Parameters"].items():
        assert spec["Description"].endswith("."), name
        checked_by_aws = spec["Type"].removeprefix("List<").startswith("AWS::")
        if not checked_by_aws and "AllowedValues" not in spec:
            assert "AllowedPattern" in spec or "MinValue" in spec, name
            assert spec["ConstraintDescription"], name
        if "Default" in spec and "AllowedPattern" in spec:
            assert accepts(role, name, spec["Default"]), name


@pytest.mark.parametrize("role", ROLES)
def test_each_parameter_is_used(role: str) -> None:
    text = json.dumps({k: v for k, v in TEMPLATES[role].items() if k != "Parameters"})
    for name in TEMPLATES[role]["Parameters"]:
        assert f'"Ref": "{name}"' in text or f"${{{name}}}" in text, name


def test_outputs_named_by_parameters_exist() -> None:
    found = 0
    for role in ROLES:
        for spec in TEMPLATES[role]["Parameters"].values():
            match = re.match(r"Output (\w+) of the (\w+) stack", spec["Description"])
            if match:
                stack = {"database": "rds"}.get(match[2], match[2])
                assert match[1] in TEMPLATES[stack]["Outputs"], match[0]
                found += 1
    assert found == 6


def test_shared_parameters_have_equal_constraints() -> None:
    seen: dict[str, Any] = {}
    for role in ROLES:
        for name in ("LogRetentionDays", "SubscribeArns", "ReceiveArns", "CollectorClientIdPrefix"):
            spec = TEMPLATES[role]["Parameters"].get(name)
            if spec is not None:
                rules = {k: v for k, v in spec.items() if k != "Description"}
                assert seen.setdefault(name, rules) == rules, (role, name)
        prefix = parameter(role, "Prefix")
        rules = {k: v for k, v in prefix.items() if k != "Description"}
        assert seen.setdefault("Prefix", rules) == rules, role
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("value", "good"),
    [
        ("iot-system", True),
        ("iot2", True),
        # RDS allows no trailing hyphen, no two hyphens in a row, and needs a letter first.
        ("iot--system", False),
        ("iot-", False),
        ("2iot", False),
        ("Iot", False),
        ("iot_system", False),
    ],
)
def test_prefix_is_valid_for_all_services(value: str, good: bool) -> None:
    assert accepts("network", "Prefix", value) is good


def test_names_start_with_the_prefix() -> None:
    """So two systems can share a region, and two regions can share an account."""
    found = 0
    for role in ROLES:
        for logical_id, properties in resources(role).items():
            for key in NAMES & properties.keys():
                if properties[key].get("Ref") in TEMPLATES[role]["Resources"]:
                    continue  # refers to the name of another resource
                assert "Prefix" in json.dumps(properties[key]), (role, logical_id, key)
                found += 1
    assert found == 17
    # IAM is global. Without a RoleName, CloudFormation generates a unique name in each region.
    for place, properties in all_resources("AWS::IAM::Role").items():
        assert "RoleName" not in properties, place
    budget = resources("iot_core", "AWS::Budgets::Budget")["Budget"]["Budget"]
    assert "${AWS::Region}" in budget["BudgetName"]["Fn::Sub"]


def test_changed_parameters_do_not_replace_resources_with_fixed_names() -> None:
    """CloudFormation creates the new resource first, and the old one still has the name."""
    conflicts = set()
    for role in ROLES:
        for logical_id, resource in TEMPLATES[role]["Resources"].items():
            schema = PROVIDER_SCHEMA_MANAGER.get_resource_schema("eu-west-1", resource["Type"])
            properties = resource.get("Properties", {})
            named, parameters = "", set()
            for path in schema.schema.get("createOnlyProperties", []):
                value: Any = properties
                for key in path.split("/")[2:]:
                    value = value.get(key, {}) if isinstance(value, dict) else {}
                if path.rpartition("/")[2] in {*NAMES, "BudgetName"}:
                    named = json.dumps(value)
                else:
                    parameters |= set(re.findall(r'"Ref": "(\w+)"', json.dumps(value)))
            used = parameters & TEMPLATES[role]["Parameters"].keys()
            if "Prefix" in named:  # the resource's own name, not a reference to another one
                conflicts |= {(f"{role}.{logical_id}", one) for one in used if one not in named}
    # The playbook refuses these, or deletes the stack first (aws_base_allow_replacement).
    protected = {("rds.Instance", "DatabaseName"), ("rds.Instance", "MasterUsername")}
    assert conflicts == {*protected, ("eks.Cluster", "CreatorIsAdmin")}


@pytest.mark.parametrize("role", ROLES)
def test_no_region_or_account_is_hard_coded(role: str) -> None:
    text = json.dumps({k: v for k, v in TEMPLATES[role].items() if k != "Parameters"})
    assert not re.search(r"\b[a-z]{2}-(north|south|east|west|central)[a-z]*-\d", text)
    assert not re.search(r"\b\d{12}\b", text)
    assert "arn:aws:" not in text  # the partition differs in China and GovCloud


def test_log_groups_have_retention_and_exist_before_their_writers() -> None:
    for place, properties in all_resources("AWS::Logs::LogGroup").items():
        role = place.partition(".")[0]
        assert resolve_default(role, properties["RetentionInDays"]) == 30, place
    assert TEMPLATES["eks"]["Resources"]["Cluster"]["DependsOn"] == "LogGroup"
    instance = TEMPLATES["rds"]["Resources"]["Instance"]
    exported = instance["Properties"]["EnableCloudwatchLogsExports"]
    groups = resources("rds", "AWS::Logs::LogGroup")
    assert {g["LogGroupName"]["Fn::Sub"].rpartition("/")[2] for g in groups.values()} == {*exported}
    assert groups.keys() <= {*instance["DependsOn"]}


# --- permissions ----------------------------------------------------------------------------------


def test_no_policy_has_all_resources_or_wildcard_actions() -> None:
    checked = 0
    for place, statement in statements("AWS::IAM::Role", "PolicyDocument"):
        for resource in as_list(statement["Resource"]):
            assert resource != "*" or statement["Action"] == WITHOUT_RESOURCE_LEVEL.get(place), (
                place
            )
        for action in as_list(statement["Action"]):
            assert "*" not in action, place
        checked += 1
    assert checked > 6


def test_exporter_may_only_read_metrics_of_its_region() -> None:
    resource = TEMPLATES["eks"]["Resources"]["CloudWatchExporterRole"]
    assert resource["Condition"] == "WithCloudWatchExporter"
    assert parameter("eks", "CloudWatchExporterServiceAccount")["Default"] == ""
    (policy,) = resource["Properties"]["Policies"]
    assert "ManagedPolicyArns" not in resource["Properties"]
    assert policy["PolicyDocument"]["Statement"] == [
        {
            "Effect": "Allow",
            "Action": "cloudwatch:GetMetricStatistics",
            "Resource": "*",
            "Condition": {"StringEquals": {"aws:RequestedRegion": {"Ref": "AWS::Region"}}},
        }
    ]


def test_exporter_reads_metrics_of_the_stacks_resources() -> None:
    config = yaml.safe_load(
        render(
            "cloudwatch_exporter/cloudwatch-exporter.yml.j2",
            aws_base_name="plant-7",
            aws_base_region="eu-west-1",
            cloudwatch_exporter_replay_rules=3,
        )
    )
    requested = {
        (job["namespace"], dimension["name"], dimension["value"])
        for job in config["static"]
        for dimension in job["dimensions"]
        if dimension["name"] != "Protocol"
    }
    database = resources("rds", "AWS::RDS::DBInstance")["Instance"]["DBInstanceIdentifier"]
    assert database == {"Ref": "Prefix"}
    queue = resources("iot_core", "AWS::SQS::Queue")["ReplayQueue"]["QueueName"]["Fn::Sub"]
    group = resources("iot_core", "AWS::Logs::LogGroup")["ErrorLogGroup"]["LogGroupName"]["Fn::Sub"]
    rules = resources("iot_core", "AWS::IoT::TopicRule").values()
    assert requested == {
        ("AWS/RDS", "DBInstanceIdentifier", "plant-7"),
        ("AWS/SQS", "QueueName", queue.replace("${Prefix}", "plant-7")),
        ("AWS/Logs", "LogGroupName", group.replace("${Prefix}", "plant-7")),
        *(
            ("AWS/IoT", "RuleName", rule["RuleName"]["Fn::Sub"][0].replace("${Name}", "plant_7"))
            for rule in rules
        ),
    }
    assert len(rules) == 3


def test_no_wildcard_in_iot_policies() -> None:
    """``*`` is allowed only in the client ids of the collector, after their prefix."""
    checked = 0
    for kind in ("AWS::IoT::Policy", "AWS::IAM::Role"):
        for place, statement in statements(kind, "PolicyDocument"):
            actions = as_list(statement["Action"])
            if not all(action.startswith("iot:") for action in actions):
                continue
            for resource in as_list(statement["Resource"]):
                if actions == ["iot:Connect"]:
                    name = resource["Fn::Sub"].rpartition(":client/")[2]
                    assert name in (
                        "${CollectorClientIdPrefix}-*",
                        "${!iot:Connection.Thing.ThingName}",
                    ), place
                else:
                    assert resource["Ref"] in {"SubscribeArns", "ReceiveArns", "PublishArns"}, place
                checked += 1
    assert checked == 8


@pytest.mark.parametrize("role", ["eks", "iot_core"])
def test_topic_arns_do_not_match_all_topics(role: str) -> None:
    arn = "arn:aws:iot:eu-west-1:123456789012:"
    assert accepts(role, "SubscribeArns", arn + "topicfilter/iot/data")
    assert accepts(
        role, "SubscribeArns", arn + "topicfilter/$share/collectors/site/+/temperature/#"
    )
    assert not accepts(role, "SubscribeArns", arn + "topicfilter/*")
    assert not accepts(role, "SubscribeArns", arn + "topicfilter/iot/*")
    assert not accepts(role, "SubscribeArns", "*")
    assert accepts(role, "ReceiveArns", arn + "topic/site/*/temperature/*")
    assert not accepts(role, "ReceiveArns", arn + "topic/*")
    assert not accepts(role, "ReceiveArns", "*")


def test_collector_may_subscribe_and_receive_in_a_shared_subscription(tmp_path: Path) -> None:
    """The sample policy of aws-iot-device-sdk-python-v2 allows iot:Receive with the group, too."""
    names = ("__iot_core_subscribe", "__iot_core_receive")
    play = {
        "hosts": "localhost",
        "gather_facts": False,
        "vars_files": [
            str(ROOT / "roles/iot_core" / kind / "main.yml") for kind in ("defaults", "vars")
        ],
        "tasks": [
            {"copy": {"content": f"{{{{ {name} | to_json }}}}", "dest": str(tmp_path / name)}}
            for name in names
        ],
    }
    given = {
        "iot_core_topics": ["site/+/data", "$share/own/iot/#"],
        "aws_base_identity": {"arn": "arn:aws:iam::1:user/a", "account": "1"},
        "aws_base_region": "eu-west-1",
    }
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
    done = playbook(str(tmp_path / "play.yml"), "-e", json.dumps(given))
    assert done.returncode == 0, done.stdout
    subscribe, receive = (json.loads((tmp_path / name).read_text()) for name in names)
    filters = {"site/+/data", "iot/#"}
    filters |= {f"$share/collectors/{one}" for one in filters} | {"$share/own/iot/#"}
    arn = "arn:aws:iot:eu-west-1:1:"
    assert set(subscribe) == {f"{arn}topicfilter/{one}" for one in filters}
    assert set(receive) == {f"{arn}topic/{re.sub('[+#]', '*', one)}" for one in filters}


def test_publish_arns_do_not_match_all_topics() -> None:
    arn = "arn:aws:iot:eu-west-1:123456789012:"
    assert accepts("iot_core", "PublishArns", arn + "topic/iot/${iot:Connection.Thing.ThingName}")
    assert not accepts("iot_core", "PublishArns", arn + "topic/*")
    assert not accepts("iot_core", "PublishArns", arn + "topicfilter/iot/data")


def test_collector_has_equal_permissions_by_role_and_certificate() -> None:
    role = resources("eks", "AWS::IAM::Role")["CollectorRole"]
    always = [p for p in role["Policies"] if "Fn::If" not in p]
    by_role = {p["PolicyName"]: p["PolicyDocument"]["Statement"] for p in always}
    policy = resources("iot_core", "AWS::IoT::Policy")["CollectorPolicy"]
    by_certificate = policy["PolicyDocument"]["Statement"]
    assert by_role["read-from-iot-core"] == by_certificate
    connect, subscribe, receive = by_certificate
    # The only CONNECT attribute that it may use is a persistent session.
    assert connect["Condition"] == {
        "ForAllValues:StringEquals": {"iot:ConnectAttributes": ["PersistentConnect"]}
    }
    assert [s["Action"] for s in (subscribe, receive)] == ["iot:Subscribe", "iot:Receive"]
    assert by_role["database-password"] == [
        {
            "Effect": "Allow",
            "Action": "secretsmanager:GetSecretValue",
            "Resource": {"Ref": "DatabaseSecretArn"},
        }
    ]


def test_device_may_only_connect_as_its_thing_and_publish() -> None:
    policy = resources("iot_core", "AWS::IoT::Policy")["DevicePolicy"]["PolicyDocument"]
    connect, publish = policy["Statement"]
    assert connect["Action"] == "iot:Connect"
    assert connect["Resource"]["Fn::Sub"].endswith(":client/${!iot:Connection.Thing.ThingName}")
    assert connect["Condition"] == {"Bool": {"iot:Connection.Thing.IsAttached": "true"}}
    assert publish["Action"] == "iot:Publish"


def test_private_keys_are_not_accepted_as_parameters() -> None:
    for place, properties in all_resources("AWS::IoT::Certificate").items():
        assert properties.keys() == {"CertificateSigningRequest", "Status"}, place
    for name in ("DeviceCsr", "CollectorCsr"):
        body = "MIHyMIGYAgEAMDYxCzAJBgNVBAYTAkRF\n"
        request = f"-----BEGIN CERTIFICATE REQUEST-----\n{body}-----END CERTIFICATE REQUEST-----\n"
        assert accepts("iot_core", name, request)
        assert not accepts("iot_core", name, request.replace("CERTIFICATE REQUEST", "PRIVATE KEY"))


def test_each_irsa_role_trusts_one_service_account() -> None:
    accounts = {}
    for place, statement in statements("AWS::IAM::Role", "AssumeRolePolicyDocument"):
        if statement["Action"] == "sts:AssumeRoleWithWebIdentity":
            (operator, equal), *more = statement["Condition"].items()
            assert (operator, more) == ("StringEquals", []), place
            assert equal["${Issuer}:aud"] == "sts.amazonaws.com", place
            accounts[place] = equal["${Issuer}:sub"].removeprefix("system:serviceaccount:")
        else:
            assert statement["Principal"].keys() == {"Service"}, place
    assert accounts == {
        "eks.VpcCniRole": "kube-system:aws-node",
        "eks.EbsCsiRole": "kube-system:ebs-csi-controller-sa",
        "eks.CollectorRole": "${CollectorServiceAccount}",
        "eks.CloudWatchExporterRole": "${CloudWatchExporterServiceAccount}",
    }


def test_services_may_assume_roles_only_for_this_account() -> None:
    for place, statement in statements("AWS::IAM::Role", "AssumeRolePolicyDocument"):
        # EC2 and EKS are not documented to send aws:SourceAccount. IRSA names the service account.
        if place in ("eks.NodeRole", "eks.ClusterRole"):
            assert "Condition" not in statement, place
        elif "Service" in statement["Principal"]:
            assert "AWS::AccountId" in json.dumps(statement["Condition"]), place


def test_topic_rules_write_to_the_queue_and_errors_to_the_log() -> None:
    for name, rule in resources("iot_core", "AWS::IoT::TopicRule").items():
        payload = rule["TopicRulePayload"]
        assert payload["Actions"][0]["Sqs"]["QueueUrl"] == {"Ref": "ReplayQueue"}, name
        assert payload["ErrorAction"]["CloudwatchLogs"]["LogGroupName"] == {"Ref": "ErrorLogGroup"}
    queue = resources("iot_core", "AWS::SQS::Queue")["ReplayQueue"]
    assert queue["SqsManagedSseEnabled"] is True
    assert queue["MessageRetentionPeriod"] == 14 * 86_400


def test_collector_may_only_read_and_delete_from_the_replay_queue() -> None:
    role = resources("eks", "AWS::IAM::Role")["CollectorRole"]
    always = [p for p in role["Policies"] if "Fn::If" not in p]
    policies = {p["PolicyName"]: p["PolicyDocument"]["Statement"] for p in always}
    (statement,) = policies["replay"]
    calls = ["sqs:DeleteMessage", "sqs:GetQueueAttributes", "sqs:ReceiveMessage"]
    assert statement["Action"] == calls
    # The eks stack is created before the queue, so it refers to it by name.
    queue = resources("iot_core", "AWS::SQS::Queue")["ReplayQueue"]["QueueName"]["Fn::Sub"]
    place = "arn:${AWS::Partition}:sqs:${AWS::Region}:${AWS::AccountId}:"
    assert statement["Resource"]["Fn::Sub"] == place + queue
    # The collector calls exactly the allowed actions.
    requested = (ROOT / "collector/iot_collector/replay_queue.py").read_text()
    assert sorted(set(re.findall(r'explained\("(sqs:\w+)"', requested))) == calls


def test_collector_may_only_use_its_path_in_the_archive_bucket() -> None:
    (choice,) = [
        policy["Fn::If"]
        for policy in resources("eks", "AWS::IAM::Role")["CollectorRole"]["Policies"]
        if "Fn::If" in policy
    ]
    condition, policy, otherwise = choice
    assert (condition, otherwise) == ("WithArchive", {"Ref": "AWS::NoValue"})
    bucket, objects = policy["PolicyDocument"]["Statement"]
    assert bucket["Action"] == "s3:ListBucket"
    assert bucket["Resource"]["Fn::Sub"][0] == "arn:${AWS::Partition}:s3:::${Bucket}"
    assert objects["Resource"] == {"Fn::Sub": "arn:${AWS::Partition}:s3:::${ArchivePath}/*"}
    # The error messages of the collector name exactly the allowed actions.
    requested = (ROOT / "collector/iot_collector/archive_files.py").read_text()
    (line,) = set(re.findall(r"; allow (.+)\"", requested))
    assert set(re.findall(r"s3:\w+", line)) == {bucket["Action"], *objects["Action"]}


def test_archive_path_has_no_wildcard() -> None:
    for right in ("", "my-bucket", "my-bucket/iot/months"):
        assert accepts("eks", "ArchivePath", right), right
    for wrong in ("*", "my-bucket/*", "my-bucket/", "s3://my-bucket"):
        assert not accepts("eks", "ArchivePath", wrong), wrong


def test_account_wide_logging_is_off_by_default() -> None:
    logging = TEMPLATES["iot_core"]["Resources"]["Logging"]
    assert logging["Condition"] == "WithLogging"
    assert parameter("iot_core", "IotLogging")["Default"] == "false"


# --- network --------------------------------------------------------------------------------------


def test_database_subnets_have_no_route_to_the_internet() -> None:
    routes = resources("network", "AWS::EC2::Route")
    tables = {route["RouteTableId"]["Ref"] for route in routes.values()}
    assert tables == {"PublicRoutes", "PrivateRoutesA", "PrivateRoutesB", "PrivateRoutesC"}
    used = {
        link["SubnetId"]["Ref"]: link["RouteTableId"]["Ref"]
        for link in resources("network", "AWS::EC2::SubnetRouteTableAssociation").values()
    }
    for zone in "ABC":
        assert used[f"DatabaseSubnet{zone}"] == "DatabaseRoutes"
        assert used[f"PrivateSubnet{zone}"] == f"PrivateRoutes{zone}"
    assert used.keys() == resources("network", "AWS::EC2::Subnet").keys()


def test_ec2_15_subnets_assign_no_public_addresses() -> None:
    subnets = resources("network", "AWS::EC2::Subnet")
    assert len(subnets) == 9
    for name, subnet in subnets.items():
        assert subnet["MapPublicIpOnLaunch"] is False, name


def test_ec2_6_vpc_has_a_flow_log() -> None:
    (flow_log,) = resources("network", "AWS::EC2::FlowLog").values()
    assert flow_log["ResourceId"] == {"Ref": "Vpc"}


def test_third_zone_does_not_change_the_cidr_of_other_subnets() -> None:
    subnets = resources("network", "AWS::EC2::Subnet")
    places = [subnet["CidrBlock"]["Fn::Select"][0] for subnet in subnets.values()]
    assert sorted(places) == list(range(9))
    for name in subnets:
        condition = TEMPLATES["network"]["Resources"][name].get("Condition")
        assert condition == ("ThreeZones" if name.endswith("C") else None), name


def test_security_groups_allow_no_egress_and_no_internet() -> None:
    groups = all_resources("AWS::EC2::SecurityGroup")
    assert len(groups) == 3
    for place, group in groups.items():
        (egress,) = group["SecurityGroupEgress"]
        assert egress["CidrIp"] == "127.0.0.1/32", place
        assert "0.0.0.0/0" not in json.dumps(group), place


# --- registry -------------------------------------------------------------------------------------


def repository() -> Any:
    return resources("ecr", "AWS::ECR::Repository")["Repository"]


def test_ecr_1_images_are_scanned() -> None:
    assert repository()["ImageScanningConfiguration"] == {"ScanOnPush": True}


def test_ecr_2_tags_are_immutable() -> None:
    assert repository()["ImageTagMutability"] == "IMMUTABLE"


def test_ecr_3_old_images_expire() -> None:
    text = repository()["LifecyclePolicy"]["LifecyclePolicyText"]["Fn::Sub"]
    for name in ("KeepImages", "UntaggedDays"):
        text = text.replace(f"${{{name}}}", str(parameter("ecr", name)["Default"]))
    untagged, tagged = json.loads(text)["rules"]
    assert untagged["selection"]["countNumber"] == 7
    assert tagged["selection"]["countNumber"] == 20


def test_ecr_5_images_are_encrypted_with_a_customer_managed_key() -> None:
    encryption = repository()["EncryptionConfiguration"]
    assert encryption == {"EncryptionType": "KMS", "KmsKey": {"Fn::GetAtt": ["Key", "Arn"]}}


# --- keys and secrets -----------------------------------------------------------------------------


def test_kms_4_both_keys_rotate() -> None:
    keys = all_resources("AWS::KMS::Key")
    assert keys.keys() == {"ecr.Key", "eks.Key"}
    for place, key in keys.items():
        assert key["EnableKeyRotation"] is True, place


def test_secretsmanager_1_rds_rotates_the_master_password() -> None:
    """The other two passwords are rotated by hand. Security Hub reports them."""
    assert database()["ManageMasterUserPassword"] is True
    assert "MasterUserPassword" not in database()


def test_no_secret_is_a_parameter_or_an_output() -> None:
    for role in ROLES:
        for name in [*TEMPLATES[role]["Parameters"], *TEMPLATES[role]["Outputs"]]:
            if re.search("Password|Secret|PrivateKey", name):
                assert name.endswith("SecretArn"), (role, name)
    for place, secret in all_resources("AWS::SecretsManager::Secret").items():
        assert "SecretString" not in secret, place
        assert secret["GenerateSecretString"]["PasswordLength"] >= 32, place


# --- database -------------------------------------------------------------------------------------


def database() -> Any:
    return resources("rds", "AWS::RDS::DBInstance")["Instance"]


def test_rds_2_database_is_not_public() -> None:
    assert database()["PubliclyAccessible"] is False


def test_rds_3_storage_key_is_not_part_of_the_stack() -> None:
    assert database()["StorageEncrypted"] is True
    assert "KmsKeyId" not in database()


def test_rds_5_multi_az() -> None:
    assert resolve_default("rds", database()["MultiAZ"]) == "true"


def test_rds_6_enhanced_monitoring() -> None:
    assert resolve_default("rds", database()["MonitoringInterval"]) == 60
    assert 0 not in parameter("rds", "MonitoringSeconds")["AllowedValues"]


def test_rds_8_database_is_protected_and_nothing_depends_on_it() -> None:
    """So no resource can fail after it, and no rollback has to delete it."""
    assert resolve_default("rds", database()["DeletionProtection"]) == "true"
    for name, resource in TEMPLATES["rds"]["Resources"].items():
        assert "Instance" not in as_list(resource.get("DependsOn", [])), name
        for key, value in walk(resource):
            assert (key, value) != ("Ref", "Instance"), name
            assert not (key == "Fn::GetAtt" and value[0] == "Instance"), name


def test_rds_9_logs_are_exported_to_cloudwatch() -> None:
    assert database()["EnableCloudwatchLogsExports"] == ["postgresql", "upgrade"]


def test_rds_10_iam_authentication_is_on() -> None:
    assert resolve_default("rds", database()["EnableIAMDatabaseAuthentication"]) == "true"


def test_rds_11_backups_are_kept_7_days() -> None:
    assert resolve_default("rds", database()["BackupRetentionPeriod"]) >= 7


def test_rds_13_minor_versions_are_upgraded_automatically() -> None:
    assert database()["AutoMinorVersionUpgrade"] is True


def test_rds_17_tags_are_copied_to_snapshots() -> None:
    assert database()["CopyTagsToSnapshot"] is True


def test_rds_23_port_is_not_the_default() -> None:
    assert resolve_default("rds", database()["Port"]) != 5432


def test_rds_25_master_user_name_is_not_the_default() -> None:
    assert resolve_default("rds", database()["MasterUsername"]) not in ("postgres", "admin")


def test_database_accepts_connections_of_nodes_only() -> None:
    (rule,) = resources("rds", "AWS::EC2::SecurityGroup")["SecurityGroup"]["SecurityGroupIngress"]
    assert rule["SourceSecurityGroupId"] == {"Ref": "NodeSecurityGroupId"}
    assert rule["FromPort"] == rule["ToPort"] == database()["Port"] == {"Ref": "Port"}


def test_database_requires_tls_and_logs_no_statements() -> None:
    parameters = resources("rds", "AWS::RDS::DBParameterGroup")["ParameterGroup"]["Parameters"]
    assert parameters["rds.force_ssl"] == "1"
    assert parameters["log_statement"] == "none"


def test_deleted_database_leaves_a_snapshot() -> None:
    instance = TEMPLATES["rds"]["Resources"]["Instance"]
    assert instance["DeletionPolicy"] == instance["UpdateReplacePolicy"] == "Snapshot"


@pytest.mark.parametrize(("mode", "days"), [("standard", 7), ("advanced", 465)])
def test_database_insights_retention_fits_the_mode(mode: str, days: int) -> None:
    properties = database()
    assert properties["DatabaseInsightsMode"] == {"Ref": "InsightsMode"}
    assert properties["EnablePerformanceInsights"] is True
    condition, *values = properties["PerformanceInsightsRetentionPeriod"]["Fn::If"]
    requested = TEMPLATES["rds"]["Conditions"][condition]["Fn::Equals"][1]
    assert values[0 if mode == requested else 1] == days
    assert mode in parameter("rds", "InsightsMode")["AllowedValues"]


# --- cluster --------------------------------------------------------------------------------------


def cluster() -> Any:
    return resources("eks", "AWS::EKS::Cluster")["Cluster"]


def test_eks_1_endpoint_is_private_unless_ranges_are_given() -> None:
    network = cluster()["ResourcesVpcConfig"]
    assert network["EndpointPrivateAccess"] is True
    assert network["EndpointPublicAccess"] == {"Fn::If": ["Public", True, False]}
    assert network["PublicAccessCidrs"]["Fn::If"][0] == "Public"
    assert parameter("eks", "PublicAccessCidrs")["Default"] == ""
    assert accepts("eks", "PublicAccessCidrs", "203.0.113.7/32,198.51.100.0/24")
    assert not accepts("eks", "PublicAccessCidrs", "everybody")


def test_eks_2_version_is_a_parameter() -> None:
    # The playbook checks that AWS supports it before it creates anything.
    assert cluster()["Version"] == {"Ref": "KubernetesVersion"}


def test_eks_3_secrets_are_encrypted() -> None:
    (encryption,) = cluster()["EncryptionConfig"]
    assert encryption["Resources"] == ["secrets"]
    assert encryption["Provider"] == {"KeyArn": {"Fn::GetAtt": ["Key", "Arn"]}}


def test_eks_8_all_control_plane_logs_are_on() -> None:
    enabled = cluster()["Logging"]["ClusterLogging"]["EnabledTypes"]
    kinds = {"api", "audit", "authenticator", "controllerManager", "scheduler"}
    assert {kind["Type"] for kind in enabled} == kinds


def test_cluster_access_uses_only_access_entries() -> None:
    assert cluster()["AccessConfig"]["AuthenticationMode"] == "API"
    entries = resources("eks", "AWS::EKS::AccessEntry")
    assert len(entries) == 3
    assert accepts("eks", "AdminArn1", "arn:aws:iam::123456789012:role/team/platform")
    assert not accepts("eks", "AdminArn1", "arn:aws:sts::123456789012:assumed-role/platform/me")
    assert not accepts("eks", "AdminArn1", "arn:aws:iam::123456789012:root")


def test_administrators_keep_their_access_entries() -> None:
    """CloudFormation creates an entry before it deletes the old one, and EKS allows only one."""
    assert keep_places(["a", "b"], ["", "", ""]) == ["a", "b", ""]
    assert keep_places(["b"], ["a", "b", ""]) == ["", "b", ""]
    assert keep_places(["c", "b"], ["a", "b", ""]) == ["c", "b", ""]
    assert keep_places(["d", "c", "b"], ["a", "b", "c"]) == ["d", "b", "c"]
    assert keep_places(["a", "a"], ["", "", ""]) == ["a", "", ""]
    entries = resources("eks", "AWS::EKS::AccessEntry").values()
    used = [entry["PrincipalArn"]["Ref"] for entry in entries]
    assert used == ["AdminArn1", "AdminArn2", "AdminArn3"]
    # Any of the places can be the only one in use.
    (rule,) = TEMPLATES["eks"]["Rules"]["SomebodyAdministersTheCluster"]["Assertions"]
    assert [
        parameter for parameter in used if f'"{parameter}"' in json.dumps(rule["Assert"])
    ] == used


def test_nodes_require_imdsv2_and_encrypt_their_disks() -> None:
    data = resources("eks", "AWS::EC2::LaunchTemplate")["LaunchTemplate"]["LaunchTemplateData"]
    assert data["MetadataOptions"]["HttpTokens"] == "required"
    assert data["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
    assert all(disk["Ebs"]["Encrypted"] is True for disk in data["BlockDeviceMappings"])
    tagged = {spec["ResourceType"]: spec["Tags"] for spec in data["TagSpecifications"]}
    assert tagged.keys() == {"instance", "volume", "network-interface"}
    for tags in tagged.values():
        assert {"Key": "Project", "Value": {"Ref": "Prefix"}} in tags
    # Without the cluster security group, nodes cannot reach the control plane.
    assert data["SecurityGroupIds"] == [
        {"Fn::GetAtt": ["Cluster", "ClusterSecurityGroupId"]},
        {"Ref": "NodeSecurityGroupId"},
    ]


def test_network_add_ons_come_before_nodes_and_others_after() -> None:
    everything = TEMPLATES["eks"]["Resources"]
    assert {*everything["Nodes"]["DependsOn"]} == {"VpcCni", "KubeProxy"}
    after = {
        addon["AddonName"]
        for name, addon in resources("eks", "AWS::EKS::Addon").items()
        if everything[name].get("DependsOn") == "Nodes"
    }
    assert after == {"coredns", "metrics-server", "aws-ebs-csi-driver"}
    assert cluster()["BootstrapSelfManagedAddons"] is False


def test_configuration_of_add_ons_is_json() -> None:
    settings = {
        addon["AddonName"]: json.loads(addon["ConfigurationValues"]["Fn::Sub"])
        for addon in resources("eks", "AWS::EKS::Addon").values()
        if "ConfigurationValues" in addon
    }
    assert settings["vpc-cni"]["enableNetworkPolicy"] == "true"
    tags = json.loads(settings["vpc-cni"]["env"]["ADDITIONAL_ENI_TAGS"])
    # Teardown finds the resources that the add-ons leave behind by this tag.
    assert tags == settings["aws-ebs-csi-driver"]["controller"]["extraVolumeTags"]
    assert tags == {"Project": "${Prefix}"}
