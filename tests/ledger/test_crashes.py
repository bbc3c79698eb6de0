"""A pass that was acknowledged is still in the ledger after a crash, and no row is incomplete."""

import random
import sqlite3

import pytest

from tests.ledger.given import Engine, rows
from tests.ledger.writer import write_and_kill

pytestmark = pytest.mark.anyio


def make_trials(everyday: int, *, sqlite: int, postgres: int) -> list[object]:
    """Make parameters for a few kills per engine in the everyday suite, and for many in the full check."""
    return [
        pytest.param(name, count, marks=[pytest.mark.long] if long else [], id=f"{name}-{count}")
        for name, most in (("sqlite", sqlite), ("postgres", postgres))
        for count, long in ((everyday if name == "sqlite" else 1, False), (most, True))
    ]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("engine", "count"), make_trials(4, sqlite=200, postgres=50), indirect=["engine"])
async def test_sigkill_at_any_moment_loses_nothing_that_was_acknowledged(engine: Engine, count: int) -> None:
    moments = random.Random(41)  # noqa: S311 - the same moments every time
    acknowledged: list[str] = []
    for _ in range(count):
        acknowledged += write_and_kill(engine.name, engine.url, after_seconds=moments.uniform(0, 0.06))

    async with engine.open() as ledger:
        kept = {row["conversation_id"]: row for row in await rows(ledger, "SELECT * FROM passes")}

    assert len(acknowledged) >= count
    assert set(acknowledged) <= kept.keys()
    assert all(row["granted_at"] is not None for row in kept.values() if row["conversation_id"] is not None)
    if engine.name == "sqlite":
        with sqlite3.connect(engine.url) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        connection.close()
    print(f"{engine.name}: {count} kills, {len(acknowledged)} acknowledged rows, none lost")
