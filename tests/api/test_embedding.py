"""voicepass mounted in another FastAPI app, used as the developers of that app use it."""

import asyncio
import contextvars
import gc
import json
import logging
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx
import pytest
import respx
from fastapi import APIRouter, BackgroundTasks, Body, Depends, FastAPI, HTTPException, Request, Response
from fastapi.security import HTTPBearer
from pydantic import ValidationError

import voicepass
from tests.conftest import SIGNED_URL_PATH, ServiceClient, serving_app, settings_with, signed_url
from voicepass.config.environment import SettingsRefusedError

pytestmark = pytest.mark.anyio

WITHOUT_TOKENS: dict[str, Any] = {
    "voicepass_jwt_secret": None,
    "voicepass_jwt_issuer": None,
    "voicepass_jwt_audience": None,
}
PAGE = {"Cookie": "session=1", "Origin": "http://voicepass.test"}
FOREIGN_PREFLIGHT = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
PASS = "/voice/v1/signed-url"
USAGE = "/voice/v1/usage"


async def signed_in_user() -> voicepass.User | None:
    return voicepass.User(id="u-1", name="Ada", claims={"plan": "pro"})


def build_app(user: Callable[..., Any] = signed_in_user, path: str = "/voice", **settings: object) -> FastAPI:
    app = FastAPI()
    voicepass.mount(app, path, user=user, settings=settings_with(**WITHOUT_TOKENS, **settings))
    return app


@pytest.fixture
async def shop(upstream: respx.MockRouter) -> AsyncIterator[ServiceClient]:
    del upstream
    async with serving_app(build_app()) as client:
        yield client


def read_code(response: httpx.Response) -> str:
    return str(response.json()["code"])


async def test_the_user_of_the_apps_dependency_gets_a_pass_without_any_token_setting(shop: ServiceClient) -> None:
    answer = await shop.post(PASS)

    assert answer.json()["dynamic_variables"] == {"user_id": "u-1", "user_name": "Ada"}
    assert answer.headers["cache-control"] == "no-store"
    assert (await shop.get(USAGE)).json()["user_id"] == "u-1"
    assert (await shop.get("/voice/readyz")).json()["checks"] == {"settings": "ok", "ledger": "ok", "elevenlabs": "ok"}
    assert (await shop.get("/voice/v1/client.js")).status_code == 200


async def test_without_a_dependency_voicepass_verifies_tokens_as_the_service_does(
    upstream: respx.MockRouter, bearer: dict[str, str]
) -> None:
    del upstream
    app = FastAPI()
    voicepass.mount(app, "/voice", settings=settings_with())

    async with serving_app(app) as client:
        answers = [await client.post(PASS, headers=headers) for headers in (bearer, {})]

    assert [answer.status_code for answer in answers] == [200, 401]


@pytest.mark.parametrize("path", ["voice", "/voice/", "/api/voice"])
async def test_a_path_works_with_and_without_slashes(path: str, upstream: respx.MockRouter) -> None:
    del upstream
    async with serving_app(build_app(path=path)) as client:
        answer = await client.post(f"/{path.strip('/')}/v1/signed-url")

    assert answer.status_code == 200


@pytest.mark.parametrize("path", ["/", "", "//", "/{tenant}/voice"])
def test_a_mount_at_the_root_or_at_a_parameter_is_refused_with_an_example(path: str) -> None:
    with pytest.raises(ValueError, match="such as '/voice'"):
        build_app(path=path)


@pytest.mark.parametrize("sent", ["/voice", "/shop/voice"], ids=["prefix-removed", "prefix-kept"])
async def test_a_mount_works_below_the_root_path_of_the_server(sent: str, upstream: respx.MockRouter) -> None:
    del upstream
    app = build_app(voicepass_docs=True)
    below = httpx.ASGITransport(app, root_path="/shop")

    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=below, base_url="http://x.test") as client:
        answers = [await client.post(f"{sent}/v1/signed-url"), await client.get(f"{sent}/healthz")]
        docs = await client.get(f"{sent}/docs")

    assert [answer.status_code for answer in answers] == [200, 200]
    assert "/shop/voice/openapi.json" in docs.text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (PAGE, 200),
        ({"Cookie": "session=1", "Sec-Fetch-Site": "same-origin"}, 200),
        # A proxy ends TLS here.
        ({"Cookie": "s=1", "Origin": "https://voicepass.test", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Cookie": "session=1", "Origin": "https://app.example"}, 200),
        ({"Authorization": "Bearer of-the-app"}, 200),
        ({}, 200),
        ({"Cookie": "session=1"}, 403),
        ({"Cookie": "session=1", "Origin": "https://evil.example"}, 403),
        ({"Cookie": "session=1", "Origin": "https://evil.example", "Sec-Fetch-Site": "same-origin"}, 403),
        ({"Cookie": "session=1", "Origin": "null"}, 403),
        ({"Cookie": "session=1", "Origin": "http://voicepass.test.evil.example"}, 403),
        ({"Cookie": "session=1", "Origin": "https://voicepass.test"}, 403),
        ({"Cookie": "session=1", "Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Authorization": "Basic b2Y6dGhl", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Authorization": "Basic b2Y6dGhl", "Sec-Fetch-Site": "cross-site"}, 403),  # an image on another site's page
    ],
)
async def test_the_apps_cookie_counts_only_in_requests_of_its_own_or_a_listed_page(
    headers: dict[str, str], status: int, upstream: respx.MockRouter
) -> None:
    del upstream
    async with serving_app(build_app(voicepass_allowed_origins="https://app.example")) as client:
        answers = [await client.request(method, PASS, headers=headers) for method in ("POST", "GET")]
        usage = await client.get(USAGE, headers=headers)

    assert [answer.status_code for answer in answers] == [status, status]
    assert usage.status_code == 200  # it changes nothing, and only the pages above can read it
    if status == 403:
        assert read_code(answers[0]) == "origin_not_allowed"


async def test_a_user_who_is_not_signed_in_is_refused_before_elevenlabs_is_asked(upstream: respx.MockRouter) -> None:
    def find_no_user() -> None:
        return None

    async with serving_app(build_app(find_no_user)) as client:
        answers = [await client.post(PASS), await client.post("/voice/v1/conversation-token"), await client.get(USAGE)]

    assert [(answer.status_code, read_code(answer)) for answer in answers] == [(401, "token_missing")] * 3
    assert {answer.json()["detail"] for answer in answers} == {"Sign in to start a conversation."}
    assert not upstream.calls


@pytest.mark.parametrize(
    ("returned", "note"),
    [
        ({"id": "u-1"}, "returned dict"),
        ("u-1", "returned str"),
        (voicepass.User(id=""), "no user id"),
        (voicepass.User(id="u\u202e1"), "no user id"),
        (voicepass.User(id="u" * 256), "no user id"),
        (voicepass.User(id=True), "no user id"),  # type: ignore[arg-type]
        (voicepass.User(id="u-1", name=7), "wrong type"),  # type: ignore[arg-type]
        (voicepass.User(id="u-1", claims=["pro"]), "wrong type"),  # type: ignore[arg-type]
    ],
)
async def test_a_dependency_that_returns_no_valid_user_gives_500_and_the_log_says_why(
    returned: object, note: str, upstream: respx.MockRouter, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving_app(build_app(lambda: returned)) as client:
        answer = await client.post(PASS)

    assert (answer.status_code, read_code(answer)) == (500, "internal_error")
    (line,) = [record.getMessage() for record in caplog.records if "pass.refused" in record.getMessage()]
    assert note in line
    assert not upstream.calls


async def test_a_user_id_may_be_a_number(upstream: respx.MockRouter) -> None:
    del upstream
    async with serving_app(build_app(lambda: voicepass.User(id=7))) as client:  # type: ignore[arg-type]
        answer = await client.post(PASS)

    assert answer.json()["user_id"] == "7"


class AppError(Exception):
    pass


async def test_the_app_handles_what_its_dependency_raises() -> None:
    def refuse(kind: str) -> None:
        if kind == "http":
            raise HTTPException(418, {"of": "the app"}, headers={"X-App": "yes"})
        if kind == "own":
            raise AppError
        raise RuntimeError

    app = build_app(refuse)

    @app.exception_handler(AppError)
    async def answer_own(_request: Request, _error: AppError) -> Response:
        return Response("own", status_code=409)

    async with serving_app(app) as client:
        queries: list[dict[str, str]] = [{"kind": "http"}, {"kind": "own"}, {}]
        http, own, invalid = [await client.post(PASS, params=query) for query in queries]
        with pytest.raises(RuntimeError):
            await client.post(PASS, params={"kind": "bug"})

    assert (http.status_code, http.json(), http.headers["x-app"]) == (418, {"detail": {"of": "the app"}}, "yes")
    assert (own.status_code, own.text) == (409, "own")
    assert (invalid.status_code, invalid.json()["detail"][0]["loc"]) == (422, ["query", "kind"])


async def test_the_dependency_works_like_any_other_of_the_app(upstream: respx.MockRouter) -> None:
    """It can use the app's request, security, overrides, `yield`, response headers and background tasks."""
    del upstream
    seen: list[object] = []

    async def session() -> AsyncIterator[str]:
        yield "u-2"
        seen.append("closed")

    def current_user(
        request: Request,
        response: Response,
        tasks: BackgroundTasks,
        user_id: Annotated[str, Depends(session)],
        _token: Annotated[object, Depends(HTTPBearer(auto_error=False))],
        agent: Annotated[str, Body(embed=True)],
    ) -> voicepass.User:
        seen.extend([request.app, request.state.of_app, agent])
        response.set_cookie("session", "renewed")
        tasks.add_task(seen.append, "task")
        return voicepass.User(id=user_id)

    app = build_app(current_user)

    @app.middleware("http")
    async def set_state(request: Request, call_next: Callable[[Request], Any]) -> Response:
        request.state.of_app = request.state.ids = "of the app"
        answer: Response = await call_next(request)
        assert (request.app, request.state.ids) == (app, "of the app")
        return answer

    async with serving_app(app) as client:
        answer = await client.post(PASS, json={"agent": "default"})
        app.dependency_overrides[current_user] = lambda: voicepass.User(id="u-3")
        overridden = await client.get(USAGE)

    assert (answer.status_code, answer.json()["user_id"]) == (200, "u-2")
    assert answer.headers["set-cookie"].startswith("session=renewed")
    assert seen[:3] == [app, "of the app", "default"]
    assert set(seen[3:]) == {"closed", "task"}
    assert overridden.json()["user_id"] == "u-3"


async def test_a_dependency_of_function_scope_is_closed_before_elevenlabs_is_asked(
    upstream: respx.MockRouter,
) -> None:
    order: list[str] = []

    async def get_session() -> AsyncIterator[None]:
        yield
        order.append("closed")

    async def current_user(_session: Annotated[None, Depends(get_session, scope="function")]) -> voicepass.User:
        return voicepass.User(id="u-1", name="Ada", claims={})

    def sign(_request: httpx.Request) -> httpx.Response:
        order.append("asked")
        return httpx.Response(200, json={"signed_url": signed_url()})

    upstream["signed_url"].side_effect = sign
    async with serving_app(build_app(current_user)) as client:
        answer = await client.post(PASS)

    assert answer.status_code == 200
    assert order == ["closed", "asked"]


CONFIGURED_LATE = """
import logging.config
import voicepass.app
from voicepass.telemetry.logger import Logger

logger = Logger("voicepass.late")
own = {"class": "logging.StreamHandler"}
logging.config.dictConfig({"version": 1, "handlers": {"own": own}, "root": {"handlers": ["own"], "level": "INFO"}})
logger.info("service.started")
"""


@pytest.mark.long
def test_an_app_that_configures_its_logging_after_the_import_gets_the_lines() -> None:
    ended = subprocess.run([sys.executable, "-c", CONFIGURED_LATE], capture_output=True, text=True, check=True)

    assert ended.stderr == "service.started\n"


async def test_a_pass_is_granted_even_if_a_log_handler_of_the_app_raises(upstream: respx.MockRouter) -> None:
    del upstream

    class Broken(logging.Handler):
        def emit(self, _record: logging.LogRecord) -> None:
            raise RuntimeError("the exporter is down")

    broken = Broken()
    logging.getLogger("voicepass").addHandler(broken)
    try:
        async with serving_app(build_app()) as client:
            answer = await client.post(PASS)
    finally:
        logging.getLogger("voicepass").removeHandler(broken)

    assert answer.status_code == 200


async def test_a_body_beyond_the_limit_is_refused_as_in_the_service(shop: ServiceClient) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 1024

    answer = await shop.post(PASS, content=chunks(), headers={"Content-Type": "application/json"})

    assert read_code(answer) == "body_too_large"


def describe_process() -> dict[str, object]:
    loggers = [logging.getLogger(name) for name in ("root", "uvicorn", "uvicorn.access", "httpx", "voicepass")]
    return {
        "loggers": [(logger.name, list(logger.handlers), logger.level, logger.propagate) for logger in loggers],
        "signals": {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)},
        "garbage": (gc.get_threshold(), gc.get_freeze_count()),
        "streams": (sys.stdout, sys.stderr),
    }


@pytest.mark.usefixtures("nothing_is_frozen")
async def test_a_mount_changes_nothing_of_the_process_or_the_app(upstream: respx.MockRouter) -> None:
    del upstream
    app = FastAPI()
    app.add_middleware(SessionMiddlewareStub)
    app.add_api_route("/own", lambda: "own")
    before = describe_process(), dict(app.exception_handlers), list(app.user_middleware), json.dumps(app.openapi())
    app.openapi_schema = None

    voicepass.mount(app, "/voice", user=signed_in_user, settings=settings_with(voicepass_drain_seconds=5))
    async with serving_app(app) as client:
        assert (await client.post(PASS)).status_code == 200
        during = describe_process()
        own = await client.get("/own")

    after = describe_process(), dict(app.exception_handlers), list(app.user_middleware), json.dumps(app.openapi())
    assert after == before
    assert during == before[0]
    assert own.json() == "own"
    assert "x-request-id" not in own.headers


class SessionMiddlewareStub:
    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, *arguments: Any) -> None:
        await self.app(*arguments)


async def test_log_lines_of_a_mount_reach_the_apps_handlers_at_the_apps_level(
    upstream: respx.MockRouter, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    del upstream
    of_server = contextvars.copy_context()  # a server handles requests outside the context of the lifespan
    app = build_app(voicepass_reconcile_seconds=0)
    caplog.set_level(logging.INFO, logger="voicepass")

    async with serving_app(app) as client:
        with caplog.at_level(logging.ERROR, logger="voicepass"):
            await client.post(PASS)
        with caplog.at_level(logging.INFO, logger="voicepass"):
            for path in (PASS, "/voice/v1/missing"):
                await asyncio.create_task(client.post(path), context=of_server)
            await client.options(PASS, headers=FOREIGN_PREFLIGHT)

    start, *ours = [record for record in caplog.records if record.name.startswith("voicepass")]
    assert start.getMessage().startswith("service.started ")
    assert [(record.name, record.levelname) for record in ours] == [
        ("voicepass.passes", "INFO"),
        ("voicepass.api", "INFO"),
        ("voicepass.api", "WARNING"),
    ]
    assert ours[0].getMessage().startswith("pass.granted ")
    assert "user_id='u-1'" in ours[0].getMessage()
    assert "asked='POST /voice/v1/missing'" in ours[1].getMessage()
    assert "list it in VOICEPASS_ALLOWED_ORIGINS" in ours[2].getMessage()
    assert capfd.readouterr().out == ""


async def test_two_mounts_in_one_app_are_independent(upstream: respx.MockRouter, bearer: dict[str, str]) -> None:
    del upstream
    app = FastAPI()
    tokens = {name: name * 32 for name in "ab"}
    settings = {name: settings_with(voicepass_service_tokens=token) for name, token in tokens.items()}
    voicepass.mount(app, "/a", user=signed_in_user, settings=settings["a"])
    voicepass.mount(app, "/b", settings=settings["b"])

    async with serving_app(app) as client:
        path = f"v1/conversations/{(await client.post('/a/v1/signed-url')).json()['conversation_id']}"
        found = [
            await client.get(f"/{name}/{path}", headers={"Authorization": f"Bearer {token}"})
            for name, token in tokens.items()
        ]
        texts = [(await client.get(f"/{name}/metrics")).text for name in "ab"]
        second = await client.post("/b/v1/signed-url", headers=bearer)

    assert [answer.status_code for answer in found] == [200, 404]
    assert found[0].json()["token_issuer"] == "app"
    assert [bool(re.search(r"^voicepass_attempts_total\{.*\} 1.0$", text, re.MULTILINE)) for text in texts] == [
        True,
        False,
    ]
    assert second.status_code == 200


@pytest.mark.parametrize("is_first", [True, False], ids=["mount-first", "lifespan-first"])
async def test_both_lifespans_run_in_either_order(is_first: bool, upstream: respx.MockRouter) -> None:  # noqa: FBT001
    del upstream
    events: list[str] = []

    @asynccontextmanager
    async def open_app(_app: object) -> AsyncIterator[dict[str, str]]:
        events.append("opened")
        yield {"shared": "state of the app"}
        events.append("closed")

    app = FastAPI(lifespan=None if is_first else open_app)
    voicepass.mount(app, "/voice", user=signed_in_user, settings=settings_with())
    if is_first:
        app.include_router(APIRouter(lifespan=open_app))

    async with app.router.lifespan_context(app) as state, ServiceClient(app) as client:
        answer = await client.post(PASS)

    assert answer.status_code == 200
    assert state == {"shared": "state of the app"}
    assert events == ["opened", "closed"]


async def test_a_test_runner_may_start_and_end_the_app_in_two_contexts() -> None:
    app = build_app()
    lifespan = app.router.lifespan_context(app)

    for step in (lifespan.__aenter__(), lifespan.__aexit__(None, None, None)):
        await asyncio.create_task(step, context=contextvars.copy_context())


async def test_app_mount_answers_503_and_names_voicepass_mount_instead() -> None:
    app = FastAPI()
    app.mount("/voice", voicepass.create_app(settings_with()))

    async with serving_app(app) as client:
        answers = [await client.post(PASS), await client.get("/voice/healthz"), await client.get("/voice/readyz")]

    assert [(answer.status_code, read_code(answer)) for answer in answers] == [(503, "not_started")] * 3
    assert "voicepass.mount(app, path)" in answers[0].json()["detail"]


def test_a_mount_refuses_the_settings_that_serve_refuses_with_the_same_lines() -> None:
    settings = settings_with(**WITHOUT_TOKENS, elevenlabs_api_key=None)
    app = FastAPI()

    with pytest.raises(SettingsRefusedError) as with_user:
        voicepass.mount(app, "/voice", user=signed_in_user, settings=settings)
    with pytest.raises(SettingsRefusedError) as without:
        voicepass.mount(app, "/voice", settings=settings)
    with pytest.raises(SettingsRefusedError) as of_service:
        voicepass.create_app(settings)

    assert str(without.value) == str(of_service.value)
    assert [line.split()[0] for line in str(with_user.value).splitlines()] == ["ELEVENLABS_API_KEY"]


async def test_a_ledger_that_cannot_open_fails_the_start_of_the_app() -> None:
    app = build_app(voicepass_database_url="sqlite:////nowhere/at/all.db")

    with pytest.raises(SettingsRefusedError, match="VOICEPASS_DATABASE_URL cannot be used"):
        async with app.router.lifespan_context(app):
            pass


async def test_a_mount_that_uses_the_apps_cookie_refuses_an_http_origin() -> None:
    with pytest.raises(SettingsRefusedError, match="VOICEPASS_ALLOWED_ORIGINS"):
        build_app(voicepass_allowed_origins="http://app.example")


async def test_an_app_that_closes_answers_the_pass_in_flight_first(upstream: respx.MockRouter) -> None:
    arrived, may_answer = asyncio.Event(), asyncio.Event()

    async def answer_late(_request: httpx.Request) -> httpx.Response:
        arrived.set()
        await may_answer.wait()
        return httpx.Response(200, json={"signed_url": signed_url()})

    upstream.get(SIGNED_URL_PATH).mock(side_effect=answer_late)
    app = build_app()
    async with ServiceClient(app) as client:
        async with app.router.lifespan_context(app):
            asked = asyncio.create_task(client.post(PASS))
            await arrived.wait()
            asyncio.get_running_loop().call_soon(may_answer.set)
        answer = await asked

    assert answer.status_code == 200


def test_a_misspelt_setting_is_refused() -> None:
    with pytest.raises(ValidationError):
        voicepass.Settings(voicepass_allowed_origin="https://app.example")  # type: ignore[call-arg]


def test_the_public_names_of_the_package_are_those_of_the_contract() -> None:
    assert {name: getattr(voicepass, name).__name__ for name in voicepass.__all__} == {
        "Settings": "Settings",
        "User": "User",
        "create_app": "create_app",
        "mount": "mount",
    }
