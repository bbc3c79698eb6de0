"""The routes: each reads its request, calls the use case, and shows the result."""

from http import HTTPStatus
from typing import Annotated

import structlog
from fastapi import APIRouter, Body, Depends, Path, Request, Response
from fastapi.security import APIKeyHeader, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from voicepass.api.middleware import WEBHOOK_PATH
from voicepass.api.schemas import (
    OF_A_CONVERSATION,
    OF_A_PASS,
    OF_A_USER,
    OF_A_WEBHOOK,
    BlockBody,
    ConversationTokenPass,
    IssuedConversation,
    PassBody,
    SignedUrlPass,
    UserUsage,
    refusals,
)
from voicepass.errors import LedgerUnavailable, RequestInvalid, UnsupportedMediaType
from voicepass.model import Block, Credentials, PassRequest, Scope, Transport, VoicePass
from voicepass.passes import Passes

_log = structlog.get_logger("voicepass.api")


def _asked_by_query(request: Request, query: Annotated[PassBody, Depends()]) -> PassBody:
    """Read `?agent=…` and nothing else: another key or a second `agent` is a mistake or an attempt to smuggle."""
    given = request.query_params.multi_items()
    if any(key != "agent" for key, _ in given) or len(given) > 1:
        raise RequestInvalid("Send no query parameter but one 'agent' (an alias), or none at all.")
    return query


async def _says_it_is_json(request: Request) -> None:
    """Refuse a form, or a body like a form's, before it is read: only a cookie can vouch for what has no header."""
    if "authorization" not in request.headers and _media_type(request) != "application/json" and await request.body():
        raise UnsupportedMediaType


def _asked_by_body(
    _: Annotated[None, Depends(_says_it_is_json)], body: Annotated[PassBody | None, Body()] = None
) -> PassBody:
    return body or PassBody()


ByQuery = Annotated[PassBody, Depends(_asked_by_query)]
ByBody = Annotated[PassBody, Depends(_asked_by_body)]


def _credentials(request: Request) -> Credentials:
    headers = request.headers
    return Credentials(
        authorization=tuple(headers.getlist("authorization")),
        cookies=tuple(headers.getlist("cookie")),
        is_post=request.method == "POST",
        origin=headers.get("origin"),
        fetch_site=headers.get("sec-fetch-site"),
        host=headers.get("host"),
        media_type=_media_type(request),
    )


def _media_type(request: Request) -> str | None:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() or None


async def _issue(request: Request, asked: PassBody, transport: Transport) -> VoicePass:
    passes: Passes = request.app.state.passes
    request.state.is_attempt = True
    return await passes.issue(
        PassRequest(
            request_id=request.state.request_id,
            credentials=_credentials(request),
            alias=asked.agent,
            transport=transport,
            client=request.state.client,
        )
    )


# These only tell the OpenAPI document; what a token must be is checked by the use case.
USER_TOKEN = HTTPBearer(auto_error=False, scheme_name="user", bearerFormat="JWT", description="A signed-in user's JWT.")
SERVICE_TOKEN = HTTPBearer(auto_error=False, scheme_name="service", description="One of VOICEPASS_SERVICE_TOKENS.")

pass_routes = APIRouter(
    prefix="/v1", tags=["passes"], responses=refusals(*OF_A_PASS), dependencies=[Depends(USER_TOKEN)]
)


@pass_routes.post("/signed-url", summary="A pass for the WebSocket")
async def post_signed_url(request: Request, asked: ByBody) -> SignedUrlPass:
    return SignedUrlPass.of(await _issue(request, asked, Transport.WEBSOCKET))


@pass_routes.get("/signed-url", summary="A pass for the WebSocket, for curl")
async def get_signed_url(request: Request, asked: ByQuery) -> SignedUrlPass:
    return SignedUrlPass.of(await _issue(request, asked, Transport.WEBSOCKET))


@pass_routes.post("/conversation-token", summary="A pass for WebRTC")
async def post_conversation_token(request: Request, asked: ByBody) -> ConversationTokenPass:
    return ConversationTokenPass.of(await _issue(request, asked, Transport.WEBRTC))


@pass_routes.get("/conversation-token", summary="A pass for WebRTC, for curl")
async def get_conversation_token(request: Request, asked: ByQuery) -> ConversationTokenPass:
    return ConversationTokenPass.of(await _issue(request, asked, Transport.WEBRTC))


@pass_routes.get("/usage", summary="Where the user stands", responses=refusals(*OF_A_USER))
async def get_usage(request: Request) -> UserUsage:
    """Tell the signed-in user what is used, what is left, and when that changes."""
    user = await request.app.state.authenticator.authenticate(_credentials(request))
    limits = [limit for limit in request.app.state.policy.limits if limit.scope is Scope.USER]
    return UserUsage.of(user, await request.app.state.ledger.usage(user, limits))


async def _from_a_backend(request: Request) -> None:
    request.app.state.service_tokens.check(_credentials(request))


backend_routes = APIRouter(
    prefix="/v1",
    tags=["backends"],
    responses=refusals(*OF_A_CONVERSATION),
    dependencies=[Depends(SERVICE_TOKEN), Depends(_from_a_backend)],
)

ConversationId = Annotated[
    str, Path(pattern="^[^\\x00]{1,128}$", description="As in the pass, or `system__conversation_id`.")
]


@backend_routes.get("/conversations/{conversation_id}", summary="Whose conversation this is")
async def get_conversation(request: Request, conversation_id: ConversationId) -> IssuedConversation:
    """Tell an agent's tool or a webhook's receiver, which holds a service token, to whom it was issued."""
    return IssuedConversation.of(await request.app.state.ledger.issued(conversation_id))


@backend_routes.post("/blocks", summary="Switch passes off", status_code=HTTPStatus.NO_CONTENT)
async def post_block(request: Request, body: BlockBody) -> None:
    """Give no more passes to a user, for an agent, or to anyone: at once, on every instance."""
    blocked = Block(**body.model_dump())
    await request.app.state.ledger.block(blocked)
    _log.warning("block.set", **_told(blocked), request_id=request.state.request_id, client=request.state.client)


@backend_routes.delete("/blocks", summary="Switch passes on again", status_code=HTTPStatus.NO_CONTENT)
async def delete_block(request: Request, body: BlockBody) -> None:
    blocked = Block(**body.model_dump())
    await request.app.state.ledger.unblock(blocked)
    _log.warning("block.removed", **_told(blocked), request_id=request.state.request_id, client=request.state.client)


def _told(blocked: Block) -> dict[str, str]:
    return {"kind": blocked.kind.value, "key": blocked.key, "token_issuer": blocked.token_issuer}


SIGNATURE = APIKeyHeader(
    name="ElevenLabs-Signature", auto_error=False, scheme_name="signature", description="`t=…,v0=…`, by ElevenLabs."
)
webhook_routes = APIRouter(tags=["webhooks"], responses=refusals(*OF_A_WEBHOOK), dependencies=[Depends(SIGNATURE)])


@webhook_routes.post(WEBHOOK_PATH, summary="What a conversation used, as ElevenLabs tells it")
async def post_webhook(request: Request) -> dict[str, str]:
    """Take in a post-call webhook. An event that was there before, or is of no use here, is a good one too."""
    # Two headers read as one with a comma and a space between them, which no signature may hold.
    signature = ", ".join(request.headers.getlist("elevenlabs-signature"))
    await request.app.state.webhook.receive(signature=signature, body=await request.body())
    return {"status": "received"}


operation_routes = APIRouter(tags=["operations"], responses=refusals())


@operation_routes.get("/healthz", summary="The process is alive")
async def healthz() -> dict[str, str]:
    """Look at nothing else: a restart does not mend a dependency."""
    return {"status": "ok"}


@operation_routes.get("/readyz", summary="The service can hand out passes", responses=refusals(LedgerUnavailable))
async def readyz(request: Request) -> dict[str, str]:
    """Ask the ledger. ElevenLabs is not asked: its outage is no reason to send users to no instance at all."""
    await request.app.state.ledger.check()
    return {"status": "ready", "ledger": "ok"}


@operation_routes.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)
