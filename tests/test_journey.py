"""The whole journey over real sockets: sign in, get a pass, open the conversation, and be greeted by name."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from tests.servers import running
from voicepass.demo import create_demo


@pytest.fixture
def demo() -> Iterator[httpx.Client]:
    with (
        running(lambda url: create_demo(url, voicepass_log_level="debug")) as base_url,
        httpx.Client(base_url=base_url, trust_env=False) as client,
    ):
        yield client


def sign_in(demo: httpx.Client, name: str = "Ada") -> dict[str, str]:
    token = demo.post("/demo/sign-in", json={"name": name}).json()["token"]
    return {"Authorization": f"Bearer {token}"}


def converse(voice_pass: dict[str, Any]) -> list[dict[str, Any]]:
    """Open the conversation as the SDK does, and return what the agent sends until it has greeted."""
    begin = {
        "type": "conversation_initiation_client_data",
        "conversation_config_override": {"conversation": {"text_only": True}},
        "dynamic_variables": voice_pass["dynamic_variables"],
        "user_id": voice_pass["user_id"],
    }
    received: list[dict[str, Any]] = []
    with connect(voice_pass["signed_url"], subprotocols=[Subprotocol("convai")], proxy=None) as socket:
        socket.send(json.dumps(begin))
        while not received or received[-1]["type"] != "agent_response":
            received.append(json.loads(socket.recv(timeout=10)))
    return received


def test_a_pass_opens_the_conversation_that_it_names(demo: httpx.Client) -> None:
    user = sign_in(demo)
    voice_pass = demo.post("/v1/signed-url", headers=user).json()

    received = converse(voice_pass)

    metadata = received[0]["conversation_initiation_metadata_event"]
    assert metadata["conversation_id"] == voice_pass["conversation_id"]
    assert "Ada" in received[-1]["agent_response_event"]["agent_response"]
    log = demo.get("/_elevenlabs/_emulator/requests").json()
    assert [f"{c['method']} {c['path']} {c['status']}" for c in log["calls"]] == [
        "GET /v1/convai/conversation/get-signed-url 200"
    ]
    assert [conversation["conversation_id"] for conversation in log["conversations"]] == [voice_pass["conversation_id"]]


def test_a_pass_opens_only_one_conversation(demo: httpx.Client) -> None:
    voice_pass = demo.get("/v1/signed-url", headers=sign_in(demo)).json()
    converse(voice_pass)

    with pytest.raises(ConnectionClosedError) as closed:
        converse(voice_pass)

    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (3000, "Could not authorize the conversation.")


@pytest.mark.long
@pytest.mark.anyio
@pytest.mark.alone
async def test_a_hundred_users_at_once_get_a_hundred_conversations(demo: httpx.Client) -> None:
    users = [sign_in(demo, f"user {number}") for number in range(100)]

    async with httpx.AsyncClient(base_url=demo.base_url, trust_env=False, timeout=30) as client:
        answers = await asyncio.gather(*(client.post("/v1/signed-url", headers=user) for user in users))

    passes = [answer.json() for answer in answers]
    assert [answer.status_code for answer in answers] == [200] * 100
    assert len({voice_pass["conversation_id"] for voice_pass in passes}) == 100
    assert [p["dynamic_variables"]["user_name"] for p in passes] == [f"user {number}" for number in range(100)]


def test_the_demo_answers_only_requests_for_its_own_host(demo: httpx.Client) -> None:
    rebound = demo.post("/demo/sign-in", json={"name": "Mallory"}, headers={"Host": "evil.test"})

    assert rebound.status_code == 400


@pytest.mark.parametrize("body", [b"", b"{", b'{"name": ""}', b'{"name": 7}', b'{"name": "Ada", "x": 1}', b"[" * 9000])
def test_signing_in_without_a_name_gets_an_explanation(demo: httpx.Client, body: bytes) -> None:
    response = demo.post("/demo/sign-in", content=body)

    assert response.status_code == 422
    assert "name" in response.json()["detail"]
