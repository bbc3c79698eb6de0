-- The statements of extensions.py. A line `-- name:` names the one that follows it.

-- name: delete_ended
DELETE FROM extensions WHERE ends_at <= :now

-- name: extend
INSERT INTO extensions (user_id, token_issuer, minutes, ends_at) VALUES (:user_id, :token_issuer, :minutes, :ends_at)
ON CONFLICT (user_id, token_issuer) DO UPDATE SET minutes = excluded.minutes, ends_at = excluded.ends_at

-- name: is_known
{each_issuer}
SELECT 1 FROM issuers WHERE :token_issuer IN ('', name)
AND EXISTS (SELECT 1 FROM passes WHERE passes.token_issuer = name AND user_id = :user_id) LIMIT 1

-- name: revoke
DELETE FROM extensions WHERE user_id = :user_id AND token_issuer = :token_issuer AND ends_at > :now
RETURNING user_id

-- name: list
SELECT user_id, token_issuer, minutes, ends_at FROM extensions
WHERE ends_at > :now ORDER BY ends_at, user_id, token_issuer
