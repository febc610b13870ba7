"""playbooks/backup.yml and the restore of a destroyed database.

Only the supervisor is a stand-in: a script that stops the collector.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psycopg2
import pytest
from ansible_runs import playbook
from rendering import DATABASE, Roles

from testing.collector import Collector
from testing.mosquitto import Mosquitto
from testing.postgres import Postgres
from testing.publisher import publish
from testing.service import binary, eventually

pytestmark = pytest.mark.timeout(600)

SELECT_ROWS = "SELECT m::text FROM messages m ORDER BY id"


def test_destroyed_database_is_restored(
    tmp_path: Path,
    own_postgres: Postgres,
    broker: Mosquitto,
    make_collector: Callable[..., Collector],
) -> None:
    # The socket and the commands are where the roles put them.
    database = Roles(own_postgres).install()
    collector = make_collector(broker, database).start()
    state = tmp_path / "state"
    script(
        state / "bin/psql",
        f"exec {binary('psql')} -h {own_postgres.folder} -p {own_postgres.port} -U postgres"
        f' -X -d {DATABASE} "$@"',
    )
    script(state / "venv/bin/supervisorctl", f'[ "$4" = archive ] || kill {collector.pid}')

    sent = [b"n:%d" % n for n in range(200)]
    publish(broker, [("iot/data", payload) for payload in sent])
    collector.wait_settled(200)
    database.query("INSERT INTO dead_letters_fallback (reason) VALUES ('x')")
    before = database.query(SELECT_ROWS)
    variables = [f"-eiot_state_dir={state}", "-ebackup_jobs=2"]
    nothing = playbook("tests/restore.yml", *variables, "-econfirm=true")
    assert "There is no dump iot-*.dump" in nothing.stdout
    done = playbook("playbooks/backup.yml", *variables)
    assert done.returncode == 0, done.stdout
    [dump] = (state / "backup").iterdir()

    # After the backup, a message is stored, and then the table is truncated.
    publish(broker, [("iot/data", b"later:1")])
    collector.wait_settled(201)
    database.query("TRUNCATE messages")
    done = playbook("tests/restore.yml", *variables)
    assert done.returncode != 0
    assert "Nothing was changed" in done.stdout
    assert database.count() == 0
    done = playbook("tests/restore.yml", *variables, "-econfirm=true", f"-efile={dump.name}")
    assert done.returncode == 0, done.stdout
    assert database.query(SELECT_ROWS) == before
    assert database.count("dead_letters_fallback") == 1
    assert database.count("ledger") == 0
    kept = own_postgres.query(
        "SELECT datallowconn FROM pg_database WHERE datname = 'iot_before_restore'"
    )
    assert kept == [(False,)]

    # The collector was stopped. The broker queues messages meanwhile.
    collector.wait()
    publish(broker, [("iot/data", b"meanwhile:1")])
    collector.start()
    eventually(lambda: database.payloads() == [*sent, b"meanwhile:1"])

    # The next restore does not delete the database that the last one kept.
    done = playbook("tests/restore.yml", *variables, "-econfirm=true")
    assert done.returncode != 0
    assert "DROP DATABASE iot_before_restore" in done.stdout
    # A truncated dump changes nothing.
    own_postgres.query("DROP DATABASE iot_before_restore")
    dump.write_bytes(dump.read_bytes()[:-200])
    done = playbook("tests/restore.yml", *variables, "-econfirm=true")
    assert done.returncode != 0
    assert database.count() == 201
    with pytest.raises(psycopg2.OperationalError, match="does not exist"):
        own_postgres.connect("iot_before_restore")


def script(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
