"""Limits are exact for requests at the same instant, on one instance or on three."""

import asyncio
from collections import Counter

import pytest

from tests.ledger.given import (
    ALONE_ON_POSTGRES,
    START,
    Engine,
    credential,
    grant_pass,
    limit,
    reservation,
    rows,
    settlement,
)
from voicepass.errors import BadAnswer, QuotaExceeded, RateLimited
from voicepass.model import Counted, Scope

pytestmark = [pytest.mark.anyio, pytest.mark.alone]

REPEATS = [*range(3), *(pytest.param(number, marks=pytest.mark.long) for number in range(3, 20))]


@ALONE_ON_POSTGRES
@pytest.mark.parametrize("repeat", REPEATS)
async def test_300_requests_at_once_get_exactly_the_passes_that_the_limit_allows(engine: Engine, repeat: int) -> None:
    del repeat
    async with engine.instances() as ledgers:
        calls = [ledgers[n % len(ledgers)].reserve(reservation(), [limit(20)]) for n in range(300)]

        outcomes = Counter(type(outcome) for outcome in await asyncio.gather(*calls, return_exceptions=True))

    assert outcomes == {type(None): 20, RateLimited: 280}


@ALONE_ON_POSTGRES
async def test_200_requests_at_once_reserve_exactly_the_minutes_of_the_limit(engine: Engine) -> None:
    most = limit(50 * 60 + 30, counted=Counted.SECONDS, scope=Scope.ALL)
    async with engine.instances() as ledgers:
        calls = [ledgers[n % len(ledgers)].reserve(reservation(f"u-{n}", seconds=60), [most]) for n in range(200)]

        outcomes = Counter(type(outcome) for outcome in await asyncio.gather(*calls, return_exceptions=True))
        ((total,),) = [row.values() for row in await rows(ledgers[0], "SELECT sum(seconds) AS total FROM passes")]

    assert outcomes == {type(None): 51, QuotaExceeded: 149}  # the last one gets the half minute that is left
    assert int(total) == most.most


@ALONE_ON_POSTGRES
async def test_users_who_ask_at_once_do_not_use_each_others_limits(engine: Engine) -> None:
    async with engine.instances() as ledgers:
        calls = [ledgers[n % len(ledgers)].reserve(reservation(f"u-{n // 2}"), [limit(1)]) for n in range(100)]

        outcomes = Counter(type(outcome) for outcome in await asyncio.gather(*calls, return_exceptions=True))

    assert outcomes == {type(None): 50, RateLimited: 50}


async def test_a_conversation_that_is_granted_to_20_users_at_once_gets_one_owner(engine: Engine) -> None:
    async with engine.instances() as ledgers:
        reservations = [reservation(f"u-{n}") for n in range(20)]
        for each in reservations:
            await ledgers[0].reserve(each, [])

        outcomes = Counter(
            type(outcome)
            for outcome in await asyncio.gather(
                *(ledgers[n % len(ledgers)].grant(each, credential("conv_1")) for n, each in enumerate(reservations)),
                return_exceptions=True,
            )
        )

    assert outcomes == {type(None): 1, BadAnswer: 19}


async def test_a_settlement_at_the_same_instant_as_its_grant_is_never_lost(engine: Engine) -> None:
    async with engine.instances() as ledgers:
        reservations = [reservation(f"u-{n}") for n in range(40)]
        for each in reservations:
            await ledgers[0].reserve(each, [])

        await asyncio.gather(
            *(ledgers[0].grant(each, credential(f"conv_{n}")) for n, each in enumerate(reservations)),
            *(ledgers[-1].settle(settlement(f"conv_{n}")) for n in range(40)),
        )
        settled = [await ledgers[0].find_pass(f"conv_{n}") for n in range(40)]

    assert [each.seconds for each in settled] == [42] * 40


async def test_a_hundred_copies_of_a_webhook_settle_once(engine: Engine) -> None:
    async with engine.instances() as ledgers:
        conversation_id = await grant_pass(ledgers[0])

        outcomes = await asyncio.gather(
            *(ledgers[n % len(ledgers)].settle(settlement(conversation_id)) for n in range(100))
        )

    assert [outcome.seconds for outcome in outcomes if outcome is not None] == [42]


async def test_one_instance_at_a_time_holds_a_lease(engine: Engine) -> None:
    async with engine.instances() as ledgers:
        first = await asyncio.gather(*(ledgers[n % len(ledgers)].take_lease("reconciler", 60) for n in range(12)))
        engine.clock.now = START + 60
        then = await asyncio.gather(*(ledgers[n % len(ledgers)].take_lease("reconciler", 60) for n in range(12)))

    assert sorted(first) == sorted(then) == [False] * 11 + [True]


@ALONE_ON_POSTGRES
async def test_callers_who_hang_up_before_their_transaction_begins_reserve_nothing(engine: Engine) -> None:
    async with engine.open() as ledger:
        calls = [asyncio.create_task(ledger.reserve(reservation(f"u-{n}"), [limit(1)])) for n in range(200)]
        await asyncio.sleep(0)
        for each in calls:
            each.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await ledger.check()

        ((left,),) = [row.values() for row in await rows(ledger, "SELECT count(*) AS n FROM passes")]

        assert left <= 1  # SQLite may already have committed the first
        engine.clock.now += 900
        await ledger.reserve(reservation("u-0"), [limit(1, window_seconds=86_400)])
