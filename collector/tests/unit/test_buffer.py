"""The buffer between the network thread and the writer thread, and its counts."""

import threading
import time
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from iot_collector.buffer import Buffer, Outcome, ReadBatch, SessionStart, Work

from testing.service import PATIENCE, eventually


def read(rows: int = 1, *, age: float = 0.0) -> ReadBatch:
    now = time.monotonic() - age
    tags = [0x32 << 16 | i + 1 for i in range(rows)]
    return ReadBatch(None, [b"row"] * rows, tags, now, time.time() - age)


ROW = read().size


def buffer(*reads: ReadBatch | SessionStart, max_bytes: int = 1 << 20) -> Buffer:
    made = Buffer(max_bytes=max_bytes)
    for item in reads:
        made.put(item)
    return made


def take(source: Buffer, *, rows: int = 100, size: int = 1 << 20, timeout: float = 0) -> Work:
    return source.take(max_rows=rows, max_bytes=size, timeout=timeout)


def batch(source: Buffer, *, rows: int = 100, size: int = 1 << 20) -> list[ReadBatch]:
    """Take a batch; assert that no event comes with it."""
    work = take(source, rows=rows, size=size)
    assert work.event is None
    return work.batch


NOTHING = Work()


NEVER = PATIENCE * 1000  # far longer than a test may take


def test_empty_buffer_gives_an_empty_batch() -> None:
    assert take(buffer()) == NOTHING


def test_batch_has_everything_that_is_buffered() -> None:
    reads = [read(3), read(2), read(1)]
    assert batch(buffer(*reads)) == reads


def test_batch_is_limited_by_rows() -> None:
    reads = [read(5), read(5), read(5)]
    source = buffer(*reads)
    assert batch(source, rows=10) == reads[:2]
    source.put(last := read(5))
    assert batch(source, rows=10) == [reads[2], last]


def test_batch_is_limited_by_bytes() -> None:
    reads = [read(6), read(6), read(6)]
    assert batch(buffer(*reads), size=10 * ROW) == reads[:2]


def test_read_larger_than_the_limits_is_a_batch_of_its_own() -> None:
    large = read(500)
    assert batch(buffer(large, read()), rows=10, size=10) == [large]


def test_closed_buffer_gives_its_remaining_messages() -> None:
    source = buffer(waiting := read())
    source.close()
    assert not source.finished
    assert batch(source) == [waiting]
    assert source.finished
    assert take(source, timeout=NEVER) == NOTHING


def test_close_wakes_the_writer() -> None:
    source = buffer()
    taken: list[object] = []
    thread = threading.Thread(target=lambda: taken.append(take(source, timeout=NEVER)), daemon=True)
    thread.start()
    source.close()
    thread.join(PATIENCE)
    assert taken == [NOTHING]


def test_event_keeps_its_place_among_the_messages() -> None:
    first, event, second = read(), SessionStart(None, session_present=True), read()
    source = buffer(first, event, second)
    assert [take(source) for _ in range(4)] == [
        Work(batch=[first]),
        Work(event=event),
        Work(batch=[second]),
        NOTHING,
    ]


def test_buffer_is_full_until_a_batch_is_completed() -> None:
    source = buffer(read(9), max_bytes=10 * ROW)
    assert not source.full
    source.put(read(1))
    assert source.full
    taken = batch(source)
    assert source.full, "a batch that is not stored yet still uses memory"
    source.complete(taken, Outcome(inserted=10))
    assert not source.full


def test_oldest_age_counts_until_the_commit() -> None:
    source = buffer()
    assert source.oldest_age() == 0.0
    source.put(read(age=100))
    source.put(read(age=50))
    assert source.oldest_age() >= 100
    taken = batch(source, rows=1)
    assert source.oldest_age() >= 100, "the batch is not committed yet"
    source.complete(taken, Outcome(inserted=1))
    assert 50 <= source.oldest_age() < 100
    source.complete(batch(source), Outcome(inserted=1))
    assert source.oldest_age() == 0.0


def test_counts_add_up() -> None:
    source = buffer(read(10), read(5))
    assert source.counts().in_flight == source.counts().received == 15
    taken = batch(source, rows=10)
    assert source.counts().in_flight == 15
    source.complete(taken, Outcome(6, 3, Counter(constraint=1)))
    counts = source.counts()
    assert (counts.received, counts.in_flight, counts.inserted) == (15, 5, 6)
    assert (counts.duplicates, counts.dead_letters) == (3, {"constraint": 1})
    assert counts.balanced
    counts.dead_letters["constraint"] += 1
    assert not counts.balanced
    assert source.counts().balanced, "counts() returns a copy"


def test_batch_can_be_completed_only_once() -> None:
    source = buffer(read(), read())
    taken = batch(source, rows=1)
    source.complete(taken, Outcome(inserted=1))
    with pytest.raises(KeyError):
        source.complete(taken, Outcome(inserted=1))
    assert source.counts().balanced


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    rows=st.integers(1, 100),
)
def test_counts_add_up_in_every_snapshot(sizes: list[int], rows: int) -> None:
    """One thread puts, one takes and completes, and one reads the counts all the time."""
    source = Buffer(max_bytes=1 << 20)
    taken: list[ReadBatch] = []
    done = threading.Event()
    received: list[int] = []

    def write() -> None:
        while not source.finished:
            work = take(source, rows=rows, timeout=0.01)
            taken.extend(work.batch)
            count = sum(map(len, work.batch))
            source.complete(work.batch, Outcome(count // 2, 0, Counter(x=count - count // 2)))

    def read_counts() -> None:
        while not done.is_set():
            counts = source.counts()
            assert counts.balanced
            received.append(counts.received)

    errors: list[object] = []

    def run(work: object) -> None:
        try:
            work()  # type: ignore[operator]
        except BaseException as error:  # noqa: BLE001 - checked in the main thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in (write, read_counts)]
    for thread in threads:
        thread.start()
    reads = [read(size) for size in sizes]
    for item in reads:
        source.put(item)
    source.close()
    threads[0].join(PATIENCE)
    done.set()
    threads[1].join(PATIENCE)
    assert errors == []
    assert taken == reads, "all, in order"
    counts = source.counts()
    assert counts.received == sum(sizes)
    assert counts.in_flight == 0
    assert all(a <= b for a, b in pairwise(received))


def test_put_wakes_a_waiting_writer() -> None:
    source = buffer()
    taken: list[object] = []
    thread = threading.Thread(target=lambda: taken.append(take(source, timeout=NEVER)), daemon=True)
    thread.start()
    source.put(item := read())
    eventually(lambda: taken, what="the writer wakes")
    thread.join(PATIENCE)
    assert taken == [Work(batch=[item])]


def test_full_buffer_still_accepts_messages() -> None:
    source = buffer(*[read(3) for _ in range(20)], max_bytes=1)
    assert source.full
    assert source.counts().in_flight == 60
