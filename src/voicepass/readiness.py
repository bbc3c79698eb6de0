"""The named checks behind /readyz: what costs next to nothing to ask, and without which nothing is handed out."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from voicepass.errors import Refusal

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
