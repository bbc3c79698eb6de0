-- The statements of forgetting.py. A line `-- name:` names the one that follows it.

-- name: issuers
{each_issuer}
SELECT name AS token_issuer FROM issuers WHERE name <> ''
UNION SELECT token_issuer FROM blocks WHERE kind = 'user' AND key = :user_id AND token_issuer <> ''
UNION SELECT token_issuer FROM extensions WHERE user_id = :user_id AND token_issuer <> ''
UNION SELECT token_issuer FROM failed_requests WHERE user_id = :user_id AND token_issuer <> ''

-- name: open_until
SELECT max(lapses_at) AS open_until FROM passes WHERE token_issuer = :token_issuer AND user_id = :user_id
AND {is_open}

-- name: hide_blocks
INSERT INTO blocks (kind, key, token_issuer, blocked_at)
SELECT kind, :user_hash, token_issuer, blocked_at FROM blocks
WHERE kind = 'user' AND key = :user_id AND token_issuer IN ('', :token_issuer)
ON CONFLICT DO NOTHING

-- name: delete_blocks
DELETE FROM blocks WHERE kind = 'user' AND key = :user_id AND token_issuer IN ('', :token_issuer)

-- name: delete_extensions
DELETE FROM extensions WHERE user_id = :user_id AND token_issuer IN ('', :token_issuer)

-- name: hide_failed
UPDATE failed_requests SET token_issuer = '', user_id = '' WHERE token_issuer = :token_issuer AND user_id = :user_id

-- name: delete_lookups
-- Their keys name users. A lookup that is deleted is only repeated.
DELETE FROM lookups

-- name: reserved
SELECT pass_id FROM passes
WHERE token_issuer = :token_issuer AND user_id = :user_id AND granted_at IS NULL LIMIT 1

-- name: granted
SELECT pass_id, conversation_id, agent_id,
       CASE WHEN {is_open} THEN lapses_at ELSE 0 END AS ends_at
FROM passes WHERE token_issuer = :token_issuer AND user_id = :user_id AND granted_at IS NOT NULL LIMIT :most

-- name: hide_pass
-- The conversation's id stays: a late report needs it.
UPDATE passes SET token_issuer = '', user_id = '', request_id = '', credential_sha256 = NULL, sealed = NULL,
                  reported_user_id = NULL WHERE pass_id = :pass_id

-- name: add_erasure
INSERT INTO erasures (conversation_id, agent_id, ends_at) VALUES (:conversation_id, :agent_id, :ends_at)
ON CONFLICT DO NOTHING

-- name: erasures
SELECT conversation_id, agent_id, ends_at > :now AS may_be_open FROM erasures ORDER BY conversation_id

-- name: end_erasure
DELETE FROM erasures WHERE conversation_id = :conversation_id
