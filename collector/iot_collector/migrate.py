"""The schema: SQL files, applied in order and once each, in one transaction."""

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
    """Return (name, SQL) of the migrations that the database does not have yet, in order.

    :raises NewerSchemaError: the database has migrations that this version does not have.
    """
    cursor.execute("SELECT name FROM schema_migrations ORDER BY name")
    applied = [name for (name,) in cursor.fetchall()]
    known = {name for name, _ in migrations()}
    if unknown := [name for name in applied if name not in known]:
        raise NewerSchemaError(
            f"the schema of the database is newer than this iot-collector {__version__}, which"
            f" does not have the migration {', '.join(unknown)}"
        )
    return [(name, sql) for name, sql in migrations() if name not in applied]


def migrate(settings: Settings) -> list[str]:
    """Apply the missing migrations and create partitions; return the names of these migrations.

    :raises psycopg2.Error: nothing was changed; NewerSchemaError if this version is too old.
    """
    with closing(connect(settings)) as connection, connection, connection.cursor() as cursor:
        # Two processes that migrate at once take turns.
        cursor.execute("SELECT pg_advisory_xact_lock(hashtext('iot.migrate'))")
        cursor.execute(_TABLE)
        missing = missing_migrations(cursor)
        for name, sql in missing:
            cursor.execute(sql)
            cursor.execute("INSERT INTO schema_migrations (name) VALUES (%s)", (name,))
        create_partitions(cursor, time.time())
    return [name for name, _ in missing]
