"""The apps of docs/mobile.md read the service's answers by the names that the service uses."""

import re
from pathlib import Path

import httpx
import pytest
import respx

from voicepass.api.problems import Problem

pytestmark = pytest.mark.anyio

DOCUMENT = (Path(__file__).parents[1] / "docs" / "mobile.md").read_text()
APPS: dict[str, str] = dict(re.findall(r"```(\w+)\n(.*?)```", DOCUMENT, re.DOTALL))
NAME = re.compile(r"\b[a-z]+(?:_[a-z]+)+\b")


async def test_each_app_reads_the_members_that_its_route_returns(
    api: httpx.AsyncClient, bearer: dict[str, str], upstream: respx.MockRouter
) -> None:
    upstream.get("/v1/convai/conversation/token").respond(json={"token": "a.b.c"})
    token_pass, url_pass = [
        (await api.get(path, headers=bearer)).json() for path in ("/v1/conversation-token", "/v1/signed-url")
    ]

    assert list(APPS) == ["ts", "swift", "kotlin", "dart"]
    for code in APPS.values():
        assert "https://voice.example/v1/conversation-token" in code
        assert "Authorization" in code
        assert len(code.splitlines()) <= 20
        assert set(NAME.findall(code)) == {"conversation_token", "livekit_url", "user_id", "dynamic_variables"}
        assert set(NAME.findall(code)) <= token_pass.keys()
    in_text = set(NAME.findall(re.sub(r"```.*?```", "", DOCUMENT, flags=re.DOTALL)))
    codes = {"token_expired", "elevenlabs_agents"}
    assert in_text <= token_pass.keys() | url_pass.keys() | Problem.model_fields.keys() | codes
