"""What is true of the collector now, as answered to people and to probes."""

import time
from dataclasses import asdict

from . import __version__
from .flow import Flow
from .link import Link
from .settings import Settings
from .writer import Writer

# Threads take a step at least once a second, or, where they wait for the database, whenever it
# answers; one that has not for so long hangs.
_STUCK_SECONDS = 60.0

Report = dict[str, object]


class Health:
    """Answers /health, /livez and /readyz. Each report has a ``status``; "ok" is 200."""

    def __init__(self, settings: Settings, flow: Flow, link: Link, writer: Writer) -> None:
        self._settings = settings
        self._flow = flow
        self._link = link
        self._writer = writer

    def report(self) -> Report:
        """The whole truth, with the reasons why the status is not "ok"."""
        account = self._flow.account()
        oldest = self._flow.oldest_age()
        problems = self._dependencies() + self._threads()
        if oldest > self._settings.unhealthy_after_seconds:
            problems.append(f"a message has waited {oldest:.0f} s for its COMMIT")
        if not account.balances():
            problems.append("the account of messages does not balance: this is a bug")
        connection = self._link.connection
        return {
            "status": "failing" if problems else "ok",
            "problems": problems,
            "broker": {
                "address": str(self._settings.broker),
                "connected": self._link.connected,
                "session_present": connection.session_present if connection else None,
                "topics": self._settings.mqtt_topics,
                "client_id": self._settings.mqtt_client_id,
                "error": self._broker_error(),
            },
            "database": {"connected": self._writer.error is None, "error": self._writer.error},
            "oldest_unacked_seconds": round(oldest, 3),
            "accounting": asdict(account) | {"dead_letters": account.dead_letters.total()},
            "version": __version__,
        }

    def live(self) -> Report:
        """Whether a restart could help: only when a thread is dead or hangs."""
        return _probe(self._threads())

    def ready(self) -> Report:
        """Whether messages can be received and stored now."""
        return _probe(self._dependencies())

    def _dependencies(self) -> list[str]:
        problems = []
        if not self._link.connected:
            problems.append(f"broker: {self._broker_error() or 'not subscribed yet'}")
        if self._writer.error is not None:
            problems.append(f"database: {self._writer.error}")
        return problems

    def _broker_error(self) -> str | None:
        connection = self._link.connection
        if connection is not None and connection.refused:
            return f"subscription refused: {connection.refused}"
        return self._link.error

    def _threads(self) -> list[str]:
        now = time.monotonic()
        problems = [
            f"thread {thread.name} is dead"
            for thread in (self._link, self._writer)
            if not thread.is_alive()
        ]
        if now - self._link.beat > _STUCK_SECONDS:
            problems.append("thread network hangs")
        if now - self._writer.beat > _STUCK_SECONDS and not self._writer.in_database:
            problems.append("thread writer hangs")
        return problems


def _probe(problems: list[str]) -> Report:
    return {"status": "failing" if problems else "ok", "problems": problems}
