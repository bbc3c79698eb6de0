"""The emulator as an ASGI app, and the vendor's REST calls."""

import secrets
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from jose import jwt

from elevenlabs_emulator import control, conversation
from elevenlabs_emulator.accounts import ListQuery, list_page
from elevenlabs_emulator.conversation import CONVERSATION_PATH
from elevenlabs_emulator.emulator import WEBHOOK_ID, Emulator, Running, make_id
from elevenlabs_emulator.failures import Fault, Target, vendor_error
from elevenlabs_emulator.records import RAW_QUERY, Recorder

# A third party's note; the vendor's documentation does not say.
_TOKEN_SECONDS = 10 * 60

_routes: Final = APIRouter()


@dataclass
class _Call:
    """One call, and what goes wrong with it."""

    emulator: Running
    request: Request
    key: Annotated[str | None, Header(alias="xi-api-key")] = None
    fault: Fault = field(default_factory=Fault, init=False)

    def answer(self, answer: dict[str, Any]) -> Response:
        """Send a good answer, or the one that the fault makes of it."""
        return self.fault.answer(answer, self.request)


Call = Annotated[_Call, Depends()]


def _needs(permission: str | None, target: Target | None = None) -> Any:  # noqa: ANN401 - as FastAPI's `Depends`
    """Refuse a call as the fault of its target says, or because its key lacks the permission."""

    async def admit(call: Call) -> None:
        if target:
            call.fault = call.emulator.take_fault(target)
            await call.fault.refuse()
        if permission:
            call.emulator.check_key(call.key, permission)

    return Depends(admit)


@_routes.get(f"{CONVERSATION_PATH}/get-signed-url", dependencies=[_needs("convai_write", "signed_url")])
# This spelling is deprecated by the vendor since May 2025, and still served.
@_routes.get(f"{CONVERSATION_PATH}/get_signed_url", dependencies=[_needs("convai_write", "signed_url")])
async def _get_signed_url(call: Call, agent_id: str, *, include_conversation_id: bool = False) -> Response:
    call.emulator.find_agent(agent_id)
    asked = call.request
    signature, conversation_id = call.emulator.issue(agent_id, bound=include_conversation_id, query=asked.query_params)
    scheme = "wss" if asked.url.scheme == "https" else "ws"
    # Not asked.base_url: in a mounted app it lacks the mount's prefix.
    base = call.emulator.public_ws_base or f"{scheme}://{asked.url.netloc}{asked.scope.get('root_path', '')}"
    url = f"{base.rstrip('/')}{CONVERSATION_PATH}?agent_id={agent_id}&conversation_signature={signature}"
    # The URL holds the id; the answer has this one member with and without it.
    return call.answer({"signed_url": f"{url}&conversation_id={conversation_id}" if conversation_id else url})


@_routes.get(f"{CONVERSATION_PATH}/token", dependencies=[_needs(None, "token")])
async def _get_token(call: Call, agent_id: str, participant_name: str = "user") -> Response:
    # The JavaScript SDK calls this in the browser, without a key, for agents that need none.
    if agent_id not in call.emulator.agents or call.emulator.agents[agent_id].requires_auth:
        call.emulator.check_key(call.key, "convai_write")
    call.emulator.find_agent(agent_id)
    conversation_id, now = make_id("conv"), int(call.emulator.now())
    call.emulator.show_minted(agent_id, conversation_id, "livekit_token")
    video = {"roomJoin": True, "room": f"room_{agent_id}_{conversation_id}", "canPublish": True}
    claims = {"sub": participant_name, "nbf": now, "exp": now + _TOKEN_SECONDS, "video": video}
    # It has the form of LiveKit's, but opens nothing: there is no WebRTC server, and the key is not kept.
    return call.answer({"token": jwt.encode(claims, secrets.token_hex()), "conversation_id": conversation_id})


@_routes.get(f"{CONVERSATION_PATH}s", dependencies=[_needs("convai_read", "list")])
async def _list_conversations(call: Call, query: Annotated[ListQuery, Query()]) -> Response:
    return call.answer(list_page(list(call.emulator.accounts.values()), query))


@_routes.get(f"{CONVERSATION_PATH}s/{{conversation_id}}", dependencies=[_needs("convai_read", "account")])
async def _get_conversation(call: Call, conversation_id: str) -> Response:
    return call.answer(call.emulator.find_account(conversation_id).as_json())


@_routes.delete(f"{CONVERSATION_PATH}s/{{conversation_id}}", dependencies=[_needs("convai_write", "account")])
async def _delete_conversation(call: Call, conversation_id: str) -> dict[str, object]:
    call.emulator.find_account(conversation_id)
    del call.emulator.accounts[conversation_id]
    return {}


@_routes.get("/v1/convai/analytics/live-count", dependencies=[_needs("convai_read")])
async def _count_open(call: Call, agent_id: str | None = None) -> Response:
    count = call.emulator.open_conversations
    return call.answer({"count": count.total() if agent_id is None else count[agent_id]})


@_routes.get("/v1/convai/agents/{agent_id}", dependencies=[_needs("convai_read")])
async def _get_agent(call: Call, agent_id: str) -> Response:
    return call.answer(call.emulator.find_agent(agent_id, call.request.query_params).as_json())


@_routes.get("/v1/convai/agents/{agent_id}/widget")
async def _get_widget(call: Call, agent_id: str) -> Response:
    # Without a key: the vendor's widget calls it in the browser.
    agent = call.emulator.find_agent(agent_id)
    signature = call.request.scope[RAW_QUERY].get("conversation_signature")
    if agent.requires_auth and not call.emulator.find_issued(signature, agent_id):
        raise vendor_error("needs_authorization")
    return call.answer(agent.widget_as_json())


@_routes.get("/v1/convai/tools/{tool_id}", dependencies=[_needs("convai_read")])
async def _get_tool(call: Call, tool_id: str) -> Response:
    for agent in call.emulator.agents.values():
        if agent.tool_variables and agent.tool_id == tool_id:
            return call.answer(agent.tool_as_json())
    raise vendor_error("document_not_found", id=tool_id)


@_routes.get("/v1/convai/settings", dependencies=[_needs("convai_read")])
async def _get_settings(call: Call) -> Response:
    webhook_id = WEBHOOK_ID if call.emulator.webhooks.url else None
    return call.answer({"webhooks": {"post_call_webhook_id": webhook_id}})


@_routes.get("/v1/workspace/webhooks", dependencies=[_needs("webhooks_write")])
async def _get_webhooks(call: Call) -> Response:
    return call.answer({"webhooks": call.emulator.webhooks.as_json()})


def create_emulator(emulator: Emulator) -> FastAPI:
    """Serve the emulator, at the root or mounted under a prefix of another app.

    All state is in `emulator`, in memory: serve it from one process.
    """
    routes = [*_routes.routes, *control.routes.routes, *conversation.routes.routes]
    app = FastAPI(routes=routes, openapi_url=None, redirect_slashes=False)
    app.state.emulator = emulator
    # Browsers of any origin call the live service: it allows them all.
    app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(Recorder, records=emulator.records)
    app.exception_handler(404)(_answer_unknown_path)
    app.exception_handler(RequestValidationError)(control.explain_mistake)
    return app


async def _answer_unknown_path(request: Request, error: HTTPException) -> Response:
    path = request.url.path.removeprefix(request.scope.get("root_path", ""))
    if error.detail == "Not Found" and path.startswith("/v1/"):
        error = vendor_error("not_emulated", method=request.method, path=path)
    return await http_exception_handler(request, error)
