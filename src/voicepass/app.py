"""The composition root: settings become services, services become the FastAPI application."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TypeVar

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import CollectorRegistry

from voicepass.api.middleware import Surface
from voicepass.api.problems import word_problems
from voicepass.api.routes import operation_routes, pass_routes
from voicepass.elevenlabs import ElevenLabs, http_client
from voicepass.identity import JwtAuthenticator, TrustedIssuer
from voicepass.ledger.sqlite import open_sqlite
from voicepass.model import DEFAULT_ALIAS, Agent
from voicepass.observe import AttemptLog, AttemptMetrics, configure_logging
from voicepass.passes import Passes
from voicepass.policy import Policy
from voicepass.settings import Settings, settings_to_serve

PREFLIGHT_SECONDS = 600

Value = TypeVar("Value")


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the service (`uvicorn --factory voicepass.app:create_app`). Raises SettingsRefusedError."""
    settings = settings or settings_to_serve()
    configure_logging(log_format=settings.voicepass_log_format, level=settings.voicepass_log_level)
    app = FastAPI(
        title="voicepass",
        summary="Signed-in users get a single-use ElevenLabs signed URL; the API key stays on the server.",
        version="1",
        routes=[*pass_routes.routes, *operation_routes.routes],
        lifespan=_lifespan(settings),
        docs_url="/docs" if settings.voicepass_docs else None,
        redoc_url=None,
        openapi_url="/openapi.json" if settings.voicepass_docs else None,
        redirect_slashes=False,  # the redirect would repeat the caller's Host header
    )
    word_problems(app)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.voicepass_allowed_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type", "X-Request-ID"],
        expose_headers=["X-Request-ID", "Retry-After"],
        allow_credentials=False,
        max_age=PREFLIGHT_SECONDS,
    )
    app.add_middleware(Surface)
    return app


def _lifespan(settings: Settings) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            ledger = await stack.enter_async_context(open_sqlite(settings.sqlite_path))
            client = await stack.enter_async_context(http_client(deadline_seconds=settings.voicepass_deadline_seconds))
            provider = ElevenLabs(
                client=client,
                base_url=settings.elevenlabs_base_url,
                api_key=_required(settings.elevenlabs_api_key).get_secret_value(),
                deadline_seconds=settings.voicepass_deadline_seconds,
                clock=time.time,
            )
            stack.push_async_callback(provider.aclose)
            registry = CollectorRegistry()
            app.state.ledger = ledger
            app.state.registry = registry
            app.state.passes = Passes(
                authenticator=JwtAuthenticator(trusted=_trusted_issuer(settings), clock=time.time),
                policy=_policy(settings),
                provider=provider,
                ledger=ledger,
                observers=[AttemptLog(), AttemptMetrics(registry=registry)],
                clock=time.time,
            )
            yield

    return lifespan


def _trusted_issuer(settings: Settings) -> TrustedIssuer:
    return TrustedIssuer(
        token_issuer=_required(settings.voicepass_jwt_issuer),
        audience=_required(settings.voicepass_jwt_audience),
        key=settings.verification_key(),
        leeway_seconds=settings.voicepass_jwt_leeway_seconds,
        user_id_claim=settings.voicepass_user_id_claim,
    )


def _policy(settings: Settings) -> Policy:
    agent = Agent(alias=DEFAULT_ALIAS, agent_id=_required(settings.elevenlabs_agent_id))
    return Policy(
        agents={agent.alias: agent},
        user_name_claim=settings.voicepass_user_name_claim,
        variables=settings.voicepass_variables,
    )


def _required(value: Value | None) -> Value:
    if value is None:
        raise RuntimeError("settings_to_serve() lets no such settings through")
    return value
