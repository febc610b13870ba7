"""The queue between the threads, and its account."""

import threading
import time
from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from iot_collector.flow import Chunk, Flow, Greeting

from testing.service import PATIENCE, eventually


def chunk(rows: int = 1, *, age: float = 0.0) -> Chunk:
    now = time.monotonic() - age
    tags = [0x32 << 16 | i + 1 for i in range(rows)]
    return Chunk(None, [b"row"] * rows, tags, now, time.time() - age)


ROW = chunk().size


def flow(*chunks: Chunk | Greeting, max_bytes: int = 1 << 20) -> Flow:
    made = Flow(max_bytes=max_bytes)
    for item in chunks:
        made.put(item)
    return made


def take(
    source: Flow, *, rows: int = 100, size: int = 1 << 20, patience: float = 0
) -> list[Chunk] | Greeting | None:
    return source.take(rows=rows, size=size, patience=patience)


NEVER = PATIENCE * 1000  # a time that ends the test when it is waited for


def test_nothing() -> None:
    assert take(flow()) == []


def test_everything_that_is_there() -> None:
    chunks = [chunk(3), chunk(2), chunk(1)]
    assert take(flow(*chunks)) == chunks


def test_rows_bound_a_batch() -> None:
    chunks = [chunk(5), chunk(5), chunk(5)]
    source = flow(*chunks)
    assert take(source, rows=10) == chunks[:2]
    source.put(last := chunk(5))
    assert take(source, rows=10) == [chunks[2], last]


def test_bytes_bound_a_batch() -> None:
    chunks = [chunk(6), chunk(6), chunk(6)]
    assert take(flow(*chunks), size=10 * ROW) == chunks[:2]


def test_a_chunk_larger_than_a_batch() -> None:
    large = chunk(500)
    assert take(flow(large, chunk()), rows=10, size=10) == [large]


def test_close() -> None:
    source = flow(waiting := chunk())
    source.close()
    assert take(source) == [waiting]
    assert take(source, patience=NEVER) is None
    assert take(source, patience=NEVER) is None


def test_close_wakes() -> None:
    source = flow()
    taken: list[object] = []
    thread = threading.Thread(
        target=lambda: taken.append(take(source, patience=NEVER)), daemon=True
    )
    thread.start()
    source.close()
    thread.join(PATIENCE)
    assert taken == [None]


def test_greeting_has_its_place() -> None:
    first, greeting, second = chunk(), Greeting(None, session_present=True), chunk()
    source = flow(first, greeting, second)
    assert [take(source), take(source), take(source), take(source)] == [
        [first],
        greeting,
        [second],
        [],
    ]


def test_full() -> None:
    source = flow(chunk(9), max_bytes=10 * ROW)
    assert not source.full
    source.put(chunk(1))
    assert source.full
    take(source)
    assert source.full, "taken is not stored: it still takes memory"
    source.settle(inserted=10, duplicates=0, dead_letters=Counter())
    assert not source.full


def test_oldest_age() -> None:
    source = flow()
    assert source.oldest_age() == 0.0
    source.put(chunk(age=100))
    source.put(chunk(age=50))
    assert source.oldest_age() >= 100
    take(source, rows=1)
    assert source.oldest_age() >= 100, "taken is not committed"
    source.settle(inserted=1, duplicates=0, dead_letters=Counter())
    assert 50 <= source.oldest_age() < 100
    take(source)
    source.settle(inserted=1, duplicates=0, dead_letters=Counter())
    assert source.oldest_age() == 0.0


def test_account() -> None:
    source = flow(chunk(10), chunk(5))
    assert source.account().in_flight == source.account().received == 15
    take(source, rows=10)
    assert source.account().in_flight == 15
    source.settle(inserted=6, duplicates=3, dead_letters=Counter(constraint=1))
    account = source.account()
    assert (account.received, account.in_flight, account.inserted) == (15, 5, 6)
    assert (account.duplicates, account.dead_letters) == (3, {"constraint": 1})
    assert account.balances()
    account.dead_letters["constraint"] += 1
    assert not account.balances()
    assert source.account().balances(), "it was a copy"


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    rows=st.integers(1, 100),
)
def test_every_snapshot_balances(sizes: list[int], rows: int) -> None:
    """One thread puts, one takes and settles, and a third looks all the time."""
    source = Flow(max_bytes=1 << 20)
    taken: list[Chunk] = []
    done = threading.Event()
    received: list[int] = []

    def write() -> None:
        while (batch := take(source, rows=rows, patience=0.01)) is not None:
            assert not isinstance(batch, Greeting)
            taken.extend(batch)
            count = sum(len(c.tags) for c in batch)
            if count:
                source.settle(
                    inserted=count // 2, duplicates=0, dead_letters=Counter(x=count - count // 2)
                )

    def look() -> None:
        while not done.is_set():
            account = source.account()
            assert account.balances()
            received.append(account.received)

    errors: list[object] = []

    def run(work: object) -> None:
        try:
            work()  # type: ignore[operator]
        except BaseException as error:  # noqa: BLE001 - given to the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in (write, look)]
    for thread in threads:
        thread.start()
    chunks = [chunk(size) for size in sizes]
    for item in chunks:
        source.put(item)
    source.close()
    threads[0].join(PATIENCE)
    done.set()
    threads[1].join(PATIENCE)
    assert errors == []
    assert taken == chunks, "all, in order"
    account = source.account()
    assert account.received == sum(sizes)
    assert account.in_flight == 0
    assert all(a <= b for a, b in pairwise(received))


def test_put_wakes_a_waiting_writer() -> None:
    source = flow()
    taken: list[object] = []
    thread = threading.Thread(
        target=lambda: taken.append(take(source, patience=NEVER)), daemon=True
    )
    thread.start()
    source.put(item := chunk())
    eventually(lambda: taken, what="the writer wakes")
    thread.join(PATIENCE)
    assert taken == [[item]]


def test_put_is_never_refused() -> None:
    source = flow(*[chunk(3) for _ in range(20)], max_bytes=1)
    assert source.full
    assert source.account().in_flight == 60
