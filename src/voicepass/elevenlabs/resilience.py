"""Guards calls to one host: limits their number and time, retries few of them, and makes none while the host fails.

`Guard.call` is the entry. It uses `Bulkhead` and `Breaker`, which come before it. `Pause` at the end is for refusals
that the next call would get as well. All times are monotonic seconds.
"""

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

from voicepass.errors import Busy, ElevenLabsRefusal, KeyRejected, Overloaded, Timeout, Unavailable
from voicepass.telemetry.logger import Logger

OUTAGES: Final = 5
OPEN_SECONDS: Final = 5.0

CALLS_PER_RETRY: Final = 5
"""This many calls save one retry. A new process begins with MAX_SAVED_RETRIES saved retries."""
MAX_SAVED_RETRIES: Final = 10
RETRY_JITTER_SECONDS: Final = 0.1

WAITING_SHARE: Final = 0.25
"""The share of the deadline that a caller may wait for a slot. Later there is too little time left for an answer."""

FIRST_PAUSE_SECONDS: Final = 1.0
MAX_PAUSE_SECONDS: Final = 30.0

_TOO_MANY: Final = "too many calls to ElevenLabs at once: see VOICEPASS_MAX_CALLS"

_Answer = TypeVar("_Answer")
Call = Callable[[], Coroutine[Any, Any, _Answer]]
"""Makes the call once."""
Ticks = Callable[[], float]

_log = Logger("voicepass.elevenlabs")


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
            raise Overloaded(operator_note=_TOO_MANY)
        self.waiting += 1
        try:
            async with asyncio.timeout(most_seconds):
                await self._slots.acquire()
        except TimeoutError:
            raise Overloaded(operator_note=_TOO_MANY) from None
        finally:
            self.waiting -= 1
        self.in_flight += 1

    def leave(self) -> None:
        """Give a slot back."""
        self.in_flight -= 1
        self._slots.release()


@dataclass(kw_only=True, eq=False)
class Breaker:
    """Opens after 5 outages in a row. Every 5 s it lets a probe through. A successful probe closes it.

    `host` and `calls` name it in the log.
    """

    host: str
    calls: str
    clock: Ticks
    _outages: int = field(default=0, init=False)
    _refuses_until: float = field(default=-math.inf, init=False)

    @property
    def is_open(self) -> bool:
        """Whether it refuses all calls except probes."""
        return self._outages >= OUTAGES

    def check(self) -> None:
        """Raise Unavailable if the breaker refuses calls now."""
        wait_seconds = self._refuses_until - self.clock()
        if self.is_open and wait_seconds > 0:
            raise Unavailable(
                operator_note="not asked: ElevenLabs has been failing; see breaker.opened",
                retry_after_seconds=math.ceil(min(wait_seconds, OPEN_SECONDS)),
                has_reached_elevenlabs=False,
            )

    def admit(self) -> bool:
        """Admit a call, or raise Unavailable. Returns whether the call is a probe."""
        self.check()
        if self.is_open:
            self._refuses_until = math.inf  # No other call may begin until the probe ends.
        return self.is_open

    def record(self, *, is_outage: bool, is_probe: bool) -> None:
        """Count an outage of the host, or an answer. This opens and closes the breaker."""
        if is_outage:
            self._outages += 1
            if is_probe or self._outages == OUTAGES:
                self._refuses_until = self.clock() + OPEN_SECONDS
            if self._outages == OUTAGES:
                note = "ElevenLabs is out of order: not called for now"
                _log.error("breaker.opened", host=self.host, calls=self.calls, note=note)
        elif is_probe or not self.is_open:  # A call that began before the outage must not close it.
            if self.is_open:
                _log.info("breaker.closed", host=self.host, calls=self.calls)
            self._outages = 0


@dataclass(kw_only=True, eq=False)
class Guard:
    """Guards one kind of calls to one host. `jitter` returns a number from 0 to 1."""

    breaker: Breaker
    deadline_seconds: float
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    jitter: Callable[[], float] = random.random
    _saved_calls: int = field(default=CALLS_PER_RETRY * MAX_SAVED_RETRIES, init=False)
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set, init=False)

    async def call(self, attempt: Call[_Answer], *, bulkhead: Bulkhead, only_if_idle: bool = False) -> _Answer:
        """Return what `attempt()` returns, at the first or second try.

        Raises what it raised, Overloaded, Unavailable or Timeout. A call that has begun goes on if its caller is
        cancelled, until it ends or its deadline is over. It keeps its slot, because it still burdens the host.
        """
        ends_at = self.breaker.clock() + self.deadline_seconds
        self.breaker.check()
        await bulkhead.enter(most_seconds=self.deadline_seconds * WAITING_SHARE, only_if_idle=only_if_idle)
        task = asyncio.create_task(self._call_within_deadline(attempt, ends_at))
        self._tasks.add(task)
        task.add_done_callback(partial(self._finish, bulkhead))
        await asyncio.wait([task])  # not `shield`, see settlement/lookup
        return task.result()

    async def aclose(self) -> None:
        """Wait for the calls in flight whose callers are gone: until their deadline at most."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _finish(self, bulkhead: Bulkhead, task: asyncio.Task[Any]) -> None:
        bulkhead.leave()
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # Without this, asyncio reports the exception as lost if the caller is gone.

    async def _call_within_deadline(self, attempt: Call[_Answer], ends_at: float) -> _Answer:
        is_probe = self.breaker.admit()  # The breaker may have opened while this call waited for its slot.
        is_outage = False
        try:
            async with asyncio.timeout(ends_at - self.breaker.clock()):
                return await self._call_or_retry(attempt, ends_at, may_retry=not is_probe)
        except TimeoutError:
            is_outage = True
            raise Timeout(operator_note="no complete answer within VOICEPASS_DEADLINE_SECONDS") from None
        except (Unavailable, Timeout):
            is_outage = True
            raise
        finally:
            self.breaker.record(is_outage=is_outage, is_probe=is_probe)

    async def _call_or_retry(self, attempt: Call[_Answer], ends_at: float, *, may_retry: bool) -> _Answer:
        self._saved_calls = min(self._saved_calls + 1, CALLS_PER_RETRY * MAX_SAVED_RETRIES)
        try:
            return await attempt()
        except ElevenLabsRefusal as refusal:
            wait_seconds = refusal.pause_seconds + self.jitter() * RETRY_JITTER_SECONDS
            is_in_time = self.breaker.clock() + wait_seconds < ends_at
            has_saved = self._saved_calls >= CALLS_PER_RETRY
            if not (may_retry and refusal.may_retry and is_in_time and has_saved):
                raise
            self._saved_calls -= CALLS_PER_RETRY
        await self.sleep(wait_seconds)
        return await attempt()


class Pause:
    """Refuses calls for a while after one was refused because ElevenLabs is busy, or has rejected the key.

    Put each call into `with pause:`, which refuses it while the pause is on. A busy ElevenLabs says how long the pause
    is. After a rejected key it is 1 s, and each following one is twice as long, 30 s at most. A success ends it.
    """

    def __init__(self, kind: type[Busy | KeyRejected], *, clock: Ticks) -> None:
        self._kind = kind
        self._clock = clock
        self._until = float("-inf")
        self._seconds = 0.0
        self._refusal: Busy | KeyRejected | None = None

    @property
    def is_on(self) -> bool:
        """Whether calls are refused."""
        return self._clock() < self._until

    def __enter__(self) -> None:
        """Raise the refusal that began the pause, if the pause is not over."""
        if self._refusal is None or not self.is_on:
            return
        # After a rejected key there is no Retry-After, because only the operator can help.
        is_busy = isinstance(self._refusal, Busy)
        raise type(self._refusal)(
            operator_note=f"not asked again so soon: {self._refusal.operator_note}",
            retry_after_seconds=max(1, math.ceil(self._until - self._clock())) if is_busy else None,
            vendor_code=self._refusal.vendor_code,
            has_reached_elevenlabs=False,
        )

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        """Begin the pause after a refusal of its kind, and end it after a success."""
        if error is None:
            self._until, self._seconds, self._refusal = float("-inf"), 0.0, None
        elif isinstance(error, self._kind):
            self._begin(error)

    def _begin(self, refusal: Busy | KeyRejected) -> None:
        seconds = refusal.pause_seconds
        if isinstance(refusal, Busy) and not seconds:
            return  # ElevenLabs asks for no pause.
        if isinstance(refusal, KeyRejected):
            if self.is_on:
                return  # This call began before the pause: its refusal is not a new one.
            seconds = self._seconds = min(2 * self._seconds or FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS)
        self._until, self._refusal = max(self._until, self._clock() + seconds), refusal
