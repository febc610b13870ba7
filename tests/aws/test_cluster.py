"""The workloads on EKS: the collector with IoT Core and RDS, Prometheus and Grafana.

A stand-in for the Kubernetes API replaces the cluster. There is no database: the SQL of the Job is
tested in tests/test_rds_roles.py.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from checkov import checkov
from deployments import Deployment

pytestmark = pytest.mark.timeout(1200)

Object = dict[str, Any]
# Failed checks of checkov that we accept; the reasons are in tests/test_kubernetes.py.
CHECKOV_SKIPS = {
    "CKV_K8S_15": {"collector", "prometheus", "grafana"},
    "CKV_K8S_38": {"prometheus"},
    "CKV_K8S_40": {"grafana"},
    "CKV_K8S_43": {"collector", "prometheus", "grafana"},
}


def objects(deployed: Deployment, kind: str | None = None) -> list[Object]:
    found: list[Object] = deployed.cluster.ask("objects")
    return [one for one in found if kind in (None, one["kind"])]


def find_object(deployed: Deployment, kind: str, name: str) -> Object:
    (found,) = (one for one in objects(deployed, kind) if one["metadata"]["name"] == name)
    return found


def secret(deployed: Deployment, name: str) -> dict[str, str]:
    data = find_object(deployed, "Secret", name)["data"]
    return {key: base64.b64decode(value).decode() for key, value in data.items()}


def outputs(deployed: Deployment, stack: str) -> dict[str, str]:
    found = deployed.account.client("cloudformation").describe_stacks(
        StackName=f"iot-system-{stack}"
    )["Stacks"][0]["Outputs"]
    return {one["OutputKey"]: one["OutputValue"] for one in found}


def password(deployed: Deployment, output: str) -> str:
    """A database password from Secrets Manager, by the stack output with its ARN."""
    secrets = deployed.account.client("secretsmanager")
    value = secrets.get_secret_value(SecretId=outputs(deployed, "rds")[output])["SecretString"]
    return str(json.loads(value)["password"])


def test_manifests_pass_validation_and_checkov(deployed: Deployment, tmp_path: Path) -> None:
    found = objects(deployed)
    assert len(found) > 25
    for version in ("1.34", "1.35", "1.36"):
        for manifest in found:
            kubernetes_validate.validate(manifest, version, strict=True)
    (tmp_path / "manifests.yml").write_text(yaml.safe_dump_all(found))
    report = checkov("kubernetes", [tmp_path / "manifests.yml"])
    failed: dict[str, set[str]] = {}
    for check in report["results"]["failed_checks"]:
        failed.setdefault(check["check_id"], set()).add(check["resource"].rpartition(".")[2])
    assert failed == CHECKOV_SKIPS
    assert report["summary"]["passed"] > 150


def test_collector_is_configured_for_iot_core_and_rds(deployed: Deployment) -> None:
    rds = outputs(deployed, "rds")
    endpoint = deployed.account.client("iot").describe_endpoint(endpointType="iot:Data-ATS")
    settings = find_object(deployed, "ConfigMap", "collector")["data"]
    assert settings["IOT_MQTT_URL"] == f"awsiot://{endpoint['endpointAddress']}"
    assert settings["IOT_MQTT_TOPICS"] == "iot/data"
    assert settings["IOT_DATABASE_URL"] == (
        f"postgresql://iot_collector@{rds['Host']}:{rds['Port']}/iot"
        "?sslmode=verify-full&sslrootcert=/etc/iot-database/ca.pem"
    )
    assert settings["IOT_DATABASE_PASSWORD_SECRET"] == rds["CollectorSecretArn"]
    assert settings["AWS_REGION"] == "eu-west-1"
    # These settings stay at their defaults for IoT Core, and no MQTT user is set.
    absent = ("IOT_MQTT_MAX_INFLIGHT", "IOT_MQTT_USERNAME", "IOT_BROKER_METRICS")
    for name in (*absent, "IOT_DATABASE_PASSWORD_FILE"):
        assert name not in settings
    workload = find_object(deployed, "StatefulSet", "collector")["spec"]
    assert workload["replicas"] == 1
    spec = workload["template"]["spec"]
    (container,) = spec["containers"]
    assert container["image"] == "registry.invalid/collector:1"
    environment = {one["name"]: one for one in container["env"]}
    # The IoT and IAM policies contain this prefix. The collector reads the ordinal at the end.
    assert environment["IOT_MQTT_CLIENT_ID"]["value"] == "iot-collector-$(POD_NAME)"
    assert environment["POD_NAME"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
    assert list(environment).index("POD_NAME") < list(environment).index("IOT_MQTT_CLIENT_ID")
    assert [one["name"] for one in spec["volumes"]] == ["database-ca"]
    for one in [*spec["containers"], *spec["initContainers"]]:
        assert [mount["mountPath"] for mount in one["volumeMounts"]] == ["/etc/iot-database"]
    bundle = find_object(deployed, "ConfigMap", "database-ca")["data"]["ca.pem"]
    assert bundle.strip() == deployed.account.rds_certificates.read_text().strip()


def test_only_the_collector_may_assume_its_iam_role(deployed: Deployment) -> None:
    account = find_object(deployed, "ServiceAccount", "collector")
    role = outputs(deployed, "eks")["CollectorRoleArn"]
    assert account["metadata"]["annotations"] == {"eks.amazonaws.com/role-arn": role}
    assert account["automountServiceAccountToken"] is False
    for workload in objects(deployed, "StatefulSet"):
        name, spec = workload["metadata"]["name"], workload["spec"]["template"]["spec"]
        assert (spec.get("serviceAccountName") == "collector") == (name == "collector")
        assert spec["automountServiceAccountToken"] is (name == "prometheus")
    # The trust policy of the role names the same service account.
    name = role.rpartition("/")[2]
    trust = deployed.account.client("iam").get_role(RoleName=name)["Role"]
    assert "system:serviceaccount:iot-system:collector" in json.dumps(
        trust["AssumeRolePolicyDocument"]
    )


def test_network_policies_limit_egress(deployed: Deployment) -> None:
    port = int(outputs(deployed, "rds")["Port"])
    subnets = outputs(deployed, "network")["DatabaseSubnetIds"].split(",")
    found = deployed.account.client("ec2").describe_subnets(SubnetIds=subnets)["Subnets"]
    database = [{"ipBlock": {"cidr": one["CidrBlock"]}} for one in found]
    egress = {
        policy["metadata"]["name"]: {
            rule["ports"][0]["port"]: rule.get("to") for rule in policy["spec"].get("egress", [])
        }
        for policy in objects(deployed, "NetworkPolicy")
    }

    def ranges(to: list[Object]) -> list[str]:
        return sorted(one["ipBlock"]["cidr"] for one in to)

    assert ranges(egress["collector"][port]) == ranges(database)
    assert ranges(egress["grafana"][port]) == ranges(database)
    assert egress["collector"].keys() == {443, port}
    assert egress["collector"][443] is None  # the addresses of AWS services change
    assert egress["default-deny"] == {}
    assert {one["spec"].get("type", "ClusterIP") for one in objects(deployed, "Service")} == {
        "ClusterIP"
    }


def test_volumes_use_encrypted_gp3(deployed: Deployment) -> None:
    storage = find_object(deployed, "StorageClass", "gp3")
    assert storage["provisioner"] == "ebs.csi.aws.com"
    assert storage["parameters"] == {"type": "gp3", "encrypted": "true"}
    assert storage["volumeBindingMode"] == "WaitForFirstConsumer"
    claims = [
        one["spec"]["storageClassName"]
        for workload in objects(deployed, "StatefulSet")
        for one in workload["spec"].get("volumeClaimTemplates", [])
    ]
    assert claims == ["gp3", "gp3"]


def test_grafana_connects_to_rds_as_the_reader(deployed: Deployment) -> None:
    rds = outputs(deployed, "rds")
    sources = yaml.safe_load(
        find_object(deployed, "ConfigMap", "grafana")["data"]["datasources.yml"]
    )
    (source,) = (one for one in sources["datasources"] if one["type"] == "postgres")
    assert source["url"] == f"{rds['Host']}:{rds['Port']}"
    assert source["user"] == "iot_reader"
    wanted = {
        "sslmode": "verify-full",
        "tlsConfigurationMethod": "file-path",
        "sslRootCertFile": "/etc/iot-database/ca.pem",
    }
    assert wanted.items() <= source["jsonData"].items()
    spec = find_object(deployed, "StatefulSet", "grafana")["spec"]["template"]["spec"]
    mounts = {one["name"]: one["mountPath"] for one in spec["containers"][0]["volumeMounts"]}
    assert mounts["database-ca"] == "/etc/iot-database"
    assert secret(deployed, "iot-passwords")["reader_db_password"] == password(
        deployed, "ReaderSecretArn"
    )


def test_passwords_are_only_where_they_are_needed(deployed: Deployment) -> None:
    passwords = {
        name: password(deployed, f"{name}SecretArn") for name in ("Master", "Collector", "Reader")
    }
    assert all(passwords.values())
    for name, word in passwords.items():
        assert word not in deployed.first_run.output, name
    names = {one["metadata"]["name"] for one in objects(deployed, "Secret")}
    assert names == {
        "iot-passwords",
        "postgres-roles-made",
    }  # the Secret of the master password is deleted
    held = json.dumps(secret(deployed, "iot-passwords") | secret(deployed, "postgres-roles-made"))
    assert passwords["Master"] not in held
    assert passwords["Collector"] not in held
    text = json.dumps([one for one in objects(deployed) if one["kind"] != "Secret"])
    assert not [name for name, word in passwords.items() if word in text]
    assert objects(deployed, "Job") == []


def test_summary_shows_how_to_reach_the_services(deployed: Deployment) -> None:
    text = " ".join(deployed.first_run.output.split())
    assert "collector 1/1, grafana 1/1, prometheus 1/1" in text
    kubeconfig = deployed.home / ".kube/iot-system-eu-west-1"
    for service in ("backend-service 3000", "grafana-service 3001:3000", "prometheus-service 9090"):
        assert f"port-forward service/{service}" in text
    assert f"--kubeconfig={kubeconfig}" in text
    assert "playbooks/verify.yml -e target=aws -e region=eu-west-1" in text


def test_next_run_applies_changed_passwords(deployed: Deployment) -> None:
    """It starts a new Job. Without changes it starts none (test_deployment.py)."""
    tags = ("--tags", "postgres_configure,postgres_run")
    secrets = deployed.account.client("secretsmanager")
    # As long as generated passwords, because other tests check their length.
    words = {"Collector": "another-word" * 3, "Reader": "yet-another-word" * 2}
    for name, word in words.items():
        value = {"username": f"iot_{name.lower()}", "password": word}
        arn = outputs(deployed, "rds")[f"{name}SecretArn"]
        secrets.put_secret_value(SecretId=arn, SecretString=json.dumps(value))
    before = secret(deployed, "postgres-roles-made")
    check = deployed.deploy("--check", *tags)
    # The Secret with the reader's password, and the Job that creates the roles.
    assert (check.returncode, check.changed) == (0, 2), check.output

    deployed.cluster.ask("never-ready", {"postgres-roles": "Error"})
    try:
        failed = deployed.deploy(*tags)
    finally:
        deployed.cluster.ask("never-ready", {})
    assert failed.returncode == 2, failed.output
    assert secret(deployed, "postgres-roles-made") == before
    names = {one["metadata"]["name"] for one in objects(deployed)}
    assert "postgres-roles" not in names  # neither Job nor Secret

    run = deployed.deploy(*tags)
    assert run.returncode == 0, run.output
    assert secret(deployed, "postgres-roles-made") != before
    assert secret(deployed, "iot-passwords")["reader_db_password"] == words["Reader"]
    for word in words.values():
        assert word not in check.output + failed.output + run.output
    # Grafana has to restart to read its password.
    assert deployed.deploy("--tags", "grafana_configure,grafana_run").changed == 1


def test_message_rate_sets_the_number_of_collectors(deployed: Deployment) -> None:
    rate = ("-e", "iot_core_messages_per_second=250")
    run = deployed.deploy("--check", "-v", *rate, "--tags", "collector_run")
    assert run.returncode == 0, run.output
    assert re.search(r"^ +replicas: 4$", run.output, re.MULTILINE)
    assert "IOT_MQTT_TOPICS: $share/collectors/iot/data\n" in run.output
    # The IAM policy also allows the shared filter.
    name = outputs(deployed, "eks")["CollectorRoleArn"].rpartition("/")[2]
    policy = deployed.account.client("iam").get_role_policy(
        RoleName=name, PolicyName="read-from-iot-core"
    )
    assert "topicfilter/$share/collectors/iot/data" in json.dumps(policy["PolicyDocument"])
