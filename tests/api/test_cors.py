"""Only pages of exactly the listed origins may read an answer, whatever kind of answer it is."""

import httpx
import pytest
import respx
from fastapi import FastAPI
from starlette.datastructures import Headers

from tests.logs import capture_logs
from tests.tables import table
from voicepass.api.cors import Cors
from voicepass.config.environment import SettingsRefusedError
from voicepass.config.settings import load_settings

pytestmark = pytest.mark.anyio

OURS = "https://app.example"
DEVELOPMENT = "http://localhost:5173"
LISTED = {"voicepass_allowed_origins": f"{OURS},{DEVELOPMENT}"}
WITH_COOKIES = LISTED | {"voicepass_session_cookie": "session"}
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}

HOSTILE = [
    *("https://evil.example", "null", "NULL", "", " ", "*", "https://*", "https://*.app.example", "file://"),
    *("http://app.example", "HTTPS://app.example", "https://APP.example", "https://App.Example", "wss://app.example"),
    *("https://app.example.evil.test", "https://evil-app.example", "https://evilapp.example", "https://app.example-x.test"),
    *("https://www.app.example", "https://x.app.example", "https://example", "https://app", "https://pp.example"),
    *("https://app.example:443", "https://app.example:8443", "https://app.example:0", "https://app.example:"),
    *("https://app.example.", "https://app.example/", "https://app.example/path", "https://app.example?", "https://app.example#"),
    *("https://evil@app.example", "https://app.example@evil.test", "https://app.example:x@evil.test"),
    *("https://app.example%2eevil.test", "https://app.example\\@evil.test", "https:/app.example", "//app.example"),
    *("app.example", "https//app.example", "https://app.exampIe", "https://xn--pp-eka.example", "https://арр.example"),
    *("https://app.example https://evil.test", "https://app.example,https://evil.test", "https://app.example\tx"),
    *("https://app.example\r\nx: y", "https://app.example\0", "https://app.example\x0b", " https://app.example"),
    *("http://localhost", "http://localhost:5174", "http://127.0.0.1:5173", "http://[::1]:5173", "http://localhost:05173"),
]  # fmt: skip

ANSWERS: dict[str, tuple[str, str, dict[str, str], int]] = {
    "a pass by POST": ("POST", "/v1/signed-url", {}, 200),
    "a pass by GET": ("GET", "/v1/signed-url", {}, 200),
    "an unknown alias": ("GET", "/v1/signed-url?agent=unknown", {}, 403),
    "a refused token": ("POST", "/v1/signed-url", {"authorization": "Bearer x.y.z"}, 401),
    "a bad query": ("GET", "/v1/signed-url?agent_id=x", {}, 422),
    "a method that is not allowed": ("POST", "/v1/conversations/conv_1", {}, 405),
    "no such path": ("GET", "/nowhere", {}, 404),
    "OPTIONS that is no preflight": ("OPTIONS", "/v1/signed-url", {}, 405),
    "headers too large": ("GET", "/healthz", {"x-filler": "a" * 17_000}, 431),
    "liveness": ("GET", "/healthz", {}, 200),
    "metrics": ("GET", "/metrics", {}, 200),
}


def read_allowed_origin(response: httpx.Response) -> str | None:
    allowed: str | None = response.headers.get("access-control-allow-origin")
    return allowed


def add_origin(origin: str, headers: dict[str, str]) -> httpx.Headers:
    return httpx.Headers(headers | {"origin": origin}, encoding="utf-8")


@pytest.mark.parametrize("api", [WITH_COOKIES, pytest.param(LISTED, marks=pytest.mark.long)], indirect=True)
@pytest.mark.parametrize("answer", ANSWERS)
async def test_no_hostile_origin_may_read_an_answer(
    api: httpx.AsyncClient, bearer: dict[str, str], answer: str
) -> None:
    method, path, headers, status = ANSWERS[answer]

    responses = [await api.request(method, path, headers=add_origin(origin, bearer | headers)) for origin in HOSTILE]

    assert [origin for origin, response in zip(HOSTILE, responses, strict=True) if read_allowed_origin(response)] == []
    assert {response.status_code for response in responses} == {status}
    assert all("origin" in response.headers["vary"].lower() for response in responses)


@pytest.mark.parametrize("api", [{}, LISTED, WITH_COOKIES], indirect=True)
async def test_a_hostile_preflight_is_refused_as_a_problem(api: httpx.AsyncClient, upstream: respx.MockRouter) -> None:
    responses = [await api.options("/v1/signed-url", headers=add_origin(origin, PREFLIGHT)) for origin in HOSTILE]

    assert len(set(HOSTILE)) >= 40
    assert {(r.status_code, r.json()["code"]) for r in responses} == {(403, "origin_not_allowed")}
    assert {r.headers["content-type"] for r in responses} == {"application/problem+json"}
    assert all("origin" in r.headers["vary"].lower() for r in responses)
    assert not any(name.startswith("access-control") for r in responses for name in r.headers)
    assert not upstream.calls


@pytest.mark.parametrize("api", [LISTED], indirect=True)
@pytest.mark.parametrize(
    "asked",
    [
        {"access-control-request-method": "DELETE"},
        {"access-control-request-method": "post"},
        {"access-control-request-private-network": "true"},
    ],
)
async def test_a_listed_origin_may_not_ask_for_more_than_a_pass_needs(
    api: httpx.AsyncClient, asked: dict[str, str]
) -> None:
    response = await api.options("/v1/signed-url", headers=PREFLIGHT | {"origin": OURS} | asked)

    assert (response.status_code, response.json()["code"]) == (403, "origin_not_allowed")
    assert read_allowed_origin(response) is None
    assert "GET and POST" in response.json()["detail"], "the detail differs from that of a refused origin"


MANY = [f"x-{number}" for number in range(25)]


@pytest.mark.parametrize("api", [LISTED], indirect=True)
@table(
    ("asked", "allowed"),
    [
        ("authorization,baggage,sentry-trace", "authorization, baggage, sentry-trace"),
        (
            "x-datadog-trace-id, x-csrf-token , ngrok-skip-browser-warning",
            "x-datadog-trace-id, x-csrf-token, ngrok-skip-browser-warning",
        ),
        ("X-Requested-With", "X-Requested-With"),
        ("a b,<script>,x-a:1,,x-\u00e9,x-good", "x-good"),
        (",".join(MANY), ", ".join(MANY[:20])),
        ("", ""),
        (" , ", ""),
    ],
)
async def test_a_page_of_a_listed_origin_may_send_any_header(api: httpx.AsyncClient, asked: str, allowed: str) -> None:
    headers = httpx.Headers(PREFLIGHT | {"origin": OURS, "access-control-request-headers": asked}, encoding="utf-8")

    response = await api.options("/v1/signed-url", headers=headers)

    assert response.status_code == 200
    assert response.headers.get("access-control-allow-headers", "") == allowed


@pytest.mark.parametrize("api", [LISTED], indirect=True)
async def test_the_log_says_whether_a_preflight_was_refused_for_its_origin_or_for_its_method(
    api: httpx.AsyncClient,
) -> None:
    put = PREFLIGHT | {"access-control-request-method": "PUT"}

    with capture_logs() as logged:
        await api.options("/v1/signed-url", headers=PREFLIGHT | {"origin": "https://evil.example"})
        await api.options("/v1/signed-url", headers=put | {"origin": OURS})

    origin, method = [line["note"] for line in logged if line["event"] == "request.refused"]
    assert "list it in VOICEPASS_ALLOWED_ORIGINS" in origin
    assert "is listed" in method
    assert "'PUT'" in method


async def test_the_log_warns_of_a_refused_preflight_once_an_hour_for_each_of_at_most_a_thousand_origins() -> None:
    now = 0.0
    cors = Cors(FastAPI(), allowed_origins=[OURS], with_cookies=False, ticks=lambda: now)

    def refuse_and_list_warnings(*origins: str) -> list[str]:
        with capture_logs() as logged:
            answers = [cors.preflight_response(Headers(PREFLIGHT | {"origin": origin})) for origin in origins]
        assert {answer.status_code for answer in answers} == {403}
        assert {(line["event"], line["log_level"]) for line in logged} <= {("request.refused", "warning")}
        return [line["note"].split("'")[1] for line in logged]

    first = refuse_and_list_warnings("https://a.example", "https://b.example", "https://a.example")
    now = 3599.0
    same_hour = refuse_and_list_warnings("https://a.example", "https://c.example")
    now = 3600.0
    next_hour = refuse_and_list_warnings("https://a.example", "https://c.example")
    many = refuse_and_list_warnings(*(f"https://{number}.example" for number in range(1_100)))

    assert first == ["https://a.example", "https://b.example"]
    assert same_hour == ["https://c.example"]
    assert next_hour == ["https://a.example"]
    assert len(many) == 998, "the log has warned of a and c already"


@pytest.mark.parametrize("api", [LISTED], indirect=True)
async def test_two_origins_in_one_request_are_refused(api: httpx.AsyncClient, bearer: dict[str, str]) -> None:
    two = [("origin", OURS), ("origin", "https://evil.example")]

    preflight = await api.options("/v1/signed-url", headers=[*PREFLIGHT.items(), *two])
    answers = [
        await api.request(method, path, headers=[*bearer.items(), *pair])
        for method, path in (("POST", "/v1/signed-url"), ("GET", "/v1/usage"))
        for pair in (two, [*reversed(two)], [two[0], two[0]])
    ]

    assert (preflight.status_code, preflight.json()["code"]) == (403, "origin_not_allowed")
    assert {(answer.status_code, answer.json()["code"]) for answer in answers} == {(400, "request_malformed")}


@pytest.mark.parametrize("api", [LISTED, WITH_COOKIES], indirect=True)
@pytest.mark.parametrize("origin", [OURS, DEVELOPMENT])
async def test_a_listed_origin_may_read_passes_and_the_refusals_of_routes(
    api: httpx.AsyncClient, bearer: dict[str, str], origin: str
) -> None:
    headers = {"origin": origin}

    asked = {"access-control-request-headers": "authorization,content-type,traceparent,tracestate,x-request-id"}
    preflight = await api.options("/v1/signed-url", headers=PREFLIGHT | headers | asked)
    granted = await api.post("/v1/signed-url", headers=bearer | headers)
    refused = await api.post("/v1/signed-url", headers=headers)

    assert [r.status_code for r in (preflight, granted, refused)] == [200, 200, 401]
    assert [read_allowed_origin(r) for r in (preflight, granted, refused)] == [origin] * 3
    assert all("origin" in r.headers["vary"].lower() for r in (preflight, granted, refused))
    assert preflight.headers["access-control-allow-methods"] == "GET, POST"
    assert granted.headers["access-control-expose-headers"] == "X-Request-ID, Retry-After, RateLimit, RateLimit-Policy"


@pytest.mark.parametrize(("api", "credentials"), [(LISTED, None), (WITH_COOKIES, "true")], indirect=["api"])
async def test_a_browser_may_send_cookies_only_if_a_cookie_is_configured(
    api: httpx.AsyncClient, bearer: dict[str, str], credentials: str | None
) -> None:
    preflight = await api.options("/v1/signed-url", headers=PREFLIGHT | {"origin": OURS})
    answer = await api.post("/v1/signed-url", headers=bearer | {"origin": OURS})

    assert preflight.headers.get("access-control-allow-credentials") == credentials
    assert answer.headers.get("access-control-allow-credentials") == credentials


@table("answer", ANSWERS)
async def test_every_answer_varies_with_the_origin_so_that_no_cache_gives_it_to_another_origin(
    api: httpx.AsyncClient, bearer: dict[str, str], answer: str
) -> None:
    method, path, headers, status = ANSWERS[answer]

    response = await api.request(method, path, headers=bearer | headers)

    assert response.status_code == status
    assert "origin" in response.headers["vary"].lower()


@table(
    "origins",
    [
        *("*", "null", f"{OURS},*", f"null,{OURS}", "app.example", f"{OURS}/", f"{OURS}/path", f"{OURS}?x"),
        *("HTTPS://APP.EXAMPLE", "https://App.example", "https://", "file://", "ftp://app.example", "//app.example"),
    ],
)  # fmt: skip
def test_the_service_does_not_start_with_an_inexact_origin(monkeypatch: pytest.MonkeyPatch, origins: str) -> None:
    monkeypatch.setenv("VOICEPASS_ALLOWED_ORIGINS", origins)

    with pytest.raises(SettingsRefusedError) as refused:
        load_settings()

    (problem,) = refused.value.problems
    assert problem.startswith("VOICEPASS_ALLOWED_ORIGINS must list exact origins")
