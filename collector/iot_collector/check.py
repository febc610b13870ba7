"""Reaches broker and database as the collector would, and says what to change."""

import time
from collections.abc import Iterator
from contextlib import closing

import psycopg2
from paho.mqtt.client import Client, ConnectFlags
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from .link import Connection
from .migrate import migrations
from .settings import Settings
from .store import connect, kind_of

BROKER_FAILED = 4
DATABASE_FAILED = 8

_PATIENCE = 10.0

_BROKER_HINTS = {
    "Not authorized": "check IOT_MQTT_USERNAME, IOT_MQTT_PASSWORD_FILE and the broker's ACL",
    "Bad user name or password": "check IOT_MQTT_USERNAME and IOT_MQTT_PASSWORD_FILE",
    "Connection refused": "is the broker running? Check host and port in IOT_MQTT_URL",
    "Name or service not known": "check the host in IOT_MQTT_URL",
    "certificate verify failed": "check IOT_MQTT_CA_FILE and the host name in IOT_MQTT_URL",
    "timed out": "check host and port in IOT_MQTT_URL, and the network in between",
}
_DATABASE_HINTS = {
    "authentication": "check the user in IOT_DATABASE_URL and IOT_DATABASE_PASSWORD_FILE",
    "connection": "is PostgreSQL running? Check host and port in IOT_DATABASE_URL",
    "schema": "run `iot-collector migrate`",
    "permission": "grant the user of IOT_DATABASE_URL INSERT on messages and dead_letters",
}


def check(settings: Settings) -> Iterator[tuple[bool, str, int]]:
    """Yield (right, text, exit status bit) for each thing looked at."""
    yield True, "settings: all valid", 0
    fault = _broker_fault(settings)
    where = f"broker {settings.broker}"
    if fault:
        hint = next((hint for sign, hint in _BROKER_HINTS.items() if sign in fault), None)
        yield False, f"{where}: {fault}" + (f"; {hint}" if hint else ""), BROKER_FAILED
    else:
        yield True, f"{where}: connected as {settings.mqtt_client_id}-check", 0
    yield _database(settings)


def _broker_fault(settings: Settings) -> str | None:
    """Connect under another client id, so that a running collector keeps its session."""
    probe = settings.model_copy(update={"mqtt_client_id": f"{settings.mqtt_client_id}-check"})
    connection = Connection(probe, keep_session=False)
    answers: list[str | None] = []

    def on_connect(
        _client: Client,
        _data: object,
        _flags: ConnectFlags,
        reason: ReasonCode,
        _p: Properties | None,
    ) -> None:
        answers.append(f"refused: {reason}" if reason.is_failure else None)

    client = connection.client
    client.on_connect = on_connect
    try:
        connection.open()
        until = time.monotonic() + _PATIENCE
        while not answers and client.socket() is not None and time.monotonic() < until:
            client.read()
            client.loop_misc()
            time.sleep(0.01)
        client.disconnect()
    except (OSError, ValueError) as error:
        return str(error)
    return answers[0] if answers else connection.end or "connected, but no answer to CONNECT"


def _database(settings: Settings) -> tuple[bool, str, int]:
    try:
        with closing(connect(settings)) as connection, connection.cursor() as cursor:
            info = connection.info
            where = f"database {info.host}:{info.port}/{info.dbname} as {info.user}"
            cursor.execute("SELECT name FROM schema_migrations")
            missing = {name for name, _ in migrations()} - {name for (name,) in cursor.fetchall()}
            if missing:
                text = f"{where}: migrations {sorted(missing)} are missing"
                return False, f"{text}; {_DATABASE_HINTS['schema']}", DATABASE_FAILED
            cursor.execute("SELECT has_table_privilege('messages', 'INSERT')")
            if cursor.fetchone() != (True,):
                text = f"{where}: may not insert into messages"
                return False, f"{text}; {_DATABASE_HINTS['permission']}", DATABASE_FAILED
    except psycopg2.Error as error:
        text = f"database: {' '.join(str(error).split())}"
        hint = _DATABASE_HINTS.get(kind_of(error))
        return False, text + (f"; {hint}" if hint else ""), DATABASE_FAILED
    return True, f"{where}: connected, schema up to date", 0
