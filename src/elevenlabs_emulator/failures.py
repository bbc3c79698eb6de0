"""What goes wrong: the closings of a conversation and the REST errors, read from tables, and faults on demand."""

import asyncio
import json
import tomllib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, Final, Literal, Self

from fastapi import HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from pydantic import BaseModel, Field, model_validator
from starlette.datastructures import URL

Target = Literal["signed_url", "token", "conversation", "account", "list", "webhook"]
BrokenAnswer = Literal["html200", "redirect", "slow_trickle"]
BrokenJson = Literal["not_json", "truncated", "no_credential", "wrong_type", "oversized"]
BrokenUrl = Literal["foreign_host", "http_scheme", "other_agent", "missing_conversation_id"]

_BREAK_URL: Final[dict[BrokenUrl, Callable[[URL], URL]]] = {
    "foreign_host": lambda url: url.replace(scheme="wss", netloc="api.elevenlabs.io.attacker.invalid"),
    "http_scheme": lambda url: url.replace(scheme="http"),
    "other_agent": lambda url: url.include_query_params(agent_id="agent_other"),
    "missing_conversation_id": lambda url: url.remove_query_params("conversation_id"),
}
_OVERSIZED_BYTES = 10 * 1024 * 1024
# How a target can fail, besides slowly; all others with a status or a body.
_WAYS: Final = {"conversation": {"closing"}, "webhook": {"delivery"}}
# RFC 6455, 5.5: a control frame carries 125 bytes, two of them are the code.
_REASON_BYTES = 123
# The published schema allows no other code in an `error` event.
_ERROR_EVENT_CODES = {1000, 1002, 1008, 1011}


def read_table(name: str) -> dict[str, Any]:
    """Return the content of a TOML file of this package."""
    return tomllib.loads(files(__package__).joinpath(name).read_text("utf-8"))


@dataclass(frozen=True, kw_only=True)
class Closing:
    """One row of the table; `closings.toml` describes the columns."""

    name: str
    code: int
    reason: str
    moment: Literal["before_metadata", "after_metadata", "during"]
    basis: Literal["documented", "observed", "assumed"]
    source: str
    template: str | None = None
    error_type: str | None = None
    record: Literal["done", "failed"] = "done"

    @property
    def error_event(self) -> dict[str, object] | None:
        """Return the `error` event that comes before the close, or None if there is none."""
        if self.name == "agent_ended" or self.code not in _ERROR_EVENT_CODES:
            return None
        event = {"code": self.code, "message": self.reason, "reason": self.reason}
        return event | ({"error_type": self.error_type} if self.error_type else {})


CLOSINGS = {name: Closing(name=name, **row) for name, row in read_table("closings.toml").items()}

_ERRORS = read_table("errors.toml")


class CloseConversation(Exception):  # noqa: N818 - to end a conversation is an expected outcome here
    """Ends the conversation with the row of this name; `facts` fill its template, else the example is the reason."""

    def __init__(self, name: str, **facts: object) -> None:
        super().__init__(name)
        row = CLOSINGS[name]
        reason = row.template.format(**facts) if row.template and facts else row.reason
        self.closing = replace(row, reason=reason.encode()[:_REASON_BYTES].decode(errors="ignore"))


def vendor_error(name: str, **facts: str) -> HTTPException:
    """Return the error of this name in `errors.toml`; `facts` fill its message."""
    row = _ERRORS[name] | {"message": _ERRORS[name]["message"].format(**facts), "request_id": "req_emulated"}
    return HTTPException(row.pop("http_status"), row)


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
    envelope: Literal["live", "legacy"] = "live"
    code: str | None = None
    vendor_status: str | None = None
    message: str = "The emulator was told to fail."
    retry_after_seconds: int | None = Field(default=None, ge=0)
    body: BrokenAnswer | BrokenJson | BrokenUrl | None = None
    closing: str | None = Field(default=None, json_schema_extra={"enum": [*CLOSINGS]})
    delivery: Literal["lost", "twice", "held_back"] | None = None

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        ways = _WAYS.get(self.target, {"status", "body"})
        chosen = {way for way in ("status", "body", "closing", "delivery") if getattr(self, way) is not None}
        if len(chosen) > 1 or not chosen <= ways:
            raise ValueError(f"the target {self.target} takes only one of: {', '.join(sorted(ways))}")
        if self.target == "conversation" and self.closing not in CLOSINGS:
            raise ValueError(f"closing is one of {', '.join(CLOSINGS)}")
        if self.target != "signed_url" and self.body in _BREAK_URL:
            raise ValueError("only the target signed_url has a URL that can be broken")
        return self

    async def refuse(self) -> None:
        """Wait for the latency, then raise the error that the fault asks for, if it asks for one."""
        await asyncio.sleep(self.latency_seconds)
        if self.status is None:
            return
        error_type, usual_code = _ERRORS["http"].get(str(self.status), ("internal_error", "internal_error"))
        code = self.code or usual_code
        detail = {"status": self.vendor_status or code, "message": self.message}
        if self.envelope == "live":
            detail |= {"type": error_type, "code": code, "request_id": "req_emulated"}
        headers = None if self.retry_after_seconds is None else {"retry-after": str(self.retry_after_seconds)}
        raise HTTPException(self.status, detail, headers)

    def answer(self, answer: dict[str, Any], request: Request) -> Response:
        """Send a good answer, broken in the way `body` says. Its first member is the one that matters to a caller."""
        name, value = next(iter(answer.items()))
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
                text = json.dumps(answer | {name: [value]})
            case "oversized":
                text = json.dumps(answer | {"padding": "x" * _OVERSIZED_BYTES})
            case "foreign_host" | "http_scheme" | "other_agent" | "missing_conversation_id":
                text = json.dumps(answer | {name: str(_BREAK_URL[self.body](URL(value)))})
        return Response(text, media_type="application/json")


async def _send_slowly(text: str) -> AsyncIterator[str]:
    for character in text:
        yield character
        await asyncio.sleep(1)
