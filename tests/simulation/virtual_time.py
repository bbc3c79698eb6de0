"""An event loop whose time passes only while everyone waits for it: a day takes minutes.

The loop's time stands still while a ledger works, so no real wait is mistaken for a wait in the simulated day.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from voicepass.ledger import Ledger
from voicepass.ledger.dialogue import Dialogue

Result = TypeVar("Result")


class VirtualTime:
    """Seconds since the simulation began, and how many real operations are in flight."""

    def __init__(self) -> None:
        self.now = 0.0
        self._in_flight = 0

    @property
    def is_frozen(self) -> bool:
        return self._in_flight > 0

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let no virtual time pass while something real is in flight."""
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting for the next timer, moves the time to it."""

    def __init__(self, time: VirtualTime) -> None:
        super().__init__()
        self._time = time

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready: list[tuple[selectors.SelectorKey, int]] = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None or self._time.is_frozen:
            return list(super().select(None))
        self._time.now += timeout
        return []


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self, time: VirtualTime) -> None:
        super().__init__(_JumpingSelector(time))
        self._virtual_time = time

    def time(self) -> float:
        return self._virtual_time.now


def run(time: VirtualTime, main: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """Run `main` in virtual time."""
    with asyncio.Runner(loop_factory=lambda: _VirtualLoop(time)) as runner:
        return runner.run(main())


class FreezingLedger(Ledger):
    """A real ledger; the time stands still while it works."""

    def __init__(self, ledger: Ledger, time: VirtualTime) -> None:
        self._ledger = ledger
        self._time = time

    async def run(
        self, rule: Callable[[float], Dialogue[Result]], *, locks: Sequence[str] = (), is_durable: bool = True
    ) -> Result:
        with self._time.frozen():
            return await self._ledger.run(rule, locks=locks, is_durable=is_durable)
