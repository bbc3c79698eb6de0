"""Minutes of an agent or of all are kept added up by the quarter of an hour: always equal to the passes themselves."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ledger.given import (
    ALONE_ON_POSTGRES,
    START,
    Engine,
    TurnedClock,
    granted,
    limit,
    refusal,
    reservation,
    rows,
    settlement,
)
from voicepass.ledger import Ledger
from voicepass.ledger.limits import usage
from voicepass.model import Counted, Limit, Scope, Usage

pytestmark = pytest.mark.anyio

DAY = 86_400
HUGE = 1_000_000_000
WINDOWS = (60, 3600, DAY, 30 * DAY)
WHOSE = {"token_issuer": "https://login.example", "user_id": "u-1", "agent_alias": "default"}


def minutes(scope: Scope, window_seconds: int, most: int = HUGE) -> Limit:
    return limit(most, scope=scope, counted=Counted.SECONDS, window_seconds=window_seconds)


async def asked(ledger: Ledger, limits: Sequence[Limit]) -> list[Usage]:
    return await ledger._run(lambda now: usage(WHOSE, limits, now), locks=["agent default", "all"])


async def passes(ledger: Ledger, clock: TurnedClock, scope: Scope, window_seconds: int) -> list[Any]:
    """(reserved_at, seconds) of the window's passes, newest first, each looked at."""
    found = await rows(ledger, "SELECT reserved_at, seconds, agent_alias FROM passes ORDER BY reserved_at DESC")
    return [
        (row["reserved_at"], row["seconds"])
        for row in found
        if row["reserved_at"] > clock.now - window_seconds and (scope is Scope.ALL or row["agent_alias"] == "default")
    ]


def reset(counted: list[Any], most: int, window_seconds: int) -> float | None:
    since_then = 0
    for reserved_at, seconds in counted:
        since_then += seconds
        if since_then >= most:
            return float(reserved_at + window_seconds)
    return None


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["grant", "reserve", "settle", "settle again", "expire", "ask", "wait"]),
        st.integers(0, 20_000),
        st.sampled_from(["default", "other"]),
    ),
    min_size=5,
    max_size=40,
)


async def step(ledger: Ledger, conversations: list[str], what: str, number: int, agent: str) -> None:
    chosen = conversations[number % len(conversations)] if conversations else "conv_unknown"
    match what:
        case "grant":
            conversations.append(await granted(ledger, agent_alias=agent, seconds=number % 900))
        case "reserve":
            await ledger.reserve(reservation(agent_alias=agent), [])
        case "settle" | "settle again":
            source = "webhook" if what == "settle again" else "reconciler"
            await ledger.settle(settlement(chosen, seconds=number % 1200, source=source))
        case "expire":
            await ledger.expire(chosen)
        case "ask":
            limits = [minutes(Scope.ALL, WINDOWS[number % 4]), minutes(Scope.AGENT, WINDOWS[number % 3])]
            await asked(ledger, limits)


@ALONE_ON_POSTGRES
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, most=st.integers(1, 4000))
async def test_whatever_happens_the_sums_equal_the_passes(
    ledger: Ledger, clock: TurnedClock, steps: list[tuple[str, int, str]], most: int
) -> None:
    for emptied in ("DELETE FROM passes", "DELETE FROM quarters", "DELETE FROM orphans"):
        await rows(ledger, emptied)
    clock.now = START
    conversations: list[str] = []
    for what, number, agent in steps:
        await step(ledger, conversations, what, number, agent)
        clock.now += number if what == "wait" else 0

    limits = [minutes(scope, window, most) for scope in (Scope.AGENT, Scope.ALL) for window in WINDOWS]
    answers = await asked(ledger, limits)

    for answer in answers:
        counted = await passes(ledger, clock, answer.limit.scope, answer.limit.window_seconds)
        assert answer.used == sum(seconds for _, seconds in counted)
        if answer.used >= most:
            assert answer.resets_at == reset(counted, most, answer.limit.window_seconds)


async def test_a_limit_that_comes_later_or_looks_further_back_counts_what_was_before(
    ledger: Ledger, clock: TurnedClock
) -> None:
    for _ in range(6):
        await granted(ledger, seconds=100)
        clock.now += DAY / 4

    (day,) = await asked(ledger, [minutes(Scope.ALL, DAY)])
    (month,) = await asked(ledger, [minutes(Scope.ALL, 30 * DAY)])
    clock.now += 2 * DAY  # nobody asks for long
    await granted(ledger, seconds=7)
    clock.now += 3600
    later = await asked(ledger, [minutes(Scope.ALL, DAY), minutes(Scope.ALL, 30 * DAY), minutes(Scope.AGENT, 3 * DAY)])

    assert (day.used, month.used) == (300, 600)
    assert [answer.used for answer in later] == [7, 607, 307]


@ALONE_ON_POSTGRES
async def test_a_settlement_and_the_sum_of_its_quarter_never_miss_each_other(
    engine: Engine, clock: TurnedClock
) -> None:
    """Many settle what an hour ago was reserved, while others ask for the first time: neither order loses anything."""
    async with engine.instances() as instances:
        conversations = [await granted(instances[0], seconds=600) for _ in range(60)]
        clock.now += 3600
        limits = [minutes(Scope.ALL, DAY), minutes(Scope.AGENT, DAY)]

        await asyncio.gather(
            *(
                instances[n % len(instances)].settle(settlement(conversation, seconds=n))
                for n, conversation in enumerate(conversations)
            ),
            *(refusal(instances[n % len(instances)], limits, seconds=0) for n in range(10)),
        )

        answers = await asked(instances[0], limits)
        assert [answer.used for answer in answers] == [sum(range(60))] * 2


@pytest.mark.parametrize("scope", [Scope.AGENT, Scope.ALL])
async def test_a_clock_that_was_ahead_for_a_while_hides_nothing(
    ledger: Ledger, clock: TurnedClock, scope: Scope
) -> None:
    limits = [minutes(scope, DAY, most=600)]
    clock.now = START + 7200
    await granted(ledger, limits, seconds=100)
    clock.now = START
    await granted(ledger, limits, seconds=500)

    clock.now = START + 7200
    reached = await refusal(ledger, limits, seconds=1)

    assert reached is not None


async def test_forgetting_deletes_old_passes_sums_and_orphans_and_no_young_ones(
    ledger: Ledger, clock: TurnedClock
) -> None:
    limits = [minutes(Scope.ALL, 30 * DAY), minutes(Scope.AGENT, 30 * DAY)]

    async def leave_something(name: str) -> None:
        await granted(ledger, user_id=name, seconds=100)
        await ledger.settle(settlement(f"conv_{name}"))  # it waits for a pass that never comes
        clock.now += 3600
        await asked(ledger, limits)  # adds the quarters up

    await leave_something("old")
    clock.now = START + 40 * DAY
    await leave_something("young")
    await ledger.forget(age_seconds=31 * DAY)

    oldest = (clock.now - 31 * DAY) // 900
    quarters = await rows(ledger, "SELECT scope, quarter, seconds FROM quarters")
    assert {row["user_id"] for row in await rows(ledger, "SELECT user_id FROM passes")} == {"young"}
    assert [row["conversation_id"] for row in await rows(ledger, "SELECT * FROM orphans")] == ["conv_young"]
    assert min(row["quarter"] for row in quarters) >= oldest
    assert {row["scope"] for row in quarters if row["seconds"] == 100} == {"all", "agent default"}
