"""Failover of RDS Multi-AZ: the name stays the same and gets the address of the standby.

Two PostgreSQL servers, the second a synchronous standby of the first, listen on 127.0.0.2 and
127.0.0.3. The collector has its own /etc/hosts (in a mount namespace), with which libpq resolves
the name. Where the kernel allows no namespaces (most containers), a TCP proxy changes its target
instead; this does not test that the name is resolved again. Neither tests how long RDS takes, or a
resolver that caches the old address.
"""

import contextlib
import os
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psycopg2
import psycopg2.extensions
import pytest
from iot_collector.database import connect
from iot_collector.settings import load

from testing.collector import Collector
from testing.mosquitto import Mosquitto
from testing.postgres import Database, Postgres, postgres_binary
from testing.proxy import Proxy
from testing.publisher import Stream
from testing.service import HOST, IS_ROOT, children, eventually, free_port

NAME = "database.iot.test"


class Server(Postgres):
    """A server that listens on its own address."""

    def __init__(self, folder: Path, port: int, address: str) -> None:
        super().__init__(folder, port)
        self.address = address

    def command(self) -> Sequence[str]:
        settings = (f"listen_addresses={self.address}", "wal_level=replica", "max_wal_senders=4")
        return [*super().command(), *(word for s in settings for word in ("-c", s))]

    def connect(
        self, database: str = "postgres", user: str = "postgres", password: str = "postgres"
    ) -> psycopg2.extensions.connection:
        connection: psycopg2.extensions.connection = psycopg2.connect(
            host=self.address, port=self.port, dbname=database, user=user, password=password
        )
        return connection

    def stand_by(self, primary: "Server") -> None:
        """Become a standby of ``primary``."""
        done = subprocess.run(
            [
                *(postgres_binary("pg_basebackup"), "-D", str(self.data), "-R", "--no-sync"),
                *("-c", "fast", "-h", primary.address, "-p", str(primary.port), "-U", "postgres"),
            ],
            env=os.environ | {"PGPASSWORD": "postgres"},
            capture_output=True,
            text=True,
            check=False,
            **self.options(),
        )
        assert done.returncode == 0, done.stderr


MOUNT = ["unshare", "--mount", *([] if IS_ROOT else ["--map-root-user"]), "sh", "-c"]
HAS_NAMESPACES = not subprocess.run([*MOUNT, "mount --bind /etc/hosts /etc/hosts"]).returncode


class CollectorByName(Collector):
    """A collector that connects to the database by a name with a changeable address."""

    def __init__(self, folder: Path, broker: Mosquitto, proxy: Proxy, **settings: str) -> None:
        super().__init__(folder, broker, **settings)
        self.hosts = folder / "hosts"
        self.proxy = proxy

    def command(self) -> Sequence[str]:
        script = 'mount --bind "$1" /etc/hosts && shift && exec "$@"'
        alone = [*MOUNT, script, "sh", str(self.hosts)] if HAS_NAMESPACES else []
        return [*alone, *super().command()]

    def point_to(self, server: Server) -> None:
        """Make the name resolve to the address of a server."""
        port = server.port if HAS_NAMESPACES else self.proxy.port
        self.hosts.write_text(f"{server.address} {NAME}\n")
        self.proxy.service = (server.address, server.port)
        name = NAME if HAS_NAMESPACES else HOST
        self.settings["IOT_DATABASE_URL"] = f"postgresql://postgres@{name}:{port}/migrated"


@pytest.fixture
def servers(_initialised: Postgres) -> Iterator[tuple[Server, Server]]:
    """A primary with the database ``migrated``, and its synchronous standby."""
    port = free_port()
    with Postgres.directory() as one, Postgres.directory() as two, contextlib.ExitStack() as stack:
        primary, standby = Server(one, port, "127.0.0.2"), Server(two, port, "127.0.0.3")
        stack.callback(primary.close)
        stack.callback(standby.close)
        subprocess.run(["cp", "-a", str(_initialised.data), str(primary.data)], check=True)
        primary.start()
        standby.stand_by(primary)
        standby.start()
        # As with Multi-AZ, each COMMIT waits for the standby.
        primary.query("ALTER SYSTEM SET synchronous_standby_names = '*'")
        primary.query("SELECT pg_reload_conf()")
        eventually(
            lambda: primary.query("SELECT sync_state FROM pg_stat_replication") == [("sync",)],
            what="the standby is synchronous",
        )
        yield primary, standby


@pytest.mark.parametrize("failure", ["dies", "hangs", "becomes read-only"])
def test_messages_are_stored_once_over_a_failover(
    failure: str,
    servers: tuple[Server, Server],
    broker: Mosquitto,
    make_proxy: Callable[[int], Proxy],
    tmp_path: Path,
) -> None:
    primary, standby = servers
    collector = CollectorByName(
        tmp_path,
        broker,
        make_proxy(primary.port),
        IOT_DATABASE_PASSWORD="postgres",
        IOT_DATABASE_TIMEOUT_SECONDS="2",
    )
    collector.point_to(primary)
    stopped: list[int] = []
    with contextlib.ExitStack() as stack:
        stack.callback(collector.close)
        collector.start()
        stream = stack.enter_context(Stream(broker))
        stream.more(100)
        if failure == "dies":
            primary.kill()
        elif failure == "hangs":  # the kernel still acknowledges packets, so TCP notices nothing
            stopped = [primary.pid, *children(primary.pid)]
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
                stack.callback(os.kill, pid, signal.SIGCONT)
        else:
            primary.query("ALTER SYSTEM SET default_transaction_read_only = on")
            primary.query("SELECT pg_reload_conf()")
            eventually(
                lambda: "read_only" in str(collector.health()["database"]["error"]),
                what="the read-only primary refuses writes",
            )
        assert standby.query("SELECT pg_promote()") == [(True,)]
        collector.point_to(standby)
        stream.more(100)
        pid = collector.pid
        acknowledged = stream.finish()
        collector.wait_settled(len(acknowledged), timeout=60)
        assert collector.pid == pid
        stored = Database(standby, "migrated").payloads()
        assert Counter(stored) == Counter(acknowledged), "each message once"


def test_connection_has_tcp_timeouts(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead host sends no RST. The kernel closes the connection when data is not acknowledged for
    30 s, and an idle connection after 25 s. Only the socket options are tested, because loopback
    loses no packets.
    """
    monkeypatch.setenv("IOT_DATABASE_URL", database.url)
    monkeypatch.setenv("IOT_DATABASE_PASSWORD", database.password)
    with contextlib.closing(connect(load())) as connection:
        sock = socket.socket(fileno=os.dup(connection.fileno()))
        with sock:
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            assert [sock.getsockopt(socket.IPPROTO_TCP, name) for name in names] == [10, 5, 3]
