"""Retries, breaker, bulkhead and deadline, with a clock that the test sets."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from tests.logs import capture_logs
from voicepass.elevenlabs.resilience import (
    MAX_SAVED_RETRIES,
    OPEN_SECONDS,
    OUTAGES,
    Breaker,
    Bulkhead,
    Guard,
)
from voicepass.errors import AgentUnknown, Busy, ElevenLabsRefusal, Overloaded, Timeout, Unavailable

pytestmark = pytest.mark.anyio

DEADLINE_SECONDS = 4.0


class OutageRefusal(Unavailable):
    """Raised by an attempt, so that a test can tell it from the breaker's refusal."""


class Upstream:
    """An upstream, the guard in front of it, and their clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        self.calls = 0
        self.failing: ElevenLabsRefusal | None = None
        self.recovers_while_waiting = False
        self.bulkhead = Bulkhead(most=100)
        self.guard = Guard(
            breaker=Breaker(host="host", calls="passes", clock=lambda: self.now),
            deadline_seconds=DEADLINE_SECONDS,
            sleep=self._sleep,
            jitter=lambda: 0.5,
        )

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        if self.recovers_while_waiting:
            self.failing = None

    async def _attempt(self) -> str:
        self.calls += 1
        await asyncio.sleep(0)
        if self.failing is not None:
            raise self.failing
        return "an answer"

    async def ask(self) -> object:
        """Return the answer, or the exception."""
        try:
            return await self.guard.call(self._attempt, bulkhead=self.bulkhead)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            return error

    async def ask_often(self, times: int) -> list[object]:
        return [await self.ask() for _ in range(times)]


def make_failure(*, is_outage: bool = False, may_retry: bool = True, pause_seconds: float = 0.0) -> ElevenLabsRefusal:
    kind = OutageRefusal if is_outage else Busy
    return kind(may_retry=may_retry, pause_seconds=pause_seconds)


OUTAGE = make_failure(is_outage=True)


# Retries ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requests", [1, 4, 5, 6, 37, 1000])
async def test_when_all_calls_fail_ten_are_retried_and_then_one_in_five(requests: int) -> None:
    upstream = Upstream()
    upstream.failing = make_failure()

    await upstream.ask_often(requests)

    retries = upstream.calls - requests
    assert min(requests, MAX_SAVED_RETRIES) <= retries <= MAX_SAVED_RETRIES + requests // 5


async def test_the_first_call_after_a_start_is_retried() -> None:
    upstream = Upstream()
    upstream.failing, upstream.recovers_while_waiting = OUTAGE, True

    assert await upstream.ask() == "an answer"
    assert upstream.calls == 2


async def test_after_many_successes_at_most_ten_retries_are_saved() -> None:
    upstream = Upstream()
    await upstream.ask_often(1000)
    upstream.failing = make_failure()
    upstream.calls = 0

    await upstream.ask_often(10)
    assert upstream.calls == 10 + 10

    await upstream.ask_often(90)
    assert 100 + 10 <= upstream.calls <= 100 + 10 + 100 // 5


async def test_the_caller_sees_only_the_answer_of_a_retry_that_succeeds() -> None:
    upstream = Upstream()
    await upstream.ask_often(5)
    upstream.failing = OUTAGE

    upstream.recovers_while_waiting = True

    assert await upstream.ask() == "an answer"
    assert not upstream.guard.breaker.is_open


@pytest.mark.parametrize(
    ("failing", "slept"),
    [
        (make_failure(), [0.05]),
        (make_failure(pause_seconds=1), [1.05]),
        (make_failure(pause_seconds=3.9), [3.95]),
        (make_failure(pause_seconds=4), []),
        (make_failure(pause_seconds=3600), []),
        (make_failure(may_retry=False), []),
        (AgentUnknown(), []),
    ],
)
async def test_a_retry_waits_as_long_as_the_answer_says_and_never_past_the_deadline(
    failing: ElevenLabsRefusal, slept: list[float]
) -> None:
    upstream = Upstream()
    await upstream.ask_often(50)
    upstream.failing = failing

    await upstream.ask()

    assert upstream.slept == pytest.approx(slept)


# The breaker --------------------------------------------------------------------------------------------------------


async def open_breaker() -> Upstream:
    upstream = Upstream()
    await upstream.ask_often(50)  # saves retries, so that a probe could retry if nothing prevented it
    upstream.failing = OUTAGE
    await upstream.ask_often(OUTAGES)
    upstream.calls = 0
    return upstream


async def test_five_outages_in_a_row_open_the_breaker_and_stop_all_calls() -> None:
    upstream = Upstream()
    upstream.failing = OUTAGE

    answers = []
    for _ in range(5):
        answers.append(await upstream.ask())
        upstream.now += 2.4
    assert {type(answer) for answer in answers} == {OutageRefusal}
    assert upstream.guard.breaker.is_open
    calls = upstream.calls

    answers = await upstream.ask_often(1000)
    assert {type(answer) for answer in answers} == {Unavailable}
    assert {answer.retry_after_seconds for answer in answers if isinstance(answer, Unavailable)} == {3}
    assert upstream.calls == calls
    assert upstream.guard.breaker.is_open


async def test_a_refusal_that_is_an_answer_never_opens_the_breaker() -> None:
    upstream = Upstream()
    upstream.failing = AgentUnknown()
    await upstream.ask_often(100)
    upstream.failing = make_failure(is_outage=False)
    await upstream.ask_often(100)

    assert not upstream.guard.breaker.is_open


async def test_four_outages_in_a_row_never_open_the_breaker() -> None:
    upstream = Upstream()

    for number in range(1000):
        upstream.failing = make_failure(is_outage=True, may_retry=False) if number % OUTAGES else None
        await upstream.ask()

    assert not upstream.guard.breaker.is_open


async def test_only_one_caller_becomes_the_probe_and_its_success_closes_the_breaker() -> None:
    with capture_logs() as logged:
        upstream = await open_breaker()
        upstream.now += OPEN_SECONDS
        upstream.failing = None

        answers = await asyncio.gather(*(upstream.ask() for _ in range(50)))

    assert upstream.calls == 1
    assert answers.count("an answer") == 1
    assert sum(isinstance(answer, Unavailable) for answer in answers) == 49
    assert await upstream.ask_often(10) == ["an answer"] * 10
    assert [(line["event"], line["log_level"], line["host"], line["calls"]) for line in logged] == [
        ("breaker.opened", "error", "host", "passes"),
        ("breaker.closed", "info", "host", "passes"),
    ]


async def test_while_a_probe_hangs_all_other_calls_are_refused() -> None:
    upstream = await open_breaker()
    answer = asyncio.Event()

    async def hang() -> str:
        await answer.wait()
        return "late"

    upstream.now += OPEN_SECONDS
    probe = asyncio.create_task(upstream.guard.call(hang, bulkhead=upstream.bulkhead))
    for _ in range(3):
        await asyncio.sleep(0)
    upstream.now += 10 * OPEN_SECONDS
    refused = await upstream.ask()
    answer.set()

    assert isinstance(refused, Unavailable)
    assert refused.retry_after_seconds == OPEN_SECONDS
    assert await probe == "late"
    assert not upstream.guard.breaker.is_open


async def test_a_failed_probe_keeps_the_breaker_open_for_the_same_time_again() -> None:
    upstream = await open_breaker()
    for _ in range(3):
        upstream.now += OPEN_SECONDS
        await upstream.ask_often(10)

    assert upstream.calls == 3
    assert upstream.guard.breaker.is_open


async def test_a_late_answer_to_an_old_call_does_not_close_the_breaker() -> None:
    upstream = Upstream()
    late = asyncio.Event()

    async def answer_late() -> str:
        await late.wait()
        return "late"

    old = asyncio.create_task(upstream.guard.call(answer_late, bulkhead=upstream.bulkhead))
    await asyncio.sleep(0)
    upstream.failing = OUTAGE
    await upstream.ask_often(OUTAGES)
    late.set()

    assert await old == "late"
    assert upstream.guard.breaker.is_open


async def test_a_call_that_waited_for_a_slot_while_the_breaker_opened_is_not_made() -> None:
    upstream = Upstream()
    upstream.bulkhead = Bulkhead(most=5)
    upstream.failing = make_failure(is_outage=True, may_retry=False)

    answers = await asyncio.gather(*(upstream.ask() for _ in range(10)))

    assert [type(answer) for answer in answers] == [OutageRefusal] * 5 + [Unavailable] * 5
    assert upstream.calls == 5


async def test_after_a_clock_jump_one_good_probe_closes_the_breaker() -> None:
    upstream = await open_breaker()
    upstream.now += 30 * 24 * 3600
    upstream.failing = None

    assert await upstream.ask() == "an answer"
    assert not upstream.guard.breaker.is_open


# Bulkhead and deadline ----------------------------------------------------------------------------------------------


class HeldUpstream:
    """A bulkhead for two calls, in front of an upstream that answers once `release` is set."""

    def __init__(self) -> None:
        self.bulkhead = Bulkhead(most=2)
        self.guard = Upstream().guard
        self.release = asyncio.Event()
        self.begun = 0

    async def _attempt(self) -> str:
        self.begun += 1
        await self.release.wait()
        return "an answer"

    def call(self, **options: Any) -> Coroutine[Any, Any, str]:
        return self.guard.call(self._attempt, bulkhead=self.bulkhead, **options)

    async def fill(self, callers: int) -> list[asyncio.Task[str]]:
        tasks = [asyncio.create_task(self.call()) for _ in range(callers)]
        for _ in range(5):
            await asyncio.sleep(0)
        return tasks


async def test_with_two_slots_two_calls_run_two_wait_and_the_fifth_is_refused_at_once() -> None:
    held = HeldUpstream()
    callers = await held.fill(4)

    with pytest.raises(Overloaded):
        await held.call()

    assert (held.bulkhead.in_flight, held.bulkhead.waiting, held.begun) == (2, 2, 2)
    held.release.set()
    assert await asyncio.gather(*callers) == ["an answer"] * 4
    await asyncio.sleep(0)
    assert (held.bulkhead.in_flight, held.bulkhead.waiting) == (0, 0)


async def test_a_background_call_never_takes_a_slot_from_a_user() -> None:
    held = HeldUpstream()
    first = await held.fill(1)
    idle = asyncio.create_task(held.call(only_if_idle=True))
    await asyncio.sleep(0)

    with pytest.raises(Overloaded):
        await held.call(only_if_idle=True)

    assert held.bulkhead.waiting == 0
    held.release.set()
    assert await asyncio.gather(*first, idle) == ["an answer"] * 2


async def test_a_caller_that_hangs_up_while_waiting_frees_its_place() -> None:
    held = HeldUpstream()
    callers = await held.fill(4)

    for caller in callers[2:]:
        caller.cancel()
    await asyncio.gather(*callers[2:], return_exceptions=True)

    assert (held.bulkhead.in_flight, held.bulkhead.waiting) == (2, 0)
    held.release.set()
    await asyncio.gather(*callers[:2])
    assert held.begun == 2


async def test_a_call_whose_caller_has_hung_up_keeps_its_slot_until_it_ends() -> None:
    held = HeldUpstream()
    callers = await held.fill(2)

    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    assert held.bulkhead.in_flight == 2

    held.release.set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert held.bulkhead.in_flight == 0


async def test_a_call_that_hangs_ends_at_the_deadline_and_counts_as_an_outage() -> None:
    breaker = Breaker(host="host", calls="passes", clock=asyncio.get_running_loop().time)
    guard = Guard(breaker=breaker, deadline_seconds=0.05)
    bulkhead = Bulkhead(most=10)

    async def hang() -> None:
        await asyncio.Event().wait()

    calls = [guard.call(hang, bulkhead=bulkhead) for _ in range(OUTAGES)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)

    assert {type(outcome) for outcome in outcomes} == {Timeout}
    assert guard.breaker.is_open
    assert bulkhead.in_flight == 0


async def test_closing_waits_for_calls_in_flight() -> None:
    held = HeldUpstream()
    callers = await held.fill(2)
    callers[0].cancel()

    closing = asyncio.create_task(held.guard.aclose())
    await asyncio.sleep(0)
    assert not closing.done()

    held.release.set()
    await closing
    assert held.bulkhead.in_flight == 0
