"""A log that cannot be written refuses nobody a pass, and the process still ends on SIGTERM."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.cli.test_cli import ENVIRONMENT
from tests.conftest import MakeToken
from tests.servers import free_port
from tests.telemetry.test_metrics import samples

pytestmark = pytest.mark.alone

POLL_SECONDS = 0.02  # without a pause, the test would take the processor from the process that it watches
END_SECONDS = 10
"""A process that waits for its log would not end at all."""

SERVE = ("-m", "voicepass", "serve")
COMMANDS = {
    "serve": SERVE,
    "workers": (*SERVE, "--workers", "2"),
    "uvicorn": ("-m", "uvicorn", "--factory", "voicepass.app:create_app"),
}


@dataclass
class Service:
    """A process that serves; `passes` asks for passes of new users and tells how it was answered."""

    url: str
    process: subprocess.Popen[bytes]
    make_token: MakeToken
    client: httpx.Client = field(default_factory=lambda: httpx.Client(trust_env=False, timeout=30))
    _users: Iterator[int] = field(default_factory=itertools.count)

    def passes(self, count: int) -> set[int]:
        tokens = [self.make_token(sub=f"u-{next(self._users)}") for _ in range(count)]
        return {self._status({"Authorization": f"Bearer {token}"}) for token in tokens}

    def _status(self, headers: dict[str, str]) -> int:
        return self.client.post(f"{self.url}/v1/signed-url", headers=headers).status_code

    def dropped(self, *, at_least: int) -> float:
        """The count of lost lines, once it is as high as that."""
        begun, count = time.monotonic(), -1.0
        while count < at_least and time.monotonic() - begun < 20:
            time.sleep(POLL_SECONDS)
            count = samples(self.client.get(f"{self.url}/metrics").text)["voicepass_log_lines_dropped_total"]
        return count

    def end(self) -> float:
        """Send SIGTERM and wait; the seconds that the end took."""
        begun = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=END_SECONDS) in {0, -signal.SIGTERM}
        return time.monotonic() - begun


@contextlib.contextmanager
def serving(
    stderr: int, *, elevenlabs: str, cwd: Path, make_token: MakeToken, command: Sequence[str] = SERVE
) -> Iterator[Service]:
    """Serve with this descriptor as standard error, from when it answers until the block ends."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, *command, "--port", str(port)],
        cwd=cwd,
        env=ENVIRONMENT | {"ELEVENLABS_BASE_URL": elevenlabs},
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        start_new_session=True,
    )
    service = Service(f"http://127.0.0.1:{port}", process, make_token)
    try:
        while process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                service.client.get(f"{service.url}/healthz")
                break
            time.sleep(POLL_SECONDS)
        yield service
    finally:
        service.client.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read_until(pipe: int, text: str, *, times: int = 1) -> None:
    """Read what is written until a text has come so many times."""
    data = b""
    while data.count(text.encode()) < times:
        data += os.read(pipe, 100_000)


def fill(pipe: int) -> None:
    """Leave no room in a pipe that nobody reads, not even for one byte."""
    # Opened again, because the process under test shares the flags of `pipe`.
    filling = os.open(f"/proc/self/fd/{pipe}", os.O_WRONLY | os.O_NONBLOCK)
    for size in (4096, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(filling, b"x" * size)
    os.close(filling)


@pytest.mark.long
def test_passes_are_granted_while_nobody_reads_the_log(tmp_path: Path, elevenlabs: str, make_token: MakeToken) -> None:
    os.mkfifo(tmp_path / "log")
    reading = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    writing = os.open(tmp_path / "log", os.O_WRONLY)
    with serving(writing, elevenlabs=elevenlabs, cwd=tmp_path, make_token=make_token) as service:
        os.set_blocking(reading, True)
        read_until(reading, "Uvicorn running")  # the port answers before this line is written
        os.close(reading)

        statuses = service.passes(5)
        dropped = service.dropped(at_least=5)
        reading = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
        statuses |= service.passes(1)
        service.end()

        lines = [json.loads(line) for line in os.read(reading, 100_000).splitlines()]
    os.close(reading)
    os.close(writing)
    events = [line["event"] for line in lines]
    assert statuses == {200}
    assert events[0] == "pass.granted"
    assert [line["lost"] for line in lines if line["event"] == "log.resumed"] == [dropped] == [5]
    assert events[-1].startswith("Finished server process"), "the end is in the log too"


@pytest.mark.long
def test_passes_are_granted_while_the_disk_of_the_log_is_full(
    tmp_path: Path, elevenlabs: str, make_token: MakeToken
) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with serving(full, elevenlabs=elevenlabs, cwd=tmp_path, make_token=make_token) as service:
        statuses = service.passes(20)
        dropped = service.dropped(at_least=20)
        service.end()
    os.close(full)

    assert statuses == {200}
    assert dropped >= 20


@pytest.mark.long
@pytest.mark.parametrize(
    "command", ["serve", *(pytest.param(name, marks=pytest.mark.long) for name in ("workers", "uvicorn"))]
)
def test_passes_are_granted_and_sigterm_is_obeyed_while_a_reader_does_not_read(
    tmp_path: Path, elevenlabs: str, make_token: MakeToken, command: str
) -> None:
    reading, writing = os.pipe()
    with serving(
        writing, elevenlabs=elevenlabs, cwd=tmp_path, make_token=make_token, command=COMMANDS[command]
    ) as service:
        read_until(reading, "Application startup complete", times=2 if command == "workers" else 1)
        fill(writing)
        statuses = service.passes(40)
        seconds = service.end()
    os.close(reading)
    os.close(writing)

    print(f"{command}: ended {seconds:.2f} s after SIGTERM, while nobody read its log")
    assert statuses == {200}
