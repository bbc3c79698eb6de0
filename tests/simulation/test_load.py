"""At ten passes a second and without a webhook, the reconciler settles in time and with few calls."""

import asyncio
import random
from typing import Final

import pytest

from tests.simulation.day import compare
from tests.simulation.elevenlabs_model import Conversation
from tests.simulation.honest import HOUR, MINUTE
from tests.simulation.service import START, Service
from tests.simulation.virtual_time import VirtualTime, run
from voicepass.ledger.sqlite import open_sqlite
from voicepass.model import IssuedPass

PASSES_PER_SECOND: Final = 10
MOST_LAG_SECONDS: Final = 5 * MINUTE
MOST_UNOPENED_SECONDS: Final = 20 * MINUTE


async def use_pass(service: Service, user_id: str, chance: random.Random) -> None:
    given = await service.ask(user_id)
    if chance.random() < 0.1:
        return  # this pass is never opened
    await asyncio.sleep(chance.choice([1.0, 1.0, 1.0, chance.uniform(1, 800)]))
    opened = service.elevenlabs.open(given.url)
    await asyncio.sleep(chance.uniform(5, 400))
    service.elevenlabs.hang_up(opened)


def issue_passes(*, seconds: int, passes_per_second: int, are_opened: bool) -> tuple[Service, dict[str, IssuedPass]]:
    """Issue passes for `seconds`, wait until all are settled, and return the ledger's rows by conversation."""
    time = VirtualTime()
    chance = random.Random("load")
    service = Service(time=time, chance=chance, has_webhook=False)

    async def issue() -> dict[str, IssuedPass]:
        async with service.run_instances(lambda clock: open_sqlite(":memory:", clock=clock), instances=1):
            async with asyncio.TaskGroup() as group:
                for second in range(seconds):
                    for number in range(passes_per_second):
                        user_id = f"u-{second}-{number}"
                        group.create_task(
                            use_pass(service, user_id, chance) if are_opened else ask_for_pass(service, user_id)
                        )
                    await asyncio.sleep(1)
            await service.elevenlabs.aclose()
            await asyncio.sleep(HOUR)
            rows = [row async for row in service.instances[0].ledger.read_every_pass()]
        assert compare(rows, service.elevenlabs.conversations_by_id.values()) == []
        return {row.conversation_id or "": row for row in rows}

    return service, run(time, issue)


async def ask_for_pass(service: Service, user_id: str) -> None:
    await service.ask(user_id)


@pytest.mark.parametrize(
    "seconds", [60, pytest.param(3600, marks=[pytest.mark.long, pytest.mark.timeout(900)])], ids=["minute", "hour"]
)
def test_ended_conversations_are_settled_within_five_minutes_with_one_call_for_twenty(seconds: int) -> None:
    per_second = PASSES_PER_SECOND if seconds > 60 else 2

    service, rows = issue_passes(seconds=seconds, passes_per_second=per_second, are_opened=True)

    opened = [each for each in service.elevenlabs.conversations_by_id.values() if each.opened_at is not None]
    calls = service.elevenlabs.calls
    lags = sorted(find_lag_seconds(each, rows) for each in opened)
    print(f"\n{len(rows):,} passes, {len(opened):,} conversations, calls: {dict(calls)}")
    print(f"settled after their end: half in {lags[len(lags) // 2]:.0f} s, all in {lags[-1]:.0f} s")
    assert lags[-1] <= MOST_LAG_SECONDS
    if seconds == HOUR:
        assert (calls["list"] + calls["single conversation"]) * 20 <= len(opened)


@pytest.mark.parametrize("passes", [100, pytest.param(2000, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
def test_passes_that_nobody_opened_are_released_within_20_minutes(passes: int) -> None:
    service, rows = issue_passes(seconds=1, passes_per_second=passes, are_opened=False)

    slowest = max((row.settled_at or START) - row.reserved_at for row in rows.values())
    print(f"\n{len(rows):,} unopened passes: the last one released after {slowest / 60:.1f} minutes")
    print(f"calls: {dict(service.elevenlabs.calls)}")
    assert {row.settled_by for row in rows.values()} == {"expiry"}
    assert slowest <= MOST_UNOPENED_SECONDS


def find_lag_seconds(conversation: Conversation, rows: dict[str, IssuedPass]) -> float:
    settled_at = rows[conversation.conversation_id].settled_at
    assert settled_at is not None
    assert conversation.ended_at is not None
    return settled_at - conversation.ended_at
