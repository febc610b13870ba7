"""Migrates the schema: applies SQL files in order, each once, in one transaction."""

import time
from contextlib import closing
from pathlib import Path

import psycopg2.extensions

from . import __version__
from .database import NewerSchemaError, connect
from .partitions import create_partitions
from .settings import Settings

_TABLE = """
CREATE TABLE IF NOT EXISTS schema_migrations (
    name       text        PRIMARY KEY,
    applied_at timestamptz NOT NULL DEFAULT now()
)"""


def migrations() -> list[tuple[str, str]]:
    """Return (name, SQL) of every migration, in order."""
    files = sorted(Path(__file__).with_name("migrations").glob("*.sql"))
    return [(file.stem, file.read_text()) for file in files]


def missing_migrations(cursor: psycopg2.extensions.cursor) -> list[tuple[str, str]]:
    """Return (name, SQL) of the migrations that are not applied to the database yet, in order.

    :raises NewerSchemaError: the database has migrations that this version does not have.
    """
    cursor.execute("SELECT name FROM schema_migrations ORDER BY name")
    applied = [name for (name,) in cursor.fetchall()]
    known = {name for name, _ in migrations()}
    if unknown := [name for name in applied if name not in known]:
        raise NewerSchemaError(
            f"the schema of the database is newer than this iot-collector {__version__}, which"
            f" does not know the migration {', '.join(unknown)}"
        )
    return [(name, sql) for name, sql in migrations() if name not in applied]


def migrate(settings: Settings) -> list[str]:
    """Apply the missing migrations and create partitions; return the names of the migrations.

    :raises NewerSchemaError: this version is older than the schema; nothing was changed.
    :raises psycopg2.Error: nothing was changed.
    """
    with closing(connect(settings)) as connection, connection, connection.cursor() as cursor:
        # Only one process migrates at a time.
        cursor.execute("SELECT pg_advisory_xact_lock(hashtext('iot.migrate'))")
        cursor.execute(_TABLE)
        missing = missing_migrations(cursor)
        for name, sql in missing:
            cursor.execute(sql)
            cursor.execute("INSERT INTO schema_migrations (name) VALUES (%s)", (name,))
        create_partitions(cursor, time.time())
    return [name for name, _ in missing]
