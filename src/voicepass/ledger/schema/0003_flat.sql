-- What keeps every question as quick among ten million passes as among a thousand.
-- A quarter of an hour that is over, added up: `scope` is "all" or "agent <alias>", `quarter` counts them since the epoch.
CREATE TABLE quarters (
    scope   TEXT NOT NULL,
    quarter BIGINT NOT NULL,
    seconds BIGINT NOT NULL,
    PRIMARY KEY (scope, quarter)
);
-- Each with a condition that always holds, and that no question about a user implies: PostgreSQL's planner, which
-- believes that few passes are young or open, would else answer it from the passes of all and pass over the others'.
DROP INDEX passes_of_agent;
DROP INDEX passes_of_all;
DROP INDEX open_of_agent;
DROP INDEX open_of_all;
CREATE INDEX passes_of_agent ON passes (agent_alias, reserved_at, seconds) WHERE agent_alias <> '';
CREATE INDEX passes_of_all ON passes (reserved_at, seconds, transport) WHERE transport <> '';
CREATE INDEX open_of_agent ON passes (agent_alias, lapses_at) WHERE settled_at IS NULL AND agent_alias <> '';
CREATE INDEX open_of_all ON passes (lapses_at, transport) WHERE settled_at IS NULL AND transport <> '';
