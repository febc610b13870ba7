"""Subscribes the broker's session to the filters of the settings, and to nothing else.

A session outlives the process, and so does a subscription to a filter that is no longer in the
settings. Such a subscription is *replaced*. There must be no gap between the old and the new
subscription, so for a moment the session has both, and the broker sends each message twice. One
SUBSCRIBE, which the broker carries out as a whole, adds the new filter and lowers the old one to
QoS 0. From then on the copy for the old filter has QoS 0 and is dropped; the one for the new filter
has its QoS and packet id. docs/adr/0002-changing-subscriptions.md has the reasons and the limits.

On AWS IoT Core a new subscription may take effect some time after the SUBACK. There, no filter is
lowered and no copy is dropped: both filters keep their QoS for a while. A message that comes twice
meanwhile is recognised by its message id (IOT_MESSAGE_ID_KEY), or stored twice.
"""

import math
import time
from dataclasses import dataclass

import structlog
from paho.mqtt.client import topic_matches_sub
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from .buffer import QOS, Event, ReadBatch, SessionStart, SubscriptionsChanged
from .client import StockClient
from .copy_format import decode_tuple, tuple_start
from .iot_core import FILTERS_PER_PACKET, OVERLAP
from .sessions import Claim, without_share
from .settings import Settings

log = structlog.get_logger(__name__)

# All times are in seconds.
_RETRY_REFUSED = 15.0  # until a refused subscription is tried again
_RETRY_CLAIM = 1.0  # between two attempts to claim filters while another session blocks them
# How long to wait for the database to answer a claim. Then we subscribe without an answer, because
# messages must not be lost while the database is unavailable. A session that the broker kept loses
# nothing while it waits; a new one does. The other pods of a StatefulSet can wait for long, because
# the session of pod 0 gets the messages.
_NEW_SESSION_TIMEOUT, _KEPT_SESSION_TIMEOUT, _OTHER_POD_TIMEOUT = 2.0, 10.0, 600.0
# How long to wait for the sessions of other pods. Pods have 50 s to stop
# (terminationGracePeriodSeconds). Pod 0 is replaced, which may include an image pull.
_WAIT_FOR_PODS, _WAIT_FOR_POD_0 = 60.0, 600.0


@dataclass(slots=True)
class _Request:
    """A SUBSCRIBE that has no SUBACK yet; it lowers the ``stale`` filters to QoS 0."""

    filters: list[str]
    stale: list[str]


class Subscriptions:
    """The subscriptions of one session, over successive connections.

    Used by the network thread only; other threads may read the public attributes.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._v5 = settings.mqtt_version == "5"
        self._lowers = self._v5 and not settings.iot_core
        self._another_pod = bool(settings.session_on_stop == "ordinal" and settings.leave_on_stop)
        self._client: StockClient
        self._connection: object = None
        self._up_to_date = False  # the session has the filters of the settings and no others
        self._waiting_since = math.inf
        self.active = False  # all filters of the settings are subscribed to
        self.refused: dict[str, str]  # filter -> why the broker refused it
        self.waiting_for: list[str]  # client ids of the sessions to wait for
        self.events: list[Event]  # to be put into the buffer
        self.reset()

    def reset(self) -> None:
        """Forget the state of a connection that has ended."""
        self.active, self.refused, self.waiting_for, self.events = False, {}, [], []
        self._requests: dict[int | None, _Request] = {}  # by packet id
        # Packet ids of UNSUBSCRIBEs without an UNSUBACK:
        self._removals: set[int | None] = set()  # those that end a replacement
        self._leaves: set[int | None] = set()  # those of `unsubscribe_all`
        self._due: list[str] = []  # the filters of the next SUBSCRIBE, to be sent at `_due_at`
        self._due_at = 0.0
        self._requested = False  # a SUBSCRIBE with the filters of the settings was sent
        self._left = False  # the UNSUBSCRIBE of `unsubscribe_all` was sent
        self._held: list[str] = []
        self._stale: list[str] = []
        self._removed: list[str] = []  # stale filters of the UNSUBSCRIBE, without their group
        self._overlapping: list[str] = []  # stale filters that stay until `_overlap_ends`
        self._overlap_ends = math.inf
        self._claim_at = math.inf
        # Where copies start and end among the messages that the client holds, see `drop_copies`.
        self._copies_start: int | None = None
        self._copies_end: int | None = None
        self._dropped: bytes | None = None  # the row of the last copy

    def start(self, client: StockClient, connection: object, *, session_present: bool) -> None:
        """Start over on a new connection."""
        self.reset()
        self._client, self._connection = client, connection
        self._due, self._due_at = self._settings.mqtt_topics, 0.0
        self._up_to_date = self._up_to_date and session_present
        if not self._up_to_date:
            # The database has to clear the ledger of a new session before the broker sends its
            # first message; otherwise a process could take it for a message of the old session.
            timeout = _KEPT_SESSION_TIMEOUT if session_present else _NEW_SESSION_TIMEOUT
            self._due_at = time.monotonic() + (_OTHER_POD_TIMEOUT if self._another_pod else timeout)
        self.check_due()

    def check_due(self) -> None:
        """Send a due claim, SUBSCRIBE or UNSUBSCRIBE; called at least once a second."""
        now = time.monotonic()
        if now >= self._claim_at:
            self._claim_at = math.inf
            limit = _WAIT_FOR_POD_0 if self._another_pod else _WAIT_FOR_PODS
            force = now - self._waiting_since > limit
            if force:
                log.warning(
                    "not waiting any longer for the sessions of other pods; messages may be stored "
                    "twice. A pod that was killed keeps its subscription until it has run again "
                    "and was stopped, or its session expires",
                    client_ids=self.waiting_for,
                )
            self.events.append(SessionStart(self._connection, session_present=True, force=force))
        if self._due and now >= self._due_at:
            self._subscribe_to_settings()
        if now >= self._overlap_ends:
            self._overlap_ends = math.inf
            self._remove(self._overlapping)

    def handle_claim(self, claim: Claim) -> None:
        """Continue with the database's answer to a claim."""
        if self._left:
            return
        self.waiting_for = [] if self._requested else claim.waiting_for
        if claim.waiting_for and self._requested:
            self.events.append(SessionStart(self._connection, session_present=True, force=True))
        elif claim.waiting_for:
            self._wait(claim)
        else:
            self._waiting_since = math.inf
            self._stale, self._up_to_date = claim.stale, not claim.stale
            if claim.stale or not self._requested:
                self._due = self._settings.mqtt_topics
                self._subscribe_to_settings()

    def _wait(self, claim: Claim) -> None:
        now = time.monotonic()
        if self._waiting_since == math.inf:
            self._waiting_since = now
            log.info(
                "waiting until other pods have changed their subscriptions, so that no message is "
                "stored twice",
                client_ids=claim.waiting_for,
                filters=self._settings.mqtt_topics,
                subscribed_to=claim.held,
            )
        self._claim_at, self._due_at = now + _RETRY_CLAIM, math.inf
        if claim.held and not self._held:
            # After a restart, the broker may have the session without its subscriptions: Mosquitto
            # 2.0 does not save shared ones.
            self._subscribe(claim.held, [])
        self._held = claim.held

    def unsubscribe_all(self) -> None:
        """Unsubscribe from everything, to leave the session."""
        self._left, self._due, self._claim_at = True, [], math.inf
        self.waiting_for = []
        filters = {*self._settings.mqtt_topics, *self._held, *self._stale}
        self._leaves = self._unsubscribe(sorted(filters))

    def _subscribe_to_settings(self) -> None:
        due, self._due = self._due, []
        self._requested = True
        self._subscribe(due, self._stale)

    def _subscribe(self, filters: list[str], stale: list[str]) -> None:
        parts = self._parts(filters)
        for part in parts:
            packet_id = self._send_subscribe(part, stale)
            # The stale filters are removed after the last part is granted.
            self._requests[packet_id] = _Request(part, stale if part is parts[-1] else [])

    def _unsubscribe(self, filters: list[str]) -> set[int | None]:
        """Send UNSUBSCRIBEs and return their packet ids."""
        return {self._client.unsubscribe(part)[1] for part in self._parts(filters)}

    def _parts(self, filters: list[str]) -> list[list[str]]:
        """Return the filters of each packet."""
        step = FILTERS_PER_PACKET if self._settings.iot_core else len(filters)
        return [filters[at : at + step] for at in range(0, len(filters), step)]

    def _send_subscribe(self, filters: list[str], stale: list[str]) -> int | None:
        """Send a SUBSCRIBE and return its packet id."""
        qos = min(self._settings.mqtt_qos, self._client.max_qos)
        if self._v5:
            # Request retained messages for a new subscription only: not at each reconnect, and not
            # for a filter that replaces another one, for which they have already arrived.
            replaced = {without_share(f) for f in stale}
            if_new, never = (
                SubscribeOptions.RETAIN_SEND_IF_NEW_SUB,
                SubscribeOptions.RETAIN_DO_NOT_SEND,
            )
            options = [(f, never if without_share(f) in replaced else if_new, qos) for f in filters]
            if self._lowers:
                options += [(f, never, 0) for f in stale]
            _, packet_id = self._client.subscribe(
                [(f, SubscribeOptions(qos=q, retainHandling=retain)) for f, retain, q in options]
            )
        else:
            # With MQTT 3.1.1, Mosquitto sends a message once, even if several filters match it. If
            # the old filter were lowered to QoS 0, the message might be sent with QoS 0.
            _, packet_id = self._client.subscribe([(f, qos) for f in filters])
        return packet_id

    def handle_suback(self, packet_id: int, reasons: list[ReasonCode]) -> None:
        """Handle the broker's answer to a SUBSCRIBE."""
        request = self._requests.pop(packet_id)
        if self._requested and not set(request.filters) <= set(self._settings.mqtt_topics):
            return  # the answer for old filters
        refused = {f: why for f, why in self.refused.items() if f not in request.filters}
        for topic_filter, reason in zip(request.filters, reasons, strict=False):
            if reason.is_failure:
                refused[topic_filter] = str(reason)
                fault = (
                    "broker refused the subscription; check IOT_MQTT_TOPICS and the broker's ACL"
                )
                log.error(fault, filter=topic_filter, reason=str(reason))
            elif reason.value == 0:
                log.warning("broker granted QoS 0 only: it may lose messages", filter=topic_filter)
        self.refused = refused  # replaced as a whole, because other threads read it
        self.active = not self.refused and not self._requests
        if self._left or not self._requested:
            return
        self._due, self._due_at = list(self.refused), time.monotonic() + _RETRY_REFUSED
        if request.stale and self._settings.iot_core:
            self._overlapping = request.stale
            self._overlap_ends = time.monotonic() + OVERLAP
        elif request.stale:
            self._remove(request.stale)

    def _remove(self, stale: list[str]) -> None:
        """Unsubscribe from old filters, except where the broker refused the new one."""
        missing = {without_share(f) for f in self.refused}
        self._stale = [f for f in stale if without_share(f) in missing]
        if self._stale:
            self._subscribe(self._stale, [])  # restores their QoS
        if removed := [f for f in stale if f not in self._stale]:
            log.info("unsubscribing from filters not in the settings any more", filters=removed)
            self._removed = [without_share(f) for f in removed]
            self._copies_start = self._client.message_count if self._lowers else None
            self._removals = self._unsubscribe(removed)

    def handle_unsuback(self, packet_id: int) -> None:
        """Handle the broker's answer to an UNSUBSCRIBE."""
        if packet_id in self._leaves:
            self._leaves.remove(packet_id)
            if not self._leaves:
                self.events.append(SubscriptionsChanged(self._connection, []))
        elif packet_id in self._removals:
            self._removals.remove(packet_id)
            if self._removals:
                return
            self._copies_end = self._client.message_count
            self._up_to_date = not self._stale
            filters = [*self._settings.mqtt_topics, *self._stale]
            self.events.append(SubscriptionsChanged(self._connection, filters))

    @property
    def replacing(self) -> bool:
        """Whether the messages of the last read may include copies."""
        return self._copies_start is not None

    def drop_copies(self, read: ReadBatch) -> ReadBatch:
        """Return the messages of a read without the copies that came for old filters.

        The copy of a message that was published with QoS 1 or 2 has QoS 0. If it was published with
        QoS 0, both have QoS 0; they are equal and come one right after the other. One of the two is
        missing if the group gave the message to another member, or has no member.
        """
        start = self._copies_start or 0
        end = len(read) if self._copies_end is None else self._copies_end
        # Without an UNSUBACK, the next read may start with copies.
        self._copies_start = 0 if self._copies_end is None else None
        self._copies_end = None
        kept = list(range(start))
        for i in range(start, end):
            row = read.rows[i]
            if read.tags[i] & QOS or not self._has_copy(row) or row == self._dropped:
                self._dropped = None
                kept.append(i)
            else:
                self._dropped = row
        kept += range(end, len(read))
        return read.select(kept)

    def _has_copy(self, row: bytes) -> bool:
        """Whether a message's topic matches both an old filter and one of the settings."""
        topic = decode_tuple(tuple_start(0.0) + row).topic.decode()
        return any(topic_matches_sub(f, topic) for f in self._removed) and any(
            topic_matches_sub(without_share(f), topic) for f in self._settings.mqtt_topics
        )
