"""The vendor's REST calls."""

import secrets
from typing import Annotated, Final

from fastapi import APIRouter, Header, Query, Request, Response
from jose import jwt

from elevenlabs_emulator.emulator import Emulator, Running, make_id
from elevenlabs_emulator.errors import vendor_error
from elevenlabs_emulator.listing import ListQuery, list_page
from elevenlabs_emulator.records import RAW_QUERY
from elevenlabs_emulator.webhooks import WEBHOOK_ID

CONVERSATION_PATH = "/v1/convai/conversation"
# A third party's note; the vendor's documentation does not say.
_TOKEN_SECONDS = 10 * 60

routes: Final = APIRouter()

ApiKey = Annotated[str | None, Header(alias="xi-api-key")]


@routes.get(f"{CONVERSATION_PATH}/get-signed-url")
@routes.get(f"{CONVERSATION_PATH}/get_signed_url")  # deprecated by the vendor in May 2025, still served
async def _get_signed_url(
    emulator: Running, request: Request, agent_id: str, key: ApiKey = None, *, include_conversation_id: bool = False
) -> Response:
    fault = emulator.take_fault("signed_url")
    await fault.refuse()
    emulator.check_key(key, "convai_write")
    emulator.find_agent(agent_id)
    signature, conversation_id = emulator.issue(agent_id, bound=include_conversation_id, query=request.query_params)
    # The URL holds the id; the answer has this one member with and without it.
    query = f"agent_id={agent_id}&conversation_signature={signature}"
    query += f"&conversation_id={conversation_id}" if conversation_id else ""
    return fault.answer({"signed_url": f"{_find_ws_base(emulator, request)}{CONVERSATION_PATH}?{query}"}, request)


@routes.get(f"{CONVERSATION_PATH}/token")
async def _get_token(
    emulator: Running, request: Request, agent_id: str, key: ApiKey = None, participant_name: str = "user"
) -> Response:
    fault = emulator.take_fault("token")
    await fault.refuse()
    # The JavaScript SDK calls this in the browser, without a key, for agents that need none.
    if agent_id not in emulator.agents or emulator.agents[agent_id].requires_auth:
        emulator.check_key(key, "convai_write")
    emulator.find_agent(agent_id)
    conversation_id, now = make_id("conv"), int(emulator.now())
    emulator.show_minted(agent_id, conversation_id, "livekit_token")
    claims = {
        "sub": participant_name,
        "nbf": now,
        "exp": now + _TOKEN_SECONDS,
        "video": {"roomJoin": True, "room": f"room_{agent_id}_{conversation_id}", "canPublish": True},
    }
    # It has the form of LiveKit's, but opens nothing: there is no WebRTC server, and the key is not kept.
    token = jwt.encode(claims, secrets.token_hex())
    return fault.answer({"token": token, "conversation_id": conversation_id}, request)


def _find_ws_base(emulator: Emulator, request: Request) -> str:
    if emulator.public_ws_base is not None:
        return emulator.public_ws_base.rstrip("/")
    # Not request.base_url: in a mounted app it lacks the mount's prefix.
    scheme = "wss" if request.url.scheme == "https" else "ws"
    return f"{scheme}://{request.url.netloc}{request.scope.get('root_path', '')}".rstrip("/")


@routes.get(f"{CONVERSATION_PATH}s")
async def _list_conversations(
    emulator: Running, request: Request, query: Annotated[ListQuery, Query()], key: ApiKey = None
) -> Response:
    fault = emulator.take_fault("list")
    await fault.refuse()
    emulator.check_key(key, "convai_read")
    return fault.answer(list_page(list(emulator.accounts.values()), query), request)


@routes.get(f"{CONVERSATION_PATH}s/{{conversation_id}}")
async def _get_conversation(emulator: Running, request: Request, conversation_id: str, key: ApiKey = None) -> Response:
    fault = emulator.take_fault("account")
    await fault.refuse()
    emulator.check_key(key, "convai_read")
    return fault.answer(emulator.find_account(conversation_id).as_json(), request)


@routes.delete(f"{CONVERSATION_PATH}s/{{conversation_id}}")
async def _delete_conversation(emulator: Running, conversation_id: str, key: ApiKey = None) -> dict[str, object]:
    await emulator.take_fault("account").refuse()
    emulator.check_key(key, "convai_write")
    emulator.find_account(conversation_id)
    del emulator.accounts[conversation_id]
    return {}


@routes.get("/v1/convai/analytics/live-count")
async def _count_open(emulator: Running, agent_id: str | None = None, key: ApiKey = None) -> dict[str, int]:
    emulator.check_key(key, "convai_read")
    open_conversations = emulator.open_conversations
    return {"count": open_conversations.total() if agent_id is None else open_conversations[agent_id]}


@routes.get("/v1/convai/agents/{agent_id}")
async def _get_agent(emulator: Running, request: Request, agent_id: str, key: ApiKey = None) -> dict[str, object]:
    emulator.check_key(key, "convai_read")
    return emulator.find_agent(agent_id, request.query_params).as_json()


@routes.get("/v1/convai/agents/{agent_id}/widget")
async def _get_widget(emulator: Running, request: Request, agent_id: str) -> dict[str, object]:
    # Without a key: the vendor's widget calls it in the browser.
    agent = emulator.find_agent(agent_id)
    signature = request.scope[RAW_QUERY].get("conversation_signature", "")
    if agent.requires_auth and not emulator.is_valid(signature, agent_id):
        raise vendor_error("needs_authorization")
    return agent.widget_as_json()


@routes.get("/v1/convai/tools/{tool_id}")
async def _get_tool(emulator: Running, tool_id: str, key: ApiKey = None) -> dict[str, object]:
    emulator.check_key(key, "convai_read")
    for agent in emulator.agents.values():
        if agent.tool_variables and agent.tool_id == tool_id:
            return agent.tool_as_json()
    raise vendor_error("document_not_found", id=tool_id)


@routes.get("/v1/convai/settings")
async def _get_settings(emulator: Running, key: ApiKey = None) -> dict[str, object]:
    emulator.check_key(key, "convai_read")
    return {"webhooks": {"post_call_webhook_id": WEBHOOK_ID if emulator.webhooks.url else None}}


@routes.get("/v1/workspace/webhooks")
async def _get_webhooks(emulator: Running, key: ApiKey = None) -> dict[str, object]:
    emulator.check_key(key, "webhooks_write")
    return {"webhooks": emulator.webhooks.as_json()}
