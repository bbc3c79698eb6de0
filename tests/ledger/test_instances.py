"""Real server processes on one ledger: limits apply across them, and a kill loses no acknowledged pass."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from elevenlabs_emulator import EmulatedAgent, Emulator, create_emulator
from tests.canaries import API_KEY, JWT_SECRET
from tests.cli.test_cli import CLEAN
from tests.conftest import AGENT_ID, AUDIENCE, TOKEN_ISSUER, UNLIMITED, MakeToken, policy_file
from tests.ledger.given import Engine, rows
from tests.servers import free_port, running, started

pytestmark = [pytest.mark.anyio, pytest.mark.long, pytest.mark.timeout(900)]

TWENTY_A_MINUTE = UNLIMITED.replace('passes_per_minute = "off"', "passes_per_minute = 20")


@pytest.fixture(scope="module")
def elevenlabs() -> Iterator[str]:
    agents, keys = [EmulatedAgent(agent_id=AGENT_ID)], {API_KEY: frozenset({"convai_write", "convai_read"})}
    with running(lambda _url: create_emulator(Emulator(agents=agents, api_keys=keys))) as url:
        yield url


def environment(elevenlabs: str, engine: Engine, policy: str) -> dict[str, str]:
    return CLEAN | {
        "ELEVENLABS_API_KEY": API_KEY,
        "ELEVENLABS_AGENT_ID": AGENT_ID,
        "ELEVENLABS_BASE_URL": elevenlabs,
        "VOICEPASS_JWT_SECRET": JWT_SECRET,
        "VOICEPASS_JWT_ISSUER": TOKEN_ISSUER,
        "VOICEPASS_JWT_AUDIENCE": AUDIENCE,
        "VOICEPASS_POLICY_FILE": policy_file(policy),
        "VOICEPASS_DATABASE_URL": f"sqlite:///{engine.url}" if engine.name == "sqlite" else engine.url,
    }


def serve(port: int) -> list[str]:
    return [sys.executable, "-m", "voicepass", "serve", "--port", str(port)]


@pytest.mark.parametrize(("engine", "instances"), [("postgres", 3), ("sqlite", 1)], indirect=["engine"])
@pytest.mark.alone
async def test_300_requests_of_each_of_20_users_get_exactly_20_passes(
    engine: Engine, instances: int, elevenlabs: str, make_token: MakeToken, tmp_path: Path
) -> None:
    ports = [free_port() for _ in range(instances)]
    settings = environment(elevenlabs, engine, TWENTY_A_MINUTE)
    granted: list[int] = []

    with ExitStack() as servers:
        for port in ports:
            servers.enter_context(started(serve(port), cwd=tmp_path, environment=settings))
        async with httpx.AsyncClient(
            trust_env=False, timeout=30, limits=httpx.Limits(max_connections=300, max_keepalive_connections=0)
        ) as client:
            for number in range(20):
                user = {"Authorization": f"Bearer {make_token(sub=f'u-{number}')}"}
                urls = [f"http://127.0.0.1:{ports[n % instances]}/v1/signed-url" for n in range(300)]
                answers = await asyncio.gather(*(client.post(url, headers=user) for url in urls))
                granted.append(sum(answer.status_code == 200 for answer in answers))
                assert {answer.status_code for answer in answers} == {200, 429}

    assert granted == [20] * 20


TWO_PLANS = f"""{UNLIMITED}
[[limits.plan]]
name = "pro"
when = {{ plan = "pro" }}
minutes_per_day = 200

[[limits.plan]]
name = "basic"
when = "everyone"
minutes_per_day = 70
"""
SERVICE_TOKEN = "canary-service-token-of-the-instances-91"


@pytest.mark.parametrize(("engine", "instances"), [("postgres", 3), ("sqlite", 1)], indirect=["engine"])
@pytest.mark.alone
async def test_50_requests_at_once_get_exactly_what_the_plan_and_its_extension_allow(
    engine: Engine, instances: int, elevenlabs: str, make_token: MakeToken, tmp_path: Path
) -> None:
    """A pass reserves ten minutes. A user at the limit gets an unopened pass again, so only new passes are counted."""
    settings = environment(elevenlabs, engine, TWO_PLANS) | {"VOICEPASS_SERVICE_TOKENS": SERVICE_TOKEN}
    ports = [free_port() for _ in range(instances)]
    urls = [f"http://127.0.0.1:{port}" for port in ports]

    async def ask(client: httpx.AsyncClient, user_id: str, *plans: str) -> int:
        """Ask 50 times at once, for each plan and at each instance in turn; return the number of the user's passes."""
        tokens = [make_token(sub=user_id, plan=plans[number % len(plans)]) for number in range(50)]
        calls = [
            client.post(f"{urls[number % instances]}/v1/signed-url", headers={"Authorization": f"Bearer {token}"})
            for number, token in enumerate(tokens)
        ]
        answers = await asyncio.gather(*calls)
        assert {answer.status_code for answer in answers} <= {200, 429}
        passes.update(answer.json()["conversation_id"] for answer in answers if answer.status_code == 200)
        async with engine.open() as ledger:
            (row,) = await rows(ledger, "SELECT count(*) AS n FROM passes WHERE user_id = :user", user=user_id)
        return int(row["n"])

    passes: set[str] = set()
    extension = {"user_id": "u-1", "minutes": 30, "ends_at": "2030-12-31T23:59:59Z"}
    with ExitStack() as servers:
        for port in ports:
            servers.enter_context(started(serve(port), cwd=tmp_path, environment=settings))
        async with httpx.AsyncClient(
            trust_env=False, timeout=30, limits=httpx.Limits(max_connections=50, max_keepalive_connections=0)
        ) as client:
            granted = [await ask(client, "u-1", "basic"), await ask(client, "u-1", "pro")]
            service = {"Authorization": f"Bearer {SERVICE_TOKEN}"}
            (await client.post(f"{urls[0]}/v1/extensions", headers=service, json=extension)).raise_for_status()
            granted += [await ask(client, "u-1", "pro"), await ask(client, "u-1", "basic")]
            granted += [await ask(client, "u-2", "basic", "pro")]

    assert granted == [7, 20, 23, 23, 20]
    assert len(passes) == 23 + 20


@contextmanager
def run_and_kill(port: int, tmp_path: Path, settings: dict[str, str]) -> Iterator[None]:
    """Run a server until the block ends, and kill it with SIGKILL."""
    process = subprocess.Popen(
        serve(port), cwd=tmp_path, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if "Uvicorn running on" in line:
                break
        yield
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=20)
        process.stderr.close()


class Caller:
    """Asks one server for passes without pause, until the server is killed."""

    def __init__(self, url: str, user: dict[str, str], acknowledged: list[str]) -> None:
        self._url = url
        self._user = user
        self._acknowledged = acknowledged
        self.was_answered = asyncio.Event()

    async def ask(self, client: httpx.AsyncClient) -> None:
        while True:
            answer = await client.post(self._url, headers=self._user)
            if answer.status_code == 200:
                self._acknowledged.append(answer.json()["conversation_id"])
                self.was_answered.set()


@pytest.mark.parametrize(("engine", "trials"), [("sqlite", 200), ("postgres", 50)], indirect=["engine"])
async def test_a_server_killed_at_any_moment_loses_no_pass_that_it_returned(
    engine: Engine, trials: int, elevenlabs: str, make_token: MakeToken, tmp_path: Path
) -> None:
    settings = environment(elevenlabs, engine, UNLIMITED)
    moments = random.Random(7)  # noqa: S311 - the same moments every time
    user = {"Authorization": f"Bearer {make_token(exp=int(time.time()) + 3600)}"}
    acknowledged: list[str] = []

    async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
        for _ in range(trials):
            port = free_port()
            caller = Caller(f"http://127.0.0.1:{port}/v1/signed-url", user, acknowledged)
            with run_and_kill(port, tmp_path, settings):
                calls = [asyncio.create_task(caller.ask(client)) for _ in range(8)]
                await asyncio.wait_for(caller.was_answered.wait(), timeout=20)
                await asyncio.sleep(moments.uniform(0, 0.1))
            await asyncio.gather(*calls, return_exceptions=True)

    async with engine.open() as ledger:
        kept = {row["conversation_id"]: row for row in await rows(ledger, "SELECT * FROM passes")}
        broken = [row for row in kept.values() if row["conversation_id"] is not None and row["granted_at"] is None]
        if engine.name == "sqlite":
            assert [row["integrity_check"] for row in await rows(ledger, "PRAGMA integrity_check")] == ["ok"]
    print(f"{engine.name}: {trials} kills of the server, {len(acknowledged)} passes acknowledged, none lost")
    assert len(acknowledged) > trials
    assert set(acknowledged) <= kept.keys()
    assert broken == []
