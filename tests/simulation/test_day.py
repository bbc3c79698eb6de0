"""In a simulated day, no honest user is refused and no cheater gets more than the limits allow."""

import os
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from tests.ledger.given import Postgres
from tests.simulation.day import Crowd, Report, simulate
from tests.simulation.honest import HOUR
from voicepass.ledger import Ledger
from voicepass.ledger.postgres import open_postgres
from voicepass.ledger.sqlite import open_sqlite
from voicepass.model import Clock

SEED = int(os.environ.get("SIMULATION_SEED", "1"))
MOST_CALLS_PER_PASS = 1.3


def check(report: Report) -> None:
    assert report.mistakes == []
    assert report.wrongly_refused == []
    assert report.beyond_limits == 0


@pytest.mark.long
def test_in_a_small_crowd_no_honest_user_is_refused_and_no_cheater_exceeds_a_limit() -> None:
    crowd = Crowd(honest=30, cheaters=5, day_seconds=1.5 * HOUR)

    report = simulate(
        crowd,
        seed=SEED,
        has_webhook=False,
        open_ledger=lambda clock: open_sqlite(":memory:", clock=clock),
        instances=1,
    )

    check(report)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("has_webhook", [True, False], ids=["webhook", "no_webhook"])
@pytest.mark.parametrize("engine", ["sqlite", "postgres"])
def test_in_a_day_no_honest_user_is_refused_and_no_cheater_exceeds_a_limit(
    engine: str, tmp_path: Path, request: pytest.FixtureRequest, *, has_webhook: bool
) -> None:
    crowd = Crowd(honest=500, cheaters=20)
    if engine == "sqlite":
        url = str(tmp_path / "ledger.db")
    else:
        quick_postgres: Postgres = request.getfixturevalue("quick_postgres")
        url = quick_postgres.fresh()

    def open_ledger(clock: Clock) -> AbstractAsyncContextManager[Ledger]:
        return open_sqlite(url, clock=clock) if engine == "sqlite" else open_postgres(url, clock=clock)

    began = time.monotonic()
    report = simulate(
        crowd, seed=SEED, has_webhook=has_webhook, open_ledger=open_ledger, instances=1 if engine == "sqlite" else 2
    )

    show(f"{engine}, {'webhook' if has_webhook else 'no webhook'}, seed {SEED}", report.rows())
    print(f"({time.monotonic() - began:.0f} s of real time)")
    for habit, calls in report.calls_by_habit.items():
        print(f"  {habit:<64} {calls.per_pass:.2f} calls for each of {calls.handed_out:,} passes")
    for refused in report.refused:
        print(f"  {refused}")
    check(report)
    assert report.calls_per_pass <= MOST_CALLS_PER_PASS


def show(title: str, rows: Sequence[tuple[str, str]]) -> None:
    print(f"\n{title}")
    for name, value in rows:
        print(f"  {name:<64} {value}")
