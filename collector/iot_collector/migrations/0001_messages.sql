-- Everything a device sent, as it came. One partition a month (UTC), made ahead; there is no
-- DEFAULT partition, because rows that collect in one block the creation of the right one later.
CREATE TABLE messages (
    id          bigint      NOT NULL GENERATED ALWAYS AS IDENTITY (CACHE 1000),
    received_at timestamptz NOT NULL,
    topic       text        NOT NULL,
    payload     bytea       NOT NULL,
    fields      jsonb,      -- {"temperature": 23} for temperature:23, a flat JSON object as it is
    properties  jsonb,      -- MQTT 5 properties, when the message had any
    qos         smallint    NOT NULL,
    retained    boolean     NOT NULL
) PARTITION BY RANGE (received_at);

-- Rows arrive in time order, so a block-range index costs next to nothing and still skips blocks;
-- without autosummarize it would read all that came since the last vacuum.
CREATE INDEX messages_received_at ON messages USING brin (received_at) WITH (autosummarize = on);
CREATE INDEX messages_topic ON messages (topic, received_at DESC);

COMMENT ON TABLE messages IS 'Every message received from the MQTT broker';

-- What PostgreSQL refused to store in messages. Topic and payload are raw bytes, so that anything
-- fits and can be sent again once the cause is mended.
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

-- The numbers in messages, a row a number: what people and dashboards ask for.
CREATE VIEW readings AS
SELECT m.received_at AS time, m.topic, f.key AS name, (f.value #>> '{}')::numeric AS value
FROM messages m, jsonb_each(m.fields) f
WHERE jsonb_typeof(f.value) = 'number';

-- Make the partitions from from_time's month to months_ahead months later; return how many were
-- missing. SECURITY DEFINER, so that the collector needs INSERT only and not the table's ownership.
CREATE FUNCTION ensure_partitions(from_time timestamptz, months_ahead integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    first_month timestamp := date_trunc('month', from_time AT TIME ZONE 'UTC');
    month       timestamp;
    made        integer := 0;
BEGIN
    -- Two collectors that start at midnight of the first must not make one partition twice.
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

-- Anyone may call a function by default; one that runs as its owner is the exception.
REVOKE EXECUTE ON FUNCTION ensure_partitions(timestamptz, integer) FROM PUBLIC;
