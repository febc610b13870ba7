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

RESTRICTED_POD = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
RESTRICTED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def container(**fields: Any) -> Object:
    return {"name": "main", "image": "example/main:1", "securityContext": RESTRICTED} | fields


def stateful_set(spec: Object | None = None, pod: Object | None = None, **fields: Any) -> Object:
    """A good StatefulSet, with `spec`, `pod` (spec) and the container's `fields` changed."""
    labels = {"app": "web"}
    pod_spec = {"securityContext": RESTRICTED_POD, "containers": [container(**fields)]} | (
        pod or {}
    )
    template = {"metadata": {"labels": labels}, "spec": pod_spec}
    whole = {"serviceName": "web", "selector": {"matchLabels": labels}, "template": template}
    return {"metadata": {"name": "web"}, "spec": whole | (spec or {})}


def job(**fields: Any) -> Object:
    pod: Object = {"restartPolicy": "Never", "securityContext": RESTRICTED_POD}
    pod["containers"] = [container(**fields)]
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

    def patch(self, kind: str, name: str, body: Object, content_type: str = MERGE) -> Object:
        patched: Object = (
            self.resource(kind)
            .patch(body, name=name, namespace=self.name, content_type=content_type)
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
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    namespaces = client.resources.get(kind="Namespace")
    namespaces.create({"metadata": {"name": name, "labels": labels}})
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
    assert client.resources.get(api_version="apps/v1", kind="StatefulSet").short_names == ["sts"]
    assert not client.resources.get(api_version="v1", kind="Namespace").namespaced
    with pytest.raises(ResourceNotFoundError):
        client.resources.get(api_version="apps/v1", kind="DaemonSet")


def test_an_object_is_created_read_replaced_and_deleted(namespace: Namespace) -> None:
    created = namespace.create("ConfigMap", {"metadata": {"name": "c"}, "data": {"a": "1"}})
    assert created.metadata.uid
    assert created.metadata.creationTimestamp
    fresh = namespace.get("ConfigMap", "c")
    fresh["data"] = {"b": "2"}
    namespace.resource("ConfigMap").replace(fresh, namespace=namespace.name)
    assert namespace.get("ConfigMap", "c")["data"] == {"b": "2"}

    call = namespace.resource("ConfigMap").replace
    code, message = refused(call, fresh, namespace=namespace.name)
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
    assert answer.spec.template.spec.containers[0].imagePullPolicy == "IfNotPresent"
    bad = stateful_set(spec={"replica": 1})
    assert refused(namespace.create, "StatefulSet", bad, dry_run="All")[0] == 400
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
    namespace.create("StatefulSet", stateful_set(spec={"podManagementPolicy": "OrderedReady"}))
    patch = {"spec": {"replicas": None, "template": {"spec": {"containers": [container()]}}}}
    spec = namespace.patch("StatefulSet", "web", patch)["spec"]
    assert spec["replicas"] == 1
    assert spec["template"]["spec"]["containers"][0]["terminationMessagePolicy"] == "File"


SEVERAL: list[tuple[str, Object]] = [
    ("Secret", {"metadata": {"name": "x"}, "stringData": {"a": "1"}}),
    ("Service", {"metadata": {"name": "x"}, "spec": {"ports": [{"port": 80}]}}),
    (
        "NetworkPolicy",
        {
            "metadata": {"name": "x"},
            "spec": {"podSelector": {}, "egress": [{"ports": [{"port": 53}]}]},
        },
    ),
    (
        "RoleBinding",
        {
            "metadata": {"name": "x"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "x"},
            "subjects": [{"kind": "User", "name": "x"}],
        },
    ),
    ("PersistentVolumeClaim", claim("x")),
    (
        "StatefulSet",
        stateful_set(
            {"volumeClaimTemplates": [claim()]},
            {"volumes": [{"name": "v", "configMap": {"name": "kube-root-ca.crt"}}]},
            ports=[{"containerPort": 80}],
            startupProbe={"httpGet": {"port": 80}},
            env=[{"name": "E", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
        ),
    ),
    ("Job", job()),
]


FILLED_IN = {
    "Secret": "type=Opaque",
    "Service": "spec.ports.0.targetPort=80 spec.ports.0.protocol=TCP spec.type=ClusterIP",
    "NetworkPolicy": "spec.egress.0.ports.0.protocol=TCP spec.policyTypes.1=Egress",
    "RoleBinding": "subjects.0.apiGroup=rbac.authorization.k8s.io",
    "PersistentVolumeClaim": "spec.volumeMode=Filesystem spec.storageClassName=standard",
    "StatefulSet": (
        "spec.volumeClaimTemplates.0.kind=PersistentVolumeClaim spec.replicas=1 "
        "spec.volumeClaimTemplates.0.status.phase=Pending spec.updateStrategy.type=RollingUpdate "
        "spec.template.spec.containers.0.ports.0.protocol=TCP "
        "spec.template.spec.containers.0.startupProbe.httpGet.scheme=HTTP "
        "spec.template.spec.containers.0.startupProbe.failureThreshold=3 "
        "spec.template.spec.containers.0.env.0.valueFrom.fieldRef.apiVersion=v1 "
        "spec.template.spec.volumes.0.configMap.defaultMode=420"
    ),
    "Job": "spec.backoffLimit=6 spec.template.spec.dnsPolicy=ClusterFirst",
}


@pytest.mark.parametrize(("kind", "body"), SEVERAL, ids=[kind for kind, _ in SEVERAL])
def test_what_is_left_out_is_filled_in_each_time(
    namespace: Namespace, kind: str, body: Object
) -> None:
    name = body["metadata"]["name"]
    namespace.create(kind, body)
    before = namespace.get(kind, name)
    assert namespace.patch(kind, name, body) == before
    for expected in FILLED_IN[kind].split():
        path, value = expected.split("=")
        found: Any = before
        for part in path.split("."):
            found = found[int(part) if part.isdigit() else part]
        assert str(found) == value, path


def test_a_strategic_patch_merges_lists_by_name(namespace: Namespace) -> None:
    namespace.create("StatefulSet", stateful_set())
    patch = {"spec": {"template": {"spec": {"containers": [{"name": "main", "image": "new:2"}]}}}}
    kind = "application/strategic-merge-patch+json"
    merged = namespace.patch("StatefulSet", "web", patch, kind)
    only = merged["spec"]["template"]["spec"]["containers"]
    assert [c["image"] for c in only] == ["new:2"]
    assert only[0]["securityContext"] == RESTRICTED


def test_server_side_apply_takes_back_what_it_gave(namespace: Namespace) -> None:
    def apply(env: list[Object], manager: str = "me") -> Any:
        whole = stateful_set(env=env) | {"apiVersion": "apps/v1", "kind": "StatefulSet"}
        call = namespace.resource("StatefulSet").server_side_apply
        applied = call(whole, name="web", namespace=namespace.name, field_manager=manager)
        return applied.to_dict()["spec"]["template"]["spec"]["containers"][0].get("env")

    a, b = {"name": "A", "value": "1"}, {"name": "B", "value": "2"}
    assert apply([a, b]) == [a, b]
    assert apply([b]) == [b]
    assert apply([a], manager="another") == [b, a]
    assert refused(apply, [a], manager="")[0] == 422


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
    assert refused(namespace.names, "Secret", field_selector="data.x=1")[0] == 400
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
    assert namespace.names("ConfigMap") == ["kube-root-ca.crt"]


def test_plain_text_of_a_secret_is_encoded(namespace: Namespace) -> None:
    namespace.create("Secret", {"metadata": {"name": "s"}, "stringData": {"a": "plain"}})
    stored = namespace.get("Secret", "s")
    assert stored["data"] == {"a": "cGxhaW4="}
    assert "stringData" not in stored


# --- refusals -------------------------------------------------------------------------------------

PROBE = {"livenessProbe": {"httpGet": {"port": 80}, "successThreshold": 2}}
BOTH = {"minAvailable": 1, "maxUnavailable": 1}
VOLUME_V = {"name": "v", "emptyDir": {}}
TWO_PORTS = [{"port": 1}, {"port": 2, "name": "b"}]


@pytest.mark.parametrize(
    ("kind", "body", "code", "message"),
    [
        ("StatefulSet", stateful_set(imagePullPolice="Never"), 400, 'unknown field "spec.template'),
        ("StatefulSet", stateful_set({"replicas": "1"}), 400, "cannot unmarshal string into Go"),
        ("StatefulSet", stateful_set({"selector": None}), 422, "spec.selector: Required value"),
        (
            "StatefulSet",
            stateful_set({"selector": {"matchLabels": {"a": "b"}}}),
            422,
            "does not mat",
        ),
        ("StatefulSet", stateful_set(pod={"containers": []}), 422, "containers: Required value"),
        ("StatefulSet", stateful_set(pod={"restartPolicy": "Never"}), 422, 'values: "Always"'),
        (
            "StatefulSet",
            stateful_set(volumeMounts=[{"name": "v", "mountPath": "/v"}]),
            422,
            "[0].name:",
        ),
        ("StatefulSet", stateful_set(ports=[{"containerPort": 70000}]), 422, "between 1 and 65535"),
        (
            *(
                "StatefulSet",
                stateful_set(ports=[{"name": "much-too-long-a-name", "containerPort": 1}]),
            ),
            *(422, "must be no more than 15 characters"),
        ),
        (
            "StatefulSet",
            stateful_set(readinessProbe={"periodSeconds": 1}),
            422,
            "specify a handler",
        ),
        (
            "StatefulSet",
            stateful_set(**PROBE),
            422,
            "livenessProbe.successThreshold: Invalid value: 2",
        ),
        (
            *(
                "StatefulSet",
                stateful_set(resources={"requests": {"cpu": "2"}, "limits": {"cpu": "500m"}}),
            ),
            *(422, "must be less than or equal to cpu limit of 500m"),
        ),
        (
            "StatefulSet",
            stateful_set(resources={"limits": {"memory": "1 GB"}}),
            400,
            "quantities must",
        ),
        (
            "ConfigMap",
            {"metadata": {"name": "c"}, "data": {"a/b": ""}},
            422,
            "data[a/b]: Invalid value",
        ),
        (
            "ConfigMap",
            {"metadata": {"name": "Big_Name"}},
            422,
            "a lowercase RFC 1123 subdomain must",
        ),
        (
            "ConfigMap",
            {"metadata": {"name": "c", "labels": {"a": "b c"}}},
            422,
            "a valid label must",
        ),
        (
            *("ConfigMap", {"metadata": {"name": "c", "annotations": {"a": "x" * 262144}}}),
            *(422, "metadata.annotations: Too long: may not be more than 262144 bytes"),
        ),
        (
            "Secret",
            {"metadata": {"name": "s"}, "data": {"a": "not base64"}},
            400,
            "illegal base64 data",
        ),
        (
            "Service",
            {"metadata": {"name": "s"}, "spec": {"ports": TWO_PORTS}},
            422,
            "ports[0].name: Req",
        ),
        (
            *("PodDisruptionBudget", {"metadata": {"name": "p"}, "spec": BOTH}),
            *(422, "minAvailable and maxUnavailable cannot be both set"),
        ),
        ("StatefulSet", {"metadata": {"name": "s"}}, 422, "spec: Required value"),
        ("StatefulSet", stateful_set(pod={"volumes": [VOLUME_V] * 2}), 422, "Duplicate value: "),
        (
            *("StatefulSet", stateful_set(pod={"volumes": [VOLUME_V | {"secret": {}}]})),
            *(422, "may not specify more than 1 volume type"),
        ),
        ("StatefulSet", stateful_set({"selector": {}}), 422, "empty selector is invalid"),
    ],
)
def test_a_wrong_manifest_is_refused(
    namespace: Namespace, kind: str, body: Object, code: int, message: str
) -> None:
    told = refused(namespace.create, kind, body)
    assert told[0] == code
    assert message in told[1]


def test_a_patch_is_checked_as_strictly(namespace: Namespace) -> None:
    namespace.create("StatefulSet", stateful_set())
    code, message = refused(namespace.patch, "StatefulSet", "web", {"spec": {"replica": 2}})
    assert code == 422
    assert message.endswith('strict decoding error: unknown field "spec.replica"')


def test_fields_that_never_change(namespace: Namespace) -> None:
    namespace.create("StatefulSet", stateful_set())
    assert refused(namespace.patch, "StatefulSet", "web", {"spec": {"serviceName": "other"}}) == (
        422,
        'StatefulSet.apps "web" is invalid: spec: Forbidden: updates to statefulset spec for '
        "fields other than 'replicas', 'ordinals', 'template', 'updateStrategy', "
        "'revisionHistoryLimit', "
        "'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden",
    )
    namespace.create("Job", job())
    patch = {"spec": {"template": {"spec": {"hostname": "x"}}}}
    code, message = refused(namespace.patch, "Job", "once", patch)
    assert code == 422
    assert 'Job.batch "once" is invalid: spec.template' in message
    assert message.endswith("field is immutable")
    namespace.create("ConfigMap", {"metadata": {"name": "c"}, "immutable": True})
    assert refused(namespace.patch, "ConfigMap", "c", {"data": {"a": "1"}})[0] == 422


CHANGES = {
    "Secret": ({"type": "other"}, 'type: Invalid value: "other": field is immutable'),
    "Service": ({"spec": {"clusterIP": "10.96.0.9"}}, "spec.clusterIP: Invalid value"),
    "RoleBinding": ({"roleRef": {"name": "y"}}, "cannot change roleRef"),
    "PersistentVolumeClaim": (
        {"spec": {"accessModes": ["ReadOnlyMany"]}},
        "spec: Forbidden: spec is immutable after creation",
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_other_fields_that_never_change(namespace: Namespace, kind: str) -> None:
    namespace.create(kind, dict(SEVERAL)[kind])
    patch, message = CHANGES[kind]
    code, told = refused(namespace.patch, kind, "x", patch)
    assert code == 422
    assert message in told


def test_of_a_pod_only_the_image_changes(namespace: Namespace) -> None:
    namespace.create("StatefulSet", stateful_set())
    image = {"spec": {"containers": [container(image="new:2")]}}
    namespace.patch("Pod", "web-0", image, "application/strategic-merge-patch+json")
    assert namespace.get("Pod", "web-0")["spec"]["containers"][0]["image"] == "new:2"
    code, message = refused(namespace.patch, "Pod", "web-0", {"spec": {"hostname": "x"}})
    assert code == 422
    assert "pod updates may not change fields other than" in message


# --- pods -----------------------------------------------------------------------------------------


def test_a_stateful_set_gets_its_pods_and_claims(
    namespace: Namespace, client: DynamicClient
) -> None:
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
    assert pod["metadata"]["labels"]["apps.kubernetes.io/pod-index"] == "1"
    assert pod["status"]["containerStatuses"][0]["ready"]
    bound = namespace.get("PersistentVolumeClaim", "data-web-1")
    assert (bound["status"]["phase"], bound["spec"]["storageClassName"]) == ("Bound", "standard")
    volumes = client.resources.get(kind="PersistentVolume")
    assert volumes.get(name=bound["spec"]["volumeName"]).spec.claimRef.name == "data-web-1"

    namespace.patch("StatefulSet", "web", {"spec": {"replicas": 1}})
    assert namespace.names("Pod") == ["web-0"]
    namespace.delete("StatefulSet", "web")
    assert namespace.names("Pod") == []
    assert namespace.names("PersistentVolumeClaim") == ["data-web-0", "data-web-1"]
    namespace.delete("PersistentVolumeClaim", "data-web-1")
    assert refused(volumes.get, name=bound["spec"]["volumeName"])[0] == 404


def test_a_claim_grows_where_its_class_allows_it(
    namespace: Namespace, client: DynamicClient
) -> None:
    def resize(name: str, size: str) -> Object:
        body = {"spec": {"resources": {"requests": {"storage": size}}}}
        return namespace.patch("PersistentVolumeClaim", name, body)

    classes = client.resources.get(kind="StorageClass")
    elastic = {"metadata": {"name": "elastic"}, "provisioner": "x", "allowVolumeExpansion": True}
    classes.create(elastic)
    for name, storage_class in ("fixed", "standard"), ("grows", "elastic"), ("pending", "nowhere"):
        body = claim(name, storageClassName=storage_class)
        namespace.create("PersistentVolumeClaim", body)
    classes.delete(name="elastic")
    assert refused(resize, "grows", "2Gi")[0] == 403
    classes.create(elastic)
    assert resize("grows", "2Gi")["spec"]["resources"]["requests"]["storage"] == "2Gi"
    grown = namespace.get("PersistentVolumeClaim", "grows")
    assert grown["status"]["capacity"] == {"storage": "2Gi"}
    volumes = client.resources.get(kind="PersistentVolume")
    assert volumes.get(name=grown["spec"]["volumeName"]).spec.capacity.storage == "2Gi"
    assert refused(resize, "grows", "1Gi") == (
        422,
        'PersistentVolumeClaim "grows" is invalid: spec.resources.requests.storage: Forbidden: '
        "field can not be less than status.capacity",
    )
    assert refused(resize, "fixed", "2Gi") == (
        403,
        'persistentvolumeclaims "fixed" is forbidden: only dynamically provisioned pvc can be '
        "resized and the storageclass that provisions the pvc must support resize",
    )
    code, message = refused(resize, "pending", "2Gi")
    assert code == 422
    assert message.endswith("volumeAttributesClassName for bound claims")
    classes.delete(name="elastic")


def test_pods_that_outlive_their_stateful_set(namespace: Namespace) -> None:
    """How the template of a claim is changed: nothing else of a StatefulSet can be."""
    namespace.create("StatefulSet", stateful_set({"volumeClaimTemplates": [claim()]}))
    pod = namespace.get("Pod", "web-0")
    namespace.resource("StatefulSet").delete(
        name="web", namespace=namespace.name, body={"propagationPolicy": "Orphan"}
    )
    left = namespace.get("Pod", "web-0")
    assert left["metadata"]["uid"] == pod["metadata"]["uid"]
    assert "ownerReferences" not in left["metadata"]
    larger = claim(resources={"requests": {"storage": "2Gi"}})
    namespace.create("StatefulSet", stateful_set({"volumeClaimTemplates": [larger]}))
    assert namespace.status()["readyReplicas"] == 1
    adopted = namespace.get("Pod", "web-0")
    assert adopted["metadata"]["uid"] == pod["metadata"]["uid"]
    owner = namespace.get("StatefulSet", "web")["metadata"]["uid"]
    assert [ref["uid"] for ref in adopted["metadata"]["ownerReferences"]] == [owner]
    namespace.delete("StatefulSet", "web")
    assert namespace.names("Pod") == []


def test_a_new_template_replaces_the_pods(namespace: Namespace) -> None:
    namespace.create("StatefulSet", stateful_set())
    uid, before = namespace.get("Pod", "web-0")["metadata"]["uid"], namespace.status()
    patch = {"spec": {"template": {"metadata": {"annotations": {"checksum": "2"}}}}}
    namespace.patch("StatefulSet", "web", patch)
    assert namespace.get("Pod", "web-0")["metadata"]["uid"] != uid
    assert namespace.status()["currentRevision"] != before["currentRevision"]
    assert namespace.status()["observedGeneration"] == 2


@pytest.mark.parametrize(("policy", "recovers"), [("OrderedReady", False), ("Parallel", True)])
def test_a_broken_rollout(
    namespace: Namespace, stand_in: StandIn, policy: str, recovers: bool
) -> None:
    """With OrderedReady a corrected template does not reach a broken pod until that is deleted."""
    namespace.create("StatefulSet", stateful_set({"podManagementPolicy": policy, "replicas": 2}))
    stand_in.ask("never-ready", {"web-1": "ImagePullBackOff"})
    template = {"spec": {"template": {"metadata": {"annotations": {"v": "bad"}}}}}
    namespace.patch("StatefulSet", "web", template)
    broken = namespace.status()
    assert (broken["readyReplicas"], broken["replicas"]) == (1, 2)
    uid = namespace.get("Pod", "web-1")["metadata"]["uid"]
    assert namespace.status("web-1", "Pod")["phase"] == "Pending"
    template["spec"]["template"]["metadata"]["annotations"]["v"] = "good"
    namespace.patch("StatefulSet", "web", template)
    assert (namespace.get("Pod", "web-1")["metadata"]["uid"] != uid) == recovers
    stand_in.ask("never-ready", {})
    assert namespace.status()["readyReplicas"] == 2


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
            '0/1 nodes are available: persistentvolumeclaim "x" not found. preemption: 0/1 nodes '
            "are available: 1 Preemption is not helpful for scheduling.",
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
    expected = [MOUNT + "configmap references non-existent config key: b"]
    assert namespace.events("FailedMount") == expected


def test_a_service_account_that_is_not_there(namespace: Namespace) -> None:
    namespace.create("StatefulSet", stateful_set(pod={"serviceAccountName": "me"}))
    assert namespace.events("FailedCreate") == [
        'create Pod web-0 in StatefulSet web failed error: pods "web-0" is forbidden: error '
        f'looking up service account {namespace.name}/me: serviceaccount "me" not found'
    ]
    namespace.create("ServiceAccount", {"metadata": {"name": "me"}})
    assert namespace.status()["readyReplicas"] == 1


@pytest.mark.parametrize("name", ["fast", ""], ids=["unknown", "none"])
def test_a_storage_class_that_is_not_there(namespace: Namespace, name: str) -> None:
    template = claim(storageClassName=name)
    namespace.create("StatefulSet", stateful_set({"volumeClaimTemplates": [template]}))
    assert namespace.status("data-web-0", "PersistentVolumeClaim")["phase"] == "Pending"
    reason, message = ("ProvisioningFailed", 'storageclass.storage.k8s.io "fast" not found')
    if not name:
        reason = "FailedBinding"
        message = "no persistent volumes available for this claim and no storage class is set"
    assert namespace.events(reason) == [message]
    assert "unbound immediate PersistentVolumeClaims" in namespace.events("FailedScheduling")[0]


@pytest.mark.parametrize(
    ("reason", "phase", "event"),
    [
        ("ImagePullBackOff", "Pending", "Error: ImagePullBackOff"),
        ("ErrImageNeverPull", "Pending", "Error: ErrImageNeverPull"),
        ("InvalidImageName", "Pending", 'Failed to apply default image tag "example/main:1"'),
        ("CrashLoopBackOff", "Running", "Back-off restarting failed container main in pod web-0_"),
        (
            "CreateContainerConfigError",
            "Pending",
            "Error: container has runAsNonRoot and image will",
        ),
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


HOST_PORTS = [{"containerPort": 80, "hostPort": 80}, {"containerPort": 81, "hostPort": 81}]
TWO_VOLUMES = {
    "volumes": [
        {"name": "a", "hostPath": {"path": "/"}},
        {"name": "b", "nfs": {"server": "n", "path": "/"}},
    ]
}
HOST_VOLUME = {"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}
HOST_POD = HOST_VOLUME | {"containers": [container()], "restartPolicy": "Never"}
ROOT = RESTRICTED | {"runAsUser": 0, "runAsNonRoot": True}
ADDING = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"], "add": ["NET_RAW"]}}


@pytest.mark.parametrize(
    ("pod", "fields", "why"),
    [
        (
            {},
            {"securityContext": {"capabilities": {"drop": ["ALL"]}}},
            'allowPrivilegeEscalation != false (container "main" must set '
            "securityContext.allowPrivilegeEscalation=false)",
        ),
        (
            {},
            {"securityContext": {"allowPrivilegeEscalation": False}},
            'unrestricted capabilities (container "main" must set '
            'securityContext.capabilities.drop=["ALL"])',
        ),
        (
            {},
            {"securityContext": ADDING},
            'unrestricted capabilities (container "main" must not include "NET_RAW" in '
            "securityContext.capabilities.add)",
        ),
        (
            {"securityContext": {"seccompProfile": {"type": "RuntimeDefault"}}},
            {},
            'runAsNonRoot != true (pod or container "main" must set '
            "securityContext.runAsNonRoot=true)",
        ),
        (
            {"securityContext": {"runAsNonRoot": True}},
            {},
            'seccompProfile (pod or container "main" must set securityContext.seccompProfile.type '
            'to "RuntimeDefault" or "Localhost")',
        ),
        ({}, {"securityContext": ROOT}, 'runAsUser=0 (container "main" must not set runAsUser=0)'),
        (
            {"securityContext": RESTRICTED_POD | {"runAsUser": 0}},
            {},
            "runAsUser=0 (pod must not set runAsUser=0)",
        ),
        (
            HOST_VOLUME,
            {},
            'restricted volume types (volume "v" uses restricted volume type "hostPath")',
        ),
        (
            {"hostNetwork": True, "hostPID": True},
            {},
            "host namespaces (hostNetwork=true, hostPID=true)",
        ),
        (
            {},
            {"ports": HOST_PORTS[:1]},
            'hostPort (container "main" uses hostPort 80)',
        ),
        (
            {"initContainers": [container(name="init", ports=HOST_PORTS)]},
            {"ports": HOST_PORTS},
            'hostPort (containers "init", "main" use hostPorts 80, 81)',
        ),
        (
            TWO_VOLUMES,
            {},
            'restricted volume types (volumes "a", "b" use restricted volume types "hostPath", '
            '"nfs")',
        ),
        (
            {},
            {"securityContext": RESTRICTED | {"privileged": True}},
            'privileged (container "main" must not set securityContext.privileged=true)',
        ),
        (
            {},
            {"securityContext": RESTRICTED | {"runAsNonRoot": False}},
            'runAsNonRoot != true (container "main" must not set '
            "securityContext.runAsNonRoot=false)",
        ),
        (
            {"initContainers": [container(name="init", securityContext={})]},
            {},
            'allowPrivilegeEscalation != false (container "init" must set '
            "securityContext.allowPrivilegeEscalation=false), unrestricted capabilities (container "
            '"init" must set securityContext.capabilities.drop=["ALL"])',
        ),
    ],
)
def test_the_restricted_standard(
    namespace: Namespace, pod: Object, fields: Object, why: str
) -> None:
    namespace.create("StatefulSet", stateful_set(pod=pod, **fields))
    assert namespace.events("FailedCreate") == [
        'create Pod web-0 in StatefulSet web failed error: pods "web-0" is forbidden: violates '
        f'PodSecurity "restricted:latest": {why}'
    ]
    assert namespace.names("Pod") == []
    assert namespace.status()["replicas"] == 0


def test_the_baseline_standard_and_a_warning(namespace: Namespace) -> None:
    levels = {"enforce": "baseline", "warn": "restricted"}
    labels = {f"pod-security.kubernetes.io/{mode}": level for mode, level in levels.items()}
    namespace.client.resources.get(kind="Namespace").patch(
        {"metadata": {"labels": labels}}, name=namespace.name, content_type=MERGE
    )
    answer = namespace.create("StatefulSet", stateful_set(securityContext={}), serialize=False)
    assert 'would violate PodSecurity \\"restricted:latest\\"' in answer.headers["Warning"]
    assert namespace.status()["readyReplicas"] == 1
    namespace.create("Job", job() | {"spec": {"template": {"spec": HOST_POD}}})
    (refusal,) = namespace.events("FailedCreate")
    assert refusal.endswith('violates PodSecurity "baseline:latest": hostPath volumes (volume "v")')


def test_a_quota_of_pods(namespace: Namespace) -> None:
    namespace.create(
        "ResourceQuota", {"metadata": {"name": "few"}, "spec": {"hard": {"pods": "1"}}}
    )
    namespace.create("StatefulSet", stateful_set({"replicas": 2}))
    assert namespace.status()["readyReplicas"] == 1
    assert namespace.events("FailedCreate") == [
        'create Pod web-1 in StatefulSet web failed error: pods "web-1" is forbidden: exceeded '
        "quota: few, requested: pods=1, used: pods=1, limited: pods=1"
    ]
    namespace.patch("ResourceQuota", "few", {"spec": {"hard": {"pods": "2"}}})
    assert namespace.status()["readyReplicas"] == 2


def test_a_job_completes_or_fails(namespace: Namespace, stand_in: StandIn) -> None:
    namespace.create("Job", job())
    status = namespace.status("once", "Job")
    assert status["succeeded"] == 1
    assert status["conditions"][-1]["type"] == "Complete"
    (pod,) = namespace.select("Pod", label_selector="batch.kubernetes.io/job-name=once")
    assert pod["status"]["phase"] == "Succeeded"

    stand_in.ask("never-ready", {"twice": "Error"})
    namespace.create("Job", job() | {"metadata": {"name": "twice"}})
    failed = namespace.status("twice", "Job")["conditions"][-1]
    assert (failed["type"], failed["reason"]) == ("Failed", "BackoffLimitExceeded")
    namespace.delete("Job", "once")
    assert len(namespace.names("Pod")) == 1


def test_a_deployment_keeps_old_pods_until_new_ones_are_ready(
    namespace: Namespace, stand_in: StandIn
) -> None:
    body = stateful_set()
    del body["spec"]["serviceName"]
    namespace.create("Deployment", body)
    assert namespace.status(kind="Deployment")["availableReplicas"] == 1
    (old,) = namespace.names("Pod")
    stand_in.ask("never-ready", {"web": "ImagePullBackOff"})
    stand_in.ask("never-ready", {})
    namespace.patch(
        "Deployment", "web", {"spec": {"template": {"spec": {"serviceAccountName": "x"}}}}
    )
    assert namespace.names("Pod") == [old]
    assert "Error creating: pods" in namespace.events("FailedCreate")[0]
    namespace.create("ServiceAccount", {"metadata": {"name": "x"}})
    assert len(namespace.names("Pod")) == 1
    assert namespace.names("Pod") != [old]
    assert namespace.status(kind="Deployment")["observedGeneration"] == 2


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
    stand_in.ask("never-ready", {"web": "ImagePullBackOff"})
    assert refused(log)[1].endswith("is waiting to start: trying and failing to pull image")


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
    assert client.resources.get(kind="PersistentVolume").get().items == []
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


def test_a_level_that_is_none_is_refused(client: DynamicClient) -> None:
    labels = {"pod-security.kubernetes.io/enforce": "restrictive"}
    body = {"metadata": {"name": "typo", "labels": labels}}
    code, message = refused(client.resources.get(kind="Namespace").create, body)
    assert code == 422
    assert message.endswith("must be one of privileged, baseline, restricted")


# --- the process, and Ansible ---------------------------------------------------------------------


def test_it_runs_in_the_background_and_ends_on_sigterm(tmp_path: Path) -> None:
    kubeconfig, pidfile = tmp_path / "kubeconfig", tmp_path / "pid"
    options: list[str | Path] = ["--detach", "--kubeconfig", kubeconfig, "--pidfile", pidfile]
    options += ["--kubernetes-version", "1.33", "--never-ready"]
    done = subprocess.run(**command(*options, "a=NotReady"), check=True, capture_output=True)
    pid = int(pidfile.read_text())
    waiting = os.pidfd_open(pid)
    try:
        configured = kubernetes.config.new_client_from_config(str(kubeconfig))
        assert configured.configuration.host == done.stdout.strip()
        version = kubernetes.client.VersionApi(configured).get_code()
        assert version.git_version == "v1.33.0"
    finally:
        signal.pidfd_send_signal(waiting, signal.SIGTERM)
        ended, _, _ = select.select([waiting], [], [], 10)
        os.close(waiting)
    assert ended
    done = subprocess.run(**command(*options, "a=Tired"), capture_output=True, check=False)
    assert done.returncode == 1
    assert "no such reason: Tired" in done.stderr


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
