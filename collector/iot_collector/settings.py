"""The collector's settings: environment variables with the prefix ``IOT_``.

With a wrong value, the collector does not start; the error has the variable's name, the fault and
an example. A password comes from a file (``IOT_…_PASSWORD_FILE``) or from the variable itself. The
file is read at every attempt to connect, so a rotated password needs no restart. The database
password may also come from AWS Secrets Manager, see password_secret.py.
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
from paho.mqtt.client import topic_matches_sub
from pydantic import AfterValidator, BeforeValidator, SecretStr
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from . import iot_core
from .readings import DeviceTimeKey, TopicTemplate

PREFIX = "IOT_"

Transport = Literal["tcp", "websockets"]

# Scheme of IOT_MQTT_URL -> (transport, TLS, default port). The ports are those that IANA registers
# for MQTT, and for WebSocket those of HTTP and HTTPS.
SCHEMES: dict[str, tuple[Transport, bool, int]] = {
    "mqtt": ("tcp", False, 1883),
    "mqtts": ("tcp", True, 8883),
    "ws": ("websockets", False, 80),
    "wss": ("websockets", True, 443),
    iot_core.SCHEME: ("websockets", True, 443),
}
_QUOTING = "in user name and password, write / ? # [ ] @ as %2F %3F %23 %5B %5D %40"

# MQTT 5 §4.7.1, §4.8.2: an optional $share/<group>/, then levels, of which the last may be #.
_FILTER = re.compile(r"(\$share/[^/+#]+/(?=.)|(?!\$share(/|$)))(([^/+#\0]*|\+)/)*([^/+#\0]*|\+|#)")
# Names and ARNs that AWS allows (API references of Secrets Manager and SQS).
_SECRET = re.compile(
    r"(arn:aws[a-z-]*:secretsmanager:[a-z0-9-]+:\d{12}:secret:)?[A-Za-z0-9/_+=.@!-]{1,512}"
)
_QUEUE = re.compile(r"arn:aws[a-z-]*:sqs:[a-z0-9-]+:\d{12}:[A-Za-z0-9_-]{1,80}")
_ORDINAL = re.compile(r"(.*-)(0|[1-9][0-9]*)")  # pod name in a StatefulSet


class SettingsError(Exception):
    """Some settings are wrong. The text has a line for each: name, fault, example."""


def _valid_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        _ = parts.port  # urllib checks it only on access
    except ValueError:
        # The text of urllib's error may contain a part of the password.
        raise ValueError(f"host or port cannot be read; {_QUOTING}") from None
    if parts.scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {parts.scheme!r}; use one of {', '.join(SCHEMES)}")
    if not parts.hostname:
        raise ValueError("the host is missing")
    if parts.query or parts.fragment or "@" in parts.path:
        raise ValueError(f"nothing may follow the path; {_QUOTING}")
    return url


def valid_filter(topic_filter: str) -> str:
    """Return a topic filter unchanged.

    :raises ValueError: it is not a valid topic filter.
    """
    if not 0 < len(topic_filter.encode()) <= 65535 or not _FILTER.fullmatch(topic_filter):
        raise ValueError(
            f"{topic_filter[:80]!r} is not a topic filter: it has 1 to 65535 bytes and no NUL; + "
            "must be a whole level, # must be the whole last level; a shared subscription has the "
            "form $share/<group>/<filter>"
        )
    return topic_filter


def _covered(topic_filters: list[str]) -> tuple[str, str] | None:
    """Return a filter and another one that matches all its topics; None if there are none."""
    plain = [(f, re.sub(r"^\$share/[^/]+/", "", f)) for f in topic_filters]
    for narrow, narrow_plain in plain:
        # The levels + and # stand for themselves here, and # for more than one level.
        topic = narrow_plain.replace("#", "#/#")
        for wide, wide_plain in plain:
            if wide != narrow and topic_matches_sub(wide_plain, topic):
                return narrow, wide
    return None


def _valid_conninfo(conninfo: str) -> str:
    try:
        psycopg2.extensions.parse_dsn(conninfo)
    except psycopg2.ProgrammingError:
        # The text of libpq's error may contain a password.
        raise ValueError("it is not a connection URI or key=value string of libpq") from None
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
    """Return an archive target, without slashes at its end.

    :raises ValueError: it is neither an absolute path, nor an S3 URL, nor ``none``.
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

    # Compose files and Helm charts set a variable to the empty string to leave it unset.
    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True)

    # fmt: off
    mqtt_url: Annotated[str, AfterValidator(_valid_url)] = _setting(
        "mqtt://127.0.0.1:1883", "Broker: mqtt://, mqtts://, ws://, wss://, or awsiot:// for AWS "
        "IoT Core with AWS credentials", repr=False)
    mqtt_username: str | None = _setting(None, "User name for the broker", "collector")
    mqtt_password: Secret = _setting(
        None, "Password for the broker", "(better: IOT_MQTT_PASSWORD_FILE)")
    mqtt_password_file: File = _setting(
        None, "File with the password for the broker, read at every connection",
        "/run/secrets/mqtt_password")
    mqtt_ca_file: File = _setting(
        None, "CA certificates to trust instead of the system's", "/etc/ssl/certs/broker-ca.pem")
    mqtt_cert_file: File = _setting(None, "Client certificate", "/run/secrets/client.crt")
    mqtt_key_file: File = _setting(
        None, "Private key of the client certificate", "/run/secrets/client.key")
    mqtt_topics: Topics = _setting(
        ["iot/data"], "Topic filters to subscribe to, separated by commas; with "
        "$share/<group>/<filter>, several collectors share the messages. With MQTT 5, a message "
        "whose topic matches two filters is sent twice and stored twice",
        "iot/data,plant/+/telemetry", min_length=1)
    # Not 0, because QoS 0 loses messages.
    mqtt_qos: int = _setting(
        1, "Maximum QoS of the subscriptions; with 1, a message published with QoS 2 needs one "
        "round trip less", ge=1, le=2)
    mqtt_client_id: str = _setting(
        f"iot-collector-{socket.gethostname()}", "Client id, which names the session at the "
        "broker; each collector needs its own", "iot-collector-0", min_length=1)
    mqtt_version: Literal["5", "3.1.1"] = _setting("5", "MQTT version: 5 or 3.1.1")
    mqtt_keepalive_seconds: int = _setting(
        30, "Keep alive interval of the connection", ge=5, le=65535)
    # Far below 65 535, so that no packet id is reused while the ledger still needs it.
    mqtt_max_inflight: int = _setting(
        10_000, "Most un-acknowledged messages that the broker may send (MQTT 5: Receive Maximum; "
        "default with AWS IoT Core: 100)", ge=1, le=20_000)
    mqtt_session_expiry_seconds: int = _setting(
        7 * 86400, "How long the broker keeps the session and queues messages while the collector "
        "is disconnected; with MQTT 3.1.1 the broker decides: set its value here. Message ids are "
        "kept one day longer, and at least 8 days. 4294967295: session and message ids never "
        "expire. Default with AWS IoT Core: 3600", ge=60, le=0xFFFFFFFF)
    broker_metrics: bool = _setting(
        False, "Export metrics of the broker, from the topics that Mosquitto publishes below "
        "$SYS/broker/; uses a second connection, whose client id ends in -metrics; needs "
        "permission to read $SYS/#")

    packet_ledger: bool = _setting(
        True, "Store a message only once when the broker sends it again; needs a broker that uses "
        "the same packet id again (MQTT 5 §4.4). AWS IoT Core does not; the default there is false")
    message_id_key: str | None = _setting(
        None, "JSON key or MQTT 5 user property with the id that devices give each message; "
        "messages with the same id are stored once", "message_id", min_length=1)
    session_on_stop: Literal["keep", "leave", "ordinal"] = _setting(
        "keep", "The session when the collector stops. keep: the broker queues messages until the "
        "next start. leave: unsubscribe, so that other members of a shared subscription get its "
        "messages. ordinal, for a StatefulSet: keep if the client id ends in -0, else leave")

    cbor_topics: Topics = _setting(
        [], "Topic filters whose payloads are CBOR, separated by commas; not needed for messages "
        "with the MQTT 5 content type application/cbor or one that ends in +cbor", "plant/+/cbor")
    messagepack_topics: Topics = _setting(
        [], "Topic filters whose payloads are MessagePack, separated by commas; not needed for "
        "messages with the MQTT 5 content type application/msgpack", "plant/+/msgpack")
    topic_templates: TopicTemplates = _setting(
        [], "Templates that name topic levels, separated by commas; the view readings has the "
        "named levels in its column levels. + and # mean the same as in topic filters. The first "
        "template that matches a topic is used", "plant/{site}/{device}/{channel},+/{device}/#")
    device_time_keys: DeviceTimeKeys = _setting(
        [], "Keys of the payload with the device's time, each with its unit (iso8601, s, ms or "
        "us), separated by commas; the view readings has the time in its column device_time. The "
        "first key with a time from 2000 to 2099 is used", "time:iso8601,data.ts:ms")

    database_url: Annotated[str, AfterValidator(_valid_conninfo)] = _setting(
        "", "PostgreSQL, as a connection URI or key=value string of libpq; empty: from libpq's "
        "environment variables (PGHOST, PGSERVICE, PGPASSFILE, …)",
        "postgresql://collector@db.example:5432/iot", repr=False)
    database_password: Secret = _setting(
        None, "Password for the database", "(better: IOT_DATABASE_PASSWORD_FILE)")
    database_password_file: File = _setting(
        None, "File with the password for the database, read at every connection",
        "/run/secrets/database_password")
    database_password_secret: Annotated[str, AfterValidator(_valid_secret)] | None = _setting(
        None, "ARN or name of the secret in AWS Secrets Manager with the password for the database "
        "(plain text, or JSON with the key password), read again when the database refuses the "
        "password", "arn:aws:secretsmanager:eu-west-1:111122223333:secret:iot-collector-AbCdEf")

    database_timeout_seconds: float = _setting(
        300, "Longest time that a SQL statement may take; after that it is canceled and retried",
        ge=1, le=86400)

    batch_linger_ms: float = _setting(
        10, "Longest wait for more messages to store with one COMMIT; shrinks to a fifth while "
        "fewer than 50 messages arrive in that time", ge=0, le=1_000)
    buffer_bytes: int = _setting(
        64 << 20, "Memory for messages that are not stored yet; when it is full, the collector "
        "stops reading and the broker has to wait", ge=1 << 20)

    summary_seconds: float = _setting(
        10, "Interval between updates of the summaries (latest, topics, readings_by_minute, "
        "readings_by_hour); 0: no updates", ge=0, le=3600)

    replay_queue: Annotated[str, AfterValidator(_valid_queue)] | None = _setting(
        None, "ARN of the SQS queue to which an AWS IoT rule copies every message, for "
        "`iot-collector replay`; with it, message ids are kept at least 15 days",
        "arn:aws:sqs:eu-west-1:111122223333:iot-system-replay")
    archive_target: Target = _setting(
        None, "Where `iot-collector archive` writes old months before it drops them: a directory "
        "or s3://<bucket>/<prefix>; none: drop them without an archive",
        "/var/lib/iot-system/archive")
    archive_keep_months: int = _setting(
        12, "Number of whole months that stay in the database", ge=1, le=1200)

    http_host: str = _setting("127.0.0.1", "Address to serve HTTP on", "0.0.0.0")  # noqa: S104
    http_port: int = _setting(3000, "Port to serve HTTP on", ge=1, le=65535)
    live_page: Literal["off", "metrics", "full"] | None = _setting(
        None, "The live page at /. off: no page; metrics: counters only; full: topics and messages "
        "too, for everyone who can reach the port. Default: full if IOT_HTTP_HOST is a loopback "
        "address, else metrics", "full")
    live_page_hosts: Names = _setting(
        [], "Host names that browsers may use for the live page besides loopback names, separated "
        "by commas, for example the name of a reverse proxy. Empty: any name, or only loopback "
        "names if IOT_HTTP_HOST is a loopback address", "iot.example")
    live_page_database_url: Annotated[str, AfterValidator(_valid_conninfo)] = _setting(
        "", "Database for the full live page, with a role that can only read; empty: "
        "IOT_DATABASE_URL and its password, in read-only sessions",
        "postgresql://iot_reader@db.example:5432/iot", repr=False)
    live_page_database_password: Secret = _setting(
        None, "Password for IOT_LIVE_PAGE_DATABASE_URL",
        "(better: IOT_LIVE_PAGE_DATABASE_PASSWORD_FILE)")
    live_page_database_password_file: File = _setting(
        None, "File with the password for IOT_LIVE_PAGE_DATABASE_URL, read at every connection",
        "/run/secrets/reader_db_password")
    unhealthy_after_seconds: float = _setting(
        30, "/health is 503 when a message has waited longer than this for its COMMIT", gt=0)
    drain_seconds: float = _setting(
        20, "After SIGTERM, longest time to store the messages that were received", ge=0)

    log_format: Literal["json", "console"] = _setting(
        "console", "Format of the log: json or console")
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", "Lowest level to log: debug, info, warning or error")
    # fmt: on

    @pydantic.model_validator(mode="before")
    @classmethod
    def _defaults_of_iot_core(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Use the defaults for AWS IoT Core if that is the broker."""
        try:
            url = urlsplit(str(values.get("mqtt_url")))
            known = iot_core.is_iot_core(url.scheme, url.hostname or "")
        except ValueError:  # `_valid_url` reports it
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
            raise ValueError("IOT_MQTT_CA_FILE: needs TLS; set mqtts:// or wss:// in IOT_MQTT_URL")
        if self.mqtt_version == "5" and (covered := _covered(self.mqtt_topics)):
            narrow, wide = covered
            raise ValueError(
                f"IOT_MQTT_TOPICS: {wide!r} matches all topics of {narrow!r}, and the broker would "
                f"send their messages twice; remove {narrow!r}"
            )
        if self.session_on_stop == "ordinal" and not _ORDINAL.fullmatch(self.mqtt_client_id):
            raise ValueError(
                f"IOT_MQTT_CLIENT_ID: {self.mqtt_client_id!r} does not end in an ordinal, but "
                "IOT_SESSION_ON_STOP=ordinal needs one; for example collector-0"
            )
        faults = iot_core.faults(self) if self.iot_core else []
        if faults := faults + (self._faults_of_signing() if self.signed else []):
            raise ValueError("\n".join(faults))
        return self

    def _faults_of_signing(self) -> list[str]:
        found = []
        if self.broker.username or self.mqtt_cert_file or urlsplit(self.mqtt_url).path.strip("/"):
            found.append(
                "IOT_MQTT_URL: awsiot:// uses AWS credentials and allows no path, user name, "
                "password or client certificate; to use a certificate, set mqtts://<endpoint>"
            )
        if not self.aws_region:
            found.append(
                "IOT_MQTT_URL: the endpoint name does not contain the region, as "
                "abc-ats.iot.eu-west-1.amazonaws.com does; set AWS_REGION, for example eu-west-1"
            )
        if importlib.util.find_spec("botocore") is None:
            found.append("IOT_MQTT_URL: awsiot:// needs pip install 'iot-collector[aws]'")
        return found

    @property
    def iot_core(self) -> bool:
        """Whether the broker is AWS IoT Core, according to the URL."""
        return iot_core.is_iot_core(urlsplit(self.mqtt_url).scheme, self.broker.host)

    @property
    def signed(self) -> bool:
        """Whether to connect with AWS credentials."""
        return urlsplit(self.mqtt_url).scheme == iot_core.SCHEME

    @property
    def connect_interval(self) -> float:
        """Seconds that the broker requires between two attempts to connect."""
        return iot_core.CONNECT_INTERVAL if self.iot_core else 0.0

    @property
    def aws_region(self) -> str:
        """The AWS region of the broker; empty if it is unknown."""
        named = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""
        return iot_core.region_of(self.broker.host) or named

    @property
    def leave_on_stop(self) -> bool:
        """Whether to leave the session when the collector stops, instead of keeping it."""
        if self.session_on_stop == "ordinal":
            return not self.mqtt_client_id.endswith("-0")
        return self.session_on_stop == "leave"

    def pods_to_wait_for(self, client_ids: Iterable[str]) -> list[str]:
        """Return the pods that must change their subscriptions before this collector does.

        Pod 0 of a StatefulSet waits for the other pods, and the other pods wait for pod 0. Outside
        of a StatefulSet, no collector waits.

        :param client_ids: the client ids of other collectors; the result is a part of them.
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
        """The password for the broker; a password file is read at each call."""
        in_url = urlsplit(self.mqtt_url).password
        return _secret(self.mqtt_password, self.mqtt_password_file) or (in_url and unquote(in_url))

    @property
    def database_secret(self) -> str | None:
        """The password for the database; a password file is read at each call.

        None leaves the password to libpq. `database.connect` reads IOT_DATABASE_PASSWORD_SECRET.
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
        """IOT_LIVE_PAGE, or its default."""
        return self.live_page or ("full" if self.http_on_loopback else "metrics")

    @property
    def live_page_database_secret(self) -> str | None:
        """The password for IOT_LIVE_PAGE_DATABASE_URL; a password file is read at each call."""
        return _secret(self.live_page_database_password, self.live_page_database_password_file)


def _secret(value: SecretStr | None, path: Path | None) -> str | None:
    if path is not None:
        try:
            # Editors and `echo` add a newline, which is not part of the password.
            return path.read_text("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:  # the text of this error contains part of the password
            raise OSError(f"{path} is not UTF-8 text") from None
    return value.get_secret_value() if value else None


VARIABLES = {f"{PREFIX}{name.upper()}": field for name, field in Settings.model_fields.items()}


def load() -> Settings:
    """Read the settings from the environment.

    :raises SettingsError: a value is wrong, or a variable IOT_… is unknown.
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
