"""roles.sql: roles and privileges, repeated runs, and secret passwords."""

from functools import partial

import psycopg2
import pytest
from psycopg2.errors import InsufficientPrivilege
from rendering import DATABASE, MONITOR, OWNER, READER, Roles

from testing.collector import run_command
from testing.postgres import Database, Postgres
from testing.service import eventually

ALL = "".join(f"created role {role}\n" for role in (OWNER, READER, MONITOR))
ALL += f"created database {DATABASE}\n"

LOG_EVERYTHING = {
    "log_statement": "all",
    "log_min_duration_statement": "0",
    "log_min_duration_sample": "0",
    "log_transaction_sample_rate": "1",
}


@pytest.fixture
def roles(own_postgres: Postgres) -> Roles:
    return Roles(own_postgres)


def configure(server: Postgres, settings: dict[str, str]) -> None:
    """Change settings of a running server; wait until they apply."""
    for name, value in settings.items():
        server.query(f"ALTER SYSTEM SET {name} = '{value}'")
    server.query("SELECT pg_reload_conf()")
    for name, value in settings.items():
        eventually(partial(shows, server, name, value))


def shows(server: Postgres, name: str, value: str) -> bool:
    return server.query(f"SHOW {name}") == [(value,)]


def migrate(roles: Roles) -> None:
    done = run_command("migrate", **roles.database(OWNER).environment())
    assert done.returncode == 0, done.stderr


def test_second_run_changes_nothing(roles: Roles) -> None:
    done = roles.apply()
    assert (done.returncode, done.stdout, done.stderr) == (0, ALL, "")
    migrate(roles)
    done = roles.apply()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert roles.database(OWNER).query("SELECT current_user") == [(OWNER,)]
    assert roles.database(READER).count() == 0


def test_interrupted_run_is_completed(roles: Roles) -> None:
    roles.server.query(f"CREATE ROLE {OWNER}")
    done = roles.apply()
    assert (done.returncode, done.stdout) == (0, ALL.partition("\n")[2])


def test_database_of_the_previous_version_is_upgraded(roles: Roles) -> None:
    """Only the owner and its database with data exist."""
    roles.server.query(f"CREATE ROLE {OWNER} LOGIN PASSWORD 'owner-secret'")
    roles.server.query(f"CREATE DATABASE {DATABASE} OWNER {OWNER} TEMPLATE template0")
    migrate(roles)
    insert = (
        "INSERT INTO messages (received_at, topic, payload, fields, qos, retained)"
        """ VALUES (now(), 'iot/data', 'temperature:23', '{"temperature": 23}', 1, false)"""
    )
    roles.database(OWNER).query(insert)
    # The default of databases created before PostgreSQL 15.
    Database(roles.server, DATABASE).query("GRANT CREATE ON SCHEMA public TO PUBLIC")

    done = roles.apply()
    assert (done.returncode, done.stdout) == (0, f"created role {READER}\ncreated role {MONITOR}\n")
    reader = roles.database(READER)
    assert reader.query("SELECT topic, name, value FROM readings") == [
        ("iot/data", "temperature", 23)
    ]
    roles.database(OWNER).query(insert)
    assert reader.count() == 2
    with pytest.raises(InsufficientPrivilege):
        reader.query("BEGIN READ WRITE; CREATE TABLE mine (id int)")


def test_changed_password_is_applied(roles: Roles) -> None:
    roles.apply()
    old = roles.database(READER)
    roles.passwords[READER] = 'it\'s "new" \\ $1'
    assert roles.apply().returncode == 0
    assert roles.database(READER).query("SELECT 1") == [(1,)]
    with pytest.raises(psycopg2.OperationalError, match="authentication failed"):
        old.query("SELECT 1")


@pytest.mark.parametrize("role", [OWNER, READER, MONITOR])
def test_missing_password_stops_the_script(roles: Roles, role: str) -> None:
    roles.passwords[role] = ""
    done = roles.apply()
    assert done.returncode == 3
    assert "a password is missing" in done.stderr
    assert roles.server.query("SELECT 1 FROM pg_roles WHERE rolname LIKE 'iot%'") == []


def test_no_password_is_logged_or_shown(roles: Roles) -> None:
    configure(roles.server, LOG_EVERYTHING)
    shown = [roles.apply()]
    # The server also logs failed statements. This makes the statements with passwords fail.
    configure(roles.server, {"default_transaction_read_only": "on"})
    shown.append(roles.apply())
    assert "cannot execute ALTER ROLE" in shown[1].stderr
    log = roles.server.log()
    assert "statement: SET log_statement" in log, "statements are logged"
    for text in (log, *(done.stdout + done.stderr for done in shown)):
        assert "-secret" not in text


DENIED = [
    "INSERT INTO messages (topic) VALUES ('')",
    "INSERT INTO dead_letters (received_at, topic, payload, qos, retained, reason, sqlstate)"
    " VALUES (now(), '', '', 0, false, '', '')",
    "UPDATE messages SET topic = ''",
    "DELETE FROM messages",
    "TRUNCATE messages",
    "DROP TABLE ledger",
    "ALTER TABLE messages ADD COLUMN more int",
    "CREATE TABLE mine (id int)",
    "CREATE TEMPORARY TABLE mine (id int)",
    "CREATE SCHEMA mine",
    "CREATE ROLE more",
    "SELECT ensure_partitions(now(), 1)",
    "SELECT lo_create(0)",
    "SELECT * FROM pg_authid",
    "SELECT pg_read_file('/etc/passwd')",
    "COPY messages TO PROGRAM 'cat'",
    f"SET ROLE {OWNER}",
]


def test_reader_may_only_read(roles: Roles) -> None:
    roles.apply()
    migrate(roles)
    roles.database(OWNER).query("CREATE TABLE later (id int)")
    reader = roles.database(READER)
    for table in ("messages", "dead_letters", "readings", "ledger", "later"):
        assert reader.count(table) == 0
    for statement in DENIED:
        # The reader can change its default of read-only transactions, so its privileges matter.
        with pytest.raises(InsufficientPrivilege):
            reader.query(f"BEGIN READ WRITE; {statement}")
    assert reader.query("SHOW default_transaction_read_only") == [("on",)]
    assert reader.query("SHOW statement_timeout") == [("30s",)]


def test_monitor_may_only_read_statistics(roles: Roles) -> None:
    roles.apply()
    migrate(roles)
    monitor = roles.database(MONITOR)
    assert monitor.query("SELECT pg_has_role('pg_read_all_stats', 'USAGE')") == [(True,)]
    assert monitor.query("SELECT pg_database_size('postgres') > 0") == [(True,)]
    for statement in (*DENIED, "SELECT * FROM messages", "SELECT * FROM readings"):
        with pytest.raises(InsufficientPrivilege):
            monitor.query(f"BEGIN READ WRITE; {statement}")


@pytest.mark.parametrize("database", ["postgres", "template1"])
def test_roles_cannot_connect_to_other_databases(roles: Roles, database: str) -> None:
    roles.apply()
    for role in (OWNER, READER, MONITOR):
        with pytest.raises(psycopg2.OperationalError, match="permission denied for database"):
            roles.server.connect(database, role, roles.passwords[role])
