"""The collector's settings: environment variables with the prefix ``IOT_``.

Every wrong value stops the start with the variable's name, its fault and an example. Passwords
come from a file (``IOT_…_PASSWORD_FILE``) or the variable itself; a file is read again at every
connection attempt, so a rotated password needs no restart.
"""

import difflib
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote, urlsplit

import psycopg2.extensions
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PREFIX = "IOT_"

# Scheme of IOT_MQTT_URL -> (transport, TLS, default port). Ports: IANA's registrations for MQTT;
# WebSocket listeners use HTTP's.
SCHEMES: Mapping[str, tuple[Literal["tcp", "websockets"], bool, int]] = {
    "mqtt": ("tcp", False, 1883),
    "mqtts": ("tcp", True, 8883),
    "ws": ("websockets", False, 80),
    "wss": ("websockets", True, 443),
}


_QUOTING = "in user name and password, / ? # [ ] @ are written as %2F %3F %23 %5B %5D %40"


class SettingsError(Exception):
    """A setting stops the start. The text has a line for each fault: name, fault, example."""


def _valid_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        _ = parts.port  # is checked only when it is asked for
    except ValueError:
        # urllib quotes what it could not read, and that may be a part of the password.
        raise ValueError(f"host or port cannot be read; {_QUOTING}") from None
    if parts.scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {parts.scheme!r}; known are {', '.join(SCHEMES)}")
    if not parts.hostname:
        raise ValueError("it names no host")
    if parts.query or parts.fragment or "@" in parts.path:
        raise ValueError(f"there is more after the path; {_QUOTING}")
    return url


def _valid_filter(topic_filter: str) -> str:
    """Check a topic filter as MQTT 5 §4.7 and §4.8.2 define it."""
    if topic_filter.startswith("$share/"):
        _, _, group_and_filter = topic_filter.partition("/")
        group, _, topic_filter_part = group_and_filter.partition("/")
        if not group or not topic_filter_part or any(c in group for c in "+#"):
            raise ValueError(f"{topic_filter!r} is not of the form $share/<group>/<filter>")
    levels = topic_filter.split("/")
    for i, level in enumerate(levels):
        if "#" in level and (level != "#" or i != len(levels) - 1):
            raise ValueError(f"in {topic_filter!r}, # must stand alone and last")
        if "+" in level and level != "+":
            raise ValueError(f"in {topic_filter!r}, + must stand alone between slashes")
    if not topic_filter or "\0" in topic_filter or len(topic_filter.encode()) > 65535:
        raise ValueError("a topic filter has 1 to 65535 bytes and no NUL")
    return topic_filter


def _valid_conninfo(conninfo: str) -> str:
    if conninfo:
        try:
            psycopg2.extensions.parse_dsn(conninfo)
        except psycopg2.ProgrammingError:
            # libpq quotes the text it could not read, and the text may hold a password.
            raise ValueError("libpq cannot read it as a URI or key=value string") from None
    return conninfo


def _readable(path: Path) -> Path:
    try:
        with path.open("rb"):
            return path
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


ReadableFile = Annotated[Path, AfterValidator(_readable)]


@dataclass(frozen=True, kw_only=True)
class Broker:
    """Where the broker is."""

    transport: Literal["tcp", "websockets"]
    tls: bool
    host: str
    port: int
    path: str
    username: str | None

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def _setting(default: object, example: object, description: str, **limits: Any) -> Any:
    return Field(default, examples=[example], description=description, **limits)


class Settings(BaseSettings):
    """What the collector is told. `iot-collector run --help` prints the table."""

    # An empty variable is how shells, Compose files and charts say "not set".
    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True
    )

    # fmt: off
    mqtt_url: Annotated[str, AfterValidator(_valid_url)] = _setting(
        "mqtt://127.0.0.1:1883", "mqtts://broker.example:8883",
        "Broker: mqtt://, mqtts://, ws:// or wss://", repr=False,
    )
    mqtt_username: str | None = _setting(None, "collector", "User name for the broker")
    mqtt_password: SecretStr | None = _setting(
        None, "(better: IOT_MQTT_PASSWORD_FILE)", "Its password"
    )
    mqtt_password_file: ReadableFile | None = _setting(
        None, "/run/secrets/mqtt_password", "File with its password, read at every connection"
    )
    mqtt_ca_file: ReadableFile | None = _setting(
        None, "/etc/ssl/certs/broker-ca.pem", "Certificates to trust in place of the system's"
    )
    mqtt_cert_file: ReadableFile | None = _setting(
        None, "/run/secrets/client.crt", "Client certificate"
    )
    mqtt_key_file: ReadableFile | None = _setting(
        None, "/run/secrets/client.key", "Key of the client certificate"
    )
    mqtt_topics: Annotated[
        list[Annotated[str, AfterValidator(_valid_filter)]], NoDecode, BeforeValidator(_split)
    ] = _setting(
        ["iot/data"], "iot/data,plant/+/telemetry",
        "Topic filters to store, separated by commas; $share/<group>/<filter> shares one between "
        "collectors", min_length=1,
    )
    # 0 is not offered, because it loses messages.
    mqtt_qos: int = _setting(
        1, 1, "Highest quality of service to ask for; at 1 the broker sends what was published at "
        "2 with a round trip less", ge=1, le=2,
    )
    mqtt_client_id: str = _setting(
        f"iot-collector-{socket.gethostname()}", "iot-collector-0",
        "Name of the session with the broker; one collector each", min_length=1,
    )
    mqtt_version: Literal["5", "3.1.1"] = _setting("5", "5", "Version of the protocol")
    mqtt_keepalive_seconds: int = _setting(
        30, 30, "Longest silence on the connection", ge=5, le=65535
    )
    # Far below 65 535, so that packet ids are not reused while they still mean something.
    mqtt_max_inflight: int = _setting(
        10_000, 10_000, "Most un-acknowledged messages the broker may send", ge=1, le=20_000
    )
    mqtt_session_expiry_seconds: int = _setting(
        7 * 86400, 7 * 86400, "How long the broker queues while no collector is there",
        ge=60, le=0xFFFFFFFF,
    )

    packet_ledger: bool = _setting(
        True, "true", "Whether the broker sends again under the same packet id (MQTT 5 §4.4; AWS "
        "IoT Core does not): then what it sends again is stored once",
    )
    message_id_key: str | None = _setting(
        None, "message_id", "JSON key or MQTT 5 user property with which devices name each "
        "message: each name is stored once", min_length=1,
    )
    session_on_stop: Literal["keep", "leave"] = _setting(
        "keep", "keep", "At the end, keep the session, so that the broker queues for the next "
        "start, or leave it, so that other members of a shared subscription get what would wait",
    )

    database_url: Annotated[str, AfterValidator(_valid_conninfo)] = _setting(
        "", "postgresql://collector@db.example:5432/iot?sslmode=verify-full",
        "PostgreSQL, as libpq's URI or key=value string; empty: libpq's own variables (PGHOST, "
        "PGSERVICE, PGPASSFILE, …)", repr=False,
    )
    database_password: SecretStr | None = _setting(
        None, "(better: IOT_DATABASE_PASSWORD_FILE)", "Password for the database"
    )
    database_password_file: ReadableFile | None = _setting(
        None, "/run/secrets/database_password", "File with it, read at every connection"
    )

    batch_linger_ms: float = _setting(
        5, 5, "After a read that brought little, how long the next one waits for more",
        ge=0, le=1_000,
    )
    batch_rows: int = _setting(
        5_000, 5_000, "About the most rows of a transaction; half of IOT_MQTT_MAX_INFLIGHT if less",
        ge=1, le=100_000,
    )
    batch_bytes: int = _setting(
        8 << 20, 8 << 20, "About the most bytes of a transaction", ge=1 << 10, le=256 << 20
    )
    buffer_bytes: int = _setting(
        64 << 20, 64 << 20,
        "Memory for what is not stored yet; beyond it nothing is read from the broker", ge=1 << 20,
    )

    http_host: str = _setting("127.0.0.1", "0.0.0.0", "Where to serve HTTP")  # noqa: S104
    http_port: int = _setting(3000, 3000, "Its port", ge=1, le=65535)
    unhealthy_after_seconds: float = _setting(
        30, 30, "/health is 503 when a message has waited this long for its COMMIT", gt=0
    )
    drain_seconds: float = _setting(
        20, 20, "After SIGTERM, how long to try to store what has been received", ge=0
    )

    log_format: Literal["json", "console"] = _setting("console", "json", "json or console")
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", "info", "debug, info, warning or error"
    )
    # fmt: on

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("mqtt", "database"):
            if getattr(self, f"{name}_password") and getattr(self, f"{name}_password_file"):
                raise ValueError(f"{name}_password: set it or {name}_password_file, not both")
        has_password = self.mqtt_password or self.mqtt_password_file
        if has_password and not (self.mqtt_username or urlsplit(self.mqtt_url).username):
            raise ValueError("mqtt_username: a password is set and no user name; set both")
        if bool(self.mqtt_cert_file) != bool(self.mqtt_key_file):
            raise ValueError("mqtt_cert_file: a client certificate needs mqtt_key_file too")
        if self.mqtt_ca_file and not self.broker.tls:
            raise ValueError("mqtt_ca_file: is for mqtts:// or wss://, and mqtt_url is neither")
        return self

    @property
    def broker(self) -> Broker:
        """Where the broker is, and who we are to it."""
        url = urlsplit(self.mqtt_url)
        transport, tls, default_port = SCHEMES[url.scheme]
        return Broker(
            transport=transport,
            tls=tls,
            host=url.hostname or "",
            port=url.port or default_port,
            path=url.path or "/mqtt",
            username=self.mqtt_username or (unquote(url.username) if url.username else None),
        )

    @property
    def mqtt_secret(self) -> str | None:
        """The broker password, read anew at each call."""
        in_url = urlsplit(self.mqtt_url).password
        return _secret(self.mqtt_password, self.mqtt_password_file) or (in_url and unquote(in_url))

    @property
    def database_secret(self) -> str | None:
        """The database password, read anew at each call; None leaves it to libpq."""
        return _secret(self.database_password, self.database_password_file)


def _secret(value: SecretStr | None, path: Path | None) -> str | None:
    if path is not None:
        # Editors and `echo` end files with a newline; no one means it as part of the password.
        return path.read_text().rstrip("\r\n")
    return value.get_secret_value() if value else None


def table() -> list[tuple[str, str, str]]:
    """Return (variable, default, description) of every setting."""
    rows = []
    for name, info in Settings.model_fields.items():
        default = info.default
        text = ",".join(default) if isinstance(default, list) else str(default)
        if name == "mqtt_client_id":
            text = "iot-collector-<host name>"
        rows.append(
            (PREFIX + name.upper(), "" if default is None else text, info.description or "")
        )
    return rows


def load() -> Settings:
    """Read the settings from the environment.

    :raises SettingsError: a value is wrong, or a variable with our prefix is unknown.
    """
    faults = []
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for name in sorted(name for name in os.environ if name.startswith(PREFIX)):
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            faults.append(f"{name}: there is no such setting{hint}")
    try:
        settings = Settings()
    except ValidationError as error:
        faults += [_explain(fault) for fault in error.errors()]
    if faults:
        raise SettingsError("\n".join(faults))
    return settings


def _explain(fault: Any) -> str:
    message = fault["msg"].removeprefix("Value error, ")
    if not fault["loc"]:  # from _consistent, which names the setting itself
        name, _, message = message.partition(": ")
        for other in Settings.model_fields:
            message = re.sub(rf"\b{other}\b", f"{PREFIX}{other.upper()}", message)
        return f"{PREFIX}{name.upper()}: {message}"
    name = str(fault["loc"][0])
    example = Settings.model_fields[name].examples
    return f"{PREFIX}{name.upper()}: {message}; for example {example[0] if example else ''}"
