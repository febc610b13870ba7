"""TLS to PostgreSQL with ``sslmode=verify-full``, as used with RDS."""

import os
from collections.abc import Callable
from pathlib import Path

import psycopg2
import pytest
import trustme
from iot_collector.database import connect, explain
from iot_collector.settings import load

from testing.collector import Collector
from testing.mosquitto import Mosquitto
from testing.postgres import Database, Postgres
from testing.publisher import publish
from testing.service import eventually


def install(server: Postgres, authority: trustme.CA, name: str) -> None:
    """Give a running server a certificate for ``name``, and reload its configuration."""
    made = authority.issue_cert(name)
    made.cert_chain_pems[0].write_to_path(server.data / "server.crt")
    key = server.data / "server.key"
    made.private_key_pem.write_to_path(key)
    for setting in ("ssl = on", "ssl_cert_file = 'server.crt'", "ssl_key_file = 'server.key'"):
        server.query(f"ALTER SYSTEM SET {setting}")
    # PostgreSQL refuses a key that other users can read.
    owner = server.data.stat()
    for file in (key, server.data / "server.crt"):
        file.chmod(0o600)
        os.chown(file, owner.st_uid, owner.st_gid)
    server.query("SELECT pg_reload_conf()")


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> Path:
    file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(file)
    return file


def url(database: Database, ca_file: Path, host: str = "localhost") -> str:
    return (
        f"postgresql://{database.user}@{host}:{database.server.port}/{database.name}"
        f"?sslmode=verify-full&sslrootcert={ca_file}"
    )


def test_verify_full_checks_certificate_and_name(
    own_database: Database,
    authority: trustme.CA,
    ca_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def connect_error(url: str) -> str | None:
        """Connect; return None, or the explained error."""
        monkeypatch.setenv("IOT_DATABASE_URL", url)
        monkeypatch.setenv("IOT_DATABASE_PASSWORD", own_database.password)
        try:
            connection = connect(load())
        except psycopg2.OperationalError as error:
            return explain(error)
        assert connection.info.ssl_in_use
        connection.close()
        return None

    def refused(url: str) -> str:
        said = connect_error(url)
        assert said is not None
        assert said.startswith("tls: ")
        assert "sslrootcert must be a file with the CA" in said
        return said

    assert "does not support SSL" in refused(url(own_database, ca_file))
    install(own_database.server, authority, "localhost")
    eventually(lambda: connect_error(url(own_database, ca_file)) is None, what="TLS is on")
    wrong_name = refused(url(own_database, ca_file, host="127.0.0.1"))
    assert 'for "localhost" does not match host name "127.0.0.1"' in wrong_name
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(other)
    assert "certificate verify failed" in refused(url(own_database, other))
    assert "does not exist" in refused(url(own_database, tmp_path / "missing.pem"))


def test_new_ca_in_the_file_is_used_for_new_connections(
    own_database: Database,
    authority: trustme.CA,
    ca_file: Path,
    broker: Mosquitto,
    make_collector: Callable[..., Collector],
) -> None:
    """The file contains the old and the new CA during the rotation."""
    server = own_database.server
    install(server, authority, "localhost")
    eventually(lambda: own_database.query("SHOW ssl") == [("on",)], what="TLS is on")
    collector = make_collector(
        broker, own_database, IOT_DATABASE_URL=url(own_database, ca_file)
    ).start()
    acknowledged = publish(broker, [("iot/data", b"before")])
    collector.wait_settled(1)

    def terminate_sessions() -> None:
        own_database.query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'iot-collector'"
        )

    newer = trustme.CA()
    install(server, newer, "localhost")
    terminate_sessions()
    eventually(
        lambda: "certificate verify failed" in str(collector.health()["database"]["error"]),
        what="the new CA is not trusted",
    )
    acknowledged |= publish(broker, [("iot/data", b"meanwhile")])
    ca_file.write_bytes(ca_file.read_bytes() + newer.cert_pem.bytes())
    collector.wait_settled(2)
    install(server, authority, "localhost")
    terminate_sessions()
    acknowledged |= publish(broker, [("iot/data", b"after")])
    collector.wait_settled(3)
    assert set(own_database.payloads()) == acknowledged
    assert own_database.count() == 3
