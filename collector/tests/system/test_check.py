"""``iot-collector check``: checks, exit status and hints."""

from collections.abc import Callable
from pathlib import Path

import pytest

from testing.certificates import make_certificates
from testing.collector import Collector, run_command
from testing.mosquitto import Mosquitto, write_passwords
from testing.postgres import Database
from testing.publisher import publish
from testing.service import HOST, free_port


def check(*parts: Mosquitto | Database, **settings: str) -> tuple[int, list[str], list[str]]:
    """Run the command; return the exit status and the lines of successful and failed checks."""
    merged: dict[str, str] = {}
    for part in parts:
        merged |= part.environment()
    done = run_command("check", **(merged | settings))
    assert "Traceback" not in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    right = [line.removeprefix("ok    ") for line in lines if line.startswith("ok    ")]
    wrong = [line.removeprefix("wrong ") for line in lines if line.startswith("wrong ")]
    assert len(right) + len(wrong) == len(lines)
    return done.returncode, right, wrong


def test_status_is_0_when_all_checks_succeed(broker: Mosquitto, database: Database) -> None:
    status, right, wrong = check(broker, database)
    assert (status, wrong) == (0, [])
    assert [line.split()[0] for line in right] == ["settings:", "broker", "database"]
    assert f"{HOST}:{broker.port}" in right[1]
    assert f"/{database.name} as postgres" in right[2]


def test_wrong_settings_are_reported() -> None:
    done = run_command("check", IOT_HTTP_PORT="zero", IOT_MQTT_TOPIC="x")
    assert done.returncode == 2
    first, second = done.stderr.splitlines()
    assert first.startswith("wrong setting: IOT_MQTT_TOPIC: ")
    assert "IOT_MQTT_TOPICS" in first
    assert second.startswith("wrong setting: IOT_HTTP_PORT: ")


def test_unreachable_broker_is_reported(database: Database) -> None:
    status, _, wrong = check(database, IOT_MQTT_URL=f"mqtt://{HOST}:{free_port()}")
    assert status == 4
    (line,) = wrong
    assert "Connection refused" in line
    assert "IOT_MQTT_URL" in line


def test_unknown_host_name_of_the_broker_is_reported(database: Database) -> None:
    status, _, wrong = check(database, IOT_MQTT_URL="mqtt://no-such-host.invalid")
    assert status == 4
    assert "IOT_MQTT_URL" in wrong[0]


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_wrong_broker_password_is_reported(
    version: str, make_broker: Callable[..., Mosquitto], database: Database, tmp_path: Path
) -> None:
    users, secret = tmp_path / "users", tmp_path / "secret"
    write_passwords(users, {"me": "right-one"})
    secret.write_text("wrong-one")
    broker = make_broker(f"password_file {users}", anonymous=False).start()
    settings = {"IOT_MQTT_PASSWORD_FILE": str(secret), "IOT_MQTT_VERSION": version}
    status, _, wrong = check(broker, database, IOT_MQTT_USERNAME="me", **settings)
    assert status == 4
    assert "IOT_MQTT_USERNAME" in wrong[0]
    assert "IOT_MQTT_PASSWORD_FILE" in wrong[0]
    assert "wrong-one" not in wrong[0]
    secret.write_text("right-one\n")
    assert check(broker, database, IOT_MQTT_USERNAME="me", **settings)[0] == 0


def test_untrusted_broker_certificate_is_reported(
    make_broker: Callable[..., Mosquitto], database: Database, tmp_path: Path
) -> None:
    certificates = make_certificates(tmp_path)
    listener = [f"certfile {certificates.server}", f"keyfile {certificates.server_key}"]
    broker = make_broker(scheme="mqtts", listener=listener).start()
    status, _, wrong = check(broker, database)
    assert status == 4
    assert "certificate verify failed" in wrong[0]
    assert "IOT_MQTT_CA_FILE" in wrong[0]
    assert check(broker, database, IOT_MQTT_CA_FILE=str(certificates.ca))[0] == 0


def test_unreachable_database_is_reported(broker: Mosquitto) -> None:
    url = f"postgresql://me@{HOST}:{free_port()}/iot"
    status, _, wrong = check(broker, IOT_DATABASE_URL=url)
    assert status == 8
    assert "Connection refused" in wrong[0]
    assert "IOT_DATABASE_URL" in wrong[0]


def test_wrong_database_password_is_reported(broker: Mosquitto, database: Database) -> None:
    status, _, wrong = check(broker, database, IOT_DATABASE_PASSWORD="wrong-one")
    assert status == 8
    assert "IOT_DATABASE_PASSWORD_FILE" in wrong[0]
    assert "wrong-one" not in wrong[0]


def test_missing_schema_is_reported(broker: Mosquitto, empty_database: Database) -> None:
    status, _, wrong = check(broker, empty_database)
    assert status == 8
    assert "iot-collector migrate" in wrong[0]


def test_schema_of_an_older_release_is_reported(broker: Mosquitto, database: Database) -> None:
    database.query("DELETE FROM schema_migrations WHERE name LIKE '0002%'")
    status, _, wrong = check(broker, database)
    assert status == 8
    assert "0002_ledger" in wrong[0]
    assert "iot-collector migrate" in wrong[0]


def test_missing_privileges_are_reported(broker: Mosquitto, database: Database) -> None:
    role = f"{database.name}_reader"
    database.query(f"CREATE ROLE {role} LOGIN PASSWORD 'x'; GRANT pg_read_all_data TO {role}")
    status, _, wrong = check(broker, Database(database.server, database.name, role, "x"))
    assert status == 8
    assert "messages" in wrong[0]
    assert "grant" in wrong[0].lower()


def test_unreachable_broker_and_database_are_both_reported() -> None:
    status, _, wrong = check(
        IOT_MQTT_URL=f"mqtt://{HOST}:{free_port()}",
        IOT_DATABASE_URL=f"postgresql://me@{HOST}:{free_port()}/iot",
    )
    assert status == 12
    assert len(wrong) == 2


def test_check_does_not_disturb_a_running_collector(
    collector: Collector, broker: Mosquitto, database: Database
) -> None:
    settings = {name: collector.settings[name] for name in ("IOT_MQTT_CLIENT_ID",)}
    assert check(broker, database, **settings)[0] == 0
    publish(broker, [("iot/data", b"x")])
    assert collector.wait_settled(1)["mqtt_reconnects_total"] == 0
