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
