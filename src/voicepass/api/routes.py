"""The routes: each reads its request, calls the use case, and shows the result."""

from typing import Annotated

from fastapi import APIRouter, Body, Depends, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from voicepass.api.schemas import ConversationTokenPass, PassBody, SignedUrlPass, pass_refusals
from voicepass.errors import RequestInvalid
from voicepass.model import PassRequest, Transport, VoicePass
from voicepass.passes import Passes


def _asked_by_query(request: Request, query: Annotated[PassBody, Depends()]) -> PassBody:
    """Read `?agent=…` and nothing else: another key or a second `agent` is a mistake or an attempt to smuggle."""
    given = request.query_params.multi_items()
    if any(key != "agent" for key, _ in given) or len(given) > 1:
        raise RequestInvalid("Send no query parameter but one 'agent' (an alias), or none at all.")
    return query


def _asked_by_body(body: Annotated[PassBody | None, Body()] = None) -> PassBody:
    return body or PassBody()


ByQuery = Annotated[PassBody, Depends(_asked_by_query)]
ByBody = Annotated[PassBody, Depends(_asked_by_body)]


async def _issue(request: Request, asked: PassBody, transport: Transport) -> VoicePass:
    passes: Passes = request.app.state.passes
    return await passes.issue(
        PassRequest(
            request_id=request.state.request_id,
            authorization=tuple(request.headers.getlist("authorization")),
            alias=asked.agent,
            transport=transport,
        )
    )


pass_routes = APIRouter(prefix="/v1", tags=["passes"], responses=pass_refusals())


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


operation_routes = APIRouter(tags=["operations"])


@operation_routes.get("/healthz", summary="The process is alive")
async def healthz() -> dict[str, str]:
    """Look at nothing else: a restart does not mend a dependency."""
    return {"status": "ok"}


@operation_routes.get("/readyz", summary="The service can hand out passes")
async def readyz(request: Request) -> dict[str, str]:
    """Ask the ledger. ElevenLabs is not asked: its outage is no reason to send users to no instance at all."""
    await request.app.state.ledger.check()
    return {"status": "ready", "ledger": "ok"}


@operation_routes.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)
