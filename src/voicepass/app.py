"""The composition root: settings become services, and services become the FastAPI application."""

import gc
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from functools import partial
from typing import Any, Final

from fastapi import FastAPI
from starlette.datastructures import State
from starlette.types import Lifespan

from voicepass.api.cors import Cors
from voicepass.api.draining import Draining
from voicepass.api.embedding import embed
from voicepass.api.middleware import Surface
from voicepass.api.operators import ADMIN_ROUTES, Gate, LedgerCheck, conversation_routes, probe_routes
from voicepass.api.problems import FRAMEWORK_ERRORS
from voicepass.api.routes import client_routes, pass_routes, user_routes, webhook_routes
from voicepass.api.schemas import DocumentedApp
from voicepass.config.build import Configuration, configure, describe_ledger, open_ledger
from voicepass.config.environment import SettingsRefusedError
from voicepass.config.settings import Settings, load_settings
from voicepass.elevenlabs import ElevenLabs
from voicepass.elevenlabs.sealing import Seals
from voicepass.elevenlabs.warm import WarmStore
from voicepass.errors import LedgerUnavailable
from voicepass.identity import AppUsers, JwtAuthenticator
from voicepass.identity.credentials import ServiceToken, ServiceTokens, SessionCookie
from voicepass.identity.jwks import PublishedKeys
from voicepass.model import VERSION
from voicepass.outbound import http_transport
from voicepass.passes import Passes
from voicepass.settlement import Bypasses, Settlements, run_periodically
from voicepass.settlement.lookup import OpenPasses
from voicepass.settlement.reconciler import Reconciler
from voicepass.settlement.retention import run_retention
from voicepass.settlement.webhook import Webhook
from voicepass.telemetry import metrics
from voicepass.telemetry.lines import log_attempt, log_settlement, notify
from voicepass.telemetry.logger import Logger
from voicepass.telemetry.logs import configure_logging, log_writer
from voicepass.telemetry.traces import open_tracing

_log = Logger("voicepass.app")

COLLECT_EVERY: Final = 10_000
"""Objects that Python creates, and does not free, between two garbage collections; its own default is 700."""


def create_app(settings: Settings | None = None, *, admin_port: int | None = None) -> FastAPI:
    """Build the service (`uvicorn --factory voicepass.app:create_app`). Raises SettingsRefusedError.

    It sets up the logging of the process. With `admin_port`, the routes for operators answer on that port only. The
    server must listen on it as well.
    """
    settings = settings or load_settings()
    draining = Draining(seconds=settings.voicepass_drain_seconds)
    app = _build(settings, configure(settings), draining, admin_port)
    configure_logging(log_format=settings.voicepass_log_format, level=settings.voicepass_log_level)
    app.router.lifespan_context = partial(_run_process, app.router.lifespan_context, draining)
    return app


@asynccontextmanager
async def _run_process(open_services: Lifespan[FastAPI], draining: Draining, app: FastAPI) -> AsyncIterator[None]:
    """Open the services of a process that runs nothing else."""
    with log_writer.buffered():
        async with open_services(app):
            with draining.on_signals(), _collect_rarely():
                yield


def mount(app: FastAPI, path: str, *, user: Callable[..., Any] | None = None, settings: Settings | None = None) -> None:
    """Serve voicepass inside `app`, below `path`. It starts and ends with the app. Raises SettingsRefusedError.

    `user` is a dependency of the app that returns a `User`, or None if nobody is signed in. Without it, voicepass
    verifies tokens, as the service does. Without `settings`, voicepass reads the environment. Raises ValueError for the
    path "/".
    """
    path = f"/{path.strip('/')}"
    if path == "/" or "{" in path:
        raise ValueError("Give voicepass a path of its own, such as '/voice': no '/' alone, and no {parameter}.")
    settings = settings or load_settings()
    configuration = configure(settings, has_app_users=user is not None)
    service = _build(settings, configuration, Draining(seconds=0), admin_port=None)
    embed(app, path, service, user=user)
    app.router.lifespan_context = partial(_run_in_app, app.router.lifespan_context, service)


@asynccontextmanager
async def _run_in_app(run_app: Lifespan[Any], service: FastAPI, app: FastAPI) -> AsyncIterator[Any]:
    """Open the services before what the app itself opens, and close them after it."""
    async with service.router.lifespan_context(service), run_app(app) as state:
        yield state


def _build(settings: Settings, configuration: Configuration, draining: Draining, admin_port: int | None) -> FastAPI:
    """Build what the service and a mount have in common: it changes nothing of the process."""
    routers = (pass_routes, user_routes, conversation_routes, webhook_routes, probe_routes)
    app = DocumentedApp(
        title="voicepass",
        summary="Signed-in users get a single-use ElevenLabs signed URL; the API key stays on the server.",
        version="1",
        routes=[*(route for router in routers for route in router.routes), *client_routes, *ADMIN_ROUTES],
        exception_handlers=FRAMEWORK_ERRORS,
        lifespan=partial(_open, settings, configuration),
        # FastAPI's spans would hold the query, and its logs the messages of exceptions. `traces` makes better ones.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        docs_url="/docs" if settings.voicepass_docs else None,
        redoc_url=None,
        openapi_url="/openapi.json" if settings.voicepass_docs else None,
        redirect_slashes=False,  # the redirect would repeat the caller's Host header
    )
    app.state.draining = draining
    app.add_middleware(Gate, admin_port=admin_port)
    app.add_middleware(Surface, trusted_proxies=settings.voicepass_trusted_proxies, draining=draining)
    app.add_middleware(  # the last one added is the outermost
        Cors,
        allowed_origins=settings.voicepass_allowed_origins,
        with_cookies=settings.voicepass_session_cookie is not None or not configuration.trusted,
    )
    return app


@asynccontextmanager
async def _open(settings: Settings, configuration: Configuration, app: FastAPI) -> AsyncIterator[None]:
    """Open the services before the first request, and close them after the last one."""
    for host in settings.voicepass_plain_http_hosts:
        _log.warning("plain_http.allowed", host=host)
    async with AsyncExitStack() as stack:
        await _open_services(stack, app.state, settings, configuration)
        _log.info(
            "service.started",
            version=VERSION,
            agents=list(configuration.policy.agents),
            ledger=describe_ledger(settings),
            issuers=list(dict.fromkeys(issuer.token_issuer for issuer in configuration.trusted)),
        )
        yield


async def _open_services(stack: AsyncExitStack, state: State, settings: Settings, configuration: Configuration) -> None:
    """Open what the routes need and put it into `state`; `stack` closes it."""
    state.policy = configuration.policy
    tokens = [token.get_secret_value() for token in settings.voicepass_service_tokens]
    state.service_tokens = ServiceTokens([ServiceToken.parse(token) for token in tokens])
    state.seals = Seals(configuration.workspaces)
    try:
        state.ledger = await stack.enter_async_context(open_ledger(settings, clock=time.time))
    except LedgerUnavailable as error:
        raise SettingsRefusedError([f"VOICEPASS_DATABASE_URL cannot be used: {error.operator_note}"]) from error
    provider = await open_provider(stack, settings, configuration)
    warm = None
    if settings.voicepass_warm_passes:
        warm = WarmStore(source=provider, most=settings.voicepass_warm_passes, clock=time.time, ticks=time.monotonic)
        stack.push_async_callback(warm.aclose)
    check_ledger = LedgerCheck(check=state.ledger.check, ticks=time.monotonic)
    state.checks = {"ledger": check_ledger, "elevenlabs": provider.explain_pause}
    state.metrics = metrics.Metrics(
        aliases=["", *configuration.policy.agents],
        read_state=partial(_read_state, provider, warm),
        ledger=metrics.LedgerMetrics(check=check_ledger, read=state.ledger.read_standing, ticks=time.monotonic),
    )
    await state.metrics.update()
    on_failure = partial(_log.error, "metrics.failed")
    updates = run_periodically(metrics.UPDATE_SECONDS, state.metrics.update, on_failure=on_failure)
    await stack.enter_async_context(updates)
    _open_authenticator(stack, state, settings, configuration)
    await _open_passes(stack, state, settings, provider=provider, warm=warm)
    keep_seconds = settings.voicepass_retention_days * 24 * 60 * 60
    await stack.enter_async_context(run_retention(state.ledger, keep_seconds=keep_seconds))


async def open_provider(stack: AsyncExitStack, settings: Settings, configuration: Configuration) -> ElevenLabs:
    """Open the calls to ElevenLabs; `stack` closes them."""
    deadline_seconds = settings.voicepass_deadline_seconds
    provider = ElevenLabs(
        transport=await stack.enter_async_context(http_transport(connect_seconds=deadline_seconds / 4)),
        workspaces=configuration.workspaces,
        deadline_seconds=deadline_seconds,
        max_calls=settings.voicepass_max_calls,
        clock=time.time,
    )
    stack.push_async_callback(provider.aclose)
    return provider


def _open_authenticator(stack: AsyncExitStack, state: State, settings: Settings, configuration: Configuration) -> None:
    trusted = configuration.trusted
    origins = settings.voicepass_allowed_origins
    if not trusted:
        state.authenticator = AppUsers(origins)
        return
    for issuer in trusted:
        if isinstance(issuer.keys, PublishedKeys):
            stack.push_async_callback(issuer.keys.aclose)
    cookie = settings.voicepass_session_cookie
    session = None if cookie is None else SessionCookie(cookie, frozenset(origins))
    state.authenticator = JwtAuthenticator(trusted=trusted, clock=time.time, session=session)
    state.checks["keys"] = state.authenticator.check_keys


async def _open_passes(
    stack: AsyncExitStack, state: State, settings: Settings, *, provider: ElevenLabs, warm: WarmStore | None
) -> None:
    """Open the use case with its observers."""
    traces = await stack.enter_async_context(open_tracing())
    state.passes = Passes(
        authenticator=state.authenticator,
        policy=state.policy,
        provider=warm or provider,
        take_ready=warm.take if warm else lambda _agent, _transport: nullcontext(),
        ledger=state.ledger,
        open_passes=await _open_settlement(stack, state, settings, provider=provider),
        seal=state.seals.seal,
        tells_seconds_left=settings.voicepass_tell_seconds_left,
        observe=partial(notify, [log_attempt, state.metrics.count_attempt, *traces]),
    )
    stack.push_async_callback(state.passes.aclose)


async def _open_settlement(
    stack: AsyncExitStack, state: State, settings: Settings, *, provider: ElevenLabs
) -> OpenPasses:
    """Open the three that learn how long conversations really were: webhook, lookup and reconciler."""
    base_urls = {rules.agent.agent_id: rules.agent.base_url for rules in state.policy.agents.values()}
    settlements = Settlements(
        ledger=state.ledger,
        observe=partial(notify, [log_settlement, state.metrics.count_settlement]),
        bypasses=Bypasses(agent_ids=base_urls.keys(), count=state.metrics.count_bypass),
        clock=time.time,
    )
    state.webhook = Webhook(settlements=settlements, secrets=settings.webhook_secrets, clock=time.time)
    if settings.voicepass_reconcile_seconds:
        reconciler = Reconciler(
            ledger=state.ledger,
            provider=provider,
            settlements=settlements,
            base_urls=base_urls,
            every_seconds=settings.voicepass_reconcile_seconds,
            conversation_seconds=state.policy.conversation_seconds,
            clock=time.time,
        )
        await stack.enter_async_context(reconciler.run())
    open_passes = OpenPasses(
        ledger=state.ledger,
        provider=provider,
        settlements=settlements,
        seals=state.seals,
        base_urls=base_urls,
        deadline_seconds=settings.voicepass_deadline_seconds,
        clock=time.time,
        ticks=time.monotonic,
    )
    stack.push_async_callback(open_passes.aclose)
    return open_passes


def _read_state(provider: ElevenLabs, warm: WarmStore | None) -> metrics.Samples:
    for labels, is_open in provider.breakers.items():
        yield "breaker_open", labels, is_open
    yield "calls_in_flight", (), provider.bulkhead.in_flight
    yield "calls_under_way", (), provider.bulkhead.in_flight
    yield "calls_waiting", (), provider.bulkhead.waiting
    for alias, held in warm.held.items() if warm else ():
        yield "warm_held", (alias,), held


@contextmanager
def _collect_rarely() -> Iterator[None]:
    """Let Python collect garbage less often, and skip the objects that the service consists of.

    A pass leaves hardly any garbage, but each collection visits all objects in flight: with 500 connections it took a
    quarter of the time.
    """
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(COLLECT_EVERY, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
