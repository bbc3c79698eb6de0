"""How a rule talks to an engine: the rule yields a statement with its parameters, and is sent the rows."""

from collections.abc import Generator, Mapping, Sequence
from importlib.resources import files
from typing import Any, Final, TypeVar

Result = TypeVar("Result")
Row = Mapping[str, Any]
Dialogue = Generator[tuple[str, Mapping[str, Any]], Sequence[Row], Result]

LOCK_SUMS: Final = "LOCK TABLE sums IN SHARE ROW EXCLUSIVE MODE"
"""From this statement to the end of the transaction, nobody else changes a sum."""

LOCK_SCOPES: Final = """
SELECT count(pg_advisory_xact_lock(hashtextextended(key, 0))) FROM unnest(CAST(:keys AS text[])) AS key"""
"""From this statement to the end of the transaction, nobody else counts in these scopes."""

LOCKS: Final = frozenset({LOCK_SUMS, LOCK_SCOPES})
"""PostgreSQL sends each of these together with the next statement. SQLite, with one writer, skips them."""


IS_OPEN: Final = "settled_at IS NULL AND ended_at IS NULL AND lapses_at > :now"
"""The condition for a pass that is open. In the SQL files, it is `{is_open}`."""


EACH_ISSUER: Final = """\
WITH RECURSIVE issuers (name) AS (SELECT min(token_issuer) FROM passes UNION ALL
    SELECT (SELECT min(token_issuer) FROM passes WHERE token_issuer > name) FROM issuers WHERE name IS NOT NULL)"""
"""The index of a user's passes begins with the issuer: naming each issuer lets the engine jump to the user.

In the SQL files, it is `{each_issuer}`.
"""


def read_statements(module: str) -> dict[str, str]:
    """Return the statements of `<module>.sql`, by name. Each begins with a line `-- name: <name>`.

    A `{word}` in a statement is filled in with a text of ours, and a `:word` is a parameter.
    """
    text = files(__package__).joinpath(f"{module}.sql").read_text(encoding="utf-8")
    text = text.replace("{is_open}", IS_OPEN).replace("{each_issuer}", EACH_ISSUER)
    lines = [line for line in text.splitlines() if line.startswith("-- name: ") or not line.startswith("--")]
    pieces = "\n".join(lines).split("-- name: ")[1:]
    return {name: statement.strip() for name, _, statement in (piece.partition("\n") for piece in pieces)}
