"""What users meet while ElevenLabs fails: over real sockets, each kind of fault, retries, load and hang-ups."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import structlog

from tests.canaries import secrets_in
from tests.conftest import settings_with
from tests.faults import FAULTS, asked, good
from tests.servers import listening
from voicepass.app import create_app

pytestmark = pytest.mark.anyio

PASS = "/v1/signed-url"


@asynccontextmanager
async def in_front_of(base_url: str, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """The service, in this loop."""
    app = create_app(settings_with(elevenlabs_base_url=base_url, **settings))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://voicepass.test") as client,
    ):
        yield client


def assert_owed(answer: httpx.Response, kind: str) -> None:
    fault = FAULTS[kind]
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == fault.answer, kind
    assert "vendor words" not in answer.text
    if fault.retry_after is not None:
        assert problem["retry_after_seconds"] in fault.retry_after
    wait = problem.get("retry_after_seconds")
    assert answer.headers.get("retry-after") == (None if wait is None else str(wait))


@pytest.mark.parametrize("kind", FAULTS)
async def test_each_fault_is_answered_as_documented_and_in_time(kind: str, bearer: dict[str, str]) -> None:
    async with FAULTS[kind].place() as base_url, in_front_of(base_url, voicepass_deadline_seconds=0.4) as api:
        with structlog.testing.capture_logs() as logged:
            begun = time.perf_counter()
            answer = await api.post(PASS, headers=bearer)
            took = time.perf_counter() - begun

    assert_owed(answer, kind)
    assert took < 0.4 + 2  # this machine's noise; the long trial holds 0.3
    assert secrets_in(str(logged)) == []


# Retries ------------------------------------------------------------------------------------------------------------


async def test_a_connection_that_was_kept_and_closed_is_no_fault_that_users_see(bearer: dict[str, str]) -> None:
    connections = 0

    async def close_at_the_sixth(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        for _ in range(5):
            if await asked(reader):
                writer.write(good(base_url))
        await asked(reader)

    async with listening(close_at_the_sixth) as base_url, in_front_of(base_url) as api:
        answers = [await api.post(PASS, headers=bearer) for _ in range(11)]

    assert [answer.status_code for answer in answers] == [200] * 11
    assert connections == 3
