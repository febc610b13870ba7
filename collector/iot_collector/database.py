"""Connections to PostgreSQL, and the kinds of its errors."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import psycopg2
import psycopg2.errorcodes
import psycopg2.extensions

from . import aws, password_secret
from .log import one_line
from .settings import Settings

# Kind of error -> its SQLSTATEs (5 characters) and SQLSTATE classes (2 characters). An SQLSTATE
# takes precedence over its class
# (https://www.postgresql.org/docs/current/errcodes-appendix.html).
_KINDS = {
    "authentication": ["28"],
    "conflict": ["40"],
    "connection": ["08"],
    # 44: WITH CHECK OPTION. 54: a program limit, for example a topic too long for the index.
    # P0: RAISE in a trigger.
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
# The SQLSTATE classes that PostgreSQL defines.
_CLASSES = {v for k, v in vars(psycopg2.errorcodes).items() if k.startswith("CLASS_")}

# Parts of libpq's TLS error messages. These errors have no SQLSTATE (libpq 17).
_TLS_FAULTS = (
    *("certificate verify failed", "does not match host name", "root certificate"),
    "server does not support SSL",
)

HINTS = {
    "bug": "this is a bug in the collector: report it with the traceback from its log",
    "authentication": "check the user in IOT_DATABASE_URL, and IOT_DATABASE_PASSWORD_FILE or "
    "IOT_DATABASE_PASSWORD_SECRET",
    "connection": "is PostgreSQL running? Check host and port in IOT_DATABASE_URL",
    # Shown only if dead_letters_fallback refuses a message too. The error names the constraint.
    "data": "remove the constraint or trigger that refuses it; until then nothing more is stored",
    "permission": "grant the user of IOT_DATABASE_URL INSERT on messages, dead_letters "
    "and dead_letters_fallback",
    "schema": "run `iot-collector migrate`",
    "tls": "check IOT_DATABASE_URL: sslrootcert must be a file with the CA that signed the "
    "server's certificate (for RDS, the bundle of its region), and host must be a name in the "
    "certificate",
    "timeout": "find what locks or slows down the database, or raise IOT_DATABASE_TIMEOUT_SECONDS",
    "upgraded": "PostgreSQL was upgraded while its server ran; run the playbook again to restart "
    "the server",
}

# Connection parameters that IOT_DATABASE_URL may override.
_DEFAULTS: dict[str, Any] = {
    "fallback_application_name": "iot-collector",
    "client_encoding": "UTF8",  # the encoding of MQTT topics
    "connect_timeout": 10,
    # Detect a lost peer within about 30 s. With the defaults of TCP it takes 15 minutes.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}


class StatementWatchdog:
    """Breaks a connection whose statement has waited too long for its response.

    PostgreSQL's statement_timeout does not end a COMMIT, and has no effect if the server itself
    hangs. TCP keepalive does not detect a hanging server, because its kernel still answers.

    :param limit: the longest wait for one response, in seconds.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.last_progress = time.monotonic()  # when a statement last started or ended
        self._waiting = False
        self._socket: socket.socket | None = None

    def open(self, connection: psycopg2.extensions.connection) -> None:
        """Watch a new connection."""
        self.close()
        # A duplicate of libpq's file descriptor. libpq may close its own at any time, and the
        # number could then belong to another file.
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))

    def close(self) -> None:
        """Stop watching; the connection is closed by its owner."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    @contextlib.contextmanager
    def statement(self) -> Iterator[None]:
        """Watch the statement that the block sends."""
        self.last_progress, self._waiting = time.monotonic(), True
        try:
            yield
        finally:
            self.last_progress, self._waiting = time.monotonic(), False

    def break_if_overdue(self) -> bool:
        """Shut down the socket if a statement has waited too long; return whether it did.

        Called by another thread. The waiting thread gets a psycopg2.OperationalError.
        """
        sock = self._socket
        overdue = self._waiting and time.monotonic() - self.last_progress > self.limit
        if sock is None or not overdue:
            return False
        with contextlib.suppress(OSError):  # it may have been closed meanwhile
            sock.shutdown(socket.SHUT_RDWR)
        return True


class WatchedConnection(psycopg2.extensions.connection):
    """A connection whose statements a watchdog may watch."""

    watchdog: StatementWatchdog | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.cursor_factory = WatchedCursor


class WatchedCursor(psycopg2.extensions.cursor):
    """A cursor that tells the watchdog of its connection when it waits."""

    def execute(self, query: Any, values: Any = None) -> None:
        """Run a statement, see psycopg2."""
        with self._watched():
            super().execute(query, values)

    def copy_expert(self, sql: Any, file: Any, size: int = 8192) -> None:
        """Run COPY, see psycopg2."""
        with self._watched():
            super().copy_expert(sql, file, size)

    def _watched(self) -> contextlib.AbstractContextManager[None]:
        watchdog = getattr(self.connection, "watchdog", None)
        return watchdog.statement() if watchdog else contextlib.nullcontext()


class KnownError(psycopg2.Error):
    """An error whose kind and remedy are known where it is raised."""

    kind: str
    hint: str


class PasswordError(KnownError):
    """The password cannot be read from the file or secret in the settings; the text has a hint."""

    kind = "password"
    hint = ""


class NewerSchemaError(KnownError):
    """A newer version has migrated the database, so this version may misread the schema."""

    kind = "newer_schema"
    hint = "install the version of iot-collector that migrated the database, or a newer one"


def kind_of(error: Exception) -> str:
    """Return the kind of an error, one of a small fixed set (a label of db_errors_total)."""
    if isinstance(error, KnownError):
        return error.kind
    if not isinstance(error, psycopg2.Error):
        return "bug"
    if not error.pgcode:
        # Without an SQLSTATE, psycopg2 2.9 raises OperationalError or DatabaseError for connection
        # errors, and other classes (ProgrammingError, InterfaceError, ...) for wrong calls.
        if type(error) not in (psycopg2.OperationalError, psycopg2.DatabaseError):
            return "bug"
        if "authentication failed" in str(error):
            return "authentication"
        return "tls" if any(fault in str(error) for fault in _TLS_FAULTS) else "connection"
    if error.pgcode == "23514" and error.diag.table_name and not error.diag.constraint_name:
        return "schema"  # a check_violation without a constraint: there is no partition for the row
    if error.pgcode == "58P01" and ".so" in str(error):
        return "upgraded"  # a shared library is missing or from another release than the server
    for state in (error.pgcode, error.pgcode[:2]):
        if state in _KIND_OF:
            return _KIND_OF[state]
    # A class that PostgreSQL does not define comes from RAISE in a trigger, as P0 does.
    return "other" if state in _CLASSES else "data"


def explain(error: Exception) -> str:
    """Return the kind and text of an error, and a hint what to do about it."""
    kind = kind_of(error)
    text = one_line(error)
    if kind == "bug":
        text = f"{type(error).__name__}: {text}"
    hint = error.hint if isinstance(error, KnownError) else HINTS.get(kind)
    return f"{kind}: {text}" + (f"; {hint}" if hint else "")


def connect(settings: Settings) -> WatchedConnection:
    """Open a connection.

    libpq's environment variables (PGHOST, ...) provide what the settings leave out. libpq resolves
    the host name and reads the CA file at each call. If the database refuses the password, it is
    read again, and a new one is tried once.

    :raises psycopg2.OperationalError: the database cannot be reached or refuses the login.
    :raises PasswordError: the password cannot be read.
    """
    password = read_password(settings)
    try:
        return _connect(settings, password)
    except psycopg2.OperationalError as refusal:
        if kind_of(refusal) != "authentication":
            raise
        newer = read_password(settings, refused=password)
        if newer == password:
            raise
    return _connect(settings, newer)


def read_password(settings: Settings, refused: str | None = None) -> str | None:
    """Return the password for the database; None leaves it to libpq.

    :param refused: a password that the database has just refused; a secret is then read again.
    :raises PasswordError: the password cannot be read.
    """
    secret = settings.database_password_secret
    try:
        return password_secret.password(secret, refused) if secret else settings.database_secret
    except aws.AwsError as error:
        raise PasswordError(f"IOT_DATABASE_PASSWORD_SECRET: {error}") from error
    except OSError as error:  # the file may be missing for a moment during a rotation
        raise PasswordError(f"password file: {error}") from error


def _connect(settings: Settings, password: str | None) -> WatchedConnection:
    options = _DEFAULTS | psycopg2.extensions.parse_dsn(settings.database_url)
    if password is not None:
        options["password"] = password
    connection: WatchedConnection = psycopg2.connect(
        connection_factory=WatchedConnection, **options
    )
    # BEGIN and COMMIT are part of the SQL in this package, which saves round trips.
    connection.autocommit = True
    return connection
