"""What the ledger need not keep is deleted, with or without a reconciler."""

import pytest
import structlog

from tests.settlement.given import NOW, Clock, granted
from voicepass.errors import LedgerUnavailable
from voicepass.ledger.sqlite import open_sqlite
from voicepass.settlement.retention import Retention

pytestmark = pytest.mark.anyio

DAY = 24 * 3600


async def test_a_round_forgets_what_is_older_than_the_ledger_is_to_remember() -> None:
    clock = Clock()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        await granted(ledger)
        remembered = []

        for days in (30, 2):
            clock.now += days * DAY
            await Retention(ledger=ledger, keep_seconds=31 * DAY).run_round()
            remembered.append(len(await ledger.listed(most=10)))

    assert remembered == [1, 0]


async def test_one_instance_deletes_and_the_others_do_not() -> None:
    clock = Clock()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        await granted(ledger)
        await ledger.lease("retention", 60)
        clock.now += 59

        await Retention(ledger=ledger, keep_seconds=1).run_round()

        assert len(await ledger.listed(most=10)) == 1


async def test_a_ledger_that_is_out_is_reported_and_ends_nothing() -> None:
    class Out:
        async def lease(self, _name: str, _seconds: float) -> bool:
            raise LedgerUnavailable(operator_note="the disk is full")

    with structlog.testing.capture_logs() as logged:
        await Retention(ledger=Out(), keep_seconds=NOW).run_round()  # type: ignore[arg-type]

    assert [(line["event"], line["note"]) for line in logged] == [("retention.stopped", "the disk is full")]
