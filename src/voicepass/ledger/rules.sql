-- The statements of rules.py. A line `-- name:` names the one that follows it.

-- name: find_issued
SELECT * FROM passes WHERE conversation_id = :conversation_id

-- name: find_either
SELECT * FROM passes WHERE conversation_id = :conversation_id OR pass_id = :pass_id

-- name: find_owner
SELECT token_issuer, user_id FROM passes WHERE conversation_id = :conversation_id

-- name: reserve
INSERT INTO passes (pass_id, request_id, token_issuer, user_id, agent_alias, agent_id, transport,
                    plan, reserved_at, lapses_at, reserved_seconds, seconds,
                    granted_at, conversation_id, credential_sha256, sealed)
VALUES (:pass_id, :request_id, :token_issuer, :user_id, :agent_alias, :agent_id, :transport,
        :plan, :reserved_at, :lapses_at, :seconds, :seconds,
        :granted_at, :conversation_id, :credential_sha256, :sealed)

-- name: find_lapsed
SELECT 1 FROM passes WHERE granted_at IS NULL AND reserved_at <= :lapsed LIMIT 1

-- name: lapse
DELETE FROM passes WHERE granted_at IS NULL AND pass_id =
(SELECT pass_id FROM passes WHERE granted_at IS NULL AND reserved_at <= :lapsed
 ORDER BY reserved_at LIMIT 1) RETURNING *

-- name: release
DELETE FROM passes WHERE pass_id = :pass_id AND granted_at IS NULL RETURNING *

-- name: note_failed
INSERT INTO failed_requests (pass_id, token_issuer, user_id, agent_alias, transport, reserved_at)
VALUES (:pass_id, :token_issuer, :user_id, :agent_alias, :transport, :reserved_at)

-- name: grant
UPDATE passes SET granted_at = :granted_at, conversation_id = :conversation_id, credential_sha256 = :credential_sha256,
                  sealed = :sealed
WHERE pass_id = :pass_id AND NOT EXISTS (SELECT 1 FROM passes WHERE conversation_id = :conversation_id)
RETURNING EXISTS (SELECT 1 FROM orphans WHERE conversation_id = :conversation_id) AS is_early

-- name: settle
-- An expiry is a guess, which any report replaces. A webhook replaces what voicepass asked for itself.
UPDATE passes SET settled_at = :now, settled_by = :source, seconds = :seconds, cost = :cost,
                  cost_fiat = :cost_fiat, sealed = NULL, reported_user_id = CASE WHEN user_id <> '' THEN :user_id END
WHERE conversation_id = :conversation_id AND (settled_at IS NULL OR settled_by = 'expiry'
      OR (settled_by <> 'webhook' AND :source = 'webhook')) RETURNING *

-- name: take_orphan
DELETE FROM orphans WHERE conversation_id = :conversation_id
RETURNING conversation_id, seconds, cost, cost_fiat, agent_id, source

-- name: keep_orphan
INSERT INTO orphans (conversation_id, arrived_at, seconds, cost, cost_fiat, agent_id, source)
VALUES (:conversation_id, :now, :seconds, :cost, :cost_fiat, :agent_id, :source)
ON CONFLICT (conversation_id) DO UPDATE SET arrived_at = excluded.arrived_at, seconds = excluded.seconds,
    cost = excluded.cost, cost_fiat = excluded.cost_fiat, agent_id = excluded.agent_id, source = excluded.source
WHERE orphans.source <> 'webhook' AND excluded.source = 'webhook'
