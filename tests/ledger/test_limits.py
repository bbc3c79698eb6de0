"""Each limit is exact: at its last pass, at the instant of its reset, and in every window."""

import asyncio
import unicodedata
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import TOKEN_ISSUER
from tests.ledger.given import (
    ALONE_ON_POSTGRES,
    START,
    TurnedClock,
    credential,
    find_refusal,
    grant_pass,
    limit,
    reservation,
    rows,
    settlement,
)
from voicepass.errors import LimitReached, QuotaExceeded, RateLimited, TooManyConversations, UserBlocked
from voicepass.ledger import Ledger
from voicepass.ledger.rules import lapse
from voicepass.model import Block, BlockKind, Counted, Scope, User

pytestmark = pytest.mark.anyio

DAY = 86_400
SCOPES: dict[Scope, Callable[[int], dict[str, str]]] = {  # makes callers that the scope counts together
    Scope.USER: lambda n: {"user_id": "u-1", "agent_alias": f"agent-{n}"},
    Scope.AGENT: lambda n: {"user_id": f"u-{n}", "agent_alias": "default"},
    Scope.ALL: lambda n: {"user_id": f"u-{n}", "agent_alias": f"agent-{n}"},
}


@pytest.mark.parametrize("scope", Scope)
async def test_passes_are_limited_in_a_rolling_window(ledger: Ledger, clock: TurnedClock, scope: Scope) -> None:
    most, whom = [limit(2, scope=scope, window_seconds=60)], SCOPES[scope]
    assert await find_refusal(ledger, most, **whom(0)) is None
    clock.now = START + 10
    assert await find_refusal(ledger, most, **whom(1)) is None

    reached = await find_refusal(ledger, most, **whom(2))
    clock.now = START + 59.75
    late = await find_refusal(ledger, most, **whom(3))
    clock.now = START + 60
    then = [await find_refusal(ledger, most, **whom(n)) for n in (4, 5)]

    assert isinstance(reached, RateLimited)
    assert (reached.resets_at, reached.retry_after_seconds) == (START + 60, 50)
    assert (reached.limit_name, reached.most, reached.window_seconds) == (f"{scope}_passes", 2, 60)
    assert late is not None
    assert (late.resets_at, late.retry_after_seconds) == (START + 60, 1)
    assert then[0] is None
    assert then[1] is not None
    assert then[1].resets_at == START + 70


@pytest.mark.parametrize("scope", Scope)
async def test_requests_that_failed_count_for_a_minute_for_nobody_else_and_not_as_passes(
    ledger: Ledger, clock: TurnedClock, scope: Scope
) -> None:
    most, whom = [limit(2, counted=Counted.REQUESTS, scope=scope, window_seconds=60)], SCOPES[scope]
    for n in range(2):
        failed = reservation(**whom(n))
        await ledger.reserve(failed, most)
        await ledger.release(failed, has_reached=True)
    reached = await find_refusal(ledger, most, **whom(2))
    of_passes = await find_refusal(ledger, [limit(1, scope=scope)], **whom(2))
    strangers: dict[Scope, list[dict[str, str]]] = {
        Scope.USER: [{"user_id": "u-2"}, {"user_id": "u-1", "token_issuer": "https://other.example"}],
        Scope.AGENT: [{"user_id": "u-1", "agent_alias": "other"}],
        Scope.ALL: [],
    }
    others = [await find_refusal(ledger, most, **stranger) for stranger in strangers[scope]]
    clock.now = START + 60
    later = await find_refusal(ledger, most, **whom(3))

    assert isinstance(reached, RateLimited)
    assert reached.resets_at == START + 60
    assert {of_passes, *others, later} == {None}


async def test_lapsed_reservations_are_deleted_and_younger_ones_are_kept(ledger: Ledger, clock: TurnedClock) -> None:
    for _ in range(3):
        await ledger.reserve(reservation(), [])
    clock.now = START + 899
    await ledger.reserve(reservation("u-young"), [])
    clock.now = START + 900
    await ledger.reserve(reservation("u-new"), [])

    young = User(issuer=TOKEN_ISSUER, id="u-young", name=None, claims={})
    (answer,) = await ledger.usage(young, [limit(5)])
    left = await rows(ledger, "SELECT user_id FROM passes ORDER BY user_id")

    assert answer.used == 1
    assert [row["user_id"] for row in left] == ["u-new", "u-young"]


async def test_what_two_callers_delete_at_once_is_only_what_has_lapsed(ledger: Ledger, clock: TurnedClock) -> None:
    await ledger.reserve(reservation("u-lapsed"), [])
    clock.now = START + 1
    await ledger.reserve(reservation("u-young"), [])
    clock.now = START + 900

    for _ in range(2):  # both callers have seen the lapsed reservation
        await ledger.run(lapse)

    assert [row["user_id"] for row in await rows(ledger, "SELECT user_id FROM passes")] == ["u-young"]


@pytest.mark.parametrize("scope", Scope)
async def test_conversations_are_limited_while_they_may_be_open(
    ledger: Ledger, clock: TurnedClock, scope: Scope
) -> None:
    most, whom = [limit(2, counted=Counted.CONVERSATIONS, scope=scope, window_seconds=DAY)], SCOPES[scope]
    ended = await grant_pass(ledger, most, **whom(0))  # counts for 15.5 minutes to open it and 10 to talk
    clock.now = START + 5
    assert await find_refusal(ledger, most, **whom(1)) is None  # never granted, so it counts for 15 minutes

    reached = await find_refusal(ledger, most, **whom(2))
    await ledger.settle(settlement(ended))
    after_the_end = await find_refusal(ledger, most, **whom(3))
    clock.now = START + 904
    before_the_lapse = await find_refusal(ledger, most, **whom(4))
    clock.now = START + 905
    at_the_lapse = await find_refusal(ledger, most, **whom(5))

    assert isinstance(reached, TooManyConversations)
    assert (reached.resets_at, reached.retry_after_seconds) == (
        START + 5 + 3,
        3,
    )  # the second reservation may be released at any moment
    assert (reached.limit_name, reached.most, reached.window_seconds) == (f"{scope}_conversations", 2, DAY)
    assert after_the_end is None
    assert before_the_lapse is not None
    assert before_the_lapse.resets_at == START + 905
    assert at_the_lapse is None


@pytest.mark.parametrize("scope", Scope)
async def test_a_conversation_counts_until_it_lapses_also_if_the_window_is_shorter(
    ledger: Ledger, clock: TurnedClock, scope: Scope
) -> None:
    most, whom = [limit(1, counted=Counted.CONVERSATIONS, scope=scope, window_seconds=60)], SCOPES[scope]
    await grant_pass(ledger, most, **whom(0))
    clock.now = START + 1559
    before = await find_refusal(ledger, most, **whom(1))
    clock.now = START + 1560  # 930 and 600 seconds, and the rest of the minute

    at_the_lapse = await find_refusal(ledger, most, **whom(2))

    assert isinstance(before, TooManyConversations)
    assert before.retry_after_seconds == 1
    assert at_the_lapse is None


@pytest.mark.parametrize("scope", Scope)
async def test_minutes_are_limited_by_reservations_and_use(ledger: Ledger, clock: TurnedClock, scope: Scope) -> None:
    most, whom = [limit(700, counted=Counted.SECONDS, scope=scope, window_seconds=DAY)], SCOPES[scope]
    first = await grant_pass(ledger, most, **whom(0))  # 600
    clock.now = START + 10
    second = await grant_pass(ledger, most, **whom(1))  # the 100 that are left

    reached = await find_refusal(ledger, most, **whom(2))
    await ledger.settle(settlement(first, seconds=400))
    third = await grant_pass(ledger, most, **whom(3))
    clock.now = START + DAY
    fourth = await grant_pass(ledger, most, **whom(4))

    assert isinstance(reached, QuotaExceeded)
    assert (reached.resets_at, reached.retry_after_seconds) == (START + DAY, DAY - 10)
    assert [(await ledger.find_pass(each)).seconds for each in (first, second, third, fourth)] == [400, 100, 200, 400]


async def test_a_user_over_the_limit_learns_when_a_retry_can_succeed(ledger: Ledger, clock: TurnedClock) -> None:
    most = [limit(700, counted=Counted.SECONDS, window_seconds=DAY)]
    for after, seconds in ((0, 300), (10, 300), (20, 900), (30, 0), (40, 60)):
        clock.now = START + after
        if after == 0:
            conversations = []
        conversations.append(await grant_pass(ledger, [], seconds=600))
        await ledger.settle(settlement(conversations[-1], seconds=seconds))

    reached = await find_refusal(ledger, most)

    assert reached is not None
    assert reached.resets_at == START + 20 + DAY
    clock.now = reached.resets_at - 1
    assert await find_refusal(ledger, most) is not None
    clock.now = reached.resets_at
    assert await find_refusal(ledger, most) is None


@pytest.mark.parametrize("counted", Counted)
async def test_a_limit_of_zero_refuses_everyone(ledger: Ledger, counted: Counted) -> None:
    reached = await find_refusal(ledger, [limit(0, counted=counted)])

    assert reached is not None
    assert (reached.resets_at, reached.retry_after_seconds) == (START + 60, 60)


async def test_a_refusal_names_the_first_limit_that_is_reached_and_counts_nothing(ledger: Ledger) -> None:
    of_a_plan = replace(limit(0, scope=Scope.AGENT), plan="pro")
    limits = [limit(5), of_a_plan, limit(0, scope=Scope.ALL, counted=Counted.SECONDS)]

    reached = await find_refusal(ledger, limits)

    assert reached is not None
    assert reached.operator_note == "the limit agent_passes is reached"
    assert reached.plan == "pro"
    (usage,) = await ledger.usage(User(issuer="https://login.example", id="u-1", name=None, claims={}), limits[:1])
    assert usage.used == 0


async def test_usage_shows_what_is_left_and_when_the_limit_resets(ledger: Ledger, clock: TurnedClock) -> None:
    limits = [limit(3, counted=counted, window_seconds=DAY) for counted in (Counted.PASSES, Counted.CONVERSATIONS)]
    limits.append(limit(1000, counted=Counted.SECONDS, window_seconds=DAY))
    user = User(issuer="https://login.example", id="u-1", name=None, claims={})
    unused = await ledger.usage(user, limits)
    await grant_pass(ledger, limits)
    await grant_pass(ledger, limits, user_id="u-2")
    clock.now += 1
    await grant_pass(ledger, limits)

    used = await ledger.usage(user, limits)

    assert [(answer.used, answer.left, answer.resets_at) for answer in unused] == [
        (0, 3, None),
        (0, 3, None),
        (0, 1000, None),
    ]
    assert [(answer.used, answer.left, answer.resets_at) for answer in used] == [
        (2, 1, START + DAY),
        (2, 1, START + 1560),  # 930 and 600 seconds, and the rest of the minute
        (1000, 0, START + DAY),
    ]


async def test_a_reservation_that_a_crash_left_is_released_after_15_minutes(ledger: Ledger, clock: TurnedClock) -> None:
    limits = [limit(1, counted=counted, window_seconds=DAY) for counted in Counted]
    await ledger.reserve(reservation(), limits)  # never granted or released

    clock.now = START + 899
    before = await find_refusal(ledger, limits)
    clock.now = START + 900

    assert before is not None
    assert await find_refusal(ledger, limits) is None


# -- any window ------------------------------------------------------------------------------------------------------

Steps = Sequence[tuple[float, bool]]
STEPS = st.lists(
    st.tuples(st.floats(min_value=0, max_value=40, allow_subnormal=False), st.booleans()), min_size=4, max_size=25
)


@ALONE_ON_POSTGRES
@pytest.mark.parametrize(("counted", "most"), [(Counted.PASSES, 3), (Counted.SECONDS, 180)])
@given(steps=STEPS)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_window_ever_contains_more_than_its_limit(
    ledger: Ledger, clock: TurnedClock, counted: Counted, most: int, steps: Steps
) -> None:
    window = limit(most, counted=counted, window_seconds=60)
    held: list[tuple[float, int]] = []
    user_id = uuid.uuid4().hex  # a user without passes of an earlier example
    for pause, gives_back in steps:
        clock.now += pause
        reserved = reservation(user_id, seconds=70)
        counted_now = sum(1 if counted is Counted.PASSES else n for at, n in held if at > clock.now - 60)
        with suppress(LimitReached):
            await ledger.reserve(reserved, [window])
            assert counted_now < most
            if gives_back:
                await ledger.release(reserved)
            else:
                await ledger.grant(reserved, credential())
                held.append((clock.now, min(70, most - counted_now) if counted is Counted.SECONDS else 1))
            continue
        assert counted_now == most

    for end, _ in held:
        assert sum(n for at, n in held if end - 60 < at <= end) <= most


# -- users with similar names ----------------------------------------------------------------------------------------


def make_confusable_people() -> list[tuple[str, str]]:
    """Make 500 different people, who would be mixed up if keys were joined, case-folded, trimmed or normalised."""
    texts = ["a", "A", "a ", " a", "a:b", "b", "a:b:c", "b:c", "c", "é", unicodedata.normalize("NFD", "é"), "ß", "ss"]
    texts += ["1", "01", "1.0", "user", "user 1", "1 a", "a%", "a_", "_", "%", "'", '"', "\\", "a\\", "null", "NULL"]
    texts += ["İ", "i", "ı", "I", "\u212a", "k", "K", "ﬁ", "fi", "a\u200d", "１", "²", "2", "Å", "\u212b", "A\u030a"]
    pairs = [(issuer, user) for issuer in texts for user in texts]
    return pairs[:: len(pairs) // 500][:500]


@ALONE_ON_POSTGRES
@pytest.mark.alone
async def test_500_people_with_confusable_names_share_no_limit(ledger: Ledger) -> None:
    people = make_confusable_people()
    assert len(set(people)) == 500

    async def ask_all() -> list[LimitReached | None]:
        calls = [find_refusal(ledger, [limit(1)], token_issuer=issuer, user_id=user_id) for issuer, user_id in people]
        return [answer for n in range(0, 500, 50) for answer in await asyncio.gather(*calls[n : n + 50])]

    assert await ask_all() == [None] * 500
    again = await ask_all()

    assert all(isinstance(each, RateLimited) for each in again)


# -- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "blocked", "free"),
    [
        (Block(kind=BlockKind.USER, key="u-1"), {"user_id": "u-1", "token_issuer": "any"}, {"user_id": "u-2"}),
        (
            Block(kind=BlockKind.USER, key="u-1", token_issuer="i"),
            {"user_id": "u-1", "token_issuer": "i"},
            {"user_id": "u-1", "token_issuer": "j"},
        ),
        (Block(kind=BlockKind.AGENT, key="a"), {"agent_alias": "a"}, {"agent_alias": "b", "user_id": "a"}),
        (Block(kind=BlockKind.EVERYONE), {}, None),
    ],
)
async def test_a_blocked_user_or_agent_gets_no_pass_until_it_is_unblocked(
    ledger: Ledger, block: Block, blocked: dict[str, str], free: dict[str, str] | None
) -> None:
    for _ in range(2):  # to block twice is no error
        await ledger.block(block)

    with pytest.raises(UserBlocked):
        await ledger.reserve(reservation(**blocked), [])
    if free is not None:
        await ledger.reserve(reservation(**free), [])
    assert await ledger.list_blocks() == [block]
    await ledger.unblock(block)
    await ledger.reserve(reservation(**blocked), [])
    assert await ledger.list_blocks() == []
