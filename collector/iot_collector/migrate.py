"""The schema: ordered SQL files, each applied once, in one transaction."""

from importlib import resources

import psycopg2
import structlog

from .database import connect
from .settings import Settings
from .store import MONTHS_AHEAD

log = structlog.get_logger(__name__)

_LOCK = "SELECT pg_advisory_xact_lock(hashtext('iot.migrate'))"
_TABLE = """
CREATE TABLE IF NOT EXISTS schema_migrations (
    name       text        PRIMARY KEY,
    applied_at timestamptz NOT NULL DEFAULT now()
)"""


def migrations() -> list[tuple[str, str]]:
    """Return (name, SQL) of every migration, in order."""
    folder = resources.files(__package__) / "migrations"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".sql")), key=lambda f: f.name)
    return [(f.name.removesuffix(".sql"), f.read_text()) for f in files]


def migrate(settings: Settings) -> list[str]:
    """Apply what is missing and make the partitions; return the names of what was applied.

    :raises psycopg2.Error: nothing was changed.
    """
    connection = connect(settings)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(_LOCK)  # two that migrate at once take turns
            cursor.execute(_TABLE)
            applied = _apply(cursor)
            cursor.execute("SELECT ensure_partitions(now(), %s)", (MONTHS_AHEAD,))
        return applied
    finally:
        connection.close()


def _apply(cursor: psycopg2.extensions.cursor) -> list[str]:
    cursor.execute("SELECT name FROM schema_migrations")
    done = {name for (name,) in cursor.fetchall()}
    applied = []
    for name, sql in migrations():
        if name not in done:
            cursor.execute(sql)
            cursor.execute("INSERT INTO schema_migrations (name) VALUES (%s)", (name,))
            applied.append(name)
    return applied
