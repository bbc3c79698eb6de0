"""Guards calls to one host: limits their number and time, retries few of them, and makes none while the host fails.

`Guard.call` at the end is the entry. It uses `Bulkhead` and `Breaker`, which come before it. All times are monotonic
seconds.
"""

import asyncio
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

from voicepass.errors import ElevenLabsRefusal, Overloaded, Timeout, Unavailable
from voicepass.telemetry.logger import Logger

FAILURES: Final = 5
FAILURES_WITHIN_SECONDS: Final = 10.0
OPEN_SECONDS: Final = 5.0

CALLS_PER_RETRY: Final = 5
"""One retry is allowed for so many calls, and for the first calls after a start as well."""
MAX_SAVED_RETRIES: Final = 10
RETRY_JITTER_SECONDS: Final = 0.1

WAITING_SHARE: Final = 0.25
"""The share of the deadline that a caller may wait for a slot. Later there is too little time left for an answer."""

_Answer = TypeVar("_Answer")
Call = Callable[[], Coroutine[Any, Any, _Answer]]
"""Makes the call once."""
Ticks = Callable[[], float]

_log = Logger("voicepass.elevenlabs")


@dataclass(eq=False)
class FailedCallError(Exception):
    """A call failed. `refusal` is what the user gets if this was the last try.

    `is_outage`: the host is at fault, which counts for the breaker. `may_retry`: a second try is harmless and may
    succeed, after `retry_after_seconds` at the earliest.
    """

    refusal: ElevenLabsRefusal
    is_outage: bool
    may_retry: bool
    retry_after_seconds: float = 0.0


class Bulkhead:
    """Lets `most` calls be in flight at once. As many callers may wait for a slot."""

    def __init__(self, *, most: int) -> None:
        self.most = most
        self.in_flight = 0
        self.waiting = 0
        self._slots = asyncio.Semaphore(most)

    async def enter(self, *, most_seconds: float, only_if_idle: bool = False) -> None:
        """Take a slot, in the order of asking. Raises Overloaded if too many wait, or after `most_seconds`.

        With `only_if_idle`, raises Overloaded at once if nobody could take a slot without waiting.
        """
        if self._slots.locked() and (only_if_idle or self.waiting >= self.most):
            raise _overloaded()
        self.waiting += 1
        try:
            async with asyncio.timeout(most_seconds):
                await self._slots.acquire()
        except TimeoutError:
            raise _overloaded() from None
        finally:
            self.waiting -= 1
        self.in_flight += 1

    def leave(self) -> None:
        """Give a slot back."""
        self.in_flight -= 1
        self._slots.release()


def _overloaded() -> Overloaded:
    return Overloaded(operator_note="too many calls to ElevenLabs at once: see VOICEPASS_MAX_CALLS")


@dataclass(kw_only=True, eq=False)
class Breaker:
    """Opens after 5 failures within 10 s, less one for each answer. Every 5 s it lets a probe through.

    A successful probe closes it. `host` and `calls` name it in the log.
    """

    host: str
    calls: str
    clock: Ticks
    _failures: deque[float] = field(default_factory=lambda: deque(maxlen=FAILURES), init=False)
    _opened_at: float | None = field(default=None, init=False)
    _is_probing: bool = field(default=False, init=False)

    @property
    def is_open(self) -> bool:
        """Whether it refuses all calls except probes."""
        return self._opened_at is not None

    def check(self) -> None:
        """Raise Unavailable if it would refuse a call."""
        if self._opened_at is None:
            return
        wait_seconds = self._opened_at + OPEN_SECONDS - self.clock()
        if self._is_probing or wait_seconds > 0:
            raise Unavailable(
                operator_note="not asked: ElevenLabs has been failing; see breaker.opened",
                retry_after_seconds=max(1, math.ceil(wait_seconds)),
                has_reached_elevenlabs=False,
            )

    def admit(self) -> bool:
        """Admit a call, or raise Unavailable. Returns whether the call is a probe."""
        self.check()
        self._is_probing = self.is_open
        return self._is_probing

    def record(self, *, is_outage: bool, is_probe: bool) -> None:
        """Record how an admitted call ended: with an outage of the host, or with an answer."""
        now = self.clock()
        if is_probe:
            self._is_probing = False
            self._opened_at = now if is_outage else None
            if not is_outage:
                self._failures.clear()
                _log.info("breaker.closed", host=self.host, calls=self.calls)
        elif is_outage:
            self._failures.append(now)
            has_many = len(self._failures) == FAILURES and now - self._failures[0] <= FAILURES_WITHIN_SECONDS
            if has_many and not self.is_open:
                self._opened_at = now
                note = "ElevenLabs is out of order: not called for now"
                _log.error("breaker.opened", host=self.host, calls=self.calls, note=note)
        elif self._failures:
            self._failures.popleft()  # Otherwise a few failures among thousands of answers would open it.


@dataclass(kw_only=True, eq=False)
class Guard:
    """Guards one kind of `calls` to one host. `jitter` returns a number from 0 to 1."""

    host: str
    calls: str
    deadline_seconds: float
    clock: Ticks
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    jitter: Callable[[], float] = random.random
    _saved_calls: int = field(default=CALLS_PER_RETRY * MAX_SAVED_RETRIES, init=False)
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self.breaker = Breaker(host=self.host, calls=self.calls, clock=self.clock)

    async def call(self, attempt: Call[_Answer], *, bulkhead: Bulkhead, only_if_idle: bool = False) -> _Answer:
        """Return what `attempt()` returns, at the first or second try.

        Raises what it raised, Overloaded, Unavailable or Timeout. A call that has begun goes on if its caller is
        cancelled, until it ends or its deadline is over. It keeps its slot, because it still burdens the host.
        """
        ends_at = self.clock() + self.deadline_seconds
        self.breaker.check()
        await bulkhead.enter(most_seconds=self.deadline_seconds * WAITING_SHARE, only_if_idle=only_if_idle)
        task = asyncio.create_task(self._call_within_deadline(attempt, ends_at))
        self._tasks.add(task)
        task.add_done_callback(partial(self._finish, bulkhead))
        return await asyncio.shield(task)

    async def aclose(self) -> None:
        """Wait for the calls in flight whose callers are gone: until their deadline at most."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _finish(self, bulkhead: Bulkhead, task: asyncio.Task[Any]) -> None:
        bulkhead.leave()
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # Without this, asyncio reports the exception as lost if the caller is gone.

    async def _call_within_deadline(self, attempt: Call[_Answer], ends_at: float) -> _Answer:
        is_probe = self.breaker.admit()  # It may have opened while this call waited for its slot.
        is_outage = False
        try:
            async with asyncio.timeout(ends_at - self.clock()):
                return await self._call_or_retry(attempt, ends_at, may_retry=not is_probe)
        except FailedCallError as failure:
            is_outage = failure.is_outage
            raise failure.refusal from failure.__cause__
        except TimeoutError:
            is_outage = True
            raise Timeout(operator_note="no complete answer within VOICEPASS_DEADLINE_SECONDS") from None
        finally:
            self.breaker.record(is_outage=is_outage, is_probe=is_probe)

    async def _call_or_retry(self, attempt: Call[_Answer], ends_at: float, *, may_retry: bool) -> _Answer:
        self._saved_calls = min(self._saved_calls + 1, CALLS_PER_RETRY * MAX_SAVED_RETRIES)
        try:
            return await attempt()
        except FailedCallError as failure:
            wait_seconds = failure.retry_after_seconds + self.jitter() * RETRY_JITTER_SECONDS
            is_in_time = self.clock() + wait_seconds < ends_at
            has_saved = self._saved_calls >= CALLS_PER_RETRY
            if not (may_retry and failure.may_retry and is_in_time and has_saved):
                raise
            self._saved_calls -= CALLS_PER_RETRY
        await self.sleep(wait_seconds)
        return await attempt()
