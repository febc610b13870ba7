-- What dead_letters refuses because of a constraint or trigger that somebody put on it. The message
-- is safe here, and the messages after it do not have to wait. No constraints: nothing is refused.
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
