"""The check of the ledger that every probe and every scrape share."""

import asyncio
from pathlib import Path

import pytest

from tests.conftest import serving
from voicepass.api.operators import CHECK_SECONDS, LedgerCheck
from voicepass.errors import LedgerUnavailable

pytestmark = pytest.mark.anyio


class Probed:
    """A ledger that fails when a test sets it, and a clock."""

    def __init__(self) -> None:
        self.failing: list[str] = []
        self.asked, self.now = 0, 0.0

    async def check(self) -> None:
        self.asked += 1
        await asyncio.sleep(0)
        if self.failing:
            raise LedgerUnavailable(operator_note=self.failing[0])

    def ticks(self) -> float:
        return self.now


@pytest.fixture
def probed() -> Probed:
    return Probed()


@pytest.fixture
def check(probed: Probed) -> LedgerCheck:
    return LedgerCheck(check=probed.check, ticks=probed.ticks)


@pytest.mark.parametrize("failing", [[], ["the disk is full"]])
async def test_however_many_ask_the_ledger_is_checked_once_in_two_seconds(
    probed: Probed, check: LedgerCheck, failing: list[str]
) -> None:
    probed.failing = failing

    outcomes = await asyncio.gather(*(check() for _ in range(100)), return_exceptions=True)
    at_first = probed.asked
    probed.now += CHECK_SECONDS
    await asyncio.gather(check(), return_exceptions=True)

    assert (at_first, probed.asked) == (1, 2)
    assert {type(outcome) for outcome in outcomes} == {LedgerUnavailable if failing else type(None)}
    assert len({id(outcome) for outcome in outcomes}) == (100 if failing else 1), "each adds checks to its own"


async def test_a_failure_and_a_recovery_are_seen_two_seconds_later(probed: Probed, check: LedgerCheck) -> None:
    await check()
    probed.failing = ["the disk is full"]
    probed.now += CHECK_SECONDS
    with pytest.raises(LedgerUnavailable) as refused:
        await check()
    probed.failing = []
    probed.now += CHECK_SECONDS

    await check()

    assert refused.value.operator_note == "the disk is full"


async def test_a_probe_that_hangs_up_leaves_the_check_to_the_next(probed: Probed, check: LedgerCheck) -> None:
    gone = asyncio.create_task(check())
    await asyncio.sleep(0)
    gone.cancel()

    await check()

    assert probed.asked == 2


async def test_readiness_and_metrics_report_a_deleted_ledger_and_name_its_path_to_the_operator(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with serving(voicepass_database_url=f"sqlite:///{path}") as client:
        path.unlink()

        ready, metrics = await client.get("/readyz"), await client.get("/metrics")

    assert (ready.status_code, ready.json()["code"]) == (503, "ledger_unavailable")
    assert ready.json()["checks"]["ledger"] == "failed"
    assert str(tmp_path) not in ready.text, "a path is for the log alone"
    assert "voicepass_ledger_up 0.0" in metrics.text
