"""Which packets are stored: what makes a message that the broker sends again stored once.

A crash between COMMIT and PUBACK makes the broker send again, with the same packet id and the DUP
flag (MQTT 5 §4.4). Each transaction therefore also stores the ids of its packets, each with a
checksum of its message, and a packet with DUP is dropped when id and checksum are among the last
ones stored in this session. docs/adr/0001-packet-id-ledger.md argues why no new message is.
"""

from array import array
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from zlib import crc32

from .flow import Chunk

_DUP_TAG = 0x38 << 16  # the least tag (see flow.Chunk) with DUP, the highest flag of a PUBLISH
_QOS1_TAG = 0x32 << 16  # the least tag with a packet id
_ENTRY = 6  # bytes: a packet id and a checksum


class Ledger:
    """The packets of the last batches, at least ``window`` of them, oldest batch first."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._batches: deque[bytes] = deque()
        self._size = 0
        # Packet id -> checksum of the message it last stood for; made when a DUP is looked up.
        self._known: dict[int, int] | None = None

    def reset(self, batches: list[bytes]) -> None:
        """Start over with what is stored for the session: the results of `record`, or nothing."""
        self._batches = deque(batches)
        self._size = sum(len(batch) // _ENTRY for batch in batches)
        self._known = None
        self.forget()  # the database keeps more, in which ids may have come round

    def record(self, chunks: list[Chunk]) -> tuple[list[Chunk], bytes]:
        """Return the chunks without the messages that are stored already, and their packets.

        The packets are to be stored in the transaction that stores the rows.
        """
        if not self._window:
            return chunks, b""
        ids, sums = array("H"), array("I")
        new = []
        for chunk in chunks:
            if max(chunk.tags) >= _DUP_TAG:
                if self._known is None:
                    self._known = self._index()
                    self._known.update(zip(ids, sums, strict=True))
                chunk = self._new(chunk, self._known)
            new.append(chunk)
            rows, tags = chunk.rows, chunk.tags
            if tags and min(tags) < _QOS1_TAG:
                pairs = [(t, r) for t, r in zip(tags, rows, strict=True) if t >= _QOS1_TAG]
                tags, rows = [t for t, _ in pairs], [r for _, r in pairs]
            ids.extend([tag & 0xFFFF for tag in tags])
            sums.extend(map(crc32, rows))
        if self._known is not None:
            self._known.update(zip(ids, sums, strict=True))
        packets = _encode(ids, sums)
        self._batches.append(packets)
        self._size += len(ids)
        return new, packets

    def forget(self) -> int:
        """Drop the oldest batches beyond the window; return how many batches are left."""
        while len(self._batches) > 1:
            oldest = len(self._batches[0]) // _ENTRY
            if self._size - oldest < self._window:
                break
            self._size -= oldest
            self._batches.popleft()
            self._known = None
        return max(1, len(self._batches))

    @staticmethod
    def _new(chunk: Chunk, known: dict[int, int]) -> Chunk:
        rows, tags = [], []
        for row, tag in zip(chunk.rows, chunk.tags, strict=True):
            mid, checksum = tag & 0xFFFF, crc32(row)
            if mid and tag >= _DUP_TAG and known.get(mid) == checksum:
                continue
            # Without DUP the id stands for a new message from here on, whatever it was before.
            known[mid] = checksum
            rows.append(row)
            tags.append(tag)
        return replace(chunk, rows=rows, tags=tags)

    def _index(self) -> dict[int, int]:
        known: dict[int, int] = {}
        for batch in self._batches:
            known.update(_decode(batch))
        return known


def _encode(ids: "array[int]", sums: "array[int]") -> bytes:
    # In the machine's byte order: read on another kind of machine, no checksum would fit, and a
    # message sent again would be stored again.
    return ids.tobytes() + sums.tobytes()


def _decode(packets: bytes) -> Iterable[tuple[int, int]]:
    ids, sums = array("H"), array("I")
    split = len(packets) // _ENTRY * 2
    ids.frombytes(packets[:split])
    sums.frombytes(packets[split:])
    return zip(ids, sums, strict=True)
