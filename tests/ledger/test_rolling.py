"""Restarts under load: a balancer that checks `/readyz` loses no request, and dead workers are replaced."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.conftest import UNLIMITED, MakeToken
from tests.ledger.given import Engine, rows
from tests.ledger.test_instances import elevenlabs as elevenlabs  # noqa: PLC0414 - a fixture, used by its name
from tests.ledger.test_instances import environment
from tests.servers import free_port, started

pytestmark = [pytest.mark.anyio, pytest.mark.long, pytest.mark.alone, pytest.mark.timeout(300)]

CALLERS = 16
PROBE_SECONDS = 0.1
DRAIN_SECONDS = 2  # as long as 20 probes, because a busy machine may pause for a second


class Instance:
    """One `voicepass serve` that can be restarted on its port. It remembers whether the last probe found it ready."""

    def __init__(self, cwd: Path, settings: dict[str, str]) -> None:
        self._cwd = cwd
        self._settings = settings | {"VOICEPASS_DRAIN_SECONDS": str(DRAIN_SECONDS)}
        self._port = free_port()
        self._log = cwd / f"{self._port}.log"
        self.url = f"http://127.0.0.1:{self._port}"
        self.is_ready = False

    def start(self) -> None:
        command = [sys.executable, "-m", "voicepass", "serve", "--port", str(self._port)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, cwd=self._cwd, env=self._settings, stderr=log)

    async def probe(self, client: httpx.AsyncClient) -> None:
        while True:
            try:
                self.is_ready = (await client.get(f"{self.url}/readyz")).status_code == 200
            except httpx.TransportError:
                self.is_ready = False
            await asyncio.sleep(PROBE_SECONDS)

    async def wait_until_ready(self) -> None:
        while not self.is_ready:
            assert self._process.poll() is None, self._log.read_text()
            await asyncio.sleep(PROBE_SECONDS)

    async def end(self) -> int:
        """Send SIGTERM and return the exit code."""
        self._process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self._process.wait, 60)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(timeout=20)


class Balancer:
    """Sends each request to the next ready instance, and to another one only if no process listened there."""

    def __init__(self, instances: Sequence[Instance], client: httpx.AsyncClient) -> None:
        self._instances = instances
        self._client = client
        self._turn = 0
        self.answers: Counter[str] = Counter()
        self.conversations: set[str] = set()

    @asynccontextmanager
    async def run_probes(self) -> AsyncIterator[None]:
        async with httpx.AsyncClient(trust_env=False, timeout=1) as client:
            probes = [asyncio.create_task(instance.probe(client)) for instance in self._instances]
            try:
                yield
            finally:
                for probe in probes:
                    probe.cancel()

    async def ask(self, user: dict[str, str]) -> None:
        for _ in self._instances:
            self._turn += 1
            ready = [instance for instance in self._instances if instance.is_ready]
            if not ready:
                self.answers["no instance is ready"] += 1
                return
            try:
                answer = await self._client.post(f"{ready[self._turn % len(ready)].url}/v1/signed-url", headers=user)
            except httpx.ConnectError:
                continue
            except httpx.TransportError as error:
                self.answers[type(error).__name__] += 1
                return
            self.answers[str(answer.status_code)] += 1
            if answer.status_code == 200:
                self.conversations.add(answer.json()["conversation_id"])
            return
        self.answers["nobody listened"] += 1


@dataclass(frozen=True)
class Trial:
    instances: int
    restarts: int
    requests_per_second: int
    requests: int


@pytest.mark.parametrize(
    ("engine", "trial"),
    [
        pytest.param("sqlite", Trial(2, 20, 50, 1000), id="20 restarts at 50 a second"),
        pytest.param("postgres", Trial(3, 3, 200, 5000), id="3 instances rolled amid 5,000 requests"),
    ],
    indirect=["engine"],
)
async def test_restarts_under_load_lose_no_request_of_a_balancer_that_checks_readyz(
    engine: Engine, trial: Trial, elevenlabs: str, make_token: MakeToken, tmp_path: Path
) -> None:
    user = {"Authorization": f"Bearer {make_token()}"}
    settings = environment(elevenlabs, engine, UNLIMITED)
    served = [Instance(tmp_path, settings) for _ in range(trial.instances)]
    codes: list[int] = []

    async def restart_one_after_another() -> None:
        for number in range(trial.restarts):
            instance = served[number % trial.instances]
            codes.append(await instance.end())
            instance.is_ready = False
            instance.start()
            await instance.wait_until_ready()

    async def call_until_all_are_restarted(balancer: Balancer, rolling: asyncio.Task[None]) -> None:
        """Keep to the rate, but wait for each answer, because a late caller would use an old choice of instance."""
        while not rolling.done() or (balancer.answers.total() < trial.requests and not rolling.exception()):
            due = time.monotonic() + CALLERS / trial.requests_per_second
            await balancer.ask(user)
            await asyncio.sleep(due - time.monotonic())

    try:
        async with httpx.AsyncClient(trust_env=False, timeout=30, limits=httpx.Limits(keepalive_expiry=2)) as client:
            balancer = Balancer(served, client)
            async with balancer.run_probes():
                for instance in served:
                    instance.start()
                    await instance.wait_until_ready()
                begun = time.monotonic()
                rolling = asyncio.create_task(restart_one_after_another())
                await asyncio.gather(
                    *(call_until_all_are_restarted(balancer, rolling) for _ in range(CALLERS)), rolling
                )
    finally:
        for instance in served:
            instance.kill()

    async with engine.open() as ledger:
        kept = {row["conversation_id"] for row in await rows(ledger, "SELECT conversation_id FROM passes")}
    seconds = time.monotonic() - begun
    print(f"{engine.name}: {trial.restarts} restarts in {seconds:.0f} s, answers {dict(balancer.answers)}")
    assert balancer.answers.keys() == {"200"}
    assert len(balancer.conversations) == balancer.answers.total() >= trial.requests
    assert balancer.conversations <= kept
    assert codes == [-signal.SIGTERM] * trial.restarts


@pytest.mark.parametrize("engine", ["sqlite", "postgres"], indirect=True)
async def test_a_dead_worker_is_replaced_and_sigterm_drains_all_workers(
    engine: Engine, elevenlabs: str, make_token: MakeToken, tmp_path: Path
) -> None:
    port = free_port()
    url, user = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {make_token()}"}
    settings = environment(elevenlabs, engine, UNLIMITED) | {"VOICEPASS_DRAIN_SECONDS": str(DRAIN_SECONDS)}
    command = [sys.executable, "-m", "voicepass", "serve", "--port", str(port), "--workers", "2"]
    log: list[str] = []

    async def wait_until_logged(line: str, *, times: int = 1) -> None:
        while "".join(log).count(line) < times:  # noqa: ASYNC110 - another thread reads it
            await asyncio.sleep(0.05)

    async with httpx.AsyncClient(
        trust_env=False, timeout=30, limits=httpx.Limits(max_keepalive_connections=0)
    ) as client:
        with started(command, cwd=tmp_path, environment=settings) as log:
            await wait_until_logged("Application startup complete", times=2)
            workers = re.findall(r"Started server process \[(\d+)\]", "".join(log))
            os.kill(int(workers[0]), signal.SIGKILL)
            await wait_until_logged("Application startup complete", times=3)
            answers = [await client.post(f"{url}/v1/signed-url", headers=user) for _ in range(50)]

            await client.put(f"{elevenlabs}/_emulator/faults", json={"latency_seconds": 2.5})
            calls = [asyncio.create_task(client.post(f"{url}/v1/signed-url", headers=user)) for _ in range(20)]
            async with engine.open() as ledger:
                while len(await rows(ledger, "SELECT * FROM passes")) < 50 + 20:
                    pass
            (parent,) = re.findall(r"Started parent process \[(\d+)\]", "".join(log))
            os.kill(int(parent), signal.SIGTERM)
            while (ready := await client.get(f"{url}/readyz")).status_code == 200:
                pass
            answers += await asyncio.gather(*calls)
            await client.delete(f"{elevenlabs}/_emulator/faults")
            await wait_until_logged("Stopping parent process")
    assert {answer.status_code for answer in answers} == {200}
    assert ready.json()["code"] == "shutting_down"
    assert "".join(log).count("Finished server process") == 2
