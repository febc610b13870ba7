"""roles.sql on a server whose administrator is not a superuser, as on RDS.

The server is a real PostgreSQL. Like on RDS, the master role has CREATEROLE and CREATEDB, owns the
databases, is a member of rds_superuser, and cannot turn off the logging of statements.
"""

from __future__ import annotations

import subprocess

import psycopg2
import pytest
from psycopg2.errors import InsufficientPrivilege
from rendering import DATABASE, OWNER, READER, Roles
from scram_verifier import scram_verifier
from test_database_roles import DENIED, LOG_EVERYTHING, configure

from testing.collector import clean_environment, run_command
from testing.postgres import Database, Postgres, postgres_binary
from testing.service import HOST

MASTER = "iot_admin"
MASTER_PASSWORD = "master-secret"
# On RDS, these functions belong to AWS, so EXECUTE cannot be revoked from PUBLIC.
DENIED_ON_RDS = [statement for statement in DENIED if "lo_create" not in statement]


class RdsRoles(Roles):
    """roles.sql, run by the master role, with SCRAM verifiers in the password files."""

    has_monitor = False

    def __init__(self, server: Postgres) -> None:
        super().__init__(server)
        server.query("CREATE ROLE rds_superuser CREATEROLE CREATEDB NOLOGIN")
        server.query("GRANT pg_monitor, pg_signal_backend, pg_read_all_data TO rds_superuser")
        server.query(
            f"CREATE ROLE {MASTER} LOGIN NOSUPERUSER CREATEROLE CREATEDB IN ROLE rds_superuser"
            f" PASSWORD '{MASTER_PASSWORD}'"
        )
        server.query(f"CREATE DATABASE {DATABASE} OWNER {MASTER}")
        for name in ("postgres", "template1"):
            server.query(f"ALTER DATABASE {name} OWNER TO {MASTER}")
        configure(server, LOG_EVERYTHING)

    def run(self, contents: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """Run the script with these contents in the password files."""
        self.render_script()
        for role, content in contents.items():
            self.file(role).write_text(f"{content}\n")
        service = self.server.folder / "pg_service.conf"
        service.write_text(
            f"[rds]\nhost={HOST}\nport={self.server.port}\nuser={MASTER}\n"
            f"password={MASTER_PASSWORD}\ndbname=postgres\n"
        )
        return subprocess.run(
            [
                *(postgres_binary("psql"), "-X", "-v", "ON_ERROR_STOP=1"),
                *("--dbname=service=rds", "-f", str(self.script)),
            ],
            env=clean_environment() | {"PGSERVICEFILE": str(service)},
            capture_output=True,
            text=True,
            check=False,
        )

    def apply(self) -> subprocess.CompletedProcess[str]:
        """Run the script with SCRAM verifiers, as the playbook does."""
        return self.run({role: scram_verifier(word) for role, word in self.passwords.items()})


@pytest.fixture
def roles(own_postgres: Postgres) -> RdsRoles:
    return RdsRoles(own_postgres)


def test_roles_are_created_and_the_collector_can_store(roles: RdsRoles) -> None:
    done = roles.apply()
    created = f"created role {OWNER}\ncreated role {READER}\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, created, "")
    for _ in range(2):
        done = run_command("migrate", **roles.database(OWNER).environment())
        assert done.returncode == 0, done.stderr
        # Now the owner has tables.
        again = roles.apply()
        assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    roles.database(OWNER).query(
        "INSERT INTO messages (received_at, topic, payload, fields, qos, retained)"
        """ VALUES (now(), 'iot/data', 'temperature:23', '{"temperature": 23}', 1, false)"""
    )
    assert roles.database(READER).count("readings") == 1
    log = roles.server.log()
    assert f'ALTER ROLE "{OWNER}" LOGIN PASSWORD \'SCRAM-SHA-256$' in log, "statements are logged"
    assert "-secret" not in log.replace(
        f"PASSWORD '{MASTER_PASSWORD}'", ""
    )  # logged by the fixture


def test_missing_database_is_created(roles: RdsRoles) -> None:
    roles.server.query(f"DROP DATABASE {DATABASE}")
    done = roles.apply()
    assert done.returncode == 0, done.stderr
    assert f"created database {DATABASE}\n" in done.stdout
    done = run_command("migrate", **roles.database(OWNER).environment())
    assert done.returncode == 0, done.stderr


def test_reader_may_only_read(roles: RdsRoles) -> None:
    roles.apply()
    run_command("migrate", **roles.database(OWNER).environment())
    reader = roles.database(READER)
    for table in ("messages", "dead_letters", "readings"):
        assert reader.count(table) == 0
    for statement in DENIED_ON_RDS:
        with pytest.raises(InsufficientPrivilege):
            reader.query(f"BEGIN READ WRITE; {statement}")
    for database in ("postgres", "template1"):
        for role in (OWNER, READER):
            with pytest.raises(psycopg2.OperationalError, match="permission denied for database"):
                roles.server.connect(database, role, roles.passwords[role])


def test_database_of_another_owner_is_not_changed(roles: RdsRoles) -> None:
    roles.server.query("ALTER DATABASE template1 OWNER TO postgres")
    done = roles.apply()
    assert (done.returncode, done.stderr) == (0, "")


def test_changed_password_is_applied(roles: RdsRoles) -> None:
    roles.apply()
    old = roles.database(READER)
    roles.passwords[READER] = "another-secret"
    assert roles.apply().returncode == 0
    assert roles.database(READER).query("SELECT 1") == [(1,)]
    with pytest.raises(psycopg2.OperationalError, match="authentication failed"):
        old.query("SELECT 1")


@pytest.mark.parametrize("plain", [OWNER, READER])
def test_plain_password_is_refused_before_it_is_sent(roles: RdsRoles, plain: str) -> None:
    contents = {role: scram_verifier(word) for role, word in roles.passwords.items()}
    done = roles.run(contents | {plain: roles.passwords[plain]})
    assert done.returncode == 3
    assert "a password is not a SCRAM-SHA-256 verifier" in done.stderr
    assert roles.passwords[plain] not in roles.server.log() + done.stderr + done.stdout
    assert roles.server.query("SELECT 1 FROM pg_roles WHERE rolname LIKE 'iot\\_r%'") == []


def test_verifier_is_accepted_by_postgresql(own_postgres: Postgres) -> None:
    """libpq uses a random salt, so verifiers cannot be compared. A login shows that it is right."""
    verifier = scram_verifier("pass word'\"$")
    own_postgres.query(f"CREATE ROLE somebody LOGIN PASSWORD '{verifier}'")
    assert own_postgres.query("SELECT rolpassword FROM pg_authid WHERE rolname = 'somebody'") == [
        (verifier,)
    ]
    assert Database(own_postgres, "postgres", "somebody", "pass word'\"$").query("SELECT 1") == [
        (1,)
    ]
