"""The network thread: when it reads and when it acknowledges."""

import itertools
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from iot_collector.buffer import Buffer
from iot_collector.connection import Connection
from iot_collector.network import NetworkThread, backoff, linger
from iot_collector.settings import Settings

LINGER = 0.01  # seconds, the default
LONG = 1_000  # milliseconds, the longest that can be set
PUBLISH = b"\x32\x0a\0\1t\0\1n:123"  # to topic t with QoS 1 and packet id 1, MQTT 3.1.1
PUBACK = b"\x40\2\0\1"


def lingers(rate: int, *, first: float) -> list[float]:
    """Return the waits before each read, at a constant rate of messages per second."""
    waits = itertools.accumulate(
        range(30), lambda wait, _: linger(LINGER, max(1, round(rate * wait))), initial=first
    )
    return list(waits)


@pytest.mark.parametrize("rate", [1, 100, 1_000, 3_000])
def test_linger_is_short_at_low_rates(rate: int) -> None:
    """Also after a burst, when the last wait was long."""
    assert lingers(rate, first=LINGER)[-1] == pytest.approx(LINGER / 5)


@pytest.mark.parametrize("rate", [7_000, 10_000, 100_000])
def test_linger_reaches_its_limit_at_high_rates(rate: int) -> None:
    assert lingers(rate, first=0.0)[-1] == LINGER


@given(limit=st.floats(0, 1), messages=st.integers(1, 100_000))
def test_linger_never_exceeds_its_setting(limit: float, messages: int) -> None:
    assert 0 <= linger(limit, messages) <= linger(limit, messages + 1) <= limit


def test_backoff_grows_to_a_limit() -> None:
    assert [backoff(n) for n in (1, 2, 3)] == [0.5, 1.0, 2.0]
    assert backoff(100_000) == 30.0  # the broker was down for weeks


def test_wait_between_attempts_counts_as_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    with connected() as (network, connection, _):
        started = time.monotonic()
        network.last_progress = started - network.progress_timeout
        seen = []
        monkeypatch.setattr(connection, "open", lambda: seen.append(network.last_progress))
        connection.client._sock = None
        network._serve(connection)
    assert seen[0] >= started


@contextmanager
def connected(*sent: bytes) -> Iterator[tuple[NetworkThread, Connection, socket.socket]]:
    """Yield a network thread that is not running, its connection, and the broker's socket."""
    settings = Settings(mqtt_version="3.1.1", batch_linger_ms=LONG)
    buffer = Buffer(max_bytes=1 << 20)
    metrics = Mock(
        spec_set=("mqtt_connected", "mqtt_waiting")
    )  # a process can have the real ones only once
    network, connection = NetworkThread(settings, buffer, metrics), Connection(settings)
    ours, broker = socket.socketpair()
    with ours, broker, network._wake_reader, network._wake_writer:
        ours.setblocking(False)
        broker.settimeout(0)
        connection.client._sock = ours
        broker.sendall(b"".join(sent))
        yield network, connection, broker


def take(network: NetworkThread) -> None:
    """Acknowledge all buffered messages, as the writer does after COMMIT."""
    batch = network._buffer.take(max_rows=1_000, max_bytes=1 << 20, timeout=0).batch
    assert batch
    network.acknowledge(batch)


@pytest.mark.parametrize(("messages", "share"), [(1, 0.2), (10, 0.2), (25, 0.5), (60, 1)])
def test_wait_depends_on_the_size_of_the_last_read(messages: int, share: float) -> None:
    with connected(PUBLISH * messages) as (network, connection, _):
        before = time.monotonic()
        network._step(connection)
        after = time.monotonic()
    wait = share * LONG / 1_000
    assert before + wait <= network._next_read <= after + wait


def woken(network: NetworkThread) -> bool:
    """Return whether the network thread was woken."""
    try:
        return bool(network._wake_reader.recv(100))
    except BlockingIOError:
        return False


def test_pubacks_are_sent_right_before_the_next_read() -> None:
    """Earlier PUBACKs make the broker send at once (Nagle), and those messages wait longer."""
    with connected(PUBLISH * 2) as (network, connection, broker):
        network._step(connection)
        take(network)
        network._next_read = 0
        network._step(connection)
        assert broker.recv(100) == PUBACK * 2
        broker.sendall(PUBLISH)
        network._step(connection)
        assert network._hold_until == network._next_read
        take(network)
        assert not woken(network), "the thread would only wait again"
        network._wake()
        network._step(connection)
        with pytest.raises(BlockingIOError):
            broker.recv(100)
        broker.sendall(PUBLISH)
        network._next_read = network._hold_until = time.monotonic()
        network._step(connection)
        assert broker.recv(100) == PUBACK
        assert network._buffer.counts().received == 4


def test_pubacks_are_sent_at_once_when_the_window_may_be_full() -> None:
    """A broker that has never sent more messages at a time may wait for PUBACKs."""
    with connected(PUBLISH * 2) as (network, connection, broker):
        for _ in range(3):
            network._step(connection)
            take(network)
            assert woken(network)
            network._wake()
            network._step(connection)
            assert broker.recv(100) == PUBACK * 2
            network._next_read = 0
            broker.sendall(PUBLISH * 2)
