-- When its conversation began, as ElevenLabs says. NULL: nobody is known to have opened it.
ALTER TABLE passes ADD COLUMN opened_at DOUBLE PRECISION;
-- When ElevenLabs last said that nobody had opened it yet.
ALTER TABLE passes ADD COLUMN unopened_at DOUBLE PRECISION;
-- The credential, sealed under the workspace's API key. NULL from when it is opened, settled or too old to be opened.
ALTER TABLE passes ADD COLUMN sealed BYTEA;
-- One row for each question "what is really open?" that runs, or that freed nothing a moment ago.
CREATE TABLE lookups (
    key           TEXT PRIMARY KEY,
    running_until DOUBLE PRECISION NOT NULL,
    paused_until  DOUBLE PRECISION NOT NULL
);
-- How far ElevenLabs' list of an agent's conversations was read: all that began before `listed_until`.
CREATE TABLE listings (
    agent_id     TEXT PRIMARY KEY,
    listed_until DOUBLE PRECISION NOT NULL,
    listed_at    DOUBLE PRECISION NOT NULL
);
