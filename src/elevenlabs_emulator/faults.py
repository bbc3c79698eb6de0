"""Trouble on demand: what goes wrong, with which call, and how often."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Literal, Self, get_args
from urllib.parse import parse_qsl, urlencode, urlsplit

from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from elevenlabs_emulator.closings import CLOSINGS

Target = Literal["signed_url", "token", "conversation", "account", "list", "webhook"]
BrokenAnswer = Literal["html200", "redirect", "slow_trickle"]
BrokenJson = Literal["not_json", "truncated", "no_credential", "wrong_type", "oversized"]
BrokenUrl = Literal["foreign_host", "http_scheme", "other_agent", "missing_conversation_id"]

_OVERSIZED_BYTES = 10 * 1024 * 1024

# status -> (type, code): the vendor's error page for the new envelope; the code stands in the legacy one too.
_ERRORS = {
    400: ("invalid_request", "invalid_request"),
    401: ("authentication_error", "invalid_api_key"),
    402: ("payment_required", "insufficient_credits"),
    403: ("authorization_error", "insufficient_permissions"),
    404: ("not_found", "agent_not_found"),
    409: ("conflict", "conflict"),
    422: ("validation_error", "validation_error"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    503: ("service_unavailable", "service_unavailable"),
}


class Fault(BaseModel):
    """One thing that goes wrong for the next `times` calls of `target`, or until cleared when `times` is None.

    For `signed_url`, `token`, `account` (of a conversation that somebody asks about) and `list` (of conversations):
    wait `latency_seconds`, then answer with `status` in the given `envelope` (`code` and `retry_after_seconds` refine
    it), or with the broken `body`, or, with neither, as usual.
    For `conversation`: end it with the row `closing` of the table of closings. For `webhook`: wait likewise, then let
    its `delivery` be lost, be made twice, or be held back until the next one has gone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: Target = "signed_url"
    times: int | None = Field(default=None, ge=1)
    latency_seconds: float = Field(default=0, ge=0, le=300)
    status: int | None = Field(default=None, ge=400, le=599)
    envelope: Literal["legacy", "new"] = "legacy"
    code: str | None = None
    retry_after_seconds: int | None = Field(default=None, ge=0)
    body: BrokenAnswer | BrokenJson | BrokenUrl | None = None
    closing: str | None = None
    delivery: Literal["lost", "twice", "held_back"] | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if (self.target == "conversation") != (self.closing is not None):
            raise ValueError("a conversation needs a closing, and nothing else can have one")
        if self.closing is not None and (self.closing not in CLOSINGS or "{" in CLOSINGS[self.closing].reason):
            raise ValueError("closing must name a row of the table whose reason needs no facts")
        if self.delivery is not None and self.target != "webhook":
            raise ValueError("only a webhook has a delivery")
        if self.target == "webhook" and (self.status or self.body):
            raise ValueError("a webhook is sent, not answered: it has a delivery or a latency")
        if self.target == "list" and self.body in get_args(BrokenUrl):
            raise ValueError("a list is no address that could be broken")
        if bool(self.status) + bool(self.body) + bool(self.closing) > 1:
            raise ValueError("choose one of status, body and closing")
        return self

    async def refusal(self) -> Response | None:
        """Wait for the latency, then return the forced refusal, if there is one."""
        await asyncio.sleep(self.latency_seconds)
        if not self.status:
            return None
        kind, usual_code = _ERRORS.get(self.status, ("internal_error", "internal_error"))
        detail = {"status": self.code or usual_code, "message": "The emulator was told to fail."}
        if self.envelope == "new":
            detail |= {"type": kind, "code": detail["status"], "request_id": "req_emulated"}
        headers = {} if self.retry_after_seconds is None else {"retry-after": str(self.retry_after_seconds)}
        return JSONResponse({"detail": detail}, status_code=self.status, headers=headers)

    def answered(self, answer: dict[str, Any], request: Request) -> Response:
        """Send a good answer, whose first member matters most (a credential, say), broken in the way `body` says."""
        name, credential = next(iter(answer.items()))
        text = json.dumps(answer)
        match self.body:
            case "html200":
                return HTMLResponse("<!doctype html><title>Please wait</title><h1>We will be right back</h1>")
            case "redirect":
                # To itself: a client that follows shows up in the record a second time, with its key.
                return RedirectResponse(request.url)
            case "slow_trickle":
                return StreamingResponse(_one_character_a_second(text), media_type="application/json")
            case "not_json":
                text = "upstream connect error"
            case "truncated":
                text = text[: len(text) // 2]
            case "no_credential":
                text = "{}"
            case "wrong_type":
                text = json.dumps(answer | {name: [credential]})
            case "oversized":
                text = json.dumps(answer | {"padding": "x" * _OVERSIZED_BYTES})
            case "foreign_host" | "http_scheme" | "other_agent" | "missing_conversation_id":
                text = json.dumps(answer | {name: _spoilt_url(credential, self.body)})
        return Response(text, media_type="application/json")


def _spoilt_url(signed_url: str, how: BrokenUrl) -> str:
    url = urlsplit(signed_url)
    query = dict(parse_qsl(url.query))
    match how:
        case "foreign_host":
            url = url._replace(scheme="wss", netloc="api.elevenlabs.io.attacker.invalid")
        case "http_scheme":
            url = url._replace(scheme="http")
        case "other_agent":
            query["agent_id"] = "agent_other"
        case "missing_conversation_id":
            query.pop("conversation_id", None)
    return url._replace(query=urlencode(query)).geturl()


async def _one_character_a_second(text: str) -> AsyncIterator[str]:
    for character in text:
        yield character
        await asyncio.sleep(1)
