"""Refuses calls for a while after a refusal that the next call would get as well."""

import math
from collections.abc import Callable
from typing import Final

from voicepass.errors import Busy, KeyRejected

FIRST_PAUSE_SECONDS: Final = 1.0
MAX_PAUSE_SECONDS: Final = 30.0


class Pause:
    """Remembers a refusal, and raises it again until the pause is over. `clock`: monotonic seconds.

    If `begin` gets no time, the pause is 1 s. Each following pause is twice as long, 30 s at most. A success ends it.
    """

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until = float("-inf")
        self._seconds = 0.0
        self._refusal: Busy | KeyRejected | None = None

    @property
    def is_on(self) -> bool:
        """Whether calls are refused."""
        return self._clock() < self._until

    def check(self) -> None:
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

    def begin(self, refusal: Busy | KeyRejected, *, seconds: float = 0.0) -> None:
        """Refuse calls for `seconds`, or for the next of the growing times."""
        if seconds == 0 and self.is_on:
            return  # This call was made before the pause began, and reports nothing new.
        self._seconds = seconds or min(2 * self._seconds or FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS)
        self._until, self._refusal = max(self._until, self._clock() + self._seconds), refusal

    def end(self) -> None:
        """Allow calls."""
        self._until, self._seconds, self._refusal = float("-inf"), 0.0, None
