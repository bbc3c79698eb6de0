"""The routes: each reads its request, calls the use case, and shows the result."""

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any, Final, TypeVar

import structlog
from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from starlette.routing import BaseRoute
from starlette.types import Receive, Send
from starlette.types import Scope as ASGIScope

from voicepass.api.middleware import WEBHOOK_PATH, Fields, webhook_signature
from voicepass.api.problems import request_ids
from voicepass.api.schemas import (
    BY_BODY,
    BY_QUERY,
    OF_A_CONVERSATION,
    OF_A_PASS,
    OF_A_USER,
    OF_A_WEBHOOK,
    BlockBody,
    ConversationTokenPass,
    IssuedConversation,
    PassBody,
    Ready,
    SignedUrlPass,
    UserUsage,
    documented,
    refusals,
)
from voicepass.errors import KeysUnavailable, LedgerUnavailable, RequestInvalid, ShuttingDown, UnsupportedMediaType
from voicepass.model import Block, Credentials, IssuedPass, PassRequest, Scope, Transport
from voicepass.passes import Passes

Asked = TypeVar("Asked", bytes, dict[str, str])

_JSON: Final = re.compile(r"application/([a-z0-9.-]+\+)?json", re.ASCII)

_log = structlog.get_logger("voicepass.api")


def _asked_by_query(request: Request) -> PassBody:
    """Read `?agent=…` and nothing else: another key or a second `agent` is a mistake or an attempt to smuggle."""
    given = request.query_params.multi_items()
    if any(key != "agent" for key, _ in given) or len(given) > 1:
        raise RequestInvalid("Send no query parameter but one 'agent' (an alias), or none at all.")
    return _valid(PassBody.model_validate, dict(given))


def _asked_by_body(request: Request) -> PassBody:
    """Read a JSON body, or none. A form, or what looks like one, is refused: only a cookie vouches for it."""
    body: bytes = request.state.body
    if not body:
        return PassBody()
    fields: Fields = request.state.fields
    media_type = _media_type(fields)
    if "authorization" not in fields and media_type != "application/json":
        raise UnsupportedMediaType
    if media_type is None or not _JSON.fullmatch(media_type):
        raise RequestInvalid
    return PassBody() if body.strip() == b"null" else _valid(PassBody.model_validate_json, body)


def _valid(validate: Callable[[Asked], PassBody], asked: Asked) -> PassBody:
    try:
        return validate(asked)
    except ValidationError:
        raise RequestInvalid from None  # not a word of it: it repeats what was sent


def _credentials(request: Request) -> Credentials:
    fields: Fields = request.state.fields
    return Credentials(
        authorization=tuple(fields.get("authorization", ())),
        cookies=tuple(fields.get("cookie", ())),
        is_post=request.method == "POST",
        origin=_first(fields, "origin"),
        fetch_site=_first(fields, "sec-fetch-site"),
        host=_first(fields, "host"),
        media_type=_media_type(fields),
    )


def _media_type(fields: Fields) -> str | None:
    return (_first(fields, "content-type") or "").partition(";")[0].strip().lower() or None


def _first(fields: Fields, name: str) -> str | None:
    return fields[name][0] if name in fields else None


async def _issue(request: Request, asked: PassBody, transport: Transport) -> Response:
    passes: Passes = request.app.state.passes
    request.state.is_attempt = True
    voice_pass = await passes.issue(
        PassRequest(
            **request_ids(request),
            credentials=_credentials(request),
            alias=asked.agent,
            transport=transport,
            client=request.state.client,
            traceparent=_first(request.state.fields, "traceparent"),
        )
    )
    return Response(_ANSWERS[transport].of(voice_pass).model_dump_json(), media_type="application/json")


_ANSWERS: Final[Mapping[Transport, type[SignedUrlPass | ConversationTokenPass]]] = {
    Transport.WEBSOCKET: SignedUrlPass,
    Transport.WEBRTC: ConversationTokenPass,
}

# These only tell the OpenAPI document; what a token must be is checked by the use case.
USER_TOKEN = HTTPBearer(auto_error=False, scheme_name="user", bearerFormat="JWT", description="A signed-in user's JWT.")
SERVICE_TOKEN = HTTPBearer(auto_error=False, scheme_name="service", description="One of VOICEPASS_SERVICE_TOKENS.")


class PlainRoute(APIRoute):
    """A route that reads its request and words its answer itself; the framework finds it, and documents it.

    Its dependencies, its reading and its encoding were half of the time that a pass took in this process.
    """

    def __init__(self, path: str, endpoint: Callable[[Request], Awaitable[Response]], **options: Any) -> None:  # noqa: ANN401 - as the framework takes them
        super().__init__(path, endpoint, **options)

        async def answer(scope: ASGIScope, receive: Receive, send: Send) -> None:
            response = await endpoint(Request(scope, receive, send))
            await response(scope, receive, send)

        self.app = answer


pass_routes = APIRouter(prefix="/v1", tags=["passes"], responses=refusals(*OF_A_PASS), route_class=PlainRoute)


@pass_routes.post("/signed-url", summary="A pass for the WebSocket", **documented(SignedUrlPass, BY_BODY))
async def post_signed_url(request: Request) -> Response:
    return await _issue(request, _asked_by_body(request), Transport.WEBSOCKET)


@pass_routes.get("/signed-url", summary="A pass for the WebSocket, for curl", **documented(SignedUrlPass, BY_QUERY))
async def get_signed_url(request: Request) -> Response:
    return await _issue(request, _asked_by_query(request), Transport.WEBSOCKET)


@pass_routes.post("/conversation-token", summary="A pass for WebRTC", **documented(ConversationTokenPass, BY_BODY))
async def post_conversation_token(request: Request) -> Response:
    return await _issue(request, _asked_by_body(request), Transport.WEBRTC)


@pass_routes.get(
    "/conversation-token", summary="A pass for WebRTC, for curl", **documented(ConversationTokenPass, BY_QUERY)
)
async def get_conversation_token(request: Request) -> Response:
    return await _issue(request, _asked_by_query(request), Transport.WEBRTC)


user_routes = APIRouter(
    prefix="/v1", tags=["passes"], responses=refusals(*OF_A_USER), dependencies=[Depends(USER_TOKEN)]
)


@user_routes.get("/usage", summary="Where the user stands")
async def get_usage(request: Request) -> UserUsage:
    """Tell the signed-in user what is used, what is left, and when that changes."""
    user = await request.app.state.authenticator.authenticate(_credentials(request))
    limits = [limit for limit in request.app.state.policy.limits if limit.scope is Scope.USER]
    return UserUsage.of(user, await request.app.state.ledger.usage(user, limits))


async def _from_a_backend(request: Request) -> None:
    request.state.service_token = request.app.state.service_tokens.check(_credentials(request))


def _for_backends() -> APIRouter:
    return APIRouter(
        prefix="/v1",
        tags=["backends"],
        responses=refusals(*OF_A_CONVERSATION),
        dependencies=[Depends(SERVICE_TOKEN), Depends(_from_a_backend)],
    )


backend_routes = _for_backends()

ConversationId = Annotated[
    str, Path(pattern="^[^\\x00]{1,128}$", description="As in the pass, or `system__conversation_id`.")
]


@backend_routes.get("/conversations/{conversation_id}", summary="Whose conversation this is")
async def get_conversation(request: Request, conversation_id: ConversationId) -> IssuedConversation:
    """Tell an agent's tool or a webhook's receiver, which holds a service token, to whom it was issued."""
    issued: IssuedPass = await request.app.state.ledger.issued(conversation_id)
    _log.info(
        "conversation.read",
        conversation_id=issued.conversation_id,
        user_id=issued.user_id,
        token_issuer=issued.token_issuer,
        **_asked_by(request),
    )
    return IssuedConversation.of(issued)


block_routes = _for_backends()


@block_routes.post("/blocks", summary="Switch passes off", status_code=HTTPStatus.NO_CONTENT)
async def post_block(request: Request, body: BlockBody) -> None:
    """Give no more passes to a user, for an agent, or to anyone: at once, on every instance."""
    blocked = Block(**body.model_dump())
    await request.app.state.ledger.block(blocked)
    _log.warning("block.set", **_told(blocked), **_asked_by(request))


@block_routes.delete("/blocks", summary="Switch passes on again", status_code=HTTPStatus.NO_CONTENT)
async def delete_block(request: Request, body: BlockBody) -> None:
    blocked = Block(**body.model_dump())
    await request.app.state.ledger.unblock(blocked)
    _log.warning("block.removed", **_told(blocked), **_asked_by(request))


def _asked_by(request: Request) -> dict[str, Any]:
    """Return which backend sent a request, by the name of its token, and from where."""
    return {
        "service_token": request.state.service_token,
        "client": request.state.client,
        **request_ids(request),
    }


def _told(blocked: Block) -> dict[str, str]:
    return {"kind": blocked.kind.value, "key": blocked.key, "token_issuer": blocked.token_issuer}


SIGNATURE = APIKeyHeader(
    name="ElevenLabs-Signature", auto_error=False, scheme_name="signature", description="`t=…,v0=…`, by ElevenLabs."
)
webhook_routes = APIRouter(tags=["webhooks"], responses=refusals(*OF_A_WEBHOOK), dependencies=[Depends(SIGNATURE)])


@webhook_routes.post(WEBHOOK_PATH, summary="What a conversation used, as ElevenLabs tells it")
async def post_webhook(request: Request) -> dict[str, str]:
    """Take in a post-call webhook. An event that was there before, or is of no use here, is a good one too."""
    signature = webhook_signature(request.state.fields)
    await request.app.state.webhook.receive(signature=signature, body=request.state.body)
    return {"status": "received"}


probe_routes = APIRouter(tags=["operations"], responses=refusals())


@probe_routes.get("/healthz", summary="The process is alive")
async def healthz() -> dict[str, str]:
    """Look at nothing else: a restart does not mend a dependency."""
    return {"status": "ok"}


@probe_routes.get(
    "/readyz",
    summary="The service can hand out passes",
    responses=refusals(LedgerUnavailable, KeysUnavailable, ShuttingDown),
)
async def readyz(request: Request) -> Ready:
    """Run the cheap checks. ElevenLabs is not asked: its outage is no reason to send users to no instance at all."""
    if request.app.state.draining.has_begun:
        raise ShuttingDown
    outcomes = await request.app.state.readiness.checked()
    return Ready(status="ready", ledger=outcomes["ledger"], checks=outcomes)


metrics_routes = APIRouter(tags=["operations"], responses=refusals())


@metrics_routes.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    return Response(await request.app.state.metrics.text(), media_type=CONTENT_TYPE_LATEST)


admin_routes: Final[Sequence[BaseRoute]] = (*block_routes.routes, *metrics_routes.routes)
"""What end users never call: `serve --admin-port` gives these routes a port of their own."""
