"""The emulator as an ASGI app: REST calls, the conversation WebSocket, and the control routes."""

from typing import Final

from fastapi import APIRouter, FastAPI, HTTPException, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from pydantic import ValidationError

from elevenlabs_emulator import control, rest
from elevenlabs_emulator.closings import CLOSINGS, CloseConversation
from elevenlabs_emulator.conversation import Conversation
from elevenlabs_emulator.emulator import Emulator, Running
from elevenlabs_emulator.errors import vendor_error
from elevenlabs_emulator.records import RAW_QUERY, RecordedConversation, Recorder

_conversations: Final = APIRouter()


def create_emulator(emulator: Emulator) -> FastAPI:
    """Serve the emulator, at the root or mounted under a prefix of another app.

    All state is in `emulator`, in memory: serve it from one process.
    """
    app = FastAPI(
        title="ElevenLabs emulator",
        routes=[*rest.routes.routes, *control.routes.routes, *_conversations.routes],
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.state.emulator = emulator
    # Browsers of any origin call the live service: it allows them all.
    app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(Recorder, records=emulator.records)
    app.exception_handler(404)(_answer_unknown_path)
    app.exception_handler(RequestValidationError)(control.explain_mistake)
    return app


@_conversations.websocket(rest.CONVERSATION_PATH)
async def _converse(websocket: WebSocket, emulator: Running) -> None:
    query: dict[str, str] = websocket.scope[RAW_QUERY]
    record = RecordedConversation(query=dict(websocket.query_params), signed="conversation_signature" in query)
    emulator.records.conversations.append(record)
    forced_closing, account, conversation = emulator.take_fault("conversation").closing, None, None
    try:
        # Accepted before it is refused, as by the live service: a browser that gets 403 sees no code and no reason.
        # Browsers insist on the subprotocol that they offered; the Python SDK offers none and rejects one.
        await websocket.accept(subprotocol="convai" if "convai" in websocket.scope["subprotocols"] else None)
        if forced_closing and CLOSINGS[forced_closing].moment == "before_metadata":
            raise CloseConversation(forced_closing)  # noqa: TRY301 - handled like every other closing
        agent, record.conversation_id = emulator.admit(query, origin=websocket.headers.get("origin"))
        account = emulator.open_account(agent, record, "signed_url" if record.signed else "public")
        conversation = Conversation(websocket, emulator=emulator, account=account)
        await conversation.hold(forced_closing=forced_closing)
    except (CloseConversation, ValidationError) as end:
        closing = end.closing if isinstance(end, CloseConversation) else CLOSINGS["invalid_message"]
        record.closed_by, record.close_code, record.close_reason = "emulator", closing.code, closing.reason
        if account:
            account.final_status = closing.record
        try:
            if conversation and conversation.has_begun and closing.error_event:
                await websocket.send_json({"type": "error", "error_event": closing.error_event})
            await websocket.close(closing.code, closing.reason)
        except WebSocketDisconnect:
            pass  # the client closed first
    except WebSocketDisconnect as end:
        record.closed_by, record.close_code = "client", end.code
        record.close_reason = emulator.records.scrub_text(end.reason or "")
    if account:
        await emulator.close_account(account)


async def _answer_unknown_path(request: Request, error: HTTPException) -> Response:
    path = request.url.path.removeprefix(request.scope.get("root_path", ""))
    if error.detail == "Not Found" and path.startswith("/v1/"):
        error = vendor_error("not_emulated", method=request.method, path=path)
    return await http_exception_handler(request, error)
