"""Backup and restore on Kubernetes, with PostgreSQL on this machine in place of the pod.

The stand-in for the Kubernetes API runs no commands in pods. So the three modules that the role
uses for the pod are stand-ins: they run its commands, and copy files, on this machine.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_runs import playbook
from rendering import DATABASE, Roles

from testing.postgres import Postgres, postgres_binary

pytestmark = pytest.mark.timeout(600)

PLAY = """
- hosts: local
  gather_facts: true
  gather_subset: ["!all", min]
  tasks:
    - ansible.builtin.include_role:
        name: iot.platform.backup
        tasks_from: "{{ step }}"
"""
EXEC = """#!/usr/bin/python3
import shlex, subprocess
from ansible.module_utils.basic import AnsibleModule
module = AnsibleModule({n: {} for n in ("namespace", "pod", "container", "command")})
command = module.params["command"].replace("/run/postgres", "%(socket)s")
command = command.replace("/data/", "%(pod)s/data/")
done = subprocess.run(shlex.split(command), capture_output=True, text=True)
module.exit_json(changed=True, rc=done.returncode, stdout=done.stdout, stderr=done.stderr)
"""
COPY = """#!/usr/bin/python3
import os, shutil
from ansible.module_utils.basic import AnsibleModule
names = ("namespace", "pod", "container", "remote_path", "local_path", "state")
module = AnsibleModule({n: {} for n in names})
remote, local = "%(pod)s" + module.params["remote_path"], module.params["local_path"]
if os.path.exists("%(pod)s/broken"):
    module.fail_json(msg="the connection was lost")
if module.params["state"] == "from_pod":
    shutil.copy(remote, local)
else:
    os.makedirs(os.path.dirname(remote), exist_ok=True)
    shutil.copy(local, remote)
module.exit_json(changed=True)
"""
SCALE = """#!/usr/bin/python3
from ansible.module_utils.basic import AnsibleModule
names = ("api_version", "kind", "namespace", "name", "replicas", "wait", "wait_timeout")
AnsibleModule({n: {} for n in names}).exit_json(changed=True)
"""


def test_dumps_do_not_stay_on_the_volume_of_the_database(
    tmp_path: Path, own_postgres: Postgres
) -> None:
    database = Roles(own_postgres).install()
    database.query("INSERT INTO dead_letters_fallback (reason) VALUES ('x')")

    pod = tmp_path / "pod"
    (pod / "data").mkdir(parents=True)
    modules = tmp_path / "collections/ansible_collections/kubernetes/core/plugins/modules"
    modules.mkdir(parents=True)
    places = {"pod": pod, "socket": own_postgres.folder}
    for name, code in (("k8s_exec", EXEC), ("k8s_cp", COPY), ("k8s_scale", SCALE)):
        (modules / f"{name}.py").write_text(code % places)
    play = tmp_path / "play.yml"
    play.write_text(PLAY)
    dumps = tmp_path / "dumps"

    def run(step: str) -> tuple[int, str]:
        done = playbook(
            str(play),
            *(f"-estep={step}", f"-ebackup_directory={dumps}", "-econfirm=true"),
            f"-ebackup_port={own_postgres.port}",
            ANSIBLE_COLLECTIONS_PATH=f"{tmp_path / 'collections'}:collections",
            PATH=f"{Path(postgres_binary('pg_dump')).parent}:/usr/local/bin:/usr/bin:/bin",
        )
        assert [f for f in (pod / "data").rglob("*") if f.is_file()] == [], done.stdout
        return done.returncode, done.stdout

    (pod / "broken").touch()
    status, shown = run("main")
    assert status != 0
    assert "No dump was written: the connection was lost" in " ".join(shown.split())
    assert list(dumps.iterdir()) == []
    (pod / "broken").unlink()
    status, shown = run("main")
    assert status == 0, shown
    [dump] = dumps.iterdir()

    database.query("TRUNCATE dead_letters_fallback")
    status, shown = run("restore")
    assert status == 0, shown
    assert database.count("dead_letters_fallback") == 1
    # A truncated dump changes nothing.
    own_postgres.query(f"DROP DATABASE {DATABASE}_before_restore")
    dump.write_bytes(dump.read_bytes()[:-200])
    status, shown = run("restore")
    assert status != 0
    assert database.count("dead_letters_fallback") == 1
