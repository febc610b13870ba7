-- Summaries of messages and readings. The collectors keep them, some seconds behind: see
-- iot_collector/summaries.py, which calls update_summaries, and docs/queries.md.

-- Every topic. A message that the broker had retained is no sign of life, and is not counted.
CREATE TABLE topics (
    topic         text        PRIMARY KEY,
    first_seen    timestamptz NOT NULL,
    last_seen     timestamptz NOT NULL,
    messages      bigint      NOT NULL,
    usual_seconds float8      -- between two messages, of late; NULL until there were two
) WITH (fillfactor = 70);  -- room for new versions of a row on its page

-- The latest reading of every topic and name.
CREATE TABLE latest (
    topic text        NOT NULL,
    name  text        NOT NULL,
    time  timestamptz NOT NULL,
    value numeric,
    text  text        NOT NULL,
    PRIMARY KEY (topic, name)
) WITH (fillfactor = 70);

-- The numbers of readings by minute, for 31 days, and by hour, for ever.
CREATE TABLE readings_by_minute (
    topic   text        NOT NULL,
    name    text        NOT NULL,
    time    timestamptz NOT NULL,  -- the start of the minute
    count   bigint      NOT NULL,
    average float8      NOT NULL,
    minimum float8      NOT NULL,
    maximum float8      NOT NULL,
    PRIMARY KEY (topic, name, time)
) WITH (fillfactor = 70);
CREATE INDEX readings_by_minute_time ON readings_by_minute USING brin (time) WITH (autosummarize = on);

CREATE TABLE readings_by_hour (LIKE readings_by_minute INCLUDING STORAGE);
ALTER TABLE readings_by_hour ADD PRIMARY KEY (topic, name, time), SET (fillfactor = 70);

-- Topics that have sent nothing for longer than usual, the one that has missed most first.
CREATE VIEW silent_topics AS
SELECT topic, last_seen, messages, make_interval(secs => usual_seconds) AS usual_interval,
       extract(epoch FROM now() - last_seen)::float8 / greatest(usual_seconds, 1) AS intervals_missed
FROM topics
WHERE usual_seconds IS NOT NULL AND now() - last_seen > make_interval(secs => 2 * greatest(usual_seconds, 1))
ORDER BY intervals_missed DESC;

-- All messages received before this moment are in the summaries.
CREATE TABLE summary_progress (
    processed_until timestamptz NOT NULL
);
-- No message received before this moment is still to be stored by the collector.
CREATE TABLE summary_bounds (
    client_id  text        PRIMARY KEY,
    bound      timestamptz NOT NULL,
    renewed_at timestamptz NOT NULL
);
-- Hours that got a message after they were processed. They are processed again as a whole.
CREATE TABLE summary_hours (
    hour timestamptz NOT NULL
);

-- Start with the month of the oldest partition, or now where there is none.
INSERT INTO summary_progress
SELECT coalesce(min(substring(pg_get_expr(relpartbound, oid) FROM 'FROM \(''(.+?)''\)')::timestamptz), now())
FROM pg_inherits JOIN pg_class ON oid = inhrelid WHERE inhparent = 'messages'::regclass;

-- The usual seconds between messages, after some more came in this time. The last ten count most, and a
-- pause counts as ten intervals at most.
CREATE FUNCTION moving_average(usual float8, seconds float8, messages bigint) RETURNS float8
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN usual IS NULL THEN seconds / messages
        ELSE usual + (1 - 0.9 ^ least(messages, 100)) * (least(seconds / messages, 10 * greatest(usual, 1)) - usual) END
$$;

-- Add the messages received from from_time until before until_time to the summaries. Each moment has to
-- be added once. counted: these are added again, and are in the number of messages of their topics. What
-- is too long for an index is left out.
CREATE FUNCTION add_to_summaries(from_time timestamptz, until_time timestamptz, counted boolean) RETURNS void
LANGUAGE sql SET search_path FROM CURRENT SET jit = off SET work_mem = '32MB' AS $$
WITH seen AS (
    SELECT topic, min(received_at) AS first_seen, max(received_at) AS last_seen, count(*) AS messages
    FROM messages
    WHERE received_at >= from_time AND received_at < until_time AND NOT retained AND octet_length(topic) <= 2000
    GROUP BY topic
), new AS MATERIALIZED (
    SELECT time, id, topic, name, value, text,
           CASE WHEN abs(value) >= 1e-150 THEN least(greatest(value, -1e150), 1e150)::float8  -- JSON's have no limits
                WHEN value IS NOT NULL THEN 0 END AS number
    FROM readings
    WHERE time >= from_time AND time < until_time AND octet_length(topic) + octet_length(name) <= 2000
), in_topics AS (
    INSERT INTO topics AS old
    SELECT topic, first_seen, last_seen, messages,
           CASE WHEN messages > 1 THEN extract(epoch FROM last_seen - first_seen) / (messages - 1) END
    FROM seen ORDER BY topic
    ON CONFLICT (topic) DO UPDATE SET
        first_seen = least(old.first_seen, excluded.first_seen),
        last_seen = greatest(old.last_seen, excluded.last_seen),
        messages = old.messages + CASE WHEN counted THEN 0 ELSE excluded.messages END,
        usual_seconds = CASE WHEN excluded.last_seen <= old.last_seen THEN old.usual_seconds ELSE moving_average(
            old.usual_seconds, extract(epoch FROM excluded.last_seen - old.last_seen)::float8, excluded.messages) END
), in_latest AS (
    INSERT INTO latest AS old
    SELECT DISTINCT ON (topic, name) topic, name, time, value, text
    FROM new ORDER BY topic, name, time DESC, id DESC
    ON CONFLICT (topic, name) DO UPDATE SET time = excluded.time, value = excluded.value, text = excluded.text
    WHERE excluded.time >= old.time
), minutes AS MATERIALIZED (
    SELECT topic, name, date_trunc('minute', time) AS time, count(*) AS count, avg(number) AS average,
           min(number) AS minimum, max(number) AS maximum
    FROM new WHERE value IS NOT NULL
    GROUP BY 1, 2, 3
), in_minutes AS (
    INSERT INTO readings_by_minute AS old SELECT * FROM minutes ORDER BY 1, 2, 3
    ON CONFLICT (topic, name, time) DO UPDATE SET
        count = old.count + excluded.count,
        average = old.average + (excluded.average - old.average) * excluded.count / (old.count + excluded.count),
        minimum = least(old.minimum, excluded.minimum), maximum = greatest(old.maximum, excluded.maximum)
)
INSERT INTO readings_by_hour AS old
SELECT topic, name, date_trunc('hour', time, 'UTC'), sum(count), sum(average * count) / sum(count), min(minimum), max(maximum)
FROM minutes GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
ON CONFLICT (topic, name, time) DO UPDATE SET
    count = old.count + excluded.count,
    average = old.average + (excluded.average - old.average) * excluded.count / (old.count + excluded.count),
    minimum = least(old.minimum, excluded.minimum), maximum = greatest(old.maximum, excluded.maximum)
$$;

-- Have the hours of these times processed again, where they are already. For messages that are stored late.
CREATE FUNCTION summarize_again(from_time timestamptz, until_time timestamptz) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path FROM CURRENT AS $$
INSERT INTO summary_hours
SELECT hour FROM summary_progress,
    generate_series(date_trunc('hour', from_time, 'UTC'), least(until_time, processed_until), '1 hour') hour
WHERE hour < processed_until
$$;

-- Bring the summaries up to date, or a step nearer to it. Nothing of client_id is still to be stored that
-- was received before bound. Returns how many seconds the summaries are behind the bound, and hours that
-- are to be processed again. Several collectors may call it at once.
CREATE FUNCTION update_summaries(client_id text, bound timestamptz) RETURNS float8
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    from_time  timestamptz;
    until_time timestamptz;
    again      timestamptz;
BEGIN
    INSERT INTO summary_bounds AS b VALUES (update_summaries.client_id, update_summaries.bound, now())
    ON CONFLICT ON CONSTRAINT summary_bounds_pkey DO UPDATE SET bound = excluded.bound, renewed_at = excluded.renewed_at;
    IF pg_try_advisory_xact_lock(hashtext('iot.summaries')) THEN
        -- A collector that is gone is not waited for. If it comes back, it is late, see below.
        DELETE FROM summary_bounds b WHERE b.renewed_at < now() - interval '15 minutes';
        SELECT processed_until, (SELECT min(b.bound) FROM summary_bounds b) INTO from_time, until_time
        FROM summary_progress;
        IF until_time < from_time THEN
            PERFORM summarize_again(until_time, from_time);
        ELSE
            until_time := least(until_time, from_time + interval '10 minutes');
            PERFORM add_to_summaries(from_time, until_time, false);
            UPDATE summary_progress SET processed_until = until_time;
            IF date_trunc('day', from_time, 'UTC') < date_trunc('day', until_time, 'UTC') THEN
                DELETE FROM readings_by_minute WHERE time < until_time - interval '31 days';
            END IF;
            -- Deleted before the messages are read: one that is stored later adds its hour once more.
            SELECT hour INTO again FROM summary_hours LIMIT 1;
            IF again IS NOT NULL THEN
                DELETE FROM summary_hours WHERE hour = again;
                DELETE FROM readings_by_minute WHERE time >= again AND time < again + interval '1 hour';
                DELETE FROM readings_by_hour WHERE time = again;
                PERFORM add_to_summaries(again, least(again + interval '1 hour', until_time), true);
            END IF;
        END IF;
    END IF;
    RETURN extract(epoch FROM update_summaries.bound - (SELECT processed_until FROM summary_progress))
        + 3600 * (SELECT count(DISTINCT hour) FROM summary_hours);
END
$$;

-- How many topics have missed that many messages, of those that sent for more than an hour. After a week
-- of silence, they are taken for gone.
CREATE FUNCTION count_silent_topics(intervals float8) RETURNS bigint
LANGUAGE sql STABLE SECURITY DEFINER SET search_path FROM CURRENT AS $$
    SELECT count(*) FROM silent_topics JOIN topics USING (topic, last_seen)
    WHERE intervals_missed > intervals AND last_seen > now() - interval '7 days'
        AND last_seen - first_seen > interval '1 hour'
$$;

REVOKE EXECUTE ON FUNCTION count_silent_topics(float8) FROM PUBLIC;
REVOKE EXECUTE ON FUNCTION summarize_again(timestamptz, timestamptz) FROM PUBLIC;
REVOKE EXECUTE ON FUNCTION update_summaries(text, timestamptz) FROM PUBLIC;
REVOKE EXECUTE ON FUNCTION add_to_summaries(timestamptz, timestamptz, boolean) FROM PUBLIC;
