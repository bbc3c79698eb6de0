"""How calls to an upstream fail well: bounded in number and time, retried sparingly, not made while it is down.

Knows no vendor and no HTTP. What an attempt raises tells what it means: `FailedError` says that the upstream is at
fault or may be asked again; anything else is an answer, if not a welcome one.
"""

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Final, TypeVar

FAILURES: Final = 5
FAILURES_WITHIN_SECONDS: Final = 10.0
OPEN_SECONDS: Final = 5.0

FIRST_PAUSE_SECONDS: Final = 1.0
MAX_PAUSE_SECONDS: Final = 30.0

CALLS_PER_RETRY: Final = 5
MAX_SAVED_RETRIES: Final = 10
RETRY_JITTER_SECONDS: Final = 0.1

WAITING_SHARE: Final = 0.25  # of the deadline: who waits for longer would be called too late to be answered in time

_Answered = TypeVar("_Answered")
Clock = Callable[[], float]
"""Monotonic seconds: no change of the wall clock may open, close or prolong anything."""


class FailedError(Exception):
    """An attempt failed. `reason` is what the caller gets where it was the last one.

    `is_outage`: whether the upstream is at fault, which opens the breaker. `may_retry`: whether another attempt may
    succeed and can do no harm, after `retry_after_seconds` at the earliest.
    """

    def __init__(
        self, reason: Exception, *, is_outage: bool, may_retry: bool, retry_after_seconds: float | None = None
    ) -> None:
        super().__init__(type(reason).__name__)
        self.reason = reason
        self.is_outage = is_outage
        self.may_retry = may_retry
        self.retry_after_seconds = retry_after_seconds or 0.0


class FullError(Exception):
    """As many calls are under way, and as many wait, as may."""


class DeadlinePassedError(Exception):
    """There was no answer in time."""


class BreakerOpenError(Exception):
    """The upstream is down. The next probe is due in `retry_after_seconds`."""

    def __init__(self, retry_after_seconds: int) -> None:
        super().__init__(retry_after_seconds)
        self.retry_after_seconds = retry_after_seconds


class PausedError(Exception):
    """Calls are kept back. `reason` is what the last one was answered; the next may be made in so many seconds."""

    def __init__(self, reason: Exception, retry_after_seconds: int) -> None:
        super().__init__(type(reason).__name__)
        self.reason = reason
        self.retry_after_seconds = retry_after_seconds


class Bulkhead:
    """Lets `most` calls be under way at once, and as many wait for one of them to end."""

    def __init__(self, *, most: int) -> None:
        self.most = most
        self.under_way = 0
        self.waiting = 0
        self._slots = asyncio.Semaphore(most)

    async def enter(self, *, most_seconds: float) -> None:
        """Take a slot, in the order of asking. Raises FullError, at once where too many wait already."""
        if self._slots.locked():
            if self.waiting >= self.most:
                raise FullError
            self.waiting += 1
            try:
                async with asyncio.timeout(most_seconds):
                    await self._slots.acquire()
            except TimeoutError:
                raise FullError from None
            finally:
                self.waiting -= 1
        else:
            await self._slots.acquire()  # does not wait
        self.under_way += 1

    async def enter_if_idle(self) -> None:
        """Take a slot that nobody else wants, or raise FullError at once: for what no user waits for."""
        if self._slots.locked():
            raise FullError
        await self.enter(most_seconds=0)

    def leave(self) -> None:
        """Give a slot back."""
        self.under_way -= 1
        self._slots.release()


class Breaker:
    """Opens after 5 failures within 10 s that no answer made up for; a good probe closes it again.

    `on_change` is told whether it is open now. Must be quick and must not raise.
    """

    def __init__(self, *, clock: Clock, on_change: Callable[[bool], None]) -> None:
        self._clock = clock
        self._on_change = on_change
        self._failures: deque[float] = deque(maxlen=FAILURES)
        self._opened_at: float | None = None
        self._is_probing = False

    @property
    def is_open(self) -> bool:
        """Whether calls are refused, but for a probe now and then."""
        return self._opened_at is not None

    def check(self) -> None:
        """Raise BreakerOpenError where a call would not be let through."""
        if self._opened_at is None:
            return
        wait = self._opened_at + OPEN_SECONDS - self._clock()
        if self._is_probing or wait > 0:
            raise BreakerOpenError(max(1, math.ceil(wait)))

    def admit(self) -> bool:
        """Let a call through, or raise BreakerOpenError. Tells whether it is a probe: then its outcome decides."""
        self.check()
        self._is_probing = self.is_open
        return self._is_probing

    def note(self, *, is_outage: bool, is_probe: bool) -> None:
        """Note how a call that was let through ended: by a fault of the upstream, or with an answer."""
        now = self._clock()
        if is_probe:
            self._is_probing = False
            self._opened_at = now if is_outage else None
            if not is_outage:
                self._failures.clear()
                self._on_change(False)  # noqa: FBT003
        elif is_outage:
            self._failures.append(now)
            in_a_row = len(self._failures) == FAILURES and now - self._failures[0] <= FAILURES_WITHIN_SECONDS
            if in_a_row and not self.is_open:
                self._opened_at = now
                self._on_change(True)  # noqa: FBT003
        elif self._failures:
            self._failures.popleft()  # one for one, or a busy service would fall to a few failures among thousands


class Pause:
    """Keeps calls back for a while after an answer that the next call would get as well.

    Without a word how long, the pause is 1 s; each following one is twice as long, 30 s at most. A success ends it.
    """

    def __init__(self, *, clock: Clock) -> None:
        self._clock = clock
        self._until = float("-inf")
        self._seconds = 0.0
        self._reason: Exception | None = None

    @property
    def is_on(self) -> bool:
        """Whether calls are kept back."""
        return self._clock() < self._until

    def check(self) -> None:
        """Raise PausedError where a call would not be let through."""
        wait = self._until - self._clock()
        if self._reason is not None and wait > 0:
            raise PausedError(self._reason, max(1, math.ceil(wait)))

    def begin(self, reason: Exception, *, seconds: float) -> None:
        """Let no call through for `seconds`, or for the next of the growing times where that is 0."""
        if seconds == 0 and self._clock() < self._until:
            return  # it was called before this pause began, and says no more than that
        self._seconds = seconds or min(2 * self._seconds or FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS)
        self._until, self._reason = max(self._until, self._clock() + self._seconds), reason

    def end(self) -> None:
        """Let calls through."""
        self._until, self._seconds, self._reason = float("-inf"), 0.0, None


class RetryBudget:
    """One retry for five calls, however many fail; ten retries are saved up at most."""

    def __init__(self) -> None:
        self._calls = 0

    def note_call(self) -> None:
        """Save a fifth of a retry."""
        self._calls = min(self._calls + 1, CALLS_PER_RETRY * MAX_SAVED_RETRIES)

    def spend(self) -> bool:
        """Tell whether there is a retry left, and take it."""
        if self._calls < CALLS_PER_RETRY:
            return False
        self._calls -= CALLS_PER_RETRY
        return True


class Guard:
    """Stands before one upstream. `jitter` returns a number from 0 to 1."""

    def __init__(
        self,
        *,
        deadline_seconds: float,
        clock: Clock,
        sleep: Callable[[float], Awaitable[None]],
        jitter: Callable[[], float],
        on_change: Callable[[bool], None],
    ) -> None:
        self.breaker = Breaker(clock=clock, on_change=on_change)
        self._budget = RetryBudget()
        self._deadline_seconds = deadline_seconds
        self._clock = clock
        self._sleep = sleep
        self._jitter = jitter
        self._calls: set[asyncio.Task[Any]] = set()

    async def call(
        self,
        attempt: Callable[[], Coroutine[Any, Any, _Answered]],
        *,
        bulkhead: Bulkhead,
        only_if_idle: bool = False,
    ) -> _Answered:
        """Return what `attempt()` returns, at once or at a second try.

        Raises what it raised, or FullError, BreakerOpenError, or DeadlinePassedError. An attempt that has begun goes on
        when its caller is gone, until it ends or its time is up: what is given up half-way still burdens the upstream,
        so it has to keep its slot.
        """
        ends_at = self._clock() + self._deadline_seconds
        self.breaker.check()
        if only_if_idle:
            await bulkhead.enter_if_idle()
        else:
            await bulkhead.enter(most_seconds=self._deadline_seconds * WAITING_SHARE)
        task = asyncio.create_task(self._within_deadline(attempt, ends_at))
        self._calls.add(task)
        task.add_done_callback(partial(self._over, bulkhead))
        return await asyncio.shield(task)

    async def aclose(self) -> None:
        """Wait for what is still under way, whose callers are gone: until the deadline at most."""
        await asyncio.gather(*self._calls, return_exceptions=True)

    def _over(self, bulkhead: Bulkhead, task: asyncio.Task[Any]) -> None:
        bulkhead.leave()
        self._calls.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved, or asyncio would report it as lost when the caller is gone

    async def _within_deadline(
        self, attempt: Callable[[], Coroutine[Any, Any, _Answered]], ends_at: float
    ) -> _Answered:
        is_probe = self.breaker.admit()  # once more: it may have opened while this call waited for its slot
        try:
            async with asyncio.timeout(ends_at - self._clock()):
                answer = await self._attempts(attempt, ends_at, retries=0 if is_probe else 1)
        except FailedError as failed:
            self.breaker.note(is_outage=failed.is_outage, is_probe=is_probe)
            raise failed.reason from failed.__cause__
        except TimeoutError:
            self.breaker.note(is_outage=True, is_probe=is_probe)
            raise DeadlinePassedError from None
        except Exception:
            self.breaker.note(is_outage=False, is_probe=is_probe)
            raise
        self.breaker.note(is_outage=False, is_probe=is_probe)
        return answer

    async def _attempts(
        self, attempt: Callable[[], Coroutine[Any, Any, _Answered]], ends_at: float, *, retries: int
    ) -> _Answered:
        self._budget.note_call()
        try:
            return await attempt()
        except FailedError as failed:
            wait = failed.retry_after_seconds + self._jitter() * RETRY_JITTER_SECONDS
            in_time = self._clock() + wait < ends_at
            if not (retries and failed.may_retry and in_time and self._budget.spend()):
                raise
        await self._sleep(wait)
        return await attempt()
