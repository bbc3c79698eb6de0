"""The machine under the comparison: its cores, the programs in C, and a subject that runs alone on one core."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
BUILD: Final = HERE.parent / ".build"
TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
START_SECONDS: Final = 30.0
IDLE_WITHIN_SECONDS: Final = 60.0


class CannotRunError(Exception):
    """A program is missing or does not start; the message names it."""


def pin_to_core(number: int) -> list[str]:
    """Return the words that pin a command to a core (0: the subject, 1: all others)."""
    cores = sorted(os.sched_getaffinity(0))
    return ["taskset", "-c", str(cores[number % len(cores)])]


def execute(command: Sequence[object], *, cwd: Path = HERE) -> str:
    """Run a command to its end and return its output. CannotRunError holds the last line of its errors."""
    words = [str(word) for word in command]
    if shutil.which(words[0]) is None:
        raise CannotRunError(f"{words[0]} is not installed")
    ended = subprocess.run(  # noqa: S603 - commands of this folder
        words, cwd=cwd, capture_output=True, text=True, check=False
    )
    if ended.returncode:
        errors = (ended.stderr or ended.stdout).strip().splitlines() or ["no output"]
        raise CannotRunError(f"{words[0]}: {errors[-1]}")
    return ended.stdout


def compile_c(name: str) -> Path:
    """Compile `name`.c unless its program is up to date."""
    source, program = HERE / f"{name}.c", BUILD / name
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        BUILD.mkdir(exist_ok=True)
        execute(["gcc", "-O2", "-Wall", "-Wextra", "-o", program, source, "-lm"])
    return program


@dataclass(frozen=True, slots=True)
class Subject:
    """A running server, with all its threads and children."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def last_line(self) -> str:
        """Return the last line that it wrote."""
        return (self.log.read_text().strip().splitlines() or ["no output"])[-1]

    def cpu_seconds(self) -> float:
        """Return its CPU time so far, in user and kernel mode."""
        return sum(map(_cpu_seconds, self._files("stat")))

    def first_thread_share(self) -> float:
        """Return the share of its first thread, which in Python runs the event loop."""
        pid = self.process.pid
        return _cpu_seconds(Path(f"/proc/{pid}/task/{pid}/stat")) / self.cpu_seconds()

    def peak_megabytes(self) -> float:
        """Return its peak memory."""
        lines = [line for path in self._files("status") for line in path.read_text().splitlines()]
        return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

    def wait_until_idle(self) -> None:
        """Wait until it is idle: requests that it still handles must not slow down the next load."""
        until = time.monotonic() + IDLE_WITHIN_SECONDS
        busy = self.cpu_seconds()
        while time.monotonic() < until:
            time.sleep(0.1)
            before, busy = busy, self.cpu_seconds()
            if busy - before < 2 / TICKS_PER_SECOND:
                return

    def _files(self, name: str) -> Iterator[Path]:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # the process has ended
                if int(stat.read_text().rpartition(") ")[2].split()[2]) == self.process.pid:  # of its group
                    yield stat.with_name(name)


def _cpu_seconds(stat: Path) -> float:
    return sum(map(int, stat.read_text().rpartition(") ")[2].split()[11:13])) / TICKS_PER_SECOND


@contextlib.contextmanager
def run_subject(
    name: str, command: Sequence[object], *, port: int, cwd: Path, environment: Mapping[str, str], on: int = 0
) -> Iterator[Subject]:
    """Run a server on the core `on`; its output goes to a log file."""
    log = cwd / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(  # noqa: S603 - commands of this folder
            [*pin_to_core(on), *map(str, command)],
            cwd=cwd,
            env={"PATH": os.environ["PATH"], "HOME": str(cwd)} | dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        yield Subject(name, process, port, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@dataclass(frozen=True, slots=True)
class Upstream:
    """The emulated ElevenLabs."""

    subject: Subject

    @property
    def url(self) -> str:
        """Return its base URL."""
        return f"http://127.0.0.1:{self.subject.port}"

    def calls(self) -> int:
        """Return the number of signed URLs that it has given."""
        with urllib.request.urlopen(f"{self.url}/stats") as answer:  # noqa: S310 - on loopback
            return int(json.load(answer)["calls"])


@contextlib.contextmanager
def run_upstream(delay_ms: float, directory: Path, *, on: int = 1) -> Iterator[Upstream]:
    """Run the emulated ElevenLabs, which answers after that delay."""
    name = f"upstream-{on}"
    with run_subject(
        name, [compile_c("upstream"), str(delay_ms)], port=0, cwd=directory, environment={}, on=on
    ) as subject:
        until = time.monotonic() + START_SECONDS
        while not (printed := subject.log.read_text()).endswith("\n"):
            if time.monotonic() > until:
                raise CannotRunError(f"the upstream does not start: {printed}")
            time.sleep(0.01)
        yield Upstream(replace(subject, port=int(printed)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The figures of a load. `refused`: answers other than 200. `unanswered`: requests without an answer."""

    answered: int
    per_second: float
    median_ms: float
    p99_ms: float
    refused: int
    errors: int
    unanswered: int
    cpu_us: float

    @property
    def failed(self) -> int:
        """Return the number of requests without a pass."""
        return self.refused + self.errors + self.unanswered


def load(
    subject: Subject, *, connections: int, seconds: float, request: str, tokens: Path, per_second: float = 0
) -> Load:
    """Load the subject in a closed loop, or with `per_second` requests at random times.

    `cpu_us` is its CPU time for each answer.
    """
    program = [*pin_to_core(1), compile_c("load"), subject.port, connections, seconds, per_second, request, tokens]
    before = subject.cpu_seconds()
    figures = json.loads(execute(program).replace(": nan", ": NaN"))
    used = subject.cpu_seconds() - before
    return Load(**figures, cpu_us=used * 1e6 / figures["answered"] if figures["answered"] else float("nan"))
