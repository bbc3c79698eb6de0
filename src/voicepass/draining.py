"""From SIGTERM to the end: no longer ready, yet serving, until no balancer sends anyone here.

A server alone closes its listener at once, and whoever is sent there a moment later is refused.
"""

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import structlog

LAST_CALL_SECONDS: Final = 0.2

_log = structlog.get_logger("voicepass.server")


class Draining:
    """Whether this process is about to end. `seconds`: from SIGTERM until the server is told of it."""

    def __init__(self, *, seconds: float) -> None:
        self._seconds = seconds
        self.has_begun = False

    @contextmanager
    def on_sigterm(self) -> Iterator[None]:
        """Stand between SIGTERM and the running server's own handler; without seconds or a handler, stand aside.

        A second SIGTERM hurries nothing, because some supervisors send it to a parent and its workers, and the parent
        passes it on. SIGINT still ends the server at once.
        """
        is_main_thread = threading.current_thread() is threading.main_thread()  # no other is told of signals
        end = signal.getsignal(signal.SIGTERM)
        if not (self._seconds and is_main_thread and callable(end)):
            yield
            return
        loop = asyncio.get_running_loop()

        def begin() -> None:
            if not self.has_begun:
                self.has_begun = True
                _log.info("drain.begun", seconds=self._seconds)
                # A process that had to stand still meanwhile finds people at its door: they are let in first.
                loop.call_later(self._seconds, loop.call_later, LAST_CALL_SECONDS, end, signal.SIGTERM, None)

        loop.add_signal_handler(signal.SIGTERM, begin)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGTERM)
            signal.signal(signal.SIGTERM, end)
