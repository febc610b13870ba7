"""The minikube role, run by ansible-playbook against a stand-in of minikube's command line.

The stand-in (minikube_cli/standin.py) says where its behaviour comes from and what of it is not
verified. The PATH holds nothing but the stand-in and the few programs that the role calls, so that
a minikube, docker or kubectl of this machine plays no part. Ansible takes long to start, so one run
serves several machines, each with a stand-in of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_validate.utils import all_versions

HERE = Path(__file__).parent / "minikube_cli"
ROOT = Path(__file__).parent.parent
PROGRAMS = ("minikube", "docker", "kubectl")
IMAGE = "iot-collector:0123456789ab"
# What a cluster has that the role's defaults have made.
CONFIG = {
    "Name": "iot-system",
    "Driver": "docker",
    "CPUs": 2,
    "Memory": 4096,
    "KubernetesConfig": {"KubernetesVersion": "v1.35.1", "CNI": "calico"},
    "Addons": {"default-storageclass": True, "storage-provisioner": True, "metrics-server": True},
}


class Machine:
    """A machine with the stand-in installed; the attributes say how the last run on it went.

    changed: how many tasks; failed: whether one; said: every message that was shown.
    """

    changed: int
    failed: bool
    said: str

    def __init__(self, path: Path, **variables: object) -> None:
        self.path = path
        self.variables: dict[str, object] = {
            "machine": str(path),
            "steps": ["up"],
            "minikube_force": os.geteuid() == 0,
        } | variables
        (path / "bin").mkdir(parents=True)
        for name in PROGRAMS:
            self.install(name, HERE / "standin.py")
        for name in ("which", "timeout", "sh", "env"):
            self.install(name, str(shutil.which(name)))
        self.install("python3", sys.executable)
        self.disk(free=20)

    def install(self, name: str, program: str | Path) -> None:
        self.remove(name)
        (self.path / "bin" / name).symlink_to(program)

    def remove(self, *names: str) -> None:
        for name in names:
            (self.path / "bin" / name).unlink(missing_ok=True)

    def script(self, name: str, text: str) -> None:
        self.remove(name)
        (self.path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.path / "bin" / name).chmod(0o755)

    def disk(self, free: int) -> None:
        """GiB, as df reports them."""
        self.script("df", f"echo Filesystem\necho /dev/sda1 9 9 {free << 20} 9% /")

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.path / "state.json").read_text())
        return state

    def set(self, **values: object) -> None:
        (self.path / "state.json").write_text(json.dumps(values))

    def has_cluster(self, host: str = "Running") -> None:
        self.set(profiles={"iot-system": {"host": host, "config": CONFIG}})

    @property
    def changes(self) -> list[str]:
        """The calls so far that change something, without what they were given."""
        log = self.path / "calls.log"
        lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        asking = {"info", "version", "list", "status", "ls"}
        return [
            " ".join(word for word in words if not word.startswith(("--", "/")))
            for words in lines
            if not asking & set(words)
        ]


def play(*machines: Machine, options: tuple[str, ...] = ()) -> None:
    """Run the playbook on all of them; the exit code is that of the worst."""
    inventory = machines[0].path / "inventory.json"
    hosts = {
        f"machine{number}": machine.variables
        | {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
        for number, machine in enumerate(machines)
    }
    inventory.write_text(json.dumps({"all": {"hosts": hosts}}))
    done = subprocess.run(
        [
            Path(sys.executable).with_name("ansible-playbook"),
            f"--inventory={inventory}",
            *options,
            HERE / "playbook.yml",
        ],
        cwd=ROOT,
        env=os.environ | {"ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json", "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    report = json.loads(done.stdout)
    for host, machine in zip(hosts, machines, strict=True):
        results = [
            task["hosts"][host]
            for part in report["plays"]
            for task in part["tasks"]
            if host in task["hosts"]
        ]
        messages = [result["msg"] for result in results if "msg" in result]
        machine.said = "\n".join(m if isinstance(m, str) else "\n".join(m) for m in messages)
        machine.changed = report["stats"][host]["changed"]
        machine.failed = report["stats"][host]["failures"] > 0


def test_the_manifests_can_be_checked_for_the_kubernetes_of_the_defaults() -> None:
    defaults = yaml.safe_load((ROOT / "roles/minikube/defaults/main.yml").read_text())
    version = defaults["minikube_kubernetes_version"].removeprefix("v").split(".")
    assert version[:2] in [known.split(".")[:2] for known in all_versions()]


def test_a_cluster_is_started_once(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    play(machine)
    assert not machine.failed, machine.said
    assert machine.changed == 2
    assert "context: iot-system" in machine.said
    assert machine.changes == ["minikube start", "minikube addons enable metrics-server"]
    config = machine.state["profiles"]["iot-system"]["config"]
    assert (config["Driver"], config["CPUs"], config["Memory"]) == ("docker", 2, 4096)
    assert config["KubernetesConfig"] == {
        "KubernetesVersion": "v1.35.1",
        "ContainerRuntime": "containerd",
        "CNI": "calico",
    }
    # Other defaults some day: what is there keeps its version.
    machine.variables["minikube_kubernetes_version"] = "v1.36.0"
    play(machine)
    assert (machine.failed, machine.changed) == (False, 0)
    assert "keeps Kubernetes v1.35.1" in machine.said
    assert len(machine.changes) == 2


def test_a_cluster_that_does_not_run_is_started(tmp_path: Path) -> None:
    """Stopped, or without its container; it keeps what it has."""
    machines = [
        Machine(tmp_path / host, minikube_kubernetes_version="v1.36.0")
        for host in ("Stopped", "Nonexistent")
    ]
    for machine in machines:
        machine.has_cluster(machine.path.name)
    play(*machines)
    for machine in machines:
        assert (machine.failed, machine.changes) == (False, ["minikube start"]), machine.said
        assert machine.state["profiles"]["iot-system"] == {"host": "Running", "config": CONFIG}


def test_a_check_changes_nothing(tmp_path: Path) -> None:
    new = Machine(
        tmp_path / "new",
        steps=["up", "build"],
        minikube_image=IMAGE,
        minikube_image_context=str(tmp_path),
        minikube_image_file="Dockerfile",
    )
    down = Machine(tmp_path / "down", steps=["teardown"], minikube_delete="true")
    down.has_cluster()
    play(new, down, options=("--check",))

    assert "Would start the minikube profile iot-system, which would be new" in new.said
    assert f"Would build {IMAGE}" in new.said
    assert (new.failed, new.changed, new.changes) == (False, 2, [])
    assert "Would delete the minikube profile iot-system" in down.said
    assert (down.failed, down.changed, down.changes) == (False, 1, [])


Prepare = Callable[[Machine], object]
STOPS: dict[str, tuple[Prepare, list[str]]] = {
    "nothing installed": (
        lambda machine: machine.remove(*PROGRAMS),
        [
            "minikube, see https://minikube.sigs.k8s.io/docs/start/",
            "kubectl, see https://kubernetes.io/docs/tasks/tools/",
            "docker, see https://docs.docker.com/engine/install/",
            "make up",
        ],
    ),
    "no kubectl": (lambda machine: machine.remove("kubectl"), ["machine:\n  kubectl, see http"]),
    "old minikube": (
        lambda machine: machine.set(version="v1.37.0"),
        ["This is minikube v1.37.0, and 1.38.0 or newer is needed", "make up"],
    ),
    "docker stopped": (
        lambda machine: machine.set(docker="down"),
        ["Cannot connect to the Docker daemon", "sudo systemctl start docker", "make up"],
    ),
    "docker closed to the user": (
        lambda machine: machine.set(docker="denied"),
        ["permission denied", "--groups docker", "make up"],
    ),
    "little memory": (
        lambda machine: machine.set(info={"MemTotal": 2 << 30}),
        ["4096 MiB", "Docker has 4 processors and 2048 MiB"],
    ),
    "little disk": (
        lambda machine: machine.disk(free=5),
        ["needs 8 GiB in /, where 5 GiB are free"],
    ),
    "damaged cluster": (
        lambda machine: machine.set(invalid=["iot-system"]),
        ["minikube delete -p iot-system"],
    ),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Machine]:
    """A machine for each of STOPS and of the tests below, after the run."""
    machines = {
        name: Machine(tmp_path_factory.mktemp("machine"))
        for name in (*STOPS, "other size", "failing start", "endless start", "root")
    }
    for name, (prepare, _) in STOPS.items():
        prepare(machines[name])
    machines["other size"].has_cluster()
    machines["other size"].variables |= {"minikube_cpus": 3, "minikube_cni": "flannel"}
    machines["failing start"].set(fails=["start"])
    machines["endless start"].script("timeout", "exit 124")
    machines["root"].variables["minikube_force"] = False
    play(*machines.values())
    return machines


@pytest.mark.parametrize("name", STOPS)
def test_what_is_wrong_is_said_before_anything_is_changed(
    stopped: dict[str, Machine], name: str
) -> None:
    machine = stopped[name]
    assert machine.failed
    for text in STOPS[name][1]:
        assert text in machine.said
    assert machine.changes == []


def test_a_cluster_of_other_size_is_left_alone(stopped: dict[str, Machine]) -> None:
    machine = stopped["other size"]
    assert machine.failed
    assert "minikube_cpus is 3, the cluster has 2" in machine.said
    assert "minikube_cni is flannel, the cluster has calico" in machine.said
    assert "-e minikube_cpus=2 -e minikube_cni=calico" in machine.said
    assert "minikube_memory" not in machine.said
    assert machine.changes == []


def test_a_failed_start_is_explained(stopped: dict[str, Machine]) -> None:
    machine = stopped["failing start"]
    assert machine.failed
    assert "could not start the cluster (exit code 105)" in machine.said
    assert "K8S_APISERVER_MISSING" in machine.said
    assert "Suggestion: Check that" in machine.said
    assert "minikube logs -p iot-system" in machine.said
    # What it leaves is the stopped cluster of the test above, which the next run starts.
    assert machine.state["profiles"]["iot-system"]["host"] == "Stopped"


def test_a_start_has_an_end(stopped: dict[str, Machine]) -> None:
    assert stopped["endless start"].failed
    assert "has not started the cluster within 900 s" in stopped["endless start"].said


@pytest.mark.skipif(os.geteuid() != 0, reason="minikube refuses only root")
def test_root_is_refused(stopped: dict[str, Machine]) -> None:
    assert stopped["root"].failed
    assert "as an ordinary user of the group docker" in stopped["root"].said
    assert stopped["root"].changes == []


def test_an_image_is_built_once(tmp_path: Path) -> None:
    image = {
        "steps": ["build"],
        "minikube_image": IMAGE,
        "minikube_image_context": str(tmp_path),
        "minikube_image_file": "Dockerfile",
    }
    (tmp_path / "Dockerfile").touch()
    good, bad = Machine(tmp_path / "good", **image), Machine(tmp_path / "bad", **image)
    good.has_cluster()
    bad.set(profiles={"iot-system": {"host": "Running", "config": CONFIG}}, fails=["build"])
    play(good, bad)
    assert (good.failed, good.changed) == (False, 1)
    assert good.state["images"] == [f"registry.example/library/{IMAGE}"]

    # Although minikube has said that it succeeded.
    assert bad.failed
    assert f"{IMAGE} was not built from {tmp_path}/Dockerfile" in bad.said
    assert "did not complete successfully: exit code: 1" in bad.said

    play(good)
    assert (good.failed, good.changed) == (False, 0)
    assert good.changes == ["minikube image build"]


def test_teardown(tmp_path: Path) -> None:
    down = {"steps": ["teardown"]}
    kept = Machine(tmp_path / "kept", **down)
    # As `-e minikube_delete=true` gives it.
    gone = Machine(tmp_path / "gone", **down, minikube_delete="true")
    none = Machine(tmp_path / "none", **down, minikube_delete="true")
    kept.has_cluster()
    gone.has_cluster()
    none.remove("minikube")

    play(kept, gone, none)
    assert "minikube stop -p iot-system" in kept.said
    assert "-e minikube_delete=true" in kept.said
    assert (kept.failed, kept.changed, kept.changes) == (False, 0, [])
    assert "There is no minikube profile iot-system" in none.said
    assert (none.failed, none.changed) == (False, 0)
    assert (gone.failed, gone.changed, gone.changes) == (False, 1, ["minikube delete"])
    assert gone.state["profiles"] == {}

    play(gone)
    assert "There is no minikube profile iot-system" in gone.said
    assert (gone.failed, gone.changed, gone.changes) == (False, 0, ["minikube delete"])
