"""The emulator on the wire: the REST calls, the WebSocket's door, and the control routes under `/_emulator`."""

import json
import secrets
from typing import Annotated, Literal
from urllib.parse import urlencode

from fastapi import Body, FastAPI, Header, HTTPException, Query, Request, Response, WebSocket, WebSocketDisconnect
from jose import jwt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from elevenlabs_emulator.aftermath import WEBHOOK_ID
from elevenlabs_emulator.agents import EmulatedAgent
from elevenlabs_emulator.closings import CLOSINGS, Closing, Refused
from elevenlabs_emulator.conversation import Conversation, framed
from elevenlabs_emulator.faults import Fault
from elevenlabs_emulator.listing import ListQuery, list_page
from elevenlabs_emulator.records import RAW_QUERY, RecordedConversation, Recorder
from elevenlabs_emulator.service import Emulator, Unopened, new_id

_PREFIX = "/v1/convai/conversation"
# A third party's note; the vendor's documentation does not say.
_TOKEN_SECONDS = 10 * 60

ApiKey = Annotated[str | None, Header(alias="xi-api-key")]


class EmulatedWebhook(BaseModel):
    """The workspace's post-call webhook: where it leads, how it is signed, and whether it is switched off."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str | None = None
    auth_type: Literal["hmac", "oauth2", "mtls"] = "hmac"
    is_disabled: bool = False


class EmulatedConversations(BaseModel):
    """How conversations are shown after they end (for the following ones) and before they are opened."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    processing_seconds: float = Field(default=0, ge=0, allow_inf_nan=False)
    unopened: Unopened = "unknown"


def create_emulator(emulator: Emulator) -> FastAPI:
    """Put the emulator on the wire, at the root or mounted under a prefix of another app.

    State lives in `emulator`, in memory: serve it from one process.
    """
    app = FastAPI(title="A pretend ElevenLabs", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(Recorder, records=emulator.records)
    _add_calls(app, emulator)
    _add_accounts(app, emulator)
    _add_settings(app, emulator)
    _add_door(app, emulator)
    _add_control(app, emulator)
    _add_setup(app, emulator)
    return app


def _add_calls(app: FastAPI, emulator: Emulator) -> None:
    @app.get(f"{_PREFIX}/get-signed-url")
    @app.get(f"{_PREFIX}/get_signed_url")  # deprecated by the vendor in May 2025, still served
    async def get_signed_url(
        request: Request, agent_id: str, key: ApiKey = None, *, include_conversation_id: bool = False
    ) -> Response:
        fault = emulator.take_fault("signed_url")
        if refusal := await fault.refusal():
            return refusal
        _authorise(emulator, agent_id, key, public_needs_key=True)
        signature, conversation_id = emulator.issue(agent_id, bound=include_conversation_id)
        query = {"agent_id": agent_id, "conversation_signature": signature}
        if conversation_id:
            query["conversation_id"] = conversation_id
        # The id stands in the URL only: the answer has this one member, whatever was asked for.
        return fault.answered({"signed_url": f"{_ws_base(emulator, request)}{_PREFIX}?{urlencode(query)}"}, request)

    @app.get(f"{_PREFIX}/token")
    async def get_token(
        request: Request, agent_id: str, key: ApiKey = None, participant_name: str = "user"
    ) -> Response:
        fault = emulator.take_fault("token")
        if refusal := await fault.refusal():
            return refusal
        # The JavaScript SDK asks this in the browser, without a key, for agents that need none.
        _authorise(emulator, agent_id, key, public_needs_key=False)
        conversation_id, now = new_id("conv"), int(emulator.now())
        emulator.initiate(agent_id, conversation_id, "livekit_token")
        claims = {
            "sub": participant_name,
            "nbf": now,
            "exp": now + _TOKEN_SECONDS,
            "video": {"roomJoin": True, "room": f"room_{agent_id}_{conversation_id}", "canPublish": True},
        }
        # Shaped like LiveKit's, but no WebRTC server stands behind it, and nobody keeps its key: it opens nothing.
        token = jwt.encode(claims, secrets.token_hex())
        return fault.answered({"token": token, "conversation_id": conversation_id}, request)


def _add_accounts(app: FastAPI, emulator: Emulator) -> None:
    @app.get(f"{_PREFIX}s")
    async def list_conversations(
        request: Request, query: Annotated[ListQuery, Query()], key: ApiKey = None
    ) -> Response:
        fault = emulator.take_fault("list")
        if refusal := await fault.refusal():
            return refusal
        _check_key(emulator, key, "convai_read")
        accounts = list(emulator.accounts.values())
        return fault.answered(list_page(accounts, query, now=emulator.now()), request)

    @app.get(f"{_PREFIX}s/{{conversation_id}}")
    async def get_conversation(request: Request, conversation_id: str, key: ApiKey = None) -> Response:
        fault = emulator.take_fault("account")
        if refusal := await fault.refusal():
            return refusal
        _check_key(emulator, key, "convai_read")
        account = emulator.accounts.get(conversation_id)
        if account is None:
            raise _not_found(conversation_id)
        return fault.answered(account.shown(emulator.now()), request)


def _add_settings(app: FastAPI, emulator: Emulator) -> None:
    @app.get("/v1/convai/agents/{agent_id}")
    async def get_agent(agent_id: str, key: ApiKey = None) -> dict[str, object]:
        _check_key(emulator, key, "convai_read")
        if agent_id not in emulator.agents:
            raise _not_found(agent_id)
        return emulator.agents[agent_id].shown()

    @app.get("/v1/convai/tools/{tool_id}")
    async def get_tool(tool_id: str, key: ApiKey = None) -> dict[str, object]:
        _check_key(emulator, key, "convai_read")
        tools = {agent.tool_id: agent.tool() for agent in emulator.agents.values() if agent.tool_variables}
        if tool_id not in tools:
            raise _not_found(tool_id)
        return tools[tool_id]

    @app.get("/v1/convai/settings")
    async def get_settings(key: ApiKey = None) -> dict[str, object]:
        _check_key(emulator, key, "convai_read")
        return {"webhooks": {"post_call_webhook_id": WEBHOOK_ID if emulator.webhooks.url else None}}

    @app.get("/v1/workspace/webhooks")
    async def get_webhooks(key: ApiKey = None) -> dict[str, object]:
        _check_key(emulator, key, "webhooks_write")
        return {"webhooks": emulator.webhooks.shown()}


def _add_door(app: FastAPI, emulator: Emulator) -> None:
    @app.websocket(_PREFIX)
    async def converse(websocket: WebSocket) -> None:
        query: dict[str, str] = websocket.scope[RAW_QUERY]
        offered: list[str] = websocket.scope["subprotocols"]
        record = RecordedConversation(query=dict(websocket.query_params), signed="conversation_signature" in query)
        emulator.records.conversations.append(record)
        forced, account = emulator.take_fault("conversation").closing, None
        try:
            # Accepted before it is refused, as by the real service: a browser told 403 learns neither code nor reason.
            # Browsers insist on the subprotocol they offered; the Python SDK offers none and rejects one.
            await websocket.accept(subprotocol="convai" if "convai" in offered else None)
            if forced and CLOSINGS[forced].moment == "door":
                raise Refused(forced)  # noqa: TRY301  what ends a conversation ends it below
            agent, record.conversation_id = emulator.admit(query, origin=websocket.headers.get("origin"))
            account = emulator.opened(agent, record)
            await Conversation(websocket, emulator=emulator, agent=agent, record=record).hold(forced=forced)
        except Refused as refused:
            await _close(websocket, refused.closing, record)
        except ValidationError:
            await _close(websocket, CLOSINGS["invalid_message"], record)
        except WebSocketDisconnect as gone:
            record.closed_by, record.close_code = "client", gone.code
            record.close_reason = emulator.records.scrubbed_text(gone.reason or "")
        if account:
            await emulator.ended(account)


async def _close(websocket: WebSocket, closing: Closing, record: RecordedConversation) -> None:
    record.closed_by, record.close_code, record.close_reason = "emulator", closing.code, closing.reason
    event: dict[str, object] = {"code": closing.code, "message": closing.reason, "reason": closing.reason}
    if closing.error_type:
        event["error_type"] = closing.error_type
    try:
        if closing.moment == "start":
            await websocket.send_text(framed("error", **event))
        await websocket.close(closing.code, closing.reason)
    except WebSocketDisconnect:
        pass  # the client was quicker


def _add_control(app: FastAPI, emulator: Emulator) -> None:
    @app.get("/_emulator/requests")
    async def requests() -> Response:
        records = {"calls": list(emulator.records.calls), "conversations": list(emulator.records.conversations)}
        return Response(json.dumps(records, default=vars), media_type="application/json")

    @app.delete("/_emulator/requests", status_code=204)
    async def forget() -> None:
        emulator.records.clear()

    @app.put("/_emulator/faults", status_code=204)
    async def put_fault(fault: Fault) -> None:
        emulator.faults[fault.target] = fault

    @app.delete("/_emulator/faults", status_code=204)
    async def clear_faults() -> None:
        emulator.faults.clear()

    @app.post("/_emulator/clock")
    async def advance_clock(
        advance_seconds: Annotated[float, Body(embed=True, ge=0, allow_inf_nan=False)],
    ) -> dict[str, float]:
        emulator.advance(advance_seconds)
        return {"now": emulator.now()}


def _add_setup(app: FastAPI, emulator: Emulator) -> None:
    @app.put("/_emulator/agents", status_code=204)
    async def put_agent(agent: EmulatedAgent) -> None:
        emulator.put_agent(agent)

    @app.put("/_emulator/keys", status_code=204)
    async def put_keys(permissions: dict[str, frozenset[str]]) -> None:
        emulator.api_keys.update(permissions)

    @app.put("/_emulator/webhook", status_code=204)
    async def put_webhook(webhook: EmulatedWebhook) -> None:
        for name, value in webhook:
            setattr(emulator.webhooks, name, value)

    @app.put("/_emulator/conversations", status_code=204)
    async def put_conversations(conversations: EmulatedConversations) -> None:
        emulator.processing_seconds = conversations.processing_seconds
        emulator.unopened = conversations.unopened


def _authorise(emulator: Emulator, agent_id: str, key: str | None, *, public_needs_key: bool) -> None:
    agent = emulator.agents.get(agent_id)
    if public_needs_key or agent is None or agent.requires_auth:
        _check_key(emulator, key, "convai_write")
    if agent is None:
        raise _not_found(agent_id)


def _check_key(emulator: Emulator, key: str | None, permission: str) -> None:
    permissions = emulator.api_keys.get(key or "")
    if permissions is None:
        raise HTTPException(401, {"status": "invalid_api_key", "message": "Invalid API key"})
    if permission not in permissions:
        # 401, not 403: so the real service answers, whatever its table of errors says.
        message = f"The API key you used is missing the permission {permission} to execute this operation."
        raise HTTPException(401, {"status": "missing_permissions", "message": message})


def _not_found(document_id: str) -> HTTPException:
    return HTTPException(404, {"status": "document_not_found", "message": f"Document with id {document_id} not found."})


def _ws_base(emulator: Emulator, request: Request) -> str:
    if emulator.public_ws_base:
        return emulator.public_ws_base.rstrip("/")
    # Not request.base_url: in a mounted app that leaves the mount's prefix out.
    scheme = "wss" if request.url.scheme == "https" else "ws"
    return f"{scheme}://{request.url.netloc}{request.scope.get('root_path', '').rstrip('/')}"
