"""The vendor's REST calls."""

import secrets
from typing import Annotated

from fastapi import FastAPI, Header, Query, Request, Response
from jose import jwt

from elevenlabs_emulator.emulator import Emulator, make_id
from elevenlabs_emulator.errors import vendor_error
from elevenlabs_emulator.listing import ListQuery, list_page
from elevenlabs_emulator.records import RAW_QUERY
from elevenlabs_emulator.webhooks import WEBHOOK_ID

CONVERSATION_PATH = "/v1/convai/conversation"
# A third party's note; the vendor's documentation does not say.
_TOKEN_SECONDS = 10 * 60

ApiKey = Annotated[str | None, Header(alias="xi-api-key")]


def add_credentials(app: FastAPI, emulator: Emulator) -> None:
    """Add the calls that return what opens a conversation."""

    @app.get(f"{CONVERSATION_PATH}/get-signed-url")
    @app.get(f"{CONVERSATION_PATH}/get_signed_url")  # deprecated by the vendor in May 2025, still served
    async def get_signed_url(
        request: Request, agent_id: str, key: ApiKey = None, *, include_conversation_id: bool = False
    ) -> Response:
        fault = emulator.take_fault("signed_url")
        await fault.refuse()
        emulator.check_key(key, "convai_write")
        emulator.find_agent(agent_id)
        signature, conversation_id = emulator.issue(agent_id, bound=include_conversation_id)
        # The URL holds the id; the answer has this one member with and without it.
        query = f"agent_id={agent_id}&conversation_signature={signature}"
        query += f"&conversation_id={conversation_id}" if conversation_id else ""
        return fault.answer({"signed_url": f"{_find_ws_base(emulator, request)}{CONVERSATION_PATH}?{query}"}, request)

    @app.get(f"{CONVERSATION_PATH}/token")
    async def get_token(
        request: Request, agent_id: str, key: ApiKey = None, participant_name: str = "user"
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


def add_conversations(app: FastAPI, emulator: Emulator) -> None:
    """Add the calls about conversations."""

    @app.get(f"{CONVERSATION_PATH}s")
    async def list_conversations(
        request: Request, query: Annotated[ListQuery, Query()], key: ApiKey = None
    ) -> Response:
        fault = emulator.take_fault("list")
        await fault.refuse()
        emulator.check_key(key, "convai_read")
        return fault.answer(list_page(list(emulator.accounts.values()), query), request)

    @app.get(f"{CONVERSATION_PATH}s/{{conversation_id}}")
    async def get_conversation(request: Request, conversation_id: str, key: ApiKey = None) -> Response:
        fault = emulator.take_fault("account")
        await fault.refuse()
        emulator.check_key(key, "convai_read")
        return fault.answer(emulator.find_account(conversation_id).as_json(), request)

    @app.delete(f"{CONVERSATION_PATH}s/{{conversation_id}}")
    async def delete_conversation(conversation_id: str, key: ApiKey = None) -> dict[str, object]:
        await emulator.take_fault("account").refuse()
        emulator.check_key(key, "convai_write")
        emulator.find_account(conversation_id)
        del emulator.accounts[conversation_id]
        return {}

    @app.get("/v1/convai/analytics/live-count")
    async def count_open(agent_id: str | None = None, key: ApiKey = None) -> dict[str, int]:
        emulator.check_key(key, "convai_read")
        open_conversations = emulator.open_conversations
        return {"count": open_conversations.total() if agent_id is None else open_conversations[agent_id]}


def add_settings(app: FastAPI, emulator: Emulator) -> None:
    """Add the calls about agents and the workspace."""

    @app.get("/v1/convai/agents/{agent_id}")
    async def get_agent(agent_id: str, key: ApiKey = None) -> dict[str, object]:
        emulator.check_key(key, "convai_read")
        return emulator.find_agent(agent_id).as_json()

    @app.get("/v1/convai/agents/{agent_id}/widget")
    async def get_widget(request: Request, agent_id: str) -> dict[str, object]:
        # Without a key: the vendor's widget calls it in the browser.
        agent = emulator.find_agent(agent_id)
        signature = request.scope[RAW_QUERY].get("conversation_signature", "")
        if agent.requires_auth and not emulator.is_valid(signature, agent_id):
            raise vendor_error("needs_authorization")
        return agent.widget_as_json()

    @app.get("/v1/convai/tools/{tool_id}")
    async def get_tool(tool_id: str, key: ApiKey = None) -> dict[str, object]:
        emulator.check_key(key, "convai_read")
        for agent in emulator.agents.values():
            if agent.tool_variables and agent.tool_id == tool_id:
                return agent.tool_as_json()
        raise vendor_error("document_not_found", id=tool_id)

    @app.get("/v1/convai/settings")
    async def get_settings(key: ApiKey = None) -> dict[str, object]:
        emulator.check_key(key, "convai_read")
        return {"webhooks": {"post_call_webhook_id": WEBHOOK_ID if emulator.webhooks.url else None}}

    @app.get("/v1/workspace/webhooks")
    async def get_webhooks(key: ApiKey = None) -> dict[str, object]:
        emulator.check_key(key, "webhooks_write")
        return {"webhooks": emulator.webhooks.as_json()}
