"""The queue of messages between network thread and writer thread, and the counts of messages.

For one process, at any moment:

    received = inserted + duplicates + dead letters + in flight

One lock guards the queue and the counts, so this equation holds in every snapshot.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from .sessions import Claim

# A *tag* is what is needed of a PUBLISH packet to acknowledge its message: the packet's first byte
# (MQTT 5 §3.3.1: type, DUP, QoS, RETAIN) shifted left by 16, plus its packet id (0 at QoS 0).
FLAGS_SHIFT = 16
DUP = 0x08 << FLAGS_SHIFT
QOS = 0x06 << FLAGS_SHIFT
QOS_1 = 0x02 << FLAGS_SHIFT
QOS_2 = 0x04 << FLAGS_SHIFT
PACKET_ID = 0xFFFF

_OVERHEAD = 80  # bytes of memory per message besides the bytes of its row: two objects, pointers


@dataclass(slots=True, eq=False)
class ReadBatch:
    """The messages of one read from the broker, in order.

    :param connection: the connection they came from; they are acknowledged only on it.
    :param rows: the messages as rows of the binary COPY format, see copy_format.py.
    :param tags: the tag of each message, see above.
    :param read_at: when they were read, by ``time.monotonic()``.
    :param timestamp: the same moment in Unix time.
    :param ids: the id that the device gave each message, or None for a message without one; no list
        without IOT_MESSAGE_ID_KEY.
    """

    connection: object
    rows: list[bytes]
    tags: list[int]
    read_at: float
    timestamp: float
    ids: list[str | None] | None = None
    size: int = field(init=False)  # approximate bytes of memory

    def __post_init__(self) -> None:
        self.size = sum(map(len, self.rows)) + _OVERHEAD * len(self.tags)

    def __len__(self) -> int:
        """Return the number of messages."""
        return len(self.tags)

    def select(self, indexes: Iterable[int]) -> "ReadBatch":
        """Return a copy with some of the messages."""
        chosen = list(indexes)
        return replace(
            self,
            rows=[self.rows[i] for i in chosen],
            tags=[self.tags[i] for i in chosen],
            ids=self.ids and [self.ids[i] for i in chosen],
        )


def message_count(reads: Iterable[ReadBatch]) -> int:
    """Return the number of messages in several reads."""
    return sum(map(len, reads))


@dataclass(slots=True, eq=False)
class SessionStart:
    """A connection has started. In the buffer, all earlier messages are ahead of this event.

    The writer sets ``claim``: which filters the session may be subscribed to. While the claim has
    to wait for other sessions, the network thread sends the event again, finally with ``force``.

    :param session_present: whether the broker has kept the session, with the messages that it has
        sent and that were not acknowledged (MQTT 5 §3.2.2.1.1).
    :param force: claim the filters without waiting for other sessions.
    """

    connection: object
    session_present: bool
    force: bool = False
    claim: Claim = field(default_factory=Claim)


@dataclass(slots=True, eq=False)
class SubscriptionsChanged:
    """The filters that the session is subscribed to have changed; the writer saves them."""

    connection: object
    filters: list[str]


Event = SessionStart | SubscriptionsChanged


@dataclass(slots=True)
class Work:
    """The next work of the writer: an event to handle or a batch to store; none after a timeout."""

    event: Event | None = None
    batch: list[ReadBatch] = field(default_factory=list)


@dataclass(slots=True)
class Outcome:
    """What a committed transaction did with its messages; dead letters are counted by reason."""

    inserted: int = 0
    duplicates: int = 0
    dead_letters: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Counts:
    """A consistent snapshot of the counts of messages since the process started."""

    received: int = 0
    inserted: int = 0
    duplicates: int = 0
    dead_letters: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0

    @property
    def balanced(self) -> bool:
        """Whether the equation at the top of this module holds."""
        done = self.inserted + self.duplicates + self.dead_letters.total()
        return self.received == done + self.in_flight


class Buffer:
    """A bounded queue from the network thread to the writer thread."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._queue: deque[ReadBatch | Event] = deque()
        self._taken: dict[ReadBatch, None] = {}  # the writer has them; not completed, in order
        self._bytes = 0  # of the messages in `_queue` and `_taken`
        self._counts = Counts()
        self._closed = False

    def put(self, item: ReadBatch | Event) -> None:
        """Append messages or an event. Never blocks or refuses: the reader checks `full` first."""
        with self._changed:
            if isinstance(item, ReadBatch):
                self._counts.received += len(item)
                self._counts.in_flight += len(item)
                self._bytes += item.size
            self._queue.append(item)
            self._changed.notify()

    def count_duplicates(self, count: int) -> None:
        """Count messages that were received and dropped, and need no acknowledgement."""
        with self._changed:
            self._counts.received += count
            self._counts.duplicates += count

    @property
    def full(self) -> bool:
        """Whether to stop reading, because the memory limit is reached or the buffer is closed."""
        return self._closed or self._bytes >= self._max_bytes

    @property
    def finished(self) -> bool:
        """Whether the buffer is closed and its queue is empty."""
        return self._closed and not self._queue

    def take(self, *, max_rows: int, max_bytes: int, timeout: float) -> Work:
        """Return the next work, after waiting at most ``timeout`` seconds for it.

        A batch is everything in the queue before the next event, up to about ``max_rows`` messages
        or ``max_bytes``.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed, timeout)
            work = Work()
            while self._queue and max_rows > 0 and max_bytes > 0:
                item = self._queue[0]
                if not isinstance(item, ReadBatch):
                    if not work.batch:
                        work.event = item
                        self._queue.popleft()
                    break
                work.batch.append(item)
                self._queue.popleft()
                max_rows -= len(item)
                max_bytes -= item.size
            self._taken.update(dict.fromkeys(work.batch))
            return work

    def complete(self, batch: list[ReadBatch], outcome: Outcome) -> None:
        """Count the messages of a committed batch, and free their memory.

        :param batch: a batch that `take` returned; it can be completed only once.
        """
        with self._changed:
            for read in batch:
                del self._taken[read]
                self._counts.in_flight -= len(read)
                self._bytes -= read.size
            self._counts.inserted += outcome.inserted
            self._counts.duplicates += outcome.duplicates
            self._counts.dead_letters.update(outcome.dead_letters)

    def close(self) -> None:
        """Stop reading, and wake the writer so that it takes the rest."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def counts(self) -> Counts:
        """Return a consistent copy of the counts."""
        with self._changed:
            return replace(self._counts, dead_letters=Counter(self._counts.dead_letters))

    def oldest_age(self) -> float:
        """Return the age of the oldest uncommitted message, in seconds; 0 if there is none."""
        with self._changed:
            waiting = self._taken or (i for i in self._queue if isinstance(i, ReadBatch))
            oldest = next(iter(waiting), None)
            return time.monotonic() - oldest.read_at if oldest is not None else 0.0
