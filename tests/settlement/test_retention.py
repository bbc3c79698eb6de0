"""Old data is deleted from the ledger, with or without a reconciler."""

import asyncio

import pytest

from tests.conftest import NOW, Clock
from tests.logs import capture_logs
from tests.settlement.given import grant
from tests.simulation.virtual_time import VirtualTime, run
from voicepass.errors import LedgerUnavailable
from voicepass.ledger.sqlite import open_sqlite
from voicepass.settlement.retention import delete_old_data, run_retention

pytestmark = pytest.mark.anyio

DAY = 24 * 3600


async def test_a_round_deletes_passes_that_are_older_than_the_retention() -> None:
    clock = Clock()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        await grant(ledger)
        remembered = []

        for days in (30, 2):
            clock.now += days * DAY
            await delete_old_data(ledger, keep_seconds=31 * DAY)
            remembered.append(len(await ledger.list_passes(most=10)))

    assert remembered == [1, 0]


async def test_an_instance_without_the_lease_deletes_nothing() -> None:
    clock = Clock()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        await grant(ledger)
        await ledger.take_lease("retention", 60)
        clock.now += 59

        await delete_old_data(ledger, keep_seconds=1)

        assert len(await ledger.list_passes(most=10)) == 1


async def test_a_round_keeps_its_lease_until_shortly_before_the_next_round() -> None:
    clock = Clock()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        await delete_old_data(ledger, keep_seconds=1)
        got = []
        for seconds in (53.9, 0.2):
            clock.now += seconds
            got.append(await ledger.take_lease("retention", 54))

    assert got == [False, True]


def test_a_round_follows_every_minute_even_if_one_fails() -> None:
    time = VirtualTime()
    rounds: list[float] = []
    deleted: list[tuple[float, float]] = []

    class FailingTwice:
        async def take_lease(self, _name: str, _seconds: float) -> bool:
            rounds.append(time.now)
            if len(rounds) <= 2:
                raise RuntimeError("a bug")
            return True

        async def erase_sealed(self) -> None:
            pass

        async def delete_old(self, *, age_seconds: float) -> None:
            deleted.append((time.now, age_seconds))

    async def repeat() -> None:
        async with run_retention(FailingTwice(), keep_seconds=31 * DAY):  # type: ignore[arg-type]
            await asyncio.sleep(210)

    with capture_logs() as logged:
        run(time, repeat)

    assert rounds == [60, 120, 180]
    assert deleted == [(180, 31 * DAY)]
    assert logged == [{"event": "retention.failed", "log_level": "error", "cause": "RuntimeError"}] * 2


async def test_a_ledger_that_fails_is_logged_and_raises_nothing() -> None:
    class FailingLedger:
        async def take_lease(self, _name: str, _seconds: float) -> bool:
            raise LedgerUnavailable(operator_note="the disk is full")

    with capture_logs() as logged:
        await delete_old_data(FailingLedger(), keep_seconds=NOW)  # type: ignore[arg-type]

    assert logged == [
        {
            "event": "retention.stopped",
            "log_level": "warning",
            "code": "ledger_unavailable",
            "note": "the disk is full",
        }
    ]
