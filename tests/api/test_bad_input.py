"""Routes answer bad input with the documented problem, and send nothing to ElevenLabs."""

from typing import Any

import httpx
import pytest
import respx

from tests.conftest import AGENT_ID, MakeToken, serving_app, settings_with
from tests.tables import table
from voicepass.app import create_app

pytestmark = pytest.mark.anyio

PASS_ROUTES = ["/v1/signed-url", "/v1/conversation-token"]
JSON = {"content-type": "application/json"}
CANARY = "canary-9d41"

BAD_REQUESTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "no token": ({}, 401, "token_missing"),
    "another scheme": ({"headers": {"authorization": "Basic dTpw"}}, 401, "token_missing"),
    "no token after the scheme": ({"headers": {"authorization": "Bearer "}}, 401, "token_missing"),
    "a token that is no JWT": ({"headers": {"authorization": f"Bearer {CANARY}"}}, 401, "token_invalid"),
    "brackets nested deep": ({"headers": {"authorization": "Bearer " + "[" * 1500}}, 401, "token_invalid"),
    "bytes beyond ASCII": ({"headers": {"authorization": b"Bearer \xff\xfe.\xc3\xa9.x"}}, 401, "token_invalid"),
    "a token of 9 kB": ({"headers": {"authorization": "Bearer " + "a" * 9000}}, 431, "headers_too_large"),
    "headers of 17 kB": ({"headers": {"x-filler": "a" * 17_000}}, 431, "headers_too_large"),
    "101 headers": ({"headers": {f"x-{n}": "a" for n in range(101)}}, 431, "headers_too_large"),
}

BAD_BODIES: dict[str, tuple[dict[str, Any], int, str]] = {
    "not JSON": ({"content": b"{agent", "headers": JSON}, 422, "request_invalid"),
    "not UTF-8": ({"content": b'{"agent": "\xff"}', "headers": JSON}, 422, "request_invalid"),
    "JSON sent as text": (
        {"content": b'{"agent": "default"}', "headers": {"content-type": "text/plain"}},
        422,
        "request_invalid",
    ),
    "a form": ({"data": {"agent": "default"}}, 422, "request_invalid"),
    "a list": ({"json": ["default"]}, 422, "request_invalid"),
    "an unknown field": ({"json": {"agent": "default", CANARY: CANARY}}, 422, "request_invalid"),
    "a number for the alias": ({"json": {"agent": 7}}, 422, "request_invalid"),
    "an empty alias": ({"json": {"agent": ""}}, 422, "request_invalid"),
    "an alias of 65 characters": ({"json": {"agent": "a" * 65}}, 422, "request_invalid"),
    "brackets nested deep": (
        {"content": b'{"agent":' + b"[" * 5000 + b"]" * 5000 + b"}", "headers": JSON},
        422,
        "request_invalid",
    ),
    "a lone surrogate": ({"content": b'{"agent": "\\ud800"}', "headers": JSON}, 422, "request_invalid"),
    "an unknown alias": ({"json": {"agent": CANARY}}, 403, "agent_not_allowed"),
    "the raw agent id": ({"json": {"agent": AGENT_ID}}, 403, "agent_not_allowed"),
    "17 kB": ({"content": b" " * 17_000, "headers": JSON}, 413, "body_too_large"),
}

BAD_QUERIES: dict[str, tuple[Any, int, str]] = {
    "an unknown alias": ({"agent": CANARY}, 403, "agent_not_allowed"),
    "an alias in capitals": ({"agent": "Default"}, 403, "agent_not_allowed"),
    "a second parameter smuggled in the alias": ({"agent": "default&branch_id=b"}, 403, "agent_not_allowed"),
    "a path in the alias": ({"agent": "../default"}, 403, "agent_not_allowed"),
    "an unknown parameter": ({"agent": "default", "branch_id": CANARY}, 422, "request_invalid"),
    "the agent twice": ([("agent", "default"), ("agent", "default")], 422, "request_invalid"),
    "a raw agent_id": ({"agent_id": AGENT_ID}, 422, "request_invalid"),
    "an empty alias": ({"agent": ""}, 422, "request_invalid"),
}


def assert_problem(response: httpx.Response, status: int, code: str) -> None:
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["cache-control"] == "no-store"
    problem = response.json()
    assert set(problem) - {"retry_after_seconds"} == {"type", "title", "status", "detail", "code", "request_id"}
    assert problem["status"] == status
    assert problem["request_id"] == response.headers["x-request-id"]
    assert CANARY not in response.text, "the answer repeats what the caller sent"
    if status == 401:
        assert response.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize("route", PASS_ROUTES)
@pytest.mark.parametrize("method", ["GET", "POST"])
@table("case", BAD_REQUESTS)
async def test_a_bad_header_is_refused_and_nothing_reaches_elevenlabs(
    api: httpx.AsyncClient, upstream: respx.MockRouter, route: str, method: str, case: str
) -> None:
    request, status, code = BAD_REQUESTS[case]

    response = await api.request(method, route, **request)

    assert_problem(response, status, code)
    assert not upstream.calls


@table("case", BAD_BODIES)
async def test_a_bad_body_is_refused_and_nothing_reaches_elevenlabs(
    api: httpx.AsyncClient, bearer: dict[str, str], upstream: respx.MockRouter, case: str
) -> None:
    request, status, code = BAD_BODIES[case]

    response = await api.post("/v1/signed-url", **(request | {"headers": bearer | request.get("headers", {})}))

    assert_problem(response, status, code)
    assert not upstream.calls


@table("case", BAD_QUERIES)
async def test_a_bad_query_is_refused_and_nothing_reaches_elevenlabs(
    api: httpx.AsyncClient, bearer: dict[str, str], upstream: respx.MockRouter, case: str
) -> None:
    params, status, code = BAD_QUERIES[case]

    response = await api.get("/v1/signed-url", params=params, headers=bearer)

    assert_problem(response, status, code)
    assert not upstream.calls


async def test_two_authorization_headers_are_refused(
    api: httpx.AsyncClient, make_token: MakeToken, upstream: respx.MockRouter
) -> None:
    twice = [("authorization", f"Bearer {make_token()}")] * 2

    response = await api.post("/v1/signed-url", headers=twice)

    assert_problem(response, 401, "token_invalid")
    assert not upstream.calls


async def test_an_expired_token_has_its_own_code_because_the_frontend_can_renew_it(
    api: httpx.AsyncClient, make_token: MakeToken, upstream: respx.MockRouter
) -> None:
    response = await api.post("/v1/signed-url", headers={"Authorization": f"Bearer {make_token(exp=1_700_000_000)}"})

    assert_problem(response, 401, "token_expired")
    assert not upstream.calls


@table("method", ["PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE"])
async def test_another_method_gets_405_with_the_allowed_methods(
    api: httpx.AsyncClient, bearer: dict[str, str], upstream: respx.MockRouter, method: str
) -> None:
    response = await api.request(method, "/v1/signed-url", headers=bearer)

    assert response.status_code == 405
    assert response.headers["allow"] == "GET, POST"
    assert not upstream.calls


@table("path", ["/v1/signed-url/", "//v1/signed-url", "/v1", "/", "/docs", "/openapi.json"])
async def test_an_unknown_path_is_not_found_and_not_redirected(
    api: httpx.AsyncClient, bearer: dict[str, str], upstream: respx.MockRouter, path: str
) -> None:
    response = await api.get(httpx.URL("http://voicepass.test").copy_with(raw_path=path.encode()), headers=bearer)

    assert_problem(response, 404, "not_found")
    assert not upstream.calls


async def test_an_internal_error_is_a_problem_without_details(bearer: dict[str, str]) -> None:
    app = create_app(settings_with())
    async with serving_app(app) as client:
        app.state.passes = None  # so that every pass raises an error
        response = await client.post("/v1/signed-url", headers=bearer)

    assert_problem(response, 500, "internal_error")


@pytest.mark.parametrize("api", [{"voicepass_allowed_origins": "https://app.example"}], indirect=True)
async def test_only_a_listed_origin_may_read_the_answer(api: httpx.AsyncClient, bearer: dict[str, str]) -> None:
    ours = await api.post("/v1/signed-url", headers=bearer | {"Origin": "https://app.example"})
    foreign = await api.post("/v1/signed-url", headers=bearer | {"Origin": "https://app.example.evil.test"})

    assert ours.headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-origin" not in foreign.headers
    assert "access-control-allow-credentials" not in ours.headers


@pytest.mark.parametrize("api", [{"voicepass_allowed_origins": "https://app.example"}], indirect=True)
async def test_a_preflight_is_answered_and_may_be_cached(api: httpx.AsyncClient) -> None:
    asked = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }

    response = await api.options("/v1/signed-url", headers=asked)

    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://app.example"
    assert response.headers["access-control-max-age"] == "600"


async def test_a_caller_who_disconnects_during_the_body_gets_no_pass(
    bearer: dict[str, str], upstream: respx.MockRouter
) -> None:
    app = create_app(settings_with())
    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])
    sent: list[object] = []
    headers = [(b"authorization", bearer["Authorization"].encode()), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/signed-url", "headers": headers, "query_string": b""}

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        sent.append(message)

    async with app.router.lifespan_context(app):
        await app(scope, receive, send)

    assert sent == []
    assert not upstream.calls
