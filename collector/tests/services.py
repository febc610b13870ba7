"""Real services for the tests: PostgreSQL, Mosquitto and the collector as processes.

Everything listens on 127.0.0.1, on ports chosen at run time, with its files in a directory of its
own below /tmp. What is started here is ended here, by its process id.
"""

import base64
import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import psycopg2
import psycopg2.extensions
from paho.mqtt.client import Client, ConnectFlags
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from prometheus_client.parser import text_string_to_metric_families

HOST = "127.0.0.1"
IS_ROOT = os.geteuid() == 0
PATIENCE = 30.0  # seconds: far more than anything takes, so that a busy machine fails no test

T = TypeVar("T")


def eventually(predicate: Callable[[], T], timeout: float = PATIENCE, what: str = "") -> T:
    """Return the predicate's first true value; fail when there was none in time.

    The one way in which these tests wait.
    """
    until = time.monotonic() + timeout
    while not (value := predicate()):
        if time.monotonic() > until:
            raise AssertionError(f"not in {timeout:g} s: {what or predicate}; last: {value!r}")
        time.sleep(0.02)
    return value


def free_port() -> int:
    """Return a TCP port that nothing listens on."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port: int = sock.getsockname()[1]
        return port


def binary(name: str, *folders: str) -> str:
    """Return the path of a program; fail, never skip, when it is not installed."""
    path = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))
    if path is None:
        raise AssertionError(
            f"{name} is not installed; `make test` installs what the tests need "
            "(Debian packages mosquitto, postgresql and openssl)"
        )
    return path


def postgres_binary(name: str) -> str:
    """Return the path of one of PostgreSQL's programs; Debian keeps them off the PATH."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return binary(name, *map(str, versions))


class Service:
    """A process that is started, killed and started again with the same files and port."""

    name = "service"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log_file = folder / f"{self.name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> Sequence[str]:
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """More arguments of Popen."""
        return {}

    def ready(self) -> bool:
        """Whether the process does its work."""
        return True

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def launch(self) -> Self:
        """Start the process and do not wait for it."""
        assert not self.running, f"{self.name} runs already"
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, **self.options()
            )
        return self

    def start(self) -> Self:
        """Start the process and wait until it is ready."""
        self.launch()

        def ready_or_dead() -> bool:
            assert self.running, f"{self.name} ended at its start:\n{self.log()}"
            return self.ready()

        eventually(ready_or_dead, what=f"{self.name} is ready")
        return self

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for the end of the process and return its exit status."""
        assert self.process is not None
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} does not end:\n{self.log()}") from None

    def stop(self) -> int:
        """Ask the process to end, and wait."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """End the process as a power cut does."""
        self.signal(signal.SIGKILL)
        self.wait()

    def close(self) -> None:
        """End the process, if it runs, without ceremony."""
        if self.running:
            self.kill()


# PostgreSQL ----------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row of ``messages``."""

    topic: str
    payload: bytes
    qos: int
    retained: bool
    fields: Any
    properties: Any


class Letter(NamedTuple):
    """A row of ``dead_letters``."""

    topic: bytes
    payload: bytes
    qos: int
    retained: bool
    reason: str
    sqlstate: str


@dataclass
class Database:
    """A database of a server, and a user of it."""

    server: "Postgres"
    name: str
    user: str = "postgres"
    password: str = "postgres"

    @property
    def url(self) -> str:
        """The URI without the password."""
        return f"postgresql://{self.user}@{HOST}:{self.server.port}/{self.name}"

    def environment(self) -> dict[str, str]:
        """The collector's settings for this database."""
        return {"IOT_DATABASE_URL": self.url, "IOT_DATABASE_PASSWORD": self.password}

    def connect(self) -> psycopg2.extensions.connection:
        return self.server.connect(self.name, self.user, self.password)

    def query(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """Run a statement in autocommit and return its rows, if it has any."""
        with contextlib.closing(self.connect()) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(sql, values or None)
                return cursor.fetchall() if cursor.description else []

    def rows(self) -> list[Row]:
        """All rows of ``messages``, in the order in which they were stored."""
        found = self.query(
            "SELECT topic, payload, qos, retained, fields, properties FROM messages ORDER BY id"
        )
        return [Row(r[0], bytes(r[1]), *r[2:]) for r in found]

    def payloads(self) -> list[bytes]:
        return [row.payload for row in self.rows()]

    def count(self, table: str = "messages") -> int:
        count: int = self.query(f"SELECT count(*) FROM {table}")[0][0]
        return count

    def dead_letters(self) -> list[Letter]:
        found = self.query(
            "SELECT topic, payload, qos, retained, reason, sqlstate FROM dead_letters ORDER BY id"
        )
        return [Letter(bytes(r[0]), bytes(r[1]), *r[2:]) for r in found]


class Postgres(Service):
    """A PostgreSQL server. As root it runs as the user ``postgres``: it refuses root."""

    name = "postgres"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.data = folder / "data"
        self.port = free_port()
        self._databases = 0

    @staticmethod
    def identity() -> dict[str, Any]:
        """The arguments of Popen that make PostgreSQL's programs run as whom they accept."""
        return {"user": "postgres", "group": "postgres", "extra_groups": []} if IS_ROOT else {}

    @classmethod
    @contextlib.contextmanager
    def directory(cls) -> Iterator[Path]:
        """A directory that the server's user owns; pytest's own are root's alone."""
        with tempfile.TemporaryDirectory(prefix="iot-test-", dir="/tmp") as name:
            if IS_ROOT:
                shutil.chown(name, "postgres", "postgres")
            yield Path(name)

    def create(self) -> Self:
        """Make the data directory (initdb)."""
        password_file = self.folder / "password"
        password_file.write_text("postgres\n")
        if IS_ROOT:
            shutil.chown(password_file, "postgres", "postgres")
        done = subprocess.run(
            [
                *(postgres_binary("initdb"), "-D", str(self.data), "-U", "postgres", "--no-sync"),
                *("--pwfile", str(password_file), "-E", "UTF8", "--locale", "C.UTF-8"),
                *("--auth-local", "trust", "--auth-host", "scram-sha-256"),
            ],
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
            **self.identity(),
        )
        assert done.returncode == 0, f"initdb failed:\n{done.stdout}{done.stderr}"
        with (self.data / "postgresql.conf").open("a") as config:
            config.write(
                f"listen_addresses = '{HOST}'\nunix_socket_directories = ''\n"
                "fsync = off\nfull_page_writes = off\nmax_connections = 40\n"
                "superuser_reserved_connections = 3\nshared_buffers = 32MB\n"
                "wal_level = minimal\nmax_wal_senders = 0\n"
                "autovacuum = off\ntimezone = 'Pacific/Chatham'\n"  # an unusual offset: 12:45
            )
        return self

    def copy(self, folder: Path) -> "Postgres":
        """Return a server of its own from this one's data directory; this one must be stopped."""
        twin = Postgres(folder)
        subprocess.run(["cp", "-a", str(self.data), str(twin.data)], check=True)
        return twin

    def command(self) -> Sequence[str]:
        return [postgres_binary("postgres"), "-D", str(self.data), "-p", str(self.port)]

    def options(self) -> dict[str, Any]:
        return {"cwd": "/", **self.identity()}

    def connect(
        self, database: str = "postgres", user: str = "postgres", password: str = "postgres"
    ) -> psycopg2.extensions.connection:
        connection: psycopg2.extensions.connection = psycopg2.connect(
            host=HOST, port=self.port, dbname=database, user=user, password=password
        )
        return connection

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        return Database(self, "postgres").query(sql)

    def ready(self) -> bool:
        try:
            self.connect().close()
        except psycopg2.OperationalError:
            return False
        return True

    def database(self, template: str = "template1") -> Database:
        """Make a new database."""
        self._databases += 1
        name = f"test_{self._databases}"
        self.query(f"CREATE DATABASE {name} TEMPLATE {template}")
        return Database(self, name)

    def stop(self) -> int:
        """End it in the "fast" way: open sessions are cut, open transactions rolled back."""
        self.signal(signal.SIGINT)
        return self.wait()

    def kill(self) -> None:
        """Kill the server and each of its backends, as a power cut does."""
        pids = [self.pid, *children(self.pid)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()
        eventually(lambda: not any(alive(pid) for pid in pids), what="backends are gone")
        (self.data / "postmaster.pid").unlink(missing_ok=True)


def children(pid: int) -> list[int]:
    """Return the process ids of a process's children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# Mosquitto -----------------------------------------------------------------------------------


class Mosquitto(Service):
    """A Mosquitto broker with a plain listener, and more as the test needs.

    :param settings: lines of mosquitto.conf for the whole broker.
    :param scheme: how the collector connects; unless it is mqtt, to a listener of its own.
    :param listener: lines of mosquitto.conf for that listener.
    """

    name = "mosquitto"

    def __init__(
        self,
        folder: Path,
        *settings: str,
        anonymous: bool = True,
        scheme: str = "mqtt",
        listener: Sequence[str] = (),
    ) -> None:
        super().__init__(folder)
        self.port = free_port()
        self.scheme = scheme
        self._collector_port = self.port if scheme == "mqtt" else free_port()
        lines = [
            "persistence true",
            f"persistence_location {folder}/",
            "max_inflight_messages 10000",
            "max_queued_messages 0",
            "log_type all",
            f"allow_anonymous {str(anonymous).lower()}",
            *settings,
            f"listener {self.port} {HOST}",
        ]
        if IS_ROOT:
            lines.insert(0, "user root")  # or it gives up the rights to its files
        if scheme != "mqtt":
            lines += [f"listener {self._collector_port} {HOST}", *listener]
        self.config = folder / "mosquitto.conf"
        self.config.write_text("\n".join([*lines, ""]))

    @property
    def url(self) -> str:
        """Where the collector connects."""
        return f"{self.scheme}://{HOST}:{self._collector_port}"

    def environment(self) -> dict[str, str]:
        """The collector's settings for this broker."""
        return {"IOT_MQTT_URL": self.url}

    def command(self) -> Sequence[str]:
        return [binary("mosquitto", "/usr/sbin", "/usr/local/sbin"), "-c", str(self.config)]

    def ready(self) -> bool:
        with socket.socket() as sock:
            return sock.connect_ex((HOST, self.port)) == 0

    def reload(self) -> None:
        """Have it read its password and ACL files again."""
        self.signal(signal.SIGHUP)


class Certificates(NamedTuple):
    """Files of a CA, and what it signed."""

    ca: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path


def make_certificates(folder: Path) -> Certificates:
    """Make a CA, a server's certificate for 127.0.0.1 and a client's."""

    def openssl(*arguments: str) -> None:
        done = subprocess.run(
            [binary("openssl"), *arguments], cwd=folder, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-batch")
    openssl("req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=Test CA")
    (folder / "server.ext").write_text(f"subjectAltName = IP:{HOST}\n")
    (folder / "client.ext").write_text("extendedKeyUsage = clientAuth\n")
    for name in ("server", "client"):
        openssl(
            "req", *new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}"
        )
        openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key"),
            *("-CAcreateserial", "-extfile", f"{name}.ext", "-out", f"{name}.crt"),
        )
    names = ("ca.crt", "server.crt", "server.key", "client.crt", "client.key")
    return Certificates(*(folder / name for name in names))


class DynamicSecurity:
    """Mosquitto's plugin for access control: unlike an acl_file, it can refuse a SUBSCRIBE.

    Anyone may do anything, but for what the role ``anyone`` is denied; ``admin`` may change that.
    """

    def __init__(self, folder: Path, deny_subscribe: str) -> None:
        self.file = folder / "dynamic-security.json"
        salt = os.urandom(12)
        digest = hashlib.pbkdf2_hmac("sha512", b"admin", salt, 101)
        control = {"acltype": "publishClientSend", "topic": "$CONTROL/#", "allow": True}
        denial = {"acltype": "subscribeLiteral", "topic": deny_subscribe, "allow": False}
        access = ("publishClientSend", "publishClientReceive", "subscribe", "unsubscribe")
        config = {
            "defaultACLAccess": dict.fromkeys(access, True),
            "clients": [
                {
                    "username": "admin",
                    "password": base64.b64encode(digest).decode(),
                    "salt": base64.b64encode(salt).decode(),
                    "iterations": 101,
                    "roles": [{"rolename": "admin"}],
                }
            ],
            "groups": [{"groupname": "anyone", "roles": [{"rolename": "anyone"}]}],
            "roles": [
                {"rolename": "admin", "acls": [control]},
                {"rolename": "anyone", "acls": [denial]},
            ],
            "anonymousGroup": "anyone",
        }
        self.file.write_text(json.dumps(config))

    @property
    def settings(self) -> list[str]:
        """Lines of mosquitto.conf."""
        plugins = sorted(Path("/usr/lib").glob("*/mosquitto_dynamic_security.so"))
        assert plugins, "Mosquitto's dynamic-security plugin is missing; `make test` installs it"
        return [f"plugin {plugins[0]}", f"plugin_opt_config_file {self.file}"]

    def allow(self, broker: "Mosquitto", topic_filter: str) -> None:
        """Allow everyone to subscribe to what was denied."""
        command = {
            "command": "removeRoleACL",
            "rolename": "anyone",
            "acltype": "subscribeLiteral",
            "topic": topic_filter,
        }
        topic, payload = "$CONTROL/dynamic-security/v1", json.dumps({"commands": [command]})
        publish(broker, [(topic, payload.encode())], username="admin", password="admin")


def write_passwords(file: Path, users: Mapping[str, str]) -> None:
    """Write a Mosquitto password file."""
    file.write_text("".join(f"{user}:{password}\n" for user, password in users.items()))
    file.chmod(0o600)
    subprocess.run([binary("mosquitto_passwd"), "-U", str(file)], check=True, capture_output=True)


@dataclass
class Publisher:
    """A device: a connection that counts what the broker has acknowledged.

    It reconnects and sends again, as paho does, when the broker goes away.
    """

    broker: Mosquitto
    username: str | None = None
    password: str | None = None
    acknowledged: set[bytes] = field(default_factory=set)

    def __enter__(self) -> Self:
        self._payloads: dict[int, bytes] = {}
        self._sent = 0
        self._answers: list[int] = []
        self._connected = threading.Event()
        self._client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self._client.max_inflight_messages_set(200)
        self._client.reconnect_delay_set(1, 1)
        self._client.username_pw_set(self.username, self.password)
        self._client.on_connect = self._on_connect
        self._client.on_publish = self._on_publish
        self._client.connect(HOST, self.broker.port)
        self._client.loop_start()
        assert self._connected.wait(PATIENCE), "the broker does not let the publisher in"
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        properties: Properties | None = None,
    ) -> None:
        """Publish without waiting."""
        info = self._client.publish(topic, payload, qos, retain, properties)
        self._payloads[info.mid] = payload
        self._sent += 1

    def settle(self, timeout: float = PATIENCE) -> set[bytes]:
        """Wait for all acknowledgements; return the payloads that were acknowledged."""
        eventually(lambda: len(self._answers) >= self._sent, timeout, "all is acknowledged")
        self.acknowledged |= {self._payloads[mid] for mid in self._answers}
        self._payloads, self._answers, self._sent = {}, [], 0
        return self.acknowledged

    def _on_connect(
        self, _c: Client, _u: object, _f: ConnectFlags, reason: ReasonCode, _p: Properties | None
    ) -> None:
        if not reason.is_failure:
            self._connected.set()

    def _on_publish(
        self, _c: Client, _u: object, mid: int, reason: ReasonCode, _p: Properties
    ) -> None:
        assert not reason.is_failure, f"the broker refused a message: {reason}"
        self._answers.append(mid)


def publish(
    broker: Mosquitto,
    messages: Iterable[tuple[str, bytes]],
    *,
    qos: int = 1,
    retain: bool = False,
    properties: Properties | None = None,
    username: str | None = None,
    password: str | None = None,
) -> set[bytes]:
    """Publish (topic, payload) pairs; return the payloads that the broker acknowledged."""
    with Publisher(broker, username, password) as publisher:
        for topic, payload in messages:
            publisher.publish(topic, payload, qos=qos, retain=retain, properties=properties)
        return publisher.settle()


class Stream:
    """A device that publishes numbered messages in the background until the block ends."""

    def __init__(self, broker: Mosquitto, topic: str = "iot/data", every: float = 0.002) -> None:
        self._publisher = Publisher(broker)
        self._topic = topic
        self._every = every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.sent = 0

    def __enter__(self) -> Self:
        self._publisher.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()
        self._publisher.__exit__()

    def finish(self) -> set[bytes]:
        """Stop; return the payloads that the broker acknowledged."""
        self._stop.set()
        self._thread.join(PATIENCE)
        return self._publisher.settle()

    def more(self, count: int = 50) -> None:
        """Wait until ``count`` more messages have been sent."""
        goal = self.sent + count
        eventually(lambda: self.sent >= goal, what=f"{count} more messages are sent")

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            self._publisher.publish(self._topic, b"n:%d" % self.sent)
            self.sent += 1


# The collector -------------------------------------------------------------------------------


class Answer(NamedTuple):
    """An answer of the collector's HTTP server."""

    status: int
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


Metrics = dict[str, float]


def law(metrics: Metrics) -> None:
    """Assert the law of the account: received = stored + duplicates + dead letters + in flight."""
    settled = (
        metrics["db_inserts_total"]
        + metrics["db_duplicates_total"]
        + sum(value for name, value in metrics.items() if name.startswith("db_dead_letters_total"))
    )
    received = metrics["mqtt_messages_total"]
    assert received == settled + metrics["messages_in_flight"], metrics


def iot_collector() -> str:
    """Return the path of the installed console script."""
    return binary("iot-collector", str(Path(sys.executable).parent))


def clean_environment() -> dict[str, str]:
    """The environment without the settings of whoever runs the tests."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("IOT_", "PG"))}


def run_command(
    *arguments: str, timeout: float = 60, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run ``iot-collector`` with settings and return what it said and its status."""
    return subprocess.run(
        [iot_collector(), *arguments],
        env=clean_environment() | settings,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


class Collector(Service):
    """``iot-collector run`` as a process."""

    name = "collector"

    def __init__(self, folder: Path, *parts: Mosquitto | Database, **settings: str) -> None:
        super().__init__(folder)
        self.settings = {
            "IOT_HTTP_PORT": str(free_port()),
            "IOT_MQTT_CLIENT_ID": "collector",
            "IOT_MQTT_TOPICS": "#",
            "IOT_LOG_FORMAT": "json",
            "IOT_LOG_LEVEL": "debug",
        }
        for part in parts:
            self.settings |= part.environment()
        self.settings |= settings

    def command(self) -> Sequence[str]:
        return [iot_collector(), "run"]

    def options(self) -> dict[str, Any]:
        return {"env": clean_environment() | self.settings}

    def ready(self) -> bool:
        return self.status("/readyz") == 200

    def get(self, path: str) -> Answer:
        """Ask its HTTP server."""
        url = f"http://{HOST}:{self.settings['IOT_HTTP_PORT']}{path}"
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE) as response:
                return Answer(response.status, response.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.read())

    def status(self, path: str) -> int:
        """The HTTP status of a path; 0 when nothing listens yet."""
        try:
            return self.get(path).status
        except (urllib.error.URLError, ConnectionError):
            return 0

    def wait_listening(self) -> Self:
        """Wait until its HTTP server answers, whatever it says."""

        def answers() -> int:
            assert self.running, f"the collector ended:\n{self.log()}"
            return self.status("/livez")

        eventually(answers, what="the collector listens")
        return self

    def wait_ready(self) -> Self:
        """Wait until it is ready."""
        eventually(self.ready, what="the collector is ready")
        return self

    def health(self) -> Any:
        return self.get("/health").json()

    def metrics(self) -> Metrics:
        """The metrics by name, or name{label="value"} where there are labels."""
        found: Metrics = {}
        for family in text_string_to_metric_families(self.get("/metrics").body.decode()):
            for sample in family.samples:
                labels = ",".join(f'{k}="{v}"' for k, v in sample.labels.items())
                found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
        return found

    def wait_settled(self, received: int, timeout: float = PATIENCE) -> Metrics:
        """Wait until it has received so many messages and settled each; return the metrics."""

        def settled() -> Metrics | None:
            metrics = self.metrics()
            law(metrics)
            done = metrics["mqtt_messages_total"] >= received and not metrics["messages_in_flight"]
            return metrics if done else None

        return eventually(
            settled, timeout, f"{received} messages are settled\n{self.log()[-2000:]}"
        )

    def events(self) -> list[dict[str, Any]]:
        """Its log, a dict a line."""
        return [json.loads(line) for line in self.log().splitlines()]
