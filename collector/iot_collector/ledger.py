"""The ledger of stored packets: a message that the broker sends again is stored only once.

After a crash between COMMIT and PUBACK, the broker sends the messages again, with the same packet
ids and the DUP flag (MQTT 5 §4.4). Therefore each transaction also stores the packet id and a
checksum of each of its messages, in the table ``ledger``. A packet with DUP is dropped if its
packet id and checksum are among the last ones stored in this session.
docs/adr/0001-packet-id-ledger.md shows why this drops no new message.

A row of the table also tells whether a transaction was committed if its COMMIT got no response, and
whether another process writes with the same client id.
"""

import uuid
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from zlib import crc32

import psycopg2
import psycopg2.extensions

from .buffer import DUP, FLAGS_SHIFT, PACKET_ID, QOS_1, Outcome, ReadBatch, message_count
from .database import KnownError

# DUP is the highest flag of a PUBLISH (packet type 3), and the QoS comes next. So one comparison of
# a tag tells whether DUP is set, or whether the QoS is above 0.
_PUBLISH = 0x30 << FLAGS_SHIFT
_MIN_DUP_TAG = _PUBLISH | DUP
_MIN_PACKET_ID_TAG = _PUBLISH | QOS_1
_ENTRY_SIZE = 6  # bytes: a packet id and a checksum
_PRUNE_INTERVAL = 64  # batches between two deletions of old rows; deleting less often costs less

Cursor = psycopg2.extensions.cursor


class ClientIdConflictError(KnownError):
    """Another process has written a batch with the same client id."""

    kind = "client_id"
    hint = "another collector uses this client id; give each collector its own IOT_MQTT_CLIENT_ID"


class PacketHistory:
    """The packet ids and checksums of the last batches, which have at least ``window`` messages.

    :param window: how many messages the broker may send again; 0 turns the history off.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._batches: deque[bytes] = deque()  # oldest first
        self._size = 0  # in messages

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._batches)

    def reset(self, batches: Iterable[bytes]) -> None:
        """Replace the history with batches from the table, and keep the last of them."""
        self._batches.clear()
        self._size = 0
        for packets in batches:
            self.add(packets)

    def drop_stored(self, batch: list[ReadBatch]) -> tuple[list[ReadBatch], bytes]:
        """Return the messages of a batch that are not stored yet, and their packets.

        The packets are the encoded packet ids and checksums. The transaction that stores the
        messages has to store them too.
        """
        if not self._window:
            return batch, b""
        if any(max(read.tags) >= _MIN_DUP_TAG for read in batch):
            known = self._known_checksums()
            batch = [self._new_messages(read, known) for read in batch]
        ids, checksums = array("H"), array("I")
        for read in batch:
            rows, tags = read.rows, read.tags
            if tags and min(tags) < _MIN_PACKET_ID_TAG:
                pairs = [(t, r) for t, r in zip(tags, rows, strict=True) if t >= _MIN_PACKET_ID_TAG]
                tags, rows = [t for t, _ in pairs], [r for _, r in pairs]
            ids.extend([tag & PACKET_ID for tag in tags])
            checksums.extend(map(crc32, rows))
        return batch, _encode(ids, checksums)

    def add(self, packets: bytes) -> None:
        """Add the packets of a stored batch; forget the batches outside the window."""
        self._batches.append(packets)
        self._size += len(packets) // _ENTRY_SIZE
        while len(self._batches) > 1:
            oldest = len(self._batches[0]) // _ENTRY_SIZE
            if self._size - oldest < self._window:
                break
            self._size -= oldest
            self._batches.popleft()

    @staticmethod
    def _new_messages(read: ReadBatch, known: dict[int, int]) -> ReadBatch:
        """Return the messages that are not stored yet; add their checksums to ``known``."""
        kept = []
        for index, (row, tag) in enumerate(zip(read.rows, read.tags, strict=True)):
            packet_id, checksum = tag & PACKET_ID, crc32(row)
            if packet_id and tag >= _MIN_DUP_TAG and known.get(packet_id) == checksum:
                continue
            # The packet id now belongs to this message.
            known[packet_id] = checksum
            kept.append(index)
        return read.select(kept)

    def _known_checksums(self) -> dict[int, int]:
        """Return for each packet id the checksum of the last message that had it."""
        known: dict[int, int] = {}
        for packets in self._batches:
            known.update(_decode(packets))
        return known


@dataclass(slots=True)
class Entry:
    """The row of a batch in the table ``ledger``.

    :param outcome: what the transaction does with the batch; set when COMMIT is sent.
    """

    seq: int
    packets: bytes
    outcome: Outcome | None = None


class Ledger:
    """The table ``ledger`` for one client id, and what this process knows of it.

    :param window: see `PacketHistory`; with 0, no message is dropped as a duplicate.
    """

    def __init__(self, client_id: str, window: int) -> None:
        self._client_id = client_id
        self._writer = str(uuid.uuid4())  # this process
        self._history = PacketHistory(window)
        self._seq = 0  # of the last row, as far as this process knows
        self._unconfirmed: Entry | None = None  # COMMIT was sent, and there is no response yet
        self._outdated = False  # another process has added a row

    def start_session(self, cursor: Cursor, *, session_present: bool) -> None:
        """Load the entries of the session, or delete them if the session is new.

        :param session_present: whether the broker has kept the session (MQTT 5 §3.2.2.1.1).
        :raises psycopg2.Error: nothing was changed.
        """
        if not session_present:
            cursor.execute("DELETE FROM ledger WHERE client_id = %s", (self._client_id,))
        self._load(cursor)

    def store(
        self,
        batch: list[ReadBatch],
        new_cursor: Callable[[], AbstractContextManager[Cursor]],
        write: Callable[[list[ReadBatch], Entry, int], Outcome],
    ) -> Outcome:
        """Store a batch once, even if this is called with it several times; return the outcome.

        :param new_cursor: opens a cursor, and connects first if necessary.
        :param write: stores messages and an entry (see `insert_sql`) in one transaction, calls
            `commit_sent`, and returns the outcome. Its third argument is the number of duplicates
            that were dropped already, which the outcome has to include.
        :raises ClientIdConflictError: another process has added a row.
        :raises psycopg2.Error: nothing is stored, as far as is known. Call this again with the same
            batch.
        """
        if self._unconfirmed is not None or self._outdated:
            with new_cursor() as cursor:
                if (recovered := self._recover(cursor)) is not None:
                    return recovered
                if self._outdated:
                    self._load(cursor)
        new, packets = self._history.drop_stored(batch)
        duplicates = message_count(batch) - message_count(new)
        if not any(read.rows for read in new):
            return Outcome(duplicates=duplicates)
        entry, earlier = Entry(self._seq + 1, packets), self._unconfirmed
        try:
            outcome = write(new, entry, duplicates)
        except psycopg2.Error as error:
            if error.diag.constraint_name != "ledger_pkey":
                raise
            # The row may be from this process: an earlier COMMIT may still have been running when
            # `_recover` looked for it.
            self._unconfirmed = earlier
            with new_cursor() as cursor:
                if (recovered := self._recover(cursor)) is not None:
                    return recovered
            self._outdated = True
            raise ClientIdConflictError(str(error)) from error
        self._confirm(entry)
        return outcome

    def insert_sql(self, cursor: Cursor, entry: Entry) -> bytes:
        """Return the SQL that inserts an entry, and for some entries also deletes old ones."""
        sql: bytes = cursor.mogrify(
            "INSERT INTO ledger (client_id, seq, writer, packets) VALUES (%s, %s, %s, %s);",
            (self._client_id, entry.seq, self._writer, entry.packets),
        )
        if entry.seq % _PRUNE_INTERVAL == 0:
            needed = len(self._history) + 1
            sql += cursor.mogrify(
                "DELETE FROM ledger WHERE client_id = %s AND seq <= %s;",
                (self._client_id, entry.seq - needed),
            )
        return sql

    def commit_sent(self, entry: Entry, outcome: Outcome) -> None:
        """Remember what a transaction does, in case its COMMIT gets no response."""
        entry.outcome = outcome
        self._unconfirmed = entry

    def _load(self, cursor: Cursor) -> None:
        cursor.execute(
            "SELECT seq, packets FROM ledger WHERE client_id = %s ORDER BY seq", (self._client_id,)
        )
        found = cursor.fetchall()
        self._history.reset(bytes(packets) for _, packets in found)
        # If another process commits a row after this SELECT, the row has the next number, and the
        # next INSERT of this process fails. So number and packets must come from the same SELECT.
        self._seq = found[-1][0] if found else 0
        self._outdated = False

    def _recover(self, cursor: Cursor) -> Outcome | None:
        """Return the outcome of the unconfirmed transaction, or None if it is not committed.

        If it is committed only after this, the next INSERT fails, because the number is in use.
        """
        if self._unconfirmed is None:
            return None
        cursor.execute(
            "SELECT 1 FROM ledger WHERE client_id = %s AND seq = %s AND writer = %s",
            (self._client_id, self._unconfirmed.seq, self._writer),
        )
        if cursor.fetchone() is None:
            return None
        outcome = self._unconfirmed.outcome
        self._confirm(self._unconfirmed)
        return outcome

    def _confirm(self, entry: Entry) -> None:
        self._seq, self._unconfirmed = entry.seq, None
        self._history.add(entry.packets)


def _encode(ids: "array[int]", checksums: "array[int]") -> bytes:
    # In the byte order of this machine. On a machine with the other byte order no checksum would
    # match, and messages that are sent again would be stored again.
    return ids.tobytes() + checksums.tobytes()


def _decode(packets: bytes) -> Iterable[tuple[int, int]]:
    ids, checksums = array("H"), array("I")
    split = len(packets) // _ENTRY_SIZE * 2
    ids.frombytes(packets[:split])
    checksums.frombytes(packets[split:])
    return zip(ids, checksums, strict=True)
