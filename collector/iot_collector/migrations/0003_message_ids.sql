-- The ids that devices give their messages (IOT_MESSAGE_ID_KEY), to store each message once however
-- often it is published. They are deleted after some days, see iot_collector/message_ids.py.
CREATE TABLE message_ids (
    id        text        PRIMARY KEY,
    stored_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX message_ids_stored_at ON message_ids USING brin (stored_at);
