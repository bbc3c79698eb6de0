"""A mount under uvicorn and gunicorn with two workers: real processes that share one ledger."""

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from elevenlabs_emulator import EmulatedAgent, Emulator, create_emulator
from tests.canaries import API_KEY
from tests.servers import free_port, running, started

pytestmark = pytest.mark.long

APP = """
import logging
from fastapi import FastAPI
import voicepass

logging.basicConfig(format="APP %(name)s %(message)s", level=logging.INFO)
app = FastAPI()
voicepass.mount(app, "/voice", user=lambda: voicepass.User(id="u-1"))
"""
POLICY = "[limits.user]\npasses_per_minute = 5\nopen_conversations = 5\n"


@pytest.fixture(scope="module")
def elevenlabs() -> Iterator[str]:
    emulator = Emulator(agents=[EmulatedAgent(agent_id="agent_x")], api_keys={API_KEY: frozenset({"convai_write"})})
    with running(lambda _url: create_emulator(emulator)) as url:
        yield url


@pytest.mark.parametrize("server", ["uvicorn", "gunicorn"])
def test_workers_share_one_ledger_and_the_limits_stay_exact(server: str, elevenlabs: str, tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "shop.py").write_text(APP)
    (tmp_path / "policy.toml").write_text(POLICY)
    environment = {
        "PATH": os.environ["PATH"],
        "ELEVENLABS_API_KEY": API_KEY,
        "ELEVENLABS_AGENT_ID": "agent_x",
        "ELEVENLABS_BASE_URL": elevenlabs,
        "VOICEPASS_POLICY_FILE": "policy.toml",
        "HOME": str(tmp_path),  # gunicorn puts a socket there
    }
    commands = {
        "uvicorn": ["--port", str(port), "--workers", "2", "--root-path", "/shop"],
        "gunicorn": ["--bind", f"127.0.0.1:{port}", "--workers", "2", "-k", "uvicorn_worker.UvicornWorker"],
    }
    command = [sys.executable, "-m", server, "shop:app", *commands[server]]

    with (
        started(command, cwd=tmp_path, environment=environment, until="Application startup complete") as output,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client,
        ThreadPoolExecutor(8) as senders,
    ):
        answers = list(senders.map(lambda _: client.post("/voice/v1/signed-url"), range(20)))

    codes = sorted(answer.status_code for answer in answers)
    assert codes == [200] * 5 + [429] * 15, [json.loads(answer.text) for answer in answers]
    assert sum(line.startswith("APP voicepass.passes pass.granted") for line in output) == 5
