"""The health reports of the collector, for people and for Kubernetes probes."""

import time
from dataclasses import asdict, dataclass

from . import __version__
from .buffer import Buffer, Counts
from .dead_letters import REFUSED_TWICE
from .network import NetworkThread
from .settings import Settings
from .writer import WriterThread

# With this many bugs in a row in one thread, /livez fails, because a restart may help.
_MANY_BUGS = 5

Report = dict[str, object]


@dataclass
class Health:
    """Makes the reports for /health, /livez and /readyz.

    The HTTP status is 200 if ``status`` is "ok" (see server.py).
    """

    settings: Settings
    buffer: Buffer
    network: NetworkThread
    writer: WriterThread

    def report(self) -> Report:
        """Return the complete state, with the reasons if ``status`` is not "ok"."""
        counts = self.buffer.counts()
        oldest = self.buffer.oldest_age()
        problems = self._dependencies() + self._threads()
        if oldest > self.settings.unhealthy_after_seconds:
            problems.append(f"a message has waited {oldest:.0f} s for its COMMIT")
        if not counts.balanced:
            problems.append(
                "the counts of messages are inconsistent: this is a bug in the collector"
            )
        connection = self.network.connection
        return _report(problems) | {
            "warnings": _warnings(counts),
            "broker": {
                "address": str(self.settings.broker),
                "connected": self.network.connected,
                "session_present": connection.session_present if connection else None,
                "topics": self.settings.mqtt_topics,
                "client_id": self.settings.mqtt_client_id,
                "error": self._broker_error(),
                "waiting_for": self.network.waiting_for,
            },
            "database": {"connected": self.writer.error is None, "error": self.writer.error},
            "oldest_unacked_seconds": round(oldest, 3),
            "accounting": asdict(counts) | {"dead_letters": counts.dead_letters.total()},
            "version": __version__,
        }

    def live(self) -> Report:
        """Return whether both threads work.

        The status is "failing" only if a restart may help: a thread ended, hangs or keeps failing.
        """
        return _report(self._threads())

    def ready(self) -> Report:
        """Return whether messages can be received and stored.

        A pod that waits for another collector is ready, because a StatefulSet replaces pod 0 only
        after the other pods are ready.
        """
        waiting_for = self.network.waiting_for
        return _report(self._dependencies()) | ({"waiting_for": waiting_for} if waiting_for else {})

    def _dependencies(self) -> list[str]:
        problems = []
        if not self.network.connected and not self.network.waiting_for:
            problems.append(f"broker: {self._broker_error() or 'not subscribed yet'}")
        if self.writer.error is not None:
            problems.append(f"database: {self.writer.error}")
        return problems

    def _broker_error(self) -> str | None:
        refused = self.network.subscriptions.refused
        if refused and self.network.connection is not None:
            return f"subscription refused: {refused}"
        return self.network.error

    def _threads(self) -> list[str]:
        problems = []
        for thread in (self.network, self.writer):
            if not thread.is_alive():
                problems.append(f"thread {thread.name} is dead")
            elif time.monotonic() - thread.last_progress > thread.progress_timeout:
                problems.append(f"thread {thread.name} hangs")
            elif thread.consecutive_bugs >= _MANY_BUGS:
                problems.append(f"thread {thread.name} fails repeatedly: {thread.error}")
        return problems


def _warnings(counts: Counts) -> list[str]:
    """Return what needs attention although messages are received and stored."""
    if twice := counts.dead_letters[REFUSED_TWICE]:
        return [
            f"dead_letters refused {twice} messages, which are kept in dead_letters_fallback; "
            "remove the constraint or trigger that refuses them"
        ]
    return []


def _report(problems: list[str]) -> Report:
    return {"status": "failing" if problems else "ok", "problems": problems}
