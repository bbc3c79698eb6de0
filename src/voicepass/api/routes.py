"""The routes. Each one reads its request, calls the use case, and returns the result."""

import re
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from http import HTTPStatus
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from starlette.types import Receive, Send
from starlette.types import Scope as ASGIScope

from voicepass.api.middleware import WEBHOOK_PATH, Fields, webhook_signature
from voicepass.api.problems import request_ids
from voicepass.api.readiness import run_checks
from voicepass.api.schemas import (
    BY_BODY,
    BY_QUERY,
    OF_A_CONVERSATION,
    OF_A_PASS,
    OF_A_USER,
    OF_A_WEBHOOK,
    OF_READINESS,
    BlockBody,
    ConversationTokenPass,
    IssuedConversation,
    PassBody,
    Ready,
    SignedUrlPass,
    UserUsage,
    describe_pass_route,
    describe_refusals,
)
from voicepass.errors import RequestInvalid, ShuttingDown, UnsupportedMediaType
from voicepass.model import Block, Credentials, IssuedPass, PassRequest, Scope, Transport
from voicepass.passes import Passes
from voicepass.telemetry.logger import Logger

APP_USER: Final = "voicepass.app_user"
"""The key of the ASGI scope for the user whom the app around voicepass found."""

_JSON: Final = re.compile(r"application/([a-z0-9.-]+\+)?json", re.ASCII)

_log = Logger("voicepass.api")


class PlainRoute(APIRoute):
    """A route that reads its request and makes its response itself. FastAPI finds it and documents it.

    FastAPI's dependencies and encoding took half of the time of a pass in this process.
    """

    def __init__(self, path: str, endpoint: Callable[[Request], Awaitable[Response]], **options: Any) -> None:  # noqa: ANN401 - as the framework takes them
        super().__init__(path, endpoint, **options)

        async def respond(scope: ASGIScope, receive: Receive, send: Send) -> None:
            response = await endpoint(Request(scope, receive, send))
            await response(scope, receive, send)

        self.app = respond


pass_routes = APIRouter(prefix="/v1", tags=["passes"], responses=describe_refusals(*OF_A_PASS), route_class=PlainRoute)


@pass_routes.post("/signed-url", summary="A pass for the WebSocket", **describe_pass_route(SignedUrlPass, BY_BODY))
async def post_signed_url(request: Request) -> Response:
    return await _issue(request, Transport.WEBSOCKET)


@pass_routes.get(
    "/signed-url", summary="A pass for the WebSocket, for curl", **describe_pass_route(SignedUrlPass, BY_QUERY)
)
async def get_signed_url(request: Request) -> Response:
    return await _issue(request, Transport.WEBSOCKET)


@pass_routes.post(
    "/conversation-token", summary="A pass for WebRTC", **describe_pass_route(ConversationTokenPass, BY_BODY)
)
async def post_conversation_token(request: Request) -> Response:
    return await _issue(request, Transport.WEBRTC)


@pass_routes.get(
    "/conversation-token", summary="A pass for WebRTC, for curl", **describe_pass_route(ConversationTokenPass, BY_QUERY)
)
async def get_conversation_token(request: Request) -> Response:
    return await _issue(request, Transport.WEBRTC)


async def _issue(request: Request, transport: Transport) -> Response:
    try:
        body = _parse_body(request) if request.method == "POST" else _parse_query(request)
    except ValidationError:
        raise RequestInvalid from None  # the error repeats what the caller sent
    passes: Passes = request.app.state.passes
    request.state.is_attempt = True
    voice_pass = await passes.issue(
        PassRequest(
            **request_ids(request),
            credentials=_read_credentials(request),
            alias=body.agent,
            transport=transport,
            client=request.state.client,
            traceparent=_first(request.state.fields, "traceparent"),
        )
    )
    answer = SignedUrlPass if transport is Transport.WEBSOCKET else ConversationTokenPass
    return Response(answer.of(voice_pass).model_dump_json(), media_type="application/json")


def _parse_query(request: Request) -> PassBody:
    """Parse `?agent=…`. Another key or a second `agent` is refused, because it is a mistake or an attack."""
    parameters = request.query_params.multi_items()
    if any(key != "agent" for key, _ in parameters) or len(parameters) > 1:
        raise RequestInvalid("Send no query parameter but one 'agent' (an alias), or none at all.")
    return PassBody.model_validate(dict(parameters))


def _parse_body(request: Request) -> PassBody:
    """Parse a JSON body, or none. A form is refused: any page can send one together with the user's cookie."""
    body: bytes = request.state.body
    if not body:
        return PassBody()
    fields: Fields = request.state.fields
    media_type = _media_type(fields)
    if "authorization" not in fields and media_type != "application/json":
        raise UnsupportedMediaType
    if media_type is None or not _JSON.fullmatch(media_type):
        raise RequestInvalid
    return PassBody() if body.strip() == b"null" else PassBody.model_validate_json(body)


def _read_credentials(request: Request, *, is_read: bool = False) -> Credentials:
    fields: Fields = request.state.fields
    return Credentials(
        authorization=tuple(fields.get("authorization", ())),
        cookies=tuple(fields.get("cookie", ())),
        is_post=request.method == "POST",
        is_read=is_read,
        origin=_first(fields, "origin"),
        fetch_site=_first(fields, "sec-fetch-site"),
        scheme=request.scope.get("scheme", "http"),
        host=_first(fields, "host"),
        media_type=_media_type(fields),
        app_user=request.scope.get(APP_USER),
    )


def _media_type(fields: Fields) -> str | None:
    return (_first(fields, "content-type") or "").partition(";")[0].strip().lower() or None


def _first(fields: Fields, name: str) -> str | None:
    return fields[name][0] if name in fields else None


# These three only describe the OpenAPI document. The use cases check the credentials.
USER_TOKEN = HTTPBearer(auto_error=False, scheme_name="user", bearerFormat="JWT", description="A signed-in user's JWT.")
SERVICE_TOKEN = HTTPBearer(auto_error=False, scheme_name="service", description="One of VOICEPASS_SERVICE_TOKENS.")
SIGNATURE = APIKeyHeader(
    name="ElevenLabs-Signature", auto_error=False, scheme_name="signature", description="`t=…,v0=…`, by ElevenLabs."
)

user_routes = APIRouter(
    prefix="/v1", tags=["passes"], responses=describe_refusals(*OF_A_USER), dependencies=[Depends(USER_TOKEN)]
)


@user_routes.get("/usage", summary="The user's own limits")
async def get_usage(request: Request) -> UserUsage:
    """Return what the signed-in user has used, what remains, and when that changes."""
    user = await request.app.state.authenticator.authenticate(_read_credentials(request, is_read=True))
    plan = request.app.state.policy.plan_for(user)
    limits = [limit for limit in plan.limits if limit.scope is Scope.USER]
    return UserUsage.of(user, plan.name, await request.app.state.ledger.usage(user, limits))


async def _check_service_token(request: Request) -> None:
    request.state.service_token = request.app.state.service_tokens.check(_read_credentials(request))


FOR_BACKENDS: Final[dict[str, Any]] = {
    "prefix": "/v1",
    "tags": ["backends"],
    "responses": describe_refusals(*OF_A_CONVERSATION),
    "dependencies": [Depends(SERVICE_TOKEN), Depends(_check_service_token)],
}
backend_routes = APIRouter(**FOR_BACKENDS)
block_routes = APIRouter(**FOR_BACKENDS)

ConversationId = Annotated[
    str, Path(pattern="^[^\\x00]{1,128}$", description="As in the pass, or `system__conversation_id`.")
]


@backend_routes.get("/conversations/{conversation_id}", summary="To whom this conversation was issued")
async def get_conversation(request: Request, conversation_id: ConversationId) -> IssuedConversation:
    """Tell an agent's tool or a webhook's receiver, which holds a service token, to whom it was issued."""
    state = request.app.state
    issued: IssuedPass = await state.ledger.find_pass(conversation_id)
    limits = state.policy.limits_of(issued.plan)
    seconds_left = await state.ledger.read_seconds_left(limits, conversation_id=conversation_id)
    _log.info(
        "conversation.read",
        conversation_id=issued.conversation_id,
        user_id=issued.user_id,
        token_issuer=issued.token_issuer,
        **describe_backend(request),
    )
    return IssuedConversation.of(issued, seconds_left=seconds_left)


@block_routes.post("/blocks", summary="Switch passes off", status_code=HTTPStatus.NO_CONTENT)
async def post_block(request: Request, body: BlockBody) -> None:
    """Give no more passes to a user, for an agent, or to anyone: at once, on every instance."""
    block = Block(**body.model_dump())
    await request.app.state.ledger.block(block)
    _log.warning("block.set", **asdict(block), **describe_backend(request))


@block_routes.delete("/blocks", summary="Switch passes on again", status_code=HTTPStatus.NO_CONTENT)
async def delete_block(request: Request, body: BlockBody) -> None:
    block = Block(**body.model_dump())
    await request.app.state.ledger.unblock(block)
    _log.warning("block.removed", **asdict(block), **describe_backend(request))


def describe_backend(request: Request) -> dict[str, Any]:
    """Return which backend sent a request, by the name of its token, and from where."""
    return {"service_token": request.state.service_token, "client": request.state.client, **request_ids(request)}


webhook_routes = APIRouter(
    tags=["webhooks"], responses=describe_refusals(*OF_A_WEBHOOK), dependencies=[Depends(SIGNATURE)]
)


@webhook_routes.post(WEBHOOK_PATH, summary="What a conversation used, as ElevenLabs reports it")
async def post_webhook(request: Request) -> dict[str, str]:
    """Receive a post-call webhook. A repeated event, or one that voicepass does not use, is also answered with 200."""
    signature = webhook_signature(request.state.fields)
    await request.app.state.webhook.receive(signature=signature, body=request.state.body)
    return {"status": "received"}


probe_routes = APIRouter(tags=["operations"], responses=describe_refusals())


@probe_routes.head("/healthz", include_in_schema=False)
@probe_routes.get("/healthz", summary="The process is alive")
async def healthz() -> dict[str, str]:
    """Check nothing else: a restart does not repair a dependency."""
    return {"status": "ok"}


@probe_routes.head("/readyz", include_in_schema=False)
@probe_routes.get("/readyz", summary="The service can hand out passes", responses=describe_refusals(*OF_READINESS))
async def readyz(request: Request) -> Ready:
    """Run the cheap checks. None calls ElevenLabs: during its outage, another instance would help no user."""
    if request.app.state.draining.has_begun:
        raise ShuttingDown
    outcomes = await run_checks(request.app.state.checks)
    return Ready(status="ready", ledger=outcomes["ledger"], checks=outcomes)


metrics_routes = APIRouter(tags=["operations"], responses=describe_refusals())


@metrics_routes.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    return Response(await request.app.state.metrics.text(), media_type=CONTENT_TYPE_LATEST)
