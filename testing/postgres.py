"""PostgreSQL servers and databases for tests."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import psycopg2
import psycopg2.extensions

from .service import HOST, IS_ROOT, Service, alive, binary, children, eventually, free_port


def postgres_binary(name: str) -> str:
    """Return the path of one of PostgreSQL's programs; Debian keeps them off the PATH."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return binary(name, *map(str, versions))


class Row(NamedTuple):
    """A row of ``messages``."""

    topic: str
    payload: bytes
    qos: int
    retained: bool
    fields: Any
    properties: Any


class Letter(NamedTuple):
    """A row of ``dead_letters``."""

    topic: bytes
    payload: bytes
    qos: int
    retained: bool
    reason: str
    sqlstate: str


@dataclass
class Database:
    """A database of a server, and a user of it."""

    server: "Postgres"
    name: str
    user: str = "postgres"
    password: str = "postgres"

    @property
    def url(self) -> str:
        """The URI without the password."""
        return f"postgresql://{self.user}@{HOST}:{self.server.port}/{self.name}"

    def environment(self) -> dict[str, str]:
        """The collector's settings for this database."""
        return {"IOT_DATABASE_URL": self.url, "IOT_DATABASE_PASSWORD": self.password}

    def connect(self) -> psycopg2.extensions.connection:
        return self.server.connect(self.name, self.user, self.password)

    def query(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """Run a statement in autocommit and return its rows, if it has any."""
        with contextlib.closing(self.connect()) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(sql, values or None)
                return cursor.fetchall() if cursor.description else []

    def rows(self) -> list[Row]:
        """All rows of ``messages``, in the order in which they were stored."""
        found = self.query(
            "SELECT topic, payload, qos, retained, fields, properties FROM messages ORDER BY id"
        )
        return [Row(r[0], bytes(r[1]), *r[2:]) for r in found]

    def payloads(self) -> list[bytes]:
        return [row.payload for row in self.rows()]

    def count(self, table: str = "messages") -> int:
        count: int = self.query(f"SELECT count(*) FROM {table}")[0][0]
        return count

    def dead_letters(self) -> list[Letter]:
        found = self.query(
            "SELECT topic, payload, qos, retained, reason, sqlstate FROM dead_letters ORDER BY id"
        )
        return [Letter(bytes(r[0]), bytes(r[1]), *r[2:]) for r in found]


# Lines of postgresql.conf: fast, and small enough for many servers at once.
TEST_SETTINGS = """\
fsync = off
full_page_writes = off
max_connections = 40
superuser_reserved_connections = 3
shared_buffers = 32MB
wal_level = minimal
max_wal_senders = 0
autovacuum = off
timezone = 'Pacific/Chatham'   # an unusual offset: 12:45
"""


class Postgres(Service):
    """A PostgreSQL server. It refuses to run as root, so root starts it as ``postgres``."""

    name = "postgres"

    def __init__(self, folder: Path, port: int | None = None) -> None:
        super().__init__(folder)
        self.data = folder / "data"
        self.port = port or free_port()
        self._databases = 0

    @staticmethod
    def identity() -> dict[str, Any]:
        """Return arguments of Popen that start a program as ``postgres`` if root runs the tests."""
        return {"user": "postgres", "group": "postgres", "extra_groups": []} if IS_ROOT else {}

    @classmethod
    @contextlib.contextmanager
    def directory(cls) -> Iterator[Path]:
        """Create a directory that the server's user owns; those of pytest belong to root."""
        with tempfile.TemporaryDirectory(prefix="iot-test-", dir="/tmp") as name:
            if IS_ROOT:
                shutil.chown(name, "postgres", "postgres")
            yield Path(name)

    def create(self, settings: str = TEST_SETTINGS, authentication: str = "scram-sha-256") -> Self:
        """Make the data directory (initdb).

        :param settings: lines of postgresql.conf.
        :param authentication: method for connections over TCP.
        """
        password_file = self.folder / "password"
        password_file.write_text("postgres\n")
        if IS_ROOT:
            shutil.chown(password_file, "postgres", "postgres")
        done = subprocess.run(
            [
                *(postgres_binary("initdb"), "-D", str(self.data), "-U", "postgres", "--no-sync"),
                *("--pwfile", str(password_file), "-E", "UTF8", "--locale", "C.UTF-8"),
                *("--auth-local", "trust", "--auth-host", authentication),
            ],
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
            **self.identity(),
        )
        assert done.returncode == 0, f"initdb failed:\n{done.stdout}{done.stderr}"
        with (self.data / "postgresql.conf").open("a") as config:
            config.write(f"listen_addresses = '{HOST}'\nunix_socket_directories = ''\n{settings}")
        return self

    def copy(self, folder: Path) -> "Postgres":
        """Return a new server with a copy of this data directory. This server must be stopped."""
        copied = Postgres(folder)
        subprocess.run(["cp", "-a", str(self.data), str(copied.data)], check=True)
        return copied

    def command(self) -> Sequence[str]:
        return [postgres_binary("postgres"), "-D", str(self.data), "-p", str(self.port)]

    def options(self) -> dict[str, Any]:
        return {"cwd": "/", **self.identity()}

    def connect(
        self, database: str = "postgres", user: str = "postgres", password: str = "postgres"
    ) -> psycopg2.extensions.connection:
        connection: psycopg2.extensions.connection = psycopg2.connect(
            host=HOST, port=self.port, dbname=database, user=user, password=password
        )
        return connection

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        return Database(self, "postgres").query(sql)

    def ready(self) -> bool:
        try:
            self.connect().close()
        except psycopg2.OperationalError:
            return False
        return True

    def database(self, template: str = "template1") -> Database:
        """Make a new database."""
        self._databases += 1
        name = f"test_{self._databases}"
        self.query(f"CREATE DATABASE {name} TEMPLATE {template}")
        return Database(self, name)

    def stop(self) -> int:
        """Stop it in "fast" mode: sessions are disconnected, open transactions are rolled back."""
        self.signal(signal.SIGINT)
        return self.wait()

    def kill(self) -> None:
        """Kill the server and each of its backends, as a power cut does."""
        pids = [self.pid, *children(self.pid)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()
        eventually(lambda: not any(map(alive, pids)), what="backends are gone")
        (self.data / "postmaster.pid").unlink(missing_ok=True)
