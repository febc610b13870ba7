"""The collector's settings: environment variables with the prefix ``IOT_``.

Every wrong value stops the start with the variable's name, the fault and an example. Passwords come
from a file (``IOT_…_PASSWORD_FILE``) or the variable itself; a file is read again at every attempt
to connect, so a rotated password needs no restart. The database's may also come from AWS Secrets
Manager, see password_secret.py.
"""

import difflib
import importlib.util
import os
import re
import socket
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self
from urllib.parse import unquote, urlsplit

import psycopg2.extensions
import pydantic
from pydantic import AfterValidator, BeforeValidator, SecretStr
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from . import iot_core
from .readings import DeviceTimeKey, TopicTemplate

PREFIX = "IOT_"

Transport = Literal["tcp", "websockets"]

# Scheme of IOT_MQTT_URL -> (transport, TLS, default port). Ports: IANA's registrations for MQTT;
# WebSocket listeners use HTTP's.
SCHEMES: dict[str, tuple[Transport, bool, int]] = {
    "mqtt": ("tcp", False, 1883),
    "mqtts": ("tcp", True, 8883),
    "ws": ("websockets", False, 80),
    "wss": ("websockets", True, 443),
    iot_core.SCHEME: ("websockets", True, 443),
}
_QUOTING = "in user name and password, / ? # [ ] @ are written as %2F %3F %23 %5B %5D %40"

# MQTT 5 §4.7.1, §4.8.2: levels, the last of which may be #, after $share/<group>/ or not.
_FILTER = re.compile(r"(\$share/[^/+#]+/(?=.)|(?!\$share(/|$)))(([^/+#\0]*|\+)/)*([^/+#\0]*|\+|#)")
# Names and ARNs as AWS allows them (API references of Secrets Manager and SQS).
_SECRET = re.compile(
    r"(arn:aws[a-z-]*:secretsmanager:[a-z0-9-]+:\d{12}:secret:)?[A-Za-z0-9/_+=.@!-]{1,512}"
)
_QUEUE = re.compile(r"arn:aws[a-z-]*:sqs:[a-z0-9-]+:\d{12}:[A-Za-z0-9_-]{1,80}")
_ORDINAL = re.compile(r"(.*-)(0|[1-9][0-9]*)")  # how a StatefulSet numbers its pods


class SettingsError(Exception):
    """A setting stops the start. The text has a line for each fault: name, fault, example."""


def _valid_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        _ = parts.port  # urllib checks it only on access
    except ValueError:
        # urllib's text quotes what it could not read, which may be a part of the password.
        raise ValueError(f"host or port cannot be read; {_QUOTING}") from None
    if parts.scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {parts.scheme!r}; known are {', '.join(SCHEMES)}")
    if not parts.hostname:
        raise ValueError("it names no host")
    if parts.query or parts.fragment or "@" in parts.path:
        raise ValueError(f"there is more after the path; {_QUOTING}")
    return url


def valid_filter(topic_filter: str) -> str:
    """Return a topic filter.

    :raises ValueError: it is none.
    """
    if not 0 < len(topic_filter.encode()) <= 65535 or not _FILTER.fullmatch(topic_filter):
        raise ValueError(
            f"{topic_filter[:80]!r} is no topic filter: 1 to 65535 bytes, no NUL; + must stand "
            "alone between slashes, # must stand alone and last; a shared one has the form "
            "$share/<group>/<filter>"
        )
    return topic_filter


def _valid_conninfo(conninfo: str) -> str:
    try:
        psycopg2.extensions.parse_dsn(conninfo)
    except psycopg2.ProgrammingError:
        # libpq's text quotes what it could not read, which may contain a password.
        raise ValueError("libpq cannot read it as a URI or key=value string") from None
    return conninfo


def _valid_secret(secret: str) -> str:
    if not _SECRET.fullmatch(secret):
        raise ValueError("it is neither the ARN nor the name of a secret in Secrets Manager")
    if importlib.util.find_spec("botocore") is None:
        raise ValueError("botocore is not installed; pip install 'iot-collector[aws]'")
    return secret


def _valid_queue(arn: str) -> str:
    if not _QUEUE.fullmatch(arn):
        raise ValueError("it is not the ARN of an SQS standard queue")
    return arn


def _readable(path: Path) -> Path:
    try:
        path.open("rb").close()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    return path


def valid_target(target: str) -> str:
    """Return where an archive may be.

    :raises ValueError: it is neither a directory's path, nor in S3, nor none.
    """
    if not (re.fullmatch(r"s3://[^/]+(/.*)?", target) or target == "none" or target[:1] == "/"):
        raise ValueError(
            f"{target!r} is neither an absolute path, nor s3://<bucket>/<prefix>, nor none"
        )
    return target.rstrip("/") or "/"


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Topic = Annotated[str, AfterValidator(valid_filter)]
Names = Annotated[list[str], NoDecode, BeforeValidator(_split)]
Topics = Annotated[list[Topic], NoDecode, BeforeValidator(_split)]
File = Annotated[Path, AfterValidator(_readable)] | None
Secret = SecretStr | None
Target = Annotated[str, AfterValidator(valid_target)] | None


TopicTemplates = Annotated[
    list[Annotated[TopicTemplate, BeforeValidator(TopicTemplate.parse)]],
    NoDecode,
    BeforeValidator(_split),
]
DeviceTimeKeys = Annotated[
    list[Annotated[DeviceTimeKey, BeforeValidator(DeviceTimeKey.parse)]],
    NoDecode,
    BeforeValidator(_split),
]


class Broker(NamedTuple):
    """The parts of IOT_MQTT_URL, and the user name."""

    transport: Transport
    tls: bool
    host: str
    port: int
    path: str
    username: str | None

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def _setting(default: object, description: str, example: object = None, **more: Any) -> Any:
    example = default if example is None else example
    return pydantic.Field(default, description=description, examples=[example], **more)


class Settings(BaseSettings):
    """All settings. `iot-collector run --help` prints them."""

    # Shells, Compose files and charts set a variable to the empty string to leave it unset.
    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True)

    # fmt: off
    mqtt_url: Annotated[str, AfterValidator(_valid_url)] = _setting(
        "mqtt://127.0.0.1:1883", "Broker: mqtt://, mqtts://, ws://, wss://, or awsiot:// for AWS "
        "IoT Core with AWS credentials", repr=False)
    mqtt_username: str | None = _setting(None, "User name for the broker", "collector")
    mqtt_password: Secret = _setting(None, "Its password", "(better: IOT_MQTT_PASSWORD_FILE)")
    mqtt_password_file: File = _setting(
        None, "File with its password, read at every connection", "/run/secrets/mqtt_password")
    mqtt_ca_file: File = _setting(
        None, "Certificates to trust in place of the system's", "/etc/ssl/certs/broker-ca.pem")
    mqtt_cert_file: File = _setting(None, "Client certificate", "/run/secrets/client.crt")
    mqtt_key_file: File = _setting(None, "Key of the client certificate", "/run/secrets/client.key")
    mqtt_topics: Topics = _setting(
        ["iot/data"], "Topic filters to store, separated by commas; collectors share the messages "
        "of $share/<group>/<filter>", "iot/data,plant/+/telemetry", min_length=1)
    # Not 0, which loses messages.
    mqtt_qos: int = _setting(
        1, "Highest quality of service to subscribe with; with 1, messages published with 2 take "
        "one round trip less", ge=1, le=2)
    mqtt_client_id: str = _setting(
        f"iot-collector-{socket.gethostname()}", "Name of the session with the broker; each "
        "collector needs its own", "iot-collector-0", min_length=1)
    mqtt_version: Literal["5", "3.1.1"] = _setting("5", "Version of the protocol")
    mqtt_keepalive_seconds: int = _setting(30, "Keepalive of the connection", ge=5, le=65535)
    # Far below 65 535, so that no packet id is reused while the ledger still needs it.
    mqtt_max_inflight: int = _setting(
        10_000, "Most un-acknowledged messages the broker may send (AWS IoT Core: 100)", ge=1,
        le=20_000)
    mqtt_session_expiry_seconds: int = _setting(
        7 * 86400, "How long the broker keeps the session and queues messages while the collector "
        "is away (with MQTT 3.1.1 the broker decides: set the same here); ids of messages are kept "
        "a day longer, at least 8 days; 4294967295: for ever, both (AWS IoT Core: 3600)", ge=60,
        le=0xFFFFFFFF)
    broker_metrics: bool = _setting(
        False, "Export metrics of the broker, as Mosquitto publishes them below $SYS/broker/, over "
        "a second connection with -metrics after the client id; needs the right to read $SYS/#")

    packet_ledger: bool = _setting(
        True, "Store a message once that the broker sends again; needs a broker that sends it with "
        "the same packet id (MQTT 5 §4.4; AWS IoT Core does not: there it is off)")
    message_id_key: str | None = _setting(
        None, "JSON key or MQTT 5 user property with an id that devices give each message; "
        "messages with the same id are stored once", "message_id", min_length=1)
    session_on_stop: Literal["keep", "leave", "ordinal"] = _setting(
        "keep", "When the collector stops, keep the session, so that the broker queues for the "
        "next start; leave it, so that other members of a shared subscription get its messages; "
        "or, in a StatefulSet, ordinal: keep it if the client id ends in -0, else leave it")

    cbor_topics: Topics = _setting(
        [], "Topic filters of devices that send CBOR, separated by commas; a message with the MQTT "
        "5 content type application/cbor or one that ends in +cbor needs none", "plant/+/cbor")
    messagepack_topics: Topics = _setting(
        [], "The same for MessagePack; content type application/msgpack", "plant/+/msgpack")
    topic_templates: TopicTemplates = _setting(
        [], "Names of topic levels, separated by commas: the view readings has them in levels. + "
        "and # are as in topic filters; the first template that matches a topic counts",
        "plant/{site}/{device}/{channel},+/{device}/#")
    device_time_keys: DeviceTimeKeys = _setting(
        [], "Where devices put the time of a reading, and its unit (iso8601, s, ms or us), "
        "separated by commas: the view readings has it in device_time. The first one with a time "
        "from 2000 to 2099 counts", "time:iso8601,data.ts:ms")

    database_url: Annotated[str, AfterValidator(_valid_conninfo)] = _setting(
        "", "PostgreSQL, as libpq's URI or key=value string; empty: libpq's own variables (PGHOST, "
        "PGSERVICE, PGPASSFILE, …)", "postgresql://collector@db.example:5432/iot", repr=False)
    database_password: Secret = _setting(
        None, "Password for the database", "(better: IOT_DATABASE_PASSWORD_FILE)")
    database_password_file: File = _setting(
        None, "File with it, read at every connection", "/run/secrets/database_password")
    database_password_secret: Annotated[str, AfterValidator(_valid_secret)] | None = _setting(
        None, "ARN or name of its secret in AWS Secrets Manager (plain text, or JSON with the key "
        "password), read again when the database refuses it",
        "arn:aws:secretsmanager:eu-west-1:111122223333:secret:iot-collector-AbCdEf")

    database_timeout_seconds: float = _setting(
        300, "Longest time that a statement may take; then it is cancelled and tried again",
        ge=1, le=86400)

    batch_linger_ms: float = _setting(
        10, "Longest wait for more messages to store with one COMMIT; a fifth of it while fewer "
        "than 50 messages come in that time", ge=0, le=1_000)
    buffer_bytes: int = _setting(
        64 << 20, "Memory for messages that are not stored yet; when it is full, the broker waits",
        ge=1 << 20)

    summary_seconds: float = _setting(
        10, "How often the summaries (latest, topics, readings_by_minute, readings_by_hour) are "
        "updated; 0: never", ge=0, le=3600)

    replay_queue: Annotated[str, AfterValidator(_valid_queue)] | None = _setting(
        None, "ARN of the SQS queue to which an AWS IoT rule copies every message, for "
        "`iot-collector replay`; ids of messages are then kept at least 15 days",
        "arn:aws:sqs:eu-west-1:111122223333:iot-system-replay")
    archive_target: Target = _setting(
        None, "Where `iot-collector archive` writes old months before it drops them: a directory, "
        "s3://<bucket>/<prefix>, or none to drop them without", "/var/lib/iot-system/archive")
    archive_keep_months: int = _setting(
        12, "How many whole months stay in the database", ge=1, le=1200)

    http_host: str = _setting("127.0.0.1", "Address to serve HTTP on", "0.0.0.0")  # noqa: S104
    http_port: int = _setting(3000, "Its port", ge=1, le=65535)
    live_page: Literal["off", "metrics", "full"] | None = _setting(
        None, "Page at /: off; metrics, which are counters only; full, which shows topics and "
        "messages to whoever reaches the port. Default: full if IOT_HTTP_HOST is a loopback "
        "address, else metrics", "full")
    live_page_hosts: Names = _setting(
        [], "Names under which browsers reach the page, besides those of loopback, separated by "
        "commas: those of a reverse proxy. Empty: any name, unless IOT_HTTP_HOST is a loopback "
        "address", "iot.example")
    live_page_database_url: Annotated[str, AfterValidator(_valid_conninfo)] = _setting(
        "", "Database of the full page, with a role that can only read; empty: IOT_DATABASE_URL "
        "with its password, in a session that is read-only",
        "postgresql://iot_reader@db.example:5432/iot", repr=False)
    live_page_database_password: Secret = _setting(
        None, "Password of that role", "(better: IOT_LIVE_PAGE_DATABASE_PASSWORD_FILE)")
    live_page_database_password_file: File = _setting(
        None, "File with it, read at every connection", "/run/secrets/reader_db_password")
    unhealthy_after_seconds: float = _setting(
        30, "/health is 503 when a message has waited longer than this for its COMMIT", gt=0)
    drain_seconds: float = _setting(
        20, "After SIGTERM, longest time to store what was received", ge=0)

    log_format: Literal["json", "console"] = _setting("console", "json or console")
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", "debug, info, warning or error")
    # fmt: on

    @pydantic.model_validator(mode="before")
    @classmethod
    def _defaults_of_iot_core(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Use the defaults that suit AWS IoT Core, where that is the broker."""
        try:
            url = urlsplit(str(values.get("mqtt_url")))
            known = iot_core.is_iot_core(url.scheme, url.hostname or "")
        except ValueError:  # which the URL's own check reports
            known = False
        return iot_core.DEFAULTS | values if known else values

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("mqtt_password", "database_password", "live_page_database_password"):
            if getattr(self, name) and getattr(self, f"{name}_file"):
                variable = PREFIX + name.upper()
                raise ValueError(f"{variable}: set it or {variable}_FILE, not both")
        ways = ("database_password", "database_password_file", "database_password_secret")
        if self.database_password_secret and sum(map(bool, (getattr(self, w) for w in ways))) > 1:
            names = ", ".join(PREFIX + way.upper() for way in ways)
            raise ValueError(f"IOT_DATABASE_PASSWORD_SECRET: set only one of {names}")
        if (self.mqtt_password or self.mqtt_password_file) and not self.broker.username:
            raise ValueError("IOT_MQTT_USERNAME: a password is set without a user name; set both")
        if bool(self.mqtt_cert_file) != bool(self.mqtt_key_file):
            raise ValueError("IOT_MQTT_CERT_FILE: a client certificate needs IOT_MQTT_KEY_FILE too")
        if self.mqtt_ca_file and not self.broker.tls:
            raise ValueError("IOT_MQTT_CA_FILE: is for mqtts:// and wss://, not this IOT_MQTT_URL")
        if self.session_on_stop == "ordinal" and not _ORDINAL.fullmatch(self.mqtt_client_id):
            raise ValueError(
                f"IOT_MQTT_CLIENT_ID: {self.mqtt_client_id!r} does not end in an ordinal, which "
                "IOT_SESSION_ON_STOP=ordinal needs; for example collector-0"
            )
        faults = iot_core.faults(self) if self.iot_core else []
        if faults := faults + (self._faults_of_signing() if self.signed else []):
            raise ValueError("\n".join(faults))
        return self

    def _faults_of_signing(self) -> list[str]:
        found = []
        if self.broker.username or self.mqtt_cert_file or urlsplit(self.mqtt_url).path.strip("/"):
            found.append(
                "IOT_MQTT_URL: with awsiot:// there is no path, user name, password or client "
                "certificate, but AWS credentials; to use a certificate, set mqtts://<endpoint>"
            )
        if not self.aws_region:
            found.append(
                "IOT_MQTT_URL: the endpoint's name has no region, as that of "
                "abc-ats.iot.eu-west-1.amazonaws.com; set AWS_REGION, for example eu-west-1"
            )
        if importlib.util.find_spec("botocore") is None:
            found.append("IOT_MQTT_URL: awsiot:// needs pip install 'iot-collector[aws]'")
        return found

    @property
    def iot_core(self) -> bool:
        """Whether the broker is AWS IoT Core, as far as the URL says."""
        return iot_core.is_iot_core(urlsplit(self.mqtt_url).scheme, self.broker.host)

    @property
    def signed(self) -> bool:
        """Whether to connect with AWS credentials."""
        return urlsplit(self.mqtt_url).scheme == iot_core.SCHEME

    @property
    def connect_interval(self) -> float:
        """Seconds that the broker wants between two attempts to connect."""
        return iot_core.CONNECT_INTERVAL if self.iot_core else 0.0

    @property
    def aws_region(self) -> str:
        """The broker's region; empty if nothing says it."""
        named = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""
        return iot_core.region_of(self.broker.host) or named

    @property
    def leave_on_stop(self) -> bool:
        """Whether to leave the broker's session when the collector stops, or to keep it."""
        if self.session_on_stop == "ordinal":
            return not self.mqtt_client_id.endswith("-0")
        return self.session_on_stop == "leave"

    def pods_to_wait_for(self, client_ids: Iterable[str]) -> list[str]:
        """Return which of these are pods that must change their subscriptions before we do.

        For pod 0 of a StatefulSet the other pods, for those pod 0; otherwise none.
        """
        me = _ORDINAL.fullmatch(self.mqtt_client_id)
        if me is None or self.session_on_stop != "ordinal":
            return []
        pods = [pod for pod in map(_ORDINAL.fullmatch, client_ids) if pod and pod[1] == me[1]]
        return [pod[0] for pod in pods if (pod[2] == "0") != (me[2] == "0")]

    @property
    def broker(self) -> Broker:
        """The parts of IOT_MQTT_URL, and the user name."""
        url = urlsplit(self.mqtt_url)
        transport, tls, port = SCHEMES[url.scheme]
        user = self.mqtt_username or unquote(url.username or "") or None
        path = url.path or "/mqtt"
        return Broker(transport, tls, url.hostname or "", url.port or port, path, user)

    @property
    def mqtt_secret(self) -> str | None:
        """The password for the broker; its file is read at each call."""
        in_url = urlsplit(self.mqtt_url).password
        return _secret(self.mqtt_password, self.mqtt_password_file) or (in_url and unquote(in_url))

    @property
    def database_secret(self) -> str | None:
        """The password for the database; its file is read at each call. None leaves it to libpq.

        Without what IOT_DATABASE_PASSWORD_SECRET names, which `database.connect` reads.
        """
        return _secret(self.database_password, self.database_password_file)

    @property
    def http_on_loopback(self) -> bool:
        """Whether HTTP is served on a loopback address."""
        if self.http_host == "localhost":
            return True
        try:
            return ip_address(self.http_host).is_loopback
        except ValueError:
            return False

    @property
    def live_page_mode(self) -> Literal["off", "metrics", "full"]:
        """What the page at / shows: IOT_LIVE_PAGE, or its default."""
        return self.live_page or ("full" if self.http_on_loopback else "metrics")

    @property
    def live_page_database_secret(self) -> str | None:
        """The password for IOT_LIVE_PAGE_DATABASE_URL; its file is read at each call."""
        return _secret(self.live_page_database_password, self.live_page_database_password_file)


def _secret(value: SecretStr | None, path: Path | None) -> str | None:
    if path is not None:
        try:
            # Editors and `echo` add a newline, which is not a part of the password.
            return path.read_text("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:  # its text contains a part of the password
            raise OSError(f"{path} is not UTF-8 text") from None
    return value.get_secret_value() if value else None


VARIABLES = {f"{PREFIX}{name.upper()}": field for name, field in Settings.model_fields.items()}


def load() -> Settings:
    """Read the settings from the environment.

    :raises SettingsError: a value is wrong, or there is an unknown variable IOT_….
    """
    faults = []
    for name in sorted(os.environ.keys() - VARIABLES.keys()):
        if name.startswith(PREFIX):
            close = difflib.get_close_matches(name, VARIABLES, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            faults.append(f"{name}: there is no such setting{hint}")
    try:
        settings = Settings()
    except pydantic.ValidationError as error:
        for fault in error.errors():
            text = fault["msg"].removeprefix("Value error, ")
            if fault["loc"]:  # otherwise it is from _consistent, which names the setting
                name = f"{PREFIX}{fault['loc'][0]}".upper()
                [example] = VARIABLES[name].examples or [None]
                text = f"{name}: {text}; for example {example}"
            faults.append(text)
    if faults:
        raise SettingsError("\n".join(faults))
    return settings
