-- One file for both engines. Times are seconds since the epoch; (token_issuer, user_id) is one person, exact as the
-- issuer wrote it. No credential is ever stored, only its hash.
CREATE TABLE passes (
    pass_id           TEXT PRIMARY KEY,
    request_id        TEXT NOT NULL,
    token_issuer      TEXT NOT NULL,
    user_id           TEXT NOT NULL,
    agent_alias       TEXT NOT NULL,
    agent_id          TEXT NOT NULL,
    transport         TEXT NOT NULL,
    reserved_at       DOUBLE PRECISION NOT NULL,
    lapses_at         DOUBLE PRECISION NOT NULL,  -- from then on it is not open, whatever else is known
    seconds           BIGINT NOT NULL,            -- counted: set aside until settled, then really used
    granted_at        DOUBLE PRECISION,
    conversation_id   TEXT UNIQUE,
    credential_sha256 TEXT,
    settled_at        DOUBLE PRECISION,
    settled_by        TEXT,                       -- webhook, reconciler, lookup or expiry
    cost              BIGINT,                     -- in ElevenLabs' credits
    reported_user_id  TEXT                        -- what the browser told ElevenLabs
);
-- A limit is a question about one of these ranges; each index holds all that its question needs.
CREATE INDEX passes_of_user ON passes (token_issuer, user_id, reserved_at, seconds);
CREATE INDEX passes_of_agent ON passes (agent_alias, reserved_at, seconds);
CREATE INDEX passes_of_all ON passes (reserved_at, seconds);
CREATE INDEX open_of_user ON passes (token_issuer, user_id, lapses_at) WHERE settled_at IS NULL;
CREATE INDEX open_of_agent ON passes (agent_alias, lapses_at) WHERE settled_at IS NULL;
CREATE INDEX open_of_all ON passes (lapses_at) WHERE settled_at IS NULL;
CREATE INDEX reserved_only ON passes (lapses_at) WHERE granted_at IS NULL;
CREATE INDEX unsettled ON passes (reserved_at) WHERE settled_at IS NULL AND conversation_id IS NOT NULL;
-- A settlement that arrived before its pass, or for a conversation that was never issued here.
CREATE TABLE orphans (
    conversation_id TEXT PRIMARY KEY,
    arrived_at      DOUBLE PRECISION NOT NULL,
    seconds         BIGINT NOT NULL,
    cost            BIGINT,
    user_id         TEXT,
    source          TEXT NOT NULL
);
CREATE TABLE blocks (
    kind         TEXT NOT NULL,
    key          TEXT NOT NULL,
    token_issuer TEXT NOT NULL,
    blocked_at   DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (kind, key, token_issuer)
);
