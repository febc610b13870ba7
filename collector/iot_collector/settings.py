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


class Settings(BaseSettings):
    """What the collector is told; see README.md for the table of variables."""

    # An empty variable is how shells, Compose files and charts say "not set".
    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True
    )

    mqtt_url: Annotated[str, AfterValidator(_valid_url)] = Field(
        "mqtt://127.0.0.1:1883", repr=False, examples=["mqtts://broker.example:8883"]
    )
    mqtt_username: str | None = Field(None, examples=["collector"])
    mqtt_password: SecretStr | None = Field(None, examples=["(better: IOT_MQTT_PASSWORD_FILE)"])
    mqtt_password_file: ReadableFile | None = Field(None, examples=["/run/secrets/mqtt_password"])
    mqtt_ca_file: ReadableFile | None = Field(None, examples=["/etc/ssl/certs/broker-ca.pem"])
    mqtt_cert_file: ReadableFile | None = Field(None, examples=["/run/secrets/client.crt"])
    mqtt_key_file: ReadableFile | None = Field(None, examples=["/run/secrets/client.key"])
    mqtt_topics: Annotated[
        list[Annotated[str, AfterValidator(_valid_filter)]],
        NoDecode,
        BeforeValidator(_split),
        Field(min_length=1),
    ] = Field(["iot/data"], examples=["iot/data,plant/+/telemetry"])
    # The highest quality of service to ask for. At 1 the broker sends what was published at 2 as
    # well, with a round trip less; 0 is not offered, because it loses messages.
    mqtt_qos: int = Field(1, ge=1, le=2, examples=[1])
    mqtt_client_id: str = Field(
        default_factory=lambda: f"iot-collector-{socket.gethostname()}",
        min_length=1,
        examples=["iot-collector-0"],
    )
    mqtt_version: Literal["5", "3.1.1"] = Field("5", examples=["5"])
    mqtt_keepalive_seconds: int = Field(30, ge=5, le=65535, examples=[30])
    # The most un-acknowledged messages the broker may send. Far below 65 535, so that packet
    # ids are not reused while they still mean something.
    mqtt_max_inflight: int = Field(10_000, ge=1, le=20_000, examples=[10_000])
    # How long the broker keeps the session, and what it queues, while no collector is there.
    mqtt_session_expiry_seconds: int = Field(7 * 86400, ge=60, le=0xFFFFFFFF, examples=[7 * 86400])

    # Whether the broker sends again under the same packet id (MQTT 5 §4.4; AWS IoT Core does not).
    # If so, what is sent again is stored once.
    packet_ledger: bool = Field(True, examples=["true"])
    # A JSON key or MQTT 5 user property with which devices name each message: stored once.
    message_id_key: str | None = Field(None, min_length=1, examples=["message_id"])

    # At the end of the process: keep the session, so that the broker queues for the next start, or
    # leave it, so that the other members of a shared subscription get what would wait for us.
    session_on_stop: Literal["keep", "leave"] = Field("keep", examples=["keep"])

    # Empty: libpq's own variables (PGHOST, PGSERVICE, PGPASSFILE, …).
    database_url: Annotated[str, AfterValidator(_valid_conninfo)] = Field(
        "", repr=False, examples=["postgresql://collector@db.example:5432/iot?sslmode=verify-full"]
    )
    database_password: SecretStr | None = Field(
        None, examples=["(better: IOT_DATABASE_PASSWORD_FILE)"]
    )
    database_password_file: ReadableFile | None = Field(
        None, examples=["/run/secrets/database_password"]
    )

    # After a read that brought little, the next one waits so long, for more to come with it.
    batch_linger_ms: float = Field(5, ge=0, le=10_000, examples=[5])
    # A batch, a transaction, has about so many rows or bytes at most, and half the window.
    batch_rows: int = Field(5_000, ge=1, le=100_000, examples=[5_000])
    batch_bytes: int = Field(8 << 20, ge=1 << 10, le=256 << 20, examples=[8 << 20])
    # Beyond this the collector stops reading from the broker until rows are stored.
    buffer_bytes: int = Field(64 << 20, ge=1 << 20, examples=[64 << 20])

    http_host: str = Field("127.0.0.1", examples=["0.0.0.0"])  # noqa: S104
    http_port: int = Field(3000, ge=1, le=65535, examples=[3000])
    # /health turns to 503 when a message has waited this long for its COMMIT.
    unhealthy_after_seconds: float = Field(30, gt=0, examples=[30])
    # After SIGTERM, how long to go on trying to store what has been received.
    drain_seconds: float = Field(20, ge=0, examples=[20])

    log_format: Literal["json", "console"] = Field("console", examples=["json"])
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", examples=["info"])

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
