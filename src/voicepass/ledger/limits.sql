-- The statements of limits.py, and parts of them. A line `-- name:` names the statement or part that follows it.

-- name: has_lapsed
EXISTS (SELECT 1 FROM passes WHERE granted_at IS NULL AND reserved_at <= :lapsed) AS has_lapsed

-- name: is_blocked
EXISTS (SELECT 1 FROM blocks WHERE kind = 'everyone' OR (kind = 'agent' AND key = :agent_alias)
        OR (kind = 'user' AND key IN (:user_id, :user_hash) AND token_issuer IN ('', :token_issuer))) AS is_blocked

-- name: passes_of_user
count(*) FILTER (WHERE reserved_at > :since_{window})

-- name: requests_of_user
count(*) FILTER (WHERE reserved_at > :since_{window})
+ (SELECT count(*) FROM failed_requests
   WHERE token_issuer = :token_issuer AND user_id = :user_id AND reserved_at > :since_{window})

-- name: conversations_of_user
count(*) FILTER (WHERE {is_open})

-- name: seconds_of_user
coalesce(sum(seconds) FILTER (WHERE reserved_at > :since_{window}), 0)

-- name: sum_of_slots
SELECT coalesce(sum({amount}), 0) FROM sums WHERE scope = {scope} AND length = {length} AND slot >= :slot_{window}

-- name: sum_of_open
SELECT coalesce(sum(open), 0) FROM sums WHERE scope = {scope} AND length = 60 AND slot > :minute

-- name: slots
SELECT slot * length AS place, {amount} AS amount FROM sums
WHERE scope = :key AND length = :length_{n} AND slot >= :first_{n} AND slot < :last_{n}

-- name: rows
SELECT reserved_at AS place, {amount} AS amount FROM {table}
WHERE {scope} AND reserved_at >= :begin_{n} AND reserved_at < :end_{n}

-- name: add_up
-- `place`: the time of a row, or the begin of a slot. `reached`: the newest place since which there are `most` or
-- more. `newer`: the amount after that place.
SELECT coalesce(sum(amount), 0) AS used, min(place) AS oldest,
       max(CASE WHEN so_far >= :most THEN place END) AS reached,
       coalesce(max(CASE WHEN so_far < :most THEN so_far END), 0) AS newer
FROM (SELECT place, amount, sum(amount) OVER (ORDER BY place DESC) AS so_far
      FROM ({pieces}) AS pieces WHERE amount > 0) AS added

-- name: exactly_open_of_user
SELECT count(*) AS used, min(lapses_at) AS next_lapse_at FROM passes
WHERE token_issuer = :token_issuer AND user_id = :user_id AND reserved_at > :open_since
AND {is_open}

-- name: exactly_open
SELECT coalesce(sum(open), 0) AS used, min(CASE WHEN open > 0 THEN slot END) * 60.0 AS next_lapse_at FROM sums
WHERE scope = :key AND length = 60 AND slot > :minute

-- name: free_at
-- An open conversation can end at any moment, and a request in flight can fail. Nobody can open an old pass any more.
SELECT min(CASE WHEN opened_at IS NOT NULL OR (granted_at IS NULL AND reserved_at > :in_flight_since) THEN :may_end_at
           WHEN granted_at IS NULL THEN reserved_at + :unused_seconds
           WHEN unopened_at IS NOT NULL THEN granted_at + :released_seconds ELSE lapses_at END) AS free_at
FROM {passes} WHERE {scope} AND reserved_at > :open_since
AND {is_open}

-- name: newest_unsettled
(SELECT * FROM passes WHERE transport <> '' AND settled_at IS NULL ORDER BY reserved_at DESC LIMIT 1000) AS newest

-- name: extensions_of_user
SELECT minutes, ends_at FROM extensions
WHERE user_id = :user_id AND token_issuer IN ('', :token_issuer) AND ends_at > :now ORDER BY ends_at
