-- The statement of postgres.py. psycopg fills in its parameters.

-- name: begin
-- One round trip. Nothing outlives the transaction, because behind a pooler the next one may be on another session.
-- READ COMMITTED: a stricter level takes its snapshot before it waits for a lock.
-- The time is read when the locks are held: transactions that share a lock see it grow.
BEGIN ISOLATION LEVEL READ COMMITTED;
SET LOCAL statement_timeout = %(limit)s;
SET LOCAL lock_timeout = %(limit)s;
SET LOCAL idle_in_transaction_session_timeout = %(limit)s;
SET LOCAL synchronous_commit = %(synchronous_commit)s;
WITH held AS MATERIALIZED (SELECT count(pg_advisory_xact_lock(hashtextextended(key, 0)))
                           FROM unnest(%(locks)s::text[]) AS key)
SELECT extract(epoch FROM clock_timestamp())::float8 AS now FROM held
