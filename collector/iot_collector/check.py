"""Reaches broker and database as the collector would, and says what to change."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import psycopg2
from paho.mqtt.client import Client, ConnectFlags
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from .link import WINDOW_BUG, Connection
from .migrate import migrations
from .rows import decode, head
from .settings import Settings
from .store import connect, kind_of

BROKER_FAILED = 4
DATABASE_FAILED = 8

_PATIENCE = 10.0
_MOSQUITTO_KEEPS_WINDOW = (2, 0, 21)

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
    where = f"broker {settings.broker}"
    try:
        version = _ask_broker(settings)
    except (OSError, ValueError) as error:
        hint = next((hint for sign, hint in _BROKER_HINTS.items() if sign in str(error)), None)
        yield False, f"{where}: {error}" + (f"; {hint}" if hint else ""), BROKER_FAILED
    else:
        yield True, f"{where}: connected as {settings.mqtt_client_id}-check{_remark(version)}", 0
    yield _database(settings)


def _ask_broker(settings: Settings) -> str:
    """Connect, under another client id, so that a running collector keeps its session.

    :returns: what the broker says it is, where it says so as Mosquitto does; or nothing.
    :raises OSError: it is not reached; ConnectionError: it refuses us.
    """
    probe = settings.model_copy(update={"mqtt_client_id": f"{settings.mqtt_client_id}-check"})
    connection = Connection(probe, keep_session=False)
    answers: list[ReasonCode] = []

    def on_connect(
        client: Client,
        _data: object,
        _flags: ConnectFlags,
        reason: ReasonCode,
        _p: Properties | None,
    ) -> None:
        answers.append(reason)
        client.subscribe("$SYS/broker/version")

    client = connection.client
    client.on_connect = on_connect
    connection.open()
    _read_until(connection, lambda: bool(answers), _PATIENCE)
    if not answers:
        raise ConnectionError(connection.end or "connected, but no answer to CONNECT")
    if answers[0].is_failure:
        raise ConnectionError(f"refused: {answers[0]}")
    _read_until(connection, lambda: bool(connection.inbox.rows), 1.0)
    client.disconnect()
    rows, _ = connection.inbox.empty()
    return decode(head(0) + rows[0]).payload.decode(errors="replace") if rows else ""


def _read_until(connection: Connection, done: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not done() and connection.client.socket() is not None and time.monotonic() < until:
        connection.client.read()
        connection.client.loop_write()
        connection.client.loop_misc()
        time.sleep(0.01)


def _remark(version: str) -> str:
    found = re.fullmatch(r"mosquitto version (\d+)\.(\d+)\.(\d+).*", version)
    if found is None or tuple(map(int, found.groups())) >= _MOSQUITTO_KEEPS_WINDOW:
        return ""
    return f"; note: {version} {WINDOW_BUG}"


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
