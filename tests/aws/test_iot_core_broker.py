"""The collector connects to the emulator's MQTT broker, with the IAM role of the playbook.

The emulator checks signatures, and the role's trust policy and permissions. TLS is provided by the
tests. The emulator has no rate limits, no limit of in-flight messages and no shared subscriptions;
collector/tests/unit/test_iot_core.py tests these with a stand-in.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from deployments import Deployment

from testing.aws.emulator import Emulator
from testing.certificates import Certificates, make_certificates
from testing.collector import Collector
from testing.iot_core import NAME, Endpoint
from testing.postgres import Database
from testing.service import eventually

pytestmark = pytest.mark.timeout(900)

NAMED_COLLECTOR = Path(__file__).parents[2] / "testing/named_collector.py"


def output(account: Emulator, stack: str, name: str) -> str:
    """An output of one of the stacks."""
    found = account.client("cloudformation").describe_stacks(StackName=f"iot-system-{stack}")
    outputs = {o["OutputKey"]: o["OutputValue"] for o in found["Stacks"][0]["Outputs"]}
    return str(outputs[name])


def publish(account: Emulator, *payloads: bytes) -> None:
    """Publish to the topic of the devices."""
    data = account.client("iot-data")
    for payload in payloads:
        data.publish(topic="iot/data", qos=1, payload=payload)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"), NAME)


@pytest.fixture
def endpoint(deployed: Deployment, certificates: Certificates) -> Iterator[Endpoint]:
    with Endpoint(deployed.account.port, certificates, "tls") as endpoint:
        yield endpoint


def token(issuer: str, service_account: str) -> str:
    """The content of AWS_WEB_IDENTITY_TOKEN_FILE. The emulator does not check its signature."""
    claims = {
        "iss": f"https://{issuer}",
        "sub": f"system:serviceaccount:{service_account}",
        "aud": "sts.amazonaws.com",
    }
    parts = [json.dumps(part).encode() for part in ({"alg": "RS256", "typ": "JWT"}, claims)]
    parts.append(b"signature")
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)


class Pod(Collector):
    """A collector with the environment that EKS sets in a pod of the service account."""

    endpoint_port = 0

    def command(self) -> Sequence[str]:
        return [sys.executable, str(NAMED_COLLECTOR), NAME, str(self.endpoint_port), "run"]


@pytest.fixture
def make_pod(
    deployed: Deployment,
    endpoint: Endpoint,
    certificates: Certificates,
    database: Database,
    tmp_path: Path,
) -> Iterator[Callable[..., Pod]]:
    made: list[Pod] = []

    def make(service_account: str = "iot-system:collector", **settings: str) -> Pod:
        account = deployed.account
        folder = tmp_path / f"pod-{len(made)}"
        folder.mkdir()
        file = folder / "token"
        file.write_text(token(output(account, "eks", "OidcIssuer"), service_account))
        environment = {
            "AWS_ROLE_ARN": output(account, "eks", "CollectorRoleArn"),
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(file),
            "AWS_ROLE_SESSION_NAME": "collector",
            "AWS_ENDPOINT_URL": account.url,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "IOT_MQTT_URL": f"awsiot://{NAME}",
            "IOT_MQTT_CA_FILE": str(certificates.ca),
            "IOT_MQTT_CLIENT_ID": "iot-collector-0",
            "IOT_MQTT_TOPICS": "iot/data",
        }
        made.append(Pod(folder, database, **environment, **settings))
        made[-1].endpoint_port = endpoint.port
        return made[-1]

    yield make
    for pod in made:
        pod.close()


def assert_not_ready(pod: Pod, *words: str) -> None:
    """Start the pod; wait until /readyz fails with a reason that has all these words."""
    pod.launch().wait_listening()

    def failing() -> bool:
        answer = pod.get("/readyz")
        return answer.status == 503 and all(word in answer.body.decode() for word in words)

    eventually(failing, what=f"/readyz says {words}")


def test_messages_are_stored_live_and_from_the_session(
    deployed: Deployment, make_pod: Callable[..., Pod], database: Database
) -> None:
    pod = make_pod().start()
    payloads = [b"n:%d" % n for n in range(50)]
    publish(deployed.account, *payloads)
    pod.wait_settled(len(payloads))
    assert sorted(database.payloads()) == sorted(payloads)
    # The session queues messages while the pod is stopped.
    assert pod.stop() == 0
    publish(deployed.account, b"later")
    pod.start()
    pod.wait_settled(1)
    assert database.payloads()[-1] == b"later"
    assert "SessionToken" not in pod.log()
    assert "X-Amz-" not in pod.log()


def test_other_client_id_is_refused(make_pod: Callable[..., Pod]) -> None:
    pod = make_pod()
    pod.settings["IOT_MQTT_CLIENT_ID"] = "another-0"
    assert_not_ready(pod, "Not authorized", "iot:Connect on client/another-0")


def test_other_topic_is_refused(make_pod: Callable[..., Pod]) -> None:
    pod = make_pod()
    pod.settings["IOT_MQTT_TOPICS"] = "iot/other"
    assert_not_ready(pod, "iot/other", "Not authorized")


def test_other_service_account_is_refused(make_pod: Callable[..., Pod]) -> None:
    pod = make_pod("iot-system:another")
    assert_not_ready(pod, "AccessDenied", "AWS_WEB_IDENTITY_TOKEN_FILE")
    assert pod.metrics()['mqtt_errors_total{kind="bug"}'] == 0
