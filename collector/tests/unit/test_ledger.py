"""The ledger between a model of a broker and of a database (docs/adr/0001-packet-id-ledger.md).

The state machine runs the real `PacketHistory`. Packet ids wrap after 10 messages instead of
65 535. Further tests remove one guard each and expect that the state machine fails.
"""

import random
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from iot_collector.buffer import ReadBatch
from iot_collector.ledger import PacketHistory

WINDOW = 3
IDS = 10  # packet ids 1 to 10, then 1 again; more than twice the window, as the real 65 535


class Message(bytes):
    """The row of a message. Different messages can have equal rows."""

    number: int


@dataclass
class Broker:
    """A session: assigns packet ids, sends up to a window, and keeps unacknowledged messages."""

    lowest_free: bool = False
    last_id: int = 0
    queue: list[tuple[int, Message]] = field(default_factory=list)
    unacked: list[tuple[int, Message]] = field(default_factory=list)

    def accept(self, message: Message) -> None:
        self.queue.append((0 if self.lowest_free else self._count_up(), message))

    def skip_ids(self, count: int) -> None:
        for _ in range(count):
            self._count_up()

    def send(self) -> tuple[int, Message]:
        mid, message = self.queue.pop(0)
        if self.lowest_free:
            mid = min(set(range(1, IDS + 1)) - {used for used, _ in self.unacked})
        self.unacked.append((mid, message))
        return mid, message

    def _count_up(self) -> int:
        in_use = {mid for mid, _ in self.queue + self.unacked}
        self.last_id = self.last_id % IDS + 1
        while self.last_id in in_use:
            self.last_id = self.last_id % IDS + 1
        return self.last_id


class SessionStart:
    """The start of a connection, in the order of the messages that were read."""

    def __init__(self, connection: int, *, session_present: bool) -> None:
        self.connection = connection
        self.session_present = session_present


class Machine(RuleBasedStateMachine):
    """A broker, a collector and a database with random events."""

    history_type: type[PacketHistory] = PacketHistory
    window = WINDOW
    distinct_contents = False
    skipping_ids = False
    lowest_free_ids = False
    crashes = True
    record_lost_sessions = True
    acknowledge_on_new_connection = False

    def __init__(self) -> None:
        super().__init__()
        self.broker = Broker(self.lowest_free_ids)
        self.published = 0
        self.lost_by_broker: set[int] = set()
        self.acknowledged: set[int] = set()
        self.stored: list[int] = []  # the numbers of the messages in the database
        self.stored_ledger: list[bytes] = []  # the ledger rows in the database
        self.subscribed = True
        self.history = self.history_type(self.window)
        self.connection = 0
        # The buffer between the threads: tag, message and connection.
        self.read: list[tuple[int, Message, int] | SessionStart] = []
        self.to_acknowledge: list[int] = []

    @rule(content=st.integers(0, 1))
    @precondition(lambda self: self.subscribed and len(self.broker.queue) < IDS - 2 * WINDOW)
    def publish(self, content: int) -> None:
        self.published += 1
        text = f"{self.published if self.distinct_contents else content}"
        message = Message(text.encode())
        message.number = self.published
        self.broker.accept(message)

    @rule(count=st.integers(1, IDS))
    @precondition(lambda self: self.skipping_ids)
    def overflow(self, count: int) -> None:
        self.broker.skip_ids(count)

    @rule()
    @precondition(lambda self: self.broker.queue and len(self.broker.unacked) < WINDOW)
    def send(self) -> None:
        mid, message = self.broker.send()
        self.read.append((0x32 << 16 | mid, message, self.connection))

    @rule(most=st.integers(1, 4))
    @precondition(lambda self: self.read)
    def write(self, most: int) -> None:
        """The writer takes a session start or a batch from the buffer, and commits it."""
        start = self.read[0]
        if isinstance(start, SessionStart):
            self.read.pop(0)
            if not start.session_present and self.record_lost_sessions:
                self.stored_ledger = []
            self.history.reset(list(self.stored_ledger))
            if start.connection == self.connection:
                self.subscribed = True
            return
        batch: list[tuple[int, Message, int]] = []
        for item in self.read[:most]:
            if isinstance(item, SessionStart):
                break
            batch.append(item)
        del self.read[: len(batch)]
        tags = [tag for tag, _, _ in batch]
        read = ReadBatch(None, [message for _, message, _ in batch], tags, 0.0, 0.0)
        (new,), packets = self.history.drop_stored([read])
        if new.rows:
            keep = len(self.history) + 1
            self.stored += [row.number for row in new.rows if isinstance(row, Message)]
            self.stored_ledger = [*self.stored_ledger, packets][-keep:]
        self.history.add(packets)
        for tag, _, connection in batch:
            if connection == self.connection or self.acknowledge_on_new_connection:
                self.to_acknowledge.append(tag & 0xFFFF)

    @rule()
    @precondition(lambda self: self.to_acknowledge)
    def acknowledge(self) -> None:
        mid = self.to_acknowledge.pop(0)
        for sent in [sent for sent in self.broker.unacked if sent[0] == mid]:
            self.broker.unacked.remove(sent)
            assert sent[1].number in self.stored, "acknowledged but not stored"

    @rule()
    @precondition(lambda self: self.crashes)
    def crash(self) -> None:
        """The process loses its memory. A new process resumes the session."""
        self.read = []
        self.history = self.history_type(self.window)
        self._connect(session_present=True)

    @rule()
    def lose_connection(self) -> None:
        """Buffered messages stay. Their acknowledgements are not sent on the new connection."""
        self._connect(session_present=True)

    @rule()
    def lose_session(self) -> None:
        lost = self.broker.queue + self.broker.unacked
        self.lost_by_broker |= {message.number for _, message in lost}
        self.broker = Broker(self.lowest_free_ids)
        self.subscribed = False  # until the database has recorded the new session
        self._connect(session_present=False)

    def _connect(self, *, session_present: bool) -> None:
        self.connection += 1
        self.to_acknowledge = []
        if not self.subscribed:
            session_present = False  # without a subscription, the session is as good as new
        self.read.append(SessionStart(self.connection, session_present=session_present))
        for mid, message in self.broker.unacked:
            self.read.append((0x3A << 16 | mid, message, self.connection))

    def teardown(self) -> None:
        """Deliver, store and acknowledge everything, then compare."""
        while self.read or self.to_acknowledge or self.broker.queue:
            if self.read:
                self.write(4)
            elif self.to_acknowledge:
                self.acknowledge()
            else:
                self.send()
        expected = set(range(1, self.published + 1))
        missing = expected - set(self.stored) - self.lost_by_broker
        assert not missing, f"never stored: {missing}"
        assert len(self.stored) == len(set(self.stored)), f"stored twice: {self.stored}"


class SkippingIds(Machine):
    """Packet ids may be used again at any time. All contents are different."""

    distinct_contents = True
    skipping_ids = True


class LowestFreeId(Machine):
    """Packet ids are used again at once, with equal contents. Safe while the process runs."""

    lowest_free_ids = True
    crashes = False


_SETTINGS = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("machine", [Machine, SkippingIds, LowestFreeId])
def test_every_message_is_stored_once(machine: type[Machine]) -> None:
    run_state_machine_as_test(machine, settings=_SETTINGS)
    _run_often(machine)


class WithoutDup(PacketHistory):
    """Treats every message with a known id and checksum as redelivered, also without DUP."""

    @staticmethod
    def _new_messages(read: ReadBatch, known: dict[int, int]) -> ReadBatch:
        with_dup = replace(read, tags=[tag | 0x08 << 16 for tag in read.tags])
        return PacketHistory._new_messages(with_dup, known)


class WithoutChecksum(PacketHistory):
    """Treats every message with DUP and a known id as redelivered."""

    @staticmethod
    def _new_messages(read: ReadBatch, known: dict[int, int]) -> ReadBatch:
        return read.select(
            index
            for index, tag in enumerate(read.tags)
            if tag < 0x38 << 16 or tag & 0xFFFF not in known
        )


class WithoutClearing(PacketHistory):
    """Keeps the old checksum of an id when a new message has the id."""

    def _known_checksums(self) -> dict[int, int]:
        known: dict[int, int] = {}
        for batch in reversed(self._batches):
            older = PacketHistory(self._window)
            older.reset([batch])
            known.update(older._known_checksums())
        return known


class WithoutMemory(PacketHistory):
    """Remembers nothing."""

    def add(self, packets: bytes) -> None:
        pass


def _mutant(base: type[Machine], **changes: object) -> type[Machine]:
    return type("Mutant", (base,), changes)


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(_mutant(Machine, window=2 * IDS), id="window larger than the number of ids"),
        pytest.param(_mutant(Machine, window=1), id="window smaller than in-flight messages"),
        pytest.param(_mutant(Machine, window=0), id="no ledger"),
        pytest.param(_mutant(Machine, record_lost_sessions=False), id="lost session not recorded"),
        pytest.param(_mutant(Machine, history_type=WithoutMemory), id="ledger forgets"),
        pytest.param(_mutant(SkippingIds, history_type=WithoutChecksum), id="no checksum"),
        pytest.param(_mutant(SkippingIds, history_type=WithoutClearing), id="old entry wins"),
        pytest.param(_mutant(LowestFreeId, history_type=WithoutDup), id="DUP is ignored"),
        pytest.param(
            _mutant(LowestFreeId, acknowledge_on_new_connection=True),
            id="acknowledgement on a new connection",
        ),
    ],
)
def test_every_guard_is_needed(mutant: type[Machine]) -> None:
    with pytest.raises(AssertionError, match=r"never stored|stored twice|but not stored"):
        _run_often(mutant)


def _run_often(machine: type[Machine]) -> None:
    for seed in range(2000):
        _run_random(machine, seed)


def _run_random(machine: type[Machine], seed: int) -> None:
    """Run a machine with random steps. This finds a failure far faster than Hypothesis."""
    rng = random.Random(seed)
    model = machine()
    for _ in range(80):
        choice = rng.choices(["publish", "send", "write", "ack", "rest"], [6, 6, 5, 4, 1])[0]
        if choice == "publish" and model.subscribed and len(model.broker.queue) < IDS - 2 * WINDOW:
            model.publish(rng.randint(0, 1))
        elif choice == "send" and model.broker.queue and len(model.broker.unacked) < WINDOW:
            model.send()
        elif choice == "write" and model.read:
            model.write(rng.randint(1, 4))
        elif choice == "ack" and model.to_acknowledge:
            model.acknowledge()
        elif choice == "rest":
            rules = [model.lose_connection, model.lose_session]
            rules += [model.crash] * 2 if model.crashes else []
            rules += [lambda: model.overflow(rng.randint(1, IDS))] if model.skipping_ids else []
            rng.choice(rules)()
    model.teardown()


def test_restarted_process_ignores_batches_beyond_the_window() -> None:
    """The table keeps more batches; their packet ids may have been reused."""

    def read(header: int, packet_id: int) -> ReadBatch:
        return ReadBatch(None, [b"row"], [header << 16 | packet_id], 0.0, 0.0)

    history, restarted = PacketHistory(3), PacketHistory(3)
    restarted.reset([history.drop_stored([read(0x32, i)])[1] for i in range(1, 11)])
    assert restarted.drop_stored([read(0x3A, 10)])[0][0].rows == [], "it was redelivered"
    assert restarted.drop_stored([read(0x3A, 1)])[0][0].rows == [b"row"], "it may be a new message"
