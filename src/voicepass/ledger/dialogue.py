"""How a rule talks to an engine: the rule yields a statement with its parameters, and is sent the rows."""

from collections.abc import Generator, Mapping, Sequence
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
