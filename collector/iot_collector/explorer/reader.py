"""The explorer's connection to PostgreSQL: one, read-only, and with a limit on every wait."""

import contextlib
import select
import threading
import time
from typing import Any

import psycopg2
import psycopg2.extensions

from ..database import read_password
from ..settings import Settings

_QUERY_SECONDS = 2.0  # then the server cancels a query
_ANSWER_SECONDS = 3.0  # then we stop waiting for an answer or a connection
_RETRY_SECONDS = 1.0  # after a failed connection, until the next attempt
_SET_UP = f"""
SET default_transaction_read_only = on;
SET statement_timeout = {_QUERY_SECONDS * 1000:.0f};
SET lock_timeout = 500;
SET jit = off;
SET max_parallel_workers_per_gather = 0
"""

Rows = list[tuple[Any, ...]]


class UnavailableError(Exception):
    """The database did not answer a query; the text tells viewers why."""


class Reader:
    """Sends the queries of all viewers to the database, one at a time.

    The connection is asynchronous, because only then can we stop waiting for a hanging server.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._connection: psycopg2.extensions.connection | None = None
        self._failure = UnavailableError("not asked yet")
        self._retry_at = 0.0

    def ask(self, query: str, values: dict[str, Any]) -> Rows:
        """Return the rows of a query.

        :raises UnavailableError: there is no answer within a few seconds.
        """
        if not self._lock.acquire(timeout=_ANSWER_SECONDS):
            raise UnavailableError("the database is busy with the queries of other viewers")
        try:
            connection = self._connect()
            with connection.cursor() as cursor:
                cursor.execute(query, values)
                _wait(connection)
                return cursor.fetchall()
        except psycopg2.errors.QueryCanceled:
            raise UnavailableError(f"a query took more than {_QUERY_SECONDS:g} s") from None
        except psycopg2.Error as error:
            if not error.pgcode or error.pgcode[:2] == "57":  # not about the query
                self._close()
            raise UnavailableError(" ".join(str(error).split())) from error
        finally:
            self._lock.release()

    def close(self) -> None:
        """Close the connection; the next query opens another."""
        with self._lock:
            self._close()

    def _connect(self) -> psycopg2.extensions.connection:
        if self._connection is not None and not self._connection.closed:
            return self._connection
        if time.monotonic() < self._retry_at:
            raise psycopg2.OperationalError(str(self._failure))
        try:
            options = _options(self._settings)
            connection: psycopg2.extensions.connection = psycopg2.connect(**options, async_=True)
            _wait(connection)
            with connection.cursor() as cursor:
                cursor.execute(_SET_UP)
                _wait(connection)
        except (psycopg2.Error, OSError) as error:
            self._retry_at = time.monotonic() + _RETRY_SECONDS
            self._failure = UnavailableError(" ".join(str(error).split()))
            raise psycopg2.OperationalError(str(error)) from error
        self._connection = connection
        return connection

    def _close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(psycopg2.Error):
                self._connection.close()
        self._connection = None


def _options(settings: Settings) -> dict[str, Any]:
    """Return the connection parameters: those of the page, else those of the collector.

    :raises OSError: the file with the password cannot be read.
    :raises PasswordError: the password of the collector cannot be read.
    """
    if url := settings.live_page_database_url:
        password = settings.live_page_database_secret
    else:
        url, password = settings.database_url, read_password(settings)
    options = {"fallback_application_name": "iot-collector explorer", "client_encoding": "UTF8"}
    options |= psycopg2.extensions.parse_dsn(url)
    return options if password is None else options | {"password": password}


def _wait(connection: psycopg2.extensions.connection) -> None:
    """Wait for the server's answer (psycopg2's documentation, "Asynchronous support").

    :raises psycopg2.OperationalError: there was no answer in time.
    """
    until = time.monotonic() + _ANSWER_SECONDS
    poll = select.poll()
    while (state := connection.poll()) != psycopg2.extensions.POLL_OK:
        wanted = select.POLLIN if state == psycopg2.extensions.POLL_READ else select.POLLOUT
        # libpq may try one address after the other, each with a new socket.
        number = connection.fileno()
        poll.register(number, wanted)
        ready = poll.poll(max(0.0, until - time.monotonic()) * 1000)
        poll.unregister(number)
        if not ready:
            connection.close()
            raise psycopg2.OperationalError(f"no answer within {_ANSWER_SECONDS:g} s")
