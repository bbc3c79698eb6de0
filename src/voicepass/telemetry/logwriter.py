"""Writes lines to a descriptor such as standard error. While the service runs, a thread writes them.

Then no request waits for the log: the lines wait in a bounded queue. A line that finds it full, or that cannot be
written, is dropped and counted.
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

MAX_WAITING_LINES: Final = 10_000  # about 4 MB, or three seconds of the most passes that one process can issue
END_SECONDS: Final = 0.3  # how long a process waits for a reader at its end; the parent of workers does so after them

_BATCH_LINES: Final = 500
_PAUSE_SECONDS: Final = 0.02  # under load, waking the thread for every line would cost more than writing them


class LogWriter:
    """Writes lines to `descriptor`. When writing works again, it calls `on_resumed` with the number of lost lines.

    Within `buffered` no caller waits. Outside of it, each caller writes its own line. Once a reader has not read for
    END_SECONDS, nobody waits again, and further lines are dropped.
    """

    def __init__(self, descriptor: int, *, on_resumed: Callable[[int], None]) -> None:
        self.dropped = 0
        self._descriptor = descriptor
        self._on_resumed = on_resumed
        self._reported = 0
        self._is_line_torn = False
        self._thread = threading.Thread()  # of the innermost `buffered`; it is not alive in a fork
        self._is_stalled = False
        self._lock = threading.RLock()  # a signal handler may log while its thread holds it
        self._queue: SimpleQueue[str | None] = SimpleQueue()  # lines; None ends the thread

    def write(self, line: str) -> None:
        """Write `line` and a line break. This never raises."""
        is_buffered = self._thread.is_alive()
        if self._is_stalled or (is_buffered and self._queue.qsize() >= MAX_WAITING_LINES):
            self.drop()
        elif is_buffered:
            self._queue.put(line)
        else:
            self._write([line], wait_seconds=END_SECONDS)

    def drop(self, lines: int = 1) -> None:
        """Count lines that nobody will read."""
        with self._lock:
            self.dropped += lines

    @contextmanager
    def buffered(self) -> Iterator[None]:
        """Let no caller wait for the log until the block ends. Then wait for the last lines, but not for long."""
        queue: SimpleQueue[str | None] = SimpleQueue()
        thread = threading.Thread(target=self._run, args=(queue,), name="log", daemon=True)
        with suppress(RuntimeError):  # the system refuses another thread: each caller then writes its own line
            thread.start()
        outer = self._queue, self._thread
        self._queue, self._thread, self._is_stalled = queue, thread, False
        try:
            yield
        finally:
            if thread.is_alive():
                queue.put(None)
                thread.join(END_SECONDS)
            if self._thread is thread:  # A block that began later and has not ended keeps its own.
                self._is_stalled = thread.is_alive() and not outer[1].is_alive()
                self._queue, self._thread = outer
            with suppress(Empty):  # Other threads may have written during the end.
                while not thread.is_alive() and (line := queue.get_nowait()) is not None:
                    self.write(line)

    def _run(self, queue: SimpleQueue[str | None]) -> None:
        while True:
            batch = [queue.get()]
            with suppress(Empty):
                while len(batch) < _BATCH_LINES:
                    batch.append(queue.get_nowait())
            self._write([line for line in batch if line is not None], wait_seconds=None)
            if None in batch:
                return
            time.sleep(_PAUSE_SECONDS)

    def _write(self, lines: Sequence[str], *, wait_seconds: float | None) -> None:
        """Write `lines`, or count those that were lost. Without `wait_seconds`, wait for a reader without end."""
        encoded = [f"{line}\n".encode(errors="backslashreplace") for line in lines]
        if encoded and self._is_line_torn:
            encoded[0] = b"\n" + encoded[0]
        data, written = memoryview(b"".join(encoded)), 0
        try:
            while written < len(data):
                written += self._write_some(data[written:], wait_seconds)
        except OSError:
            self.drop(sum(end > written for end in accumulate(map(len, encoded))))
        if written:
            self._is_line_torn = data[written - 1] != ord("\n")
        lost = self.dropped - self._reported
        if lost and written == len(data) and (self._queue.empty() or not self._thread.is_alive()):
            self._reported += lost
            self._on_resumed(lost)

    def _write_some(self, data: memoryview, wait_seconds: float | None) -> int:
        """Write the start of `data` and return its length. Raises OSError, also if nobody reads in time."""
        _, has_room, _ = select.select([], [self._descriptor], [], wait_seconds)
        if not has_room:
            self._is_stalled = True
            raise TimeoutError
        # Where `select` finds room, a write of PIPE_BUF bytes does not wait.
        most = len(data) if wait_seconds is None else select.PIPE_BUF
        try:
            return os.write(self._descriptor, data[:most])
        except BlockingIOError:  # another process filled the shared pipe since, and made it non-blocking
            return 0
