"""The composition root: settings become services, services become the FastAPI application."""

import gc
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from typing import Final

import structlog
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from voicepass.api.adminport import AdminPort
from voicepass.api.cors import Cors
from voicepass.api.draining import Draining
from voicepass.api.middleware import Surface
from voicepass.api.module import module_routes
from voicepass.api.problems import word_problems
from voicepass.api.readiness import LedgerCheck, Readiness
from voicepass.api.routes import admin_routes, backend_routes, pass_routes, probe_routes, user_routes, webhook_routes
from voicepass.config.build import Configuration, configure, open_ledger
from voicepass.config.settings import Settings, load_settings
from voicepass.elevenlabs import ElevenLabs
from voicepass.elevenlabs.sealing import Seals
from voicepass.elevenlabs.warm import WarmStore
from voicepass.identity import JwtAuthenticator
from voicepass.identity.credentials import ServiceTokens, SessionCookie
from voicepass.identity.jwks import PublishedKeys
from voicepass.outbound import http_transport
from voicepass.passes import Passes, VoiceProvider
from voicepass.settlement import Settlements
from voicepass.settlement.lookup import OpenPasses
from voicepass.settlement.reconciler import Reconciler
from voicepass.settlement.retention import Retention
from voicepass.settlement.webhook import Webhook
from voicepass.telemetry.lines import AttemptLog, Isolated, SettlementLog
from voicepass.telemetry.logs import configure_logging, log_writer
from voicepass.telemetry.metrics import AttemptMetrics, Exposition, LedgerMetrics, SettlementMetrics, StateMetrics
from voicepass.telemetry.traces import traced

_log = structlog.get_logger("voicepass.app")

COLLECT_EVERY: Final = 10_000
"""Objects that were made and not yet freed, between two looks for garbage; Python itself looks every 700."""


def create_app(settings: Settings | None = None, *, admin_port: int | None = None) -> FastAPI:
    """Build the service (`uvicorn --factory voicepass.app:create_app`). Raises SettingsRefusedError.

    With `admin_port`, `/metrics` and `/v1/blocks` answer on that port only. The server must listen on it as well.
    """
    settings = settings or load_settings()
    configuration = configure(settings)
    configure_logging(log_format=settings.voicepass_log_format, level=settings.voicepass_log_level)
    for host in settings.voicepass_plain_http_hosts:
        _log.warning("plain_http.allowed", host=host)
    draining = Draining(seconds=settings.voicepass_drain_seconds)
    app = FastAPI(
        title="voicepass",
        summary="Signed-in users get a single-use ElevenLabs signed URL; the API key stays on the server.",
        version="1",
        routes=[
            *pass_routes.routes,
            *user_routes.routes,
            *backend_routes.routes,
            *webhook_routes.routes,
            *module_routes.routes,
            *probe_routes.routes,
            *admin_routes,
        ],
        lifespan=_lifespan(settings, configuration, draining),
        # The framework's spans would bear the query and its logs the words of exceptions; `traces` tells it better.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        docs_url="/docs" if settings.voicepass_docs else None,
        redoc_url=None,
        openapi_url="/openapi.json" if settings.voicepass_docs else None,
        redirect_slashes=False,  # the redirect would repeat the caller's Host header
    )
    word_problems(app)
    if admin_port is not None:
        app.add_middleware(AdminPort, port=admin_port)
    app.add_middleware(Surface, trusted_proxies=settings.voicepass_trusted_proxies, draining=draining)
    app.add_middleware(  # the last one added is the outermost
        Cors,
        allowed_origins=settings.voicepass_allowed_origins,
        with_cookies=settings.voicepass_session_cookie is not None,
    )
    return app


def _lifespan(
    settings: Settings, configuration: Configuration, draining: Draining
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.enter_context(log_writer.buffered())
            ledger = await stack.enter_async_context(open_ledger(settings, clock=time.time))
            deadline_seconds = settings.voicepass_deadline_seconds
            provider = ElevenLabs(
                transport=await stack.enter_async_context(http_transport(connect_seconds=deadline_seconds / 4)),
                workspaces=configuration.workspaces,
                deadline_seconds=deadline_seconds,
                max_calls=settings.voicepass_max_calls,
                clock=time.time,
            )
            stack.push_async_callback(provider.aclose)
            source: VoiceProvider = provider
            warm: WarmStore | None = None
            if settings.voicepass_warm_passes:
                warm = WarmStore(
                    source=provider, most=settings.voicepass_warm_passes, clock=time.time, ticks=time.monotonic
                )
                stack.push_async_callback(warm.aclose)
                source = warm
            for issuer in configuration.trusted:
                if isinstance(issuer.keys, PublishedKeys):
                    stack.push_async_callback(issuer.keys.aclose)
            stack.enter_context(draining.on_signals())
            registry = CollectorRegistry()
            state = StateMetrics(
                registry=registry,
                upstream=provider,
                warm_held=lambda: warm.held if warm else {},
                lines_dropped=lambda: log_writer.dropped,
            )
            await stack.enter_async_context(state.looking())
            check_ledger = LedgerCheck(check=ledger.check, ticks=time.monotonic)
            app.state.draining = draining
            app.state.ledger = ledger
            app.state.metrics = Exposition(
                registry=registry,
                state=state,
                ledger=LedgerMetrics(ledger=ledger, check=check_ledger, ticks=time.monotonic),
            )
            app.state.service_tokens = ServiceTokens(settings.service_tokens)
            app.state.policy = configuration.policy
            app.state.authenticator = JwtAuthenticator(
                trusted=configuration.trusted, clock=time.time, session=_session_cookie(settings)
            )
            app.state.readiness = Readiness(
                {"ledger": check_ledger, "keys": app.state.authenticator.check_keys, "elevenlabs": provider.rest}
            )
            settlements = Settlements(
                ledger=ledger,
                observers=[Isolated(SettlementLog(), SettlementMetrics(registry=registry))],
                clock=time.time,
            )
            seals = Seals(configuration.workspaces)
            base_urls = {rules.agent.agent_id: rules.agent.base_url for rules in configuration.policy.agents.values()}
            open_passes = OpenPasses(
                ledger=ledger,
                provider=provider,
                settlements=settlements,
                seals=seals,
                base_urls=base_urls,
                deadline_seconds=deadline_seconds,
                clock=time.time,
                ticks=time.monotonic,
            )
            stack.push_async_callback(open_passes.aclose)
            app.state.passes = Passes(
                authenticator=app.state.authenticator,
                policy=configuration.policy,
                provider=source,
                ledger=ledger,
                open_passes=open_passes,
                seal=seals.seal,
                observers=[
                    Isolated(
                        AttemptLog(),
                        AttemptMetrics(registry=registry),
                        *await stack.enter_async_context(traced()),
                    )
                ],
            )
            stack.push_async_callback(app.state.passes.aclose)
            app.state.webhook = Webhook(settlements=settlements, secrets=settings.webhook_secrets, clock=time.time)
            keep_seconds = settings.voicepass_retention_days * 24 * 60 * 60
            await stack.enter_async_context(Retention(ledger=ledger, keep_seconds=keep_seconds).running())
            if settings.voicepass_reconcile_seconds:
                reconciler = Reconciler(
                    ledger=ledger,
                    provider=provider,
                    settlements=settlements,
                    base_urls=base_urls,
                    every_seconds=settings.voicepass_reconcile_seconds,
                    conversation_seconds=configuration.policy.conversation_seconds,
                    clock=time.time,
                )
                await stack.enter_async_context(reconciler.running())
            stack.enter_context(_collecting_rarely())
            yield

    return lifespan


def _session_cookie(settings: Settings) -> SessionCookie | None:
    name = settings.voicepass_session_cookie
    return SessionCookie(name, frozenset(settings.voicepass_allowed_origins)) if name is not None else None


@contextmanager
def _collecting_rarely() -> Iterator[None]:
    """Look for cycles of garbage seldom, and not in what the service is made of.

    A pass leaves hardly any, but each look goes over all that is under way: at 500 connections a quarter of the time.
    """
    usual = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(COLLECT_EVERY, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()
