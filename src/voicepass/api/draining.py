"""From SIGTERM or SIGHUP to the end of the process: /readyz answers 503, and every request is still served.

uvicorn alone closes its listener at once, and requests that a load balancer sends a moment later fail.
"""

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from voicepass.telemetry.logger import Logger

LAST_CALL_SECONDS: Final = 0.2

_log = Logger("voicepass.api.server")


class Draining:
    """Whether this process is about to end. `seconds` is the time from the signal until the server ends."""

    def __init__(self, *, seconds: float) -> None:
        self._seconds = seconds
        self.has_begun = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Drain on SIGTERM and on SIGHUP, then call the running server's own SIGTERM handler.

        Without `seconds`, SIGTERM stays with the server. SIGHUP stays as it is unless it would kill the process: nohup
        ignores it, and other servers handle it. A second signal changes nothing, because some supervisors send SIGTERM
        to a parent and its workers, and the parent sends it to them again. SIGINT still ends the server at once.
        """
        end = signal.getsignal(signal.SIGTERM)
        replaced = {signal.SIGTERM: end} if self._seconds else {}
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            replaced[signal.SIGHUP] = signal.SIG_DFL
        is_main_thread = threading.current_thread() is threading.main_thread()  # Python allows handlers only there
        if not (is_main_thread and callable(end)):
            yield
            return
        loop = asyncio.get_running_loop()

        def begin() -> None:
            if not self.has_begun:
                self.has_begun = True
                _log.info("drain.begun", seconds=self._seconds)
                # If the process was stopped meanwhile, it accepts the waiting connections first.
                loop.call_later(self._seconds, loop.call_later, LAST_CALL_SECONDS, end, signal.SIGTERM, None)

        for number in replaced:
            loop.add_signal_handler(number, begin)
        try:
            yield
        finally:
            for number, handler in replaced.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)
