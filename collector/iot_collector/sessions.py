"""The table ``sessions``: the topic filters that the session of each client id is subscribed to.

A filter has two forms: plain (``iot/data``: every message) and shared (``$share/<group>/iot/data``:
each message to one member). While one pod of a StatefulSet has one form and another pod the other,
both get the same messages. So a pod claims its filters here before it subscribes to them, and it
waits while another pod has a different form of one of them.

Pod 0 always keeps its session, so that the broker queues messages while no pod runs. The other pods
therefore wait for pod 0 to change its form, and pod 0 waits for the others to stop. Nothing is lost
meanwhile, because a waiting pod keeps the subscriptions that its session has. See
docs/adr/0002-changing-subscriptions.md.
"""

import re
from dataclasses import dataclass, field

import psycopg2.extensions

from .settings import Settings

Cursor = psycopg2.extensions.cursor

_SHARE = re.compile(r"\$share/[^/]+/")


@dataclass(slots=True)
class Claim:
    """Whether the session may be subscribed to the filters of the settings.

    :param held: the filters that it is subscribed to already, as far as is known.
    :param stale: those of them that are not in the settings any more.
    :param waiting_for: client ids of the sessions to wait for; then nothing was claimed.
    """

    held: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    waiting_for: list[str] = field(default_factory=list)


def without_share(topic_filter: str) -> str:
    """Return a filter without ``$share/<group>/``."""
    return _SHARE.sub("", topic_filter, count=1)


def conflicts(one: list[str], other: list[str]) -> bool:
    """Whether one session has a plain and the other a shared form (or two groups) of a filter."""
    forms = {(without_share(f), f) for f in one}
    others = {(without_share(g), g) for g in other}
    return any(a == b and f != g for a, f in forms for b, g in others)


def claim(cursor: Cursor, settings: Settings, *, present: bool, force: bool = False) -> Claim:
    """Save the filters of the settings in our row, unless we have to wait for another session.

    :param present: whether the broker has kept our session; if not, it has no subscription.
    :param force: do not wait for any other session.
    :raises psycopg2.Error: nothing was claimed.
    """
    # Pods that claim at the same time take turns; otherwise neither would see the other's claim.
    cursor.execute("SELECT pg_advisory_xact_lock(hashtext('iot.sessions'))")
    cursor.execute("SELECT client_id, filters FROM sessions")
    rows: dict[str, list[str]] = dict(cursor.fetchall())
    me, wanted = settings.mqtt_client_id, settings.mqtt_topics
    mine = rows.pop(me, [])
    held = mine if present else []
    added = [f for f in wanted if f not in held]
    others = settings.pods_to_wait_for(rows)
    waiting_for = sorted(other for other in others if conflicts(added, rows[other]))
    if waiting_for and not force:
        if held != mine:
            save_filters(cursor, me, held)
        return Claim(held=held, waiting_for=waiting_for)
    save_filters(cursor, me, [*held, *added])
    return Claim(held=held, stale=[f for f in held if f not in wanted])


def save_filters(cursor: Cursor, client_id: str, filters: list[str]) -> None:
    """Save what a session is subscribed to; a session without filters has no row."""
    if filters:
        cursor.execute(
            "INSERT INTO sessions (client_id, filters) VALUES (%s, %s)"
            " ON CONFLICT (client_id) DO UPDATE SET filters = excluded.filters",
            (client_id, filters),
        )
    else:
        cursor.execute("DELETE FROM sessions WHERE client_id = %s", (client_id,))
