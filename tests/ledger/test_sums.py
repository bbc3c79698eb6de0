"""The sums of an agent and of all users always equal their passes, and every limit is exact, after any history."""

import asyncio
import math
from collections import Counter
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ledger.given import (
    ALONE_ON_POSTGRES,
    START,
    Engine,
    TurnedClock,
    credential,
    find_refusal,
    grant_pass,
    limit,
    reservation,
    rows,
    settlement,
)
from tests.tables import table
from voicepass.errors import BadAnswer, LedgerUnavailable, LimitReached
from voicepass.ledger import Ledger
from voicepass.ledger.dialogue import Row
from voicepass.ledger.limits import count, find_room, prepare_question
from voicepass.ledger.records import check
from voicepass.ledger.sums import KEPT_SECONDS, LENGTHS, find_days, list_days
from voicepass.model import Counted, Limit, Scope

pytestmark = pytest.mark.anyio

DAY = 86_400
WINDOWS = (60, 3600, DAY, 30 * DAY)
WHOSE = {"token_issuer": "https://login.example", "user_id": "u-1", "agent_alias": "default"}
LIMITS = [
    limit(0, scope=scope, counted=counted, window_seconds=seconds)
    for scope in Scope
    for counted, windows in {
        Counted.PASSES: WINDOWS,
        Counted.REQUESTS: (60,),
        Counted.CONVERSATIONS: (DAY,),
        Counted.SECONDS: WINDOWS,
    }.items()
    for seconds in windows
]

Sums = dict[tuple[str, int, int], tuple[int, int, int]]


async def read_sums(ledger: Ledger, *, oldest: float) -> tuple[Sums, Sums]:
    """Return the stored sums and the expected ones. Each has the passes, seconds and open passes of a slot."""
    kept = {length: (oldest - KEPT_SECONDS[length]) / length + 1 for length in LENGTHS}
    found: Sums = {
        (row["scope"], row["length"], row["slot"]): (row["passes"], row["seconds"], row["open"])
        for row in await rows(ledger, "SELECT * FROM sums")
        if row["slot"] >= kept[row["length"]] and (row["passes"] or row["seconds"] or row["open"])
    }
    expected: dict[tuple[str, int, int], Counter[str]] = {}
    for row in await rows(ledger, "SELECT * FROM passes"):
        for scope in ("all", f"agent {row['agent_alias']}"):
            for length in LENGTHS:
                slot = expected.setdefault((scope, length, int(row["reserved_at"] // length)), Counter())
                slot.update(passes=1, seconds=row["seconds"])
            if row["settled_at"] is None and row["ended_at"] is None:
                expected.setdefault((scope, 60, int(row["lapses_at"] // 60)), Counter()).update(open=1)
    wanted = {
        key: (slot["passes"], slot["seconds"], slot["open"])
        for key, slot in expected.items()
        if key[2] >= kept[key[1]] and any(slot.values())
    }
    return found, wanted


def list_amounts(counted: Limit, passes: Sequence[Row], failed: Sequence[Row], now: float) -> list[tuple[float, int]]:
    """Return (time of the reservation, amount) of each pass that counts, newest first."""
    since = now - counted.window_seconds
    whose = [row for row in passes if is_of(counted.scope, row)]
    match counted.counted:
        case Counted.CONVERSATIONS:
            is_open = [row for row in whose if row["settled_at"] is None and row["ended_at"] is None]
            return [(row["reserved_at"], 1) for row in is_open if row["lapses_at"] > now]
        case Counted.SECONDS:
            amounts = [(row["reserved_at"], row["seconds"]) for row in whose if row["seconds"] > 0]
        case Counted.PASSES:
            amounts = [(row["reserved_at"], 1) for row in whose]
        case Counted.REQUESTS:
            amounts = [(row["reserved_at"], 1) for row in [*whose, *failed] if is_of(counted.scope, row)]
    return sorted([(at, amount) for at, amount in amounts if at > since], reverse=True)


def is_of(scope: Scope, row: Row) -> bool:
    names = {Scope.USER: ("user_id", "token_issuer"), Scope.AGENT: ("agent_alias",), Scope.ALL: ()}[scope]
    return all(row[name] == WHOSE[name] for name in names)


def find_reset(counted: Sequence[tuple[float, int]], most: int, window_seconds: int) -> float | None:
    since_then = 0
    for reserved_at, amount in counted:
        since_then += amount
        if since_then >= most:
            return reserved_at + window_seconds
    return None


class History:
    """Applies events to passes, step by step."""

    def __init__(self, ledger: Ledger, clock: TurnedClock) -> None:
        self._ledger = ledger
        self._clock = clock
        self._conversations = ["conv_unknown"]
        self._reserved = [reservation()]
        self.latest = clock.now

    async def step(self, what: str, number: int, agent: str) -> None:
        chosen = self._conversations[number % len(self._conversations)]
        user_id = f"u-{number % 3}"
        match what:
            case "grant":
                facts = {"user_id": user_id, "agent_alias": agent, "seconds": 60 * (number % 16)}
                self._conversations.append(await grant_pass(self._ledger, [], **facts))
            case "reserve" | "reserve ready":
                named = chosen if number % 5 == 0 else None  # sometimes a conversation that has a pass already
                self._reserved.append(reservation(user_id, agent_alias=agent))
                with suppress(BadAnswer):
                    ready = credential(named) if what == "reserve ready" else None
                    await self._ledger.reserve(self._reserved[-1], [], ready=ready)
            case "grant late":
                with suppress(LedgerUnavailable):
                    await self._ledger.grant(self._reserved[number % len(self._reserved)], credential())
            case "release":
                reserved = self._reserved[number % len(self._reserved)]
                await self._ledger.release(reserved, has_reached=number % 2 == 0)
            case "settle" | "settle again":
                source = "webhook" if what == "settle again" else "reconciler"
                await self._ledger.settle(settlement(chosen, seconds=number % 1200, source=source))
            case "expire":
                await self._ledger.note_unopened(chosen, expires_seconds=0)
            case "open":
                await self._ledger.note_opened(chosen, 0)
            case "end":
                await self._ledger.note_ended(chosen)
            case "forget":
                await self._ledger.erase_sealed()
                await self._ledger.delete_old(age_seconds=31 * DAY)
            case _:
                seconds = {"wait": number / 7, "wait for long": number * 100, "step back": -min(number * 5, DAY)}
                self._clock.now += seconds[what]
        self.latest = max(self.latest, self._clock.now)


async def begin_history(ledger: Ledger, clock: TurnedClock) -> History:
    for name in ("passes", "sums", "orphans", "failed_requests"):
        await rows(ledger, f"DELETE FROM {name}")  # noqa: S608
    clock.now = START + 0.25
    return History(ledger, clock)


EVENTS = [
    "grant",
    "reserve",
    "reserve ready",
    "grant late",
    "release",
    "settle",
    "settle again",
    "expire",
    "open",
    "end",
    "forget",
]
STEPS = st.lists(
    st.tuples(
        st.sampled_from([*EVENTS, "wait", "wait", "wait for long", "step back"]),
        st.integers(0, 20_000),
        st.sampled_from(["default", "other"]),
    ),
    min_size=5,
    max_size=40,
)


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, most=st.integers(1, 4000))
async def test_after_any_history_the_sums_equal_the_passes_and_the_limits_are_exact(
    ledger: Ledger, clock: TurnedClock, steps: list[tuple[str, int, str]], most: int
) -> None:
    await check_history(ledger, clock, steps, most)


GRANT, WAIT = ("grant", 10, "default"), ("wait", 700, "")
"""A pass of ten minutes, and a wait of 100 seconds. In each history, the number 1 names the first pass."""


@table(
    "steps",
    [
        [GRANT, WAIT, ("expire", 1, "")],
        [GRANT, WAIT, ("expire", 1, ""), ("open", 1, "")],
        [GRANT, WAIT, ("expire", 1, ""), ("end", 1, "")],
        [GRANT, WAIT, ("end", 1, ""), ("expire", 1, "")],
        [GRANT, WAIT, ("end", 1, ""), ("settle", 43, "")],
        [GRANT, WAIT, ("expire", 1, ""), ("settle", 43, "")],
        [GRANT, WAIT, ("settle", 43, ""), ("settle again", 85, "")],
        [("reserve", 1, "default"), ("release", 1, "")],
        [("reserve", 1, "default"), ("reserve", 1, "other"), ("release", 2, "")],
        [("reserve", 1, "default"), ("wait", 7000, "")],
    ],
)
async def test_each_event_changes_the_sums_as_it_changes_its_pass(
    ledger: Ledger, clock: TurnedClock, steps: list[tuple[str, int, str]]
) -> None:
    history = await begin_history(ledger, clock)

    for each in steps:
        await history.step(*each)
    await ledger.reserve(reservation("nobody", agent_alias="nobody"), [])  # deletes what has lapsed

    found, expected = await read_sums(ledger, oldest=clock.now)
    assert found == expected


@pytest.mark.long
@pytest.mark.parametrize("engine", ["sqlite", "postgres"], indirect=True)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, most=st.integers(1, 4000))
async def test_after_sixty_histories_the_sums_equal_the_passes_and_the_limits_are_exact(
    ledger: Ledger, clock: TurnedClock, steps: list[tuple[str, int, str]], most: int
) -> None:
    await check_history(ledger, clock, steps, most)


async def check_history(ledger: Ledger, clock: TurnedClock, steps: list[tuple[str, int, str]], most: int) -> None:
    history = await begin_history(ledger, clock)

    for each in steps:
        await history.step(*each)

    await ledger.reserve(reservation("nobody", agent_alias="nobody"), [])  # deletes what has lapsed
    found, expected = await read_sums(ledger, oldest=history.latest)
    assert found == expected
    passes, failed = await rows(ledger, "SELECT * FROM passes"), await rows(ledger, "SELECT * FROM failed_requests")
    for checked in LIMITS:
        if checked.counted is Counted.REQUESTS and "step back" in [what for what, *_ in steps]:
            continue  # failed requests are deleted after two minutes, but stay in the sums
        await check_limit(ledger, checked, list_amounts(checked, passes, failed, clock.now), most)


async def check_limit(ledger: Ledger, checked: Limit, counted: list[tuple[float, int]], most: int) -> None:
    used = sum(amount for _, amount in counted)
    whole = limit(min(most, used), scope=checked.scope, counted=checked.counted, window_seconds=checked.window_seconds)

    answer = await ledger.run(lambda now: count(now, whole, WHOSE))

    assert answer.used == used
    if used and checked.counted is not Counted.CONVERSATIONS:
        assert answer.resets_at == find_reset(counted, whole.most, checked.window_seconds)
    for spare in (0, 1):
        edge = limit(used + spare, scope=checked.scope, counted=checked.counted, window_seconds=checked.window_seconds)
        question = prepare_question([edge])
        try:
            room = await ledger.run(partial(find_room, question=question, whose=WHOSE, seconds=600))
        except LimitReached:
            room = 0
        assert room == (0 if not spare else 1 if checked.counted is Counted.SECONDS else 600)


@ALONE_ON_POSTGRES
async def test_settlements_and_expiries_at_once_keep_the_sums_correct(engine: Engine, clock: TurnedClock) -> None:
    async with engine.instances() as instances:
        conversations = [await grant_pass(instances[0], agent_alias=f"a-{n % 3}") for n in range(40)]
        clock.now += 3600
        changes: list[Coroutine[Any, Any, object]] = [
            instance.settle(settlement(each)) for each in conversations for instance in instances
        ]
        changes += [instances[0].note_unopened(each, expires_seconds=0) for each in conversations]
        changes += [instances[-1].note_ended(each) for each in conversations]
        changes += [instances[-1].reserve(reservation(f"u-{n}", agent_alias=f"a-{n % 3}"), []) for n in range(40)]

        await asyncio.gather(*changes)
        found, expected = await read_sums(instances[0], oldest=clock.now)

    assert found == expected


DAMAGES = [
    "UPDATE sums SET passes = passes + 1 WHERE scope = 'all' AND length = 5",
    "UPDATE sums SET seconds = 0 WHERE length = 86400",
    "DELETE FROM sums WHERE scope = 'agent default'",
    "UPDATE sums SET open = open + 1 WHERE open > 0",
    "INSERT INTO sums VALUES ('agent gone', 3600, 500000, 3, 0, 180, 0)",
    "UPDATE passes SET seconds = seconds + 7",
]


@pytest.mark.parametrize("engine", ["sqlite", pytest.param("postgres", marks=pytest.mark.long)], indirect=True)
async def test_sums_that_differ_from_their_passes_are_found_and_corrected(ledger: Ledger, clock: TurnedClock) -> None:
    for _ in range(3):
        await grant_pass(ledger, seconds=600)
        clock.now += 400
    await ledger.settle(settlement(await grant_pass(ledger)))
    untouched = await ledger.fix_sums()

    for damage in DAMAGES:
        await rows(ledger, damage)
        corrections = await ledger.fix_sums()
        found, expected = await read_sums(ledger, oldest=clock.now)

        assert corrections
        assert found == expected
    assert untouched == []
    assert await ledger.fix_sums() == []


@pytest.mark.parametrize("engine", ["sqlite", pytest.param("postgres", marks=pytest.mark.long)], indirect=True)
async def test_sums_that_equal_their_passes_are_left_as_they_are(ledger: Ledger, clock: TurnedClock) -> None:
    for _ in range(3):
        await grant_pass(ledger)
        clock.now += DAY
    await ledger.delete_old(age_seconds=31 * DAY)  # which deletes the short slots of the first day
    for _ in range(2):
        await grant_pass(ledger, seconds=600)
        clock.now += 60
    clock.now = START + 3 * DAY + 1560 + 30  # the first lapsed half a minute ago; the second lapses in half a minute

    assert await ledger.fix_sums() == []


async def test_the_days_from_the_oldest_pass_to_the_newest_are_compared_and_thirty_at_most(
    ledger: Ledger, clock: TurnedClock
) -> None:
    first = int(START // DAY)
    days = [await ledger.run(find_days)]
    for wait in (0, 2, 28):
        clock.now += wait * DAY
        await grant_pass(ledger)
        days.append(await ledger.run(find_days))

    assert days == [range(0), range(first, first + 1), range(first, first + 3), range(first + 1, first + 31)]


async def test_a_check_that_writes_as_much_as_a_pass_leaves_nothing_in_the_sums(ledger: Ledger) -> None:
    await grant_pass(ledger)

    await ledger.run(partial(check, name="check 1", is_whole=True))

    assert await rows(ledger, "SELECT * FROM failed_requests") == []
    found, expected = await read_sums(ledger, oldest=START)
    assert found == expected


async def test_the_sums_of_the_last_thirty_days_are_listed_with_those_of_today(
    ledger: Ledger, clock: TurnedClock
) -> None:
    today = int(START // DAY)
    for day in (today - 30, today - 29, today, today + 1):
        clock.now = day * DAY
        await grant_pass(ledger)
    clock.now = START

    found = await ledger.run(list_days)

    assert {(row["scope"], row["slot"]) for row in found} == {
        (scope, day) for scope in ("agent default", "all") for day in (today - 29, today)
    }
    assert {row["length"] for row in found} == {DAY}


@pytest.mark.parametrize("scope", [Scope.AGENT, Scope.ALL])
async def test_a_limit_resets_with_the_pass_that_reached_it_however_many_share_its_slots(
    ledger: Ledger, clock: TurnedClock, scope: Scope
) -> None:
    for after in (0, 1, 14, 4000):
        clock.now = START + after
        await grant_pass(ledger)

    reached = await find_refusal(ledger, [limit(3, scope=scope, window_seconds=DAY)])

    assert reached is not None
    assert reached.resets_at == START + 1 + DAY


async def test_old_passes_sums_and_orphans_are_deleted_and_new_ones_kept(ledger: Ledger, clock: TurnedClock) -> None:
    for name in ("old", "young"):
        await grant_pass(ledger, user_id=name, seconds=100)
        await ledger.settle(settlement(f"conv_{name}"))  # an orphan, because its pass is never granted
        clock.now += 40 * DAY
    clock.now -= 40 * DAY

    await ledger.delete_old(age_seconds=31 * DAY)

    sums = await rows(ledger, "SELECT * FROM sums WHERE passes > 0")
    assert {row["user_id"] for row in await rows(ledger, "SELECT user_id FROM passes")} == {"young"}
    assert [row["conversation_id"] for row in await rows(ledger, "SELECT * FROM orphans")] == ["conv_young"]
    assert len(sums) == len(LENGTHS) * 2
    assert all(math.isclose(row["slot"] * row["length"], clock.now, abs_tol=row["length"]) for row in sums)


@pytest.mark.parametrize("scope", [Scope.AGENT, Scope.ALL])
async def test_passes_by_a_clock_that_was_ahead_still_count(ledger: Ledger, clock: TurnedClock, scope: Scope) -> None:
    limits = [limit(600, scope=scope, counted=Counted.SECONDS, window_seconds=DAY)]
    clock.now = START + 7200
    await grant_pass(ledger, limits, seconds=100)
    clock.now = START
    await grant_pass(ledger, limits, seconds=500)

    clock.now = START + 7200
    reached = await find_refusal(ledger, limits, seconds=1)

    assert reached is not None
