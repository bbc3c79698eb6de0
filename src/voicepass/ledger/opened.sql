-- The statements of opened.py. A line `-- name:` names the one that follows it.

-- name: take_turn
-- A turn or a pause that ends too late does not count: a clock was ahead.
INSERT INTO lookups (key, running_until, paused_until) VALUES (:key, :until, 0)
ON CONFLICT (key) DO UPDATE SET running_until = excluded.running_until
WHERE (lookups.running_until <= :now OR lookups.running_until > :latest_running)
AND (lookups.paused_until <= :now OR lookups.paused_until > :latest_pause)
RETURNING key

-- name: is_running
SELECT 1 FROM lookups WHERE key = :key AND running_until > :now AND running_until <= :latest_running

-- name: end_turn
DELETE FROM lookups WHERE key = :key

-- name: pause
UPDATE lookups SET running_until = 0, paused_until = :until WHERE key = :key

-- name: to_look_up_conversations
-- A lookup asks ElevenLabs about ten passes. Those of the user come first, because voicepass may return one of them
-- again. Then come those of unknown state. The rest of the order is random, so that voicepass asks about each in time.
SELECT * FROM passes WHERE {scope} AND {is_open}
AND conversation_id IS NOT NULL AND reserved_at > :open_since
ORDER BY CASE WHEN token_issuer = :token_issuer AND user_id = :user_id THEN 0 ELSE 1 END,
         CASE WHEN opened_at IS NULL AND unopened_at IS NULL THEN 0 ELSE 1 END, random() LIMIT 10

-- name: to_look_up_seconds
SELECT * FROM passes WHERE {scope} AND settled_at IS NULL AND conversation_id IS NOT NULL
AND reserved_at > :since AND seconds > 0
ORDER BY CASE WHEN token_issuer = :token_issuer AND user_id = :user_id THEN 0 ELSE 1 END,
         CASE WHEN opened_at IS NULL AND unopened_at IS NULL THEN 0 ELSE 1 END, random() LIMIT 10

-- name: in_flight
SELECT 1 FROM passes WHERE token_issuer = :token_issuer AND user_id = :user_id
AND granted_at IS NULL AND reserved_at > :since AND reserved_at <= :latest LIMIT 1

-- name: expire
UPDATE passes SET settled_at = :now, settled_by = 'expiry', seconds = 0, sealed = NULL
WHERE conversation_id = :conversation_id AND settled_at IS NULL AND opened_at IS NULL AND granted_at <= :before
RETURNING pass_id

-- name: note_unopened
UPDATE passes SET unopened_at = :now
WHERE conversation_id = :conversation_id AND settled_at IS NULL AND opened_at IS NULL

-- name: note_opened
UPDATE passes SET opened_at = :opened_at, sealed = NULL
WHERE conversation_id = :conversation_id AND settled_at IS NULL AND opened_at IS NULL

-- name: reopen
UPDATE passes SET opened_at = :opened_at, settled_at = NULL, settled_by = NULL, seconds = reserved_seconds
WHERE conversation_id = :conversation_id AND settled_by = 'expiry' RETURNING *

-- name: note_ended
UPDATE passes SET opened_at = coalesce(opened_at, granted_at), ended_at = :now, seconds = :seconds, sealed = NULL
WHERE conversation_id = :conversation_id AND settled_at IS NULL

-- name: unopened
-- By alias too: two aliases may name two branches of one agent.
SELECT pass_id, sealed FROM passes
WHERE token_issuer = :token_issuer AND user_id = :user_id AND transport = :transport
AND agent_id = :agent_id AND agent_alias = :agent_alias
AND reserved_at > :since AND unopened_at > :known AND unopened_at <= :latest
AND settled_at IS NULL AND sealed IS NOT NULL
ORDER BY reserved_at DESC

-- name: erase_sealed
UPDATE passes SET sealed = NULL WHERE sealed IS NOT NULL AND reserved_at <= :before

-- name: delete_old_lookups
DELETE FROM lookups WHERE running_until < :before AND paused_until < :before

-- name: delete_old_failed
DELETE FROM failed_requests WHERE reserved_at < :before

-- name: listing
SELECT listed_at, listed_until FROM listings WHERE agent_id = :agent_id

-- name: to_list
SELECT (SELECT min(reserved_at) FROM
        (SELECT reserved_at FROM passes WHERE transport <> '' AND settled_at IS NULL AND conversation_id IS NOT NULL
         AND reserved_at > :oldest AND opened_at IS NULL AND agent_id = :agent_id
         ORDER BY reserved_at LIMIT 1) AS unseen) AS unseen_since,
       (SELECT min(opened_at) FROM passes WHERE transport <> '' AND settled_at IS NULL AND conversation_id IS NOT NULL
        AND reserved_at > :reserved AND opened_at > :recent AND agent_id = :agent_id) AS open_since

-- name: begin_listing
INSERT INTO listings (agent_id, listed_until, listed_at) VALUES (:agent_id, 0, :now)
ON CONFLICT (agent_id) DO UPDATE SET listed_at = excluded.listed_at,
    listed_until = CASE WHEN listings.listed_until > :now THEN 0 ELSE listings.listed_until END

-- name: note_listed
UPDATE listings SET listed_until = :until WHERE agent_id = :agent_id AND listed_until < :until

-- name: never_opened
SELECT * FROM passes WHERE transport <> '' AND settled_at IS NULL AND conversation_id IS NOT NULL
AND opened_at IS NULL AND agent_id = :agent_id
AND reserved_at <= (SELECT listed_until FROM listings WHERE agent_id = :agent_id) - :seconds
AND granted_at <= (SELECT listed_until FROM listings WHERE agent_id = :agent_id) - :seconds
ORDER BY reserved_at LIMIT :most
