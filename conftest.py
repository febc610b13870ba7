"""Fixtures: one PostgreSQL server for all tests; brokers, proxies and collectors for each test."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from testing.collector import Collector, run_command
from testing.mosquitto import Mosquitto
from testing.postgres import Database, Postgres
from testing.proxy import Proxy

# No deadlines: a slow machine must not fail a test. Tests about time have timeouts of their own.
settings.register_profile("here", deadline=None, max_examples=50)
settings.load_profile("here")


# Fixtures that are slow to set up: all tests that use one of them run in the same worker.
SHARED = ("deployed", "cluster", "image")
# Files with the longest tests. They start first, so that all workers finish at about the same time.
LONGEST = ("test_molecule.py", "test_boot.py", "aws", "test_kubernetes.py", "test_pods.py")
# Files whose tests can run in any worker. The tests of any other file stay in one worker, because
# they share module fixtures.
INDEPENDENT = ("collector", "test_molecule.py", "test_interruptions.py", "test_kubernetes.py")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Set the order of the tests, and which of them share a worker."""

    def parts(item: pytest.Item) -> set[str]:
        return {*item.path.relative_to(config.rootpath).parts}

    def place(item: pytest.Item) -> int:
        found = map(LONGEST.index, parts(item) & {*LONGEST})
        return min(found, default=len(LONGEST))

    items.sort(key=place)
    for item in items:
        shared = {*SHARED} & {*getattr(item, "fixturenames", ())}
        if shared or not parts(item) & {*INDEPENDENT}:
            item.add_marker(pytest.mark.xdist_group(min(shared, default=item.path.name)))


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("IOT_", "PG")):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def _initialised() -> Iterator[Postgres]:
    """A data directory with a migrated database ``migrated``; its server is stopped."""
    with Postgres.directory() as folder:
        server = Postgres(folder).create().start()
        try:
            server.query("CREATE DATABASE migrated")
            done = run_command("migrate", **Database(server, "migrated").environment())
            assert done.returncode == 0, done.stderr
            server.stop()
        finally:
            server.close()
        yield server


@pytest.fixture(scope="session")
def postgres(_initialised: Postgres) -> Iterator[Postgres]:
    """The server that tests share. No test may stop it."""
    with Postgres.directory() as folder:
        server = _initialised.copy(folder).start()
        yield server
        server.close()


@pytest.fixture
def own_postgres(_initialised: Postgres) -> Iterator[Postgres]:
    """A server for one test, which may stop and kill it."""
    with Postgres.directory() as folder:
        server = _initialised.copy(folder).start()
        yield server
        server.close()


@pytest.fixture
def empty_database(postgres: Postgres) -> Database:
    """A database without the schema."""
    return postgres.database()


@pytest.fixture
def database(postgres: Postgres) -> Database:
    """A migrated database."""
    return postgres.database(template="migrated")


@pytest.fixture
def own_database(own_postgres: Postgres) -> Database:
    """A migrated database on `own_postgres`."""
    return own_postgres.database(template="migrated")


@pytest.fixture
def make_broker(tmp_path: Path) -> Iterator[Callable[..., Mosquitto]]:
    """Create brokers (see `Mosquitto`), not started. They are stopped after the test."""
    made: list[Mosquitto] = []

    def make(*settings: str, **options: object) -> Mosquitto:
        folder = tmp_path / f"broker-{len(made)}"
        folder.mkdir()
        made.append(Mosquitto(folder, *settings, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for broker in made:
        broker.close()


@pytest.fixture
def broker(make_broker: Callable[..., Mosquitto]) -> Mosquitto:
    """A running broker that allows anonymous clients."""
    return make_broker().start()


@pytest.fixture
def make_proxy() -> Iterator[Callable[[int], Proxy]]:
    """Create proxies (see `Proxy`) to a port. They are stopped after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda port: stack.enter_context(contextlib.closing(Proxy(port)))


@pytest.fixture
def make_collector(tmp_path: Path) -> Iterator[Callable[..., Collector]]:
    """Create collectors (see `Collector`), not started. They are stopped after the test."""
    made: list[Collector] = []

    def make(*parts: Mosquitto | Database, **settings: str) -> Collector:
        folder = tmp_path / f"collector-{len(made)}"
        folder.mkdir()
        made.append(Collector(folder, *parts, **settings))
        return made[-1]

    yield make
    for collector in made:
        collector.close()


@pytest.fixture
def collector(
    make_collector: Callable[..., Collector], broker: Mosquitto, database: Database
) -> Collector:
    """A running collector that stores messages of ``broker`` in ``database``."""
    return make_collector(broker, database).start()
