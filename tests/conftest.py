"""What every test may use: a service with known secrets, tokens for its users, and a clock that tests set."""

import gc
import logging
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import asynccontextmanager
from functools import cache
from typing import Any, ClassVar

import httpx
import pytest
import respx
from fastapi import FastAPI
from jose import jwt
from pydantic import SecretStr
from respx.mocks import AbstractRequestMocker
from starlette.types import ASGIApp

from tests.canaries import API_KEY, JWT_SECRET, SIGNATURE, CanaryLog
from tests.workers import ByNeed, put_long_work_first
from voicepass.app import create_app
from voicepass.config.settings import Settings
from voicepass.demo import DemoSettings

# Sixty tests start a process of voicepass. Without these caches, each process compiles the whole package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

AGENT_ID = "agent_7x"
TOKEN_ISSUER = "https://login.example"
AUDIENCE = "voicepass"
NOW = 1_790_000_000
UPSTREAM = "https://api.elevenlabs.io"
SIGNED_URL_PATH = "/v1/convai/conversation/get-signed-url"

MakeToken = Callable[..., str]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByNeed | None:
    if config.getoption("dist") != "loadfile" or config.option.markexpr != "not long":
        return None  # one worker would run all long tests of one need, after the other workers have ended
    config.option.loadscopereorder = False  # `put_long_work_first` has done it
    return ByNeed(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        put_long_work_first(items)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Let the garbage collector skip the tests and what they import, because it would scan them in each collection."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


_freeze, _unfreeze = gc.freeze, gc.unfreeze


@pytest.fixture(scope="session", autouse=True)
def keep_frozen() -> Iterator[None]:
    """Keep the suite's own objects frozen: each service in this process would unfreeze them when it ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        yield


@pytest.fixture
def nothing_is_frozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Unfreeze all objects, so that a test can count what a service freezes."""
    monkeypatch.setattr(gc, "freeze", _freeze)
    monkeypatch.setattr(gc, "unfreeze", _unfreeze)
    _unfreeze()
    yield
    _freeze()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def every_level_is_logged() -> Iterator[None]:
    """Log every level, although another test may have set a higher one."""
    logger = logging.getLogger("voicepass")
    logger.setLevel(logging.DEBUG)
    yield
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session", autouse=True)
def canary_log() -> Iterator[CanaryLog]:
    """Everything that the suite logs, at DEBUG. The last test fails if a secret is in it."""
    log = CanaryLog()
    yield log
    log.close()
    assert log.leaking() == []


class Clock:
    """Unix or monotonic seconds that only a test moves."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


UNLIMITED = """
[limits.user]
passes_per_minute = "off"
passes_per_day = "off"
open_conversations = "off"
minutes_per_day = "off"
minutes_per_month = "off"
"""


@cache
def policy_file(text: str) -> str:
    """Write a policy file with this text and return its path."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml", delete=False) as file:
        file.write(text)
    return file.name


def settings_with(**overrides: object) -> Settings:
    """Make the settings of a working service. They have no limits, because most tests use a single user."""
    values: dict[str, Any] = {
        "elevenlabs_api_key": SecretStr(API_KEY),
        "elevenlabs_agent_id": AGENT_ID,
        "voicepass_jwt_secret": SecretStr(JWT_SECRET),
        "voicepass_jwt_issuer": TOKEN_ISSUER,
        "voicepass_jwt_audience": AUDIENCE,
        "voicepass_database_url": "sqlite://",
        "voicepass_policy_file": policy_file(UNLIMITED),
        "voicepass_log_level": "debug",
    }
    return DemoSettings(**(values | overrides))


@pytest.fixture
def make_token() -> MakeToken:
    """Makes a valid token; keyword arguments change its claims, and None removes one."""

    def make(**claims: object) -> str:
        good: dict[str, object] = {
            "iss": TOKEN_ISSUER,
            "aud": AUDIENCE,
            "sub": "u-1",
            "name": "Ada",
            "exp": int(time.time()) + 600,
        }
        return str(jwt.encode({k: v for k, v in (good | claims).items() if v is not None}, JWT_SECRET, "HS256"))

    return make


@pytest.fixture
def bearer(make_token: MakeToken) -> dict[str, str]:
    """The Authorization header of a signed-in user."""
    return {"Authorization": f"Bearer {make_token()}"}


class _OnOurTransport(AbstractRequestMocker):
    """Lets respx answer the requests of our transport, as it answers those of httpx's own."""

    name = "voicepass"
    targets: ClassVar[list[str]] = ["voicepass.outbound.AiohttpTransport"]
    target_methods: ClassVar[list[str]] = ["handle_async_request"]

    @classmethod
    def to_httpx_request(cls, **kwargs: Any) -> httpx.Request:
        request: httpx.Request = kwargs["request"]
        return request

    @classmethod
    async def from_async_httpx_response(
        cls,
        httpx_response: httpx.Response,
        target: object,  # noqa: ARG003 - respx's own signature
        **kwargs: object,  # noqa: ARG003
    ) -> httpx.Response:
        return httpx_response


@pytest.fixture
def upstream() -> Iterator[respx.MockRouter]:
    """ElevenLabs' HTTP edge: the route named `signed_url` answers with a good URL unless a test changes it."""
    with respx.mock(base_url=UPSTREAM, assert_all_called=False, using="voicepass") as router:
        router.get(SIGNED_URL_PATH, name="signed_url").respond(json={"signed_url": signed_url()})
        yield router


def signed_url(
    *, scheme: str = "wss", host: str = "api.elevenlabs.io", agent_id: str = AGENT_ID, conversation_id: str = "conv_1"
) -> str:
    query = f"agent_id={agent_id}&conversation_signature={SIGNATURE}&conversation_id={conversation_id}"
    return f"{scheme}://{host}/v1/convai/conversation?{query}"


class ServiceClient(httpx.AsyncClient):
    """Sends requests to an app in this process, from the address `peer`."""

    def __init__(self, app: ASGIApp, *, peer: str = "127.0.0.1") -> None:
        super().__init__(transport=httpx.ASGITransport(app, client=(peer, 4711)), base_url="http://voicepass.test")
        self.app: Any = app


@asynccontextmanager
async def serving(**settings: object) -> AsyncIterator[ServiceClient]:
    """Run the service in this process until the block ends; yields a client. `settings` as in `settings_with`."""
    async with serving_app(create_app(settings_with(**settings))) as client:
        yield client


@asynccontextmanager
async def serving_app(app: FastAPI, *, peer: str = "127.0.0.1") -> AsyncIterator[ServiceClient]:
    """Do the same with an app that the test made itself. Requests come from the address `peer`."""
    async with app.router.lifespan_context(app), ServiceClient(app, peer=peer) as client:
        yield client


@pytest.fixture
async def api(request: pytest.FixtureRequest, upstream: respx.MockRouter) -> AsyncIterator[ServiceClient]:
    """The service, in process, in front of `upstream`. Parametrise indirectly with settings to change them."""
    del upstream
    async with serving(**getattr(request, "param", {})) as client:
        yield client
