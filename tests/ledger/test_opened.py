"""Lookups of open conversations: one at a time, their results in the ledger, and sums that stay equal to the passes."""

import asyncio
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
from tests.ledger.given import settlement as settled_with
from tests.tables import table
from voicepass.errors import QuotaExceeded, RateLimited, TooManyConversations
from voicepass.ledger import Ledger
from voicepass.ledger.opened import LOOKUP_SECONDS
from voicepass.model import Counted, Scope, Transport, Turn

pytestmark = pytest.mark.anyio

DAY = 86_400
CONVERSATIONS = limit(3, counted=Counted.CONVERSATIONS, window_seconds=DAY)
MINUTES = limit(1800, counted=Counted.SECONDS, window_seconds=DAY)
MINUTES_OF_ALL = limit(1800, counted=Counted.SECONDS, scope=Scope.ALL, window_seconds=DAY)


async def test_a_lookup_lists_passes_that_count_and_unknown_ones_first(ledger: Ledger, clock: TurnedClock) -> None:
    first = await grant_pass(ledger)
    clock.now += 1
    second = await grant_pass(ledger)
    await grant_pass(ledger, user_id="u-2")
    ended = await grant_pass(ledger)
    await ledger.settle(settled_with(ended))
    await ledger.note_opened(first, 1)
    await ledger.reserve(reservation(), [])

    turn = await ledger.begin_lookup(reservation(), CONVERSATIONS, seconds=1)

    assert turn.turn is Turn.OURS
    assert [issued.conversation_id for issued in turn.passes] == [second, first]


@pytest.mark.parametrize("counted", [Counted.CONVERSATIONS, Counted.SECONDS])
async def test_a_lookup_lists_at_most_ten_passes(ledger: Ledger, counted: Counted) -> None:
    for _ in range(12):
        await grant_pass(ledger)

    turn = await ledger.begin_lookup(reservation(), limit(1, counted=counted), seconds=1)

    assert len(turn.passes) == 10


async def test_a_lookup_for_a_limit_of_all_lists_the_passes_of_all_users(ledger: Ledger) -> None:
    of_another = await grant_pass(ledger, user_id="u-2")

    turn = await ledger.begin_lookup(reservation(), limit(1, counted=Counted.CONVERSATIONS, scope=Scope.ALL), seconds=1)

    assert [issued.conversation_id for issued in turn.passes] == [of_another]


async def test_one_instance_looks_up_and_none_for_two_seconds_after_a_failure(
    engine: Engine, clock: TurnedClock
) -> None:
    async with engine.instances() as instances:

        async def begin_lookups() -> list[Turn]:
            calls = (each.begin_lookup(reservation(), CONVERSATIONS, seconds=1) for each in instances * 4)
            return [turn.turn for turn in await asyncio.gather(*calls)]

        at_once = await begin_lookups()
        await instances[0].end_lookup(reservation(), CONVERSATIONS, has_freed=False)
        paused = await begin_lookups()
        clock.now += 1.9
        still_paused = await begin_lookups()
        clock.now += 0.1
        then = await begin_lookups()
        await instances[-1].end_lookup(reservation(), CONVERSATIONS, has_freed=True)
        after_one_that_freed = await begin_lookups()
        of_another = await instances[0].begin_lookup(reservation(user_id="u-2"), CONVERSATIONS, seconds=1)

    assert at_once.count(Turn.OURS) == then.count(Turn.OURS) == after_one_that_freed.count(Turn.OURS) == 1
    assert set(at_once) <= {Turn.OURS, Turn.RUNNING}
    assert set(paused) == set(still_paused) == {Turn.PAUSED}
    assert of_another.turn is Turn.OURS


async def test_a_lookup_that_a_crash_ended_blocks_others_for_its_time_only(ledger: Ledger, clock: TurnedClock) -> None:
    await ledger.begin_lookup(reservation(), CONVERSATIONS, seconds=1)
    clock.now += 0.9
    during = await ledger.begin_lookup(reservation(), CONVERSATIONS, seconds=1)
    clock.now += 0.1

    after = await ledger.begin_lookup(reservation(), CONVERSATIONS, seconds=1)

    assert (during.turn, after.turn) == (Turn.RUNNING, Turn.OURS)


async def test_an_instance_whose_clock_is_three_seconds_behind_waits_for_the_lookup_of_another(
    ledger: Ledger, clock: TurnedClock
) -> None:
    await ledger.begin_lookup(reservation(), CONVERSATIONS, seconds=LOOKUP_SECONDS)
    clock.now -= 3

    is_running = await ledger.is_lookup_running(reservation(), CONVERSATIONS)
    turn = await ledger.begin_lookup(reservation(), CONVERSATIONS, seconds=1)

    assert (is_running, turn.turn) == (True, Turn.RUNNING)


async def test_a_reservation_is_in_flight_for_ten_seconds_or_until_its_grant(
    ledger: Ledger, clock: TurnedClock
) -> None:
    reserved = reservation()
    before = await ledger.is_in_flight(reservation())
    await ledger.reserve(reserved, [])
    during = await ledger.is_in_flight(reservation())
    of_another = await ledger.is_in_flight(reservation(user_id="u-2"))
    clock.now += 10
    left_behind = await ledger.is_in_flight(reservation())
    clock.now -= 10
    await ledger.grant(reserved, credential())
    after = await ledger.is_in_flight(reservation())

    assert (before, during, of_another, left_behind, after) == (False, True, False, False, False)


async def test_an_ended_conversation_costs_the_time_since_its_grant(ledger: Ledger, clock: TurnedClock) -> None:
    limits = [limit(1, counted=Counted.CONVERSATIONS, window_seconds=DAY), MINUTES]
    conversation_id = await grant_pass(ledger, limits)
    clock.now += 90.5

    freed = [await ledger.note_ended(conversation_id), await ledger.note_ended(conversation_id)]

    found = await ledger.find_pass(conversation_id)
    assert freed == [True, False]
    assert (found.seconds, found.settled_at) == (91, None)
    assert await find_refusal(ledger, limits) is None
    await ledger.settle(settled_with(conversation_id, seconds=60))
    assert (await ledger.find_pass(conversation_id)).seconds == 60


async def test_an_ended_conversation_never_costs_more_than_was_reserved(ledger: Ledger, clock: TurnedClock) -> None:
    conversation_id = await grant_pass(ledger, [MINUTES], seconds=600)
    clock.now += 1000

    await ledger.note_ended(conversation_id)

    assert (await ledger.find_pass(conversation_id)).seconds == 600


@pytest.mark.parametrize("scope", Scope)
async def test_ended_and_unopened_passes_give_minutes_back(ledger: Ledger, clock: TurnedClock, scope: Scope) -> None:
    """This is also true for passes whose quarter of an hour was summed up before."""
    limits = [limit(1800, counted=Counted.SECONDS, scope=scope, window_seconds=DAY)]
    ended, unopened, _ = [await grant_pass(ledger, limits, seconds=600) for _ in range(3)]
    clock.now += 90
    full = await find_refusal(ledger, limits)
    await ledger.note_ended(ended)
    clock.now += 1800  # their quarter of an hour is over, so the next question sums it up
    passing = reservation(seconds=1)
    await ledger.reserve(passing, limits)
    await ledger.release(passing)
    await ledger.note_unopened(unopened, expires_seconds=0)

    third = await grant_pass(ledger, limits, seconds=1800)

    assert isinstance(full, QuotaExceeded)
    assert (await ledger.find_pass(third)).seconds == 1800 - 90 - 0 - 600


async def test_a_pass_that_was_noted_as_open_is_never_released_as_unopened(ledger: Ledger, clock: TurnedClock) -> None:
    conversation_id = await grant_pass(ledger)
    clock.now += 5
    was_released = await ledger.note_opened(conversation_id, 0)
    clock.now += 1000

    has_expired = await ledger.note_unopened(conversation_id, expires_seconds=930)

    found = await ledger.find_pass(conversation_id)
    assert (was_released, has_expired) == (False, False)
    assert (found.opened_at, found.settled_at) == (START + 5, None)


async def test_an_unopened_pass_is_released_when_it_can_no_longer_be_opened(ledger: Ledger, clock: TurnedClock) -> None:
    conversation_id = await grant_pass(ledger)
    clock.now += 929
    released = [await ledger.note_unopened(conversation_id, expires_seconds=930)]
    clock.now += 1
    released += [await ledger.note_unopened(conversation_id, expires_seconds=930) for _ in range(2)]

    assert released == [False, True, False]
    assert (await ledger.find_pass(conversation_id)).settled_by == "expiry"


async def test_a_released_pass_counts_again_if_it_is_open_after_all(ledger: Ledger, clock: TurnedClock) -> None:
    limits = [limit(1, counted=Counted.CONVERSATIONS, window_seconds=DAY), MINUTES_OF_ALL]
    conversation_id = await grant_pass(ledger, limits, seconds=600)
    clock.now += 930
    sums = await rows(ledger, "SELECT * FROM sums ORDER BY scope, length, slot")
    await ledger.note_unopened(conversation_id, expires_seconds=0)

    counts_again = await ledger.note_opened(conversation_id, 31)

    found = await ledger.find_pass(conversation_id)
    assert counts_again
    assert (found.settled_at, found.settled_by, found.seconds, found.opened_at) == (None, None, 600, START + 899)
    assert await rows(ledger, "SELECT * FROM sums ORDER BY scope, length, slot") == sums
    assert isinstance(await find_refusal(ledger, limits), TooManyConversations)


async def test_a_pass_that_counts_again_is_charged_its_reserved_seconds(ledger: Ledger, clock: TurnedClock) -> None:
    minutes = [limit(60, counted=Counted.SECONDS, window_seconds=DAY)]
    opened, ended = await grant_pass(ledger, minutes, seconds=600), await grant_pass(ledger, seconds=60)
    clock.now += 930
    for conversation_id in (opened, ended):
        await ledger.note_unopened(conversation_id, expires_seconds=0)

    await ledger.note_opened(opened, 31)
    await ledger.note_ended(ended)

    assert [(await ledger.find_pass(each)).seconds for each in (opened, ended)] == [60, 60]


@table(("ended_after", "was_open"), [(930, True), (1559, True), (1560, False), (5000, False)])
async def test_a_released_pass_is_charged_if_it_was_used_after_all(
    ledger: Ledger, clock: TurnedClock, ended_after: int, *, was_open: bool
) -> None:
    clock.now = START
    conversation_id = await grant_pass(ledger, seconds=600)
    clock.now = START + 930
    await ledger.note_unopened(conversation_id, expires_seconds=0)
    clock.now = START + ended_after

    counted_as_open = await ledger.note_ended(conversation_id)

    found = await ledger.find_pass(conversation_id)
    assert counted_as_open is was_open
    assert (found.settled_at, found.seconds, found.opened_at) == (None, 600, START)


async def test_a_conversation_that_ends_at_the_instant_of_its_grant_costs_nothing(ledger: Ledger) -> None:
    conversation_id = await grant_pass(ledger, [MINUTES], seconds=600)

    await ledger.note_ended(conversation_id)

    assert (await ledger.find_pass(conversation_id)).seconds == 0


async def test_of_no_conversation_there_is_no_pass(ledger: Ledger) -> None:
    conversation_id = await grant_pass(ledger)

    found = [await ledger.find(asked) for asked in ([], ["conv_x"], [conversation_id, "conv_x"])]

    assert [[each.conversation_id for each in passes] for passes in found] == [[], [], [conversation_id]]


async def test_lookups_for_a_limit_of_all_reach_every_pass_and_list_the_users_own_first(ledger: Ledger) -> None:
    everyone = limit(40, counted=Counted.CONVERSATIONS, scope=Scope.ALL)
    others = {await grant_pass(ledger, user_id=f"u-{n}") for n in range(30)}
    for conversation_id in others:
        await ledger.note_unopened(conversation_id, expires_seconds=930)
    own = await grant_pass(ledger, user_id="u-own")
    seen: set[str | None] = set()
    for _ in range(60):
        turn = await ledger.begin_lookup(reservation("u-own"), everyone, seconds=1)
        await ledger.end_lookup(reservation("u-own"), everyone, has_freed=True)
        assert turn.passes[0].conversation_id == own
        seen |= {issued.conversation_id for issued in turn.passes}

    assert seen == others | {own}


async def test_a_pass_that_is_not_granted_yet_may_fail_at_any_moment(ledger: Ledger) -> None:
    limits = [limit(1, counted=Counted.CONVERSATIONS, window_seconds=DAY)]
    await ledger.reserve(reservation(), limits)

    reached = await find_refusal(ledger, limits)

    assert reached is not None
    assert reached.retry_after_seconds == 3


# When to retry.


async def test_while_a_pass_is_open_a_retry_may_succeed_after_three_seconds(ledger: Ledger, clock: TurnedClock) -> None:
    limits = [limit(1, counted=Counted.CONVERSATIONS, window_seconds=DAY)]
    conversation_id = await grant_pass(ledger, limits)
    unknown = await find_refusal(ledger, limits)

    await ledger.note_unopened(conversation_id, expires_seconds=930)
    unopened = await find_refusal(ledger, limits)
    await ledger.note_opened(conversation_id, 0)
    reached = await find_refusal(ledger, limits)

    assert unopened is not None
    assert unopened.retry_after_seconds == 930  # after these seconds it is released
    assert unknown is not None
    assert unknown.retry_after_seconds == 1560  # until it lapses, because the ledger cannot tell whether it is open
    assert isinstance(reached, TooManyConversations)
    assert (reached.retry_after_seconds, reached.resets_at) == (3, clock.now + 3)


async def test_a_refusal_names_a_limit_of_passes_before_one_that_a_lookup_may_change(ledger: Ledger) -> None:
    limits = [limit(1), limit(1, counted=Counted.CONVERSATIONS, window_seconds=DAY)]
    await grant_pass(ledger, limits)

    reached = await find_refusal(ledger, limits)

    assert isinstance(reached, RateLimited)
    assert reached.limit_name == "user_passes"


# ElevenLabs' list.


async def test_the_list_of_an_agent_without_passes_is_read_from_where_the_last_reading_ended(
    ledger: Ledger, clock: TurnedClock
) -> None:
    first = await ledger.begin_listing("agent_1", every_seconds=240, recent_seconds=1200)
    await ledger.note_listed("agent_1", 15)
    at_once = await ledger.begin_listing("agent_1", every_seconds=240, recent_seconds=1200)
    clock.now += 239
    soon = await ledger.begin_listing("agent_1", every_seconds=240, recent_seconds=1200)
    clock.now += 1
    then = await ledger.begin_listing("agent_1", every_seconds=240, recent_seconds=1200)

    assert first == 1200 + 60
    assert (at_once, soon) == (None, None)
    assert then == 240 + 15 + 60


# The sealed credential.


async def test_unopened_passes_are_listed_by_user_agent_and_transport(ledger: Ledger, clock: TurnedClock) -> None:
    others = [
        reservation(user_id="u-2"),
        reservation(token_issuer="https://other.example"),
        reservation(agent_id="agent_2"),
        reservation(transport=Transport.WEBRTC),
    ]
    own = [reservation(), reservation()]
    given = [credential() for _ in [*others, *own]]
    for number, each in enumerate([*others, *own]):
        clock.now += 1
        await ledger.reserve(each, [])
        await ledger.grant(each, replace(given[number], sealed=bytes([number, 0, 255])))
    unsealed, its = reservation(), credential()
    await ledger.reserve(unsealed, [])
    await ledger.grant(unsealed, its)

    nobody_asked = await ledger.list_unopened(reservation())
    for kept in [*given, its]:
        assert not await ledger.note_unopened(kept.conversation_id or "", expires_seconds=930)
    found = await ledger.list_unopened(reservation())
    clock.now += 5
    long_ago = await ledger.list_unopened(reservation())

    assert nobody_asked == long_ago == []
    assert [(each.pass_id, each.sealed) for each in found] == [
        (own[1].pass_id, b"\5\0\xff"),
        (own[0].pass_id, b"\4\0\xff"),
    ]


@pytest.mark.parametrize("event", ["opened", "ended", "settled", "expired", "too old to be opened"])
async def test_a_sealed_credential_is_erased_when_it_is_useless(ledger: Ledger, clock: TurnedClock, event: str) -> None:
    reserved, given = reservation(), credential("conv_1")
    await ledger.reserve(reserved, [])
    await ledger.grant(reserved, replace(given, sealed=b"sealed"))
    await ledger.note_unopened("conv_1", expires_seconds=930)
    kept = await rows(ledger, "SELECT sealed FROM passes")
    clock.now += 901

    match event:
        case "opened":
            await ledger.note_opened("conv_1", 901)
        case "ended":
            await ledger.note_ended("conv_1")
        case "settled":
            await ledger.settle(settled_with("conv_1"))
        case "expired":
            await ledger.note_unopened("conv_1", expires_seconds=0)
        case _:
            await ledger.erase_sealed()

    assert [bytes(row["sealed"]) for row in kept] == [b"sealed"]
    assert await rows(ledger, "SELECT pass_id FROM passes WHERE sealed IS NOT NULL") == []


@table(
    ("age_seconds", "kept"),
    [
        (119, {"sealed", "lookup", "failed"}),
        (121, {"sealed", "lookup"}),
        (899, {"sealed", "lookup"}),
        (900, {"lookup"}),
        (901, {"lookup"}),
        (902, set()),  # the lookup was to end after a second
    ],
)
async def test_what_may_still_be_of_use_is_not_erased(
    ledger: Ledger, clock: TurnedClock, age_seconds: int, kept: set[str]
) -> None:
    for name in ("passes", "lookups", "failed_requests"):
        await rows(ledger, f"DELETE FROM {name}")  # noqa: S608
    sealed, failed = reservation(), reservation()
    await ledger.reserve(sealed, [])
    await ledger.grant(sealed, replace(credential(), sealed=b"sealed"))
    await ledger.reserve(failed, [])
    await ledger.release(failed, has_reached=True)
    await ledger.begin_lookup(reservation(), CONVERSATIONS, seconds=1)
    clock.now += age_seconds

    await ledger.erase_sealed()

    found = {
        "sealed": await rows(ledger, "SELECT pass_id FROM passes WHERE sealed IS NOT NULL"),
        "lookup": await rows(ledger, "SELECT key FROM lookups"),
        "failed": await rows(ledger, "SELECT pass_id FROM failed_requests"),
    }
    assert {name for name, each in found.items() if each} == kept


async def test_a_pass_whose_settlement_arrived_first_keeps_no_sealed_credential(ledger: Ledger) -> None:
    reserved, given = reservation(), credential("conv_1")
    await ledger.reserve(reserved, [])
    await ledger.settle(settled_with("conv_1"))

    await ledger.grant(reserved, replace(given, sealed=b"sealed"))

    assert await rows(ledger, "SELECT pass_id FROM passes WHERE sealed IS NOT NULL") == []
