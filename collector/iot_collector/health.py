"""What is true of the collector now, as answered to people and to probes."""

import time
from dataclasses import asdict, dataclass

from . import __version__
from .dead_letters import REFUSED_TWICE
from .flow import Account, Flow
from .link import Link
from .settings import Settings
from .writer import Writer

# Bugs that a thread may meet without progress in between before a restart is tried.
_MANY_BUGS = 5

Report = dict[str, object]


@dataclass
class Health:
    """Answers /health, /livez and /readyz. Each report has a ``status``; "ok" is 200."""

    settings: Settings
    flow: Flow
    link: Link
    writer: Writer

    def report(self) -> Report:
        """The whole truth, with the reasons why the status is not "ok"."""
        account = self.flow.account()
        oldest = self.flow.oldest_age()
        problems = self._dependencies() + self._threads()
        if oldest > self.settings.unhealthy_after_seconds:
            problems.append(f"a message has waited {oldest:.0f} s for its COMMIT")
        if not account.balances():
            problems.append("the account of messages does not balance: this is a bug")
        connection = self.link.connection
        return _report(problems) | {
            "warnings": _warnings(account),
            "broker": {
                "address": str(self.settings.broker),
                "connected": self.link.connected,
                "session_present": connection.session_present if connection else None,
                "topics": self.settings.mqtt_topics,
                "client_id": self.settings.mqtt_client_id,
                "error": self._broker_error(),
                "waiting_for": self._waits_for(),
            },
            "database": {"connected": self.writer.error is None, "error": self.writer.error},
            "oldest_unacked_seconds": round(oldest, 3),
            "accounting": asdict(account) | {"dead_letters": account.dead_letters.total()},
            "version": __version__,
        }

    def live(self) -> Report:
        """Whether a restart could help: only when a thread is dead or hangs."""
        return _report(self._threads())

    def ready(self) -> Report:
        """Whether messages can be received and stored now, or another pod does it for us.

        A StatefulSet replaces pod 0, for which the other pods wait, when they are ready.
        """
        waits_for = self._waits_for()
        return _report(self._dependencies()) | ({"waiting_for": waits_for} if waits_for else {})

    def _dependencies(self) -> list[str]:
        problems = []
        if not self.link.connected and not self._waits_for():
            problems.append(f"broker: {self._broker_error() or 'not subscribed yet'}")
        if self.writer.error is not None:
            problems.append(f"database: {self.writer.error}")
        return problems

    def _waits_for(self) -> list[str]:
        return self.link.subscriptions.waits_for if self.link.connection is not None else []

    def _broker_error(self) -> str | None:
        refused = self.link.subscriptions.refused
        if refused and self.link.connection is not None:
            return f"subscription refused: {refused}"
        return self.link.error

    def _threads(self) -> list[str]:
        problems = []
        for thread in (self.link, self.writer):
            if not thread.is_alive():
                problems.append(f"thread {thread.name} is dead")
            elif time.monotonic() - thread.beat > thread.limit:
                problems.append(f"thread {thread.name} hangs")
            elif thread.bugs >= _MANY_BUGS:
                problems.append(f"thread {thread.name} fails again and again: {thread.error}")
        return problems


def _warnings(account: Account) -> list[str]:
    """Return what somebody should look at, though messages are received and stored."""
    if twice := account.dead_letters[REFUSED_TWICE]:
        return [
            f"dead_letters refused {twice} messages, which are kept in dead_letters_fallback; "
            "remove the constraint or trigger that refuses them"
        ]
    return []


def _report(problems: list[str]) -> Report:
    return {"status": "failing" if problems else "ok", "problems": problems}
