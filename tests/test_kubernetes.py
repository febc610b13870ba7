"""playbooks/local.yml against the stand-in for a cluster: what it makes, and what it says.

`testing/kubernetes_api` says what the stand-in is and is not. molecule/kubernetes runs the playbook
as a whole, twice and in check mode.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ansible_runs import ROOT
from checkov import checkov
from cluster import NAMESPACE, Cluster, Object, pod_spec

from testing.kubernetes_api.process import running

COMPONENTS = {"mosquitto", "postgres", "collector", "prometheus", "grafana", "alertmanager"}
RECEIVER = {"alertmanager_webhook_url": "https://chat.example/hooks/1"}
VERSIONS = ("1.33", "1.34", "1.35", "1.36", "1.37")
# What checkov asks for and we do not do: of which components, and why.
CHECKOV_SKIPS = {
    # Tags do not move, and an image that was built into the cluster can be pulled from nowhere.
    "CKV_K8S_15": COMPONENTS | {"archive"},
    # It asks the API for the collector's pods, with a Role for that alone.
    "CKV_K8S_38": {"prometheus"},
    # The users that the official images come with.
    "CKV_K8S_40": {"mosquitto", "postgres", "grafana"},
    # Pinned by version; each image's variable takes a digest as well.
    "CKV_K8S_43": COMPONENTS | {"archive"},
}


def load_filter(name: str) -> Any:
    path = ROOT / "plugins/filter" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


not_ready = load_filter("not_ready")
volume_errors = load_filter("volume_errors")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with the whole system in it, with Alertmanager; the tests leave it so."""
    with running(tmp_path_factory.mktemp("cluster") / "kubeconfig") as stand_in:
        cluster = Cluster(stand_in)
        # The next run completes one that did not.
        stand_in.ask("never-ready", {"postgres/init": "CrashLoopBackOff"})
        interrupted = cluster.run("local", iot_ready_seconds=3, **RECEIVER)
        assert interrupted.returncode != 0
        for text in ("postgres is not ready", "init: CrashLoopBackOff", "It continues from here"):
            assert text in interrupted.stdout
        sets = {w["metadata"]["name"] for w in cluster.objects("StatefulSet")}
        assert sets == {"mosquitto", "postgres"}  # nothing that comes after it
        stand_in.ask("never-ready", {})
        done = cluster.run("local", **RECEIVER)
        assert done.returncode == 0, done.stdout
        assert "kubectl --kubeconfig=" in done.stdout
        yield cluster


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster without anything of ours."""
    with running(tmp_path / "kubeconfig") as stand_in:
        yield Cluster(stand_in)


# --- the manifests --------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_are_what_kubernetes_expects(cluster: Cluster, version: str) -> None:
    objects = cluster.objects()
    assert len(objects) > 30
    for manifest in objects:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_checkov_finds_what_has_a_reason(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "manifests.yml").write_text(yaml.safe_dump_all(cluster.objects()))
    report = checkov("kubernetes", [tmp_path / "manifests.yml"])
    failed: dict[str, set[str]] = {}
    for check in report["results"]["failed_checks"]:
        failed.setdefault(check["check_id"], set()).add(check["resource"].rpartition(".")[2])
    assert failed == CHECKOV_SKIPS
    assert report["summary"]["passed"] > 300


def test_names_and_ports_are_the_contract(cluster: Cluster) -> None:
    ports = {
        s["metadata"]["name"]: [p["port"] for p in s["spec"]["ports"]]
        for s in cluster.objects("Service")
    }
    del ports["collector"]  # headless: names for the pods
    assert ports == {
        "alertmanager-service": [9093],
        "backend-service": [3000],
        "grafana-service": [3000],
        "prometheus-service": [9090],
        "mqtt-service": [1883],
        "postgres-service": [5432],
    }
    assert {w["metadata"]["name"] for w in cluster.objects("StatefulSet")} == COMPONENTS


def test_every_workload_is_robust_and_confined(cluster: Cluster) -> None:
    namespace = cluster.object("Namespace", NAMESPACE)
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for workload in cluster.objects("StatefulSet"):
        name, spec = workload["metadata"]["name"], pod_spec(workload)
        token = name == "prometheus"  # it asks the API for the collector's pods
        assert spec["automountServiceAccountToken"] is token, name
        assert spec["topologySpreadConstraints"], name
        assert workload["spec"]["podManagementPolicy"] == "Parallel", name
        assert ("volumeClaimTemplates" in workload["spec"]) is (name != "collector"), name
        for container in spec["containers"]:
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                assert probe in container, (name, probe)
        for container in spec["containers"] + spec.get("initContainers", []):
            assert container["securityContext"]["readOnlyRootFilesystem"], name
            assert container["resources"].keys() == {"requests", "limits"}, name
        for kind in ("PodDisruptionBudget", "NetworkPolicy"):
            selector = cluster.object(kind, name)["spec"]
            selector = selector.get("selector") or selector["podSelector"]
            labels = workload["spec"]["template"]["metadata"]["labels"]
            assert selector["matchLabels"].items() <= labels.items(), (name, kind)
    assert cluster.object("NetworkPolicy", "default-deny")["spec"] == {
        "podSelector": {},
        "policyTypes": ["Ingress", "Egress"],
    }


def test_the_archive_job_is_confined_and_reaches_the_database(cluster: Cluster) -> None:
    job = cluster.object("CronJob", "archive")["spec"]
    assert job["concurrencyPolicy"] == "Forbid"
    template = job["jobTemplate"]["spec"]["template"]
    [container] = template["spec"]["containers"]
    assert container["args"] == ["archive"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    collector = pod_spec(cluster.object("StatefulSet", "collector"))["containers"][0]
    assert container["image"] == collector["image"]
    assert template["spec"]["automountServiceAccountToken"] is False
    settings = cluster.object("ConfigMap", "collector")["data"]
    assert settings["IOT_ARCHIVE_KEEP_MONTHS"] == "12"
    assert {"name": "archive", "mountPath": settings["IOT_ARCHIVE_TARGET"]} in container[
        "volumeMounts"
    ]
    assert cluster.object("PersistentVolumeClaim", "archive")
    [rule] = cluster.object("NetworkPolicy", "archive")["spec"]["egress"]
    assert rule["ports"][0]["port"] == 5432
    [rule] = cluster.object("NetworkPolicy", "postgres")["spec"]["ingress"]
    peers = [peer["podSelector"]["matchLabels"] for peer in rule["from"]]
    assert {"app.kubernetes.io/name": "archive"} in peers


def test_passwords_are_files_and_nothing_else(cluster: Cluster) -> None:
    data = cluster.object("Secret", "iot-passwords")["data"]
    passwords = [base64.b64decode(value).decode() for value in data.values()]
    assert len(passwords) == 7
    assert all(re.fullmatch("[A-Za-z0-9]{40}", password) for password in passwords)
    for manifest in cluster.objects():
        if manifest["kind"] != "Secret":
            text = json.dumps(manifest)
            assert not [
                name for name, password in zip(data, passwords, strict=True) if password in text
            ]
    for workload in cluster.objects("StatefulSet"):
        for container in pod_spec(workload)["containers"]:
            assert "secretKeyRef" not in json.dumps(container)
    # Each pod has the files that it needs and no others.
    items = {
        w["metadata"]["name"]: {
            i["path"] for v in pod_spec(w)["volumes"] for i in v.get("secret", {}).get("items", [])
        }
        for w in cluster.objects("StatefulSet")
    }
    assert items["collector"] == {"collector_mqtt_password", "collector_db_password"}
    assert items["grafana"] == {
        "grafana_admin_password",
        "grafana_secret_key",
        "reader_db_password",
    }
    assert items["prometheus"] == set()


def test_rules_and_dashboards_are_the_files_of_the_repository(cluster: Cluster) -> None:
    data = {}
    for config in cluster.objects("ConfigMap"):
        data.update(config["data"])
    files = [
        *ROOT.glob("roles/prometheus/files/rules/*.yml"),
        *ROOT.glob("roles/grafana/files/dashboards/*.json"),
    ]
    assert len(files) >= 2
    for file in files:
        assert data[file.name].strip() == file.read_text().strip()


def test_each_collector_has_its_session_and_prometheus_sees_it(cluster: Cluster) -> None:
    environment = cluster.object("ConfigMap", "collector")["data"]
    assert environment["IOT_MQTT_TOPICS"] == "iot/data"  # one pod: nobody to share with
    (container,) = pod_spec(cluster.object("StatefulSet", "collector"))["containers"]
    own = {e["name"]: e for e in container["env"]}
    assert own["IOT_MQTT_CLIENT_ID"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
    assert own["IOT_SESSION_ON_STOP"]["value"] == "ordinal"
    config = yaml.safe_load(cluster.object("ConfigMap", "prometheus")["data"]["prometheus.yml"])
    (job,) = (j for j in config["scrape_configs"] if j["job_name"] == "collector")
    assert job["kubernetes_sd_configs"][0]["role"] == "pod"
    assert config["global"]["scrape_interval"] == "15s"
    assert cluster.object("Role", "prometheus")["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    ]


# --- changes --------------------------------------------------------------------------------------


@pytest.mark.timeout(400)
def test_a_change_restarts_what_reads_it_and_nothing_else(cluster: Cluster) -> None:
    before, secret = cluster.revisions(), cluster.object("Secret", "iot-passwords")
    changes: dict[str, object] = {
        "collector_log_level": "debug",
        "collector_max_replicas": 3,
        "collector_live_page": "full",
        "collector_archive_target": "",
        "mosquitto_max_queued_messages": 2000,
    }
    # As after a restore with an autoscaler: no pods, and no number of pods in the manifest.
    sets = cluster.client.resources.get(kind="StatefulSet")
    applied = cluster.object("StatefulSet", "collector")
    del applied["spec"]["replicas"]
    note = {"kubectl.kubernetes.io/last-applied-configuration": json.dumps(applied)}
    stopped = {"metadata": {"name": "collector", "annotations": note}, "spec": {"replicas": 0}}
    sets.patch(body=stopped, namespace=NAMESPACE, content_type="application/merge-patch+json")
    done = cluster.run("local", **changes)  # without a receiver
    assert done.returncode == 0, done.stdout
    assert sets.get(name="collector", namespace=NAMESPACE).spec.replicas == 1
    archive = {o["kind"] for o in cluster.objects() if o["metadata"]["name"] == "archive"}
    assert archive == {"PersistentVolumeClaim"}  # with the months that were archived
    after = cluster.revisions()
    assert before.keys() - after.keys() == {"alertmanager"}
    changed = {name for name in after if before[name] != after[name]}
    assert changed == {"collector", "mosquitto", "prometheus"}
    assert cluster.object("Secret", "iot-passwords") == secret
    scaler = cluster.object("HorizontalPodAutoscaler", "collector")["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (1, 3)
    shared = cluster.object("ConfigMap", "collector")["data"]["IOT_MQTT_TOPICS"]
    assert shared == "$share/collectors/iot/data"
    workload = cluster.object("StatefulSet", "collector")
    assert "replicas" not in workload["spec"]
    # Only a page that shows messages needs to read the database, as the role that can do no more.
    environment = cluster.object("ConfigMap", "collector")["data"]
    assert environment["IOT_LIVE_PAGE"] == "full"
    url = "postgresql://iot_reader@postgres-service:5432/iot"
    assert environment["IOT_LIVE_PAGE_DATABASE_URL"] == url
    (passwords,) = (v["secret"]["items"] for v in pod_spec(workload)["volumes"])
    file = environment["IOT_LIVE_PAGE_DATABASE_PASSWORD_FILE"]
    assert file == "/run/secrets/iot/reader_db_password"
    assert file.rpartition("/")[2] in {item["path"] for item in passwords}

    done = cluster.run("local", **RECEIVER)
    assert done.returncode == 0, done.stdout
    assert cluster.revisions() == before
    assert cluster.objects("HorizontalPodAutoscaler") == []


@pytest.mark.parametrize("mode", [[], ["--check"]], ids=["run", "check"])
def test_a_volume_keeps_its_class_and_size(cluster: Cluster, mode: list[str]) -> None:
    before, classes = cluster.objects(), cluster.client.resources.get(kind="StorageClass")
    classes.create({"metadata": {"name": "fast"}, "provisioner": "x"})
    changes = {"iot_storage_class": "fast", "postgres_volume_size": "20Gi"}
    done = cluster.run("local", *mode, **changes, **RECEIVER, mosquitto_volume_size="1Gi")
    classes.delete(name="fast")
    assert done.returncode != 0
    shown = " ".join(done.stdout.replace("\\n", " ").split())
    for text in (
        "iot_storage_class is fast, but grafana was deployed without an iot_storage_class "
        "(its volume has standard).",
        "Next: set iot_storage_class to nothing again, or move",
        "postgres_volume_size is 20Gi, but postgres was deployed with 10Gi. The storage class "
        "standard has no allowVolumeExpansion: true",
        "mosquitto_volume_size is 1Gi, but mosquitto was deployed with 2Gi. "
        "A volume cannot shrink.",
    ):
        assert text in shown
    assert cluster.objects() == before


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "named", "step"),
    [
        ("ImagePullBackOff", "Back-off pulling image", "set web_image"),
        ("InvalidImageName", "InvalidImageName", "set web_image"),
        ("CrashLoopBackOff", "ended with Error, exit code 1", "kubectl -n iot-system logs web-0"),
        ("Unschedulable", "Insufficient memory", "lower web's resources"),
        ("NotReady", "it runs but is not ready", "kubectl -n iot-system logs web-0"),
        ("storage", "storageclass.storage.k8s.io", "set iot_storage_class"),
    ],
)
def test_reasons_and_next_steps(empty: Cluster, reason: str, named: str, step: str) -> None:
    """What the role's filter makes of pods and events that say why."""
    empty.stand_in.ask("never-ready", {"web": reason} if reason != "storage" else {})
    create(empty, "Namespace", {"metadata": {"name": NAMESPACE}})
    claim = {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "1Gi"}},
        "storageClassName": "fast",
    }
    pod = {
        "metadata": {"labels": {"app": "web"}},
        "spec": {"containers": [{"name": "web", "image": "web:1"}]},
    }
    spec: Object = {
        "serviceName": "web",
        "selector": {"matchLabels": {"app": "web"}},
        "template": pod,
    }
    if reason == "storage":
        spec["volumeClaimTemplates"] = [{"metadata": {"name": "data"}, "spec": claim}]
    create(empty, "StatefulSet", {"metadata": {"name": "web"}, "spec": spec})
    message = not_ready("web", "Timed out.", NAMESPACE, known(empty))
    assert message.startswith("web is not ready. Timed out.\n")
    assert named in message
    assert step in message.rpartition("\nNext: ")[2]


@pytest.mark.parametrize(
    ("why", "step"),
    [
        (
            "exceeded quota: none, requested: pods=1, used: pods=0, limited: pods=0",
            "raise the namespace's ResourceQuota",
        ),
        (
            'violates PodSecurity "restricted:latest": runAsNonRoot != true (pod or container '
            '"web" must set securityContext.runAsNonRoot=true)',
            "the manifest violates it",
        ),
    ],
    ids=["quota", "PodSecurity"],
)
def test_reasons_not_to_admit_a_pod(why: str, step: str) -> None:
    """Events as the API makes them, which the stand-in does not."""
    text = f'create Pod web-0 in StatefulSet web failed error: pods "web-0" is forbidden: {why}'
    event = warning("StatefulSet", "web", 1, text, "FailedCreate")
    message = not_ready("web", "", NAMESPACE, [WEB | {"status": {"replicas": 0}}, event])
    assert f"web: FailedCreate: {text}" in message
    assert step in message.rpartition("\nNext: ")[2]


def volume(size: str, storage_class: str = "", *, grows: bool = True) -> list[Object]:
    """A StatefulSet of one pod that was deployed so, its claim, and the cluster's class."""
    requests = {"resources": {"requests": {"storage": size}}}
    named = {"storageClassName": storage_class} if storage_class else {}
    template = {"metadata": {"name": "data"}, "spec": requests | named}
    bound = {"storageClassName": storage_class or "standard"}
    return [
        {
            "kind": "StatefulSet",
            "metadata": {"name": "web"},
            "spec": {"volumeClaimTemplates": [template]},
        },
        {
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "data-web-0"},
            "spec": requests | bound,
        },
        {
            "kind": "StorageClass",
            "metadata": {"name": bound["storageClassName"]},
            "allowVolumeExpansion": grows,
        },
    ]


@pytest.mark.parametrize(
    ("size", "storage_class", "objects", "text"),
    [
        ("1Gi", "", [], ""),
        ("1Gi", "", volume("1Gi"), ""),
        ("1024Mi", "fast", volume("1Gi", "fast"), ""),
        ("1GB", "", [], "size is 1GB, which is not a size such as 10Gi."),
        ("0", "", [], "size is 0, which is not a size"),
        ("1Gi", "fast", volume("1Gi"), "without an iot_storage_class (its volume has standard)"),
        ("1Gi", "", volume("1Gi", "fast"), "Next: set iot_storage_class to fast again, or move"),
        ("2Gi", "", volume("1Gi", grows=False), "Next: set size to 1Gi again, or move"),
        ("1Gi", "", volume("2Gi"), "A volume cannot shrink.\nNext: set size to 2Gi again"),
        (
            *("2Gi", "", volume("1Gi")),
            "  kubectl -n iot-system patch pvc data-web-0 -p "
            """'{"spec": {"resources": {"requests": {"storage": "2Gi"}}}}'\n"""
            "  kubectl -n iot-system delete statefulset web --cascade=orphan",
        ),
    ],
)
def test_what_preflight_says_about_volumes(
    size: str, storage_class: str, objects: list[Object], text: str
) -> None:
    wanted = {"web": {"variable": "size", "size": size}}
    errors = volume_errors(wanted, storage_class, "kubectl -n iot-system", objects)
    assert len(errors) == bool(text)
    assert text in "".join(errors)


def known(cluster: Cluster) -> list[Object]:
    """What the role asks the cluster for."""
    kinds = {"StatefulSet": "apps/v1", "Pod": "v1", "PersistentVolumeClaim": "v1", "Event": "v1"}
    return [
        item.to_dict()
        for kind, version in kinds.items()
        for item in cluster.client.resources.get(kind=kind, api_version=version)
        .get(namespace=NAMESPACE, **({"field_selector": "type=Warning"} if kind == "Event" else {}))
        .items
    ]


def test_faults_of_earlier_pods_are_not_named(empty: Cluster) -> None:
    """Each fault is mended by a change, which replaces the pods, and another one follows."""
    create(empty, "Namespace", {"metadata": {"name": NAMESPACE}})
    labels = {"app": "web"}
    pod = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "web", "image": "x"}]}}
    spec: Object = {"serviceName": "web", "selector": {"matchLabels": labels}, "template": pod}
    spec["template"]["spec"]["serviceAccountName"] = "missing"
    create(empty, "StatefulSet", {"metadata": {"name": "web"}, "spec": spec})
    assert "service account" in not_ready("web", "", NAMESPACE, known(empty))
    empty.stand_in.ask("never-ready", {"web": "ImagePullBackOff"})
    create(empty, "ServiceAccount", {"metadata": {"name": "missing"}})
    message = not_ready("web", "", NAMESPACE, known(empty))
    assert "Failed to pull image" in message
    assert "service account" not in message
    empty.stand_in.ask("never-ready", {"web": "CrashLoopBackOff"})
    changed = {"spec": {"template": {"metadata": {"annotations": {"checksum": "2"}}}}}
    patch(empty, "StatefulSet", "web", changed)
    message = not_ready("web", "", NAMESPACE, known(empty))
    assert "web-0: BackOff: Back-off restarting failed container" in message
    assert "pull" not in message.lower()


def patch(cluster: Cluster, kind: str, name: str, body: Object) -> None:
    kinds = cluster.client.resources.get(kind=kind)
    merge = "application/merge-patch+json"
    kinds.patch(body, name=name, namespace=NAMESPACE, content_type=merge)


def at(minute: int) -> str:
    return f"2026-01-01T00:{minute:02}:00Z"


def warning(kind: str, uid: str, minute: int, message: str, reason: str = "Failed") -> Object:
    about = {"kind": kind, "name": uid, "uid": uid}
    event = {"kind": "Event", "involvedObject": about, "reason": reason, "message": message}
    return event | {"lastTimestamp": at(minute)}


def replica(name: str, *, ready: bool, revision: str = "new", **shown: Any) -> Object:
    """A pod made in minute 10, scheduled in minute 11, whose container runs since minute 12."""
    conditions = [
        {"type": "PodScheduled", "status": "True", "lastTransitionTime": at(11)},
        {"type": "Ready", "status": str(ready), "lastTransitionTime": at(12)},
    ]
    container = {"name": "web", "ready": ready, "state": {"running": {"startedAt": at(12)}}}
    return {
        "kind": "Pod",
        "metadata": {
            "name": name,
            "uid": name,
            "creationTimestamp": at(10),
            "labels": {"controller-revision-hash": revision},
        },
        "status": {"conditions": conditions, "containerStatuses": [container | shown]},
    }


WEB = {
    "kind": "StatefulSet",
    "metadata": {"name": "web", "uid": "web"},
    "spec": {"replicas": 2},
    "status": {"replicas": 2, "updateRevision": "new"},
}
ENDED: dict[str, Any] = {"lastState": {"terminated": {"exitCode": 1, "reason": "Error"}}}


@pytest.mark.parametrize(
    ("objects", "named"),
    [
        ([replica("web-0", ready=False), warning("Pod", "web-0", 13, "probe")], True),
        ([replica("web-0", ready=False), warning("Pod", "another", 13, "probe")], False),
        ([replica("web-0", ready=False), warning("Pod", "web-0", 11, "probe")], False),
        (
            [replica("web-0", ready=False, restartCount=1), warning("Pod", "web-0", 11, "probe")],
            True,
        ),
        ([replica("web-0", ready=True), warning("Pod", "web-0", 13, "probe")], False),
        ([WEB | {"status": {"replicas": 1}}, warning("StatefulSet", "web", 1, "probe")], True),
        ([WEB, warning("StatefulSet", "web", 13, "probe")], False),
        (
            [
                WEB | {"status": {"replicas": 1}},
                warning("StatefulSet", "web", 1, "probe"),
                warning("StatefulSet", "web", 2, "other"),
            ],
            False,
        ),
        (
            [
                *(WEB, replica("web-0", ready=False, revision="old")),
                *(replica("web-1", ready=False), warning("Pod", "web-0", 13, "probe")),
            ],
            False,
        ),
        (
            [
                *(WEB, replica("web-0", ready=False, revision="old")),
                *(replica("web-1", ready=True), warning("Pod", "web-0", 13, "probe")),
            ],
            True,
        ),
        *(
            (
                [
                    {
                        "kind": "PersistentVolumeClaim",
                        "metadata": {"uid": "data"},
                        "status": {"phase": phase},
                    },
                    warning("PersistentVolumeClaim", "data", 1, "probe"),
                ],
                phase == "Pending",
            )
            for phase in ("Pending", "Bound")
        ),
    ],
    ids=[
        *("of the pod", "of a pod that it replaced", "before it started", "between its restarts"),
        *("of a ready pod", "of a missing pod", "of a pod that came", "of a refusal before"),
        *("of the old revision", "of the old revision, which it waits for"),
        *("of a claim", "of a claim that has its volume"),
    ],
)
def test_which_warnings_are_named(objects: list[Object], named: bool) -> None:
    message = not_ready("web", "", NAMESPACE, objects)
    assert (": Failed: probe" in message) is named


def test_an_earlier_end_of_a_ready_container_is_no_reason() -> None:
    for ready in (True, False):
        pod = replica("web-0", ready=ready, **ENDED)
        message = not_ready("web", "", NAMESPACE, [pod])
        assert ("exit code 1" in message) is not ready


def test_the_last_time_of_an_event_that_repeats() -> None:
    """The events of newer components have a series instead of a lastTimestamp."""
    event = warning("Pod", "web-0", 1, "probe") | {"lastTimestamp": None, "eventTime": at(1)}
    event["series"] = {"count": 9, "lastObservedTime": "2026-01-01T00:13:00.123456Z"}
    message = not_ready("web", "", NAMESPACE, [replica("web-0", ready=False), event])
    assert "web-0: Failed: probe" in message


def test_no_reason_and_what_was_once() -> None:
    assert "The cluster gives no reason." in not_ready("web", "Late.", NAMESPACE, [])
    pod = replica("web-0", ready=False, restartCount=1)
    event = warning("Pod", "web-0", 13, "ImagePullBackOff")
    message = not_ready("web", "", NAMESPACE, [pod, event])
    assert "ImagePullBackOff" in message
    # What is wrong now decides.
    assert "see why in its log" in message.rpartition("Next: ")[2]


def create(cluster: Cluster, kind: str, body: Object) -> None:
    namespace = {} if kind == "Namespace" else {"namespace": NAMESPACE}
    cluster.client.resources.get(kind=kind).create(body, **namespace)


def test_a_namespace_that_is_being_deleted(empty: Cluster) -> None:
    labels = {"app.kubernetes.io/part-of": "iot-system"}
    create(empty, "Namespace", {"metadata": {"name": NAMESPACE, "labels": labels}})
    create(empty, "ConfigMap", {"metadata": {"name": "held", "finalizers": ["example.com/hold"]}})
    empty.client.resources.get(kind="Namespace").delete(name=NAMESPACE)
    done = empty.run("local")
    assert done.returncode != 0
    assert "is being deleted" in done.stdout
    assert "example.com/hold" in done.stdout


def test_a_namespace_of_somebody_else(empty: Cluster) -> None:
    create(empty, "Namespace", {"metadata": {"name": NAMESPACE}})
    for name, text in (
        ("local", "was not created by this playbook"),
        ("teardown", "so this system has not created it"),
    ):
        done = empty.run(name, confirm=True)
        assert done.returncode != 0
        assert text in " ".join(done.stdout.split())
    assert len(empty.objects("Namespace")) == 1


@pytest.mark.parametrize(
    ("variables", "texts"),
    [
        (
            {"kube_context": "elsewhere"},
            ["The cluster cannot be reached", "elsewhere", "-e kube_context="],
        ),
        (
            {"kubeconfig": "/nowhere"},
            ["The cluster cannot be reached", "/nowhere", "-e kubeconfig="],
        ),
        ({"iot_storage_class": "fast"}, ["iot_storage_class is fast", "one of: standard"]),
        (
            {"collector_image": ""},
            ["collector_image is empty", "collector/Dockerfile"],
        ),
        ({"iot_database": "mysql"}, ["iot_database must be one of: postgres, rds", "got: mysql"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_setting_stops_the_start(
    empty: Cluster, variables: dict[str, object], texts: list[str]
) -> None:
    done = empty.run("local", **variables)
    assert done.returncode != 0
    shown = " ".join(done.stdout.split())
    for text in texts:
        assert text in shown
    assert empty.objects() == []


def test_teardown_asks_and_verify_needs_a_system(empty: Cluster) -> None:
    done = empty.run("verify")
    assert done.returncode != 0
    assert "There is no collector in the namespace" in done.stdout
    labels = {"app.kubernetes.io/part-of": "iot-system"}
    create(empty, "Namespace", {"metadata": {"name": NAMESPACE, "labels": labels}})
    done = empty.run("teardown")
    assert done.returncode != 0
    assert "Nothing was deleted" in done.stdout
    assert len(empty.objects("Namespace")) == 1
