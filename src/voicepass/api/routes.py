"""What users, their browsers and ElevenLabs call: passes, usage, client.js, the webhook."""

import hashlib
import re
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.resources import files
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader, HTTPBearer
from pydantic import BaseModel, ValidationError
from starlette.routing import Route
from starlette.types import Receive, Send
from starlette.types import Scope as ASGIScope

from voicepass.api.middleware import WEBHOOK_PATH, Fields, webhook_signature
from voicepass.api.schemas import ConversationTokenPass, PassBody, SignedUrlPass, UserUsage, describe_refusals
from voicepass.errors import RequestInvalid, UnsupportedMediaType
from voicepass.model import DEFAULT_ALIAS, Credentials, PassRequest, Scope, Transport, VoicePass
from voicepass.passes import Passes

APP_USER: Final = "voicepass.app_user"
"""The key of the ASGI scope for the user whom the app around voicepass found."""

PassEndpoint = Callable[[Request, PassBody | None], Awaitable[BaseModel]]

_JSON: Final = re.compile(r"application/([a-z0-9.-]+\+)?json", re.ASCII)


class PassRoute(APIRoute):
    """A route of a pass. FastAPI finds and documents it. This class reads the request and makes the answer.

    FastAPI's dependencies and encoding took half of the time of a pass in this process.
    """

    def __init__(self, path: str, endpoint: PassEndpoint, **options: Any) -> None:  # noqa: ANN401 - as the framework takes them
        super().__init__(path, endpoint, **options)

        async def respond(scope: ASGIScope, receive: Receive, send: Send) -> None:
            request = Request(scope, receive, send)
            try:
                asked = _parse_body(request) if request.method == "POST" else _parse_query(request)
            except ValidationError:
                raise RequestInvalid from None  # the error repeats what the caller sent
            answer = await endpoint(request, asked)
            await Response(answer.model_dump_json(), media_type="application/json")(scope, receive, send)

        self.app = respond


# These describe the OpenAPI document only. The use cases check the credentials.
USER_TOKEN = HTTPBearer(auto_error=False, scheme_name="user", bearerFormat="JWT", description="A signed-in user's JWT.")
SIGNATURE = APIKeyHeader(
    name="ElevenLabs-Signature", auto_error=False, scheme_name="signature", description="`t=…,v0=…`, by ElevenLabs."
)

OF_USERS: Final[dict[str, Any]] = {"prefix": "/v1", "tags": ["passes"], "dependencies": [Depends(USER_TOKEN)]}
pass_routes = APIRouter(**OF_USERS, responses=describe_refusals("pass"), route_class=PassRoute)
user_routes = APIRouter(**OF_USERS, responses=describe_refusals("usage"))

InQuery = Annotated[PassBody, Query()]


@pass_routes.post("/signed-url", summary="A pass for the WebSocket")
async def post_signed_url(request: Request, asked: PassBody | None = None) -> SignedUrlPass:
    return SignedUrlPass.of(await _issue(request, asked, Transport.WEBSOCKET))


@pass_routes.get("/signed-url", summary="A pass for the WebSocket, for curl")
async def get_signed_url(request: Request, asked: InQuery) -> SignedUrlPass:
    return SignedUrlPass.of(await _issue(request, asked, Transport.WEBSOCKET))


@pass_routes.post("/conversation-token", summary="A pass for WebRTC")
async def post_conversation_token(request: Request, asked: PassBody | None = None) -> ConversationTokenPass:
    return ConversationTokenPass.of(await _issue(request, asked, Transport.WEBRTC))


@pass_routes.get("/conversation-token", summary="A pass for WebRTC, for curl")
async def get_conversation_token(request: Request, asked: InQuery) -> ConversationTokenPass:
    return ConversationTokenPass.of(await _issue(request, asked, Transport.WEBRTC))


async def _issue(request: Request, asked: PassBody | None, transport: Transport) -> VoicePass:
    request.state.is_attempt = True
    passes: Passes = request.app.state.passes
    return await passes.issue(
        PassRequest(
            **request.state.ids,
            credentials=read_credentials(request),
            alias=asked.agent if asked else DEFAULT_ALIAS,
            transport=transport,
            client=request.state.client,
            traceparent=_first(request.state.fields, "traceparent"),
        )
    )


def _parse_query(request: Request) -> PassBody:
    """Parse `?agent=…`. Another key or a second `agent` is refused, because it is a mistake or an attack."""
    parameters = request.query_params.multi_items()
    if any(key != "agent" for key, _ in parameters) or len(parameters) > 1:
        raise RequestInvalid("Send no query parameter but one 'agent' (an alias), or none at all.")
    return PassBody.model_validate(dict(parameters))


def _parse_body(request: Request) -> PassBody | None:
    """Parse a JSON body, or none. A form is refused: any page can send one together with the user's cookie."""
    body: bytes = request.state.body
    if not body:
        return None
    fields: Fields = request.state.fields
    media_type = _media_type(fields)
    if "authorization" not in fields and media_type != "application/json":
        raise UnsupportedMediaType
    if media_type is None or not _JSON.fullmatch(media_type):
        raise RequestInvalid
    return None if body.strip() == b"null" else PassBody.model_validate_json(body)


def read_credentials(request: Request, *, is_read: bool = False) -> Credentials:
    """Return everything in a request that may show who sent it."""
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


@user_routes.get("/usage", summary="The user's own limits")
async def get_usage(request: Request) -> UserUsage:
    """Return what the signed-in user has used, what remains, and when that changes."""
    user = await request.app.state.authenticator.authenticate(read_credentials(request, is_read=True))
    plan = request.app.state.policy.plan_for(user)
    limits = [limit for limit in plan.limits if limit.scope is Scope.USER]
    return UserUsage.of(user, plan.name, await request.app.state.ledger.usage(user, limits))


webhook_routes = APIRouter(tags=["webhooks"], responses=describe_refusals("webhook"), dependencies=[Depends(SIGNATURE)])


@webhook_routes.post(WEBHOOK_PATH, summary="What a conversation used, as ElevenLabs reports it")
async def post_webhook(request: Request) -> dict[str, str]:
    """Receive a post-call webhook. A repeated event, or one that voicepass does not use, is also answered with 200."""
    signature = webhook_signature(request.state.fields)
    await request.app.state.webhook.receive(signature=signature, body=request.state.body)
    return {"status": "received"}


def _serve_file(name: str, media_type: str, request: Request) -> Response:
    """Serve client.js or its types. A page of a listed origin can import client.js; people read or save the types."""
    content = files(__package__).joinpath(name).read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    # Unlike all other answers it may be stored, because it is the same for everyone. The browser asks about it each
    # time, so that a page never runs the client of another release.
    headers = {"Cache-Control": "public, no-cache", "ETag": etag}
    # A compressing proxy adds W/ in front of it, and no browser sends `*` (RFC 9110, section 13.1.2).
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=media_type, headers=headers)


client_routes: Final = [
    Route(f"/v1/{name}", partial(_serve_file, name, media_type), include_in_schema=False)
    for name, media_type in (("client.js", "text/javascript"), ("client.d.ts", "text/plain"))
]
