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

    def __len__(self) -> int:
        """How many batches are needed."""
        return len(self._batches)

    def reset(self, batches: Iterable[bytes]) -> None:
        """Start over with what is stored for the session, of which there may be more."""
        self._batches.clear()
        self._size = 0
        for packets in batches:
            self.add(packets)

    def split(self, chunks: list[Chunk]) -> tuple[list[Chunk], bytes]:
        """Return the chunks without the messages that are stored already, and their packets.

        The packets are to be stored in the transaction that stores the rows.
        """
        if not self._window:
            return chunks, b""
        if any(max(chunk.tags) >= _DUP_TAG for chunk in chunks):
            known = self._index()
            chunks = [self._new(chunk, known) for chunk in chunks]
        ids, sums = array("H"), array("I")
        for chunk in chunks:
            rows, tags = chunk.rows, chunk.tags
            if tags and min(tags) < _QOS1_TAG:
                pairs = [(t, r) for t, r in zip(tags, rows, strict=True) if t >= _QOS1_TAG]
                tags, rows = [t for t, _ in pairs], [r for _, r in pairs]
            ids.extend([tag & 0xFFFF for tag in tags])
            sums.extend(map(crc32, rows))
        return chunks, _encode(ids, sums)

    def add(self, packets: bytes) -> None:
        """Note the packets of a batch that is stored; forget what is beyond the window."""
        self._batches.append(packets)
        self._size += len(packets) // _ENTRY
        while len(self._batches) > 1:
            oldest = len(self._batches[0]) // _ENTRY
            if self._size - oldest < self._window:
                break
            self._size -= oldest
            self._batches.popleft()

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
        """Return for each packet id the checksum of the message that it last stood for."""
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
