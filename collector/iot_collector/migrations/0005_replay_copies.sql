-- Each copy that `iot-collector replay` has taken from the replay queue. Topic and payload are there
-- until it is settled, which means that the message is in messages or a table of dead letters. The
-- rest is kept for some days: SQS may deliver a copy again, and the next run compares with it.
CREATE TABLE replay_copies (
    trace_id    text        PRIMARY KEY,  -- IoT Core's id of the message
    received_at timestamptz NOT NULL,     -- when IoT Core received the message
    digest      bytea       NOT NULL,     -- SHA-256 of topic, NUL and payload
    named       boolean     NOT NULL,     -- whether the payload has an id (IOT_MESSAGE_ID_KEY)
    topic       text,
    payload     bytea
);

COMMENT ON TABLE replay_copies IS 'What iot-collector replay took from the queue, see docs/replay.md';
