"""A new Mosquitto and a new PostgreSQL, configured for measurements, on their own ports."""

import contextlib
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.extensions

from testing import postgres
from testing.mosquitto import Mosquitto
from testing.postgres import Postgres
from testing.service import IS_ROOT, ServiceError, binary

from .wire import HOST

# The role's template (roles/mosquitto), without accounts and TLS.
_MOSQUITTO = """\
autosave_interval 300
persistent_client_expiration 30d
max_queued_messages 4000000
max_queued_bytes 2147483648
max_inflight_messages 10000
sys_interval 10
log_dest stdout
log_type error
log_type warning
log_type notice
""".splitlines()

# Durable, as in production. The other settings prevent checkpoints (there is one before each run)
# and autovacuum, which would affect only some of the runs.
_POSTGRESQL = """\
synchronous_commit = on
fsync = on
shared_buffers = 256MB
max_wal_size = 8GB
checkpoint_timeout = 1h
autovacuum = off
track_commit_timestamp = on   # the commit time of each row
track_wal_io_timing = on      # the time of the WAL flush, which comes after the timestamp
"""


def require_free(port: int) -> None:
    """Check that no other service would be measured.

    :raises ServiceError: the port is in use.
    """
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
        raise ServiceError(f"port {port} is in use; choose others with --port")


def version_of_broker(program: str) -> str:
    """Return the version of a broker. ``mosquitto -h`` prints it first, and exits with 3."""
    command = [binary(program, "/usr/sbin", "/usr/local/sbin"), "-h"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.split("\n", 1)[0].rpartition(" ")[2]


@contextmanager
def broker(program: str, port: int, folder: Path) -> Iterator[Mosquitto]:
    """Run a broker with empty state."""
    require_free(port)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    service = Mosquitto(folder, limits=_MOSQUITTO, port=port, program=program)
    try:
        yield service.start()
    finally:
        # Not with SIGTERM, at which Mosquitto would save its queue.
        service.close()
        shutil.rmtree(folder, ignore_errors=True)


# SQL for (xmin, device, seq, sent_us) of the rows in each table.
ROWS = {
    "messages": "(SELECT xmin, j->>'device' AS device, (j->>'seq')::bigint AS seq,"
    " (j->>'sent_us')::float8 AS sent_us"
    " FROM (SELECT xmin, convert_from(payload, 'UTF8')::json AS j FROM messages) parsed) rows",
    "bridge": "bridge",
}


@dataclass
class Database:
    """A running server, and the benchmark's connection to it."""

    server: Postgres
    connection: psycopg2.extensions.connection

    @property
    def url(self) -> str:
        """The URI of the database. It needs no password."""
        return postgres.Database(self.server, "postgres").url

    @property
    def backend(self) -> int:
        """Process id of the benchmark's backend, which is not counted."""
        return int(self.connection.info.backend_pid)

    def query(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """Run a query in its own transaction."""
        with self.connection.cursor() as cursor:
            cursor.execute(sql, values)
            return cursor.fetchall() if cursor.description else []

    def add_bridge(self) -> None:
        """Create the table of mq-bridge, which cannot write to ``messages``."""
        self.query(
            "CREATE TABLE bridge (device text, seq bigint, sent_us bigint, temperature float8)"
        )

    def clear(self) -> None:
        """Empty the tables and make a checkpoint, so that all runs start equally."""
        self.query("TRUNCATE messages, dead_letters, message_ids, bridge RESTART IDENTITY")
        self.query("CHECKPOINT")

    def size(self, table: str) -> int:
        """Return the bytes of a table, which shows progress more cheaply than count(*)."""
        sql = (
            "SELECT coalesce(sum(pg_relation_size(relid)), pg_relation_size(%s::regclass))"
            " FROM pg_partition_tree(%s)"
        )
        return int(self.query(sql, table, table)[0][0])


@contextmanager
def database(port: int, folder: Path) -> Iterator[Database]:
    """Run a database server with a new cluster."""
    require_free(port)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if IS_ROOT:
        shutil.chown(folder, "postgres", "postgres")
    server = Postgres(folder, port).create(_POSTGRESQL, authentication="trust")
    try:
        with contextlib.closing(server.start().connect()) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                # The CPU time of parallel workers would be counted for the competitor.
                cursor.execute("SET max_parallel_workers_per_gather = 0; SET work_mem = '64MB'")
            yield Database(server, connection)
        server.stop()
    finally:
        server.close()
        shutil.rmtree(folder, ignore_errors=True)
