"""The built and installed collection works from an empty directory: playbooks and each role."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from ansible_runs import ROOT, run_ansible

from testing.kubernetes_api.process import running
from testing.service import free_port

pytestmark = pytest.mark.timeout(600)

COMPONENTS = ("mosquitto", "postgres", "collector", "prometheus", "grafana")
USED = yaml.safe_load((ROOT / "galaxy.yml").read_text())["dependencies"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that contains only an inventory and the collection in collections/."""
    path = tmp_path_factory.mktemp("elsewhere")
    done = run_ansible("ansible-galaxy", "collection", "build", "--output-path", path)
    assert done.returncode == 0, done.stdout
    (archive,) = path.glob("*.tar.gz")
    # Dependencies come with the `ansible` package.
    done = run_ansible(
        "ansible-galaxy",
        *("collection", "install", archive, "--no-deps"),
        *("--collections-path", path / "collections"),
        directory=path,
    )
    assert done.returncode == 0, done.stdout
    archive.unlink()
    hosts = {
        "ansible_connection": "local",
        "ansible_python_interpreter": "{{ ansible_playbook_python }}",
    }
    inventory = {
        "host": {"hosts": {"this": hosts}},
        "local": {"hosts": {"cluster": hosts}, "vars": {"iot_platform": "kubernetes"}},
    }
    (path / "ansible.cfg").write_text("")  # instead of the user's ansible.cfg
    (path / "hosts.yml").write_text(yaml.safe_dump(inventory))
    return path


def play(directory: Path, name: str | Path, *arguments: str, **variables: object) -> str:
    done = run_ansible(
        "ansible-playbook",
        *(name, "-i", "hosts.yml", "-e", json.dumps(variables), *arguments),
        directory=directory,
        ANSIBLE_COLLECTIONS_PATH=str(directory / "collections"),
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def play_per_role(directory: Path, hosts: str) -> Path:
    """A playbook with a play for each role, so that no role sees the defaults of another."""
    plays = [
        {
            "hosts": hosts,
            "gather_subset": ["!all", "min"],
            "module_defaults": {"group/kubernetes.core.k8s": {"kubeconfig": "{{ kubeconfig }}"}},
            "roles": [{"role": f"iot.platform.{name}"}],
        }
        for name in COMPONENTS
    ]
    path = directory / f"{hosts}.yml"
    path.write_text(yaml.safe_dump(plays))
    return path


def test_archive_has_the_needed_files_and_no_tests(directory: Path) -> None:
    root = directory / "collections/ansible_collections/iot/platform"
    assert (root / "collector/Dockerfile").exists()
    assert (root / "pyproject.toml").exists()
    top = {path.name for path in root.iterdir()}
    assert not top & {"tests", "benchmarks", "molecule", ".venv", "collections"}
    assert not (root / "collector/tests").exists()


def test_collection_deploys_on_kubernetes(directory: Path) -> None:
    with running(directory / "kubeconfig") as stand_in:
        given = {
            "kubeconfig": str(stand_in.kubeconfig),
            "minikube_enabled": False,
            "collector_image": "iot-collector:test",
        }
        play(directory, "iot.platform.local", **given)
        assert {
            o["metadata"]["name"] for o in stand_in.ask("objects") if o["kind"] == "StatefulSet"
        } == set(COMPONENTS)
        again = play(directory, play_per_role(directory, "local"), **given)
        assert again.count("changed=0") == 1, again
        play(directory, "iot.platform.teardown", target="local", confirm=True, **given)
        assert stand_in.ask("objects") == []


def test_collection_runs_on_the_host_in_check_mode(directory: Path) -> None:
    """molecule/default really installs, runs and removes it."""
    names = ["mosquitto_port", "postgres_port", "postgres_exporter_port"]
    names += ["collector_http_port", "prometheus_port", "prometheus_node_exporter_port"]
    given = {"iot_state_dir": str(directory / "iot")} | {name: free_port() for name in names}
    assert "unreachable=0    failed=0" in play(directory, "iot.platform.host", "--check", **given)
    play(directory, play_per_role(directory, "host"), "--check", **given)


def test_dependencies_are_exactly_the_collections_used() -> None:
    (listed,) = yaml.safe_load((ROOT / "requirements.yml").read_text()).values()
    assert {item["name"]: item["version"] for item in listed} == USED
    used = set()
    for pattern in (
        "roles/*/tasks/*.yml",
        "roles/*/vars/*.yml",
        "playbooks/*.yml",
        "plugins/*/*.py",
    ):
        text = "".join(path.read_text() for path in ROOT.glob(pattern))
        used |= {
            name for name in (*USED, "community.aws", "community.postgresql") if f"{name}." in text
        }
    assert used == set(USED)
