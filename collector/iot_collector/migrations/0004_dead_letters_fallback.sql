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
