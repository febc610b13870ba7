"""The messages between broker and database, and the account of them.

Law, at any moment and for one process:

    received = inserted + duplicates + dead letters + in flight

One lock guards the queue and the account, so that every snapshot obeys it.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Chunk:
    """The messages of one read from the broker, in order.

    ``rows`` are COPY tuples (see rows.py). ``tags`` has for each row the first byte of its
    PUBLISH packet, shifted left by 16, and its packet id (0 at QoS 0). ``at`` is when they were
    read, by ``time.monotonic()``; ``timestamp`` the same moment in Unix time. ``source`` is the
    connection they came from, the only one where their packet ids mean them.
    """

    source: object
    rows: list[bytes]
    tags: list[int]
    at: float
    timestamp: float
    size: int


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

    def __init__(self, *, max_rows: int, max_bytes: int) -> None:
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._queue: deque[Chunk] = deque()
        self._queued_rows = 0
        self._queued_bytes = 0
        self._written: list[Chunk] = []  # taken by the writer, not settled
        self._account = Account()
        self._closed = False
        self.on_room: Callable[[], None] = lambda: None

    def put(self, chunk: Chunk) -> None:
        """Add a chunk. Never blocks and never refuses; the reader asks `full` before it reads."""
        with self._changed:
            self._account.received += len(chunk.rows)
            self._account.in_flight += len(chunk.rows)
            self._queue.append(chunk)
            self._queued_rows += len(chunk.rows)
            self._queued_bytes += chunk.size
            self._changed.notify()

    @property
    def full(self) -> bool:
        """Whether the reader must stop reading until `on_room` is called."""
        return self._queued_rows >= self._max_rows or self._queued_bytes >= self._max_bytes

    def take(self, *, rows: int, size: int, linger: float, patience: float) -> list[Chunk] | None:
        """Return the next batch of chunks: [] after ``patience`` seconds, None at the end.

        A batch is ready when its first message has waited ``linger`` seconds, or ``rows`` rows or
        ``size`` bytes are there, or the queue is closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed, patience)
            if not self._queue:
                return None if self._closed else []
            due = self._queue[0].at + linger
            while (
                self._queued_rows < rows
                and self._queued_bytes < size
                and not self._closed
                and (left := due - time.monotonic()) > 0
            ):
                self._changed.wait(left)
            was_full = self.full
            batch = [self._pop()]
            taken_rows, taken_bytes = len(batch[0].rows), batch[0].size
            while self._queue and taken_rows < rows and taken_bytes < size:
                batch.append(self._pop())
                taken_rows += len(batch[-1].rows)
                taken_bytes += batch[-1].size
            self._written = batch
        if was_full:
            self.on_room()
        return batch

    def _pop(self) -> Chunk:
        chunk = self._queue.popleft()
        self._queued_rows -= len(chunk.rows)
        self._queued_bytes -= chunk.size
        return chunk

    def settle(self, *, inserted: int, duplicates: int, dead_letters: Counter[str]) -> None:
        """Book the batch last taken as committed."""
        with self._changed:
            self._account.in_flight -= sum(len(chunk.rows) for chunk in self._written)
            self._account.inserted += inserted
            self._account.duplicates += duplicates
            self._account.dead_letters.update(dead_letters)
            self._written = []

    def close(self) -> None:
        """Let `take` return what is queued, without lingering, and then None."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def account(self) -> Account:
        """Return a consistent copy of the account."""
        with self._changed:
            a = self._account
            return Account(
                a.received, a.inserted, a.duplicates, Counter(a.dead_letters), a.in_flight
            )

    def oldest_age(self) -> float:
        """Return how long the oldest message that is not committed has waited, in seconds."""
        with self._changed:
            oldest = self._written or self._queue
            return time.monotonic() - oldest[0].at if oldest else 0.0
