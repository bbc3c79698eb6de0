-- One file for both engines. Times are seconds since the epoch. (token_issuer, user_id) is one person, exactly as the
-- issuer wrote it.
CREATE TABLE passes (
    pass_id           TEXT PRIMARY KEY,
    request_id        TEXT NOT NULL,
    token_issuer      TEXT NOT NULL,
    user_id           TEXT NOT NULL,
    agent_alias       TEXT NOT NULL,
    agent_id          TEXT NOT NULL,
    transport         TEXT NOT NULL,
    reserved_at       DOUBLE PRECISION NOT NULL,
    lapses_at         DOUBLE PRECISION NOT NULL,  -- a whole minute; from then on, the pass does not count as open
    reserved_seconds  BIGINT NOT NULL,
    seconds           BIGINT NOT NULL,            -- reserved until the pass is settled, then really used
    granted_at        DOUBLE PRECISION,
    conversation_id   TEXT UNIQUE,
    credential_sha256 TEXT,
    sealed            BYTEA,                      -- the credential, encrypted; NULL when nobody needs it any more
    unopened_at       DOUBLE PRECISION,           -- when ElevenLabs last said that nobody had opened it
    opened_at         DOUBLE PRECISION,           -- when its conversation began; NULL if nobody is known to have opened it
    ended_at          DOUBLE PRECISION,           -- when voicepass learned that its conversation had ended
    settled_at        DOUBLE PRECISION,
    settled_by        TEXT,                       -- webhook, reconciler, lookup or expiry
    cost              BIGINT,                     -- in ElevenLabs' credits
    reported_user_id  TEXT,                       -- the user id that the browser sent to ElevenLabs
    cost_fiat         DOUBLE PRECISION,           -- in US dollars
    plan              TEXT                        -- whose limits applied; NULL is [limits.user]
);
CREATE INDEX passes_of_user ON passes (token_issuer, user_id, reserved_at, seconds, lapses_at);
-- These two have a condition that is true for every row, and that no query about one user contains. Without it,
-- PostgreSQL may read the passes of all users to answer a query about one, if its statistics are old.
CREATE INDEX passes_by_time ON passes (reserved_at) WHERE transport <> '';
CREATE INDEX unsettled ON passes (reserved_at) WHERE settled_at IS NULL AND transport <> '';
CREATE INDEX reserved_only ON passes (reserved_at) WHERE granted_at IS NULL;
CREATE INDEX sealed ON passes (reserved_at) WHERE sealed IS NOT NULL;
-- What the passes of an agent, or of all, add up to in a slot of time. `scope` is "all" or "agent <alias>". `slot` counts
-- slots of `length` seconds since the epoch.
CREATE TABLE sums (
    scope   TEXT NOT NULL,
    length  BIGINT NOT NULL,
    slot    BIGINT NOT NULL,
    passes  BIGINT NOT NULL,  -- reserved in this slot
    failed  BIGINT NOT NULL,  -- requests that reached ElevenLabs in this slot and failed
    seconds BIGINT NOT NULL,  -- of the passes that were reserved in this slot
    open    BIGINT NOT NULL,  -- slots of a minute only: passes that lapse at its start, and are neither ended nor settled
    PRIMARY KEY (scope, length, slot)
);
-- A request that reached ElevenLabs and failed. It counts for a minute. Its row is deleted soon after.
CREATE TABLE failed_requests (
    pass_id      TEXT PRIMARY KEY,
    token_issuer TEXT NOT NULL,
    user_id      TEXT NOT NULL,
    agent_alias  TEXT NOT NULL,
    transport    TEXT NOT NULL,
    reserved_at  DOUBLE PRECISION NOT NULL
);
CREATE INDEX failed_of_user ON failed_requests (token_issuer, user_id, reserved_at);
CREATE INDEX failed_by_time ON failed_requests (reserved_at) WHERE transport <> '';
-- A settlement that arrived before its pass was granted, or whose conversation voicepass did not issue.
CREATE TABLE orphans (
    conversation_id TEXT PRIMARY KEY,
    arrived_at      DOUBLE PRECISION NOT NULL,
    seconds         BIGINT NOT NULL,
    cost            BIGINT,
    agent_id        TEXT,
    source          TEXT NOT NULL,
    cost_fiat       DOUBLE PRECISION  -- in US dollars
);
CREATE TABLE blocks (
    kind         TEXT NOT NULL,
    key          TEXT NOT NULL,
    token_issuer TEXT NOT NULL,
    blocked_at   DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (kind, key, token_issuer)
);
-- A task that one instance at a time may do, and until when it may.
CREATE TABLE leases (
    name       TEXT PRIMARY KEY,
    held_until DOUBLE PRECISION NOT NULL
);
-- A lookup of what is really open: until when it runs, or nobody starts another.
CREATE TABLE lookups (
    key           TEXT PRIMARY KEY,
    running_until DOUBLE PRECISION NOT NULL,
    paused_until  DOUBLE PRECISION NOT NULL
);
-- How far voicepass has read ElevenLabs' list of an agent's conversations: all that began before `listed_until`.
CREATE TABLE listings (
    agent_id     TEXT PRIMARY KEY,
    listed_until DOUBLE PRECISION NOT NULL,
    listed_at    DOUBLE PRECISION NOT NULL
);
-- More minutes for one user, in each day and month until `ends_at`. An empty `token_issuer` stands for every issuer.
CREATE TABLE extensions (
    user_id      TEXT NOT NULL,
    token_issuer TEXT NOT NULL,
    minutes      BIGINT NOT NULL,
    ends_at      DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (user_id, token_issuer)
);
-- Conversations of forgotten users that are still to be deleted at ElevenLabs. It does not name the users.
CREATE TABLE erasures (
    conversation_id TEXT PRIMARY KEY,
    agent_id        TEXT NOT NULL,
    ends_at         DOUBLE PRECISION NOT NULL  -- until then, the conversation may be open, or may begin
);
