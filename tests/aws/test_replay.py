"""``iot-collector replay`` restores messages that were lost in an outage, each of them once.

In IoT Core, devices publish to one endpoint. Here they publish to two: to Mosquitto, from which the
collector reads, and to the emulator, whose rules engine copies messages into SQS with the SQL of
the template.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from iot_collector import aws
from iot_collector.cli import main
from iot_collector.replay import missing
from iot_collector.replay_queue import parse

from testing.aws.emulator import Emulator
from testing.collector import Collector, clean_environment, run_command
from testing.mosquitto import Mosquitto
from testing.postgres import Database
from testing.proxy import Proxy
from testing.publisher import publish
from testing.service import eventually

ROOT = Path(__file__).parents[2]
Message = tuple[str, bytes]
MakeCollector = Callable[..., Collector]
LAUNCHER = ROOT / "testing/aws/faulty_replay.py"
MOMENTS = ("received", "taken", "half deleted", "settling", "before commit", "settled")
ARN = "arn:aws:sqs:eu-west-1:000000000000:iot-system-replay"
RULES = {"replay_1": "iot/#", "replay_2": "iot/data"}
NUMBERS = itertools.count()


class ReplayQueue:
    """A queue in an account, with rules for ``iot/#`` and ``iot/data``, which overlap."""

    def __init__(self, account: Emulator, queue: str) -> None:
        self.account = account
        self.arn = f"arn:aws:sqs:eu-west-1:000000000000:{queue}"
        self.sqs, self._data = account.client("sqs"), account.client("iot-data")
        self.url = self.sqs.create_queue(QueueName=queue)["QueueUrl"]
        template = (ROOT / "roles/iot_core/files/stack.yml").read_text()
        (select,) = set(re.findall(r"SELECT .*", template))
        for name, topic in RULES.items():
            account.client("iot").replace_topic_rule(
                ruleName=name,
                topicRulePayload={
                    "awsIotSqlVersion": "2016-03-23",
                    "sql": f"{select} FROM '{topic}'",
                    "actions": [
                        {
                            "sqs": {
                                "roleArn": "arn:aws:iam::000000000000:role/rule",
                                "queueUrl": self.url,
                                "useBase64": False,
                            }
                        }
                    ],
                },
            )

    def publish(self, messages: Iterable[Message]) -> None:
        """Publish to the rules, not to Mosquitto."""
        for topic, payload in messages:
            self._data.publish(topic=topic, qos=1, payload=payload)

    def put(self, body: str) -> None:
        """Send a message to the queue without a rule."""
        self.sqs.send_message(QueueUrl=self.url, MessageBody=body)

    def size(self) -> int:
        """The number of messages in the queue, in-flight messages included."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        found = self.sqs.get_queue_attributes(QueueUrl=self.url, AttributeNames=names)
        return sum(int(found["Attributes"][name]) for name in names)


@pytest.fixture(scope="module")
def account(make_account: Callable[[], Emulator]) -> Emulator:
    """An account for most of these tests. Each test has its own queue in it."""
    return with_rules(make_account())


def with_rules(account: Emulator) -> Emulator:
    """Create the rules that `ReplayQueue` replaces."""
    payload = {"sql": "SELECT * FROM 'none'", "actions": []}
    for name in RULES:
        account.client("iot").create_topic_rule(ruleName=name, topicRulePayload=payload)
    return account


@pytest.fixture
def replay_queue(account: Emulator) -> ReplayQueue:
    """An empty queue."""
    return ReplayQueue(account, f"queue-{next(NUMBERS)}")


class Replay:
    """Runs the command and parses the counts of its summary."""

    def __init__(self, replay_queue: ReplayQueue, database: Database, **settings: str) -> None:
        self.settings = {
            **replay_queue.account.environment,
            **database.environment(),
            "IOT_REPLAY_QUEUE": replay_queue.arn,
            **settings,
        }
        self.counts: dict[str, int] = {}
        self.output = ""

    def __call__(self, *options: str, fault: str = "none", status: int = 0) -> dict[str, int]:
        done = subprocess.run(
            [sys.executable, LAUNCHER, fault, *options],
            env=clean_environment() | self.settings,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        self.output = done.stdout + done.stderr
        assert "Traceback" not in self.output, self.output
        assert done.returncode == status, self.output
        found = re.findall(r"^(\w+(?: \w+)?) +(\d+)", self.output, re.MULTILINE)
        self.counts = {name: int(count) for name, count in found}
        return self.counts


def now() -> str:
    return datetime.now(UTC).isoformat()


def stored(database: Database) -> Counter[Message]:
    """How often each message is stored."""
    return Counter((row.topic, row.payload) for row in database.rows())


def make_messages(start: int, count: int) -> list[Message]:
    """Make messages: one third are equal, and another third match only one of the rules."""
    kinds = (("iot/data", b"state:on"), ("iot/data", b"n:%d"), ("iot/door", b'{"n":%d}'))
    made = [(*kinds[i % 3], i) for i in range(start, start + count)]
    return [(t, p % i if b"%" in p else p) for t, p, i in made]


def send(replay_queue: ReplayQueue, broker: Mosquitto, messages: list[Message]) -> None:
    """Publish to Mosquitto and to the rules."""
    # In small batches, because replay compares the times of both.
    for start in range(0, len(messages), 10):
        publish(broker, messages[start : start + 10])
        replay_queue.publish(messages[start : start + 10])


def forget_sessions(broker: Mosquitto) -> None:
    """Make the broker lose all sessions, as IoT Core does after an hour."""
    broker.kill()
    (broker.folder / "mosquitto.db").unlink(missing_ok=True)
    broker.start()


def outage(
    replay_queue: ReplayQueue,
    broker: Mosquitto,
    database: Database,
    collector: Collector,
) -> Counter[Message]:
    """Stop the database for longer than the session lasts; return all published messages."""
    before, waiting, lost, after = (make_messages(i * 60, 60) for i in range(4))
    send(replay_queue, broker, before)
    collector.wait_settled(60)
    database.server.stop()
    send(replay_queue, broker, waiting)  # received and not acknowledged
    eventually(lambda: collector.metrics()["messages_in_flight"] == 60, what="all messages wait")
    collector.kill()
    forget_sessions(broker)
    send(replay_queue, broker, lost)
    database.server.start()
    collector.start()
    send(replay_queue, broker, after)
    collector.wait_settled(60)
    published = Counter([*before, *waiting, *lost, *after])
    assert stored(database) == Counter([*before, *after]), "messages are missing after the outage"
    return published


def test_messages_lost_in_an_outage_are_restored_once(
    replay_queue: ReplayQueue,
    broker: Mosquitto,
    own_database: Database,
    make_collector: MakeCollector,
) -> None:
    collector = make_collector(broker, own_database).start()
    start = time.time()
    published = outage(replay_queue, broker, own_database, collector)
    live = own_database.query("SELECT max(id) FROM messages")[0][0]
    replay = Replay(replay_queue, own_database)
    counts = replay("--until", now())
    assert stored(own_database) == published
    assert counts["restored"] == 120
    assert counts["stored already"] == 120
    assert counts["repeated"] == 160, "two thirds are copied by both rules"
    assert counts["left"] == counts["malformed"] == counts["dead letters"] == 0
    assert replay_queue.size() == 0
    # Restored rows are like rows of the collector, with the time at which IoT Core received them.
    restored = own_database.query(
        "SELECT topic, fields, qos, retained, extract(epoch FROM received_at),"
        " date_trunc('milliseconds', received_at) = received_at FROM messages WHERE id > %s",
        live,
    )
    assert all(row[2:4] == (1, False) and row[5] and row[4] > start for row in restored)
    assert {"n": 61} in [fields for _, fields, *_ in restored]
    # A second run restores nothing.
    assert replay("--until", now())["restored"] == 0
    assert stored(own_database) == published


def test_messages_are_restored_once_after_kills(
    replay_queue: ReplayQueue, database: Database
) -> None:
    """The command is killed at each step. Every other message is already stored."""
    messages = make_messages(0, 90)
    replay_queue.publish(messages)
    store_by_hand(database, [m for i, m in enumerate(messages) if i % 2])
    replay = Replay(replay_queue, database, WAIT="1")
    for moment in MOMENTS:
        replay("--until", now(), fault=moment, status=-9)
    counts = replay("--until", now())
    assert stored(database) == Counter(messages)
    assert counts["left"] == 0
    assert replay_queue.size() == 0
    assert replay("--until", now())["restored"] == 0
    assert stored(database) == Counter(messages)


def store_by_hand(database: Database, messages: list[Message]) -> None:
    """Insert messages as the collector would, with the current time."""
    for topic, payload in messages:
        database.query(
            "INSERT INTO messages (received_at, topic, payload, qos, retained)"
            " VALUES (now(), %s, %s, 1, false)",
            topic,
            payload,
        )


def test_copy_redelivered_by_sqs_is_not_restored_again(
    replay_queue: ReplayQueue, database: Database
) -> None:
    """Its trace id is known, whether or not the message had to be restored."""
    replay_queue.publish([("iot/door", b"a"), ("iot/door", b"b")])
    store_by_hand(database, [("iot/door", b"a")])
    found = replay_queue.sqs.receive_message(
        QueueUrl=replay_queue.url, MaxNumberOfMessages=10, VisibilityTimeout=0
    )
    bodies = [message["Body"] for message in found["Messages"]]
    assert len(bodies) == 2
    replay = Replay(replay_queue, database)
    assert replay("--until", now())["restored"] == 1
    for body in bodies:
        replay_queue.put(body)
    assert replay("--until", now())["repeated"] == 2
    assert stored(database) == Counter([("iot/door", b"a"), ("iot/door", b"b")])


def test_messages_with_ids_are_compared_by_id(
    replay_queue: ReplayQueue, broker: Mosquitto, database: Database, make_collector: MakeCollector
) -> None:
    """With ids, copies need not wait, and the collector stores no restored message again."""
    settings = {"IOT_MESSAGE_ID_KEY": "id"}
    collector = make_collector(broker, database, **settings).start()
    named = [("iot/data", b'{"id":%d,"v":1}' % i) for i in range(40)]
    publish(broker, named[:20])
    collector.wait_settled(20)
    # Messages that differ only in the id, duplicates of the device, and another payload.
    replay_queue.publish([*named, *named[15:25], ("iot/data", b'{"id":3,"v":2}')])
    replay_queue.publish([("iot/data", b"no id")] * 2)
    counts = Replay(replay_queue, database, **settings)()
    assert counts["restored"] == 20
    assert counts["stored already"] == 31
    assert counts["left"] == 2, "messages without an id may still arrive"
    publish(broker, named[30:])
    assert collector.wait_settled(30)["db_duplicates_total"] == 10
    assert stored(database) == Counter(named)


def test_message_ids_are_kept_as_long_as_copies_in_the_queue(
    broker: Mosquitto, database: Database, make_collector: MakeCollector
) -> None:
    database.query(
        "INSERT INTO message_ids (id, stored_at) SELECT days, now() - make_interval(days => days)"
        " FROM generate_series(1, 20) days"
    )
    collector = make_collector(
        broker, database, IOT_MESSAGE_ID_KEY="id", IOT_REPLAY_QUEUE=ARN
    ).start()
    publish(broker, [("iot/data", b"x")])
    collector.wait_settled(1)
    assert database.query("SELECT max(id::int) FROM message_ids") == [(14,)]


def test_recent_copies_are_left_for_a_later_run(
    replay_queue: ReplayQueue, database: Database
) -> None:
    replay_queue.publish([("iot/door", b"a")])
    replay = Replay(replay_queue, database)
    counts = replay()
    assert (counts["left"], counts["restored"]) == (1, 0)
    assert "IoT Core received them after 20" in replay.output
    assert database.count() == replay_queue.size() == 0
    assert replay("--until", now())["restored"] == 1
    # An old copy is restored, because its session has expired.
    replay_queue.put(copy("iot/door", b"old", datetime.now(UTC) - timedelta(hours=9)))
    assert Replay(replay_queue, database, IOT_MQTT_SESSION_EXPIRY_SECONDS="3600")()["restored"] == 1
    assert stored(database) == Counter([("iot/door", b"a"), ("iot/door", b"old")])


def copy(topic: str, payload: bytes, at: datetime, trace_id: str = "") -> str:
    """A message of the rule at another time."""
    return json.dumps(
        {
            "topic": topic,
            "payload": base64.b64encode(payload).decode(),
            "received_ms": int(at.timestamp() * 1000),
            "trace_id": trace_id or f"trace-{at.timestamp()}",
        }
    )


def test_messages_without_a_trace_id_are_restored_once(
    replay_queue: ReplayQueue, database: Database
) -> None:
    """IoT Core gives none to messages that are published over HTTPS; the emulator does."""
    document = json.loads(copy("iot/door", b"open", datetime.now(UTC)))
    del document["trace_id"]
    for _ in range(2):  # two equal messages
        replay_queue.put(json.dumps(document))
    replay = Replay(replay_queue, database, WAIT="1")
    replay("--until", now(), fault="taken", status=-9)  # so SQS delivers both again
    counts = replay("--until", now())
    assert (counts["restored"], counts["repeated"], counts["malformed"]) == (2, 2, 0)
    assert stored(database) == Counter({("iot/door", b"open"): 2})


def test_since_deletes_older_copies_unread(replay_queue: ReplayQueue, database: Database) -> None:
    outage_began = datetime.now(UTC) - timedelta(hours=10)
    for hours in (-12, -9, -3, 1):  # a row may be stored up to eight hours late
        replay_queue.put(copy("iot/door", b"%d" % hours, outage_began + timedelta(hours=hours)))
    replay = Replay(replay_queue, database, IOT_MQTT_SESSION_EXPIRY_SECONDS="3600")
    counts = replay("--since", outage_began.isoformat())
    assert (counts["unread"], counts["restored"]) == (2, 2)
    assert database.payloads() == [b"-3", b"1"]
    assert replay_queue.size() == 0


def test_missing_partitions_are_created(replay_queue: ReplayQueue, database: Database) -> None:
    """They can be missing after a restore, or after an outage into the next month."""
    month_ago = datetime.now(UTC) - timedelta(days=35)
    replay_queue.put(copy("iot/door", b"old", month_ago))
    assert Replay(replay_queue, database)("--until", now())["restored"] == 1


def test_refused_rows_become_dead_letters(
    replay_queue: ReplayQueue, broker: Mosquitto, database: Database, make_collector: MakeCollector
) -> None:
    """A copy of an existing dead letter counts as stored."""
    database.query("ALTER TABLE messages ADD CHECK (payload <> 'bad')")
    collector = make_collector(broker, database).start()
    publish(broker, [("iot/door", b"bad")])
    collector.wait_settled(1)
    replay_queue.publish([("iot/door", b"bad")] * 2 + [("iot/door", b"good")])
    counts = Replay(replay_queue, database)("--until", now())
    assert counts["dead letters"] == counts["stored already"] == counts["restored"] == 1
    assert [letter.payload for letter in database.dead_letters()] == [b"bad", b"bad"]
    assert database.payloads() == [b"good"]


MALFORMED = {
    "not json": "it is not JSON",
    "[]": "it is not a JSON object",
    "{}": "topic is missing",
    '{"trace_id":"","topic":"a","received_ms":1700000000000}': "trace_id is not",
    '{"trace_id":null,"topic":"a","received_ms":1700000000000}': "trace_id is not",
    '{"trace_id":"t","topic":"a\\u0000","received_ms":1795572115891}': "topic is missing",
    '{"trace_id":"t","topic":"\\ud800","received_ms":1795572115891}': "it is not JSON",
    '{"trace_id":"t","topic":"a","received_ms":true}': "received_ms is missing",
    '{"trace_id":"t","topic":"a","received_ms":17955721158910000}': "received_ms is missing",
    '{"trace_id":"t","topic":"a","received_ms":1700000000000,"payload":"?"}': "not base64",
    '{"trace_id":"t","topic":"a","received_ms":1700000000000,"payload":7}': "not base64",
}


@pytest.mark.parametrize("body", MALFORMED)
def test_malformed_copy_is_refused(body: str) -> None:
    with pytest.raises(ValueError, match=MALFORMED[body]):
        parse(body, "id")


def test_malformed_copies_stay_in_the_queue(replay_queue: ReplayQueue, database: Database) -> None:
    replay_queue.put("not json")
    replay_queue.put("{}")
    replay_queue.publish([("iot/door", b"a"), ("iot/door", b"")])
    replay = Replay(replay_queue, database)
    counts = replay("--until", now(), status=1)
    assert (counts["malformed"], counts["restored"]) == (2, 2)
    assert re.search(r"[-0-9a-f]{36}: it is not JSON", replay.output)
    assert replay_queue.size() == 2
    assert Counter(database.payloads()) == Counter([b"a", b""])


def test_empty_queue_restores_nothing(replay_queue: ReplayQueue, database: Database) -> None:
    counts = Replay(replay_queue, database)()
    assert not any(counts.values())


def test_replay_can_be_repeated_after_credentials_expire(
    make_account: Callable[[], Emulator], database: Database
) -> None:
    replay_queue = ReplayQueue(with_rules(make_account()), "replay")
    messages = make_messages(0, 200)
    replay_queue.publish(messages)
    replay = Replay(replay_queue, database, WAIT="1")
    replay_queue.account.scenario(expired_after="sqs:DeleteMessageBatch")
    replay("--until", now(), status=4)
    assert "when calling the DeleteMessageBatch operation" in replay.output
    assert "the AWS credentials are expired or wrong: renew them" in replay.output
    assert "Nothing is lost. Run `iot-collector replay` again" in replay.output
    assert database.count("replay_copies") > 0
    replay_queue.account.scenario()
    replay("--until", now())
    assert stored(database) == Counter(messages)


def test_unusable_queue_is_explained(replay_queue: ReplayQueue, database: Database) -> None:
    replay = Replay(replay_queue, database, IOT_REPLAY_QUEUE=f"{ARN}-other")
    replay(status=4)
    assert f"check the name, account and region of {ARN}-other" in replay.output
    replay = Replay(replay_queue, database, AWS_ENDPOINT_URL="http://127.0.0.1:9")
    replay(status=4)
    assert "check the AWS credentials, and the network route to AWS" in replay.output
    replay.settings |= {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    replay(status=4)
    assert "Unable to locate credentials" in replay.output


def test_wrong_settings_and_options_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def output(*options: str, **settings: str) -> str:
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        done = CliRunner().invoke(main, ["replay", *options])
        assert done.exit_code == 2, done.output
        return str(done.output)

    assert "IOT_REPLAY_QUEUE: is not set" in output()
    assert "not the ARN of an SQS standard queue" in output(IOT_REPLAY_QUEUE="iot-system-replay")
    assert "not the ARN of an SQS standard queue" in output(IOT_REPLAY_QUEUE=f"{ARN}.fifo")
    one = {"IOT_REPLAY_QUEUE": ARN}
    assert "not a time such as" in output("--since", "yesterday", **one)
    assert "in the future" in output("--until", "2100-01-01", **one)
    assert "--since is not before --until" in output(
        "--since", "2026-02-02", "--until", "2026-02-01", **one
    )


@pytest.mark.parametrize(
    ("code", "operation", "message"),
    [
        ("AccessDenied", "ReceiveMessage", "need permission for sqs:ReceiveMessage on the-queue"),
        ("AccessDeniedException", "ReceiveMessage", "need permission for sqs:ReceiveMessage on"),
        ("AccessDenied", "AssumeRoleWithWebIdentity", "the trust policy of that role"),
        ("ExpiredToken", "ReceiveMessage", "renew them"),
        ("QueueDoesNotExist", "ReceiveMessage", "account and region of the-queue"),
        ("InternalError", "ReceiveMessage", "sqs:ReceiveMessage on the-queue failed"),
    ],
)
def test_errors_of_aws_are_explained(code: str, operation: str, message: str) -> None:
    with (
        pytest.raises(aws.AwsError, match=message),
        aws.explained("sqs:ReceiveMessage", "the-queue"),
    ):
        raise ClientError({"Error": {"Code": code, "Message": "no"}}, operation)


def test_replay_continues_after_lost_database_connections(
    replay_queue: ReplayQueue, database: Database, make_proxy: Callable[[int], Proxy]
) -> None:
    messages = make_messages(0, 300)
    replay_queue.publish(messages)
    proxy = make_proxy(database.server.port)
    url = database.url.replace(str(database.server.port), str(proxy.port))
    replay = Replay(replay_queue, database, IOT_DATABASE_URL=url)
    cuts: list[Any] = []

    def cut(_wire: object, data: bytes) -> None:
        if len(cuts) < 3 and (b"INSERT INTO replay_copies" in data or b"UPDATE" in data):
            cuts.append(time.monotonic())
            proxy.down = "lose"  # the answer of the database is lost
        else:
            proxy.down = "pass"

    proxy.on_up = cut
    replay("--until", now())
    assert len(cuts) == 3
    assert stored(database) == Counter(messages)
    assert "database is not usable, will retry" in replay.output


def test_check_includes_the_replay_queue(
    replay_queue: ReplayQueue, broker: Mosquitto, database: Database
) -> None:
    replay_queue.publish([("iot/door", b"a")])
    settings = Replay(replay_queue, database).settings | broker.environment()
    done = run_command("check", **settings)
    assert done.returncode == 0, done.stdout
    assert f"ok    replay queue {replay_queue.arn}: about 1 copies" in done.stdout
    done = run_command("check", **(settings | {"IOT_REPLAY_QUEUE": ARN}))
    assert done.returncode == 16
    assert f"check the name, account and region of {ARN}" in done.stdout


def test_second_replay_at_the_same_time_is_refused(
    replay_queue: ReplayQueue, database: Database
) -> None:
    with contextlib.closing(database.connect()) as other, other.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(hashtext('iot.replay'))")
        replay = Replay(replay_queue, database)
        replay(status=1)
    assert "another `iot-collector replay` is running" in replay.output


# --- matching copies and rows

HOUR = 3600.0


def test_each_row_matches_one_copy() -> None:
    assert missing([1.0, 2.0], [1.1], HOUR) == {1}
    assert missing([1.0, 2.0], [2.1], HOUR) == {0}
    assert missing([1.0, 2.0], [1.9], HOUR) == {0}, "the collector's clock may be behind"
    assert missing([1.0], [1.0 + HOUR + 1], HOUR) == {0}
    assert missing([1000.0], [1000.0 - 61], HOUR) == {0}
    assert missing([1.0, 2.0], [HOUR, HOUR], HOUR) == set()
    assert missing([], [1.0], HOUR) == set()


@given(
    st.lists(st.tuples(st.booleans(), st.floats(-0.3, 0.4)), max_size=60),
    st.sampled_from([1.0, 10.0]),
)
def test_equal_messages_at_regular_times(copies: list[tuple[bool, float]], every: float) -> None:
    """The copies without a row are found by time, although all messages are equal."""
    times = [10_000 + i * every for i in range(len(copies))]
    rows = [at + late for at, (is_stored, late) in zip(times, copies, strict=True) if is_stored]
    lost = {i for i, (is_stored, _) in enumerate(copies) if not is_stored}
    assert missing(times, rows, HOUR) == lost


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_equal_messages_from_a_session(live: int, lost: int, queued: int) -> None:
    """Queued messages are stored later, 10 a second. The number of missing messages is right."""
    times = [10_000.0 + i for i in range(live + lost + queued)]
    back = 10_000.0 + live + lost + queued
    rows = [at + 0.05 for at in times[:live]] + [back + i / 10 for i in range(queued)]
    assert len(missing(times, rows, HOUR)) == lost
