"""A thread writes the lines whole and in order. No caller waits for a reader that does not read."""

import contextlib
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from voicepass.telemetry.logwriter import MAX_WAITING_LINES, LogWriter


class LossRecorder:
    """Records each number of lost lines that the writer reports."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.is_called = threading.Event()

    def __call__(self, lost: int) -> None:
        self.counts.append(lost)
        self.is_called.set()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """The reading end and the writing end."""
    ends = os.pipe()
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)


def read_lines(descriptor: int, most: int) -> list[str]:
    data = b""
    while data.count(b"\n") < most:
        data += os.read(descriptor, 1_000_000)
    return data.decode().splitlines()


def test_without_buffering_a_line_is_written_at_once(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.set_blocking(reading, False)

    LogWriter(writing, on_resumed=LossRecorder()).write("a line \ud800")

    assert os.read(reading, 100) == b"a line \\ud800\n"


def test_the_end_of_buffering_writes_all_waiting_lines_and_later_ones_follow_at_once(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.set_blocking(reading, False)
    writer = LogWriter(writing, on_resumed=LossRecorder())

    with writer.buffered():
        for number in range(1000):
            writer.write(f"line {number}")
    writer.write("the last")

    assert os.read(reading, 100_000).decode().splitlines() == [*(f"line {n}" for n in range(1000)), "the last"]


def test_no_caller_waits_for_a_reader_that_does_not_read_and_dropped_lines_are_counted(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    lost, lines = LossRecorder(), [f"line {number}".ljust(100, ".") for number in range(2 * MAX_WAITING_LINES)]
    writer = LogWriter(writing, on_resumed=lost)

    with writer.buffered():
        for line in lines:
            writer.write(line)
    dropped = writer.dropped
    arrived = read_lines(reading, len(lines) - dropped)
    assert lost.is_called.wait(timeout=10)

    remaining = iter(lines)
    assert 0 < dropped <= MAX_WAITING_LINES
    assert all(line in remaining for line in arrived), "the lines are whole and in order"
    assert lost.counts == [dropped]


def list_log_threads(*, beside: set[threading.Thread]) -> list[threading.Thread]:
    """The log's threads without those `beside`: an earlier test's thread may still wait for its reader."""
    return [thread for thread in threading.enumerate() if thread.name == "log" and thread not in beside]


def test_after_an_inner_buffer_ends_the_outer_one_keeps_its_thread(tmp_path: Path) -> None:
    earlier = set(threading.enumerate())
    with (tmp_path / "log").open("wb") as file:
        writer = LogWriter(file.fileno(), on_resumed=LossRecorder())
        with writer.buffered():
            threads = list_log_threads(beside=earlier)
            with writer.buffered():
                writer.write("inner")
            writer.write("outer")
            after = list_log_threads(beside=earlier)
        writer.write("own")

    assert len(threads) == 1
    assert after == threads
    assert (tmp_path / "log").read_text().splitlines() == ["inner", "outer", "own"]
    assert writer.dropped == 0


@pytest.mark.timeout(60)  # a wait for each line would take five minutes
def test_an_unbuffered_writer_waits_only_once_for_a_reader_that_does_not_read(pipe: tuple[int, int]) -> None:
    _, writing = pipe
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 4096)
    os.set_blocking(writing, True)
    writer = LogWriter(writing, on_resumed=LossRecorder())

    for number in range(1000):
        writer.write(f"line {number}")

    assert writer.dropped == 1000


def test_lines_without_a_reader_are_counted_and_reported_to_the_next_reader(tmp_path: Path) -> None:
    fifo, lost = tmp_path / "log", LossRecorder()
    os.mkfifo(fifo)
    reading = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    writing = os.open(fifo, os.O_WRONLY)
    writer = LogWriter(writing, on_resumed=lost)

    writer.write("read")
    assert os.read(reading, 100) == b"read\n"
    os.close(reading)
    for number in range(3):
        writer.write(f"lost {number}")
    reading = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    writer.write("read again")
    assert lost.is_called.wait(timeout=10)

    assert os.read(reading, 100) == b"read again\n"
    assert (writer.dropped, lost.counts) == (3, [3])
    os.close(reading)
    os.close(writing)


def test_after_an_incomplete_line_the_next_one_begins_on_a_new_line(tmp_path: Path) -> None:
    lost, file = LossRecorder(), tmp_path / "log"
    writing = os.open(file, os.O_WRONLY | os.O_CREAT)
    writer = LogWriter(writing, on_resumed=lost)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    resource.setrlimit(resource.RLIMIT_FSIZE, (25, hard))  # like a disk that is full at this byte
    try:
        writer.write("the first line")
        writer.write("the second line")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.write("the third line")

    assert lost.is_called.wait(timeout=10)
    assert file.read_text().splitlines() == ["the first line", "the second", "the third line"]
    assert (writer.dropped, lost.counts) == (1, [1])
    os.close(writing)


def test_a_pipe_that_another_program_made_non_blocking_loses_no_line(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.set_blocking(writing, False)
    writer = LogWriter(writing, on_resumed=LossRecorder())
    lines = [f"line {number}".ljust(100, ".") for number in range(2000)]  # three times what the pipe holds

    with writer.buffered():
        for line in lines:
            writer.write(line)
        arrived = read_lines(reading, len(lines))

    assert (arrived, writer.dropped) == (lines, 0)


FORKED = """
import logging, os, threading
from voicepass.telemetry.logs import configure_logging, log_writer

assert threading.active_count() == 1 and not logging.getLogger().handlers, "an import changes nothing"
configure_logging(log_format="json", level="info")
logging.getLogger("x").warning("parent")
child = os.fork()
if not child:
    logging.getLogger("x").warning("child")
    os._exit(0)
os.waitpid(child, 0)
logging.getLogger("x").warning("parent again")
with log_writer.buffered():
    child = os.fork()
    if not child:
        logging.getLogger("x").warning("child of a service")
        os._exit(0)
    os.waitpid(child, 0)
    logging.getLogger("x").warning("service")
"""


def test_an_import_starts_no_thread_and_a_forked_process_still_logs() -> None:
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True, check=False)

    assert [line.split('"')[3] for line in ended.stderr.splitlines()] == [
        *("parent", "child", "parent again", "child of a service", "service"),
    ]
