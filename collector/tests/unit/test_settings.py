"""Settings: each error names the variable, the problem and an example."""

import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from iot_collector.settings import Settings, SettingsError, load


def load_errors(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str]) -> list[str]:
    """Load these settings; return the lines of the error."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load()
    return str(caught.value).splitlines()


def test_default_values() -> None:
    found = load()
    assert str(found.broker) == "127.0.0.1:1883"
    assert (found.broker.tls, found.broker.transport) == (False, "tcp")
    assert found.mqtt_topics == ["iot/data"]
    assert found.mqtt_client_id == f"iot-collector-{socket.gethostname()}"
    assert found.mqtt_qos == 1
    assert found.mqtt_secret is None
    assert found.database_secret is None
    assert found.database_url == ""


QUEUE = "arn:aws:sqs:eu-west-1:111122223333:iot-system-replay"
# For each setting: the text of its environment variable and its value, which is not the default.
NOT_DEFAULT = {
    "IOT_MQTT_URL": ("wss://broker.example:9443/iot", "wss://broker.example:9443/iot"),
    "IOT_MQTT_USERNAME": ("me", "me"),
    "IOT_MQTT_TOPICS": ("a/+/b , $share/g/c/#,é", ["a/+/b", "$share/g/c/#", "é"]),
    "IOT_MQTT_QOS": ("2", 2),
    "IOT_MQTT_CLIENT_ID": ("c-0", "c-0"),
    "IOT_MQTT_VERSION": ("3.1.1", "3.1.1"),
    "IOT_MQTT_KEEPALIVE_SECONDS": ("60", 60),
    "IOT_MQTT_MAX_INFLIGHT": ("100", 100),
    "IOT_MQTT_SESSION_EXPIRY_SECONDS": ("3600", 3600),
    "IOT_PACKET_LEDGER": ("false", False),
    "IOT_MESSAGE_ID_KEY": ("id", "id"),
    "IOT_SESSION_ON_STOP": ("leave", "leave"),
    "IOT_CBOR_TOPICS": ("a/cbor,b/#", ["a/cbor", "b/#"]),
    "IOT_MESSAGEPACK_TOPICS": ("a/+", ["a/+"]),
    "IOT_TOPIC_TEMPLATES": (
        "a.b/{x}/+/#",
        [("a.b/{x}/+/#", r"^a\.b/([^/]*)/[^/]*(?:/.*)?$", ["x"])],
    ),
    "IOT_DEVICE_TIME_KEYS": (
        "t:s, [0].a b.c[1]:us",
        [(["t"], "s"), (["0", "a b", "c", "1"], "us")],
    ),
    "IOT_DATABASE_URL": ("host=db dbname=iot", "host=db dbname=iot"),
    "IOT_DATABASE_TIMEOUT_SECONDS": ("60", 60.0),
    "IOT_BATCH_LINGER_MS": ("2.5", 2.5),
    "IOT_BUFFER_BYTES": ("2000000", 2_000_000),
    "IOT_HTTP_HOST": ("0.0.0.0", "0.0.0.0"),
    "IOT_HTTP_PORT": ("3100", 3100),
    "IOT_LIVE_PAGE": ("metrics", "metrics"),
    "IOT_LIVE_PAGE_HOSTS": ("iot.example, iot", ["iot.example", "iot"]),
    "IOT_LIVE_PAGE_DATABASE_URL": ("host=db user=reader", "host=db user=reader"),
    "IOT_UNHEALTHY_AFTER_SECONDS": ("5", 5.0),
    "IOT_BROKER_METRICS": ("true", True),
    "IOT_DRAIN_SECONDS": ("0", 0.0),
    "IOT_LOG_FORMAT": ("json", "json"),
    "IOT_LOG_LEVEL": ("debug", "debug"),
    "IOT_REPLAY_QUEUE": (QUEUE, QUEUE),
    "IOT_ARCHIVE_TARGET": ("s3://bucket/iot", "s3://bucket/iot"),
    "IOT_ARCHIVE_KEEP_MONTHS": ("24", 24),
    "IOT_SUMMARY_SECONDS": ("30", 30.0),
}


@pytest.mark.parametrize("name", NOT_DEFAULT)
def test_each_setting_is_read_from_its_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, expected = NOT_DEFAULT[name]
    monkeypatch.setenv(name, text)
    assert getattr(load(), name.removeprefix("IOT_").lower()) == expected


def test_the_table_has_every_setting() -> None:
    files = {f"IOT_MQTT_{what}_FILE" for what in ("CA", "CERT", "KEY")}
    secrets = {
        f"IOT_{w}_PASSWORD{f}"
        for w in ("MQTT", "DATABASE", "LIVE_PAGE_DATABASE")
        for f in ("", "_FILE")
    }
    secrets.add("IOT_DATABASE_PASSWORD_SECRET")
    fields = {f"IOT_{name.upper()}" for name in Settings.model_fields}
    assert fields - files - secrets == set(NOT_DEFAULT)


@pytest.mark.parametrize(("qos", "expected"), [("1", 1), ("2", 2)])
def test_qos_1_and_2_are_accepted(qos: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOT_MQTT_QOS", qos)
    assert load().mqtt_qos == expected


# Variable, wrong value, part of the error.
WRONG = [
    ("IOT_MQTT_URL", "broker.example", "scheme"),
    ("IOT_MQTT_URL", "http://broker.example", "mqtt, mqtts, ws, wss"),
    ("IOT_MQTT_URL", "mqtt://", "host"),
    ("IOT_MQTT_URL", "mqtt://broker:port", "port cannot be read"),
    ("IOT_MQTT_URL", "mqtt://broker:70000", "port cannot be read"),
    ("IOT_MQTT_URL", "mqtt://[::1", "host or port cannot be read"),
    ("IOT_MQTT_URL", "mqtt://u:12/34@h", "%2F"),
    ("IOT_MQTT_PASSWORD_FILE", "/no/such/file", "/no/such/file cannot be read (No such file"),
    ("IOT_MQTT_CA_FILE", "/", "/ cannot be read (Is a directory"),
    ("IOT_MQTT_CERT_FILE", "/no/such/file", "cannot be read"),
    ("IOT_MQTT_KEY_FILE", "/no/such/file", "cannot be read"),
    ("IOT_DATABASE_PASSWORD_FILE", "/no/such/file", "cannot be read"),
    ("IOT_DATABASE_PASSWORD_SECRET", "arn:aws:s3:::bucket", "neither the ARN nor the name"),
    ("IOT_DATABASE_PASSWORD_SECRET", "two words", "neither the ARN nor the name"),
    ("IOT_REPLAY_QUEUE", "iot-system-replay", "not the ARN of an SQS standard queue"),
    ("IOT_CBOR_TOPICS", "a/b+", "not a topic filter"),
    ("IOT_TOPIC_TEMPLATES", "plant/device", "has no named level"),
    ("IOT_TOPIC_TEMPLATES", "plant/{site}/dev-{device}", "'dev-{device}' is not a valid topic"),
    ("IOT_TOPIC_TEMPLATES", "plant/{1st}", "is not a valid topic level"),
    ("IOT_TOPIC_TEMPLATES", "{a}/#/{b}", "'#' is not a valid topic level"),
    ("IOT_TOPIC_TEMPLATES", "{a}/{b}/{a}", "has two levels named a"),
    ("IOT_TOPIC_TEMPLATES", "plant/{site},", "'' has no named level"),
    ("IOT_DEVICE_TIME_KEYS", "time", "not of the form key:unit"),
    ("IOT_DEVICE_TIME_KEYS", "time:minutes", "iso8601, s, ms or us"),
    ("IOT_DEVICE_TIME_KEYS", "a..b:s", "not of the form key:unit"),
    ("IOT_DEVICE_TIME_KEYS", "a[x]:s", "not of the form key:unit"),
    ("IOT_DEVICE_TIME_KEYS", ":s", "not of the form key:unit"),
    ("IOT_MQTT_TOPICS", "a,,b", "1 to 65535 bytes"),
    ("IOT_MQTT_TOPICS", "a/#/b", "# must be the whole last level"),
    ("IOT_MQTT_TOPICS", "a#", "# must be the whole last level"),
    ("IOT_MQTT_TOPICS", "a/b+", "+ must be a whole level"),
    ("IOT_MQTT_TOPICS", "$share/group", "$share/<group>/<filter>"),
    ("IOT_MQTT_TOPICS", "$share//a", "$share/<group>/<filter>"),
    ("IOT_MQTT_TOPICS", "$share/g+/a", "$share/<group>/<filter>"),
    ("IOT_MQTT_TOPICS", "a" * 65_536, "1 to 65535 bytes"),
    ("IOT_MQTT_QOS", "0", "greater than or equal to 1"),
    ("IOT_MQTT_QOS", "3", "less than or equal to 2"),
    ("IOT_MQTT_VERSION", "4", "'5' or '3.1.1'"),
    ("IOT_MQTT_KEEPALIVE_SECONDS", "0", "greater than or equal to 5"),
    ("IOT_MQTT_MAX_INFLIGHT", "0", "greater than or equal to 1"),
    ("IOT_MQTT_MAX_INFLIGHT", "65535", "less than or equal to 20000"),
    ("IOT_MQTT_MAX_INFLIGHT", "many", "integer"),
    ("IOT_MQTT_SESSION_EXPIRY_SECONDS", "1", "greater than or equal to 60"),
    ("IOT_PACKET_LEDGER", "perhaps", "boolean"),
    ("IOT_SESSION_ON_STOP", "drop", "'keep', 'leave' or 'ordinal'"),
    ("IOT_DATABASE_URL", "postgresql://[", "URI"),
    ("IOT_DATABASE_URL", "nonsense", "URI"),
    ("IOT_DATABASE_URL", "postgresql://h/db?no_such_option=1", "URI"),
    ("IOT_BATCH_LINGER_MS", "-1", "greater than or equal to 0"),
    ("IOT_BATCH_LINGER_MS", "nan", "less than or equal to"),
    ("IOT_BUFFER_BYTES", "64MB", "integer"),
    ("IOT_HTTP_PORT", "0", "greater than or equal to 1"),
    ("IOT_HTTP_PORT", "65536", "less than or equal to 65535"),
    ("IOT_UNHEALTHY_AFTER_SECONDS", "0", "greater than 0"),
    ("IOT_DRAIN_SECONDS", "-1", "greater than or equal to 0"),
    ("IOT_LIVE_PAGE", "yes", "'off', 'metrics' or 'full'"),
    ("IOT_LIVE_PAGE_DATABASE_URL", "nonsense", "URI"),
    ("IOT_LIVE_PAGE_DATABASE_PASSWORD_FILE", "/no/such/file", "cannot be read"),
    ("IOT_LOG_FORMAT", "xml", "'json' or 'console'"),
    ("IOT_LOG_LEVEL", "loud", "'debug', 'info', 'warning' or 'error'"),
]


@pytest.mark.parametrize(
    ("name", "value", "fault"), WRONG, ids=[f"{name}={value[:20]}" for name, value, _ in WRONG]
)
def test_wrong_value_is_named_with_an_example(
    name: str, value: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = load_errors(monkeypatch, {name: value})
    assert line.startswith(f"{name}: ")
    assert fault in line
    example = line.partition("; for example ")[2]
    assert example, line


@pytest.mark.parametrize("name", sorted({name for name, _, _ in WRONG}))
def test_every_example_is_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (example, *_) = Settings.model_fields[name.removeprefix("IOT_").lower()].examples or []
    if name.endswith("_FILE"):
        assert str(example).startswith("/")
        return
    monkeypatch.setenv(name, str(example))
    load()


def test_all_wrong_settings_are_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {name: value for name, value, _ in WRONG} | {"IOT_BATCHROWS": "5"}
    lines = load_errors(monkeypatch, wrong)
    assert {line.partition(":")[0] for line in lines} == set(wrong)


def test_each_wrong_topic_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = load_errors(monkeypatch, {"IOT_MQTT_TOPICS": "a#,good,b+"})
    assert len(lines) == 2
    assert "'a#'" in lines[0]
    assert "'b+'" in lines[1]


@pytest.mark.parametrize(
    ("topics", "narrow", "wide"),
    [
        ("iot/#,iot/data", "iot/data", "iot/#"),
        ("a,a/#", "a", "a/#"),
        ("a/+,$share/g/a/b", "$share/g/a/b", "a/+"),
        ("a,$share/g/a", "a", "$share/g/a"),
        ("+/#,a/+", "a/+", "+/#"),
        ("a/+/#,a/b/#", "a/b/#", "a/+/#"),
    ],
)
def test_filter_that_another_one_includes_is_refused(
    topics: str, narrow: str, wide: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With MQTT 5, Mosquitto sends a message once for each filter that matches it."""
    (line,) = load_errors(monkeypatch, {"IOT_MQTT_TOPICS": topics})
    assert line.startswith(f"IOT_MQTT_TOPICS: {wide!r} matches all topics of {narrow!r}")
    assert line.endswith(f"remove {narrow!r}")
    monkeypatch.setenv("IOT_MQTT_VERSION", "3.1.1")  # there, it sends each message once
    load()


@pytest.mark.parametrize(
    "topics", ["a,a", "a/+,+/b", "a/#,b/#", "a/+,a/+/b", "a/+,a/b/c/#", "#,$SYS/#", "a/b,a/+/c"]
)
def test_filters_that_do_not_include_another_are_accepted(
    topics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOT_MQTT_TOPICS", topics)
    assert load().mqtt_topics == topics.split(",")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("IOT_MQTT_TOPIC", "IOT_MQTT_TOPICS"),
        ("IOT_MQTT_PASSWORDFILE", "IOT_MQTT_PASSWORD_FILE"),
        ("IOT_HTTPPORT", "IOT_HTTP_PORT"),
    ],
)
def test_unknown_setting_suggests_a_similar_one(
    name: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = load_errors(monkeypatch, {name: "x"})
    assert line == f"{name}: there is no such setting; did you mean {meant}?"


def test_unknown_setting_without_a_similar_one(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = load_errors(monkeypatch, {"IOT_XYZZY": "x"})
    assert line == "IOT_XYZZY: there is no such setting"


def test_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = load()
    for name in NOT_DEFAULT:
        monkeypatch.setenv(name, "")
    for kind in ("MQTT", "DATABASE"):
        monkeypatch.setenv(f"IOT_{kind}_PASSWORD", "")
        monkeypatch.setenv(f"IOT_{kind}_PASSWORD_FILE", "")
    assert load() == defaults


@pytest.mark.parametrize("kind", ["MQTT", "DATABASE"])
def test_secret_file_is_read_at_each_access(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "password"
    file.write_text("old\n")
    monkeypatch.setenv(f"IOT_{kind}_PASSWORD_FILE", str(file))
    monkeypatch.setenv("IOT_MQTT_USERNAME", "me")
    found = load()
    assert getattr(found, f"{kind.lower()}_secret") == "old"
    file.write_text("  né w \r\n")
    assert getattr(found, f"{kind.lower()}_secret") == "  né w "


@pytest.mark.parametrize("kind", ["MQTT", "DATABASE"])
def test_secret_file_that_is_not_utf8_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "password"
    file.write_bytes(b"secret\xff")
    monkeypatch.setenv(f"IOT_{kind}_PASSWORD_FILE", str(file))
    monkeypatch.setenv("IOT_MQTT_USERNAME", "me")
    with pytest.raises(OSError, match="is not UTF-8 text") as caught:
        getattr(load(), f"{kind.lower()}_secret")
    assert str(caught.value) == f"{file} is not UTF-8 text"


@pytest.mark.parametrize("kind", ["MQTT", "DATABASE"])
def test_password_and_password_file_exclude_each_other(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "password"
    file.write_text("one")
    (line,) = load_errors(
        monkeypatch,
        {
            "IOT_MQTT_USERNAME": "me",
            f"IOT_{kind}_PASSWORD": "two",
            f"IOT_{kind}_PASSWORD_FILE": str(file),
        },
    )
    assert line == f"IOT_{kind}_PASSWORD: set it or IOT_{kind}_PASSWORD_FILE, not both"


def test_password_without_user_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = load_errors(monkeypatch, {"IOT_MQTT_PASSWORD": "two"})
    assert line.startswith("IOT_MQTT_USERNAME: ")


@pytest.mark.parametrize(
    ("on_stop", "client_id", "leave"),
    [
        ("keep", "collector", False),
        ("leave", "collector-0", True),
        ("ordinal", "collector-0", False),
        ("ordinal", "collector-1", True),
        ("ordinal", "collector-10", True),
    ],
)
def test_leave_on_stop_depends_on_the_ordinal(
    on_stop: str, client_id: str, leave: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOT_SESSION_ON_STOP", on_stop)
    monkeypatch.setenv("IOT_MQTT_CLIENT_ID", client_id)
    assert load().leave_on_stop is leave


@pytest.mark.parametrize("client_id", ["collector", "collector-a", "collector-", "collector-00"])
def test_client_id_without_ordinal_is_refused(
    client_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"IOT_SESSION_ON_STOP": "ordinal", "IOT_MQTT_CLIENT_ID": client_id}
    (line,) = load_errors(monkeypatch, variables)
    assert line.startswith(f"IOT_MQTT_CLIENT_ID: {client_id!r} ")
    assert "IOT_SESSION_ON_STOP=ordinal" in line
    assert line.endswith("for example collector-0")


@pytest.mark.parametrize("which", ["CERT", "KEY"])
def test_client_certificate_without_key_is_refused(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    variables = {"IOT_MQTT_URL": "mqtts://b", f"IOT_MQTT_{which}_FILE": str(file)}
    (line,) = load_errors(monkeypatch, variables)
    assert "IOT_MQTT_CERT_FILE" in line
    assert "IOT_MQTT_KEY_FILE" in line


def test_ca_file_without_tls_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    (line,) = load_errors(
        monkeypatch, {"IOT_MQTT_URL": "mqtt://broker", "IOT_MQTT_CA_FILE": str(file)}
    )
    assert line.startswith("IOT_MQTT_CA_FILE: ")
    assert "IOT_MQTT_URL" in line


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("mqtt://h", ("tcp", False, "h", 1883, None)),
        ("mqtts://h", ("tcp", True, "h", 8883, None)),
        ("ws://h", ("websockets", False, "h", 80, None)),
        ("wss://h", ("websockets", True, "h", 443, None)),
        ("mqtt://[::1]:1884", ("tcp", False, "::1", 1884, None)),
        ("mqtt://us%40er:pw@h", ("tcp", False, "h", 1883, "us@er")),
    ],
)
def test_broker_url_is_parsed(
    url: str, expected: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOT_MQTT_URL", url)
    broker = load().broker
    assert (broker.transport, broker.tls, broker.host, broker.port, broker.username) == expected


_passwords = st.text(
    st.characters(exclude_categories=["Cs", "Cc"]), min_size=6, max_size=20
).filter(lambda text: text == text.strip() and not text.isascii())


@given(_passwords)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_settings_do_not_show_passwords(password: str) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("IOT_MQTT_URL", f"mqtt://user:{quote(password, safe='')}@host")
        monkeypatch.setenv("IOT_DATABASE_URL", f"postgresql://u:{quote(password, safe='')}@h/db")
        monkeypatch.setenv("IOT_DATABASE_PASSWORD", password)
        found = load()
        assert found.mqtt_secret == password
        assert found.database_secret == password
        monkeypatch.setenv("IOT_MQTT_PASSWORD", password)
        again = load()
        assert again.mqtt_secret == password
        for shown in (repr(again), str(again), str(again.broker), repr(again.broker)):
            assert password not in shown
            assert quote(password, safe="") not in shown


# Passwords with characters that should be quoted in a URL.
@pytest.mark.parametrize(
    "password",
    ["hunter2#x", "hunter2/x", "hunter2?x", "hun[ter2]", "hunter2[", "hunter2\u2100", "a:hunter2#"],
)
@pytest.mark.parametrize("where", ["mqtt://user:{}@host", "mqtt://{}@host", "user:{}@host"])
def test_errors_do_not_show_passwords(
    password: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOT_MQTT_URL", where.format(password))
    monkeypatch.setenv("IOT_DATABASE_URL", f"postgresql://user:{password}%@[host/db")
    monkeypatch.setenv("IOT_HTTP_PORT", "wrong")  # a second error, for a message of several lines
    with pytest.raises(SettingsError) as caught:
        load()
    shown = f"{caught.value}{caught.value!r}{caught.value.__cause__}"
    assert "hun" not in shown
    assert "ter2" not in shown
