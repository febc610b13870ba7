"""Reaches broker and database as the collector would, and says what to change."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import psycopg2

from .connection import WINDOW_BUG, Connection
from .database import HINTS, connect, explain
from .migrate import migrations
from .rows import decode, head
from .settings import Settings

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


def check(settings: Settings) -> Iterator[tuple[bool, str, int]]:
    """Yield (right, text, exit status bit) for each thing looked at."""
    yield True, "settings: all valid", 0
    where = f"broker {settings.broker}"
    try:
        version = _ask_broker(settings)
    except (OSError, ValueError) as error:
        hint = next((f"; {hint}" for sign, hint in _BROKER_HINTS.items() if sign in str(error)), "")
        yield False, f"{where}: {error}{hint}", BROKER_FAILED
    else:
        yield True, f"{where}: connected as {settings.mqtt_client_id}-check{_remark(version)}", 0
    try:
        fault, text = _ask_database(settings)
    except psycopg2.Error as error:
        fault, text = True, f"database: {explain(error)}"
    yield not fault, text, DATABASE_FAILED if fault else 0


def _ask_broker(settings: Settings) -> str:
    """Connect, under another client id, so that a running collector keeps its session.

    :returns: what the broker says it is, where it says so as Mosquitto does; or nothing.
    :raises OSError: it is not reached; ConnectionError: it refuses us.
    """
    probe = settings.model_copy(update={"mqtt_client_id": f"{settings.mqtt_client_id}-check"})
    connection = Connection(probe, keep_session=False)
    connection.open()
    _read_until(connection, lambda: connection.accepted, _PATIENCE)
    if not connection.accepted:
        raise ConnectionError(connection.end or "connected, but no answer to CONNECT")
    connection.client.subscribe("$SYS/broker/version")
    _read_until(connection, lambda: False, 1.0)
    connection.client.disconnect()
    rows, _ = connection.client.take()
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


def _ask_database(settings: Settings) -> tuple[bool, str]:
    """Return whether the schema is not as it has to be, and where and what it is."""
    with closing(connect(settings)) as connection, connection.cursor() as cursor:
        info = connection.info
        where = f"database {info.host}:{info.port}/{info.dbname} as {info.user}"
        cursor.execute("SELECT name FROM schema_migrations")
        missing = {name for name, _ in migrations()} - {name for (name,) in cursor.fetchall()}
        if missing:
            return True, f"{where}: migrations {sorted(missing)} are missing; {HINTS['schema']}"
        cursor.execute("SELECT has_table_privilege('messages', 'INSERT')")
        if cursor.fetchone() != (True,):
            return True, f"{where}: may not insert into messages; {HINTS['permission']}"
    return False, f"{where}: connected, schema up to date"
