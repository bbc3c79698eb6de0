-- When its conversation began, as ElevenLabs says. NULL: nobody is known to have opened it.
ALTER TABLE passes ADD COLUMN opened_at DOUBLE PRECISION;
-- When ElevenLabs last said that nobody had opened it yet.
ALTER TABLE passes ADD COLUMN unopened_at DOUBLE PRECISION;
-- The credential, sealed under the workspace's API key. NULL from when it is opened, settled or too old to be opened.
ALTER TABLE passes ADD COLUMN sealed BYTEA;
CREATE INDEX sealed ON passes (reserved_at) WHERE sealed IS NOT NULL;
-- Of which agent an early settlement tells; whose user it names is not kept.
ALTER TABLE orphans ADD COLUMN agent_id TEXT;
-- One row for each question "what is really open?" that runs, or that freed nothing a moment ago.
CREATE TABLE lookups (
    key           TEXT PRIMARY KEY,
    running_until DOUBLE PRECISION NOT NULL,
    paused_until  DOUBLE PRECISION NOT NULL
);
-- A request that reached ElevenLabs and came to nothing. It counts for a minute, then it is deleted.
CREATE TABLE failed_requests (
    pass_id      TEXT PRIMARY KEY,
    token_issuer TEXT NOT NULL,
    user_id      TEXT NOT NULL,
    agent_alias  TEXT NOT NULL,
    transport    TEXT NOT NULL,
    reserved_at  DOUBLE PRECISION NOT NULL
);
CREATE INDEX failed_of_user ON failed_requests (token_issuer, user_id, reserved_at);
CREATE INDEX failed_of_all ON failed_requests (reserved_at);
-- How far ElevenLabs' list of an agent's conversations was read: all that began before `listed_until`.
CREATE TABLE listings (
    agent_id     TEXT PRIMARY KEY,
    listed_until DOUBLE PRECISION NOT NULL,
    listed_at    DOUBLE PRECISION NOT NULL
);
