"""Who is subscribed to what: the table ``sessions``, a row for each client id.

A filter has two forms: plain (``iot/data``: every message) and shared (``$share/<group>/iot/data``:
each message to one member). While one pod of a StatefulSet has one form and another pod the other,
both get the same messages. So before a pod subscribes to a filter it asks here whether another pod
still has another form of it, and it does not subscribe until that pod has changed its own.

Pod 0 keeps its session for ever, so the broker always has somebody to queue for. The other pods
therefore wait for pod 0, and pod 0 waits for the others to end. Nothing is lost meanwhile:
who waits keeps the subscriptions that its session has. docs/adr/0002-changing-subscriptions.md.
"""

import re
from dataclasses import dataclass, field

import psycopg2.extensions

from .settings import Settings

Cursor = psycopg2.extensions.cursor

_SHARE = re.compile(r"\$share/[^/]+/")


@dataclass(slots=True)
class Claim:
    """The answer to whether the session may be subscribed to the filters of the settings.

    :param held: the filters that it is subscribed to already, as far as is known.
    :param stale: those of them that the settings do not name any more.
    :param waits_for: client ids of the sessions to wait for; then nothing was claimed.
    """

    held: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    waits_for: list[str] = field(default_factory=list)


def bare(topic_filter: str) -> str:
    """Return a filter without ``$share/<group>/``."""
    return _SHARE.sub("", topic_filter, count=1)


def conflicts(one: list[str], other: list[str]) -> bool:
    """Whether two sessions with these filters get the same messages through two forms of one."""
    forms = {(bare(f), f) for f in one}
    return any(a == b and f != g for a, f in forms for b, g in {(bare(g), g) for g in other})


def claim(cursor: Cursor, settings: Settings, *, present: bool, insist: bool = False) -> Claim:
    """Enter the filters of the settings into our row, unless another session is in the way.

    :param present: whether the broker has kept our session; if not, it has no subscription.
    :param insist: do not wait for any other session.
    :raises psycopg2.Error: nothing was claimed.
    """
    # So that two that ask at the same time do not both find the other's row without a claim.
    cursor.execute("SELECT pg_advisory_xact_lock(hashtext('iot.sessions'))")
    cursor.execute("SELECT client_id, filters FROM sessions")
    rows: dict[str, list[str]] = dict(cursor.fetchall())
    me, wanted = settings.mqtt_client_id, settings.mqtt_topics
    mine = rows.pop(me, [])
    held = mine if present else []
    added = [f for f in wanted if f not in held]
    others = settings.pods_to_wait_for(rows)
    waits_for = sorted(other for other in others if conflicts(added, rows[other]))
    if waits_for and not insist:
        if held != mine:
            note(cursor, me, held)
        return Claim(held=held, waits_for=waits_for)
    note(cursor, me, [*held, *added])
    return Claim(held=held, stale=[f for f in held if f not in wanted])


def note(cursor: Cursor, client_id: str, filters: list[str]) -> None:
    """Enter what a session is subscribed to; without a filter, it has no row."""
    if filters:
        cursor.execute(
            "INSERT INTO sessions (client_id, filters) VALUES (%s, %s)"
            " ON CONFLICT (client_id) DO UPDATE SET filters = excluded.filters",
            (client_id, filters),
        )
    else:
        cursor.execute("DELETE FROM sessions WHERE client_id = %s", (client_id,))
