-- The statements of records.py. A line `-- name:` names the one that follows it.

-- name: overdue
SELECT * FROM passes WHERE transport <> '' AND settled_at IS NULL AND conversation_id IS NOT NULL
AND reserved_at > :after AND reserved_at < :before ORDER BY reserved_at LIMIT :most

-- name: latest
SELECT * FROM passes WHERE transport <> '' ORDER BY reserved_at DESC LIMIT :most

-- name: latest_of_user
{each_issuer}
SELECT passes.* FROM issuers JOIN passes ON token_issuer = name
WHERE user_id = :user_id ORDER BY reserved_at DESC LIMIT :most

-- name: page
SELECT * FROM passes WHERE transport <> '' AND (reserved_at, pass_id) > (:reserved_at, :pass_id)
ORDER BY reserved_at, pass_id LIMIT :most

-- name: totals
SELECT token_issuer, user_id, count(*) AS passes, sum(seconds) AS seconds, sum(cost_fiat) AS cost_fiat
FROM passes WHERE transport <> '' AND reserved_at > :since
GROUP BY token_issuer, user_id ORDER BY sum(seconds) DESC, count(*) DESC LIMIT :most

-- name: standing
-- It counts no further than 10,000: that many are a reason for an alarm.
SELECT (SELECT coalesce(sum(open), 0) FROM sums WHERE scope = 'all' AND length = 60 AND slot > :minute) AS opened,
       (SELECT count(*) FROM (SELECT 1 FROM passes WHERE transport <> '' AND settled_at IS NULL
                              AND conversation_id IS NOT NULL AND reserved_at < :before LIMIT 10000) AS overdue)
       AS unsettled,
       (SELECT min(reserved_at) FROM passes WHERE transport <> '' AND settled_at IS NULL
        AND conversation_id IS NOT NULL AND reserved_at < :before) AS oldest

-- name: oldest
SELECT max(reserved_at) AS last FROM
(SELECT reserved_at FROM passes
 WHERE transport <> '' AND reserved_at < :before ORDER BY reserved_at LIMIT 1000) AS oldest

-- name: delete_old
DELETE FROM passes WHERE transport <> '' AND reserved_at <= :last

-- name: delete_orphans
DELETE FROM orphans WHERE conversation_id IN
(SELECT conversation_id FROM orphans WHERE arrived_at < :before LIMIT 1000)

-- name: block
INSERT INTO blocks (kind, key, token_issuer, blocked_at) VALUES (:kind, :key, :token_issuer, :now)
ON CONFLICT DO NOTHING

-- name: unblock
DELETE FROM blocks WHERE kind = :kind AND key IN (:key, :user_hash) AND token_issuer = :token_issuer
RETURNING kind

-- name: blocks
SELECT kind, key, token_issuer FROM blocks ORDER BY kind, key

-- name: lease
INSERT INTO leases (name, held_until) VALUES (:name, :held_until)
ON CONFLICT (name) DO UPDATE SET held_until = excluded.held_until
WHERE leases.held_until <= :now OR leases.held_until > excluded.held_until
RETURNING name

-- name: end_lease
UPDATE leases SET held_until = :until WHERE name = :name

-- name: write_row
INSERT INTO leases (name, held_until) VALUES (:name, :now)

-- name: delete_row
DELETE FROM leases WHERE name = :name
