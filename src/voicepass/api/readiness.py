"""The named checks behind /readyz: what costs next to nothing to ask, and without which nothing is handed out."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

from voicepass.errors import LedgerUnavailable, Refusal

CHECK_SECONDS: Final = 2.0
"""A probe of every five seconds then sees a ledger that fails, and the ledger writes seldom however many probe."""

Probe = Callable[[], Awaitable[str | None]]
"""Raises the Refusal that users would get, or returns a word where only some of them would get it."""


@dataclass(frozen=True, slots=True)
class Readiness:
    """The checks by name; the first that fails, in this order, is the one that is reported."""

    probes: Mapping[str, Probe]

    async def checked(self) -> dict[str, str]:
        """Return each check's outcome: `ok`, or what is missing. Raises the first Refusal; its `checks` has all."""
        results = await asyncio.gather(*(probe() for probe in self.probes.values()), return_exceptions=True)
        outcomes = {"settings": "ok"}  # they were checked at the start, or nobody could ask
        for name, result in zip(self.probes, results, strict=True):
            outcomes[name] = "failed" if isinstance(result, BaseException) else result or "ok"
        for result in results:
            if isinstance(result, Refusal):
                result.checks = outcomes
            if isinstance(result, BaseException):
                raise result
        return outcomes


class LedgerCheck:
    """Checks the ledger once in two seconds at most. All who ask in between get the last outcome.

    `check` raises LedgerUnavailable, `ticks` are monotonic seconds.
    """

    def __init__(self, *, check: Callable[[], Awaitable[None]], ticks: Callable[[], float]) -> None:
        self._check = check
        self._ticks = ticks
        self._checking = asyncio.Lock()
        self._fresh_until = float("-inf")
        self._failure: LedgerUnavailable | None = None

    async def __call__(self) -> None:
        """Raise LedgerUnavailable if no pass can be written."""
        async with self._checking:
            if self._ticks() >= self._fresh_until:
                self._failure = None
                try:
                    await self._check()
                except LedgerUnavailable as refusal:
                    self._failure = refusal
                self._fresh_until = self._ticks() + CHECK_SECONDS
            failure = self._failure
        if failure is not None:  # one of its own for each who asks, because each adds the checks of its answer
            raise LedgerUnavailable(operator_note=failure.operator_note) from failure
