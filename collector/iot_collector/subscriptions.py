"""Subscribes the broker's session to what the settings name, and to nothing else.

A session outlives the process, and so does a filter that the settings no longer name. Its
subscription is *replaced*: there must be no moment without one of the two, and so there is one with
both, in which the broker sends each message twice. One SUBSCRIBE, which the broker carries out as
a whole, adds the new filter and lowers the old one to QoS 0. From then on the copy for the old
filter is the one with QoS 0, and is dropped; the one for the new filter has its QoS and its packet
id. docs/adr/0002-changing-subscriptions.md has the reasons and the limits.
"""

import math
import time
from dataclasses import dataclass

import structlog
from paho.mqtt.client import topic_matches_sub
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from .flow import Greeting, Note, Subscribed
from .reader import StockClient
from .rows import decode, head
from .sessions import Claim, bare
from .settings import Settings

log = structlog.get_logger(__name__)

_RESUBSCRIBE = 15.0  # seconds until a refused subscription is asked for again
_ASK_AGAIN = 1.0  # seconds between looks whether another session is still in the way
# Seconds that the database gets to answer what the session is subscribed to and may be, before it
# is subscribed without: a database that is away must not cost messages. What waits for a session
# that the broker kept is queued, if it was subscribed; for a new one it is lost. For the other pods
# of a StatefulSet, pod 0 has a session.
_NEW_SESSION, _KEPT_SESSION, _OTHER_POD = 2.0, 10.0, 600.0
# Seconds that another session may be in the way. Pods that end have 50 s for it
# (terminationGracePeriodSeconds); pod 0 is replaced, which may take as long as pulling an image.
_WAIT_FOR_PODS, _WAIT_FOR_POD_0 = 60.0, 600.0
_QOS = 0x06 << 16  # the bits of a tag (see flow.Chunk)


@dataclass(slots=True)
class _Request:
    """A SUBSCRIBE that is not answered yet; ``stale`` filters are lowered to QoS 0 by it."""

    filters: list[str]
    stale: list[str]


class Subscriptions:
    """The subscriptions of one session, over one connection after the other.

    Used by the network thread alone; others may look at the public attributes.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._v5 = settings.mqtt_version == "5"
        self._another_pod = bool(settings.session_on_stop == "ordinal" and settings.leave_on_stop)
        self._client: StockClient
        self._source: object = None
        self._certain = False  # the session has the filters of the settings and no others
        self._waiting_since = math.inf
        self.active = False  # the broker sends us what we are here to collect
        self.refused: dict[str, str]  # topic filter -> why the broker refused it
        self.waits_for: list[str]  # client ids whose sessions are in the way
        self.notes: list[Note]  # to be put into the flow
        self.end()

    def end(self) -> None:
        """Forget what concerns one connection only: it is gone."""
        self.active, self.refused, self.waits_for, self.notes = False, {}, [], []
        self._requests: dict[int | None, _Request] = {}
        self._removal: int | None = None  # the UNSUBSCRIBE that ends a replacement
        self._farewell: int | None = None  # the one that leaves the session without subscription
        self._due: list[str] = []  # filters of the next SUBSCRIBE, and when it is sent
        self._due_at = 0.0
        self._asked = self._left = False  # for the filters of the settings; for none any more
        self._held: list[str] = []
        self._stale: list[str] = []
        self._gone: list[str] = []
        self._ask_at = math.inf
        # Where in what is read now the copies begin and end; see `drop_copies`.
        self._from: int | None = None
        self._until: int | None = None
        self._last: bytes | None = None

    def begin(self, client: StockClient, source: object, *, present: bool) -> None:
        """Start over: there is a connection, and a session that is ``present`` since before."""
        self.end()
        self._client, self._source = client, source
        self._due, self._due_at = self._settings.mqtt_topics, 0.0
        self._certain = self._certain and present
        if not self._certain:
            # A session that is new makes the ledger void. That is to be noted before the first
            # message can be sent, so that no process can take it for one of the old session.
            patience = _KEPT_SESSION if present else _NEW_SESSION
            self._due_at = time.monotonic() + (_OTHER_POD if self._another_pod else patience)
        self.look()

    def look(self) -> None:
        """Do what is due; called at least once a second."""
        now = time.monotonic()
        if now >= self._ask_at:
            self._ask_at = math.inf
            limit = _WAIT_FOR_POD_0 if self._another_pod else _WAIT_FOR_PODS
            insist = now - self._waiting_since > limit
            if insist:
                log.warning(
                    "not waiting any longer for the sessions of other pods; messages may be stored "
                    "twice. A pod that was killed keeps its subscription until it has run again "
                    "and was stopped, or its session expires",
                    client_ids=self.waits_for,
                )
            self.notes.append(Greeting(self._source, session_present=True, insist=insist))
        if self._due and now >= self._due_at:
            self._subscribe_to_settings()

    def answer(self, claim: Claim) -> None:
        """Go on: the database knows about the session, and what it may be subscribed to."""
        if self._left:
            return
        self.waits_for = [] if self._asked else claim.waits_for
        if claim.waits_for and self._asked:
            self.notes.append(Greeting(self._source, session_present=True, insist=True))
        elif claim.waits_for:
            self._wait(claim)
        else:
            self._waiting_since = math.inf
            self._stale, self._certain = claim.stale, not claim.stale
            if claim.stale or not self._asked:
                self._due = self._settings.mqtt_topics
                self._subscribe_to_settings()

    def _wait(self, claim: Claim) -> None:
        now = time.monotonic()
        if self._waiting_since == math.inf:
            self._waiting_since = now
            log.info(
                "waiting until other pods have changed their subscriptions, so that no message is "
                "stored twice",
                client_ids=claim.waits_for,
                filters=self._settings.mqtt_topics,
                subscribed_to=claim.held,
            )
        self._ask_at, self._due_at = now + _ASK_AGAIN, math.inf
        if claim.held and not self._held:
            # A broker that was restarted may have kept the session without them (Mosquitto 2.0
            # does not save shared subscriptions).
            self._subscribe(claim.held, [])
        self._held = claim.held

    def leave(self) -> None:
        """Unsubscribe from everything, for good."""
        self._left, self._due, self._ask_at = True, [], math.inf
        self.waits_for = []
        _, self._farewell = self._client.unsubscribe(
            sorted({*self._settings.mqtt_topics, *self._held, *self._stale})
        )

    def _subscribe_to_settings(self) -> None:
        due, self._due = self._due, []
        self._asked = True
        self._subscribe(due, self._stale)

    def _subscribe(self, filters: list[str], stale: list[str]) -> None:
        qos = min(self._settings.mqtt_qos, self._client.max_qos)
        if self._v5:
            # Retained messages only for a new subscription, or each reconnect stores them again;
            # and not for one that replaces another, which had them.
            had = {bare(f) for f in stale}
            new_only, never = (
                SubscribeOptions.RETAIN_SEND_IF_NEW_SUB,
                SubscribeOptions.RETAIN_DO_NOT_SEND,
            )
            asked = [
                (f, SubscribeOptions(qos=qos, retainHandling=never if bare(f) in had else new_only))
                for f in filters
            ]
            asked += [(f, SubscribeOptions(qos=0, retainHandling=never)) for f in stale]
            _, mid = self._client.subscribe(asked)
        else:
            # To such a client Mosquitto sends a message once, whatever matches it; with QoS 0
            # for the old filter, it may be the one copy that has it.
            _, mid = self._client.subscribe([(f, qos) for f in filters])
        self._requests[mid] = _Request(filters, stale)

    def subscribed(self, mid: int, reasons: list[ReasonCode]) -> None:
        """Take note of the broker's answer to a SUBSCRIBE."""
        request = self._requests.pop(mid)
        if self._asked and not set(request.filters) <= set(self._settings.mqtt_topics):
            return  # old ones again
        refused = {}
        for topic_filter, reason in zip(request.filters, reasons, strict=False):
            if reason.is_failure:
                refused[topic_filter] = str(reason)
                fault = "broker refused the subscription; check IOT_MQTT_TOPICS and its ACL"
                log.error(fault, filter=topic_filter, reason=str(reason))
            elif reason.value == 0:
                log.warning("broker granted QoS 0 only: it may lose messages", filter=topic_filter)
        self.refused = refused  # in one step: other threads read it
        self.active = not self.refused
        if self._left or not self._asked:
            return
        self._due, self._due_at = list(self.refused), time.monotonic() + _RESUBSCRIBE
        if request.stale:
            self._remove(request.stale)

    def _remove(self, stale: list[str]) -> None:
        """Unsubscribe from old filters, but for those whose replacement was refused."""
        missing = {bare(f) for f in self.refused}
        self._stale = [f for f in stale if bare(f) in missing]
        if self._stale:
            self._subscribe(self._stale, [])  # with its QoS again
        if gone := [f for f in stale if f not in self._stale]:
            log.info("unsubscribing from topics that are no longer set", filters=gone)
            self._gone = [bare(f) for f in gone]
            self._from = self._client.pending if self._v5 else None
            _, self._removal = self._client.unsubscribe(gone)

    def unsubscribed(self, mid: int) -> None:
        """Take note of the broker's answer to an UNSUBSCRIBE."""
        if mid == self._farewell:
            self.notes.append(Subscribed(self._source, []))
        elif mid == self._removal:
            self._until = self._client.pending
            self._certain = not self._stale
            filters = [*self._settings.mqtt_topics, *self._stale]
            self.notes.append(Subscribed(self._source, filters))

    @property
    def replacing(self) -> bool:
        """Whether the last read may have copies."""
        return self._from is not None

    def drop_copies(self, rows: list[bytes], tags: list[int]) -> tuple[list[bytes], list[int], int]:
        """Take the old filters' copies from the rows and tags of a read; also return how many.

        Of a message published with QoS 1 or 2 the copy has QoS 0. Of one that was published with
        QoS 0 both have it: they come one right after the other and are equal. Either of them is
        missing where the other went to another member of the group, or there is no other.
        """
        start = self._from or 0
        end = len(tags) if self._until is None else self._until
        self._from, self._until = (0, None) if self._until is None else (None, None)
        kept = list(range(start))
        for i in range(start, end):
            if tags[i] & _QOS or not self._copied(rows[i]) or rows[i] == self._last:
                self._last = None
                kept.append(i)
            else:
                self._last = rows[i]
        kept += range(end, len(tags))
        return [rows[i] for i in kept], [tags[i] for i in kept], len(tags) - len(kept)

    def _copied(self, row: bytes) -> bool:
        """Whether a message's topic matches both a filter that goes and one that stays."""
        topic = decode(head(0.0) + row).topic.decode()
        return any(topic_matches_sub(f, topic) for f in self._gone) and any(
            topic_matches_sub(bare(f), topic) for f in self._settings.mqtt_topics
        )
