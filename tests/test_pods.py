"""The pods of playbooks/local.yml, really started: do their programs live with what they are given?

Real are the manifests, as the playbooks apply them to a stand-in for a cluster's API; the image of
the collector; the containers of Podman or Docker, with the users, rights, files and limits of the
manifests (`kubelet` says how, and what is not as in a cluster: above all, there is one network and
no NetworkPolicy); and what passes between the programs.

The images of Mosquitto, PostgreSQL and Prometheus are those that the manifests name where they can
be pulled, and otherwise ones of Debian's packages that agree with them in users, entrypoints and
signals. Prometheus is told where the collector is, as it finds it through the API of a cluster.

Grafana is left out: there is no stand-in for its image, which is in no Debian package.
"""

from __future__ import annotations

import copy
import re
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psycopg2
import pytest
import yaml
from cluster import Cluster, Object, pod_spec
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from testing.collector import Collector
from testing.engines import Engine, EngineError, service_images
from testing.kubelet import Kubelet, Pod
from testing.kubernetes_api.process import running
from testing.publisher import Publisher
from testing.service import HOST, PATIENCE, eventually, free_port

pytestmark = pytest.mark.timeout(900)  # seconds: images are made at first

USERS = {"mosquitto": 1883, "postgres": 999, "collector": 10001, "prometheus": 65534}
PORTS = {
    "mosquitto": "mosquitto_port",
    "postgres": "postgres_port",
    "collector": "collector_http_port",
    "prometheus": "prometheus_port",
}
TOPIC = "iot/data"
REFUSED = 0x87  # MQTT 5: not authorized


@dataclass
class Listener:
    """Where the broker is, for `Publisher`."""

    port: int


class System:
    """All pods, and ways to look at them from outside."""

    def __init__(self, kubelet: Kubelet, workloads: dict[str, Object], job: Object) -> None:
        self.kubelet = kubelet
        self.workloads = workloads
        self.job = job
        self.pods: dict[str, Pod] = {}
        self.passwords = {
            name: value.decode() for name, value in kubelet.data("Secret", "iot-passwords").items()
        }

    def port(self, component: str) -> int:
        (container,) = pod_spec(self.workloads[component])["containers"]
        port: int = container["ports"][0]["containerPort"]
        return port

    def start(self, component: str) -> Pod:
        pod = self.pods[component] = self.kubelet.start(self.workloads[component])
        pod.main.wait_ready()
        return pod

    def device(self) -> Publisher:
        password = self.passwords["simulator_mqtt_password"]
        return Publisher(Listener(self.port("mosquitto")), "iot-simulator", password)

    def send(self, payloads: set[bytes]) -> None:
        """Publish as a device."""
        with self.device() as device:
            for payload in payloads:
                device.publish(TOPIC, payload)
            assert device.settle() == payloads

    def stored(self) -> list[bytes]:
        """The payloads in the table, as a reader sees it."""
        with (
            closing(
                psycopg2.connect(
                    host=HOST,
                    port=self.port("postgres"),
                    dbname="iot",
                    user="iot_reader",
                    password=self.passwords["reader_db_password"],
                )
            ) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute("SELECT payload FROM messages")
            return [bytes(payload) for (payload,) in cursor.fetchall()]

    def wait_stored(self, payloads: set[bytes]) -> None:
        """Wait until all are in the table; each has to be there once."""
        eventually(lambda: payloads <= {*self.stored()}, what="all messages are in the table")
        assert len(found := [p for p in self.stored() if p in payloads]) == len(payloads), found


def render(folder: Path) -> tuple[list[Object], Object]:
    """Return what the playbooks apply: all objects, and the Job of verify among them."""
    ports = {variable: free_port() for variable in PORTS.values()}
    with running(folder / "kubeconfig") as stand_in, ThreadPoolExecutor() as executor:
        cluster = Cluster(stand_in)
        done = cluster.run("local", **ports)
        assert done.returncode == 0, done.stdout
        verify: Future[Any] = executor.submit(cluster.run, "verify")

        def with_job() -> list[Object]:  # it is removed as soon as it has ended
            assert not verify.done() or verify.result().returncode == 0, verify.result().stdout
            objects = cluster.objects()
            return objects if any(o["kind"] == "Job" for o in objects) else []

        objects = eventually(with_job, 90, "verify.yml has started its job")
        assert verify.result().returncode == 0, verify.result().stdout
    (job,) = (o for o in objects if o["kind"] == "Job")
    return objects, job


def set_collector_address(objects: list[Object], port: int) -> None:
    """Let Prometheus look for the collector there, instead of asking the API for its pods."""
    (config,) = (o["data"] for o in objects if "prometheus.yml" in (o.get("data") or {}))
    prometheus = yaml.safe_load(config["prometheus.yml"])
    (job,) = (j for j in prometheus["scrape_configs"] if "kubernetes_sd_configs" in j)
    del job["kubernetes_sd_configs"], job["relabel_configs"]
    job["static_configs"] = [{"targets": [f"{HOST}:{port}"]}]
    config["prometheus.yml"] = yaml.safe_dump(prometheus)


@pytest.fixture(scope="module")
def system(
    engine: Engine, image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[System]:
    """Everything, ready; the tests leave it so."""
    folder = tmp_path_factory.mktemp("pods")
    objects, job = render(folder)
    workloads = {o["metadata"]["name"]: o for o in objects if o["kind"] == "StatefulSet"}
    names = {name: pod_spec(workloads[name])["containers"][0]["image"] for name in USERS}
    own = names.pop("collector")
    try:
        found = service_images(engine, names, folder)
    except EngineError as error:
        pytest.skip(str(error))
    images = {names[name]: found[name] for name in names} | {own: image}
    kubelet = Kubelet(engine, objects, images, folder)
    system = System(kubelet, workloads, job)
    set_collector_address(objects, system.port("collector"))
    try:
        for component in USERS:
            system.start(component)
        yield system
    finally:
        kubelet.close()


class Session:
    """A connection to the broker, which notes the reasons and messages that it is given."""

    def __init__(self, port: int, user: str | None = None, password: str | None = None) -> None:
        self.reasons: list[int] = []
        self.messages: list[bytes] = []
        self.client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self.client.username_pw_set(user, password)
        self.client.on_connect = lambda _c, _u, _f, reason, _p: self.reasons.append(reason.value)
        self.client.on_subscribe = lambda _c, _u, _m, reasons, _p: self.reasons.append(
            reasons[0].value
        )
        self.client.on_publish = lambda _c, _u, _m, reason, _p: self.reasons.append(reason.value)
        self.client.on_message = lambda _c, _u, m: self.messages.append(bytes(m.payload))
        self.client.connect(HOST, port)
        self.connected = self._reason()

    def __enter__(self) -> Self:
        assert self.connected == 0
        return self

    def __exit__(self, *_: object) -> None:
        self.client.disconnect()

    def _reason(self) -> int:
        def asked() -> bool:
            self.client.loop(0.1)
            return bool(self.reasons)

        eventually(asked, what="the broker answers")
        return self.reasons.pop(0)

    def subscribe(self) -> int:
        self.client.subscribe(TOPIC, qos=1)
        return self._reason()

    def publish(self, payload: bytes) -> int:
        self.client.publish(TOPIC, payload, qos=1)
        return self._reason()

    def received(self, seconds: float) -> list[bytes]:
        """What has come so far, or comes in that time."""
        until = time.monotonic() + seconds
        while not self.messages and time.monotonic() < until:
            self.client.loop(0.1)
        return self.messages


def payloads(count: int) -> set[bytes]:
    """Return payloads that nobody has sent before."""
    word = uuid.uuid4().hex
    return {f"{word}:{number}".encode() for number in range(count)}


def stop(pod: Pod) -> None:
    """End a pod, which has to take far less time than it is given."""
    status, seconds = pod.stop()
    assert status == 0, pod.log()
    assert seconds < pod.spec["terminationGracePeriodSeconds"] / 2


@pytest.mark.parametrize("component", USERS)
def test_processes_have_no_rights(system: System, component: str) -> None:
    found = system.kubelet.engine.effective_rights(system.pods[component].main.id)
    user = str(USERS[component])
    assert {*found["Uid"].split(), *found["Gid"].split()} == {user}
    assert user in found["Groups"].split()
    assert int(found["CapEff"], 16) == int(found["CapBnd"], 16) == 0
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")


def test_the_broker_knows_its_clients(system: System) -> None:
    port = system.port("mosquitto")
    hashed = system.pods["mosquitto"].exec("cat", "/run/mosquitto/passwd")
    assert re.findall(r"^([\w-]+):\$7\$", hashed, re.MULTILINE) == [
        "iot-collector",
        "iot-simulator",
    ]
    assert not [p for p in system.passwords.values() if p in hashed]

    assert Session(port).connected == REFUSED
    assert Session(port, "iot-simulator", "a guess").connected == REFUSED
    (payload,) = payloads(1)
    with (
        Session(port, "iot-simulator", system.passwords["simulator_mqtt_password"]) as device,
        Session(port, "iot-collector", system.passwords["collector_mqtt_password"]) as collector,
    ):
        # An ACL file lets everybody subscribe, and decides about each message.
        assert device.subscribe() == collector.subscribe() == 1
        assert device.publish(payload) == 0
        assert collector.received(PATIENCE) == [payload]
        assert device.received(1) == []
        assert collector.publish(b"from the collector") == REFUSED
    system.wait_stored({payload})
    assert b"from the collector" not in system.stored()


def test_probes_leave_nothing_in_the_brokers_log(system: System) -> None:
    broker = system.pods["mosquitto"].main
    before = broker.log().count("New connection from")
    assert broker.ready()
    system.send(payloads(1))  # a device's connection is logged
    eventually(lambda: broker.log().count("New connection from") > before)
    assert broker.log().count("New connection from") == before + 1


def test_the_collector_is_its_pod(system: System) -> None:
    clients = re.findall(r" as (\S+) \(.*u'iot-collector'", system.pods["mosquitto"].log())
    assert "collector-0" in clients
    assert "applied" in system.pods["collector"].init[0].log()


def test_verify_follows_a_message(system: System) -> None:
    pod = system.kubelet.start(system.job)
    assert pod.main.wait(120) == 0, pod.log()
    assert pod.log().splitlines()[1:-1] == [
        "it is in the table, once",
        "the collector has counted it and accounts for every message",
        "Prometheus has seen it",
    ]
    assert re.search("[1-9].* alert rules are loaded and none fails", pod.log())


def changed(workload: Object, **environment: str) -> Object:
    """Return a workload with other settings."""
    workload = copy.deepcopy(workload)
    (container,) = pod_spec(workload)["containers"]
    container["env"] += [{"name": name, "value": value} for name, value in environment.items()]
    return workload


def test_from_one_collector_to_two_and_back(system: System, tmp_path: Path) -> None:
    share = {"IOT_MQTT_TOPICS": f"$share/collectors/{TOPIC}"}  # as with collector_replicas=2
    own = system.workloads["collector"]
    port = free_port()  # the first one has the other: they are in one network here
    second = changed(own, IOT_HTTP_PORT=str(port), **share)
    pod_spec(second)["containers"][0]["ports"][0]["containerPort"] = port
    stop(system.pods["collector"])
    first = system.kubelet.start(changed(own, **share))
    other = system.kubelet.start(second, ordinal=1)
    for pod in (first, other):
        pod.main.wait_ready()
    system.send(sent := payloads(200))
    system.wait_stored(sent)
    received = [
        Collector(tmp_path, IOT_HTTP_PORT=str(p)).metrics()["mqtt_messages_total"]
        for p in (system.port("collector"), port)
    ]
    assert sum(received) == len(sent)
    assert min(received) > len(sent) / 4

    stop(other)
    # It has left the group: nothing waits for it.
    system.send(sent := payloads(20))
    system.wait_stored(sent)
    stop(first)
    system.send(sent := payloads(20))
    system.start("collector")
    system.wait_stored(sent)


@pytest.mark.parametrize("component", ["postgres", "collector", "prometheus"])
def test_a_new_pod_goes_on(system: System, component: str) -> None:
    """What was stored stays, and what is sent while there is no pod is stored afterwards."""
    system.send(sent := payloads(20))
    system.wait_stored(sent)
    stop(system.pods[component])
    system.send(meanwhile := payloads(20))
    system.start(component)
    system.wait_stored(sent | meanwhile)


def test_the_broker_keeps_sessions_and_queues(system: System) -> None:
    stop(system.pods["collector"])
    system.send(before := payloads(20))
    stop(system.pods["mosquitto"])
    system.start("mosquitto")
    system.send(after := payloads(20))  # for a session that is there again, and nobody connected
    system.start("collector")
    system.wait_stored(before | after)


def test_nobody_tried_what_is_not_allowed(system: System) -> None:
    faults = r"read-only file system|permission denied|operation not permitted"
    log = system.kubelet.logs()
    assert len(log.splitlines()) > 50
    assert re.findall(f".*(?:{faults}).*", log, re.IGNORECASE) == []
