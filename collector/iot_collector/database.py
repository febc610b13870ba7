"""Connections to PostgreSQL, and what its errors mean."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import psycopg2
import psycopg2.errorcodes
import psycopg2.extensions

from .settings import Settings

# Kind of error -> SQLSTATEs and their classes; of both, the longer one counts
# (https://www.postgresql.org/docs/current/errcodes-appendix.html).
_KINDS = {
    "authentication": ["28"],
    "conflict": ["40"],
    "connection": ["08"],
    # 44 is WITH CHECK OPTION; 54, a program limit, a topic too long for the index; P0 is a
    # trigger's RAISE: somebody's own rule refuses the row.
    "data": ["22", "23", "44", "54", "P0"],
    "disk_full": ["53100"],
    "permission": ["42501"],
    "read_only": ["25006"],
    "resources": ["53"],
    "schema": ["3D", "3F", "42"],
    "shutdown": ["57"],
    "timeout": ["55P03", "57014"],
    "too_many_connections": ["53300"],
}
_KIND_OF = {state: kind for kind, states in _KINDS.items() for state in states}
# The classes of SQLSTATE that PostgreSQL has itself.
_CLASSES = {v for k, v in vars(psycopg2.errorcodes).items() if k.startswith("CLASS_")}

HINTS = {
    "bug": "this is a fault of the collector: report it with the traceback that its log has",
    "authentication": "check the user in IOT_DATABASE_URL and IOT_DATABASE_PASSWORD_FILE",
    "client_id": "another collector has this client id; give each its own IOT_MQTT_CLIENT_ID",
    "connection": "is PostgreSQL running? Check host and port in IOT_DATABASE_URL",
    # Met only where dead_letters_fallback refuses what dead_letters refused; the text names it.
    "data": "remove the constraint or trigger that refuses it; until then nothing more is stored",
    "permission": "grant the user of IOT_DATABASE_URL INSERT on messages, dead_letters "
    "and dead_letters_fallback",
    "schema": "run `iot-collector migrate`",
    "timeout": "find what locks or slows the database, or raise IOT_DATABASE_TIMEOUT_SECONDS",
    "upgraded": "PostgreSQL was upgraded under the running server; run the playbook again to "
    "restart it",
}

# What the settings may say otherwise.
_DEFAULTS: dict[str, Any] = {
    "fallback_application_name": "iot-collector",
    "client_encoding": "UTF8",  # which is what MQTT's topics are in
    "connect_timeout": 10,
    # A peer that vanished is noticed in seconds, not in TCP's quarter of an hour.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}


class Watch:
    """Knows since when a statement waits for its answer, and can end the wait from outside.

    The server ends a statement after its statement_timeout, but not a COMMIT, and not when the
    server itself hangs. TCP keepalive notices a dead peer, but not one whose kernel still answers.

    :param limit: the longest wait for one answer, in seconds.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.beat = time.monotonic()  # when a statement was last sent or answered
        self._waiting = False
        self._socket: socket.socket | None = None

    def open(self, connection: psycopg2.extensions.connection) -> None:
        """Watch a new connection."""
        self.close()
        # A descriptor of our own: libpq closes its own at any time, and the number is used again.
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))

    def close(self) -> None:
        """Watch nothing any more; the connection is closed by its owner."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    @contextlib.contextmanager
    def statement(self) -> Iterator[None]:
        """Watch the statement that the block sends."""
        self.beat, self._waiting = time.monotonic(), True
        try:
            yield
        finally:
            self.beat, self._waiting = time.monotonic(), False

    def break_if_overdue(self) -> bool:
        """End a wait that is over its limit by an error in the waiting thread; any thread."""
        sock = self._socket
        overdue = self._waiting and time.monotonic() - self.beat > self.limit
        if sock is None or not overdue:
            return False
        with contextlib.suppress(OSError):  # it has just been closed
            sock.shutdown(socket.SHUT_RDWR)
        return True


class WatchedConnection(psycopg2.extensions.connection):
    """A connection whose statements may be watched."""

    watch: Watch | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.cursor_factory = WatchedCursor


class WatchedCursor(psycopg2.extensions.cursor):
    """A cursor that tells its connection's watch when it waits."""

    def execute(self, query: Any, values: Any = None) -> None:
        """Run a statement, see psycopg2."""
        with self._watched():
            super().execute(query, values)

    def copy_expert(self, sql: Any, file: Any, size: int = 8192) -> None:
        """Run COPY, see psycopg2."""
        with self._watched():
            super().copy_expert(sql, file, size)

    def _watched(self) -> contextlib.AbstractContextManager[None]:
        watch = getattr(self.connection, "watch", None)
        return watch.statement() if watch else contextlib.nullcontext()


def kind_of(error: Exception) -> str:
    """Return the kind of an error, one of a small fixed set."""
    if not isinstance(error, psycopg2.Error):
        return "bug"
    if not error.pgcode:
        # What libpq says of a connection comes as OperationalError, or DatabaseError itself where
        # psycopg2 has nothing more exact; what psycopg2 finds wrong with a call, as another one
        # (ProgrammingError, InterfaceError, ...): seen with psycopg2 2.9.
        if type(error) not in (psycopg2.OperationalError, psycopg2.DatabaseError):
            return "bug"
        return "authentication" if "authentication failed" in str(error) else "connection"
    if error.diag.constraint_name == "ledger_pkey":
        return "client_id"  # another process writes batches under ours
    if error.pgcode == "23514" and error.diag.table_name and not error.diag.constraint_name:
        return "schema"  # neither a CHECK nor a RAISE: there is no partition for the row
    if error.pgcode == "58P01" and ".so" in str(error):
        return "upgraded"  # a library that is missing, or is not of the running server's release
    for state in (error.pgcode, error.pgcode[:2]):
        if state in _KIND_OF:
            return _KIND_OF[state]
    # A class that PostgreSQL does not have comes from a trigger's RAISE, like P0.
    return "other" if state in _CLASSES else "data"


def one_line(error: Exception) -> str:
    """Return the text of an error without line breaks."""
    return " ".join(str(error).split())


def explain(error: Exception) -> str:
    """Return kind and text of an error, and what to do about it."""
    kind = kind_of(error)
    text = one_line(error)
    if kind == "bug":
        text = f"{type(error).__name__}: {text}"
    hint = HINTS.get(kind)
    return f"{kind}: {text}" + (f"; {hint}" if hint else "")


def connect(settings: Settings) -> WatchedConnection:
    """Open a connection as the settings say, libpq's variables filling what they leave open.

    :raises psycopg2.OperationalError: the database is not reached or refuses the login.
    """
    options = _DEFAULTS | psycopg2.extensions.parse_dsn(settings.database_url)
    try:
        password = settings.database_secret
    except OSError as error:  # a secret being rotated may be away for a moment
        raise psycopg2.OperationalError(f"password file: {error}") from error
    if password is not None:
        options["password"] = password
    connection: WatchedConnection = psycopg2.connect(
        connection_factory=WatchedConnection, **options
    )
    # Transactions are begun and ended in SQL, where that saves round trips.
    connection.autocommit = True
    return connection
