"""Limits over HTTP: which passes are refused, what the refusal says, and which usage a user sees."""

import asyncio
import random
import time
from datetime import UTC, datetime
from itertools import count
from typing import Any, cast

import httpx
import pytest
import respx

from tests.conftest import UNLIMITED, MakeToken, policy_file, serving, signed_url
from tests.tables import table

pytestmark = pytest.mark.anyio

SERVICE_TOKEN = "canary-service-token-of-the-limits-33aa77"
AS_SERVICE = {"Authorization": f"Bearer {SERVICE_TOKEN}"}


def with_limits(**limits: object) -> pytest.MarkDecorator:
    """Give the `api` fixture these limits of a user, and no others."""
    lines = [line for line in UNLIMITED.splitlines() if line.partition(" ")[0] not in limits]
    text = "\n".join([*lines, *(f"{name} = {value}" for name, value in limits.items())])
    settings = {"voicepass_policy_file": policy_file(text), "voicepass_service_tokens": SERVICE_TOKEN}
    return pytest.mark.parametrize("api", [settings], indirect=True)


@pytest.fixture(autouse=True)
def fresh_conversations(upstream: respx.MockRouter) -> None:
    """Each pass is for another conversation; ElevenLabs says that each is open."""
    upstream.get(path__regex=r"/v1/convai/conversations/conv_\d+", name="account").respond(
        json={"status": "in-progress", "metadata": {"start_time_unix_secs": 1, "call_duration_secs": 0}}
    )
    numbers = count(1)
    upstream["signed_url"].side_effect = lambda _request: httpx.Response(
        200, json={"signed_url": signed_url(conversation_id=f"conv_{next(numbers)}")}
    )


def assert_limited(response: httpx.Response, code: str) -> None:
    problem = response.json()
    assert (response.status_code, problem["code"]) == (429, code)
    assert response.headers["retry-after"] == str(problem["retry_after_seconds"])
    assert response.headers["ratelimit"].endswith(f";r=0;t={problem['retry_after_seconds']}")
    assert response.headers["ratelimit-policy"].startswith('"user_')
    resets_in = datetime.fromisoformat(problem["resets_at"]) - datetime.now(UTC)
    assert abs(resets_in.total_seconds() - problem["retry_after_seconds"]) < 3


@with_limits(passes_per_minute=3)
async def test_one_pass_too_many_in_a_minute_is_refused_and_costs_nothing(
    api: httpx.AsyncClient, bearer: dict[str, str], upstream: respx.MockRouter
) -> None:
    answers = [await api.post("/v1/signed-url", headers=bearer) for _ in range(4)]

    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert_limited(answers[3], "rate_limited")
    assert 55 <= answers[3].json()["retry_after_seconds"] <= 61
    assert len(upstream.calls) == 3


@pytest.mark.parametrize("step", [-3600.0, 3600.0])
async def test_a_step_of_the_machines_clock_changes_no_limit(
    upstream: respx.MockRouter, make_token: MakeToken, monkeypatch: pytest.MonkeyPatch, step: float
) -> None:
    stepped, real = [0.0], time.time
    monkeypatch.setattr(time, "time", lambda: real() + stepped[0])  # as every module reads it
    text = UNLIMITED.replace('passes_per_minute = "off"', "passes_per_minute = 1")
    async with serving(voicepass_policy_file=policy_file(text)) as client:

        async def ask() -> httpx.Response:
            return await client.post("/v1/signed-url", headers={"Authorization": f"Bearer {make_token()}"})

        first = await ask()
        stepped[0] = step
        second = await ask()

    assert (first.status_code, second.status_code) == (200, 429)
    assert 55 <= second.json()["retry_after_seconds"] <= 61
    assert len(upstream.calls) == 1


@with_limits(open_conversations=2)
async def test_a_pass_beyond_the_limit_of_open_conversations_is_refused(
    api: httpx.AsyncClient, bearer: dict[str, str], make_token: MakeToken
) -> None:
    mine = [await api.post("/v1/signed-url", headers=bearer) for _ in range(3)]
    others = await api.post("/v1/signed-url", headers={"Authorization": f"Bearer {make_token(sub='u-2')}"})

    assert [answer.status_code for answer in mine] == [200, 200, 429]
    assert_limited(mine[2], "too_many_conversations")
    assert mine[2].headers["retry-after"] == "3"  # short, because the user can end a conversation at any time
    assert others.status_code == 200


@with_limits(open_conversations=2)
async def test_an_unopened_pass_is_returned_again_and_counts_once(
    api: httpx.AsyncClient, bearer: dict[str, str], make_token: MakeToken, upstream: respx.MockRouter
) -> None:
    upstream["account"].respond(404, json={"detail": {"status": "conversation_history_not_found", "message": "m"}})

    mine = [await api.post("/v1/signed-url", headers=bearer) for _ in range(5)]
    flood = await asyncio.gather(*(api.post("/v1/signed-url", headers=bearer) for _ in range(40)))
    others = await api.post("/v1/signed-url", headers={"Authorization": f"Bearer {make_token(sub='u-2')}"})

    assert {answer.status_code for answer in [*mine, *flood]} == {200}
    urls = {answer.json()["signed_url"] for answer in [*mine, *flood]}
    assert urls == {answer.json()["signed_url"] for answer in mine[:2]}
    assert len(urls) == upstream["signed_url"].call_count - 1 == 2
    again, newest = mine[-1].json(), mine[1].json()
    assert again == newest
    assert others.json()["signed_url"] not in urls


@with_limits(minutes_per_day=25)
async def test_passes_reserve_minutes_and_never_more_than_the_limit(
    api: httpx.AsyncClient, bearer: dict[str, str]
) -> None:
    answers = [await api.post("/v1/signed-url", headers=bearer) for _ in range(4)]
    usage = (await api.get("/v1/usage", headers=bearer)).json()

    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert_limited(answers[3], "quota_exceeded")
    (minutes,) = usage["limits"]
    assert (minutes["limit"], minutes["unit"]) == ("user_minutes_per_day", "seconds")
    assert (minutes["most"], minutes["used"], minutes["left"]) == (1500, 1500, 0)


@with_limits(passes_per_minute=20)
@pytest.mark.parametrize("callers", [60, pytest.param(300, marks=pytest.mark.long)])
@pytest.mark.alone
async def test_of_many_requests_at_once_exactly_twenty_get_a_pass(
    api: httpx.AsyncClient, bearer: dict[str, str], upstream: respx.MockRouter, callers: int
) -> None:
    answers = await asyncio.gather(*(api.post("/v1/signed-url", headers=bearer) for _ in range(callers)))

    granted = [answer for answer in answers if answer.status_code == 200]
    assert len(granted) == len(upstream.calls) == 20
    assert {answer.json()["code"] for answer in answers if answer.status_code != 200} == {"rate_limited"}


@with_limits(passes_per_day=2, open_conversations=2, minutes_per_day=20)
async def test_a_failed_mint_returns_its_reservation(
    api: httpx.AsyncClient, bearer: dict[str, str], upstream: respx.MockRouter
) -> None:
    good = upstream["signed_url"].side_effect
    upstream["signed_url"].side_effect = httpx.ConnectError

    failed = [await api.post("/v1/signed-url", headers=bearer) for _ in range(4)]
    upstream["signed_url"].side_effect = good
    answers = [await api.post("/v1/signed-url", headers=bearer) for _ in range(3)]

    assert [answer.status_code for answer in failed] == [503] * 4
    assert [answer.status_code for answer in answers] == [200, 200, 429]


REFUSED: dict[str, Any] = {
    "the key": httpx.Response(401, json={"detail": {"status": "invalid_api_key", "message": "m"}}),
    "the agent": httpx.Response(404, json={"detail": {"status": "document_not_found", "message": "m"}}),
    "the request": httpx.Response(422, json={"detail": []}),
    "busy": httpx.Response(429, json={"detail": {"status": "concurrent_limit_exceeded", "message": "m"}}),
    "no JSON": httpx.Response(200, text="<html>"),
    "a timeout": httpx.ReadTimeout("m"),
}


@pytest.mark.parametrize("refused", REFUSED)
@with_limits(passes_per_minute=4)
async def test_every_request_that_reached_elevenlabs_counts_for_a_minute(
    api: httpx.AsyncClient, bearer: dict[str, str], make_token: MakeToken, upstream: respx.MockRouter, refused: str
) -> None:
    upstream["signed_url"].side_effect = lambda _request: _raise_or_return(REFUSED[refused])

    answers = await asyncio.gather(*(api.post("/v1/signed-url", headers=bearer) for _ in range(50)))
    other = await api.post("/v1/signed-url", headers={"Authorization": f"Bearer {make_token(sub='u-2')}"})
    usage = (await api.get("/v1/usage", headers=bearer)).json()["limits"]

    codes = [answer.json()["code"] for answer in answers]
    assert upstream["signed_url"].call_count <= 5  # four of the first user, one of the second
    assert codes.count("rate_limited") >= 46 or refused == "the key"  # voicepass pauses all requests after a bad key
    assert other.json()["code"] != "rate_limited"
    assert usage[0]["used"] <= 4


def _raise_or_return(refused: httpx.Response | Exception) -> httpx.Response:
    if isinstance(refused, Exception):
        raise refused
    return refused


FAULTS: list[Any] = [
    httpx.ConnectError,
    httpx.ReadTimeout,
    httpx.RemoteProtocolError,
    httpx.Response(500),
    httpx.Response(429, json={"detail": {"status": "system_busy", "message": "m"}}),
    httpx.Response(404, json={"detail": {"status": "document_not_found", "message": "m"}}),
    httpx.Response(200, text="<html>"),
    httpx.Response(200, json={"signed_url": "wss://evil.test/?a=b"}),
]


@pytest.mark.long
@with_limits(passes_per_day=100_000, minutes_per_day=1_000_000)
async def test_after_1000_mints_during_random_faults_the_ledger_counts_exactly_the_granted_passes(
    api: httpx.AsyncClient, bearer: dict[str, str], upstream: respx.MockRouter
) -> None:
    dice = random.Random(3)  # noqa: S311 - the same faults every time
    good: Any = upstream["signed_url"].side_effect

    def answer(request: httpx.Request) -> httpx.Response:
        fault = dice.choice(FAULTS) if dice.random() < 0.5 else None
        if isinstance(fault, type):
            raise fault("a fault")
        return fault or cast("httpx.Response", good(request))

    upstream["signed_url"].side_effect = answer
    answers = []
    for _ in range(20):
        answers += await asyncio.gather(*(api.post("/v1/signed-url", headers=bearer) for _ in range(50)))
    usage = {limit["limit"]: limit["used"] for limit in (await api.get("/v1/usage", headers=bearer)).json()["limits"]}

    granted = sum(response.status_code == 200 for response in answers)
    assert 400 < granted < 600
    assert {response.status_code for response in answers} == {200, 502, 503, 504}
    assert usage == {"user_passes_per_day": granted, "user_minutes_per_day": granted * 600}


@with_limits(passes_per_minute=5, passes_per_day=9, open_conversations=4, minutes_per_day=60, minutes_per_month=90)
async def test_users_see_their_own_usage_only(
    api: httpx.AsyncClient, bearer: dict[str, str], make_token: MakeToken
) -> None:
    for _ in range(2):
        await api.post("/v1/signed-url", headers=bearer)

    mine = (await api.get("/v1/usage", headers=bearer)).json()
    others = (await api.get("/v1/usage", headers={"Authorization": f"Bearer {make_token(sub='u-2')}"})).json()
    stranger = await api.get("/v1/usage")

    assert mine["user_id"] == "u-1"
    assert {limit["limit"]: (limit["used"], limit["left"]) for limit in mine["limits"]} == {
        "user_passes_per_minute": (2, 3),
        "user_passes_per_day": (2, 7),
        "user_open_conversations": (2, 2),
        "user_minutes_per_day": (1200, 2400),
        "user_minutes_per_month": (1200, 4200),
    }
    assert all(limit["resets_at"] for limit in mine["limits"])
    assert {limit["used"] for limit in others["limits"]} == {0}
    assert {limit["resets_at"] for limit in others["limits"]} == {None}
    assert stranger.status_code == 401


@pytest.mark.parametrize("api", [{"voicepass_policy_file": None}], indirect=True)
async def test_without_a_policy_file_the_default_limits_apply(api: httpx.AsyncClient, bearer: dict[str, str]) -> None:
    usage = (await api.get("/v1/usage", headers=bearer)).json()

    assert {limit["limit"]: limit["most"] for limit in usage["limits"]} == {
        "user_passes_per_minute": 10,
        "user_passes_per_day": 200,
        "user_open_conversations": 3,
        "user_minutes_per_day": 3600,
        "user_minutes_per_month": 36_000,
    }


@pytest.mark.parametrize("scope", ["agent", "all"])
async def test_a_limit_for_an_agent_or_for_all_counts_every_user_together(
    scope: str, upstream: respx.MockRouter, make_token: MakeToken
) -> None:
    text = f"{UNLIMITED}\n[limits.{scope}]\npasses_per_minute = 3\n"
    async with serving(voicepass_policy_file=policy_file(text)) as client:
        users = [{"Authorization": f"Bearer {make_token(sub=f'u-{number}')}"} for number in range(4)]
        answers = [await client.post("/v1/signed-url", headers=user) for user in users]

    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert answers[3].json()["code"] == "rate_limited"
    assert answers[3].headers["ratelimit-policy"] == f'"{scope}_passes_per_minute";q=3;w=60'
    assert len(upstream.calls) == 3


BLOCKS = [
    {"kind": "user", "key": "u-1"},
    {"kind": "user", "key": "u-1", "token_issuer": "https://login.example"},
    {"kind": "agent", "key": "default"},
    {"kind": "everyone"},
]


@with_limits()
@pytest.mark.parametrize("block", BLOCKS)
async def test_a_block_refuses_passes_until_it_is_removed(
    api: httpx.AsyncClient, bearer: dict[str, str], upstream: respx.MockRouter, block: dict[str, str]
) -> None:
    off = await api.post("/v1/blocks", json=block, headers=AS_SERVICE)
    blocked = await api.post("/v1/signed-url", headers=bearer)
    on = await api.request("DELETE", "/v1/blocks", json=block, headers=AS_SERVICE)
    granted = await api.post("/v1/signed-url", headers=bearer)

    assert (off.status_code, on.status_code) == (204, 204)
    assert (blocked.status_code, blocked.json()["code"]) == (403, "user_blocked")
    assert granted.status_code == 200
    assert len(upstream.calls) == 1


@with_limits()
@pytest.mark.parametrize(
    "block",
    [
        {"kind": "user", "key": "u-2"},
        {"kind": "user", "key": "u-1", "token_issuer": "https://x"},
        {"kind": "agent", "key": "x"},
    ],
)
async def test_a_block_of_another_user_or_agent_does_not_refuse_this_user(
    api: httpx.AsyncClient, bearer: dict[str, str], block: dict[str, str]
) -> None:
    await api.post("/v1/blocks", json=block, headers=AS_SERVICE)

    response = await api.post("/v1/signed-url", headers=bearer)

    assert response.status_code == 200


@with_limits()
@table(
    "block",
    [
        {},
        {"kind": "user"},
        {"kind": "agent", "key": ""},
        {"kind": "everyone", "key": "u-1"},
        {"kind": "agent", "key": "default", "token_issuer": "https://x"},
        {"kind": "planet", "key": "x"},
        {"kind": "user", "key": "u-1", "for": "ever"},
    ],
)
async def test_an_invalid_block_is_refused(api: httpx.AsyncClient, block: dict[str, str]) -> None:
    response = await api.post("/v1/blocks", json=block, headers=AS_SERVICE)

    assert (response.status_code, response.json()["code"]) == (422, "request_invalid")
    assert "'agent'" not in response.json()["detail"], "this detail is for requests of a pass"


@with_limits()
async def test_a_users_token_cannot_block_anyone(api: httpx.AsyncClient, bearer: dict[str, str]) -> None:
    response = await api.post("/v1/blocks", json={"kind": "everyone"}, headers=bearer)

    assert (response.status_code, response.json()["code"]) == (401, "token_invalid")


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({"minutes_per_day": 15, "minutes_per_month": 600}, [900, 300]),
        ({"minutes_per_day": 60, "minutes_per_month": 20}, [1200, 600]),
        ({"passes_per_day": 9}, [600, 600]),  # no limit counts minutes: the maximum of one conversation
    ],
)
async def test_a_pass_and_the_agents_tool_get_the_remaining_seconds_of_the_user(
    bearer: dict[str, str], limits: dict[str, int], left: list[int]
) -> None:
    lines = [line for line in UNLIMITED.splitlines() if line.partition(" ")[0] not in limits]
    policy = policy_file("\n".join([*lines, *(f"{name} = {most}" for name, most in limits.items())]))
    settings = {"voicepass_policy_file": policy, "voicepass_service_tokens": SERVICE_TOKEN}

    async with serving(**settings, voicepass_tell_seconds_left=True) as api:
        passes = [(await api.post("/v1/signed-url", headers=bearer)).json() for _ in range(2)]
        tool = [await api.get(f"/v1/conversations/{each['conversation_id']}", headers=AS_SERVICE) for each in passes]
    async with serving(**settings) as api:
        without = (await api.post("/v1/signed-url", headers=bearer)).json()

    assert [each["dynamic_variables"]["seconds_left"] for each in passes] == left
    seconds_left = [answer.json()["seconds_left"] for answer in tool]
    if "passes_per_day" in limits:
        assert seconds_left == [None, None]
    else:
        reserved_by_the_other = min(600, left[1])
        expected = [left[0] - reserved_by_the_other, left[1]]
        assert all(0 <= more - real <= 5 for more, real in zip(expected, seconds_left, strict=True))
    assert "seconds_left" not in without["dynamic_variables"]
