"""What operators and their backends call: conversations, blocks, extensions, probes, metrics; and on which port."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from voicepass.api.routes import read_credentials
from voicepass.api.schemas import (
    BlockBody,
    Extended,
    ExtendedUser,
    Extensions,
    IssuedConversation,
    Ready,
    UserExtension,
    describe_refusals,
)
from voicepass.errors import LedgerUnavailable, NotFound, NotStarted, Refusal, ShuttingDown
from voicepass.ledger.extensions import Extension, extend, list_extensions, revoke
from voicepass.model import Block, IssuedPass, MonotonicClock
from voicepass.telemetry.logger import Logger

CHECK_SECONDS: Final = 2.0
"""Short enough for a probe every five seconds, and long enough that many probes cost the ledger few writes."""

Check = Callable[[], Awaitable[str | None]]
"""Raises the Refusal that users would get, or returns a sentence if only some of them would get one."""

_log = Logger("voicepass.api")


async def _check_service_token(request: Request) -> None:
    request.state.service_token = request.app.state.service_tokens.check(read_credentials(request))


_BEARER: Final = HTTPBearer(auto_error=False, scheme_name="service", description="One of VOICEPASS_SERVICE_TOKENS.")
_OF_BACKENDS: Final[dict[str, Any]] = {
    "prefix": "/v1",
    "tags": ["backends"],
    "responses": describe_refusals("backend"),
    "dependencies": [Depends(_BEARER), Depends(_check_service_token)],  # the first only for the OpenAPI document
}
_OPERATIONS: Final[dict[str, Any]] = {"tags": ["operations"], "responses": describe_refusals("any")}
conversation_routes = APIRouter(**_OF_BACKENDS)
block_routes = APIRouter(**_OF_BACKENDS)
probe_routes = APIRouter(**_OPERATIONS)
metrics_routes = APIRouter(**_OPERATIONS)

ConversationId = Annotated[
    str, Path(pattern="^[^\\x00]{1,128}$", description="As in the pass, or `system__conversation_id`.")
]


@conversation_routes.get("/conversations/{conversation_id}", summary="To whom this conversation was issued")
async def get_conversation(request: Request, conversation_id: ConversationId) -> IssuedConversation:
    """Return to whom it was issued. An agent's tool or a webhook's receiver asks this with a service token."""
    state = request.app.state
    issued: IssuedPass = await state.ledger.find_pass(conversation_id)
    limits = state.policy.limits_of(issued.plan)
    seconds_left = await state.ledger.read_seconds_left(limits, conversation_id=conversation_id)
    whose = {"conversation_id": issued.conversation_id, "user_id": issued.user_id, "token_issuer": issued.token_issuer}
    _log.info("conversation.read", **whose, **_describe_sender(request))
    return IssuedConversation.of(issued, seconds_left=seconds_left)


@block_routes.post("/blocks", summary="Switch passes off", status_code=HTTPStatus.NO_CONTENT)
async def post_block(request: Request, body: BlockBody) -> None:
    """Give no more passes to a user, for an agent, or to anyone: at once, on every instance."""
    block = Block(**body.model_dump())
    await request.app.state.ledger.block(block)
    _log.warning("block.set", **asdict(block), **_describe_sender(request))


@block_routes.delete("/blocks", summary="Switch passes on again", status_code=HTTPStatus.NO_CONTENT)
async def delete_block(request: Request, body: BlockBody) -> None:
    block = Block(**body.model_dump())
    await request.app.state.ledger.unblock(block)
    _log.warning("block.removed", **asdict(block), **_describe_sender(request))


@block_routes.post("/extensions", summary="Give one user more minutes")
async def post_extension(request: Request, body: UserExtension) -> Extended:
    """Add minutes to each of the user's limits of minutes, in place of an earlier extension of this user."""
    extension = Extension(**body.model_dump() | {"ends_at": body.ends_at.timestamp()})
    is_known_user = await request.app.state.ledger.run(partial(extend, extension=extension))
    _log.warning("extension.set", **body.model_dump(mode="json"), **_describe_sender(request))
    return Extended(is_known_user=is_known_user)


@block_routes.get("/extensions", summary="All extensions that have not ended")
async def get_extensions(request: Request) -> Extensions:
    """Return them in the order in which they end."""
    extensions = await request.app.state.ledger.run(list_extensions)
    return Extensions.model_validate({"extensions": [asdict(extension) for extension in extensions]})


@block_routes.delete("/extensions", summary="End the extension of one user", status_code=HTTPStatus.NO_CONTENT)
async def delete_extension(request: Request, body: ExtendedUser) -> None:
    """End it at once, on every instance. It is no error if the user has none."""
    await request.app.state.ledger.run(partial(revoke, user_id=body.user_id, token_issuer=body.token_issuer))
    _log.warning("extension.removed", **body.model_dump(), **_describe_sender(request))


def _describe_sender(request: Request) -> dict[str, Any]:
    """Return which backend sent a request, by the name of its token, and from where."""
    return {"service_token": request.state.service_token, "client": request.state.client, **request.state.ids}


@probe_routes.head("/healthz", include_in_schema=False)
@probe_routes.get("/healthz", summary="The process is alive")
async def healthz() -> dict[str, str]:
    """Check nothing else: a restart does not repair a dependency."""
    return {"status": "ok"}


@probe_routes.head("/readyz", include_in_schema=False)
@probe_routes.get("/readyz", summary="The service can hand out passes", responses=describe_refusals("readiness"))
async def readyz(request: Request) -> Ready:
    """Run the cheap checks. None calls ElevenLabs: during its outage, another instance would help no user."""
    if request.app.state.draining.has_begun:
        raise ShuttingDown
    outcomes = await run_checks(request.app.state.checks)
    return Ready(status="ready", ledger=outcomes["ledger"], checks=outcomes)


async def run_checks(checks: Mapping[str, Check]) -> dict[str, str]:
    """Return each check's outcome: `ok`, or what is missing. Raises the first Refusal, which has all outcomes."""
    results = await asyncio.gather(*(check() for check in checks.values()), return_exceptions=True)
    outcomes = {"settings": "ok"}  # voicepass does not start with wrong settings
    for name, result in zip(checks, results, strict=True):
        outcomes[name] = "failed" if isinstance(result, BaseException) else result or "ok"
    for result in results:
        if isinstance(result, Refusal):
            raise type(result)(operator_note=result.operator_note, checks=outcomes) from result
        if isinstance(result, BaseException):
            raise result
    return outcomes


@dataclass(kw_only=True, eq=False)
class LedgerCheck:
    """Checks the ledger at most once in two seconds. A caller in between gets the last outcome.

    `check` raises LedgerUnavailable.
    """

    check: Callable[[], Awaitable[None]]
    ticks: MonotonicClock
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    _fresh_until: float = field(default=float("-inf"), init=False)
    _failure: LedgerUnavailable | None = field(default=None, init=False)

    async def __call__(self) -> None:
        """Raise LedgerUnavailable if no pass can be written."""
        async with self._lock:
            if self.ticks() >= self._fresh_until:
                try:
                    await self.check()
                    self._failure = None
                except LedgerUnavailable as refusal:
                    self._failure = refusal
                self._fresh_until = self.ticks() + CHECK_SECONDS
            failure = self._failure
        if failure is not None:  # a new one for each caller, because a raise adds to the exception's traceback
            raise LedgerUnavailable(operator_note=failure.operator_note) from failure


@metrics_routes.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    return Response(await request.app.state.metrics.render(), media_type=CONTENT_TYPE_LATEST)


ADMIN_ROUTES: Final[Sequence[BaseRoute]] = (*block_routes.routes, *metrics_routes.routes)
"""What end users never call: `serve --admin-port` gives these routes a port of their own."""
_ON_ADMIN_PORT: Final = (*ADMIN_ROUTES, *probe_routes.routes)


@dataclass(eq=False)
class Gate:
    """Plain ASGI, around the routes: raises NotStarted until the services are open.

    With an admin port, it raises NotFound for an admin route on any other port, as for a path that does not exist.
    Besides these routes, the admin port serves only the probes. The port is the one of the connection's own socket,
    which no header changes. If it is unknown, the request is treated as public.
    """

    app: ASGIApp
    admin_port: int | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "http":
            if not hasattr(scope["app"].state, "passes"):
                raise NotStarted
            if self.admin_port is not None and not self._is_on_this_port(scope):
                raise NotFound
        await self.app(scope, receive, send)

    def _is_on_this_port(self, scope: Scope) -> bool:
        _, port = scope.get("server") or (None, None)
        if port == self.admin_port:
            return _matches_any(_ON_ADMIN_PORT, scope)
        return not _matches_any(ADMIN_ROUTES, scope)


def _matches_any(routes: Sequence[BaseRoute], scope: Scope) -> bool:
    # The router's own test, because it also accepts "/metrics\n".
    return any(route.matches(scope)[0] is not Match.NONE for route in routes)
