"""A fresh Mosquitto and a fresh PostgreSQL, set up to be measured, on ports of their own."""

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

# Durable, as in production. The rest keeps events that would hit one run and spare the next out
# of the measurement: checkpoints (one is made before each run) and autovacuum.
_POSTGRESQL = """\
synchronous_commit = on
fsync = on
shared_buffers = 256MB
max_wal_size = 8GB
checkpoint_timeout = 1h
autovacuum = off
track_commit_timestamp = on   # when each row's transaction committed
track_wal_io_timing = on      # and how long the flush took that the timestamp leaves out
"""


def require_free(port: int) -> None:
    """Refuse to measure somebody else's service.

    :raises ServiceError: something listens there.
    """
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
        raise ServiceError(f"port {port} is in use; choose others with --port")


def version_of_broker(program: str) -> str:
    """Return a broker's version: ``mosquitto -h`` exits with 3 and says it first."""
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
        # Not SIGTERM: it would write a database of what is queued, which nobody will read.
        service.close()
        shutil.rmtree(folder, ignore_errors=True)


# How to read (xmin, device, seq, sent_us) from the tables that are written to.
ROWS = {
    "messages": "(SELECT xmin, j->>'device' AS device, (j->>'seq')::bigint AS seq,"
    " (j->>'sent_us')::float8 AS sent_us"
    " FROM (SELECT xmin, convert_from(payload, 'UTF8')::json AS j FROM messages) parsed) rows",
    "bridge": "bridge",
}


@dataclass
class Database:
    """A running server, and our own connection to it."""

    server: Postgres
    connection: psycopg2.extensions.connection

    @property
    def url(self) -> str:
        """Its URI, which needs no password."""
        return postgres.Database(self.server, "postgres").url

    @property
    def backend(self) -> int:
        """Process id of our own backend, whose work is no competitor's."""
        return int(self.connection.info.backend_pid)

    def query(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """Run a query in a transaction of its own."""
        with self.connection.cursor() as cursor:
            cursor.execute(sql, values)
            return cursor.fetchall() if cursor.description else []

    def add_bridge(self) -> None:
        """Make the table of the one competitor that cannot write to ours."""
        self.query(
            "CREATE TABLE bridge (device text, seq bigint, sent_us bigint, temperature float8)"
        )

    def clear(self) -> None:
        """Empty the tables and write out everything, so that each run starts alike."""
        self.query("TRUNCATE messages, dead_letters, message_ids, bridge RESTART IDENTITY")
        self.query("CHECKPOINT")

    def size(self, table: str) -> int:
        """Return the bytes of a table: a cheap sign of progress, unlike a count."""
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
                # Parallel workers would be counted as the competitor's.
                cursor.execute("SET max_parallel_workers_per_gather = 0; SET work_mem = '64MB'")
            yield Database(server, connection)
        server.stop()
    finally:
        server.close()
        shutil.rmtree(folder, ignore_errors=True)
