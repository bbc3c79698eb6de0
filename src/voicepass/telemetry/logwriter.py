"""Writes lines to a descriptor such as standard error from a thread of its own, so that no request waits for the log.

The lines wait in a bounded queue. A line that finds it full, or that cannot be written, is dropped and counted.
"""

import os
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from queue import Empty, SimpleQueue
from typing import Final

MAX_WAITING_LINES: Final = 10_000
"""About 4 MB, or three seconds of the most passes that one process can issue."""
END_SECONDS: Final = 0.3
"""The longest that a process waits for its lines at its end. The parent of workers waits once more after them."""

_BATCH_LINES: Final = 500
_PAUSE_SECONDS: Final = 0.02  # under load, waking the thread for every line would cost more than writing them


class LogWriter:
    """Writes lines to `descriptor`. When writing works again, it calls `on_resumed` with the number of lost lines.

    Within `buffered` no caller waits. Before it a caller waits for its line, so that a process that fails at its start
    can say why, and after it for the last lines. After one wait that took too long, nobody waits again.
    """

    def __init__(self, descriptor: int, *, on_resumed: Callable[[int], None]) -> None:
        self.dropped = 0
        self._descriptor = descriptor
        self._on_resumed = on_resumed
        self._reported = 0
        self._is_line_torn = False
        self._is_buffered = False
        self._wait_until = float("inf")
        self._lock = threading.RLock()  # a signal handler may log while its thread holds it
        self._thread: threading.Thread | None = None
        self._queue: SimpleQueue[str | threading.Event] = SimpleQueue()
        """Lines. The thread sets an event when it has written all lines before it."""

    def write(self, line: str) -> None:
        """Write `line` and a line break. This never raises."""
        self._start_thread()
        if self._queue.qsize() >= MAX_WAITING_LINES:
            self.drop()
            return
        self._queue.put(line)
        if not self._is_buffered:
            self._wait()

    def drop(self, lines: int = 1) -> None:
        """Count lines that nobody will read."""
        with self._lock:
            self.dropped += lines

    @contextmanager
    def buffered(self) -> Iterator[None]:
        """Let no caller wait for the log until the block ends. Then wait for the last lines, but not for long."""
        self._is_buffered = True
        try:
            yield
        finally:
            if self._is_buffered:
                self._is_buffered, self._wait_until = False, time.monotonic() + END_SECONDS
            self._wait()

    def _start_thread(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            return
        with self._lock, suppress(RuntimeError):  # the system refuses another thread: the next line tries again
            if self._thread is not None and not self._thread.is_alive():
                self._queue = SimpleQueue()  # this process is a fork, and its parent writes these lines
                self._thread = None
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="log", daemon=True)
                thread.start()
                self._thread = thread

    def _wait(self) -> None:
        """Wait until all lines are written, or time is up."""
        seconds = min(END_SECONDS, self._wait_until - time.monotonic())
        if seconds > 0 and self._thread is not None and threading.current_thread() is not self._thread:
            is_written = threading.Event()
            self._queue.put(is_written)
            if not is_written.wait(seconds):
                self._wait_until = time.monotonic()

    def _run(self) -> None:
        can_write = False
        while True:
            batch = [self._queue.get()]
            with suppress(Empty):
                while len(batch) < _BATCH_LINES:
                    batch.append(self._queue.get_nowait())
            if lines := [line for line in batch if isinstance(line, str)]:
                can_write = self._write(lines)
            for event in batch:
                if isinstance(event, threading.Event):
                    event.set()
            lost = self.dropped - self._reported
            if can_write and lost and self._queue.empty():
                self._reported += lost
                with suppress(Exception):
                    self._on_resumed(lost)
            if self._is_buffered:
                time.sleep(_PAUSE_SECONDS)

    def _write(self, lines: Sequence[str]) -> bool:
        """Write all of `lines`, or count those that were lost. Returns whether all are written."""
        encoded = [f"{line}\n".encode(errors="backslashreplace") for line in lines]
        if self._is_line_torn:
            encoded[0] = b"\n" + encoded[0]
        data, written = memoryview(b"".join(encoded)), 0
        while written < len(data):
            try:
                written += os.write(self._descriptor, data[written:])
            except BlockingIOError:  # another program made the shared terminal or pipe non-blocking
                select.select([], [self._descriptor], [])
            except OSError:
                self.drop(sum(end > written for end in accumulate(map(len, encoded))))
                break
        if written:
            self._is_line_torn = data[written - 1] != ord("\n")
        return written == len(data)
