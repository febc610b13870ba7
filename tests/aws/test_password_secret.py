"""``IOT_DATABASE_PASSWORD_SECRET``: a database password in Secrets Manager."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from iot_collector import aws, password_secret
from iot_collector.settings import SettingsError, load

from testing.aws.emulator import Emulator
from testing.collector import Collector
from testing.mosquitto import Mosquitto
from testing.postgres import Database
from testing.publisher import Stream
from testing.service import eventually

FIRST, SECOND = "first-password", "second-password"
NUMBERS = itertools.count()
READ = "secretsmanager:GetSecretValue"


@pytest.fixture(scope="module")
def account(make_account: Callable[[], Emulator]) -> Emulator:
    return make_account()


@pytest.fixture
def secret(account: Emulator) -> str:
    """The ARN of a secret with the JSON that RDS uses."""
    made = account.client("secretsmanager").create_secret(
        Name=f"secret-{next(NUMBERS)}", SecretString=rds_secret(FIRST)
    )
    return str(made["ARN"])


@pytest.fixture
def user(database: Database) -> Iterator[Database]:
    """The database with a user whose password can be changed."""
    role = f"{database.name}_rotated"
    database.query(f"CREATE ROLE {role} LOGIN SUPERUSER PASSWORD '{FIRST}'")
    yield Database(database.server, database.name, role, FIRST)
    database.query(f"ALTER ROLE {role} NOLOGIN")


def rds_secret(password: str) -> str:
    return json.dumps({"username": "collector", "password": password, "port": 5432})


def reads(account: Emulator) -> int:
    """The number of GetSecretValue calls."""
    return [call.action for call in account.calls()].count(READ)


def test_messages_are_stored_once_while_the_password_is_rotated(
    account: Emulator,
    secret: str,
    user: Database,
    database: Database,
    broker: Mosquitto,
    make_collector: Callable[..., Collector],
) -> None:
    """First the secret changes before the database, then the database before the secret."""
    before = reads(account)
    collector = make_collector(
        broker,
        user,
        **account.environment,
        IOT_DATABASE_PASSWORD="",
        IOT_DATABASE_PASSWORD_SECRET=secret,
    ).start()
    pid = collector.pid
    manager = account.client("secretsmanager")

    def rotate_database(password: str) -> None:
        database.query(f"ALTER ROLE {user.user} PASSWORD '{password}'")

    with Stream(broker) as stream:
        stream.more(100)
        for _ in range(3):
            terminate_and_reconnect(user, database, collector)
        assert reads(account) - before == 1, "a valid password is not read again"

        manager.put_secret_value(SecretId=secret, SecretString=rds_secret(SECOND))
        terminate_and_reconnect(user, database, collector)
        assert reads(account) - before == 1
        rotate_database(SECOND)
        terminate_and_reconnect(user, database, collector)
        assert reads(account) - before == 2

        rotate_database(FIRST)
        terminate_sessions(user, database)
        stream.more(100)
        eventually(
            lambda: "authentication" in str(collector.health()["database"]["error"]),
            what="the old password is refused",
        )
        before_update = reads(account)
        manager.put_secret_value(SecretId=secret, SecretString=rds_secret(FIRST))
        collector.wait_ready()
        assert reads(account) > before_update
        acknowledged = stream.finish()
    collector.wait_settled(len(acknowledged))
    assert Counter(database.payloads()) == Counter(acknowledged), "each message once"
    assert collector.pid == pid
    assert collector.running
    assert FIRST not in collector.log()
    assert SECOND not in collector.log()


def sessions(user: Database, database: Database) -> set[int]:
    """The process ids of the collector's sessions."""
    found = database.query(
        "SELECT pid FROM pg_stat_activity WHERE usename = %s"
        " AND application_name = 'iot-collector'",
        user.user,
    )
    return {pid for (pid,) in found}


def terminate_sessions(user: Database, database: Database) -> set[int]:
    """Terminate the collector's sessions; return their process ids."""
    old = eventually(lambda: sessions(user, database), what="a session")
    database.query("SELECT pg_terminate_backend(pid) FROM unnest(%s) pid", list(old))
    return old


def terminate_and_reconnect(user: Database, database: Database, collector: Collector) -> None:
    """Terminate the collector's sessions, and wait until it is connected again."""
    old = terminate_sessions(user, database)
    eventually(lambda: sessions(user, database) - old, what="a new session")
    collector.wait_ready()


def test_collector_waits_for_a_missing_secret(
    account: Emulator,
    user: Database,
    broker: Mosquitto,
    make_collector: Callable[..., Collector],
) -> None:
    collector = make_collector(
        broker,
        user,
        **account.environment,
        AWS_REGION="eu-west-1",
        IOT_DATABASE_PASSWORD="",
        IOT_DATABASE_PASSWORD_SECRET="to-be-made",
    )
    collector.launch().wait_listening()
    error = eventually(
        lambda: str(collector.health()["database"]["error"]).partition("password: ")[2],
        what="the missing secret is reported",
    )
    assert "IOT_DATABASE_PASSWORD_SECRET: " in error
    assert "check the name, account and region of to-be-made" in error
    account.client("secretsmanager").create_secret(Name="to-be-made", SecretString=FIRST)
    collector.wait_ready()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{FIRST}\n", None),
        (rds_secret(FIRST), None),
        ('{"username": "secret-name"}', "key password is missing"),
        ('{"password": 12345}', "no text"),
    ],
)
def test_secret_may_be_text_or_json(
    text: str, said: str | None, account: Emulator, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in account.environment.items():
        monkeypatch.setenv(name, value)
    aws.client.cache_clear()
    account.client("secretsmanager").put_secret_value(SecretId=secret, SecretString=text)
    if said is None:
        assert password_secret.password(secret) == FIRST
    else:
        with pytest.raises(aws.AwsError, match=said) as caught:
            password_secret.password(secret)
        assert "secret-name" not in str(caught.value)
    aws.client.cache_clear()


def test_unreachable_endpoint_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    aws.client.cache_clear()
    with pytest.raises(aws.AwsError, match="the network route to AWS or to its VPC endpoint"):
        password_secret.password("arn:aws:secretsmanager:eu-west-1:111122223333:secret:x-AbCdEf")
    with pytest.raises(aws.AwsError, match="give its ARN, or set AWS_REGION"):
        password_secret.password("a-name")
    aws.client.cache_clear()


@pytest.mark.parametrize("other", ["", "_FILE"])
def test_secret_and_password_exclude_each_other(
    other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOT_DATABASE_PASSWORD_SECRET", "a-name")
    monkeypatch.setenv(f"IOT_DATABASE_PASSWORD{other}", "/dev/null")
    with pytest.raises(SettingsError, match="IOT_DATABASE_PASSWORD_SECRET: set only one of"):
        load()
