"""Extensions: more minutes for one user until a given time. Each test runs on both engines."""

import asyncio
import math
from functools import partial

import pytest

from tests.ledger.given import START, TOKEN_ISSUER, Engine, TurnedClock, find_refusal, grant_pass, limit, rows
from voicepass.errors import QuotaExceeded, RequestInvalid
from voicepass.ledger import Ledger, extensions
from voicepass.ledger.extensions import MAX_SECONDS, Extension
from voicepass.model import Counted, Scope, User

pytestmark = pytest.mark.anyio

HOUR = 3600.0
DAY = 86_400
TEN_MINUTES_A_DAY = limit(600, counted=Counted.SECONDS, window_seconds=DAY)
USER = User(issuer=TOKEN_ISSUER, id="u-1", name=None, claims={})


def extension(user_id: str = "u-1", *, minutes: int = 10, ends_in: float = HOUR, issuer: str = "") -> Extension:
    return Extension(user_id=user_id, token_issuer=issuer, minutes=minutes, ends_at=START + ends_in)


async def count_passes(ledger: Ledger, user_id: str = "u-1") -> int:
    """Take passes of ten minutes until the ledger refuses one; return how many there were."""
    for number in range(20):
        if isinstance(await find_refusal(ledger, [TEN_MINUTES_A_DAY], user_id=user_id), QuotaExceeded):
            return number
    raise AssertionError("nothing was refused")


async def extend(ledger: Ledger, wanted: Extension) -> bool:
    return await ledger.run(partial(extensions.extend, extension=wanted))


@pytest.mark.parametrize(
    ("given", "passes"),
    [
        ([], 1),
        ([extension()], 2),
        ([extension(minutes=5)], 2),  # the second reserves five minutes
        ([extension(minutes=20), extension()], 2),  # the later one replaces the earlier one
        ([extension(), extension(issuer=TOKEN_ISSUER)], 3),
        ([extension(issuer="https://other.example"), extension("u-2"), extension("u")], 1),
    ],
)
async def test_an_extension_adds_to_the_minutes_of_its_user_only(
    ledger: Ledger, given: list[Extension], passes: int
) -> None:
    for each in given:
        await extend(ledger, each)

    assert await count_passes(ledger) == passes


async def test_an_extension_ends_at_its_time_or_when_it_is_revoked(ledger: Ledger, clock: TurnedClock) -> None:
    await extend(ledger, extension())
    await extend(ledger, extension("u-2", ends_in=2 * HOUR))
    before = await ledger.run(extensions.list_extensions)
    was_revoked = [
        await ledger.run(partial(extensions.revoke, user_id="u-2", token_issuer=issuer))
        for issuer in (TOKEN_ISSUER, "", "")
    ]
    of_revoked = await count_passes(ledger, "u-2")
    clock.now += HOUR
    of_ended = await count_passes(ledger)

    assert before == [extension(), extension("u-2", ends_in=2 * HOUR)]
    assert was_revoked == [False, True, False]
    assert (of_revoked, of_ended) == (1, 1)
    assert await ledger.run(extensions.list_extensions) == []
    assert await ledger.run(partial(extensions.revoke, user_id="u-1", token_issuer="")) is False


async def test_usage_and_a_refusal_show_the_limit_with_its_extension(ledger: Ledger) -> None:
    limits = [TEN_MINUTES_A_DAY, limit(9, window_seconds=DAY), limit(3, counted=Counted.CONVERSATIONS)]
    await extend(ledger, extension())
    await grant_pass(ledger, limits)

    before = await ledger.usage(USER, limits)
    await grant_pass(ledger, limits)
    refused = await find_refusal(ledger, limits)

    assert [(answer.limit.most, answer.used, answer.left) for answer in before] == [
        (1200, 600, 600),
        (9, 1, 8),
        (3, 1, 2),
    ]
    assert refused is not None
    assert refused.most == 1200


async def test_usage_says_when_the_oldest_pass_leaves_the_day_while_a_second_is_left(
    ledger: Ledger, clock: TurnedClock
) -> None:
    await extend(ledger, extension())
    for seconds in (500, 699):
        await grant_pass(ledger, [TEN_MINUTES_A_DAY], seconds=seconds)
        clock.now += 10

    (answer,) = await ledger.usage(USER, [TEN_MINUTES_A_DAY])

    assert (answer.left, answer.resets_at) == (1, START + DAY)


async def test_of_two_extensions_the_one_that_lasts_counts_when_a_new_try_succeeds(
    ledger: Ledger, clock: TurnedClock
) -> None:
    await extend(ledger, extension(minutes=30, ends_in=DAY - 601))
    await extend(ledger, extension(minutes=5, ends_in=2 * DAY, issuer=TOKEN_ISSUER))
    for seconds in (1200, 615, 600, 285):
        await grant_pass(ledger, [TEN_MINUTES_A_DAY], seconds=seconds)
        clock.now += 600

    refused = await find_refusal(ledger, [TEN_MINUTES_A_DAY])

    assert refused is not None
    assert refused.resets_at == START + 600 + DAY  # then the last two passes count, and leave 15 seconds


@pytest.mark.parametrize(
    ("ends_in", "retry_after"),
    [
        pytest.param(DAY + HOUR, DAY - 600, id="the first pass leaves the window while the extension lasts"),
        pytest.param(DAY - 601, DAY, id="the extension ends first, so the second pass must leave the window too"),
        pytest.param(DAY, DAY, id="it ends at the instant when the first pass leaves the window"),
    ],
)
async def test_a_refusal_says_when_a_retry_succeeds_even_if_the_extension_ends_first(
    ledger: Ledger, clock: TurnedClock, ends_in: float, retry_after: float
) -> None:
    await extend(ledger, extension(ends_in=ends_in))
    await grant_pass(ledger, [TEN_MINUTES_A_DAY])
    clock.now += 600
    await grant_pass(ledger, [TEN_MINUTES_A_DAY])

    refused = await find_refusal(ledger, [TEN_MINUTES_A_DAY])
    assert refused is not None
    clock.now += refused.resets_at - clock.now - 1
    too_early = await find_refusal(ledger, [TEN_MINUTES_A_DAY])
    clock.now += 1
    in_time = await find_refusal(ledger, [TEN_MINUTES_A_DAY])

    assert refused.retry_after_seconds == math.ceil(retry_after)
    assert too_early is not None
    assert in_time is None


async def test_limits_of_agents_and_of_passes_are_not_extended(ledger: Ledger) -> None:
    await extend(ledger, extension())
    of_agent = [limit(600, counted=Counted.SECONDS, scope=Scope.AGENT, window_seconds=DAY)]
    of_passes = [limit(1, window_seconds=DAY)]

    refused = [await find_refusal(ledger, limits) for limits in (of_agent, of_agent, of_passes)]

    assert [each is None for each in refused] == [True, False, False]


async def test_extend_tells_whether_the_user_ever_had_a_pass(ledger: Ledger) -> None:
    await grant_pass(ledger, [], user_id="u-1", token_issuer="https://b.example")
    await grant_pass(ledger, [], user_id="u-9", token_issuer="https://a.example")

    wanted = [extension(), extension(issuer="https://b.example"), extension(issuer="https://a.example"), extension("u")]

    assert [await extend(ledger, each) for each in wanted] == [True, True, False, False]


@pytest.mark.parametrize("ends_in", [0.0, -1.0, MAX_SECONDS + 1.0, math.inf, math.nan])
async def test_an_extension_that_has_ended_or_is_too_long_is_refused(ledger: Ledger, ends_in: float) -> None:
    await extend(ledger, extension())

    with pytest.raises(RequestInvalid):
        await extend(ledger, extension(ends_in=ends_in))

    assert await ledger.run(extensions.list_extensions) == [extension()]


async def test_parallel_requests_of_a_user_get_exactly_the_extended_minutes(engine: Engine) -> None:
    async with engine.instances() as ledgers:
        await extend(ledgers[0], extension(minutes=35))
        calls = [find_refusal(ledger, [TEN_MINUTES_A_DAY]) for ledger in ledgers for _ in range(12)]
        refused = await asyncio.gather(*calls)
        (used,) = await rows(ledgers[0], "SELECT count(*) AS passes, sum(seconds) AS seconds FROM passes")

    assert sum(each is None for each in refused) == used["passes"] == 5
    assert used["seconds"] == 45 * 60
