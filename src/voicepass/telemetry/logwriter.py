"""How lines reach a descriptor such as standard error: one thread writes them, so that no request waits for the log.

The lines wait in a bounded buffer. One that finds no room, or that cannot be written, is dropped and counted.
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
"""The longest that a process waits for its lines at its end. After its workers a parent waits once more."""

_BATCH_LINES: Final = 500
_PAUSE_SECONDS: Final = 0.02  # under load, to wake the thread for every line would cost more than to write them


class LogWriter:
    """Writes lines to `descriptor`. `on_resumed` learns how many lines were lost, when writing works again.

    Within `buffered` no caller waits. Before it a caller waits for its line, so that a process that fails at its start
    can say why, and after it for the last lines. The first wait that is in vain is the last one.
    """

    def __init__(self, descriptor: int, *, on_resumed: Callable[[int], None]) -> None:
        self.dropped = 0
        self._descriptor = descriptor
        self._on_resumed = on_resumed
        self._reported = 0
        self._is_line_torn = False
        self._is_buffered = False
        self._wait_until = float("inf")
        self._lock = threading.RLock()  # a signal's handler may log while its thread holds it
        self._queue: SimpleQueue[str | threading.Event] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def write(self, line: str) -> None:
        """Write `line` and a line break. This never raises."""
        if self._thread is None or not self._thread.is_alive():  # not begun, or left behind by a fork
            self._start()
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
        """Let nobody wait for the log until the block ends, then wait for what is left, but not for long."""
        self._is_buffered = True
        try:
            yield
        finally:
            if self._is_buffered:
                self._is_buffered, self._wait_until = False, time.monotonic() + END_SECONDS
            self._wait()

    def _start(self) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                if self._thread is not None:
                    self._queue = SimpleQueue()  # after a fork the old one belongs to the parent's thread
                thread = threading.Thread(target=self._run, name="log", daemon=True)
                with suppress(RuntimeError):  # the system gives us no thread: the next line tries again
                    thread.start()
                    self._thread = thread

    def _wait(self) -> None:
        """Wait until the lines so far are written, or time is up."""
        seconds = min(END_SECONDS, self._wait_until - time.monotonic())
        if seconds > 0 and self._thread is not None and threading.current_thread() is not self._thread:
            written = threading.Event()
            self._queue.put(written)
            if not written.wait(seconds):
                self._wait_until = time.monotonic()

    def _run(self) -> None:
        while True:
            lines, waiting = self._next_batch()
            is_whole = self._write(lines)
            for event in waiting:
                event.set()
            if self._queue.empty():
                if is_whole and self.dropped > self._reported:
                    lost = self.dropped - self._reported
                    self._reported += lost
                    with suppress(Exception):
                        self._on_resumed(lost)
                if self._is_buffered:
                    time.sleep(_PAUSE_SECONDS)

    def _next_batch(self) -> tuple[list[str], list[threading.Event]]:
        """Wait for a line, and take those behind it along."""
        items = [self._queue.get()]
        with suppress(Empty):
            while len(items) < _BATCH_LINES:
                items.append(self._queue.get_nowait())
        lines = [item for item in items if isinstance(item, str)]
        return lines, [item for item in items if isinstance(item, threading.Event)]

    def _write(self, lines: Sequence[str]) -> bool:
        """Write all of `lines`, or count those that were lost."""
        encoded = [f"{line}\n".encode(errors="backslashreplace") for line in lines]
        if encoded and self._is_line_torn:
            encoded[0] = b"\n" + encoded[0]
        data, written = memoryview(b"".join(encoded)), 0
        try:
            while written < len(data):
                written += self._write_some(data[written:])
        except OSError:
            self.drop(sum(end > written for end in accumulate(map(len, encoded))))
        if written:
            self._is_line_torn = data[written - 1] != ord("\n")
        return written == len(data)

    def _write_some(self, data: memoryview) -> int:
        while True:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # another program made the terminal or pipe that it shares with us non-blocking
                select.select([], [self._descriptor], [])
