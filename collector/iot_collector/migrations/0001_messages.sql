-- Every message as it was received. One partition per month (UTC), created ahead. There is no DEFAULT
-- partition: rows in it would prevent the creation of the partition that they belong to.
CREATE TABLE messages (
    id          bigint      NOT NULL GENERATED ALWAYS AS IDENTITY (CACHE 1000),
    received_at timestamptz NOT NULL,
    topic       text        NOT NULL,
    payload     bytea       NOT NULL,
    fields      jsonb,      -- {"temperature": 23} for temperature:23; a flat JSON object unchanged
    properties  jsonb,      -- MQTT 5 properties, when the message had any
    qos         smallint    NOT NULL,
    retained    boolean     NOT NULL
) PARTITION BY RANGE (received_at);

-- Rows arrive in the order of time, so a block-range index is small and still skips most blocks.
-- Without autosummarize, a query would read all rows since the last VACUUM.
CREATE INDEX messages_received_at ON messages USING brin (received_at) WITH (autosummarize = on);
CREATE INDEX messages_topic ON messages (topic, received_at DESC);

COMMENT ON TABLE messages IS 'Every message received from the MQTT broker';

-- Messages that PostgreSQL refused to store in messages. Topic and payload are raw bytes, so that
-- anything fits and can be published again after the cause is fixed.
CREATE TABLE dead_letters (
    id          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    received_at timestamptz NOT NULL,
    topic       bytea       NOT NULL,
    payload     bytea       NOT NULL,
    properties  bytea,
    qos         smallint    NOT NULL,
    retained    boolean     NOT NULL,
    reason      text        NOT NULL,
    sqlstate    text        NOT NULL,
    stored_at   timestamptz NOT NULL DEFAULT now()
);

-- One row for each number in fields, for people and dashboards.
CREATE VIEW readings AS
SELECT m.received_at AS time, m.topic, f.key AS name, (f.value #>> '{}')::numeric AS value
FROM messages m, jsonb_each(m.fields) f
WHERE jsonb_typeof(f.value) = 'number';

-- Create the partitions from the month of from_time to months_ahead months later; return how many
-- were missing. SECURITY DEFINER, so that the collector needs the right to INSERT and not to own the table.
CREATE FUNCTION ensure_partitions(from_time timestamptz, months_ahead integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    first_month timestamp := date_trunc('month', from_time AT TIME ZONE 'UTC');
    month       timestamp;
    made        integer := 0;
BEGIN
    -- Two collectors may need the same partition at once: they take turns.
    PERFORM pg_advisory_xact_lock(hashtext('iot.ensure_partitions'));
    FOR month IN SELECT first_month + make_interval(months => n) FROM generate_series(0, months_ahead) n
    LOOP
        IF to_regclass('messages_' || to_char(month, 'YYYY_MM')) IS NULL THEN
            EXECUTE format(
                'CREATE TABLE %I PARTITION OF messages FOR VALUES FROM (%L) TO (%L)',
                'messages_' || to_char(month, 'YYYY_MM'),
                month AT TIME ZONE 'UTC',
                (month + interval '1 month') AT TIME ZONE 'UTC');
            made := made + 1;
        END IF;
    END LOOP;
    RETURN made;
END
$$;

-- By default anyone may call a function, which is not wanted of one that runs as its owner.
REVOKE EXECUTE ON FUNCTION ensure_partitions(timestamptz, integer) FROM PUBLIC;
