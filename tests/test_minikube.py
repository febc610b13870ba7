"""The minikube role against a stand-in for the command lines of minikube, docker and kubectl.

The docstring of the stand-in (minikube_cli/standin.py) has its sources, and what is not verified.
PATH contains only the stand-in and the few programs that the role calls, so that a minikube, docker
or kubectl of this machine is not used. Ansible starts slowly, so one run serves several machines,
each with its own stand-in.
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
# The configuration of a cluster that was started with the role's defaults.
CONFIG = {
    "Name": "iot-system",
    "Driver": "docker",
    "CPUs": 2,
    "Memory": 4096,
    "KubernetesConfig": {"KubernetesVersion": "v1.35.1", "CNI": "calico"},
    "Addons": {"default-storageclass": True, "storage-provisioner": True, "metrics-server": True},
}


class Machine:
    """A machine with the stand-in installed, and the result of the last run on it.

    changed: the number of changed tasks; failed: whether a task failed; messages: all messages.
    """

    changed: int
    failed: bool
    messages: str

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
        """Make df report this free space in GiB."""
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
        """The calls so far that change something, without options and paths."""
        log = self.path / "calls.log"
        lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        asking = {"info", "version", "list", "status", "ls"}
        return [
            " ".join(word for word in words if not word.startswith(("--", "/")))
            for words in lines
            if not asking & set(words)
        ]


def play(*machines: Machine, options: tuple[str, ...] = ()) -> None:
    """Run the playbook on all machines, and set their results."""
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
        shown = [result["msg"] for result in results if "msg" in result]
        machine.messages = "\n".join(m if isinstance(m, str) else "\n".join(m) for m in shown)
        machine.changed = report["stats"][host]["changed"]
        machine.failed = report["stats"][host]["failures"] > 0


def test_manifests_can_be_validated_for_the_default_kubernetes() -> None:
    defaults = yaml.safe_load((ROOT / "roles/minikube/defaults/main.yml").read_text())
    version = defaults["minikube_kubernetes_version"].removeprefix("v").split(".")
    assert version[:2] in [known.split(".")[:2] for known in all_versions()]


def test_cluster_is_started_once(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    play(machine)
    assert not machine.failed, machine.messages
    assert machine.changed == 2
    assert "context: iot-system" in machine.messages
    assert machine.changes == ["minikube start", "minikube addons enable metrics-server"]
    config = machine.state["profiles"]["iot-system"]["config"]
    assert (config["Driver"], config["CPUs"], config["Memory"]) == ("docker", 2, 4096)
    assert config["KubernetesConfig"] == {
        "KubernetesVersion": "v1.35.1",
        "ContainerRuntime": "containerd",
        "CNI": "calico",
    }
    # An existing cluster keeps its version when the default changes.
    machine.variables["minikube_kubernetes_version"] = "v1.36.0"
    play(machine)
    assert (machine.failed, machine.changed) == (False, 0)
    assert "keeps Kubernetes v1.35.1" in machine.messages
    assert len(machine.changes) == 2


def test_stopped_cluster_is_started(tmp_path: Path) -> None:
    """It is stopped, or its container is missing. Its configuration is kept."""
    machines = [
        Machine(tmp_path / host, minikube_kubernetes_version="v1.36.0")
        for host in ("Stopped", "Nonexistent")
    ]
    for machine in machines:
        machine.has_cluster(machine.path.name)
    play(*machines)
    for machine in machines:
        assert (machine.failed, machine.changes) == (False, ["minikube start"]), machine.messages
        assert machine.state["profiles"]["iot-system"] == {"host": "Running", "config": CONFIG}


def test_check_mode_changes_nothing(tmp_path: Path) -> None:
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

    assert "Would start the minikube profile iot-system, which would be new" in new.messages
    assert f"Would build {IMAGE}" in new.messages
    assert (new.failed, new.changed, new.changes) == (False, 2, [])
    assert "Would delete the minikube profile iot-system" in down.messages
    assert (down.failed, down.changed, down.changes) == (False, 1, [])


Prepare = Callable[[Machine], object]
OBSTACLES: dict[str, tuple[Prepare, list[str]]] = {
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
        ["This is minikube v1.37.0, but 1.38.0 or newer is needed", "make up"],
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
def failed_machines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Machine]:
    """A machine for each of OBSTACLES and for the tests below, after one run on all of them."""
    machines = {
        name: Machine(tmp_path_factory.mktemp("machine"))
        for name in (*OBSTACLES, "other size", "failing start", "endless start", "root")
    }
    for name, (prepare, _) in OBSTACLES.items():
        prepare(machines[name])
    machines["other size"].has_cluster()
    machines["other size"].variables |= {"minikube_cpus": 3, "minikube_cni": "flannel"}
    machines["failing start"].set(fails=["start"])
    machines["endless start"].script("timeout", "exit 124")
    machines["root"].variables["minikube_force"] = False
    play(*machines.values())
    return machines


@pytest.mark.parametrize("name", OBSTACLES)
def test_obstacle_is_explained_before_anything_is_changed(
    failed_machines: dict[str, Machine], name: str
) -> None:
    machine = failed_machines[name]
    assert machine.failed
    for text in OBSTACLES[name][1]:
        assert text in machine.messages
    assert machine.changes == []


def test_cluster_of_other_size_is_not_changed(failed_machines: dict[str, Machine]) -> None:
    machine = failed_machines["other size"]
    assert machine.failed
    assert "minikube_cpus is 3, the cluster has 2" in machine.messages
    assert "minikube_cni is flannel, the cluster has calico" in machine.messages
    assert "-e minikube_cpus=2 -e minikube_cni=calico" in machine.messages
    assert "minikube_memory" not in machine.messages
    assert machine.changes == []


def test_failed_start_is_explained(failed_machines: dict[str, Machine]) -> None:
    machine = failed_machines["failing start"]
    assert machine.failed
    assert "could not start the cluster (exit code 105)" in machine.messages
    assert "K8S_APISERVER_MISSING" in machine.messages
    assert "Suggestion: Check that" in machine.messages
    assert "minikube logs -p iot-system" in machine.messages
    # It leaves a stopped cluster, which the next run starts (see the test above).
    assert machine.state["profiles"]["iot-system"]["host"] == "Stopped"


def test_start_has_a_timeout(failed_machines: dict[str, Machine]) -> None:
    assert failed_machines["endless start"].failed
    assert "has not started the cluster within 900 s" in failed_machines["endless start"].messages


@pytest.mark.skipif(os.geteuid() != 0, reason="minikube refuses only root")
def test_root_is_refused(failed_machines: dict[str, Machine]) -> None:
    assert failed_machines["root"].failed
    assert "as an ordinary user of the group docker" in failed_machines["root"].messages
    assert failed_machines["root"].changes == []


def test_image_is_built_once(tmp_path: Path) -> None:
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

    # minikube exits with status 0 although the build failed.
    assert bad.failed
    assert f"{IMAGE} was not built from {tmp_path}/Dockerfile" in bad.messages
    assert "did not complete successfully: exit code: 1" in bad.messages

    play(good)
    assert (good.failed, good.changed) == (False, 0)
    assert good.changes == ["minikube image build"]


def test_teardown_deletes_the_cluster_only_when_confirmed(tmp_path: Path) -> None:
    down = {"steps": ["teardown"]}
    kept = Machine(tmp_path / "kept", **down)
    # A string, as from `-e minikube_delete=true`.
    gone = Machine(tmp_path / "gone", **down, minikube_delete="true")
    none = Machine(tmp_path / "none", **down, minikube_delete="true")
    kept.has_cluster()
    gone.has_cluster()
    none.remove("minikube")

    play(kept, gone, none)
    assert "minikube stop -p iot-system" in kept.messages
    assert "-e minikube_delete=true" in kept.messages
    assert (kept.failed, kept.changed, kept.changes) == (False, 0, [])
    assert "There is no minikube profile iot-system" in none.messages
    assert (none.failed, none.changed) == (False, 0)
    assert (gone.failed, gone.changed, gone.changes) == (False, 1, ["minikube delete"])
    assert gone.state["profiles"] == {}

    play(gone)
    assert "There is no minikube profile iot-system" in gone.messages
    assert (gone.failed, gone.changed, gone.changes) == (False, 0, ["minikube delete"])
