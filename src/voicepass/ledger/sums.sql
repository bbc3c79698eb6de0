-- The statements of sums.py. A line `-- name:` names the one that follows it.

-- name: change
-- All transactions change these rows in one order: by scope, length and slot. In two orders, they would deadlock.
INSERT INTO sums (scope, length, slot, passes, failed, seconds, open) VALUES
(:agent, 5, :slot_5, :passes, :failed, :seconds, 0),
(:agent, 60, :slot_60, :passes, :failed, :seconds, 0),
(:agent, 60, :lapses, 0, 0, 0, :opened),
(:agent, 3600, :slot_3600, :passes, :failed, :seconds, 0),
(:agent, 86400, :slot_86400, :passes, :failed, :seconds, 0),
('all', 5, :slot_5, :passes, :failed, :seconds, 0),
('all', 60, :slot_60, :passes, :failed, :seconds, 0),
('all', 60, :lapses, 0, 0, 0, :opened),
('all', 3600, :slot_3600, :passes, :failed, :seconds, 0),
('all', 86400, :slot_86400, :passes, :failed, :seconds, 0)
ON CONFLICT (scope, length, slot) DO UPDATE SET passes = sums.passes + excluded.passes,
    failed = sums.failed + excluded.failed, seconds = sums.seconds + excluded.seconds, open = sums.open + excluded.open

-- name: correct
INSERT INTO sums (scope, length, slot, passes, failed, seconds, open)
VALUES (:scope, :length, :slot, :passes, 0, :seconds, :open)
ON CONFLICT (scope, length, slot) DO UPDATE SET passes = sums.passes + excluded.passes,
    seconds = sums.seconds + excluded.seconds, open = sums.open + excluded.open

-- name: delete_old
-- The key begins with the scope: naming each scope lets the engine jump to its slots. The same holds for `slots`.
WITH RECURSIVE scopes (scope) AS (SELECT min(scope) FROM sums UNION ALL
    SELECT (SELECT min(scope) FROM sums WHERE scope > scopes.scope) FROM scopes WHERE scope IS NOT NULL)
DELETE FROM sums WHERE scope IN (SELECT scope FROM scopes) AND length = :length AND slot < :before

-- name: slots
WITH RECURSIVE scopes (scope) AS (SELECT min(scope) FROM sums UNION ALL
    SELECT (SELECT min(scope) FROM sums WHERE scope > scopes.scope) FROM scopes WHERE scope IS NOT NULL)
SELECT sums.* FROM scopes JOIN sums ON sums.scope = scopes.scope
WHERE length = :length AND slot >= :first AND slot < :end

-- name: days
SELECT (SELECT min(reserved_at) FROM passes WHERE transport <> '') / 86400 AS first,
       (SELECT max(reserved_at) FROM passes WHERE transport <> '') / 86400 AS last,
       (SELECT min(slot) FROM sums WHERE scope = 'all' AND length = 86400) AS first_sum,
       (SELECT max(slot) FROM sums WHERE scope = 'all' AND length = 86400) AS last_sum

-- name: passes
SELECT agent_alias, reserved_at, seconds FROM passes
WHERE transport <> '' AND reserved_at >= :begin AND reserved_at < :end

-- name: open_passes
SELECT agent_alias, lapses_at FROM passes
WHERE transport <> '' AND {is_open} AND reserved_at > :open_since
