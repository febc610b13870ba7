"""A package upgrade replaces PostgreSQL's libraries while the server runs.

The server runs from a copy of the installed release, and finds its libraries relative to its
program. They are replaced by invalid files, so that loading a library after the start fails.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from rendering import render

from testing.collector import Collector
from testing.mosquitto import Mosquitto
from testing.postgres import Database, Postgres, postgres_binary
from testing.publisher import Publisher
from testing.service import eventually

SETTINGS = ("shared_preload_libraries", "jit")
LIBRARIES = ("plpgsql.so", "llvmjit.so")


def settings() -> list[str]:
    """The lines of our postgresql.conf about libraries."""
    names = ("__postgres_data", "__postgres_etc", "__postgres_socket_dir")
    text = render(
        "postgres/postgresql.conf.j2",
        **dict.fromkeys((*names, "postgres_port", "postgres_shared_buffers"), ""),
        __postgres_here={"listen": ""},
    )
    lines = [line for line in text.splitlines() if line.startswith(SETTINGS)]
    assert len(lines) == len(SETTINGS)
    return lines


class CopiedPostgres(Postgres):
    """A server that runs from its own copy of the program files."""

    def __init__(self, folder: Path, data: Path) -> None:
        super().__init__(folder)
        installed = Path(postgres_binary("postgres")).resolve().parent.parent
        self.release = folder / "usr/lib/postgresql" / installed.name
        for directory in ("bin", "lib"):
            (self.release / directory).mkdir(parents=True)
        shutil.copy(installed / "bin/postgres", self.release / "bin")
        for library in (installed / "lib").glob("*.so"):
            shutil.copy(library, self.release / "lib")
        shared = Path("share/postgresql") / installed.name
        shutil.copytree(Path("/usr") / shared, folder / "usr" / shared)
        shutil.copytree(data, self.data)
        if self.identity():
            for path in [self.data, *self.data.rglob("*")]:
                shutil.chown(path, "postgres", "postgres")

    def command(self) -> Sequence[str]:
        return [str(self.release / "bin/postgres"), "-D", str(self.data), "-p", str(self.port)]

    def upgrade(self) -> None:
        """Replace the libraries as dpkg does, with new files of the same names."""
        for name in LIBRARIES:
            new = self.release / "lib" / f"{name}.new"
            new.write_text("of another release\n")
            new.rename(new.with_name(name))


@pytest.fixture
def server(_initialised: Postgres) -> Iterator[CopiedPostgres]:
    """A server, not started."""
    with Postgres.directory() as folder:
        server = CopiedPostgres(folder, _initialised.data)
        yield server
        server.close()


def configure(server: Postgres, *lines: str) -> None:
    with (server.data / "postgresql.conf").open("a") as config:
        config.write("\n".join([*lines, ""]))


def test_messages_are_stored_after_the_upgrade(
    server: CopiedPostgres, make_collector: Callable[..., Collector], broker: Mosquitto
) -> None:
    configure(server, *settings())
    server.start()
    database = Database(server, "migrated")
    collector = make_collector(broker, database).start()
    server.upgrade()
    # A new session works, and so does a collector that starts and creates its partitions.
    assert database.query("SELECT ensure_partitions(now() + interval '3 years', 1)") == [(2,)]
    database.query("SET jit_above_cost = 0; SELECT count(*) FROM pg_class")
    collector.stop()
    collector.start()
    with Publisher(broker) as device:
        device.publish("iot/data", b"after the upgrade")
        device.settle()
    eventually(lambda: database.payloads() == [b"after the upgrade"])


def test_failure_after_the_upgrade_is_explained(
    server: CopiedPostgres, make_collector: Callable[..., Collector], broker: Mosquitto
) -> None:
    """With a server without our settings, which loads libraries on demand."""
    server.start()
    server.upgrade()
    collector = make_collector(broker, Database(server, "migrated")).start()
    with Publisher(broker) as device:
        device.publish("iot/data", b"after the upgrade")
        device.settle()
    cause = "was upgraded while its server ran; run the playbook again to restart the server"
    eventually(lambda: cause in str(collector.health()))
    assert cause in collector.log()
