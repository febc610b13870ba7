"""The messages between broker and database, and the account of them.

Law, at any moment and for one process:

    received = inserted + duplicates + dead letters + in flight

One lock guards the queue and the account, so that every snapshot obeys it.
"""

import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field, replace

from .sessions import Claim

_OVERHEAD = 80  # bytes of memory for a message besides its row's: two objects, and their places


@dataclass(slots=True, eq=False)
class Chunk:
    """The messages of one read from the broker, in order.

    ``rows`` are COPY tuples without their head (see rows.py). ``tags`` has for each message the
    first byte of its PUBLISH packet, shifted left by 16, and its packet id (0 at QoS 0). ``at`` is
    when they were read, by ``time.monotonic()``; ``timestamp`` the same moment in Unix time.
    ``source`` is the connection they came from, the only one where their packet ids mean them.
    """

    source: object
    rows: list[bytes]
    tags: list[int]
    at: float
    timestamp: float
    size: int = field(init=False)  # bytes of memory, about

    def __post_init__(self) -> None:
        self.size = sum(map(len, self.rows)) + _OVERHEAD * len(self.tags)


@dataclass(slots=True, eq=False)
class Greeting:
    """The start of a connection, in its place among the messages: none of them is before it.

    ``session_present`` is the broker's word whether it kept the session, with what it has sent
    and was not acknowledged. The writer answers with the ``claim``: what may be subscribed to. As
    long as that is to wait, the question is put again, in the end with ``insist``.
    """

    source: object
    session_present: bool
    insist: bool = False
    claim: Claim = field(default_factory=Claim)


@dataclass(slots=True, eq=False)
class Subscribed:
    """What the session is subscribed to from now on, for the writer to note."""

    source: object
    filters: list[str]


Note = Greeting | Subscribed


@dataclass(slots=True)
class Account:
    """A consistent snapshot of the counts of messages since the process started."""

    received: int = 0
    inserted: int = 0
    duplicates: int = 0
    dead_letters: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0

    def balances(self) -> bool:
        """Whether the law above holds."""
        settled = self.inserted + self.duplicates + self.dead_letters.total()
        return self.received == settled + self.in_flight


class Flow:
    """A bounded queue of chunks from the network thread to the writer thread."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._queue: deque[Chunk | Note] = deque()
        self._written: list[Chunk] = []  # taken by the writer, not settled
        self._bytes = 0  # of both
        self._account = Account()
        self._closed = False

    def put(self, item: Chunk | Note) -> None:
        """Add a chunk or a note. Never blocks, never refuses; the reader asks `full` first."""
        with self._changed:
            if isinstance(item, Chunk):
                self._account.received += len(item.tags)
                self._account.in_flight += len(item.tags)
                self._bytes += item.size
            self._queue.append(item)
            self._changed.notify()

    def drop(self, count: int) -> None:
        """Book messages as received and as duplicates that need no acknowledgement."""
        with self._changed:
            self._account.received += count
            self._account.duplicates += count

    @property
    def full(self) -> bool:
        """Whether the reader must stop reading: until a batch is settled, or for good."""
        return self._closed or self._bytes >= self._max_bytes

    def take(self, *, rows: int, size: int, patience: float) -> list[Chunk] | Note | None:
        """Return what is next: a batch, a note, [] after ``patience`` seconds, None at the end.

        A batch is what is there, up to about ``rows`` rows or ``size`` bytes: what comes while it
        is written makes the next one.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed, patience)
            if not self._queue and self._closed:
                return None
            batch: list[Chunk] = []
            while self._queue and rows > 0 and size > 0:
                item = self._queue.popleft()
                if not isinstance(item, Chunk):
                    if not batch:
                        return item
                    self._queue.appendleft(item)
                    break
                batch.append(item)
                rows -= len(item.tags)
                size -= item.size
            self._written = batch
            return batch

    def settle(self, *, inserted: int, duplicates: int, dead_letters: Counter[str]) -> None:
        """Book the batch last taken as committed."""
        with self._changed:
            self._account.in_flight -= sum(len(chunk.tags) for chunk in self._written)
            self._account.inserted += inserted
            self._account.duplicates += duplicates
            self._account.dead_letters.update(dead_letters)
            self._bytes -= sum(chunk.size for chunk in self._written)
            self._written = []

    def close(self) -> None:
        """Let `take` return what is queued, and then None."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def account(self) -> Account:
        """Return a consistent copy of the account."""
        with self._changed:
            return replace(self._account, dead_letters=Counter(self._account.dead_letters))

    def oldest_age(self) -> float:
        """Return how long the oldest message that is not committed has waited, in seconds."""
        with self._changed:
            waiting = self._written or (item for item in self._queue if isinstance(item, Chunk))
            oldest = next(iter(waiting), None)
            return time.monotonic() - oldest.at if oldest else 0.0
