"""The replay queue: an SQS queue to which an AWS IoT rule copies every message.

roles/iot_core/files/stack.yml creates both. A copy is a JSON object with ``payload`` (base64),
``topic``, ``received_ms`` (Unix time in milliseconds) and ``trace_id``. IoT Core gives each message
that is published over MQTT a trace id, so copies of it by several rules have the same. A message
that is published over HTTPS has none
(https://docs.aws.amazon.com/iot/latest/developerguide/iot-sql-functions.html, traceid); the id that
SQS gives to its copy takes its place.
"""

import base64
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson

from . import aws

RECEIVE_MAX = 10  # messages in a call; SQS allows no more
# The visibility timeout in seconds: how long SQS hides a message that was received and not deleted.
# A batch is stored much faster. If not, the copy is delivered again and recognised by its trace id.
HIDDEN_SECONDS = 30
_WAIT_SECONDS = 1  # long polling, because short polling asks only some of SQS's servers
_YEAR_2015 = 1_420_000_000_000  # Unix time in milliseconds; AWS IoT did not exist before
_DAY = 86_400_000


class Copy(NamedTuple):
    """A copy of a message, as the rule wrote it."""

    trace_id: str
    received: float  # Unix time in seconds
    topic: str
    payload: bytes


class Received(NamedTuple):
    """A message that was received from the queue, and is not deleted yet."""

    id: str
    handle: str
    sent: float  # Unix time in seconds
    body: str


class Queue:
    """The queue. Methods may be called by several threads.

    :param arn: its ARN, which contains region, account and name.
    """

    def __init__(self, arn: str) -> None:
        self._arn = arn
        _, _, _, region, account, name = arn.split(":")
        with aws.explained("sqs:ReceiveMessage", arn):
            self._client = aws.client("sqs", region)
        # Built from the ARN, because sqs:GetQueueUrl would be one more permission.
        self._url = f"{self._client.meta.endpoint_url.rstrip('/')}/{account}/{name}"

    def size(self) -> tuple[int, int]:
        """Return about how many messages are visible, and how many are hidden.

        :raises aws.AwsError: the call failed.
        """
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        with aws.explained("sqs:GetQueueAttributes", self._arn):
            found = self._client.get_queue_attributes(QueueUrl=self._url, AttributeNames=names)
        visible, hidden = (int(found["Attributes"][name]) for name in names)
        return visible, hidden

    def receive(self) -> list[Received]:
        """Return up to ten messages, or none if none arrives within a second.

        :raises aws.AwsError: the call failed.
        """
        with aws.explained("sqs:ReceiveMessage", self._arn):
            answer = self._client.receive_message(
                QueueUrl=self._url,
                MaxNumberOfMessages=RECEIVE_MAX,
                VisibilityTimeout=HIDDEN_SECONDS,
                WaitTimeSeconds=_WAIT_SECONDS,
                MessageSystemAttributeNames=["SentTimestamp"],
            )
        return [_received(message) for message in answer.get("Messages", [])]

    def delete(self, handles: Sequence[str]) -> None:
        """Delete up to ten messages. One that SQS fails to delete is delivered again.

        :raises aws.AwsError: the call failed.
        """
        entries = [{"Id": str(i), "ReceiptHandle": handle} for i, handle in enumerate(handles)]
        with aws.explained("sqs:DeleteMessage", self._arn):
            self._client.delete_message_batch(QueueUrl=self._url, Entries=entries)


def _received(message: dict[str, Any]) -> Received:
    sent = int(message["Attributes"]["SentTimestamp"]) / 1000
    return Received(message["MessageId"], message["ReceiptHandle"], sent, message["Body"])


def parse(body: str, message_id: str) -> Copy:
    """Return the copy in the body of a message of the queue.

    :param message_id: the id of SQS, for a copy without a trace id.
    :raises ValueError: the rule does not write such a body; the text says why.
    """
    try:
        document = orjson.loads(body)
    except ValueError:
        raise ValueError("it is not JSON") from None
    if not isinstance(document, dict):
        raise ValueError("it is not a JSON object")  # noqa: TRY004
    # A rule leaves out keys without a value, perhaps also that of an empty payload.
    trace_id, topic = document.get("trace_id", message_id), document.get("topic")
    received = document.get("received_ms")
    payload = document.get("payload", "")
    if not isinstance(trace_id, str) or not 0 < len(trace_id) <= 128 or "\0" in trace_id:
        raise ValueError("trace_id is not a text of up to 128 characters")
    if not isinstance(topic, str) or not 0 < len(topic.encode()) <= 65_535 or "\0" in topic:
        raise ValueError("topic is missing, or is not a valid MQTT topic")
    if type(received) is not int or not _YEAR_2015 < received < time.time() * 1000 + _DAY:
        raise ValueError("received_ms is missing, or is not a time in milliseconds")
    if not isinstance(payload, str):
        raise ValueError("payload is not base64")  # noqa: TRY004
    try:
        decoded = base64.b64decode(payload, validate=True)
    except ValueError:
        raise ValueError("payload is not base64") from None
    return Copy(trace_id, received / 1000, topic, decoded)
