"""Trouble on demand: what goes wrong, with which call, and how often."""

import json
from collections.abc import AsyncIterator
from typing import Literal, Self
from urllib.parse import parse_qsl, urlencode, urlsplit

import anyio
from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from voicepass.emulator.closings import CLOSINGS

Target = Literal["signed_url", "token", "conversation"]
Envelope = Literal["legacy", "new", "string", "html"]
BrokenBody = Literal[
    "html200",
    "not_json",
    "truncated",
    "no_credential",
    "wrong_type",
    "oversized",
    "slow_trickle",
    "redirect",
    "foreign_host",
    "http_scheme",
    "other_agent",
    "missing_conversation_id",
]
# These spoil the URL inside an otherwise good answer, so they make no sense for a token.
_SPOILED_URLS = frozenset({"redirect", "foreign_host", "http_scheme", "other_agent", "missing_conversation_id"})

_OVERSIZED_BYTES = 10 * 1024 * 1024
_HTML = "<!doctype html><title>Please wait</title><h1>We will be right back</h1>"

# status -> (type, code): the vendor's error page for the new envelope; the code stands in the old one too.
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

    For `signed_url` and `token`: wait `latency_seconds`, then answer with `status` in the given `envelope`
    (`code` and `retry_after_seconds` refine it), or with the broken `body`, or, with neither, as usual.
    For `conversation`: end it with the row `closing` of the table of closings.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: Target = "signed_url"
    times: int | None = Field(default=None, ge=1)
    latency_seconds: float = Field(default=0, ge=0, le=300)
    status: int | None = Field(default=None, ge=400, le=599)
    envelope: Envelope = "legacy"
    code: str | None = None
    retry_after_seconds: int | None = Field(default=None, ge=0)
    body: BrokenBody | None = None
    trickle_seconds: float = Field(default=1, gt=0, le=60)
    closing: str | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.target == "conversation":
            row = CLOSINGS.get(self.closing or "")
            if row is None or row.needs_facts:
                raise ValueError("closing must name a row of the table that needs no facts")
            if self.status or self.body or self.latency_seconds:
                raise ValueError("a conversation can only be closed: status, body and latency are for calls")
        elif self.closing:
            raise ValueError("closing is for conversations")
        if self.status and self.body:
            raise ValueError("choose either status or body")
        if self.target == "token" and self.body in _SPOILED_URLS:
            raise ValueError(f"{self.body} is for signed URLs")
        return self

    async def strike(self, request: Request) -> Response | None:
        """Wait for the latency, but no longer than the caller does; then return the forced refusal, if there is one."""
        with anyio.move_on_after(self.latency_seconds):
            while (await request.receive())["type"] != "http.disconnect":
                pass
        if not self.status:
            return None
        kind, usual_code = _ERRORS.get(self.status, ("internal_error", "internal_error"))
        code, message = self.code or usual_code, "The emulator was told to fail."
        detail: dict[Envelope, object] = {
            "legacy": {"status": code, "message": message},
            "new": {"type": kind, "code": code, "message": message, "status": code, "request_id": "req_emulated"},
            "string": message,
        }
        headers = {} if self.retry_after_seconds is None else {"retry-after": str(self.retry_after_seconds)}
        if self.envelope == "html":
            return HTMLResponse(_HTML, status_code=self.status, headers=headers)
        return JSONResponse({"detail": detail[self.envelope]}, status_code=self.status, headers=headers)

    def spoil(self, answer: dict[str, str], request: Request) -> Response:
        """Break a good answer, whose first member is the credential, in the way `body` says."""
        name, credential = next(iter(answer.items()))
        text, media_type = json.dumps(answer), "application/json"
        match self.body:
            case "html200":
                text, media_type = _HTML, "text/html"
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
            case "foreign_host" | "http_scheme" | "other_agent":
                text = json.dumps(answer | {name: _spoilt_url(credential, self.body)})
            case "redirect":
                return RedirectResponse(_other_spelling(request), status_code=307)
            case "slow_trickle":
                return StreamingResponse(_trickle(text, self.trickle_seconds), media_type=media_type)
        return Response(text, media_type=media_type)


class Faults:
    """The faults in force: one a target."""

    def __init__(self) -> None:
        self._by_target: dict[Target, Fault] = {}

    def put(self, fault: Fault) -> None:
        """Let this go wrong from now on, in place of what went wrong with its target before."""
        self._by_target[fault.target] = fault

    def clear(self) -> None:
        """Let everything work again."""
        self._by_target.clear()

    def take(self, target: Target) -> Fault | None:
        """Return the fault this call meets, and count it."""
        fault = self._by_target.get(target)
        if fault is None or fault.times is None:
            return fault
        if fault.times == 1:
            del self._by_target[target]
        else:
            self._by_target[target] = fault.model_copy(update={"times": fault.times - 1})
        return fault


def _other_spelling(request: Request) -> str:
    # A client that follows is caught red-handed: its call and its key show up in the record a second time.
    current, deprecated = "get-signed-url", "get_signed_url"
    path = request.url.path
    other = (
        path.removesuffix(current) + deprecated if path.endswith(current) else path.removesuffix(deprecated) + current
    )
    return f"{other}?{request.url.query}"


def _spoilt_url(signed_url: str, how: Literal["foreign_host", "http_scheme", "other_agent"]) -> str:
    url = urlsplit(signed_url)
    match how:
        case "foreign_host":
            return url._replace(scheme="wss", netloc="api.elevenlabs.io.attacker.invalid").geturl()
        case "http_scheme":
            return url._replace(scheme="http").geturl()
        case "other_agent":
            return url._replace(query=urlencode(dict(parse_qsl(url.query)) | {"agent_id": "agent_other"})).geturl()


async def _trickle(text: str, seconds: float) -> AsyncIterator[str]:
    for character in text:
        yield character
        await anyio.sleep(seconds)
