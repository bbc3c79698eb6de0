"""The control routes under `/_emulator`, for tests and CI."""

import json
from typing import Annotated, Final

from fastapi import APIRouter, Body, Request, Response
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from elevenlabs_emulator.agents import EmulatedAgent
from elevenlabs_emulator.emulator import Running, Unopened, Webhooks
from elevenlabs_emulator.failures import Fault, read_table

routes: Final = APIRouter(prefix="/_emulator")

_CONTROLS: Final = read_table("controls.toml")
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class EmulatedConversations(BaseModel, extra="forbid", frozen=True):
    """How the API shows conversations after they end (the following ones) and before they are opened."""

    processing_seconds: Seconds = 0
    unopened: Unopened = "unknown"


_BODIES: Final[dict[str, type[BaseModel]]] = {
    "agents": EmulatedAgent,
    "conversations": EmulatedConversations,
    "faults": Fault,
    "webhook": Webhooks,
}


@routes.get("")
async def _list_controls() -> dict[str, object]:
    return _CONTROLS


@routes.get("/health")
async def _get_health() -> dict[str, str]:
    return {"status": "ok"}


@routes.get("/requests")
async def _get_requests(emulator: Running) -> Response:
    records = {"calls": list(emulator.records.calls), "conversations": list(emulator.records.conversations)}
    return Response(json.dumps(records, default=vars), media_type="application/json")


@routes.delete("/requests", status_code=204)
async def _clear_requests(emulator: Running) -> None:
    emulator.records.clear()


@routes.put("/faults", status_code=204)
async def _put_fault(emulator: Running, fault: Fault) -> None:
    emulator.faults[fault.target] = fault


@routes.delete("/faults", status_code=204)
async def _clear_faults(emulator: Running) -> None:
    emulator.faults.clear()


@routes.post("/clock")
async def _advance_clock(emulator: Running, advance_seconds: Annotated[Seconds, Body(embed=True)]) -> dict[str, float]:
    emulator.advance(advance_seconds)
    return {"now": emulator.now()}


@routes.put("/agents", status_code=204)
async def _put_agent(emulator: Running, agent: EmulatedAgent) -> None:
    emulator.agents[agent.agent_id] = agent


@routes.put("/keys", status_code=204)
async def _put_keys(emulator: Running, permissions: dict[str, frozenset[str]]) -> None:
    emulator.api_keys.update(permissions)


@routes.put("/webhook", status_code=204)
async def _put_webhook(emulator: Running, webhook: Webhooks) -> None:
    if "secret" not in webhook.model_fields_set:
        webhook.secret = emulator.webhooks.secret
    emulator.webhooks = webhook


@routes.put("/conversations", status_code=204)
async def _put_conversations(emulator: Running, conversations: EmulatedConversations) -> None:
    emulator.processing_seconds = conversations.processing_seconds
    emulator.unopened = conversations.unopened


async def explain_mistake(request: Request, error: RequestValidationError) -> Response:
    """Answer a wrong body with 422, and a control's also with the keys that it takes."""
    answer: dict[str, object] = {"detail": jsonable_encoder(error.errors())}
    _, is_control, name = request.url.path.rpartition("/_emulator/")
    if is_control and name in _BODIES:
        schema = _BODIES[name].model_json_schema()
        # An agent has branches, which are agents: pydantic then puts its schema among the definitions.
        answer["keys"] = schema.get("$defs", {}).get(_BODIES[name].__name__, schema)["properties"]
    return JSONResponse(answer, 422)
