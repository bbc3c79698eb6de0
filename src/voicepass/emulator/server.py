"""The emulator on the wire: the REST calls, the WebSocket's door, and the control routes under `/_emulator`."""

import base64
import hashlib
import hmac
import json
import secrets
from dataclasses import asdict
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, FastAPI, Header, HTTPException, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from voicepass.emulator import frames
from voicepass.emulator.closings import Closing, Refused
from voicepass.emulator.conversation import Conversation
from voicepass.emulator.faults import Fault
from voicepass.emulator.records import RAW_QUERY, RecordedConversation, Recorder, scrubbed
from voicepass.emulator.service import EmulatedAgent, Emulator, new_conversation_id

_PREFIX = "/v1/convai/conversation"
# A third party's note; the vendor's documentation does not say.
_TOKEN_SECONDS = 10 * 60

ApiKey = Annotated[str | None, Header(alias="xi-api-key")]


class AgentSettings(BaseModel):
    """The body of `PUT /_emulator/agents/{agent_id}`; what is left out takes its default."""

    model_config = ConfigDict(extra="forbid")

    requires_auth: bool = True
    first_message: str = EmulatedAgent.first_message
    tool_variables: frozenset[str] = EmulatedAgent.tool_variables
    allowed_overrides: frozenset[str] = EmulatedAgent.allowed_overrides
    allowed_hosts: frozenset[str] = EmulatedAgent.allowed_hosts


class ClockAdvance(BaseModel):
    """The body of `POST /_emulator/clock`."""

    model_config = ConfigDict(extra="forbid")

    advance_seconds: float = Field(ge=0, allow_inf_nan=False)


def create_emulator(emulator: Emulator) -> FastAPI:
    """Put the emulator on the wire, at the root or mounted under a prefix of another app.

    State lives in `emulator`, in memory: serve it from one process.
    """
    app = FastAPI(title="A pretend ElevenLabs", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(Recorder, records=emulator.records, key_seen=emulator.key_seen, secrets=emulator.api_keys)
    app.include_router(_calls(emulator))
    app.include_router(_door(emulator))
    app.include_router(_control(emulator))
    return app


def _calls(emulator: Emulator) -> APIRouter:
    router = APIRouter()

    @router.get(f"{_PREFIX}/get-signed-url")
    @router.get(f"{_PREFIX}/get_signed_url")  # deprecated by the vendor in May 2025, still served
    async def get_signed_url(
        request: Request, agent_id: str, key: ApiKey = None, *, include_conversation_id: bool = False
    ) -> Response:
        fault = emulator.trouble.take("signed_url")
        if fault and (refusal := await fault.strike(request)):
            return refusal
        _authorise(emulator, agent_id, key, public_needs_key=True)
        forgetful = fault is not None and fault.body == "missing_conversation_id"
        signature, conversation_id = emulator.issue(agent_id, bound=include_conversation_id and not forgetful)
        query = {"agent_id": agent_id, "conversation_signature": signature}
        if conversation_id:
            query["conversation_id"] = conversation_id
        # The id stands in the URL only: the answer has this one member, whatever was asked for.
        answer = {"signed_url": f"{_ws_base(emulator, request)}{_PREFIX}?{urlencode(query)}"}
        return fault.spoil(answer, request) if fault and fault.body else JSONResponse(answer)

    @router.get(f"{_PREFIX}/token")
    async def get_token(
        request: Request, agent_id: str, key: ApiKey = None, participant_name: str | None = None
    ) -> Response:
        """Answer with a token shaped like LiveKit's. No WebRTC server stands behind it: it opens nothing."""
        fault = emulator.trouble.take("token")
        if fault and (refusal := await fault.strike(request)):
            return refusal
        # The JavaScript SDK asks this in the browser, without a key, for agents that need none.
        _authorise(emulator, agent_id, key, public_needs_key=False)
        conversation_id = new_conversation_id()
        token = _livekit_shaped_token(
            agent_id, conversation_id, now=int(emulator.now()), participant=participant_name or "user"
        )
        answer = {"token": token, "conversation_id": conversation_id}
        return fault.spoil(answer, request) if fault and fault.body else JSONResponse(answer)

    return router


def _door(emulator: Emulator) -> APIRouter:
    router = APIRouter()

    @router.websocket(_PREFIX)
    async def converse(websocket: WebSocket) -> None:
        query: dict[str, str] = websocket.scope[RAW_QUERY]
        offered: list[str] = websocket.scope["subprotocols"]
        origin = websocket.headers.get("origin")

        def kept(value: str | None) -> str | None:
            return None if value is None else str(scrubbed(value, secrets=emulator.api_keys))

        record = RecordedConversation(
            agent_id=kept(query.get("agent_id")) or "",
            signed="conversation_signature" in query,
            source=kept(query.get("source")),
            version=kept(query.get("version")),
            origin=kept(origin),
            # With an authorization the JavaScript SDK offers `bearer.<token>` too.
            subprotocols=tuple("bearer.[secret]" if name.startswith("bearer.") else name for name in offered),
        )
        emulator.records.conversations.append(record)
        try:
            # Accepted before it is refused, as by the real service: a browser told 403 learns neither code nor reason.
            # Browsers insist on the subprotocol they offered; the Python SDK offers none and rejects one.
            await websocket.accept(subprotocol="convai" if "convai" in offered else None)
            admission = emulator.admit(query, origin=origin)
            record.conversation_id = admission.conversation_id
            await Conversation(websocket, emulator=emulator, admission=admission, record=record).hold()
        except Refused as refused:
            await _close(websocket, refused.closing, record)
        except WebSocketDisconnect as gone:
            record.closed(gone.code, kept(gone.reason) or "", by="client")

    return router


def _control(emulator: Emulator) -> APIRouter:
    router = APIRouter(prefix="/_emulator")

    @router.get("/requests")
    async def requests() -> dict[str, object]:
        records = emulator.records
        return {
            "calls": [asdict(call) for call in records.calls],
            "conversations": [asdict(conversation) for conversation in records.conversations],
        }

    @router.delete("/requests", status_code=204)
    async def forget() -> None:
        emulator.records.clear()

    @router.put("/faults", status_code=204)
    async def put_fault(fault: Fault) -> None:
        emulator.trouble.put(fault)

    @router.delete("/faults", status_code=204)
    async def clear_faults() -> None:
        emulator.trouble.clear()

    @router.put("/agents/{agent_id}", status_code=204)
    async def put_agent(agent_id: str, settings: AgentSettings) -> None:
        emulator.put_agent(EmulatedAgent(agent_id=agent_id, **settings.model_dump()))

    @router.post("/clock")
    async def advance_clock(body: ClockAdvance) -> dict[str, float]:
        emulator.advance(body.advance_seconds)
        return {"now": emulator.now()}

    return router


async def _close(websocket: WebSocket, closing: Closing, record: RecordedConversation) -> None:
    record.closed(closing.code, closing.reason, by="emulator")
    try:
        if closing.moment == "start":
            await websocket.send_text(json.dumps(frames.error(closing)))
        await websocket.close(closing.code, closing.reason)
    except WebSocketDisconnect:
        pass  # the client was quicker


def _authorise(emulator: Emulator, agent_id: str, key: str | None, *, public_needs_key: bool) -> None:
    agent = emulator.agent(agent_id)
    if public_needs_key or agent is None or agent.requires_auth:
        permissions = emulator.permissions(key)
        if permissions is None:
            raise _refusal(401, "invalid_api_key", "Invalid API key")
        if "convai_write" not in permissions:
            # 401, not 403: so the real service answers, whatever its table of errors says.
            message = "The API key you used is missing the permission convai_write to execute this operation."
            raise _refusal(401, "missing_permissions", message)
    if agent is None:
        raise _refusal(404, "document_not_found", f"Document with id {agent_id} not found.")


def _ws_base(emulator: Emulator, request: Request) -> str:
    if emulator.public_ws_base:
        return emulator.public_ws_base.rstrip("/")
    # Not request.base_url: in a mounted app that leaves the mount's prefix out.
    scheme = "wss" if request.url.scheme == "https" else "ws"
    return f"{scheme}://{request.url.netloc}{request.scope.get('root_path', '').rstrip('/')}"


def _refusal(status: int, code: str, message: str) -> HTTPException:
    return HTTPException(status, detail={"status": code, "message": message})


def _livekit_shaped_token(agent_id: str, conversation_id: str, *, now: int, participant: str) -> str:
    claims = {
        "sub": participant,
        "nbf": now,
        "exp": now + _TOKEN_SECONDS,
        "video": {"roomJoin": True, "room": f"room_{agent_id}_{conversation_id}", "canPublish": True},
    }
    unsigned = f"{_segment({'alg': 'HS256', 'typ': 'JWT'})}.{_segment(claims)}"
    # A key nobody keeps: the token cannot be verified by anyone, so it cannot be mistaken for a real one.
    signature = hmac.digest(secrets.token_bytes(32), unsigned.encode(), hashlib.sha256)
    return f"{unsigned}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


def _segment(claims: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
