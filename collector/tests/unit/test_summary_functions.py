"""The summaries: latest values, topics and rollups agree with the messages."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

import pytest
from iot_collector.dead_letter_commands import retry
from iot_collector.migrate import migrations
from iot_collector.settings import Settings

from testing.postgres import Database

START = datetime(2026, 3, 1, 10, 0, tzinfo=UTC)  # the summaries start here
LATEST = "SELECT topic, name, time, value, text FROM latest ORDER BY 1, 2"
TRUE_LATEST = (
    "SELECT DISTINCT ON (topic, name) topic, name, time, value, text FROM readings"
    " ORDER BY topic, name, time DESC, id DESC"
)
ROLLUP = (
    "SELECT topic, name, time, count, round(average::numeric, 6), minimum, maximum"
    " FROM readings_by_{0} ORDER BY 1, 2, 3"
)
TRUE_ROLLUP = (
    "SELECT topic, name, date_trunc('{0}', time, 'UTC'), count(value), round(avg(value), 6),"
    " min(value)::float8, max(value)::float8 FROM readings WHERE value IS NOT NULL"
    " GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
)
TOPICS = "SELECT topic, first_seen, last_seen, messages FROM topics ORDER BY 1"
TRUE_TOPICS = (
    "SELECT topic, min(received_at), max(received_at), count(*) FROM messages"
    " WHERE NOT retained GROUP BY 1 ORDER BY 1"
)
INSERT = (
    "INSERT INTO messages (received_at, topic, payload, fields, qos, retained)"
    " VALUES (%s, %s, '', %s, 1, %s)"
)


@pytest.fixture
def summaries(database: Database) -> Database:
    database.query("SELECT ensure_partitions(%s, 0)", START)
    database.query("UPDATE summary_progress SET processed_until = %s", START)
    return database


def store(
    database: Database, seconds: float, topic: str, fields: str, retained: bool = False
) -> None:
    database.query(INSERT, START + timedelta(seconds=seconds), topic, fields, retained)


def update(database: Database, seconds: float, client: str = "a") -> float:
    """Update by a client that has stored all its messages up to ``seconds`` after START.

    :returns: by how many seconds the summaries are behind.
    """
    bound = START + timedelta(seconds=seconds)
    behind: float = database.query("SELECT update_summaries(%s, %s)", client, bound)[0][0]
    return behind


def update_fully(database: Database, seconds: float) -> None:
    for _ in range(1000):
        if update(database, seconds) <= 0:
            return
    pytest.fail("the summaries are never up to date")


def assert_equal_to_messages(database: Database) -> None:
    assert database.query(LATEST) == database.query(TRUE_LATEST)
    assert database.query(TOPICS) == database.query(TRUE_TOPICS)
    for unit in ("minute", "hour"):
        kept, true = ROLLUP.format(unit), TRUE_ROLLUP.format(unit)
        assert database.query(kept) == database.query(true)


def random_message(rng: random.Random) -> tuple[str, str]:
    name, value = rng.choice("xy"), rng.choice((1, -2.5, 0.001, 7))
    return f"t/{rng.randrange(3)}", f'{{"{name}": {value}, "on": true, "s": "é"}}'


def test_summaries_equal_the_messages(summaries: Database) -> None:
    """The messages arrive in order of time, with pauses of up to a quarter of an hour."""
    rng, seconds = random.Random(1), 0.0
    for _ in range(40):
        for _ in range(rng.randrange(6)):
            store(summaries, seconds, *random_message(rng))
            seconds += rng.choice((0, 1, 70, 900))
        update(summaries, seconds)
    update_fully(summaries, seconds + 1)
    assert_equal_to_messages(summaries)


def test_late_messages_are_summarized(summaries: Database) -> None:
    """A collector counts as gone, and later stores old messages."""
    rng = random.Random(2)
    gone: list[tuple[float, str, str]] = []
    for seconds in range(0, 9000, 100):
        store(summaries, seconds, *random_message(rng))
        gone.append((seconds + 50, *random_message(rng)))
        if seconds == 3000:
            update(summaries, 0, "gone")
            summaries.query("UPDATE summary_bounds SET renewed_at = now() - interval '1 hour'")
        if seconds > 3000:
            update(summaries, seconds)
    update_fully(summaries, 9000)
    assert_equal_to_messages(summaries)
    for n, message in enumerate(gone):
        if n % 10 == 0:
            assert update(summaries, message[0], "gone") > 0
        store(summaries, *message)
    update(summaries, 9001, "gone")
    update_fully(summaries, 9001)
    # Late messages are not counted in topics.
    summaries.query("DELETE FROM topics")
    summaries.query(f"INSERT INTO topics {TRUE_TOPICS}")
    assert_equal_to_messages(summaries)


def test_retried_dead_letter_is_summarized(summaries: Database) -> None:
    store(summaries, 10, "t", '{"x": 1}')
    update_fully(summaries, 4000)
    summaries.query(
        "INSERT INTO dead_letters (received_at, topic, payload, qos, retained, reason, sqlstate)"
        " VALUES (%s, 't', '{\"x\": 5}', 1, false, '', '')",
        START + timedelta(seconds=20),
    )
    ((letter_id,),) = summaries.query("SELECT id FROM dead_letters")
    settings = Settings(database_url=summaries.url, database_password=summaries.password)
    assert list(retry(settings, [letter_id])) == [(letter_id, None)]
    update_fully(summaries, 4000)
    assert summaries.query("SELECT value FROM latest") == [(5,)]
    assert summaries.query("SELECT count, average FROM readings_by_hour") == [(2, 3.0)]


def test_summaries_wait_for_the_slowest_collector(summaries: Database) -> None:
    store(summaries, 5, "t", '{"x": 1}')
    update(summaries, 10, "slow")
    store(summaries, 20, "t", '{"x": 2}')
    update(summaries, 100, "fast")
    assert summaries.query(LATEST)[0][3] == 1
    store(summaries, 15, "u", '{"x": 3}')
    update(summaries, 100, "slow")
    update(summaries, 100, "fast")
    assert_equal_to_messages(summaries)


def test_late_collector_adds_each_hour_once(summaries: Database) -> None:
    update_fully(summaries, 9000)
    for _ in range(5):
        assert update(summaries, 60, "late") > 0
    assert summaries.query("SELECT count(*), count(DISTINCT hour) FROM summary_hours") == [(3, 3)]


def test_summaries_continue_after_a_clock_was_ahead(database: Database) -> None:
    now = database.query("SELECT now() - interval '1 minute'")[0][0]
    ahead = now + timedelta(days=365)
    for month in (now, ahead):
        database.query("SELECT ensure_partitions(%s, 1)", month)
    database.query("UPDATE summary_progress SET processed_until = %s", ahead)

    def update_until(bound: datetime) -> None:
        for _ in range(4):
            database.query("SELECT update_summaries('a', %s)", bound)

    database.query(INSERT, ahead, "ahead", '{"x": 5}', False)
    update_until(ahead + timedelta(seconds=2))
    assert database.query("SELECT topic FROM readings_by_hour") == [("ahead",)]
    database.query(INSERT, now, "t", '{"x": 1}', False)
    update_until(now + timedelta(seconds=2))
    database.query(INSERT, now + timedelta(seconds=3), "t", '{"x": 2}', False)
    update_until(now + timedelta(seconds=5))
    assert database.count("summary_hours") == 0
    hours = "SELECT topic, sum(count)::integer FROM readings_by_hour GROUP BY topic"
    assert database.query(hours) == [("t", 2)]
    assert database.query("SELECT value FROM latest WHERE topic = 't'") == [(2,)]
    # When the time comes, the message from the wrong clock is added again, once.
    database.query("UPDATE summary_progress SET processed_until = %s", ahead)
    update_until(ahead + timedelta(seconds=2))
    assert sorted(database.query(hours)) == [("ahead", 1), ("t", 2)]


def test_retained_messages_do_not_count_as_activity(summaries: Database) -> None:
    store(summaries, 1, "t", '{"x": 1}')
    store(summaries, 2, "t", '{"x": 1}', True)
    store(summaries, 3, "u", '{"x": 1}', True)
    update_fully(summaries, 10)
    assert_equal_to_messages(summaries)
    assert [row[:1] + row[3:] for row in summaries.query(TOPICS)] == [("t", 1)]


def test_names_too_long_for_the_index_are_left_out(summaries: Database) -> None:
    """The text is random, because PostgreSQL compresses index entries."""
    noise = "".join(map(chr, random.Random(3).choices(range(0x4E00, 0x9FFF), k=3000)))
    store(summaries, 1, "t", f'{{"{noise}": 1, "x": 2}}')
    store(summaries, 2, noise[:800], '{"x": 1}')
    store(summaries, 3, "t", '{"huge": 1e400, "tiny": 1e-400, "deep": [[{"x": -1e9999}]]}')
    update_fully(summaries, 10)
    assert summaries.query("SELECT topic, name FROM latest ORDER BY 1, 2") == [
        ("t", "deep[0][0].x"),
        ("t", "huge"),
        ("t", "tiny"),
        ("t", "x"),
    ]
    averages = summaries.query("SELECT average FROM readings_by_hour ORDER BY name")
    assert averages == [(-1e150,), (1e150,), (0.0,), (2.0,)]


def test_topic_that_missed_its_usual_intervals_is_silent(summaries: Database) -> None:
    summaries.query("SELECT ensure_partitions(now() - interval '1 day', 1)")
    summaries.query("UPDATE summary_progress SET processed_until = now() - interval '9 minutes'")
    for topic, interval, until in (("often", 1, 60), ("rarely", 60, 5), ("alive", 2, 1)):
        summaries.query(
            "INSERT INTO messages (received_at, topic, payload, qos, retained)"
            " SELECT now() - make_interval(secs => %s + %s * n), %s, '', 0, false"
            " FROM generate_series(1, 5) n",
            *(until, interval, topic),
        )
    summaries.query("SELECT update_summaries('a', now())")
    ((topic, interval, missed),) = summaries.query(
        "SELECT topic, usual_interval, intervals_missed FROM silent_topics"
    )
    assert (topic, interval) == ("often", timedelta(seconds=1))
    assert 60 < missed < 90
    count = "SELECT count_silent_topics(10), count_silent_topics(100)"
    assert summaries.query(count) == [
        (0, 0)
    ]  # topics that sent for only a few seconds do not count
    summaries.query("UPDATE topics SET first_seen = first_seen - interval '1 hour'")
    assert summaries.query(count) == [(1, 0)]


def test_single_pause_hardly_changes_the_usual_interval(summaries: Database) -> None:
    for seconds in (0, 10, 20, 30, 4000, 4010, 4020):
        store(summaries, seconds, "t", "{}")
        update_fully(summaries, seconds + 1)
    ((usual,),) = summaries.query("SELECT usual_seconds FROM topics")
    assert 10 < usual < 20


def test_minute_rollups_are_kept_a_month_and_hour_rollups_forever(summaries: Database) -> None:
    store(summaries, 1, "t", '{"x": 1}')
    update_fully(summaries, 10)
    later = START + timedelta(days=32)
    summaries.query("UPDATE summary_progress SET processed_until = %s", later)
    update_fully(summaries, timedelta(days=33).total_seconds())
    assert (summaries.count("readings_by_minute"), summaries.count("readings_by_hour")) == (0, 1)


def test_summaries_start_with_the_oldest_partition(
    own_database: Database,
) -> None:
    """When the migration runs on an existing database."""
    own_database.query("SELECT ensure_partitions('2026-01-01 00:00+00', 1)")
    sql = next(sql for name, sql in migrations() if name.endswith("_summaries"))
    start = sql[sql.index("INSERT INTO summary_progress") :].partition(";")[0]
    own_database.query("DELETE FROM summary_progress")
    own_database.query(start)
    assert own_database.query("SELECT processed_until FROM summary_progress") == [
        (datetime(2026, 1, 1, tzinfo=UTC),)
    ]
