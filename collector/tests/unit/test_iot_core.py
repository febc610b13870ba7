"""AWS IoT Core as the broker: signed connections and the limits of IoT Core (docs/iot-core.md).

The endpoint is a stand-in (testing/iot_core.py) with a real Mosquitto behind it.
"""

import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.parse import quote

import pytest
from iot_collector import aws, signing
from iot_collector.buffer import FLAGS_SHIFT
from iot_collector.connection import Connection
from iot_collector.iot_core import is_iot_core, region_of
from iot_collector.settings import Settings, SettingsError, load
from iot_collector.subscriptions import Subscriptions
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from structlog.testing import capture_logs

from testing.certificates import Certificates, make_certificates
from testing.collector import Collector, clean_environment, run_command
from testing.iot_core import NAME, RATE, REGION, Endpoint, Look, Packets
from testing.mosquitto import Mosquitto
from testing.postgres import Database
from testing.publisher import Stream, publish
from testing.service import HOST, eventually
from testing.sigv4 import RefusedError, Secret, check, signature

URL = f"awsiot://{NAME}"
NAMED_COLLECTOR = Path(__file__).parents[3] / "testing/named_collector.py"
KEY = "AKIDFORATEST"
# Like real credentials, these contain characters that have to be quoted in a URL.
SECRET = Secret("secret/for+a=test", "token/for+a=test//" + "x" * 800)
MakeCollector = Callable[..., Collector]
MakeBroker = Callable[..., Mosquitto]


@pytest.fixture(autouse=True)
def _only_test_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Hide the user's AWS credentials from the test and from the processes that it starts."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    aws.session.cache_clear()
    yield
    aws.session.cache_clear()


# The tests' own signature check --------------------------------------------------------------


def test_signature_equals_the_example_of_the_sigv4_test_suite() -> None:
    """get-vanilla of AWS's aws-sig-v4-test-suite."""
    headers = {"host": "example.amazonaws.com", "x-amz-date": "20150830T123600Z"}
    found = signature(
        "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
        "20150830/us-east-1/service/aws4_request",
        headers["x-amz-date"],
        "/",
        [],
        headers,
    )
    assert found == "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"


def test_signature_equals_the_example_of_a_presigned_url() -> None:
    """The example of https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html."""
    query = [
        ("X-Amz-Algorithm", "AWS4-HMAC-SHA256"),
        ("X-Amz-Credential", "AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request"),
        ("X-Amz-Date", "20130524T000000Z"),
        ("X-Amz-Expires", "86400"),
        ("X-Amz-SignedHeaders", "host"),
    ]
    found = signature(
        "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        "20130524/us-east-1/s3/aws4_request",
        "20130524T000000Z",
        "/test.txt",
        query,
        {"host": "examplebucket.s3.amazonaws.com"},
        "UNSIGNED-PAYLOAD",
    )
    assert found == "aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404"


# What is signed ------------------------------------------------------------------------------


def credentials(secret: Secret, key: str = KEY) -> dict[str, str]:
    """Environment variables with AWS credentials."""
    token = {"AWS_SESSION_TOKEN": secret.token} if secret.token else {}
    return {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret.key, **token}


def signed_target(monkeypatch: pytest.MonkeyPatch, secret: Secret) -> str:
    for name, value in credentials(secret).items():
        monkeypatch.setenv(name, value)
    return signing.signed_path(NAME, REGION)


def check_signature(
    target: str, secret: Secret = SECRET, host: str = NAME, hours: float = 0
) -> None:
    now = datetime.now(UTC) + timedelta(hours=hours)
    secrets = {KEY: secret}
    check(target, {"host": host}, host=NAME, region=REGION, secrets=secrets, now=now)


@pytest.mark.parametrize("secret", [SECRET, Secret("secret/for+a=test")])
def test_signed_path_is_valid(secret: Secret, monkeypatch: pytest.MonkeyPatch) -> None:
    check_signature(signed_target(monkeypatch, secret), secret)


def test_wrong_signed_paths_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """This tests the signature check of the tests."""
    target = signed_target(monkeypatch, SECRET)
    for wrong, reason in {
        "/mqtt": "not signed",
        target.replace(REGION, "eu-west-2"): "signed for",
        target.replace("iotdevicegateway", "iotdata"): "signed for",
        target.replace(KEY, "AKIDOTHER"): "unknown or expired",
        target.replace("//" + "x" * 800, ""): "wrong",
        target.replace("Expires=300", "Expires=301"): "wrong signature",
    }.items():
        if wrong == target:
            continue
        with pytest.raises(RefusedError, match=reason):
            check_signature(wrong)
    with pytest.raises(RefusedError, match="expired"):
        check_signature(target, hours=1)
    with pytest.raises(RefusedError, match="Host"):
        check_signature(target, host=f"{NAME}:443")
    with pytest.raises(RefusedError, match="unknown or expired"):
        check_signature(target, Secret(SECRET.key, "another token"))
    with pytest.raises(RefusedError, match="wrong signature"):
        check_signature(target, Secret("another", SECRET.token))


def test_token_is_not_signed(monkeypatch: pytest.MonkeyPatch) -> None:
    """IoT Core, unlike other services, wants the session token appended after signing."""
    from botocore.auth import SigV4QueryAuth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import ReadOnlyCredentials

    target = signed_target(monkeypatch, SECRET)
    assert target.endswith(f"&X-Amz-Security-Token={quote(SECRET.token or '', safe='')}")
    request = AWSRequest(method="GET", url=f"https://{NAME}/mqtt")
    keys = ReadOnlyCredentials(KEY, SECRET.key, SECRET.token)
    SigV4QueryAuth(keys, "iotdevicegateway", REGION).add_auth(request)
    with pytest.raises(RefusedError, match="wrong signature"):
        check_signature(request.url.removeprefix(f"https://{NAME}"))


# Settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "region"),
    [
        (NAME, "eu-west-1"),
        ("abc.iot.us-gov-west-1.amazonaws.com", "us-gov-west-1"),
        ("abc-ats.iot.cn-north-1.amazonaws.com.cn", "cn-north-1"),
        ("data.iot-fips.us-east-1.amazonaws.com", "us-east-1"),
        ("broker.example", None),
        ("iot.example.com", None),
        ("abc-ats.iot.eu-west-1.amazonaws.com.example", None),
        ("notiot.eu-west-1.amazonaws.com", None),
    ],
)
def test_region_is_read_from_the_endpoint(host: str, region: str | None) -> None:
    assert region_of(host) == region
    assert is_iot_core("mqtts", host) is (region is not None)
    assert is_iot_core("awsiot", host)


@pytest.mark.parametrize("url", [URL, f"mqtts://{NAME}"])
def test_defaults_follow_iot_core(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOT_MQTT_URL", url)
    found = load()
    assert found.mqtt_max_inflight == 100
    assert found.mqtt_session_expiry_seconds == 3600
    assert found.packet_ledger is False
    assert (found.mqtt_version, found.mqtt_qos) == ("5", 1)
    assert found.broker.port == (443 if url == URL else 8883)


def test_settings_override_the_defaults_for_iot_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOT_MQTT_URL", URL)
    monkeypatch.setenv("IOT_MQTT_MAX_INFLIGHT", "50")
    monkeypatch.setenv("IOT_MQTT_SESSION_EXPIRY_SECONDS", "604800")
    found = load()
    assert (found.mqtt_max_inflight, found.mqtt_session_expiry_seconds) == (50, 604800)


def test_other_brokers_keep_the_general_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOT_MQTT_URL", "wss://broker.example")
    found = load()
    assert found.mqtt_max_inflight == 10_000
    assert found.packet_ledger is True
    monkeypatch.setenv("IOT_MQTT_QOS", "2")
    assert load().mqtt_qos == 2


def load_errors(monkeypatch: pytest.MonkeyPatch, settings: Mapping[str, str]) -> list[str]:
    for name, value in {"IOT_MQTT_URL": URL, **settings}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load()
    return str(caught.value).splitlines()


SLASHES = "/".join("abcdefgh")  # seven of them


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("IOT_MQTT_QOS", "2", "set 1"),
        ("IOT_MQTT_MAX_INFLIGHT", "101", "set 100"),
        ("IOT_MQTT_KEEPALIVE_SECONDS", "29", "30 to 1200"),
        ("IOT_MQTT_KEEPALIVE_SECONDS", "1201", "30 to 1200"),
        ("IOT_MQTT_SESSION_EXPIRY_SECONDS", "604801", "604800"),
        ("IOT_PACKET_LEDGER", "true", "IOT_MESSAGE_ID_KEY"),
        ("IOT_BROKER_METRICS", "true", "docs/aws-metrics.md"),
        ("IOT_MQTT_CLIENT_ID", "x" * 129, "128 bytes"),
        ("IOT_MQTT_CLIENT_ID", "$x", "no $"),
        ("IOT_MQTT_TOPICS", ",".join(f"t/{n}" for n in range(51)), "51 filters"),
        ("IOT_MQTT_TOPICS", f"{SLASHES}/i", "7 slashes"),
        ("IOT_MQTT_TOPICS", f"$share/g/{SLASHES}/i", "7 slashes"),
        ("IOT_MQTT_TOPICS", "x" * 257, "256 bytes"),
        ("IOT_MQTT_TOPICS", f"$share/{'g' * 129}/x", "128 characters"),
        ("IOT_MQTT_URL", "awsiot://broker.example", "AWS_REGION"),
        ("IOT_MQTT_URL", f"{URL}/path", "no path"),
        ("IOT_MQTT_URL", f"awsiot://me:pw@{NAME}", "AWS credentials"),
        ("IOT_MQTT_USERNAME", "me", "AWS credentials"),
    ],
)
def test_setting_beyond_a_limit_is_refused(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = "IOT_MQTT_URL" if name == "IOT_MQTT_USERNAME" else name
    (line,) = load_errors(monkeypatch, {name: value})
    assert line.startswith(f"{variable}: ")
    assert message in line


def test_settings_at_the_limits_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    topics = [f"t/{n}" for n in range(47)]
    topics += [SLASHES, f"$share/{'g' * 128}/{SLASHES[::-1]}", "x" * 256]
    for name, value in {
        "IOT_MQTT_URL": URL,
        "IOT_MQTT_KEEPALIVE_SECONDS": "1200",
        "IOT_MQTT_CLIENT_ID": "x" * 128,
        "IOT_MQTT_TOPICS": ",".join(topics),
    }.items():
        monkeypatch.setenv(name, value)
    assert len(load().mqtt_topics) == 50


def test_each_wrong_setting_has_its_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = load_errors(monkeypatch, {"IOT_MQTT_QOS": "2", "IOT_MQTT_KEEPALIVE_SECONDS": "5"})
    assert [line.split(":")[0] for line in lines] == ["IOT_MQTT_QOS", "IOT_MQTT_KEEPALIVE_SECONDS"]


def test_custom_domain_takes_its_region_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("IOT_MQTT_URL", "awsiot://broker.example")
    monkeypatch.setenv("AWS_REGION", "eu-west-2")
    found = load()
    assert (found.aws_region, found.iot_core, found.mqtt_max_inflight) == ("eu-west-2", True, 100)


def test_missing_botocore_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (line,) = load_errors(monkeypatch, {})
    assert "iot-collector[aws]" in line


# Subscriptions -------------------------------------------------------------------------------


class Client:
    """A client that records SUBSCRIBE and UNSUBSCRIBE."""

    max_qos = 2
    message_count = 0

    def __init__(self) -> None:
        self.subscribes: list[list[tuple[str, int]]] = []
        self.unsubscribed: list[list[str]] = []

    def subscribe(self, filters: Sequence[tuple[str, Any]]) -> tuple[int, int]:
        self.subscribes.append([(name, options.QoS) for name, options in filters])
        return 0, len(self.subscribes)

    def unsubscribe(self, filters: list[str]) -> tuple[int, int]:
        self.unsubscribed.append(filters)
        return 0, 1000 + len(self.unsubscribed)


GRANTED = ReasonCode(PacketTypes.SUBACK, "Granted QoS 1")
REFUSED = ReasonCode(PacketTypes.SUBACK, "Not authorized")


def subscribed(topics: list[str], stale: Sequence[str] = ()) -> tuple[Subscriptions, Client]:
    """Subscriptions whose SUBSCRIBEs are sent, and have no SUBACK yet."""
    subs, client = Subscriptions(Settings(mqtt_url=URL, mqtt_topics=topics)), Client()
    subs.start(client, Mock(), session_present=bool(stale))  # type: ignore[arg-type]
    subs.handle_claim(Mock(held=list(stale), stale=list(stale), waiting_for=[]))
    return subs, client


def test_subscribe_has_at_most_eight_filters() -> None:
    topics = [f"t/{n}" for n in range(17)]
    subs, client = subscribed(topics)
    assert [len(filters) for filters in client.subscribes] == [8, 8, 1]
    assert [name for filters in client.subscribes for name, _ in filters] == topics
    for mid in (2, 3):  # in any order
        subs.handle_suback(mid, [GRANTED] * len(client.subscribes[mid - 1]))
        assert not subs.active, "one SUBACK is missing"
    subs.handle_suback(1, [REFUSED, *[GRANTED] * 7])
    assert list(subs.refused) == ["t/0"]
    assert not subs.active


def test_unsubscribe_has_at_most_eight_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    """IoT Core does not answer an UNSUBSCRIBE with nine (aws-iot-device-sdk-js, issue 361)."""
    topics, stale = [f"t/{n}" for n in range(5)], [f"old/{n}" for n in range(9)]
    subs, client = subscribed(topics, stale)
    subs.handle_suback(1, [GRANTED] * 5)
    later = time.monotonic() + 31
    monkeypatch.setattr(time, "monotonic", lambda: later)
    subs.check_due()
    subs._stale = stale  # as if leaving began before the UNSUBACKs
    subs.unsubscribe_all()
    assert client.unsubscribed == [
        *(stale[:8], stale[8:]),
        *(sorted(stale + topics)[:8], sorted(stale + topics)[8:]),
    ]
    for first, second in ((1002, 1001), (1003, 1004)):
        count = len(subs.events)
        subs.handle_unsuback(first)
        assert len(subs.events) == count, "one UNSUBACK is missing"
        subs.handle_unsuback(second)
        assert len(subs.events) == count + 1


def test_refused_filter_is_subscribed_to_again() -> None:
    subs, client = subscribed([f"t/{n}" for n in range(10)])
    subs.handle_suback(1, [REFUSED, *[GRANTED] * 7])
    subs.handle_suback(2, [GRANTED] * 2)
    assert list(subs.refused) == ["t/0"], "a later SUBACK does not clear it"
    subs._due_at = 0.0
    subs.check_due()
    assert client.subscribes[2:] == [[("t/0", 1)]]
    subs.handle_suback(3, [GRANTED])
    assert subs.active
    assert not subs.refused


def test_replaced_filter_stays_for_30_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """With IoT Core, a new subscription may take effect some time after its SUBACK."""
    subs, client = subscribed(["$share/g/iot/data"], stale=["iot/data"])
    assert client.subscribes == [[("$share/g/iot/data", 1)]], "the old filter keeps its QoS"
    subs.handle_suback(1, [GRANTED])
    subs.check_due()
    assert subs.active
    assert not client.unsubscribed
    assert not subs.replacing, "no message is dropped as a copy"
    later = time.monotonic() + 31
    monkeypatch.setattr(time, "monotonic", lambda: later)
    subs.check_due()
    assert client.unsubscribed == [["iot/data"]]
    assert not subs.replacing
    subs.handle_unsuback(1001)
    (note,) = [note for note in subs.events if hasattr(note, "filters")]
    assert note.filters == ["$share/g/iot/data"]


def test_shorter_session_expiry_of_connack_is_logged() -> None:
    """IoT Core grants at most the quota of the account."""
    connection = Connection(Settings(mqtt_url=URL, mqtt_session_expiry_seconds=7200))
    properties = Properties(PacketTypes.CONNACK)
    properties.SessionExpiryInterval = 3600
    accepted = ReasonCode(PacketTypes.CONNACK, "Success")
    with capture_logs() as logs:
        connection._on_connect(Mock(session_present=False), accepted, properties)
        connection._on_connect(Mock(session_present=False), accepted, None)
    (warning,) = logs
    assert "IOT_MQTT_SESSION_EXPIRY_SECONDS" in warning["event"]
    assert (warning["asked"], warning["granted"]) == (7200, 3600)


# The signed WebSocket ------------------------------------------------------------------------


class RedirectedCollector(Collector):
    """A collector that connects to a local port when it connects to the endpoint's name."""

    endpoint_port = 0

    def command(self) -> Sequence[str]:
        return [sys.executable, str(NAMED_COLLECTOR), NAME, str(self.endpoint_port), "run"]


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return make_certificates(tmp_path, NAME)


@pytest.fixture
def mosquitto(make_broker: MakeBroker) -> Mosquitto:
    """The broker behind the endpoint, with a WebSocket listener. Devices publish here."""
    return make_broker(scheme="ws", listener=["protocol websockets"]).start()


@pytest.fixture
def endpoint(mosquitto: Mosquitto, certificates: Certificates) -> Iterator[Endpoint]:
    with Endpoint(mosquitto._collector_port, certificates) as endpoint:
        endpoint.secrets[KEY] = SECRET
        yield endpoint


@pytest.fixture
def make_redirected(
    tmp_path: Path, certificates: Certificates, database: Database
) -> Iterator[Callable[..., RedirectedCollector]]:
    """Make collectors that connect to a port instead of the endpoint. They are not started."""
    made: list[RedirectedCollector] = []

    def make(port: int, url: str = URL, **settings: str) -> RedirectedCollector:
        folder = tmp_path / f"named-{len(made)}"
        folder.mkdir()
        made.append(
            RedirectedCollector(
                folder,
                database,
                IOT_MQTT_URL=url,
                IOT_MQTT_CA_FILE=str(certificates.ca),
                IOT_MQTT_TOPICS="iot/data",
                **settings,
            )
        )
        made[-1].endpoint_port = port
        return made[-1]

    yield make
    for collector in made:
        collector.close()


MakeRedirected = Callable[..., RedirectedCollector]


def numbered(count: int) -> list[tuple[str, bytes]]:
    return [("iot/data", b'{"id": "m%d", "n": %d}' % (n, n)) for n in range(count)]


def wait_not_ready(collector: Collector, *words: str) -> str:
    """Wait until /readyz fails with a reason that has all these words; return the answer."""

    def reason() -> str:
        answer = collector.get("/readyz")
        text = answer.body.decode()
        return text if answer.status == 503 and all(word in text for word in words) else ""

    return eventually(reason, what=f"/readyz says {words}")


def test_messages_are_stored_over_the_signed_websocket(
    endpoint: Endpoint, mosquitto: Mosquitto, make_redirected: MakeRedirected, database: Database
) -> None:
    # With a port other than 443, paho would add the port to the Host header.
    collector = make_redirected(endpoint.port, f"{URL}:8443", **credentials(SECRET)).start()
    messages = [*numbered(1000), ("iot/data", b"x" * 131_072)]
    publish(mosquitto, messages)
    collector.wait_settled(len(messages))
    assert database.payloads() == [payload for _, payload in messages]
    health = collector.get("/health").body.decode()
    assert collector.stop() == 0
    assert endpoint.names == {NAME}, "SNI"
    assert (endpoint.refusals, endpoint.violations) == ([], [])
    assert endpoint.most_in_flight <= 100
    assert_no_credentials(collector.log() + health)


def assert_no_credentials(text: str) -> None:
    for part in (KEY, SECRET.key, (SECRET.token or "")[:18], "X-Amz-"):
        assert part not in text
        assert quote(part, safe="") not in text


def test_stand_in_refuses_wrong_requests_as_iot_core_does(
    endpoint: Endpoint, certificates: Certificates
) -> None:
    context = ssl.create_default_context(cafile=certificates.ca)

    def status(target: str, host: str = NAME) -> bytes:
        with (
            socket.create_connection((HOST, endpoint.port)) as plain,
            context.wrap_socket(plain, server_hostname=NAME) as sock,
        ):
            sock.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            return sock.recv(100).split(b"\r\n")[0]

    assert status("/mqtt") == b"HTTP/1.1 403 Forbidden"
    assert endpoint.refusals == ["not signed"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        target = signed_target(monkeypatch, SECRET)
    assert status(target, f"{NAME}:443") == b"HTTP/1.1 403 Forbidden"
    endpoint.secrets.clear()
    assert status(target) == b"HTTP/1.1 403 Forbidden"
    assert endpoint.refusals[1:] == [f"Host is {NAME}:443", "unknown or expired credentials"]


def test_refused_signature_is_explained_and_retried(
    endpoint: Endpoint, make_redirected: MakeRedirected, tmp_path: Path
) -> None:
    """The message names clock, credentials and region. New credentials need no restart."""
    file = tmp_path / "aws-credentials"

    def write(secret: Secret) -> None:
        new = file.with_suffix(".new")
        names = {
            "aws_access_key_id": KEY,
            "aws_secret_access_key": secret.key,
            "aws_session_token": secret.token,
        }
        lines = [f"{name} = {value}" for name, value in names.items()]
        new.write_text("\n".join(["[default]", *lines, ""]))
        new.rename(file)

    write(Secret("wrong", SECRET.token))
    collector = make_redirected(endpoint.port).launch().wait_listening()
    reason = wait_not_ready(collector, "403", "clock", "credentials", "AWS_REGION")
    eventually(lambda: len(endpoint.refusals) >= 3, what="it tries again")
    assert set(endpoint.refusals) == {"wrong signature"}
    write(SECRET)
    collector.wait_ready()
    assert collector.metrics()['mqtt_errors_total{kind="bug"}'] == 0
    assert_no_credentials(collector.log() + reason)


def test_missing_credentials_are_reported(
    endpoint: Endpoint, make_redirected: MakeRedirected, tmp_path: Path
) -> None:
    collector = make_redirected(endpoint.port).launch().wait_listening()
    wait_not_ready(collector, "no AWS credentials found", "AWS_WEB_IDENTITY_TOKEN_FILE")
    # A credential_process is configured. At first it fails, later it succeeds.
    program = tmp_path / "credentials.json"
    config = f"[default]\ncredential_process = cat {program}\n"
    (tmp_path / "aws-config").write_text(config)
    assert run_command("check", IOT_MQTT_URL=URL).returncode & 4
    assert collector.running
    collector.stop()
    collector.launch().wait_listening()
    wait_not_ready(collector, "CredentialRetrievalError")
    program.write_text(expiring(SECRET))
    collector.wait_ready()
    assert collector.metrics()['mqtt_errors_total{kind="bug"}'] == 0
    assert not endpoint.refusals


def expiring(secret: Secret, key: str = KEY) -> str:
    """The output of a credential_process, for credentials that are renewed at each use."""
    soon = datetime.now(UTC) + timedelta(minutes=5)  # botocore renews ten minutes before
    return json.dumps(
        {
            "Version": 1,
            "AccessKeyId": key,
            "SecretAccessKey": secret.key,
            "SessionToken": secret.token,
            "Expiration": soon.isoformat(),
        }
    )


def test_at_most_100_messages_are_unacknowledged(
    endpoint: Endpoint, mosquitto: Mosquitto, make_redirected: MakeRedirected, database: Database
) -> None:
    """The table is locked, so nothing can be acknowledged."""
    collector = make_redirected(endpoint.port, **credentials(SECRET)).start()
    with database.connect() as connection, connection.cursor() as cursor:
        cursor.execute("LOCK TABLE messages")
        publish(mosquitto, numbered(500))
        eventually(lambda: endpoint.most_in_flight == 100, what="the window is full")
        connection.rollback()
    connection.close()
    collector.wait_settled(500)
    assert database.count() == 500
    assert (endpoint.most_in_flight, endpoint.violations) == (100, [])


def test_messages_are_stored_once_over_reconnects_and_expired_credentials(
    endpoint: Endpoint,
    mosquitto: Mosquitto,
    make_redirected: MakeRedirected,
    make_proxy: Callable[..., Any],
    database: Database,
    tmp_path: Path,
) -> None:
    """Connections break, PUBACKs get lost and credentials expire while messages arrive."""
    program = tmp_path / "credentials.json"
    program.write_text(expiring(SECRET))
    (tmp_path / "aws-config").write_text(f"[default]\ncredential_process = cat {program}\n")
    proxy = make_proxy(endpoint.port)
    collector = make_redirected(proxy.port, IOT_MESSAGE_ID_KEY="id").start()
    with Stream(mosquitto, message=b'{"id": "m%d"}') as stream:
        for turn in range(3):
            stream.more()
            proxy.up = "drop"  # PUBACKs are lost until the connection breaks
            eventually(lambda: endpoint.in_flight == 100, what="the window is full")
            eventually(lambda: not collector.metrics()["messages_in_flight"], what="all is stored")
            # The old credentials expire.
            endpoint.secrets = {f"{KEY}{turn}": Secret(f"secret{turn}", f"token{turn}")}
            proxy.up = "pass"
            proxy.cut()
            refused = len(endpoint.refusals)
            eventually(lambda: len(endpoint.refusals) > refused, what="the collector is refused")  # noqa: B023
            (key, secret), *_ = endpoint.secrets.items()
            program.write_text(expiring(secret, key))
            collector.wait_ready()
        stream.more()
        published = stream.finish()
    eventually(lambda: database.count() >= len(published), what="all is stored")
    metrics = collector.wait_settled(len(published))
    assert sorted(database.payloads()) == sorted(published), "each once"
    assert metrics["db_duplicates_total"] >= 300, "the messages whose PUBACKs were lost"
    assert metrics["mqtt_reconnects_total"] == 3
    assert len(endpoint.connects) == 4
    assert endpoint.violations == []


@pytest.mark.parametrize(("url", "warned"), [(URL, False), ("mqtt://broker.example", True)])
def test_repeated_messages_of_iot_core_are_no_fault_of_the_broker(url: str, warned: bool) -> None:
    """IoT Core sends them again while the database is unavailable, on the same connection."""
    window = 100
    with capture_logs() as log:
        connection = Connection(Settings(mqtt_url=url, mqtt_max_inflight=window))
        connection.count_received([0x32 << FLAGS_SHIFT] * 2 * window)
    assert ("use Mosquitto 2.0.21 or newer" in str(log)) == warned


def test_collector_connects_at_most_once_a_second(
    endpoint: Endpoint, make_redirected: MakeRedirected, mosquitto: Mosquitto
) -> None:
    """Also when each connection breaks right after CONNECT."""
    collector = make_redirected(endpoint.port, **credentials(SECRET)).start()
    for connects in range(1, 4):
        eventually(lambda: len(endpoint.connects) > connects - 1)  # noqa: B023
        endpoint.cut()
    collector.wait_ready()
    eventually(lambda: len(endpoint.connects) >= 4, what="it has connected again")
    gaps = [b - a for a, b in zip(endpoint.connects, endpoint.connects[1:], strict=False)]
    assert min(gaps) >= 1
    assert endpoint.violations == []


def test_stand_in_detects_violations(
    endpoint: Endpoint, make_redirected: MakeRedirected, mosquitto: Mosquitto
) -> None:
    looks = Look(endpoint)
    connect = b"\x10\x0e\0\4MQTT\5\2\0\5\0\0\1a"
    many = b"".join(b"\0\1%d\1" % n for n in range(9))
    asks = b"\x82" + bytes([len(many) + 3]) + b"\0\1\0" + many
    for packet in (connect, asks, b"\x82\7\0\1\0\0\1a\2"):
        with pytest.raises(ConnectionError):
            looks.up([packet])
    with pytest.raises(ConnectionError):
        looks.up([connect.replace(b"\0\5\0", b"\0\x1e\0")])
    with pytest.raises(ConnectionError):
        looks.down([b"\x32\5\0\1a\0\1"] * 101)
    keepalive, filters, qos, rate, window = endpoint.violations
    assert keepalive == "keepalive 5"
    assert filters == "9 filters in a SUBSCRIBE"
    assert qos == "QoS 2"
    assert rate.startswith("CONNECT 0.")
    assert window == "101 messages un-acknowledged"


def test_stand_in_finds_packets_across_frames() -> None:
    """A packet may be split over frames, and a frame over reads."""
    long = b"\x30\x85\x01" + b"\0\1a" + b"x" * 130
    frame = b"\x82\xfe" + len(long).to_bytes(2) + b"\1\2\3\4"
    frame += bytes(byte ^ (i % 4 + 1) for i, byte in enumerate(long))
    data = frame + b"\x82\2\xc0\0" + b"\x89\0" + b"\x02\1\xd0" + b"\x80\1\0"
    for step in (1, 7, len(data)):
        packets = Packets()
        found = [
            packet
            for at in range(0, len(data), step)
            for packet in packets.feed(data[at : at + step])
        ]
        assert found == [long, b"\xc0\0", b"\xd0\0"]


def test_17_filters_take_three_subscribes(
    endpoint: Endpoint, mosquitto: Mosquitto, make_redirected: MakeRedirected
) -> None:
    topics = [f"t/{n}" for n in range(17)]
    collector = make_redirected(endpoint.port, **credentials(SECRET))
    collector.settings["IOT_MQTT_TOPICS"] = ",".join(topics)
    collector.start()
    publish(mosquitto, [(topic, b"x") for topic in topics])
    collector.wait_settled(len(topics))
    assert (endpoint.subscribes, endpoint.violations) == ([8, 8, 1], [])


def test_plain_filter_is_replaced_by_a_shared_one(
    endpoint: Endpoint, mosquitto: Mosquitto, make_redirected: MakeRedirected, database: Database
) -> None:
    """Both are subscribed to for a while. IOT_MESSAGE_ID_KEY finds the duplicates."""
    settings = {**credentials(SECRET), "IOT_MESSAGE_ID_KEY": "id"}
    collector = make_redirected(endpoint.port, **settings).start()
    with Stream(mosquitto, message=b'{"id": "m%d"}') as stream:
        stream.more()
        assert collector.stop() == 0
        # A new process does not know when the last one connected.
        eventually(
            lambda: time.monotonic() - endpoint.connects[-1] >= RATE,
            what="another CONNECT is allowed",
        )
        collector.settings |= {"IOT_MQTT_TOPICS": "$share/g/iot/data", "OVERLAP": "0.5"}
        collector.start()
        select = "SELECT filters FROM sessions"
        eventually(
            lambda: database.query(select) == [(["$share/g/iot/data"],)],
            what="the old filter is gone",
        )
        stream.more()
        published = stream.finish()
    eventually(lambda: database.count() >= len(published), what="all is stored")
    collector.wait_settled(1)
    assert sorted(database.payloads()) == sorted(published)
    assert collector.metrics()["db_duplicates_total"] > 0, "the subscriptions overlapped"
    assert endpoint.violations == []


def test_check_command_signs_too(
    endpoint: Endpoint,
    make_redirected: MakeRedirected,
    certificates: Certificates,
    database: Database,
) -> None:
    def check(**more: str) -> subprocess.CompletedProcess[str]:
        collector = make_redirected(endpoint.port, **more)
        command = [*collector.command()[:-1], "check"]
        environment = clean_environment() | collector.settings
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=60
        )

    done = check(**credentials(SECRET))
    assert done.returncode == 0, done.stdout
    assert "IOT_MESSAGE_ID_KEY is recommended" in done.stdout
    done = check(**credentials(SECRET), IOT_MESSAGE_ID_KEY="id")
    assert "IOT_MESSAGE_ID_KEY" not in done.stdout
    done = check(**credentials(Secret("wrong")))
    assert done.returncode == 4
    assert "check the clock" in done.stdout
    done = check()
    assert done.returncode == 4
    assert "no AWS credentials found" in done.stdout


# Client certificates -------------------------------------------------------------------------


def mutual_tls_broker(make_broker: MakeBroker, certificates: Certificates) -> Mosquitto:
    listener = [
        f"certfile {certificates.server}",
        f"keyfile {certificates.server_key}",
        f"cafile {certificates.ca}",
        "require_certificate true",
    ]
    return make_broker(scheme="mqtts", listener=listener).start()


def certificate_settings(certificates: Certificates) -> dict[str, str]:
    return {
        "IOT_MQTT_CERT_FILE": str(certificates.client),
        "IOT_MQTT_KEY_FILE": str(certificates.client_key),
    }


def test_client_certificate_is_used_on_port_8883(
    make_broker: MakeBroker,
    certificates: Certificates,
    make_redirected: MakeRedirected,
    database: Database,
) -> None:
    broker = mutual_tls_broker(make_broker, certificates)
    url = f"mqtts://{NAME}"
    collector = make_redirected(
        broker._collector_port, url, **certificate_settings(certificates)
    ).start()
    publish(broker, numbered(300))
    collector.wait_settled(300)
    assert database.count() == 300
    (event,) = [e for e in collector.events() if e["event"] == "collector started"]
    assert event["broker"] == f"{NAME}:8883"


@pytest.mark.parametrize("wrong", ["client certificate", "CA"])
def test_certificate_of_another_ca_is_refused(
    wrong: str,
    make_broker: MakeBroker,
    certificates: Certificates,
    make_redirected: MakeRedirected,
    tmp_path: Path,
) -> None:
    broker = mutual_tls_broker(make_broker, certificates)
    folder = tmp_path / "other"
    folder.mkdir()
    other = make_certificates(folder, NAME)
    settings = certificate_settings(other if wrong == "client certificate" else certificates)
    collector = make_redirected(broker._collector_port, f"mqtts://{NAME}", **settings)
    if wrong == "CA":
        collector.settings["IOT_MQTT_CA_FILE"] = str(other.ca)
    collector.launch().wait_listening()
    wait_not_ready(
        collector, "certificate verify failed" if wrong == "CA" else "IOT_MQTT_CERT_FILE"
    )


def test_client_certificate_on_port_443_uses_alpn(
    mosquitto: Mosquitto,
    certificates: Certificates,
    make_redirected: MakeRedirected,
    database: Database,
) -> None:
    """On port 443, IoT Core expects the ALPN protocol of MQTT."""
    with Endpoint(mosquitto.port, certificates, "certificate") as endpoint:
        url = f"mqtts://{NAME}:443"
        collector = make_redirected(
            endpoint.port, url, **certificate_settings(certificates)
        ).start()
        publish(mosquitto, numbered(100))
        collector.wait_settled(100)
        assert database.count() == 100
        assert not endpoint.refusals
        assert collector.stop() == 0
        # With another port in the URL, ALPN is not sent, and the endpoint refuses.
        plain = make_redirected(
            endpoint.port, f"mqtts://{NAME}:8883", **certificate_settings(certificates)
        )
        plain.launch().wait_listening()
        wait_not_ready(plain, "IOT_MQTT_CERT_FILE")
        assert set(endpoint.refusals) == {"ALPN is None"}
