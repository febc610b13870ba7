"""Connects to broker and database as the collector does, and names the setting to change."""

import time
from collections.abc import Iterator
from contextlib import closing

import psycopg2

from .aws import AwsError
from .connection import Connection
from .database import HINTS, connect, explain
from .iot_core import MESSAGE_ID_ADVICE
from .migrate import missing_migrations
from .replay_queue import Queue
from .settings import Settings

BROKER_FAILED = 4
DATABASE_FAILED = 8
QUEUE_FAILED = 16

_TIMEOUT = 10.0  # seconds

_BROKER_HINTS = {
    "Not authorized": "check IOT_MQTT_USERNAME, IOT_MQTT_PASSWORD_FILE and the broker's ACL",
    "Bad user name or password": "check IOT_MQTT_USERNAME and IOT_MQTT_PASSWORD_FILE",
    "Connection refused": "is the broker running? Check host and port in IOT_MQTT_URL",
    "Name or service not known": "check the host in IOT_MQTT_URL",
    "certificate verify failed": "check IOT_MQTT_CA_FILE and the host name in IOT_MQTT_URL",
    "timed out": "check host and port in IOT_MQTT_URL, and the network to the broker",
}


def check(settings: Settings) -> Iterator[tuple[int, str]]:
    """Run the checks; yield (bit of the exit status, text) of each; the bit is 0 on success."""
    advice = f"; {MESSAGE_ID_ADVICE}" if settings.iot_core and not settings.message_id_key else ""
    yield 0, f"settings: all valid{advice}"
    yield _check_broker(settings)
    yield _check_database(settings)
    if settings.replay_queue is not None:
        yield _check_queue(settings.replay_queue)


def _check_broker(settings: Settings) -> tuple[int, str]:
    # Not the collector's client id: with it, the broker would disconnect a running collector.
    client_id = f"{settings.mqtt_client_id}-check"
    settings = settings.model_copy(update={"mqtt_client_id": client_id})
    probe = Connection(settings, keep_session=False)
    where = f"broker {settings.broker}"
    try:
        probe.open()
        deadline = time.monotonic() + _TIMEOUT
        lost = 0
        while not (probe.accepted or lost) and time.monotonic() < deadline:
            lost = probe.client.loop(0.1)
        fault = probe.end_reason or "connected, but no answer to CONNECT"
        probe.client.disconnect()
    except (OSError, ValueError) as error:
        fault = str(error)
    if probe.accepted:
        return 0, f"{where}: connected as {client_id}"
    hint = next((f"; {hint}" for sign, hint in _BROKER_HINTS.items() if sign in fault), "")
    hint = "" if "check " in fault else hint  # the error already says what to check
    return BROKER_FAILED, f"{where}: {fault}{hint}"


def _check_database(settings: Settings) -> tuple[int, str]:
    where = "database"
    try:
        with closing(connect(settings)) as connection, connection.cursor() as cursor:
            info = connection.info
            where = f"database {info.host}:{info.port}/{info.dbname} as {info.user}"
            missing = [name for name, _ in missing_migrations(cursor)]
            # EXPLAIN inserts nothing, but fails without the privilege INSERT.
            for table in () if missing else ("messages", "dead_letters", "dead_letters_fallback"):
                cursor.execute(f"EXPLAIN INSERT INTO {table} DEFAULT VALUES")
    except psycopg2.Error as error:
        return DATABASE_FAILED, f"{where}: {explain(error)}"
    if missing:
        return DATABASE_FAILED, f"{where}: migrations {missing} are missing; {HINTS['schema']}"
    return 0, f"{where}: connected, schema up to date"


def _check_queue(arn: str) -> tuple[int, str]:
    where = f"replay queue {arn}"
    try:
        visible, _ = Queue(arn).size()
    except AwsError as error:
        return QUEUE_FAILED, f"{where}: {error}"
    return 0, f"{where}: about {visible} copies"
