"""A fresh Mosquitto and a fresh PostgreSQL, in a work directory, on ports of their own."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.extensions

from . import processes
from .processes import StartError
from .wire import HOST

# The role's template (roles/mosquitto), without accounts and TLS.
_MOSQUITTO = """\
listener {port} 127.0.0.1
allow_anonymous true
persistence true
persistence_location {folder}/
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
"""

# Durable, as in production. The rest keeps events that would hit one run and spare the next out
# of the measurement: checkpoints (one is made before each run) and autovacuum.
_POSTGRESQL = """\
listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = ''
synchronous_commit = on
fsync = on
shared_buffers = 256MB
max_wal_size = 8GB
checkpoint_timeout = 1h
autovacuum = off
track_commit_timestamp = on   # when each row's transaction committed
track_wal_io_timing = on      # and how long the flush took that the timestamp leaves out
"""

_INITDB = ("-U", "bench", "-A", "trust", "-E", "UTF8", "--locale=C")


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
        return True
    return False


def require_free(port: int) -> None:
    """Refuse to measure somebody else's service.

    :raises StartError: something listens there.
    """
    if _listens(port):
        raise StartError(f"port {port} is in use; choose others with --port")


def version_of_broker(binary: str) -> str:
    """Return a broker's version: ``mosquitto -h`` exits with 3 and says it first."""
    try:
        done = subprocess.run([binary, "-h"], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise StartError(f"{binary} is not installed: apt-get install mosquitto") from error
    return done.stdout.split("\n", 1)[0].rpartition(" ")[2]


@contextmanager
def broker(binary: str, port: int, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a broker with empty state."""
    require_free(port)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if os.geteuid() == 0:
        folder.chmod(0o777)  # started by root, Mosquitto becomes another user
    config = folder / "mosquitto.conf"
    config.write_text(_MOSQUITTO.format(port=port, folder=folder))
    log = folder / "log"
    process = processes.start([binary, "-c", str(config)], log)
    try:
        processes.wait_until(
            lambda: process.poll() is not None or _listens(port), 10, f"{binary} does not listen"
        )
        if process.poll() is not None:
            raise StartError(f"{binary} ended: {log.read_text()[-500:]}")
        yield process
    finally:
        # Not SIGTERM: it would write a database of what is queued, which nobody will read.
        processes.stop(process, number=signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _postgres_folder() -> Path:
    if found := shutil.which("initdb"):
        return Path(found).parent
    newest = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3])
    )
    if not newest:
        raise StartError("PostgreSQL's initdb is not installed: apt-get install postgresql")
    return newest[-1].parent


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

    process: subprocess.Popen[bytes]
    url: str
    connection: psycopg2.extensions.connection

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
        self.query("TRUNCATE messages, dead_letters, bridge RESTART IDENTITY")
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
    binaries = _postgres_folder()
    user = "postgres" if os.geteuid() == 0 else None  # PostgreSQL refuses to be root
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if user:
        shutil.chown(folder, user, user)
    data = folder / "data"
    processes.run(
        [str(binaries / "initdb"), "-D", str(data), *_INITDB],
        user=user,
        cwd="/",
    )
    with (data / "postgresql.conf").open("a") as config:
        config.write(_POSTGRESQL.format(port=port))
    log = folder / "log"
    log.touch()
    process = processes.start([str(binaries / "postgres"), "-D", str(data)], log, user=user)
    url = f"postgresql://bench@{HOST}:{port}/postgres"
    try:
        processes.wait_until(
            lambda: process.poll() is not None or _answers(url), 30, "PostgreSQL does not answer"
        )
        if process.poll() is not None:
            raise StartError(f"PostgreSQL ended: {log.read_text()[-500:]}")
        connection = psycopg2.connect(url)
        connection.autocommit = True
        with connection.cursor() as cursor:
            # Parallel workers would be counted as the competitor's.
            cursor.execute("SET max_parallel_workers_per_gather = 0; SET work_mem = '64MB'")
        try:
            yield Database(process, url, connection)
        finally:
            connection.close()
    finally:
        processes.stop(process, number=signal.SIGINT)  # fast shutdown
        shutil.rmtree(folder, ignore_errors=True)


def _answers(url: str) -> bool:
    try:
        psycopg2.connect(url).close()
    except psycopg2.OperationalError:
        return False
    return True
