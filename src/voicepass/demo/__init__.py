"""The whole story on one machine: the service, a pretend ElevenLabs and a page, in one process, with no account.

Nothing here is a mode of the service: the very same app runs, and only its base URL points to the emulator beside it.
"""

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jose import jwt
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elevenlabs_emulator import EmulatedAgent, Emulator, create_emulator
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
    """Settings that look neither at the environment nor at `.env`: those may belong to a real deployment."""

    @classmethod
    def settings_customise_sources(  # noqa: D102 - pydantic-settings' own hook
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


class SignIn(BaseModel):
    """What the demo asks of a user. A real application asks for more."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=100)


def create_demo(base_url: str, *, emulator: Emulator | None = None, **overrides: Any) -> ASGIApp:  # noqa: ANN401
    """Build the demo, to be served at `base_url` (a loopback address). Its secrets are new at every start.

    `overrides` are settings by name, as in `create_demo(url, voicepass_log_level="debug")`.
    """
    address = urlsplit(base_url).netloc
    ws_base = f"ws://{address}{EMULATOR_PATH}"
    api_key = f"sk_{secrets.token_hex(24)}"
    emulator = emulator or Emulator(
        agents=[EmulatedAgent(agent_id=AGENT_ID)],
        api_keys={api_key: frozenset({"convai_write", "convai_read"})},
        public_ws_base=ws_base,
        webhook_url=f"{base_url}{WEBHOOK_PATH}",
        webhook_secret=f"wsec_{secrets.token_hex(32)}",
    )
    settings = DemoSettings(
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
    service = create_app(settings)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with service.router.lifespan_context(service):
            yield

    async def page(_request: Request) -> Response:
        return FileResponse(_STATIC / "index.html")

    async def config(_request: Request) -> Response:
        return JSONResponse({"agent_id": AGENT_ID, "ws_base": ws_base})

    async def sign_in(request: Request) -> Response:
        try:
            name = SignIn.model_validate_json(await request.body()).name
        except ValidationError:
            refusal = RequestInvalid("Give a name of 1 to 100 characters.")
            return log_and_answer(refusal, request_id=request.state.request_id)
        user_id = f"user_{secrets.token_hex(4)}"
        # The page shows how much of the user's minutes is set aside for a pass.
        pass_seconds = service.state.policy.conversation_seconds
        token = _token(settings, user_id, name)
        return JSONResponse({"token": token, "user_id": user_id, "name": name, "pass_seconds": pass_seconds})

    async def expire(request: Request) -> Response:
        emulator.expire(request.path_params["conversation_id"])
        return Response(status_code=204)

    app = Starlette(
        routes=[
            Route("/", page),
            Route("/demo/config", config),
            Route("/demo/sign-in", sign_in, methods=["POST"], middleware=[Middleware(Surface)]),
            Route("/demo/passes/{conversation_id}/expire", expire, methods=["POST"]),
            Mount("/static", StaticFiles(directory=_STATIC)),
            Mount(EMULATOR_PATH, create_emulator(emulator)),
            Mount("/", service),
        ],
        lifespan=lifespan,
        middleware=[
            # A page elsewhere could point its own name at 127.0.0.1 and sign itself in.
            Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "::1"], www_redirect=False),
            Middleware(_StrictPage, policy=_content_security_policy(address)),
        ],
    )
    app.router.redirect_slashes = False
    return app


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


def _content_security_policy(address: str) -> str:
    """Return the strictest policy that the official SDK works under, its worklets served from `/static`."""
    return "; ".join(
        (
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
    )


class _StrictPage:
    """Gives the page and its assets their Content-Security-Policy; the API's answers keep their own headers."""

    def __init__(self, app: ASGIApp, *, policy: str) -> None:
        self._app = app
        self._policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_strictly(message: Message) -> None:
            if message["type"] == "http.response.start" and (
                scope["path"] == "/" or scope["path"].startswith("/static/")
            ):
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = self._policy
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers["Cache-Control"] = "no-cache"
            await send(message)

        await self._app(scope, receive, send_strictly)
