"""The stand-in for the Kubernetes API, asked by the real clients: the kubernetes package's dynamic
client and Ansible's kubernetes.core."""

import itertools
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes
import pytest
from kubernetes.dynamic import DynamicClient
from kubernetes.dynamic.exceptions import DynamicApiError, ResourceNotFoundError

from testing.kubernetes_api.process import StandIn, command, running

Object = dict[str, Any]

NUMBERS = itertools.count()
MERGE = "application/merge-patch+json"
HERE = Path(__file__).parent


def container(**fields: Any) -> Object:
    return {"name": "main", "image": "example/main:1"} | fields


def stateful_set(spec: Object | None = None, pod: Object | None = None, **fields: Any) -> Object:
    """A good StatefulSet, with `spec`, `pod` (spec) and the container's `fields` changed."""
    labels = {"app": "web"}
    pod_spec = {"containers": [container(**fields)]} | (pod or {})
    template = {"metadata": {"labels": labels}, "spec": pod_spec}
    whole = {"serviceName": "web", "selector": {"matchLabels": labels}, "template": template}
    return {"metadata": {"name": "web"}, "spec": whole | (spec or {})}


def job(**fields: Any) -> Object:
    pod = {"restartPolicy": "Never", "containers": [container(**fields)]}
    return {"metadata": {"name": "once"}, "spec": {"template": {"spec": pod}}}


def claim(name: str = "data", **spec: Any) -> Object:
    size = {"requests": {"storage": "1Gi"}}
    return {
        "metadata": {"name": name},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": size} | spec,
    }


class Namespace:
    """One namespace of the stand-in; `create("ConfigMap", …)` and so on are within it."""

    def __init__(self, client: DynamicClient, name: str):
        self.client, self.name = client, name

    def resource(self, kind: str) -> Any:
        return self.client.resources.get(kind=kind)

    def create(self, kind: str, body: Object, **options: Any) -> Any:
        return self.resource(kind).create(body, namespace=self.name, **options)

    def get(self, kind: str, name: str) -> Object:
        found: Object = self.resource(kind).get(name=name, namespace=self.name).to_dict()
        return found

    def select(self, kind: str, **selectors: str) -> list[Object]:
        found = self.resource(kind).get(namespace=self.name, **selectors)
        return [item.to_dict() for item in found.items]

    def names(self, kind: str, **selectors: str) -> list[str]:
        return [obj["metadata"]["name"] for obj in self.select(kind, **selectors)]

    def patch(self, kind: str, name: str, body: Object) -> Object:
        patched: Object = (
            self.resource(kind)
            .patch(body, name=name, namespace=self.name, content_type=MERGE)
            .to_dict()
        )
        return patched

    def delete(self, kind: str, name: str) -> None:
        self.resource(kind).delete(name=name, namespace=self.name)

    def events(self, reason: str) -> list[str]:
        return [e["message"] for e in self.select("Event", field_selector=f"reason={reason}")]

    def status(self, name: str = "web", kind: str = "StatefulSet") -> Object:
        status: Object = self.get(kind, name)["status"]
        return status


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    with running(tmp_path_factory.mktemp("kubernetes_api") / "kubeconfig") as stand_in:
        yield stand_in


@pytest.fixture(scope="module")
def client(stand_in: StandIn, tmp_path_factory: pytest.TempPathFactory) -> DynamicClient:
    configured = kubernetes.config.new_client_from_config(str(stand_in.kubeconfig))
    cache = tmp_path_factory.mktemp("discovery") / "cache.json"
    return DynamicClient(configured, cache_file=str(cache))


@pytest.fixture
def namespace(client: DynamicClient, stand_in: StandIn) -> Iterator[Namespace]:
    name = f"test-{next(NUMBERS)}"
    namespaces = client.resources.get(kind="Namespace")
    namespaces.create({"metadata": {"name": name}})
    yield Namespace(client, name)
    stand_in.ask("never-ready", {})
    stand_in.ask("logs", {})
    namespaces.delete(name=name)
    namespaces.get(name=name)


def refused(call: Callable[..., Any], *args: Any, **options: Any) -> tuple[int, str]:
    with pytest.raises(DynamicApiError) as caught:
        call(*args, **options)
    told = json.loads(caught.value.body)
    assert (told["kind"], told["code"]) == ("Status", caught.value.status)
    return caught.value.status, told["message"]


# --- objects --------------------------------------------------------------------------------------


def test_discovery_names_what_is_served(client: DynamicClient) -> None:
    assert client.version["kubernetes"]["gitVersion"].startswith("v1.")
    assert client.resources.get(api_version="apps/v1", kind="StatefulSet").name == "statefulsets"
    assert not client.resources.get(api_version="v1", kind="Namespace").namespaced
    with pytest.raises(ResourceNotFoundError):
        client.resources.get(api_version="apps/v1", kind="DaemonSet")


def test_an_object_is_created_read_changed_and_deleted(namespace: Namespace) -> None:
    created = namespace.create("ConfigMap", {"metadata": {"name": "c"}, "data": {"a": "1"}})
    assert created.metadata.uid
    assert created.metadata.creationTimestamp
    version = {"metadata": {"resourceVersion": created.metadata.resourceVersion}}
    namespace.patch("ConfigMap", "c", version | {"data": {"a": None, "b": "2"}})
    assert namespace.get("ConfigMap", "c")["data"] == {"b": "2"}

    code, message = refused(namespace.patch, "ConfigMap", "c", version | {"data": {"b": "3"}})
    assert code == 409
    assert message.startswith(
        'Operation cannot be fulfilled on configmaps "c": the object has been'
    )
    assert refused(namespace.create, "ConfigMap", {"metadata": {"name": "c"}}) == (
        409,
        'configmaps "c" already exists',
    )
    namespace.delete("ConfigMap", "c")
    gone = refused(namespace.get, "ConfigMap", "c")
    assert gone == (404, 'configmaps "c" not found')
    assert refused(namespace.get, "StatefulSet", "x") == (404, 'statefulsets.apps "x" not found')


@pytest.mark.parametrize("options", [{}, {"dry_run": "All"}], ids=["real", "dry"])
def test_nothing_is_created_in_a_missing_namespace(client: DynamicClient, options: Object) -> None:
    nowhere = Namespace(client, "nowhere")
    body = {"metadata": {"name": "c"}}
    refusal = refused(nowhere.create, "ConfigMap", body, **options)
    assert refusal == (404, 'namespaces "nowhere" not found')


def test_a_dry_run_refuses_and_answers_but_stores_nothing(
    namespace: Namespace, stand_in: StandIn
) -> None:
    before = stand_in.ask("objects")
    answer = namespace.create("StatefulSet", stateful_set(), dry_run="All")
    assert answer.spec.replicas == 1
    nameless: Object = {"metadata": {}}
    assert refused(namespace.create, "StatefulSet", nameless, dry_run="All")[0] == 422
    namespace.create("ConfigMap", {"metadata": {"name": "kept"}, "data": {"a": "1"}})
    options = {"name": "kept", "namespace": namespace.name, "dry_run": "All"}
    patched = namespace.resource("ConfigMap").patch(
        {"data": {"a": "2"}}, content_type=MERGE, **options
    )
    assert patched.data.a == "2"
    namespace.resource("ConfigMap").delete(**options)
    assert namespace.get("ConfigMap", "kept")["data"] == {"a": "1"}
    namespace.delete("ConfigMap", "kept")
    assert stand_in.ask("objects") == before
    assert namespace.names("Pod") == []


def test_a_patch_that_changes_nothing_leaves_the_version(namespace: Namespace) -> None:
    namespace.create("StatefulSet", stateful_set())
    before = namespace.get("StatefulSet", "web")
    assert namespace.patch("StatefulSet", "web", {"spec": {"replicas": 1}}) == before
    after = namespace.patch("StatefulSet", "web", {"spec": {"replicas": 2}})
    assert after["metadata"]["generation"] == 2
    assert after["metadata"]["resourceVersion"] != before["metadata"]["resourceVersion"]


def test_a_merge_patch_removes_and_defaults_come_back(namespace: Namespace) -> None:
    namespace.create("StatefulSet", stateful_set({"replicas": 2, "minReadySeconds": 1}))
    patch = {"spec": {"replicas": None, "minReadySeconds": None}}
    spec = namespace.patch("StatefulSet", "web", patch)["spec"]
    assert spec["replicas"] == 1
    assert "minReadySeconds" not in spec


def test_selectors(namespace: Namespace) -> None:
    for name, tier in (("a", "front"), ("b", "back"), ("c", None)):
        labels = {"tier": tier} if tier else {}
        namespace.create(
            "Secret", {"metadata": {"name": name, "labels": labels}, "type": f"t/{name}"}
        )
    expected = {
        "tier=front": "a",
        "tier!=front": "bc",
        "tier": "ab",
        "!tier": "c",
        "tier in (front, back),tier!=back": "a",
        "tier notin (front)": "bc",
    }
    for selector, names in expected.items():
        assert "".join(namespace.names("Secret", label_selector=selector)) == names, selector
    assert namespace.names("Secret", field_selector="type=t/b") == ["b"]
    assert namespace.names("Secret", field_selector="metadata.name!=b") == ["a", "c"]
    assert refused(namespace.names, "Secret", label_selector="a b")[0] == 400
    namespace.resource("Secret").delete(namespace=namespace.name, label_selector="tier")
    assert namespace.names("Secret") == ["c"]


def test_an_object_with_a_finalizer_stays_until_it_is_taken_away(namespace: Namespace) -> None:
    held = {"metadata": {"name": "held", "finalizers": ["example.com/hold"]}}
    namespace.create("ConfigMap", held)
    namespace.delete("ConfigMap", "held")
    assert namespace.get("ConfigMap", "held")["metadata"]["deletionTimestamp"]
    code, message = refused(namespace.create, "ConfigMap", held)
    assert (code, message) == (409, 'object is being deleted: configmaps "held" already exists')
    namespace.patch("ConfigMap", "held", {"metadata": {"finalizers": None}})
    assert namespace.names("ConfigMap") == []


def test_plain_text_of_a_secret_is_encoded(namespace: Namespace) -> None:
    namespace.create("Secret", {"metadata": {"name": "s"}, "stringData": {"a": "plain"}})
    stored = namespace.get("Secret", "s")
    assert stored["data"] == {"a": "cGxhaW4="}
    assert "stringData" not in stored


# --- pods -----------------------------------------------------------------------------------------


def test_a_stateful_set_gets_its_pods_and_claims(namespace: Namespace) -> None:
    namespace.create(
        "StatefulSet", stateful_set({"replicas": 2, "volumeClaimTemplates": [claim()]})
    )
    status = namespace.status()
    assert (status["readyReplicas"], status["updatedReplicas"], status["observedGeneration"]) == (
        2,
        2,
        1,
    )
    assert status["currentRevision"] == status["updateRevision"]
    assert namespace.names("Pod", label_selector="app=web") == ["web-0", "web-1"]
    pod = namespace.get("Pod", "web-1")
    assert pod["status"]["containerStatuses"][0]["ready"]
    bound = namespace.get("PersistentVolumeClaim", "data-web-1")
    assert (bound["status"]["phase"], bound["spec"]["storageClassName"]) == ("Bound", "standard")

    namespace.patch("StatefulSet", "web", {"spec": {"replicas": 1}})
    assert namespace.names("Pod") == ["web-0"]
    namespace.delete("StatefulSet", "web")
    assert namespace.names("Pod") == []
    assert namespace.names("PersistentVolumeClaim") == ["data-web-0", "data-web-1"]


def test_a_new_template_replaces_the_pods(namespace: Namespace) -> None:
    namespace.create("StatefulSet", stateful_set())
    uid, before = namespace.get("Pod", "web-0")["metadata"]["uid"], namespace.status()
    patch = {"spec": {"template": {"metadata": {"annotations": {"checksum": "2"}}}}}
    namespace.patch("StatefulSet", "web", patch)
    assert namespace.get("Pod", "web-0")["metadata"]["uid"] != uid
    assert namespace.status()["currentRevision"] != before["currentRevision"]
    assert namespace.status()["observedGeneration"] == 2


def test_a_rollout_stops_at_a_pod_that_is_not_ready(
    namespace: Namespace, stand_in: StandIn
) -> None:
    namespace.create("StatefulSet", stateful_set({"replicas": 2}))
    first, second = (namespace.get("Pod", f"web-{n}")["metadata"]["uid"] for n in (0, 1))
    stand_in.ask("never-ready", {"web-1": "ImagePullBackOff"})
    template = {"spec": {"template": {"metadata": {"annotations": {"v": "2"}}}}}
    namespace.patch("StatefulSet", "web", template)
    status = namespace.status()
    assert (status["readyReplicas"], status["updatedReplicas"], status["replicas"]) == (1, 1, 2)
    assert status["currentRevision"] != status["updateRevision"]
    assert namespace.get("Pod", "web-0")["metadata"]["uid"] == first
    assert namespace.get("Pod", "web-1")["metadata"]["uid"] != second
    stand_in.ask("never-ready", {})
    assert namespace.status()["updatedReplicas"] == 2


VOLUME: dict[str, Any] = {"volumeMounts": [{"name": "v", "mountPath": "/v"}]}
MOUNT = 'MountVolume.SetUp failed for volume "v" : '


@pytest.mark.parametrize(
    ("pod", "fields", "heal", "reason", "event", "message"),
    [
        (
            {"volumes": [{"name": "v", "configMap": {"name": "x"}}]},
            VOLUME,
            ("ConfigMap", {"data": {"k": "1"}}),
            *("ContainerCreating", "FailedMount", MOUNT + 'configmap "x" not found'),
        ),
        (
            {"volumes": [{"name": "v", "projected": {"sources": [{"secret": {"name": "x"}}]}}]},
            VOLUME,
            ("Secret", {}),
            *("ContainerCreating", "FailedMount", MOUNT + 'secret "x" not found'),
        ),
        (
            {},
            {"env": [{"name": "E", "valueFrom": {"secretKeyRef": {"name": "x", "key": "k"}}}]},
            ("Secret", {"data": {"k": ""}}),
            *("CreateContainerConfigError", "Failed", 'Error: secret "x" not found'),
        ),
        (
            {"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "x"}}]},
            VOLUME,
            ("PersistentVolumeClaim", claim()),
            "",
            "FailedScheduling",
            '0/1 nodes are available: claim "x" not found. preemption: 0/1 nodes are available.',
        ),
    ],
    ids=["volume", "projected", "variable", "claim"],
)
def test_a_pod_waits_for_what_it_lacks(
    namespace: Namespace,
    pod: Object,
    fields: Object,
    heal: tuple[str, Object],
    reason: str,
    event: str,
    message: str,
) -> None:
    namespace.create("StatefulSet", stateful_set(pod=pod, **fields))
    status = namespace.status("web-0", "Pod")
    assert status["phase"] == "Pending"
    if reason:
        assert status["containerStatuses"][0]["state"]["waiting"]["reason"] == reason
    assert message in namespace.events(event)
    kind, body = heal
    namespace.create(kind, body | {"metadata": {"name": "x"}})
    assert namespace.status()["readyReplicas"] == 1
    namespace.delete(kind, "x")
    assert namespace.status()["readyReplicas"] == 1  # what runs keeps running


def test_a_key_that_is_not_there(namespace: Namespace) -> None:
    namespace.create("ConfigMap", {"metadata": {"name": "x"}, "data": {"a": "1"}})
    source = {"name": "x", "items": [{"key": "b", "path": "b"}]}
    pod = {"volumes": [{"name": "v", "configMap": source}]}
    namespace.create("StatefulSet", stateful_set(pod=pod, **VOLUME))
    assert namespace.events("FailedMount") == [MOUNT + "configmap x has no key b"]


def test_a_service_account_that_is_not_there(namespace: Namespace) -> None:
    namespace.create("StatefulSet", stateful_set(pod={"serviceAccountName": "me"}))
    (message,) = namespace.events("FailedCreate")
    assert f"service account {namespace.name}/me: not found" in message
    namespace.create("ServiceAccount", {"metadata": {"name": "me"}})
    assert namespace.status()["readyReplicas"] == 1


def test_a_storage_class_that_is_not_there(namespace: Namespace) -> None:
    template = claim(storageClassName="fast")
    namespace.create("StatefulSet", stateful_set({"volumeClaimTemplates": [template]}))
    assert namespace.status("data-web-0", "PersistentVolumeClaim")["phase"] == "Pending"
    expected = ['storageclass.storage.k8s.io "fast" not found']
    assert namespace.events("ProvisioningFailed") == expected
    assert "unbound immediate PersistentVolumeClaims" in namespace.events("FailedScheduling")[0]


@pytest.mark.parametrize(
    ("reason", "phase", "event"),
    [
        ("ImagePullBackOff", "Pending", "Error: ImagePullBackOff"),
        ("InvalidImageName", "Pending", 'Failed to apply default image tag "example/main:1"'),
        ("CrashLoopBackOff", "Running", "Back-off restarting failed container main in pod web-0"),
        ("NotReady", "Running", "Readiness probe failed: HTTP probe failed with statuscode: 503"),
        ("Unschedulable", "Pending", "0/1 nodes are available: 1 Insufficient memory."),
    ],
)
def test_a_component_is_broken_and_healed(
    namespace: Namespace, stand_in: StandIn, reason: str, phase: str, event: str
) -> None:
    namespace.create("StatefulSet", stateful_set())
    assert namespace.status()["readyReplicas"] == 1
    stand_in.ask("never-ready", {"web": reason})
    assert "readyReplicas" not in namespace.status()
    pod = namespace.status("web-0", "Pod")
    assert pod["phase"] == phase
    shown = pod["conditions"] if "containerStatuses" not in pod else pod["containerStatuses"]
    if reason != "NotReady":
        assert reason in json.dumps(shown)
    assert any(e["message"].startswith(event) for e in namespace.select("Event"))
    stand_in.ask("never-ready", {})
    assert namespace.status()["readyReplicas"] == 1


def test_an_init_container_is_broken(namespace: Namespace, stand_in: StandIn) -> None:
    stand_in.ask("never-ready", {"web/second": "CrashLoopBackOff"})
    inits = [container(name=name) for name in ("first", "second", "third")]
    namespace.create("StatefulSet", stateful_set(pod={"initContainers": inits}))
    status = namespace.status("web-0", "Pod")
    first, second, third = (s["state"] for s in status["initContainerStatuses"])
    assert first["terminated"]["exitCode"] == 0
    assert second["waiting"]["reason"] == "CrashLoopBackOff"
    assert third["waiting"]["reason"] == "PodInitializing"
    assert status["containerStatuses"][0]["state"]["waiting"]["reason"] == "PodInitializing"
    assert status["phase"] == "Pending"


def test_a_reason_that_is_none_is_refused(stand_in: StandIn) -> None:
    with pytest.raises(OSError, match="400"):
        stand_in.ask("never-ready", {"web": "Tired"})


def test_a_job_completes_or_fails(namespace: Namespace, stand_in: StandIn) -> None:
    namespace.create("Job", job())
    status = namespace.status("once", "Job")
    assert status["succeeded"] == 1
    assert status["conditions"][-1]["type"] == "Complete"
    (pod,) = namespace.select("Pod", label_selector="batch.kubernetes.io/job-name=once")
    assert pod["status"]["phase"] == "Succeeded"

    stand_in.ask("never-ready", {"twice": "Error"})
    namespace.create("Job", job() | {"metadata": {"name": "twice"}})
    assert namespace.status("twice", "Job")["conditions"][-1]["type"] == "Failed"
    namespace.delete("Job", "once")
    assert len(namespace.names("Pod")) == 1


def test_logs(namespace: Namespace, stand_in: StandIn) -> None:
    def log(**query: Any) -> str:
        options = {"name": "web-0", "namespace": namespace.name, "serialize": False}
        answer = namespace.resource("Pod").log.get(query_params=list(query.items()), **options)
        return str(answer.data.decode())

    pod = {"initContainers": [container(name="first")]}
    namespace.create("StatefulSet", stateful_set(pod=pod))
    stand_in.ask("logs", {"web": "one\ntwo\n", "web/first": "initial\n"})
    assert log() == "one\ntwo\n"
    assert log(tailLines=1) == "two\n"
    assert log(container="first") == "initial\n"
    assert refused(log, container="x") == (400, "container x is not valid for pod web-0")


# --- namespaces -----------------------------------------------------------------------------------


def test_a_namespace_goes_with_what_is_in_it(client: DynamicClient, stand_in: StandIn) -> None:
    before = stand_in.ask("objects")
    namespaces = client.resources.get(kind="Namespace")
    # A manifest of a cluster-wide kind may name a namespace, which is ignored.
    namespaces.create({"metadata": {"name": "brief", "namespace": "brief"}})
    brief = Namespace(client, "brief")
    brief.create("StatefulSet", stateful_set({"volumeClaimTemplates": [claim()]}))
    assert len(stand_in.ask("objects")) == len(before) + 2
    assert namespaces.delete(name="brief").status.phase == "Terminating"
    code, message = refused(brief.create, "ConfigMap", {"metadata": {"name": "late"}})
    assert code == 403
    assert message.endswith("in namespace brief because it is being terminated")
    assert namespaces.get(name="brief").status.phase == "Terminating"
    assert refused(namespaces.get, name="brief") == (404, 'namespaces "brief" not found')
    assert stand_in.ask("objects") == before
    assert client.resources.get(kind="Pod").get().items == []


def test_a_finalizer_keeps_a_namespace_terminating(client: DynamicClient) -> None:
    namespaces = client.resources.get(kind="Namespace")
    namespaces.create({"metadata": {"name": "stuck"}})
    stuck = Namespace(client, "stuck")
    stuck.create("ConfigMap", {"metadata": {"name": "held", "finalizers": ["example.com/hold"]}})
    namespaces.delete(name="stuck")
    for _ in range(3):
        status = namespaces.get(name="stuck").to_dict()["status"]
    assert status["phase"] == "Terminating"
    assert [c["message"] for c in status["conditions"]] == [
        "Some resources are remaining: configmaps. has 1 resource instances",
        "Some content in the namespace has finalizers remaining: example.com/hold in 1 resource "
        "instances",
    ]
    stuck.patch("ConfigMap", "held", {"metadata": {"finalizers": None}})
    namespaces.get(name="stuck")
    assert refused(namespaces.get, name="stuck")[0] == 404


# --- the process, and Ansible ---------------------------------------------------------------------


def test_it_runs_in_the_background_and_ends_on_sigterm(tmp_path: Path) -> None:
    kubeconfig, pidfile = tmp_path / "kubeconfig", tmp_path / "pid"
    options: list[str | Path] = ["--detach", "--kubeconfig", kubeconfig, "--pidfile", pidfile]
    done = subprocess.run(**command(*options), check=True, capture_output=True)
    pid = int(pidfile.read_text())
    waiting = os.pidfd_open(pid)
    try:
        configured = kubernetes.config.new_client_from_config(str(kubeconfig))
        assert configured.configuration.host == done.stdout.strip()
        version = kubernetes.client.VersionApi(configured).get_code()
        assert version.git_version.startswith("v1.")
    finally:
        signal.pidfd_send_signal(waiting, signal.SIGTERM)
        ended, _, _ = select.select([waiting], [], [], 10)
        os.close(waiting)
    assert ended


@pytest.mark.timeout(300)
def test_ansible(stand_in: StandIn, tmp_path: Path) -> None:
    """The modules' own logic, on what the stand-in answers (kubernetes_api_test.yml)."""
    environment = os.environ | {"LC_ALL": "C.UTF-8", "TMPDIR": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # compiling the client is most of the time
    arguments: list[str | Path] = [
        Path(sys.executable).with_name("ansible-playbook"),
        HERE / "kubernetes_api_test.yml",
    ]
    arguments += ["-e", f"kubeconfig={stand_in.kubeconfig}", "-e", f"stand_in={stand_in.url}"]
    done = subprocess.run(
        arguments, cwd=HERE.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert stand_in.ask("objects") == []
