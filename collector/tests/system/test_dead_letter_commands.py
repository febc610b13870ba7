"""``iot-collector dead-letters``, against a real PostgreSQL."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from testing.collector import clean_environment, iot_collector, run_command
from testing.postgres import Database, Row

# All byte values, escapes of COPY's text format, and invalid UTF-8.
NASTY = bytes(range(256)) + b"\\N\t\\.\r\n\xff"
MOMENT = datetime(2019, 3, 31, 1, 59, 59, 123_457, tzinfo=UTC)  # no partition exists for it

INSERT = (
    "INSERT INTO dead_letters"
    " (received_at, topic, payload, properties, qos, retained, reason, sqlstate)"
    " VALUES (%s, %s, %s, %s, %s, %s, 'old reason', '23514') RETURNING id"
)


def add_dead_letter(
    database: Database,
    payload: bytes = b"temperature:23",
    *,
    topic: bytes = b"iot/data",
    properties: bytes | None = None,
    qos: int = 1,
    retained: bool = False,
) -> int:
    [(letter_id,)] = database.query(INSERT, MOMENT, topic, payload, properties, qos, retained)
    return int(letter_id)


def dead_letters(database: Database, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run_command("dead-letters", *map(str, arguments), **database.environment())


def test_retry_stores_the_message_unchanged_and_once(database: Database) -> None:
    properties = b'{"user": {"a": ["1", "2"]}, "content_type": "x"}'
    first = add_dead_letter(
        database, NASTY, topic="größe/\u2603".encode(), properties=properties, qos=2
    )
    second = add_dead_letter(database, b"temperature:23", retained=True)
    done = dead_letters(database, "retry", first, second)
    assert (done.returncode, done.stdout) == (0, "2 stored, 0 refused again\n"), done.stderr
    assert database.rows() == [
        Row(
            "größe/\u2603", NASTY, 2, False, None, {"user": {"a": ["1", "2"]}, "content_type": "x"}
        ),
        Row("iot/data", b"temperature:23", 1, True, {"temperature": 23}, None),
    ]
    assert database.query("SELECT DISTINCT received_at FROM messages") == [(MOMENT,)]
    assert database.count("dead_letters") == 0
    again = dead_letters(database, "retry", first)
    assert (again.returncode, again.stdout) == (1, "")
    assert f"there is no dead letter {first}" in again.stderr


def test_message_refused_again_gets_the_new_reason(database: Database) -> None:
    bad, good = add_dead_letter(database, b"poison"), add_dead_letter(database, b"fine")
    database.query("ALTER TABLE messages ADD CONSTRAINT no_poison CHECK (payload <> 'poison')")
    done = dead_letters(database, "retry", "--all")
    assert (done.returncode, done.stdout) == (1, "1 stored, 1 refused again\n")
    assert f"{bad}: refused again: " in done.stderr
    assert "no_poison" in done.stderr
    assert database.payloads() == [b"fine"]
    [(letter_id, payload, reason)] = database.query("SELECT id, payload, reason FROM dead_letters")
    assert (letter_id, bytes(payload)) == (bad, b"poison")
    assert "no_poison" in reason
    assert good != bad


def test_retry_leaves_out_fields_that_jsonb_refuses(database: Database) -> None:
    """The collector does the same: jsonb refuses the number, but the message is stored."""
    add_dead_letter(database, b'{"a": 1e200000}')
    assert dead_letters(database, "retry", "--all").returncode == 0
    assert database.rows() == [Row("iot/data", b'{"a": 1e200000}', 1, False, None, None)]


def test_concurrent_retries_store_each_message_once(database: Database) -> None:
    for n in range(30):
        add_dead_letter(database, b"n:%d" % n)
    with ThreadPoolExecutor(3) as pool:
        done = [pool.submit(dead_letters, database, "retry", "--all") for _ in range(3)]
    assert {future.result().returncode for future in done} == {0}
    assert sorted(database.payloads()) == sorted(b"n:%d" % n for n in range(30))
    assert database.count("dead_letters") == 0


def test_show_escapes_control_characters(database: Database) -> None:
    letter = add_dead_letter(database, NASTY, topic=b"a\x1b[31m\xff")
    raw = subprocess.run(
        [iot_collector(), "dead-letters", "show", "--raw", str(letter)],
        env=clean_environment() | database.environment(),
        capture_output=True,
        check=True,
    )
    assert raw.stdout == NASTY
    shown = dead_letters(database, "show", letter)
    assert shown.returncode == 0, shown.stderr
    assert "2019-03-31T01:59:59.123457+00:00" in shown.stdout
    assert "old reason" in shown.stdout
    assert r"a\x1b[31m\xff" in shown.stdout
    assert "\x1b" not in shown.stdout
    assert "there is no dead letter 99" in dead_letters(database, "show", 99).stderr


def test_list_shows_the_newest_dead_letters(database: Database) -> None:
    assert dead_letters(database, "list").stdout.startswith("0 of 0 dead letters")
    for n in range(3):
        add_dead_letter(database, b"x" * (1000 + n))
    database.query("INSERT INTO dead_letters_fallback (reason) VALUES ('x')")
    done = dead_letters(database, "list", "--limit", 2)
    assert done.returncode == 0, done.stderr
    assert "1002" in done.stdout
    assert "1001" in done.stdout
    assert "1000" not in done.stdout
    assert "2 of 3 dead letters" in done.stdout
    assert "1 more messages are in dead_letters_fallback" in done.stdout


def test_purge_asks_for_confirmation(database: Database) -> None:
    first, second = add_dead_letter(database), add_dead_letter(database)
    asked = dead_letters(database, "purge", first)  # stdin is empty
    assert asked.returncode == 1
    assert "Delete 1 dead letters for good?" in asked.stdout + asked.stderr
    assert database.count("dead_letters") == 2
    done = dead_letters(database, "purge", first, "--yes")
    assert (done.returncode, done.stdout) == (0, "1 deleted\n")
    assert database.query("SELECT id FROM dead_letters") == [(second,)]
    assert dead_letters(database, "purge", "--all", "--yes").stdout == "1 deleted\n"


@pytest.mark.parametrize("command", ["retry", "purge"])
def test_command_needs_either_ids_or_all(command: str, database: Database) -> None:
    for arguments in ([], ["1", "--all"]):
        done = dead_letters(database, command, *arguments)
        assert done.returncode == 2
        assert "give the ids of dead letters, or --all" in done.stderr


def test_database_error_is_explained(database: Database) -> None:
    settings = {**database.environment(), "IOT_DATABASE_PASSWORD": "wrong"}
    done = run_command("dead-letters", "retry", "--all", **settings)
    assert done.returncode == 1
    assert "IOT_DATABASE_PASSWORD_FILE" in done.stderr
    assert "Traceback" not in done.stderr
