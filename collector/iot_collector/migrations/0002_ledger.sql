-- Which packets each committed batch covered, written in the batch's own transaction. It tells
-- whether a COMMIT whose answer was lost took place, and which messages the broker sends again
-- although they are stored (docs/adr/0001-packet-id-ledger.md). Only the last rows are kept.
CREATE TABLE ledger (
    client_id text   NOT NULL,
    seq       bigint NOT NULL,
    writer    uuid   NOT NULL,  -- the process that wrote it
    packets   bytea  NOT NULL,  -- all packet ids (uint16), then all checksums (uint32)
    PRIMARY KEY (client_id, seq)
);

-- What the broker's session of each client id is subscribed to, so that a filter taken out of
-- the settings is unsubscribed from, although the session outlives the process.
CREATE TABLE sessions (
    client_id text   PRIMARY KEY,
    filters   text[] NOT NULL
);
