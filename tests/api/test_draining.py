"""SIGTERM and SIGHUP from outside: the service is not ready, then stops listening, and answers every open request."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from elevenlabs_emulator import EmulatedAgent, Emulator, Fault, create_emulator
from tests.canaries import API_KEY
from tests.cli.test_cli import ENVIRONMENT
from tests.conftest import MakeToken, settings_with
from tests.servers import free_port, running, started
from voicepass.cli.service import longest_answer_seconds

pytestmark = pytest.mark.alone

POLL_SECONDS = 0.02  # without a pause, the test takes the processor that the server needs


@contextlib.contextmanager
def run_slow_elevenlabs(*, latency_seconds: float) -> Iterator[tuple[str, threading.Event]]:
    """Run a slow ElevenLabs; yield its URL and an event that its first request sets."""
    asked = threading.Event()
    emulator = create_emulator(
        Emulator(
            agents=[EmulatedAgent(agent_id="agent_demo")],
            api_keys={API_KEY: frozenset({"convai_write"})},
            faults=[Fault(latency_seconds=latency_seconds)],
        )
    )

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            asked.set()
        await emulator(scope, receive, send)

    with running(lambda _url: app) as url:
        yield url, asked


def is_closed(client: httpx.Client, url: str) -> bool:
    try:
        client.get(f"{url}/healthz")
    except httpx.ConnectError:
        return True
    except httpx.TransportError:
        return False  # accepted and then closed: the listener closes next
    return False


@pytest.fixture
def default_sighup() -> Iterator[None]:
    """Let new processes receive SIGHUP: if the tests run under nohup, they inherit that it is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    """Opens a connection for each request, as new callers do."""
    with httpx.Client(trust_env=False, timeout=30, limits=httpx.Limits(max_keepalive_connections=0)) as client:
        yield client


def test_after_sigterm_readyz_answers_503_and_every_open_request_is_answered(
    client: httpx.Client, make_token: MakeToken, tmp_path: Path
) -> None:
    port = free_port()
    url, user = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {make_token()}"}
    command = [sys.executable, "-m", "voicepass", "serve", "--port", str(port)]
    with run_slow_elevenlabs(latency_seconds=2) as (upstream, is_asked), ThreadPoolExecutor(1) as callers:
        environment = ENVIRONMENT | {"ELEVENLABS_BASE_URL": upstream, "VOICEPASS_DRAIN_SECONDS": "1"}
        with started(command, cwd=tmp_path, environment=environment) as log:
            (pid,) = re.findall(r"Started server process \[(\d+)\]", "".join(log))
            before = client.get(f"{url}/readyz")
            asked = callers.submit(client.post, f"{url}/v1/signed-url", headers=user)
            assert is_asked.wait(timeout=20)

            begun = time.monotonic()
            os.kill(int(pid), signal.SIGTERM)
            while (ready := client.get(f"{url}/readyz")).status_code == 200:
                time.sleep(POLL_SECONDS)
            during = client.get(f"{url}/healthz")
            while not is_closed(client, url):
                time.sleep(POLL_SECONDS)
            open_seconds = time.monotonic() - begun
            granted = asked.result()

    assert (before.status_code, before.headers.get("connection")) == (200, None)
    assert (ready.status_code, ready.json()["code"]) == (503, "shutting_down")
    assert (during.status_code, during.headers["connection"]) == (200, "close")
    assert open_seconds > 1
    assert (granted.status_code, granted.json()["user_id"]) == (200, "u-1")


@pytest.mark.long
@pytest.mark.usefixtures("default_sighup")
def test_sighup_ends_the_server_like_sigterm_and_open_requests_are_answered(
    client: httpx.Client, make_token: MakeToken, tmp_path: Path
) -> None:
    port = free_port()
    url, user = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {make_token()}"}
    command = [sys.executable, "-m", "voicepass", "serve", "--port", str(port)]
    with run_slow_elevenlabs(latency_seconds=0.5) as (upstream, is_asked), ThreadPoolExecutor(1) as callers:
        process_environment = ENVIRONMENT | {"ELEVENLABS_BASE_URL": upstream}
        with started(command, cwd=tmp_path, environment=process_environment) as log:
            (pid,) = re.findall(r"Started server process \[(\d+)\]", "".join(log))
            asked = callers.submit(client.post, f"{url}/v1/signed-url", headers=user)
            assert is_asked.wait(timeout=20)

            os.kill(int(pid), signal.SIGHUP)
            granted = asked.result()
            while not is_closed(client, url):
                time.sleep(POLL_SECONDS)

    assert (granted.status_code, granted.json()["user_id"]) == (200, "u-1")
    assert '"event": "drain.begun"' in "".join(log)


@pytest.mark.long
def test_under_nohup_the_server_ignores_sighup(client: httpx.Client, tmp_path: Path) -> None:
    port = free_port()
    command = ["nohup", sys.executable, "-m", "voicepass", "serve", "--port", str(port)]
    with started(command, cwd=tmp_path, environment=ENVIRONMENT) as log:
        (pid,) = re.findall(r"Started server process \[(\d+)\]", "".join(log))

        os.kill(int(pid), signal.SIGHUP)
        alive = client.get(f"http://127.0.0.1:{port}/healthz")

    assert (alive.status_code, alive.headers.get("connection")) == (200, None)


@pytest.mark.long
@pytest.mark.parametrize("drain_seconds", [0, 2])
def test_after_sigterm_the_server_ends_in_time_even_if_elevenlabs_hangs(
    client: httpx.Client, make_token: MakeToken, tmp_path: Path, drain_seconds: int
) -> None:
    port = free_port()
    url, user = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {make_token()}"}
    command = [sys.executable, "-m", "voicepass", "serve", "--port", str(port)]
    with run_slow_elevenlabs(latency_seconds=300) as (upstream, is_asked), ThreadPoolExecutor(1) as callers:
        environment = ENVIRONMENT | {
            "ELEVENLABS_BASE_URL": upstream,
            "VOICEPASS_DRAIN_SECONDS": str(drain_seconds),
        }
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
        try:
            while is_closed(client, url):
                time.sleep(POLL_SECONDS)
            asked = callers.submit(client.post, f"{url}/v1/signed-url", headers=user)
            assert is_asked.wait(timeout=20)
            with socket.create_connection(("127.0.0.1", port)) as half_a_request:
                half_a_request.sendall(b"POST /v1/signed-url HTTP/1.1\r\n")
                begun = time.monotonic()

                process.send_signal(signal.SIGTERM)
                code = process.wait(timeout=60)

                seconds = time.monotonic() - begun
        finally:
            process.kill()
        answer = asked.result()

    print(f"drain of {drain_seconds} s while all requests hang: ended after {seconds:.1f} s, code {code}")
    assert code == -signal.SIGTERM
    assert seconds < drain_seconds + longest_answer_seconds(settings_with()) + 2
    assert answer.json()["code"] == "elevenlabs_timeout"


@pytest.mark.long
def test_connections_that_wait_while_the_process_is_stopped_are_answered(client: httpx.Client, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "voicepass", "serve", "--port", str(port)]
    with (
        started(command, cwd=tmp_path, environment=ENVIRONMENT | {"VOICEPASS_DRAIN_SECONDS": "1"}) as log,
        ThreadPoolExecutor(20) as callers,
    ):
        (pid,) = map(int, re.findall(r"Started server process \[(\d+)\]", "".join(log)))
        os.kill(pid, signal.SIGTERM)
        while client.get(f"{url}/readyz").status_code == 200:
            time.sleep(POLL_SECONDS)
        os.kill(pid, signal.SIGSTOP)

        waiting = [callers.submit(client.get, f"{url}/healthz") for _ in range(20)]
        time.sleep(1.5)  # longer than the drain, which is over when the process continues
        os.kill(pid, signal.SIGCONT)

        assert {caller.result().status_code for caller in waiting} == {200}
