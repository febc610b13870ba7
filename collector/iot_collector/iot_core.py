"""AWS IoT Core as the broker: how to recognise it, and its limits on the settings.

Sources, read in November 2026:

* [quotas] https://docs.aws.amazon.com/general/latest/gr/iot-core.html#message-broker-limits
  (message broker and protocol limits)
* [mqtt] https://docs.aws.amazon.com/iot/latest/developerguide/mqtt.html
* [protocols] https://docs.aws.amazon.com/iot/latest/developerguide/protocols.html

docs/iot-core.md has the limits as a table.
"""

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .settings import Settings

SCHEME = "awsiot"  # in IOT_MQTT_URL: MQTT over WebSocket, signed with AWS credentials
PATH = "/mqtt"  # of the WebSocket [protocols]
# MQTT with a client certificate on the HTTPS port [protocols].
ALPN_PORT, ALPN = 443, "x-amzn-mqtt-ca"

MAX_QOS = 1  # IoT Core does not answer a SUBSCRIBE with QoS 2 [mqtt, differences]
MAX_INFLIGHT = 100  # un-acknowledged messages per client [quotas]
KEEPALIVE = (30, 1200)  # seconds; for others, IoT Core uses the nearest or the longest [quotas]
# In a SUBSCRIBE [quotas], and in an UNSUBSCRIBE (aws-iot-device-sdk-js, issue 361).
FILTERS_PER_PACKET = 8
FILTERS_PER_CONNECTION = 50  # [quotas, subscriptions per connection]
CONNECT_INTERVAL = 1.0  # seconds between two CONNECTs with one client id [quotas]
SESSION_EXPIRY = 3600  # seconds, the default quota of an account [quotas]
MAX_SESSION_EXPIRY = 7 * 86400  # seconds, after a quota increase [mqtt, Session Expiry Interval]
CLIENT_ID_BYTES = 128  # and no $ at the start [quotas]
FILTER_BYTES = 256  # without $share/<group>/ [quotas; mqtt, shared subscriptions]
GROUP_CHARACTERS = 128  # in <group> [mqtt, shared subscriptions]
FILTER_SLASHES = 7  # without those of $share/<group>/ [quotas; mqtt, shared subscriptions]

# Seconds for which a replaced filter stays subscribed. The new filter may take effect some time
# after its SUBACK [mqtt, differences]. AWS does not document how long, so this value is a choice
# (docs/adr/0002).
OVERLAP = 30.0

# Defaults of settings with IoT Core. The ledger recognises a message that is sent again by its DUP
# flag, which IoT Core does not set [mqtt, differences].
DEFAULTS: dict[str, Any] = {
    "mqtt_max_inflight": MAX_INFLIGHT,
    "mqtt_session_expiry_seconds": SESSION_EXPIRY,
    "packet_ledger": False,
}

MESSAGE_ID_ADVICE = (
    "IOT_MESSAGE_ID_KEY is recommended: AWS IoT Core may send a message again with another packet "
    "id; if the message has no id of the device, it is then stored twice"
)

POLICY_HINT = (
    "check the policy of the IAM role or of the certificate: iot:Connect on client/{client_id}, "
    "iot:Subscribe on topicfilter/… and iot:Receive on topic/… for each of IOT_MQTT_TOPICS"
)

_ENDPOINT = re.compile(r"(?:.+\.)?iot(?:-fips)?\.([a-z]+(?:-[a-z]+)+-\d+)\.amazonaws\.com(?:\.cn)?")
_SHARED = re.compile(r"\$share/([^/]+)/(.*)", re.DOTALL)


def region_of(host: str) -> str | None:
    """Return the region in the host name of an AWS endpoint; None for any other host name."""
    match = _ENDPOINT.fullmatch(host)
    return match[1] if match else None


def is_iot_core(scheme: str, host: str) -> bool:
    """Whether a broker is IoT Core. With a custom domain, only the scheme tells."""
    return scheme == SCHEME or region_of(host) is not None


def faults(settings: "Settings") -> list[str]:
    """Return a line for each setting that is outside the limits of IoT Core."""
    found = []
    if settings.mqtt_qos > MAX_QOS:
        found.append(f"IOT_MQTT_QOS: AWS IoT Core has no QoS 2; set {MAX_QOS} or leave it out")
    if settings.mqtt_max_inflight > MAX_INFLIGHT:
        found.append(
            f"IOT_MQTT_MAX_INFLIGHT: AWS IoT Core sends at most {MAX_INFLIGHT} un-acknowledged "
            f"messages; set {MAX_INFLIGHT} or leave it out"
        )
    shortest, longest = KEEPALIVE
    if not shortest <= settings.mqtt_keepalive_seconds <= longest:
        found.append(
            f"IOT_MQTT_KEEPALIVE_SECONDS: AWS IoT Core accepts {shortest} to {longest}; for "
            f"example {shortest}"
        )
    if settings.mqtt_session_expiry_seconds > MAX_SESSION_EXPIRY:
        found.append(
            "IOT_MQTT_SESSION_EXPIRY_SECONDS: AWS IoT Core keeps a session for at most "
            f"{MAX_SESSION_EXPIRY}, or {SESSION_EXPIRY} without a quota increase for the account"
        )
    if settings.packet_ledger:
        found.append(
            "IOT_PACKET_LEDGER: AWS IoT Core does not mark messages that it sends again; set false "
            "or leave it out, and set IOT_MESSAGE_ID_KEY"
        )
    if settings.broker_metrics:
        found.append(
            "IOT_BROKER_METRICS: AWS IoT Core publishes no such metrics; set false or leave it "
            "out, and see docs/aws-metrics.md for the metrics in CloudWatch"
        )
    client_id = settings.mqtt_client_id
    if len(client_id.encode()) > CLIENT_ID_BYTES or client_id.startswith("$"):
        found.append(
            f"IOT_MQTT_CLIENT_ID: AWS IoT Core accepts at most {CLIENT_ID_BYTES} bytes, and no $ "
            "at the start; for example iot-collector-0"
        )
    return found + _faults_of_topics(settings.mqtt_topics)


def _faults_of_topics(topics: list[str]) -> list[str]:
    found = []
    if len(topics) > FILTERS_PER_CONNECTION:
        found.append(
            f"IOT_MQTT_TOPICS: {len(topics)} filters, but AWS IoT Core accepts at most "
            f"{FILTERS_PER_CONNECTION} per connection; use wildcards, or another collector"
        )
    for topic_filter in topics:
        shared = _SHARED.fullmatch(topic_filter)
        group, plain = shared.groups() if shared else ("", topic_filter)
        if (
            len(plain.encode()) > FILTER_BYTES
            or plain.count("/") > FILTER_SLASHES
            or len(group) > GROUP_CHARACTERS
        ):
            found.append(
                f"IOT_MQTT_TOPICS: {topic_filter[:80]!r} is too long for AWS IoT Core, which "
                f"accepts at most {FILTER_BYTES} bytes and {FILTER_SLASHES} slashes, without "
                f"$share/<group>/, and {GROUP_CHARACTERS} characters in the group; for example "
                "plant/+/telemetry"
            )
    return found
