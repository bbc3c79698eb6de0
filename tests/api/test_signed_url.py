"""The pass over HTTP: what a frontend sends, what it gets, and what voicepass sends to ElevenLabs."""

import base64
import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
import respx

from tests.canaries import API_KEY
from tests.conftest import AGENT_ID, MakeToken, serving, signed_url

pytestmark = pytest.mark.anyio

PASS_FIELDS = ["signed_url", "conversation_id", "agent", "agent_id", "expires_at", "user_id", "dynamic_variables"]


def make_livekit_token(claims: dict[str, object]) -> str:
    header, payload = ({"alg": "HS256"}, claims)
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in (header, payload)]
    return ".".join([*parts, "c2ln"])


@pytest.mark.parametrize(
    ("method", "extra"),
    [
        ("POST", {}),
        ("POST", {"json": {"agent": "default"}}),
        ("POST", {"json": {}}),
        ("POST", {"content": b"null", "headers": {"content-type": "application/json"}}),
        ("GET", {}),
        ("GET", {"params": {"agent": "default"}}),
    ],
)
async def test_a_signed_in_user_gets_a_pass(
    api: httpx.AsyncClient, bearer: dict[str, str], method: str, extra: dict[str, Any]
) -> None:
    before = datetime.now(UTC).replace(microsecond=0)

    response = await api.request(method, "/v1/signed-url", **(extra | {"headers": bearer | extra.get("headers", {})}))

    assert response.status_code == 200
    voice_pass = response.json()
    assert list(voice_pass) == PASS_FIELDS
    expires_at = datetime.fromisoformat(voice_pass.pop("expires_at"))
    assert before + timedelta(minutes=15) <= expires_at <= before + timedelta(minutes=15, seconds=5)
    assert voice_pass == {
        "signed_url": signed_url(),
        "conversation_id": "conv_1",
        "agent": "default",
        "agent_id": AGENT_ID,
        "user_id": "u-1",
        "dynamic_variables": {"user_id": "u-1", "user_name": "Ada"},
    }


async def test_an_instant_is_written_as_the_contract_shows_it(api: httpx.AsyncClient, bearer: dict[str, str]) -> None:
    response = await api.post("/v1/signed-url", headers=bearer)

    assert datetime.strptime(response.json()["expires_at"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)


async def test_elevenlabs_is_asked_once_with_the_key_for_one_single_use_url(
    api: httpx.AsyncClient, bearer: dict[str, str], upstream: respx.MockRouter
) -> None:
    await api.post("/v1/signed-url", headers=bearer)

    (call,) = upstream.calls
    assert call.request.headers["xi-api-key"] == API_KEY
    assert dict(call.request.url.params) == {"agent_id": AGENT_ID, "include_conversation_id": "true"}
    assert "authorization" not in call.request.headers


async def test_the_answer_cannot_be_cached_and_names_its_request(
    api: httpx.AsyncClient, bearer: dict[str, str]
) -> None:
    mine = await api.post("/v1/signed-url", headers=bearer)

    assert re.fullmatch("[0-9a-f]{32}", mine.headers["x-request-id"])
    assert mine.headers["cache-control"] == "no-store"
    assert mine.headers["x-content-type-options"] == "nosniff"
    assert mine.headers["cross-origin-resource-policy"] == "same-site"
    assert mine.headers["referrer-policy"] == "no-referrer"
    assert "set-cookie" not in mine.headers


async def test_two_passes_are_two_conversations(
    api: httpx.AsyncClient, bearer: dict[str, str], upstream: respx.MockRouter
) -> None:
    upstream["signed_url"].side_effect = [
        httpx.Response(200, json={"signed_url": signed_url(conversation_id=f"conv_{n}")}) for n in (1, 2)
    ]

    passes = [(await api.post("/v1/signed-url", headers=bearer)).json() for _ in range(2)]

    assert [p["conversation_id"] for p in passes] == ["conv_1", "conv_2"]


async def test_a_conversation_issued_to_one_user_is_never_issued_to_another(
    api: httpx.AsyncClient, make_token: MakeToken
) -> None:
    first = await api.post("/v1/signed-url", headers={"Authorization": f"Bearer {make_token(sub='u-1')}"})
    other = await api.post("/v1/signed-url", headers={"Authorization": f"Bearer {make_token(sub='u-2')}"})

    assert first.status_code == 200
    assert (other.status_code, other.json()["code"]) == (502, "elevenlabs_bad_answer")


async def test_a_user_without_a_name_gets_the_id_as_name(api: httpx.AsyncClient, make_token: MakeToken) -> None:
    response = await api.post("/v1/signed-url", headers={"Authorization": f"Bearer {make_token(name=None)}"})

    assert response.json()["dynamic_variables"] == {"user_id": "u-1", "user_name": "u-1"}


@pytest.mark.parametrize(
    "api",
    [
        {
            "voicepass_user_id_claim": "https://app.example/id",
            "voicepass_user_name_claim": "profile.nick",
            "voicepass_variables": "plan=plan,shop=app_metadata.shop,trial=trial,age=age,roles=roles,nothing=nothing",
        }
    ],
    indirect=True,
)
async def test_the_configuration_says_which_claims_become_variables(
    api: httpx.AsyncClient, make_token: MakeToken
) -> None:
    claims = {
        "https://app.example/id": 4711,
        "profile": {"nick": "Ada\u202e{{system__time}}\x07"},
        "plan": "pro",
        "app_metadata": {"shop": "eggs"},
        "trial": False,
        "age": 36.5,
        "roles": ["admin"],
    }

    response = await api.post("/v1/signed-url", headers={"Authorization": f"Bearer {make_token(**claims)}"})

    assert response.json()["user_id"] == "4711"
    assert response.json()["dynamic_variables"] == {
        "user_id": "4711",
        "user_name": "Ada{ {system__time} }",
        "plan": "pro",
        "shop": "eggs",
        "trial": False,
        "age": 36.5,
    }


async def test_without_a_conversation_id_the_pass_is_given_and_counted(
    api: httpx.AsyncClient, bearer: dict[str, str], upstream: respx.MockRouter, capsys: pytest.CaptureFixture[str]
) -> None:
    url = signed_url().partition("&conversation_id")[0]
    upstream["signed_url"].respond(json={"signed_url": url})

    response = await api.post("/v1/signed-url", headers=bearer)
    metrics = (await api.get("/metrics")).text

    assert response.status_code == 200
    assert response.json()["conversation_id"] is None
    assert "conversation_id.missing" in capsys.readouterr().err
    assert 'voicepass_conversation_id_missing_total{transport="websocket"} 1.0' in metrics
    assert 'voicepass_attempts_total{agent="default",outcome="granted",transport="websocket"} 1.0' in metrics


async def test_a_webrtc_pass_holds_the_token_and_its_conversation(
    api: httpx.AsyncClient, bearer: dict[str, str], upstream: respx.MockRouter
) -> None:
    token = make_livekit_token({"exp": 1795500000, "video": {"room": "room_agent_7x_conv_9z"}})
    route = upstream.get("/v1/convai/conversation/token").respond(json={"token": token})

    answers = [
        await api.post("/v1/conversation-token", headers=bearer, json={"agent": "default"}),
        await api.get("/v1/conversation-token", headers=bearer),
    ]

    assert [list(answer.json()) for answer in answers] == [["conversation_token", "livekit_url", *PASS_FIELDS[1:]]] * 2
    assert answers[0].json()["conversation_token"] == token
    assert answers[0].json()["conversation_id"] == "conv_9z"
    assert answers[0].json()["expires_at"] == "2026-11-24T06:00:00Z"
    assert dict(route.calls[0].request.url.params) == {"agent_id": AGENT_ID}


LIVEKIT_URLS = {
    "https://api.elevenlabs.io": "wss://livekit.rtc.elevenlabs.io",
    "https://api.eu.residency.elevenlabs.io/": "wss://livekit.rtc.eu.residency.elevenlabs.io",
    "https://api.in.residency.elevenlabs.io": "wss://livekit.rtc.in.residency.elevenlabs.io",
    "https://api.us.elevenlabs.io": None,
    "https://api.sg.residency.elevenlabs.io": None,
    "http://127.0.0.1:9000": None,
}


@pytest.mark.parametrize("warm_passes", [0, 2])
async def test_a_webrtc_pass_names_the_livekit_host_of_the_agents_region_if_one_is_known(
    make_token: MakeToken, warm_passes: int
) -> None:
    bearer = {"authorization": f"Bearer {make_token()}"}
    found = {}
    for base_url in LIVEKIT_URLS:
        with respx.mock(using="voicepass") as router:
            router.get(path="/v1/convai/conversation/token").respond(json={"token": "a.b.c"})
            async with serving(elevenlabs_base_url=base_url, voicepass_warm_passes=warm_passes) as api:
                found[base_url] = (await api.post("/v1/conversation-token", headers=bearer)).json()["livekit_url"]

    assert found == LIVEKIT_URLS


@pytest.mark.parametrize("token", ["opaque", "a.b.c", "..", "x.!!!.y"])
async def test_a_token_without_conversation_id_and_expiry_is_still_returned(
    api: httpx.AsyncClient, bearer: dict[str, str], upstream: respx.MockRouter, token: str
) -> None:
    upstream.get("/v1/convai/conversation/token").respond(json={"token": token})

    response = await api.post("/v1/conversation-token", headers=bearer)

    assert response.status_code == 200
    assert (response.json()["conversation_id"], response.json()["expires_at"]) == (None, None)


async def test_the_conversation_id_of_the_answer_is_preferred_to_the_room_of_the_token(
    api: httpx.AsyncClient, bearer: dict[str, str], upstream: respx.MockRouter
) -> None:
    token = make_livekit_token({"video": {"room": "conv_room"}})
    upstream.get("/v1/convai/conversation/token").respond(json={"token": token, "conversation_id": "conv_field"})

    response = await api.post("/v1/conversation-token", headers=bearer)

    assert response.json()["conversation_id"] == "conv_field"
