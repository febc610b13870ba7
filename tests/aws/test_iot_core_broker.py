"""The collector at the emulator's MQTT broker, with the role that the playbook made for it.

The emulator checks signatures, the role's trust policy and its permissions. TLS is the tests' own.
It checks no rate and no window, and delivers nothing for shared subscriptions: for that,
collector/tests/test_iot_core.py has a stand-in.
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

NAMED = Path(__file__).parents[2] / "testing/named_collector.py"


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
    """What a pod finds in AWS_WEB_IDENTITY_TOKEN_FILE; the emulator reads it and trusts it."""
    claims = {
        "iss": f"https://{issuer}",
        "sub": f"system:serviceaccount:{service_account}",
        "aud": "sts.amazonaws.com",
    }
    parts = [json.dumps(part).encode() for part in ({"alg": "RS256", "typ": "JWT"}, claims)]
    parts.append(b"signature")
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)


class Pod(Collector):
    """A collector with the environment that EKS gives to a pod of the service account."""

    endpoint_port = 0

    def command(self) -> Sequence[str]:
        return [sys.executable, str(NAMED), NAME, str(self.endpoint_port), "run"]


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


def problem(pod: Pod, *words: str) -> None:
    """Wait until it is not ready for a reason with these words."""
    pod.launch().wait_listening()

    def why() -> bool:
        answer = pod.get("/readyz")
        return answer.status == 503 and all(word in answer.body.decode() for word in words)

    eventually(why, what=f"it says {words}")


def test_messages_reach_the_table(
    deployed: Deployment, make_pod: Callable[..., Pod], database: Database
) -> None:
    pod = make_pod().start()
    payloads = [b"n:%d" % n for n in range(50)]
    publish(deployed.account, *payloads)
    pod.wait_settled(len(payloads))
    assert sorted(database.payloads()) == sorted(payloads)
    # What is published while it is away waits in its session.
    assert pod.stop() == 0
    publish(deployed.account, b"later")
    pod.start()
    pod.wait_settled(1)
    assert database.payloads()[-1] == b"later"
    assert "SessionToken" not in pod.log()
    assert "X-Amz-" not in pod.log()


def test_another_client_id(make_pod: Callable[..., Pod]) -> None:
    pod = make_pod()
    pod.settings["IOT_MQTT_CLIENT_ID"] = "another-0"
    problem(pod, "Not authorized", "iot:Connect on client/another-0")


def test_another_topic(make_pod: Callable[..., Pod]) -> None:
    pod = make_pod()
    pod.settings["IOT_MQTT_TOPICS"] = "iot/other"
    problem(pod, "iot/other", "Not authorized")


def test_another_service_account(make_pod: Callable[..., Pod]) -> None:
    pod = make_pod("iot-system:another")
    problem(pod, "AccessDenied", "AWS_WEB_IDENTITY_TOKEN_FILE")
    assert pod.metrics()['mqtt_errors_total{kind="bug"}'] == 0
