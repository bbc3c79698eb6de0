"""A step of a clock changes no decision of a running ledger, and rows from a clock that was ahead block nobody."""

from dataclasses import replace

import pytest

from tests.ledger.given import (
    START,
    Engine,
    TurnedClock,
    credential,
    find_refusal,
    grant_pass,
    limit,
    reservation,
    rows,
)
from voicepass.ledger import Ledger
from voicepass.ledger.clock import SteadyClock
from voicepass.model import Counted, Scope, Turn

pytestmark = pytest.mark.anyio

HOUR = 3600.0
CONVERSATIONS = limit(1, counted=Counted.CONVERSATIONS, window_seconds=86_400)
MINUTES = limit(600, counted=Counted.SECONDS, window_seconds=1800)
MINUTES_OF_ALL = limit(600, counted=Counted.SECONDS, scope=Scope.ALL, window_seconds=1800)
PASSES = limit(1)


class Machine:
    """A machine whose wall clock a test sets forward or back, and its real elapsed time."""

    def __init__(self) -> None:
        self.wall, self.ticks = TurnedClock(), TurnedClock()
        self.clock = SteadyClock(wall=self.wall, ticks=self.ticks)

    def wait(self, seconds: float) -> None:
        self.wall.now += seconds
        self.ticks.now += seconds


@pytest.mark.parametrize("step", [-HOUR, HOUR])
@pytest.mark.parametrize("reached", [PASSES, CONVERSATIONS, MINUTES, MINUTES_OF_ALL], ids=lambda each: each.name)
async def test_a_clock_step_moves_a_reset_by_less_than_four_percent(
    engine: Engine, reached: object, step: float
) -> None:
    machine = Machine()
    limits = [each for each in (PASSES, CONVERSATIONS, MINUTES, MINUTES_OF_ALL) if each is reached]
    async with engine.open(machine.clock) as ledger:
        await grant_pass(ledger, limits)
        before = await find_refusal(ledger, limits)
        wait_seconds = 0 if before is None or before.retry_after_seconds is None else before.retry_after_seconds
        machine.wall.now += step

        at_once = await find_refusal(ledger, limits)
        machine.wait(wait_seconds * 0.96)
        just_before = await find_refusal(ledger, limits)
        machine.wait(wait_seconds * 0.08)
        then = await find_refusal(ledger, limits)

    assert wait_seconds > 0
    assert at_once is not None
    assert at_once.retry_after_seconds == wait_seconds
    assert just_before is not None
    assert then is None


@pytest.mark.parametrize("step", [-HOUR, HOUR])
async def test_a_clock_step_moves_a_leases_end_by_less_than_four_percent(engine: Engine, step: float) -> None:
    machine = Machine()
    async with engine.open(machine.clock) as ledger:
        taken = await ledger.take_lease("reconciler", 120)
        machine.wall.now += step

        at_once = await ledger.take_lease("reconciler", 120)
        machine.wait(120 * 0.96)
        just_before = await ledger.take_lease("reconciler", 120)
        machine.wait(120 * 0.08)
        then = await ledger.take_lease("reconciler", 120)

    assert (taken, at_once, just_before, then) == (True, False, False, True)


@pytest.mark.parametrize("step", [-HOUR, HOUR])
async def test_after_a_clock_step_the_ledger_still_knows_how_long_ago_a_list_was_read(
    engine: Engine, step: float
) -> None:
    machine = Machine()
    async with engine.open(machine.clock) as ledger:
        machine.wall.now += step
        conversation_id = await grant_pass(ledger)
        machine.wait(30)
        first = await ledger.begin_listing("agent_1", every_seconds=240, recent_seconds=1200)
        await ledger.note_opened(conversation_id, 20)
        await ledger.note_listed("agent_1", 15)
        (listing,) = await rows(ledger, "SELECT listed_until FROM listings")
        machine.wait(250)
        second = await ledger.begin_listing("agent_1", every_seconds=240, recent_seconds=1200)

    assert listing["listed_until"] == pytest.approx(START + 15, abs=1)  # by the clock of the passes
    assert first == pytest.approx(30 + 60, abs=1)
    assert second == pytest.approx(15 + 250 + 60, abs=10)


# -- rows from a clock that was ahead --------------------------------------------------------------------------------
# Here the ledger's own clock goes back: that of a database server, or that of a machine between two starts.


@pytest.mark.parametrize("back", [121.0, HOUR, 365 * 86_400.0])
async def test_a_lease_with_an_impossible_end_is_taken_over(ledger: Ledger, clock: TurnedClock, back: float) -> None:
    await ledger.take_lease("reconciler", 120)
    clock.now -= back

    assert await ledger.take_lease("reconciler", 120)
    assert not await ledger.take_lease("reconciler", 120)


async def test_after_a_step_back_a_lease_ends_at_most_its_own_length_later(ledger: Ledger, clock: TurnedClock) -> None:
    await ledger.take_lease("reconciler", 120)
    clock.now += 100  # 20 seconds are left
    clock.now -= 100  # by the clock, 120 seconds are left

    held = await ledger.take_lease("reconciler", 120)
    clock.now += 120
    lapsed = await ledger.take_lease("reconciler", 120)

    assert (held, lapsed) == (False, True)


@pytest.mark.parametrize("is_paused", [False, True], ids=["running", "paused"])
async def test_a_lookup_that_began_by_a_clock_that_was_ahead_delays_nobody(
    ledger: Ledger, clock: TurnedClock, *, is_paused: bool
) -> None:
    await ledger.begin_lookup(reservation(), CONVERSATIONS, seconds=1)
    if is_paused:
        await ledger.end_lookup(reservation(), CONVERSATIONS, has_freed=False)
    clock.now -= HOUR

    is_running = await ledger.is_lookup_running(reservation(), CONVERSATIONS)
    turn = await ledger.begin_lookup(reservation(), CONVERSATIONS, seconds=1)
    again = await ledger.begin_lookup(reservation(), CONVERSATIONS, seconds=1)

    assert (is_running, turn.turn, again.turn) == (False, Turn.OURS, Turn.RUNNING)


async def test_nobody_waits_for_a_reservation_by_a_clock_that_was_ahead(ledger: Ledger, clock: TurnedClock) -> None:
    await ledger.reserve(reservation(), [])
    during = await ledger.is_in_flight(reservation())
    clock.now -= HOUR

    assert during
    assert not await ledger.is_in_flight(reservation())


async def test_an_answer_noted_by_a_clock_that_was_ahead_is_not_recent(ledger: Ledger, clock: TurnedClock) -> None:
    reserved, given = reservation(), credential("conv_1")
    await ledger.reserve(reserved, [])
    await ledger.grant(reserved, replace(given, sealed=b"sealed"))
    await ledger.note_unopened("conv_1", expires_seconds=930)
    news = await ledger.list_unopened(reservation())
    clock.now -= HOUR

    assert [each.pass_id for each in news] == [reserved.pass_id]
    assert await ledger.list_unopened(reservation()) == []


async def test_a_list_that_was_read_by_a_clock_that_was_ahead_is_read_again(ledger: Ledger, clock: TurnedClock) -> None:
    await grant_pass(ledger)
    clock.now += HOUR
    await ledger.begin_listing("agent_1", every_seconds=240, recent_seconds=1200)
    await ledger.note_listed("agent_1", 15)
    clock.now = START + 60

    listing = await ledger.begin_listing("agent_1", every_seconds=240, recent_seconds=1200)
    never_opened = await ledger.list_never_opened("agent_1", 5, min_age_seconds=930)
    await ledger.note_listed("agent_1", 15)

    assert listing == 120
    assert never_opened == [], "by the correct clock, the pass can still be opened"
    (row,) = await rows(ledger, "SELECT listed_until FROM listings")
    assert row["listed_until"] == START + 45
