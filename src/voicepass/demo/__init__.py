"""The service, the emulator and a web page in one process: the whole flow on one machine, without an account.

The service has no mode for this: the same app runs, and its base URL leads to the emulator.
"""

import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from jose import jwt
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from elevenlabs_emulator import EmulatedAgent, Emulator, create_emulator
from elevenlabs_emulator.script import ORDERS
from voicepass.api.middleware import WEBHOOK_PATH, Surface
from voicepass.api.problems import log_and_answer
from voicepass.app import create_app
from voicepass.config.settings import Settings
from voicepass.errors import RequestInvalid

AGENT_ID = "agent_demo"
EMULATOR_PATH = "/_elevenlabs"
TOKEN_SECONDS = 3600

_HERE = Path(str(files(__package__)))
_STATIC = _HERE / "static"


class DemoSettings(Settings):
    """Settings that read neither the environment nor `.env`: those may belong to a real deployment."""

    @classmethod
    def read_environment(cls) -> dict[str, str]:
        """Return nothing."""
        return {}


class SignIn(BaseModel):
    """What a user gives to sign in. A real application verifies more."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=100)
    user_id: str | None = Field(default=None, pattern=r"^user_[0-9a-f]{8}$")
    """The id from before a reload of the page: in a demo, anyone may be anyone."""


def create_demo(base_url: str, *, emulator: Emulator | None = None, **overrides: Any) -> ASGIApp:  # noqa: ANN401
    """Build the demo, to be served at `base_url` (a loopback address). Its secrets are new at every start.

    `overrides` are settings by name, as in `create_demo(url, voicepass_log_level="debug")`.
    """
    api_key = f"sk_{secrets.token_hex(24)}"
    emulator = emulator or Emulator(
        agents=[EmulatedAgent(agent_id=AGENT_ID, spoken_lines=ORDERS)],
        api_keys={api_key: frozenset({"convai_write", "convai_read"})},
        public_ws_base=_write_ws_base(base_url),
        webhook_url=f"{base_url}{WEBHOOK_PATH}",
        webhook_secret=f"wsec_{secrets.token_hex(32)}",
    )
    settings = _make_settings(base_url, emulator, overrides)
    service = create_app(settings)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with service.router.lifespan_context(service):
            yield

    app = Starlette(
        routes=[
            *_list_page_routes(base_url, emulator, settings, service),
            Mount(EMULATOR_PATH, create_emulator(emulator)),
            Mount("/", service),
        ],
        lifespan=lifespan,
        middleware=[
            # A foreign page could let its own host name lead to 127.0.0.1, and then sign in.
            Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "::1"], www_redirect=False),
        ],
    )
    app.router.redirect_slashes = False
    return app


def _make_settings(base_url: str, emulator: Emulator, overrides: dict[str, Any]) -> DemoSettings:
    return DemoSettings(
        **{
            "elevenlabs_api_key": SecretStr(next(iter(emulator.api_keys))),
            "elevenlabs_agent_id": AGENT_ID,
            "elevenlabs_base_url": f"{base_url}{EMULATOR_PATH}",
            "elevenlabs_webhook_secret": SecretStr(emulator.webhooks.secret),
            "voicepass_jwt_secret": SecretStr(secrets.token_urlsafe(48)),
            "voicepass_jwt_issuer": "voicepass-demo",
            "voicepass_jwt_audience": "voicepass",
            "voicepass_policy_file": str(_HERE / "policy.toml"),
            "voicepass_database_url": "sqlite://",
            "voicepass_log_format": "console",
            **overrides,
        }
    )


def _list_page_routes(base_url: str, emulator: Emulator, settings: Settings, service: FastAPI) -> list[BaseRoute]:
    page_headers = _write_page_headers(urlsplit(base_url).netloc)

    async def page(_request: Request) -> Response:
        return FileResponse(_STATIC / "index.html", headers=page_headers)

    async def config(_request: Request) -> Response:
        return JSONResponse({"agent_id": AGENT_ID, "ws_base": _write_ws_base(base_url)})

    async def sign_in(request: Request) -> Response:
        try:
            asked = SignIn.model_validate_json(await request.body())
        except ValidationError:
            refusal = RequestInvalid("Give a name of 1 to 100 characters.")
            return log_and_answer(refusal, **request.state.ids)
        name, user_id = asked.name, asked.user_id or f"user_{secrets.token_hex(4)}"
        # The page shows how much of the user's minutes voicepass reserves for a pass.
        pass_seconds = service.state.policy.conversation_seconds
        token = _token(settings, user_id, name)
        return JSONResponse({"token": token, "user_id": user_id, "name": name, "pass_seconds": pass_seconds})

    async def expire(request: Request) -> Response:
        emulator.expire(request.path_params["conversation_id"])
        return Response(status_code=204)

    return [
        Route("/", page),
        Route("/demo/config", config),
        Route("/demo/sign-in", sign_in, methods=["POST"], middleware=[Middleware(Surface)]),
        Route("/demo/passes/{conversation_id}/expire", expire, methods=["POST"]),
        Mount("/static", _PageFiles(page_headers)),
    ]


def _write_ws_base(base_url: str) -> str:
    return f"ws://{urlsplit(base_url).netloc}{EMULATOR_PATH}"


def _token(settings: Settings, user_id: str, name: str) -> str:
    claims = {
        "iss": settings.voicepass_jwt_issuer,
        "aud": settings.voicepass_jwt_audience,
        "sub": user_id,
        "name": name,
        "exp": int(time.time()) + TOKEN_SECONDS,
    }
    secret = settings.voicepass_jwt_secret
    return str(jwt.encode(claims, secret.get_secret_value() if secret else "", algorithm="HS256"))


def _write_page_headers(address: str) -> dict[str, str]:
    """Return the strictest policy that the official SDK works under, with its worklets served from `/static`."""
    directives = (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "media-src 'self' blob: mediastream:",
        f"connect-src 'self' ws://{address}",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return {
        "Content-Security-Policy": "; ".join(directives),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


class _PageFiles(StaticFiles):
    """The page and its assets, each with these headers."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        super().__init__(directory=_STATIC)
        self._headers = headers

    def file_response(self, *args: Any, **kwargs: Any) -> Response:  # noqa: ANN401 - as in Starlette
        """Answer with a file."""
        response = super().file_response(*args, **kwargs)
        response.headers.update(self._headers)
        return response
