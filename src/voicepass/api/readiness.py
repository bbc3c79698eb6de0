"""The named checks behind /readyz: each costs little, and without any of them no user gets a pass."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from voicepass.errors import LedgerUnavailable, Refusal
from voicepass.model import MonotonicClock

CHECK_SECONDS: Final = 2.0
"""Short enough for a probe every five seconds, and long enough that many probes cost the ledger few writes."""

Check = Callable[[], Awaitable[str | None]]
"""Raises the Refusal that users would get, or returns a sentence if only some of them would get one."""


async def run_checks(checks: Mapping[str, Check]) -> dict[str, str]:
    """Return each check's outcome: `ok`, or what is missing. Raises the first Refusal, which has all outcomes."""
    results = await asyncio.gather(*(check() for check in checks.values()), return_exceptions=True)
    outcomes = {"settings": "ok"}  # voicepass does not start with wrong settings
    for name, result in zip(checks, results, strict=True):
        outcomes[name] = "failed" if isinstance(result, BaseException) else result or "ok"
    for result in results:
        if isinstance(result, Refusal):
            raise type(result)(operator_note=result.operator_note, checks=outcomes) from result
        if isinstance(result, BaseException):
            raise result
    return outcomes


@dataclass(kw_only=True, eq=False)
class LedgerCheck:
    """Checks the ledger at most once in two seconds. A caller in between gets the last outcome.

    `check` raises LedgerUnavailable.
    """

    check: Callable[[], Awaitable[None]]
    ticks: MonotonicClock
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    _fresh_until: float = field(default=float("-inf"), init=False)
    _failure: LedgerUnavailable | None = field(default=None, init=False)

    async def __call__(self) -> None:
        """Raise LedgerUnavailable if no pass can be written."""
        async with self._lock:
            if self.ticks() >= self._fresh_until:
                self._failure = None
                try:
                    await self.check()
                except LedgerUnavailable as refusal:
                    self._failure = refusal
                self._fresh_until = self.ticks() + CHECK_SECONDS
            failure = self._failure
        if failure is not None:  # a new one for each caller, because a raise adds to the exception's traceback
            raise LedgerUnavailable(operator_note=failure.operator_note) from failure
