-- A database of the first release: its four migrations as they were then, and rows in every table. It stays as it is:
-- test_migrate.py brings it up to date with the migrations of today.
CREATE TABLE schema_migrations (
    name       text        PRIMARY KEY,
    applied_at timestamptz NOT NULL DEFAULT now()
);
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
INSERT INTO schema_migrations (name) VALUES ('0001_messages');
-- The packets of each committed batch, written in the transaction of the batch. They tell which
-- messages that the broker sends again are stored, and whether a COMMIT took place whose answer was
-- lost (docs/adr/0001-packet-id-ledger.md). Only the last rows are kept.
CREATE TABLE ledger (
    client_id text   NOT NULL,
    seq       bigint NOT NULL,
    writer    uuid   NOT NULL,  -- the process that wrote it
    packets   bytea  NOT NULL,  -- all packet ids (uint16), then all checksums (uint32)
    PRIMARY KEY (client_id, seq)
);

-- The topic filters that the broker's session of each client id is subscribed to. The session outlives
-- the process, so this is how a filter is noticed that is no longer in the settings.
CREATE TABLE sessions (
    client_id text   PRIMARY KEY,
    filters   text[] NOT NULL
);
INSERT INTO schema_migrations (name) VALUES ('0002_ledger');
-- The ids that devices give their messages (IOT_MESSAGE_ID_KEY), to store each message once however
-- often it is published. They are deleted after some days, see iot_collector/message_ids.py.
CREATE TABLE message_ids (
    id        text        PRIMARY KEY,
    stored_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX message_ids_stored_at ON message_ids USING brin (stored_at);
INSERT INTO schema_migrations (name) VALUES ('0003_message_ids');
-- Messages that dead_letters refuses because of a constraint or trigger that somebody added to it.
-- This table has no constraints, so the messages after such a message do not have to wait.
CREATE TABLE dead_letters_fallback (
    received_at timestamptz,
    topic       bytea,
    payload     bytea,
    properties  bytea,
    qos         smallint,
    retained    boolean,
    reason      text,  -- why messages refused it, with its SQLSTATE
    sqlstate    text,
    refusal     text,  -- why dead_letters refused it
    stored_at   timestamptz DEFAULT now()
);

COMMENT ON TABLE dead_letters_fallback IS 'Messages that messages and dead_letters both refused';
INSERT INTO schema_migrations (name) VALUES ('0004_dead_letters_fallback');

SELECT ensure_partitions('2026-01-01 00:00+00', 3);
INSERT INTO messages (received_at, topic, payload, fields, properties, qos, retained) VALUES
    ('2026-01-31 23:59:59.999999+00', 'iot/data', 'temperature:23', '{"temperature": 23}', NULL, 1, false),
    ('2026-02-01 00:00:00+00', 'plant/größe/☃', '\x00ff5c4e', NULL, '{"user": {"a": ["1", "2"]}}', 2, true),
    ('2026-02-28 12:00:00.000001+00', 'iot/data', '', NULL, NULL, 0, false),
    ('2026-03-01 00:00:00+00', 'a', '{"n": 1.50, "s": "\\u2603"}', '{"n": 1.50, "s": "☃"}', NULL, 1, false);
INSERT INTO dead_letters (received_at, topic, payload, properties, qos, retained, reason, sqlstate, stored_at) VALUES
    ('2026-02-03 04:05:06+00', '\x61ff', '\x0001', NULL, 1, false, 'invalid byte sequence', '22021',
     '2026-02-03 04:05:07+00');
INSERT INTO dead_letters_fallback VALUES
    ('2026-02-03 04:05:06+00', 'a', '\x00', NULL, 1, false, 'refused', '23514', 'refused as well', '2026-02-03 04:05:07+00');
INSERT INTO ledger VALUES ('iot-collector-0', 41, '00000000-0000-0000-0000-000000000001', '\x000100020000000100000002');
INSERT INTO sessions VALUES ('iot-collector-0', '{iot/data,plant/+/telemetry}');
INSERT INTO message_ids VALUES ('device-1/1', '2026-02-03 04:05:07+00');
