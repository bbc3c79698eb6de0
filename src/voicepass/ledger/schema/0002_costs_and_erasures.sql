-- In US dollars.
ALTER TABLE passes ADD COLUMN cost_fiat DOUBLE PRECISION;
ALTER TABLE orphans ADD COLUMN cost_fiat DOUBLE PRECISION;
-- Conversations of forgotten users that are still to be deleted at ElevenLabs. It does not name the users.
CREATE TABLE erasures (
    conversation_id TEXT PRIMARY KEY,
    agent_id        TEXT NOT NULL,
    ends_at         DOUBLE PRECISION NOT NULL  -- until then, the conversation may be open, or may begin
);
