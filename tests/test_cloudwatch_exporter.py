"""The role cloudwatch_exporter, with Prometheus and Grafana, against a stand-in for a cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ansible_runs import ROOT, playbook
from checkov import checkov
from cluster import NAMESPACE, Cluster, Object, pod_spec
from test_kubernetes import CHECKOV_SKIPS, VERSIONS, not_ready

from testing.kubernetes_api.process import running

NAME = "cloudwatch-exporter"
ROLE = "arn:aws:iam::111122223333:role/iot-system-eks-CloudWatchExporterRole-1"
ON: dict[str, object] = {"cloudwatch_exporter_enabled": True, "cloudwatch_exporter_role_arn": ROLE}


@pytest.fixture(scope="module")
def plays(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two playbooks: the exporter alone, and the exporter with Prometheus and Grafana."""
    folder = tmp_path_factory.mktemp("plays")
    roles = {"alone": [""], "all": ["", "prometheus", "grafana"]}
    for name, others in roles.items():
        content = {
            "hosts": "local",
            "gather_subset": ["!all", "min"],
            "module_defaults": {
                "group/kubernetes.core.k8s": {"kubeconfig": "{{ iot_kubeconfig }}"}
            },
            "roles": [
                {"role": f"iot.platform.{other or 'cloudwatch_exporter'}"} for other in others
            ],
        }
        (folder / name).write_text(yaml.safe_dump([content]))
    return {name: folder / name for name in roles}


def run(
    play: Path, cluster: Cluster, *arguments: str, **variables: object
) -> CompletedProcess[str]:
    given = {
        "kubeconfig": str(cluster.stand_in.kubeconfig),
        "minikube_enabled": False,
        "region": "us-east-1",
        **variables,
    }
    return playbook(str(play), "-e", json.dumps(given), *arguments)


@pytest.fixture(scope="module")
def cluster(plays: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with the exporter. Tests that change it set it back."""
    with running(tmp_path_factory.mktemp("cluster") / "kubeconfig") as stand_in:
        cluster = Cluster(stand_in)
        done = run(plays["all"], cluster, **ON)
        assert done.returncode == 0, done.stdout
        yield cluster


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Cluster]:
    with running(tmp_path / "kubeconfig") as stand_in:
        yield Cluster(stand_in)


def exporter_objects(cluster: Cluster) -> list[Object]:
    return [
        o
        for o in cluster.objects()
        if o["metadata"].get("labels", {}).get("app.kubernetes.io/name") == NAME
    ]


def test_manifests_are_valid(cluster: Cluster) -> None:
    objects = exporter_objects(cluster)
    assert {o["kind"] for o in objects} == {
        *("ConfigMap", "ServiceAccount", "StatefulSet", "Service"),
        *("PodDisruptionBudget", "NetworkPolicy"),
    }
    for manifest in cluster.objects():
        for version in VERSIONS:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_checkov_has_only_accepted_findings(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "manifests.yml").write_text(yaml.safe_dump_all(exporter_objects(cluster)))
    report = checkov("kubernetes", [tmp_path / "manifests.yml"])
    failed = {check["check_id"] for check in report["results"]["failed_checks"]}
    # As for the other components, images are pinned by version and pulled only if missing.
    assert failed == {"CKV_K8S_15", "CKV_K8S_43"}
    assert failed <= CHECKOV_SKIPS.keys()
    assert report["summary"]["passed"] > 50


def test_pod_has_the_iam_role_and_no_kubernetes_token(cluster: Cluster) -> None:
    account = cluster.object("ServiceAccount", NAME)
    assert account["metadata"]["annotations"] == {"eks.amazonaws.com/role-arn": ROLE}
    assert account["automountServiceAccountToken"] is False
    spec = pod_spec(cluster.object("StatefulSet", NAME))
    assert spec["serviceAccountName"] == NAME
    assert spec["automountServiceAccountToken"] is False
    (container,) = spec["containers"]
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert environment == {"AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] == "/healthz"


def test_only_the_region_of_the_run_is_queried(cluster: Cluster) -> None:
    config = yaml.safe_load(cluster.object("ConfigMap", NAME)["data"]["config.yml"])
    assert config["sts-region"] == "us-east-1"
    assert {region for job in config["static"] for region in job["regions"]} == {"us-east-1"}
    assert config.keys() == {"apiVersion", "sts-region", "static"}, "discovery is off"


def test_network_policy_allows_https_and_prometheus(cluster: Cluster) -> None:
    policy = cluster.object("NetworkPolicy", NAME)["spec"]
    assert policy["egress"] == [{"ports": [{"protocol": "TCP", "port": 443}]}]
    prometheus = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}}
    assert policy["ingress"] == [
        {"ports": [{"protocol": "TCP", "port": 5000}], "from": [prometheus]}
    ]
    exporter = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": NAME}}}
    allowed = {"ports": [{"protocol": "TCP", "port": 5000}], "to": [exporter]}
    assert allowed in cluster.object("NetworkPolicy", "prometheus")["spec"]["egress"]


def jobs(cluster: Cluster) -> dict[str, Any]:
    config = yaml.safe_load(cluster.object("ConfigMap", "prometheus")["data"]["prometheus.yml"])
    return {job["job_name"]: job for job in config["scrape_configs"]}


def dashboards(cluster: Cluster) -> list[str]:
    names = [o["metadata"]["name"] for o in cluster.objects("ConfigMap")]
    return sorted(name for name in names if name.startswith("grafana-dashboard-"))


def test_prometheus_scrapes_the_exporter_and_grafana_has_its_dashboard(cluster: Cluster) -> None:
    (service,) = (o for o in exporter_objects(cluster) if o["kind"] == "Service")
    address = f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert jobs(cluster)["cloudwatch"]["static_configs"] == [{"targets": [address]}]
    assert "grafana-dashboard-aws" in dashboards(cluster)
    data = cluster.object("ConfigMap", "grafana-dashboard-aws")["data"]
    file = ROOT / "roles/grafana/files/dashboards_aws/aws.json"
    assert json.loads(data["aws.json"]) == json.loads(file.read_text())


def test_second_run_changes_nothing_and_another_role_restarts_it(
    plays: dict[str, Path], cluster: Cluster
) -> None:
    done = run(plays["all"], cluster, **ON)
    assert "changed=0" in done.stdout, done.stdout
    before = cluster.revisions()
    done = run(plays["alone"], cluster, **{**ON, "cloudwatch_exporter_role_arn": f"{ROLE}2"})
    assert done.returncode == 0, done.stdout
    after = cluster.revisions()
    assert {name for name in before if before[name] != after[name]} == {NAME}
    assert run(plays["alone"], cluster, **ON).returncode == 0
    assert cluster.revisions() == before


@pytest.mark.timeout(400)
def test_exporter_is_off_by_default_and_can_be_removed(
    plays: dict[str, Path], empty: Cluster
) -> None:
    done = run(plays["all"], empty)
    assert done.returncode == 0, done.stdout
    off = empty.objects()
    assert exporter_objects(empty) == []
    assert set(jobs(empty)) == {"collector", "prometheus"}
    assert "grafana-dashboard-aws" not in dashboards(empty)
    assert "5000" not in json.dumps(empty.object("NetworkPolicy", "prometheus"))

    done = run(plays["alone"], empty, "--check", **{**ON, "cloudwatch_exporter_role_arn": ""})
    assert done.returncode == 0, done.stdout
    assert "changed=1" in done.stdout
    assert empty.objects() == off
    assert run(plays["alone"], empty, **ON).returncode == 0
    assert exporter_objects(empty)
    assert run(plays["alone"], empty).returncode == 0
    assert empty.objects() == off
    assert "changed=0" in run(plays["alone"], empty).stdout


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"cloudwatch_exporter_role_arn": ""}, 'cloudwatch_exporter_role_arn is "". Set it to'),
        ({"iot_platform": "host"}, "the exporter runs only on Kubernetes. Set"),
    ],
)
def test_wrong_setting_stops_the_run(
    plays: dict[str, Path], empty: Cluster, variables: dict[str, object], said: str
) -> None:
    done = run(plays["alone"], empty, **{**ON, **variables})
    assert done.returncode != 0
    assert said in " ".join(done.stdout.split())
    assert exporter_objects(empty) == []


def test_missing_image_names_its_variable() -> None:
    waiting = {"reason": "ImagePullBackOff", "message": "no such image"}
    container = {"name": NAME, "ready": False, "state": {"waiting": waiting}}
    pod = {
        "kind": "Pod",
        "metadata": {"name": f"{NAME}-0", "uid": "1"},
        "status": {"containerStatuses": [container]},
    }
    message = not_ready(NAME, "Timed out.", NAMESPACE, [pod])
    assert "Next: set cloudwatch_exporter_image to" in message


def test_exporter_is_in_the_namespace_of_the_system(cluster: Cluster) -> None:
    """So teardown deletes it too."""
    assert {o["metadata"]["namespace"] for o in exporter_objects(cluster)} == {NAMESPACE}
