"""The created resources against the controls of CIS EKS and AWS Foundational Security.

Each test is named after its control. It queries the service, not the template.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from deployments import Deployment

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def cluster(deployed: Deployment) -> dict[str, Any]:
    answer = deployed.account.client("eks").describe_cluster(name="iot-system")
    found: dict[str, Any] = answer["cluster"]
    return found


@pytest.fixture
def database(deployed: Deployment) -> dict[str, Any]:
    rds = deployed.account.client("rds")
    (found,) = rds.describe_db_instances(DBInstanceIdentifier="iot-system")["DBInstances"]
    return dict(found)


@pytest.fixture
def repository(deployed: Deployment) -> dict[str, Any]:
    (found,) = deployed.account.client("ecr").describe_repositories()["repositories"]
    return dict(found)


def output(deployed: Deployment, stack: str, name: str) -> str:
    cloudformation = deployed.account.client("cloudformation")
    (found,) = cloudformation.describe_stacks(StackName=f"iot-system-{stack}")["Stacks"]
    outputs = {one["OutputKey"]: one["OutputValue"] for one in found["Outputs"]}
    return str(outputs[name])


def rules_of(deployed: Deployment, group_id: str) -> list[dict[str, Any]]:
    ec2 = deployed.account.client("ec2")
    (group,) = ec2.describe_security_groups(GroupIds=[group_id])["SecurityGroups"]
    return list(group["IpPermissions"])


# --- EKS


def test_eks_1_endpoint_is_not_public(cluster: dict[str, Any]) -> None:
    assert cluster["resourcesVpcConfig"]["endpointPublicAccess"] is False
    assert cluster["resourcesVpcConfig"]["endpointPrivateAccess"] is True


def test_eks_2_version_is_supported(deployed: Deployment, cluster: dict[str, Any]) -> None:
    offered = deployed.account.client("eks").describe_cluster_versions()["clusterVersions"]
    supported = [o["clusterVersion"] for o in offered if o["versionStatus"] == "STANDARD_SUPPORT"]
    assert cluster["version"] in supported


def test_eks_3_secrets_are_encrypted(cluster: dict[str, Any]) -> None:
    (configuration,) = cluster["encryptionConfig"]
    assert configuration["resources"] == ["secrets"]
    assert ":key/" in configuration["provider"]["keyArn"]


def test_eks_8_control_plane_logs_are_on(deployed: Deployment, cluster: dict[str, Any]) -> None:
    (logged,) = [one for one in cluster["logging"]["clusterLogging"] if one["enabled"]]
    wanted = {"api", "audit", "authenticator", "controllerManager", "scheduler"}
    assert set(logged["types"]) == wanted
    logs = deployed.account.client("logs")
    name = "/aws/eks/iot-system/cluster"
    (group,) = logs.describe_log_groups(logGroupNamePrefix=name)["logGroups"]
    assert group["retentionInDays"] == 30


def test_nodes_require_imdsv2_and_encrypt_their_disks(deployed: Deployment) -> None:
    ec2 = deployed.account.client("ec2")
    (template,) = ec2.describe_launch_templates()["LaunchTemplates"]
    versions = ec2.describe_launch_template_versions(LaunchTemplateId=template["LaunchTemplateId"])
    data = versions["LaunchTemplateVersions"][0]["LaunchTemplateData"]
    assert data["MetadataOptions"]["HttpTokens"] == "required"
    assert data["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
    assert all(device["Ebs"]["Encrypted"] for device in data["BlockDeviceMappings"])


def test_irsa_role_trusts_one_service_account(deployed: Deployment) -> None:
    iam = deployed.account.client("iam")
    role = output(deployed, "eks", "CollectorRoleArn").split("/")[-1]
    document = iam.get_role(RoleName=role)["Role"]["AssumeRolePolicyDocument"]
    document = json.loads(document) if isinstance(document, str) else document
    (statement,) = document["Statement"]
    (condition,) = statement["Condition"].values()
    assert statement["Action"] == "sts:AssumeRoleWithWebIdentity"
    subjects = [value for key, value in condition.items() if key.endswith(":sub")]
    assert subjects in (
        ["system:serviceaccount:iot-system:collector"],
        [["system:serviceaccount:iot-system:collector"]],
    )


# --- RDS


def test_rds_2_is_not_public(database: dict[str, Any]) -> None:
    assert database["PubliclyAccessible"] is False


def test_rds_3_is_encrypted(database: dict[str, Any]) -> None:
    assert database["StorageEncrypted"] is True


def test_rds_5_is_multi_az(database: dict[str, Any]) -> None:
    assert database["MultiAZ"] is True


def test_rds_6_has_enhanced_monitoring(database: dict[str, Any]) -> None:
    assert database["MonitoringInterval"] == 60


def test_rds_8_is_protected_from_deletion(database: dict[str, Any]) -> None:
    assert database["DeletionProtection"] is True


def test_rds_9_exports_its_logs(database: dict[str, Any]) -> None:
    assert set(database["EnabledCloudwatchLogsExports"]) == {"postgresql", "upgrade"}


def test_rds_11_has_backups(database: dict[str, Any]) -> None:
    assert database["BackupRetentionPeriod"] >= 7


def test_rds_13_upgrades_minor_versions(database: dict[str, Any]) -> None:
    assert database["AutoMinorVersionUpgrade"] is True


def test_rds_17_copies_its_tags_to_snapshots(database: dict[str, Any]) -> None:
    assert database["CopyTagsToSnapshot"] is True


def test_rds_23_port_is_not_the_default(database: dict[str, Any]) -> None:
    assert database["Endpoint"]["Port"] == 5433


def test_rds_accepts_connections_of_nodes_only(deployed: Deployment) -> None:
    (rule,) = rules_of(deployed, output(deployed, "rds", "SecurityGroupId"))
    nodes = output(deployed, "network", "NodeSecurityGroupId")
    assert (rule["FromPort"], rule["ToPort"]) == (5433, 5433)
    assert [pair["GroupId"] for pair in rule["UserIdGroupPairs"]] == [nodes]
    assert not rule.get("IpRanges")


def test_rds_requires_tls(deployed: Deployment) -> None:
    rds = deployed.account.client("rds")
    group = output(deployed, "rds", "ParameterGroupName")
    pages = rds.get_paginator("describe_db_parameters").paginate(DBParameterGroupName=group)
    parameters = {
        one["ParameterName"]: one.get("ParameterValue")
        for page in pages
        for one in page["Parameters"]
    }
    assert parameters["rds.force_ssl"] == "1"


# --- ECR


def test_ecr_1_scans_on_push(repository: dict[str, Any]) -> None:
    assert repository["imageScanningConfiguration"]["scanOnPush"] is True


def test_ecr_2_tags_are_immutable(repository: dict[str, Any]) -> None:
    assert repository["imageTagMutability"] == "IMMUTABLE"


def test_ecr_3_old_images_expire(deployed: Deployment, repository: dict[str, Any]) -> None:
    ecr = deployed.account.client("ecr")
    policy = ecr.get_lifecycle_policy(repositoryName=repository["repositoryName"])
    assert json.loads(policy["lifecyclePolicyText"])["rules"]


def test_ecr_5_uses_a_customer_managed_key(repository: dict[str, Any]) -> None:
    assert repository["encryptionConfiguration"]["encryptionType"] == "KMS"
    assert ":key/" in repository["encryptionConfiguration"]["kmsKey"]


# --- Secrets Manager, IoT, network


def test_secrets_are_tagged_and_generated(deployed: Deployment) -> None:
    secrets = deployed.account.client("secretsmanager")
    for name in ("CollectorSecretArn", "ReaderSecretArn"):
        arn = output(deployed, "rds", name)
        tags = {tag["Key"]: tag["Value"] for tag in secrets.describe_secret(SecretId=arn)["Tags"]}
        assert tags["Project"] == "iot-system"
        value = json.loads(secrets.get_secret_value(SecretId=arn)["SecretString"])
        assert len(value["password"]) >= 24
        assert value["password"] not in deployed.first_run.output
    assert "master" in output(deployed, "rds", "MasterSecretArn").lower() or output(
        deployed, "rds", "MasterSecretArn"
    )


@pytest.mark.parametrize("name", ["DevicePolicyName", "CollectorPolicyName"])
def test_iot_policies_have_no_wildcard(deployed: Deployment, name: str) -> None:
    iot = deployed.account.client("iot")
    policy = iot.get_policy(policyName=output(deployed, "iot-core", name))
    for statement in json.loads(policy["policyDocument"])["Statement"]:
        for key in ("Action", "Resource"):
            values = statement[key] if isinstance(statement[key], list) else [statement[key]]
            assert not [
                v
                for v in values
                if v in ("*", "iot:*") or v.endswith((":topic/*", ":topicfilter/*"))
            ]


def test_collector_may_not_publish(deployed: Deployment) -> None:
    iot = deployed.account.client("iot")
    policy = iot.get_policy(policyName=output(deployed, "iot-core", "CollectorPolicyName"))
    assert "iot:Publish" not in policy["policyDocument"]
    assert "topicfilter/$share/collectors/iot/data" in policy["policyDocument"]


def test_ec2_2_default_security_group_has_no_rules(deployed: Deployment) -> None:
    ec2 = deployed.account.client("ec2")
    group_id = output(deployed, "network", "DefaultSecurityGroupId")
    (group,) = ec2.describe_security_groups(GroupIds=[group_id])["SecurityGroups"]
    assert group["IpPermissions"] == []
    assert group["IpPermissionsEgress"] == []


def test_ec2_6_vpc_has_a_flow_log(deployed: Deployment) -> None:
    (flow_log,) = deployed.account.client("ec2").describe_flow_logs()["FlowLogs"]
    assert flow_log["ResourceId"] == output(deployed, "network", "VpcId")


def test_vpc_and_subnets_are_tagged(deployed: Deployment) -> None:
    ec2 = deployed.account.client("ec2")
    tag = [{"Name": "tag:Project", "Values": ["iot-system"]}]
    for operation, key in (("describe_vpcs", "Vpcs"), ("describe_subnets", "Subnets")):
        assert getattr(ec2, operation)(Filters=tag)[key]
