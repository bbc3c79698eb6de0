"""Faults on demand: what goes wrong, with which call, and how often."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Literal, Self, get_args
from urllib.parse import parse_qsl, urlencode, urlsplit

from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from pydantic import BaseModel, Field, model_validator

from elevenlabs_emulator.closings import CLOSINGS
from elevenlabs_emulator.errors import Envelope, make_error, type_and_code

Target = Literal["signed_url", "token", "conversation", "account", "list", "webhook"]
BrokenAnswer = Literal["html200", "redirect", "slow_trickle"]
BrokenJson = Literal["not_json", "truncated", "no_credential", "wrong_type", "oversized"]
BrokenUrl = Literal["foreign_host", "http_scheme", "other_agent", "missing_conversation_id"]

_OVERSIZED_BYTES = 10 * 1024 * 1024


class Fault(BaseModel, extra="forbid", frozen=True):
    """One thing that goes wrong for the next `times` calls of `target`, or until cleared if `times` is None.

    For `signed_url`, `token`, `account` (one conversation) and `list` (of conversations): wait `latency_seconds`, then
    answer with the HTTP `status`, or with the broken `body`, or as usual. An answer with a `status` has the given
    `envelope`; `code`, `vendor_status` (the same as `code` if absent), `message` and `retry_after_seconds` refine it.
    For `conversation`: end it with the row `closing` of the table of closings. For `webhook`: wait likewise, then lose
    the `delivery`, make it twice, or hold it back until after the next one.
    """

    target: Target = "signed_url"
    times: int | None = Field(default=None, ge=1)
    latency_seconds: float = Field(default=0, ge=0, le=300)
    status: int | None = Field(default=None, ge=400, le=599)
    envelope: Envelope = "live"
    code: str | None = None
    vendor_status: str | None = None
    message: str = "The emulator was told to fail."
    retry_after_seconds: int | None = Field(default=None, ge=0)
    body: BrokenAnswer | BrokenJson | BrokenUrl | None = None
    closing: str | None = Field(default=None, json_schema_extra={"enum": [*CLOSINGS]})
    delivery: Literal["lost", "twice", "held_back"] | None = None

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        is_webhook, choices = self.target == "webhook", (self.status, self.body, self.closing)
        rules = [
            ((self.target == "conversation") == bool(self.closing), "a conversation has a closing, other targets none"),
            (self.closing in {None, *CLOSINGS}, f"closing is one of {', '.join(CLOSINGS)}"),
            (is_webhook or not self.delivery, "only a webhook has a delivery"),
            (not is_webhook or not any(choices), "a webhook has a delivery or a latency, no status and no body"),
            (self.target != "list" or self.body not in get_args(BrokenUrl), "a list is no URL that could be broken"),
            (sum(map(bool, choices)) <= 1, "choose one of status, body and closing"),
        ]
        if broken := [text for is_kept, text in rules if not is_kept]:
            raise ValueError("; ".join(broken))
        return self

    async def refuse(self) -> None:
        """Wait for the latency, then raise the error that the fault asks for, if it asks for one."""
        await asyncio.sleep(self.latency_seconds)
        if not self.status:
            return
        error_type, usual_code = type_and_code(self.status)
        code = self.code or usual_code
        detail = {"type": error_type, "code": code, "status": self.vendor_status or code, "message": self.message}
        error = make_error(self.status, detail, envelope=self.envelope)
        if self.retry_after_seconds is not None:
            error.headers = {"retry-after": str(self.retry_after_seconds)}
        raise error

    def answer(self, answer: dict[str, Any], request: Request) -> Response:
        """Send a good answer, broken in the way `body` says. Its first member is the one that matters to a caller."""
        name, credential = next(iter(answer.items()))
        text = json.dumps(answer)
        match self.body:
            case "html200":
                return HTMLResponse("<!doctype html><title>Please wait</title><h1>We will be right back</h1>")
            case "redirect":
                # To itself: a client that follows it is recorded a second time, with its key.
                return RedirectResponse(request.url)
            case "slow_trickle":
                return StreamingResponse(_send_slowly(text), media_type="application/json")
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
                text = json.dumps(answer | {name: _break_url(credential, self.body)})
        return Response(text, media_type="application/json")


def _break_url(signed_url: str, how: BrokenUrl) -> str:
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


async def _send_slowly(text: str) -> AsyncIterator[str]:
    for character in text:
        yield character
        await asyncio.sleep(1)
