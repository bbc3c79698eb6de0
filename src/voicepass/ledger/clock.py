"""Wall time that does not step: the clock of the SQLite ledger."""

import threading
import time
from collections.abc import Callable
from typing import Final

from voicepass.model import Clock

SLEW: Final = 0.03
"""How much faster or slower than real time a steady clock may run until it agrees with the wall clock again.

A pass can be opened for 900 seconds and is released as unopened after 930: that is after 903 real seconds at least.
"""


def elapsed_seconds() -> float:
    """Return seconds since some instant. They do not step, and on Linux they count the time of a suspended machine."""
    # CLOCK_MONOTONIC stops while a Linux machine is suspended, and limits would then hold for too long.
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class SteadyClock:
    """Wall time that never goes back and never jumps. Without a step of the wall clock it is the wall clock.

    After a step it approaches the wall clock by 3 seconds in 100. So a window of 60 seconds takes between 58 and 62
    real seconds, whatever is done to the wall clock. Threads may share it.
    """

    def __init__(self, *, wall: Clock, ticks: Callable[[], float]) -> None:
        self._wall = wall
        self._ticks = ticks
        self._reading = threading.Lock()
        self._now = wall()
        self._read_at = ticks()

    def __call__(self) -> float:
        """Return seconds since the epoch."""
        with self._reading:
            ticks = self._ticks()
            passed = ticks - self._read_at
            self._read_at = ticks
            most = passed * SLEW
            behind = self._wall() - (self._now + passed)
            self._now += passed + max(-most, min(most, behind))
            return self._now
