"""All probes and scrapes share one check of the ledger."""

import asyncio
from pathlib import Path

import pytest

from tests.conftest import serving
from voicepass.api.operators import CHECK_SECONDS, LedgerCheck
from voicepass.errors import LedgerUnavailable

pytestmark = pytest.mark.anyio


class FakeLedger:
    """A ledger that fails when a test fills `failing`, with a clock."""

    def __init__(self) -> None:
        self.failing: list[str] = []
        self.checks, self.now = 0, 0.0

    async def check(self) -> None:
        self.checks += 1
        await asyncio.sleep(0)
        if self.failing:
            raise LedgerUnavailable(operator_note=self.failing[0])

    def ticks(self) -> float:
        return self.now


@pytest.fixture
def ledger() -> FakeLedger:
    return FakeLedger()


@pytest.fixture
def check(ledger: FakeLedger) -> LedgerCheck:
    return LedgerCheck(check=ledger.check, ticks=ledger.ticks)


@pytest.mark.parametrize("failing", [[], ["the disk is full"]])
async def test_a_hundred_probes_at_once_check_the_ledger_once_in_two_seconds(
    ledger: FakeLedger, check: LedgerCheck, failing: list[str]
) -> None:
    ledger.failing = failing

    outcomes = await asyncio.gather(*(check() for _ in range(100)), return_exceptions=True)
    checks_at_first = ledger.checks
    ledger.now += CHECK_SECONDS
    await asyncio.gather(check(), return_exceptions=True)

    assert (checks_at_first, ledger.checks) == (1, 2)
    assert {type(outcome) for outcome in outcomes} == {LedgerUnavailable if failing else type(None)}
    assert len({id(outcome) for outcome in outcomes}) == (100 if failing else 1), (
        "each caller adds its checks to its own error"
    )


async def test_a_failure_and_a_recovery_are_seen_two_seconds_later(ledger: FakeLedger, check: LedgerCheck) -> None:
    await check()
    ledger.failing = ["the disk is full"]
    ledger.now += CHECK_SECONDS
    with pytest.raises(LedgerUnavailable) as refused:
        await check()
    ledger.failing = []
    ledger.now += CHECK_SECONDS

    await check()

    assert refused.value.operator_note == "the disk is full"


async def test_after_a_probe_disconnects_the_next_one_checks_the_ledger(ledger: FakeLedger, check: LedgerCheck) -> None:
    gone = asyncio.create_task(check())
    await asyncio.sleep(0)
    gone.cancel()

    await check()

    assert ledger.checks == 2


async def test_readiness_and_metrics_report_a_deleted_ledger_and_name_its_path_to_the_operator(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with serving(voicepass_database_url=f"sqlite:///{path}") as client:
        path.unlink()

        ready, metrics = await client.get("/readyz"), await client.get("/metrics")

    assert (ready.status_code, ready.json()["code"]) == (503, "ledger_unavailable")
    assert ready.json()["checks"]["ledger"] == "failed"
    assert str(tmp_path) not in ready.text, "only the log may name the path"
    assert "voicepass_ledger_up 0.0" in metrics.text
