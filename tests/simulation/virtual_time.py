"""An event loop with virtual time: if all tasks wait, it skips to the next timer, so a day takes minutes.

The virtual time does not move while a ledger works, so real waits do not count in the simulated day.
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
    """Seconds since the simulation began, and the number of real operations in flight."""

    def __init__(self) -> None:
        self.now = 0.0
        self._in_flight = 0

    @property
    def is_frozen(self) -> bool:
        return self._in_flight > 0

    @contextmanager
    def freeze(self) -> Iterator[None]:
        """Stop the virtual time while a real operation is in flight."""
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1


class _JumpingSelector(selectors.DefaultSelector):
    """Moves the virtual time to the next timer instead of waiting for it."""

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
    """A real ledger that stops the virtual time while it works."""

    def __init__(self, ledger: Ledger, time: VirtualTime) -> None:
        self._ledger = ledger
        self._time = time

    async def run(
        self, rule: Callable[[float], Dialogue[Result]], *, locks: Sequence[str] = (), is_durable: bool = True
    ) -> Result:
        with self._time.freeze():
            return await self._ledger.run(rule, locks=locks, is_durable=is_durable)
