"""Turns every refusal into application/problem+json (RFC 9457)."""

import math
import traceback
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Any, Final, NoReturn

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, Field
from starlette.exceptions import HTTPException
from starlette.routing import Match

from voicepass.errors import InternalError, LimitReached, MethodNotAllowed, NotFound, Refusal, RequestInvalid
from voicepass.telemetry.logger import Logger

PROBLEM_JSON: Final = "application/problem+json"

_WRONG_FORM: Final = (
    "The path or the body has a wrong form. Send a body as JSON, with the header 'Content-Type: application/json'."
)

_log = Logger("voicepass.api")


Instant = Annotated[datetime, BeforeValidator(lambda seconds: datetime.fromtimestamp(int(seconds), UTC))]
"""Seconds since the epoch, shown as a date without fractions of a second."""


class Problem(BaseModel):
    """Why voicepass refused a request, and what to do (RFC 9457)."""

    type: str = Field(examples=["urn:voicepass:problem:token_expired"])
    title: str
    status: int
    detail: str = Field(description="What the caller should do.")
    code: str = Field(description="Stable; branch on this.", examples=["token_expired"])
    request_id: str = Field(description="The line to look for in the service's log.")
    retry_after_seconds: int | None = None
    checks: dict[str, str] | None = Field(None, description="Only of /readyz: the outcome of each check.")
    resets_at: Instant | None = Field(None, description="Only of a limit: from when a new try can succeed.")
    plan: str | None = Field(None, description="Only of a limit that a plan sets: the plan.", examples=["pro"])


def answer(refusal: Refusal, *, request_id: str) -> Response:
    """Return the response for `refusal`: code, status, what to do, and the id to look for in the log."""
    values = {name: getattr(refusal, name, None) for name in Problem.model_fields}
    values |= {"type": f"urn:voicepass:problem:{refusal.code}", "request_id": request_id}
    headers = dict(refusal.headers or {})
    if refusal.retry_after_seconds is not None:
        headers["Retry-After"] = str(refusal.retry_after_seconds)
    if isinstance(refusal, LimitReached):  # draft-ietf-httpapi-ratelimit-headers
        values["resets_at"] = math.ceil(refusal.resets_at)
        name, plan = refusal.limit_name, f';plan="{refusal.plan}"' if refusal.plan else ""
        headers["RateLimit-Policy"] = f'"{name}";q={refusal.most};w={refusal.window_seconds}{plan}'
        headers["RateLimit"] = f'"{name}";r=0;t={refusal.retry_after_seconds}'
    body = Problem.model_validate(values).model_dump_json(exclude_none=True)
    return Response(body, status_code=refusal.status, headers=headers, media_type=PROBLEM_JSON)


def log_and_answer(refusal: Refusal, *, request_id: str, **facts: str | None) -> Response:
    """Log `refusal` with its request id and these facts, and return the response."""
    write = _log.error if refusal.is_operators_fault else _log.info
    write("request.refused", code=refusal.code, note=refusal.operator_note or None, request_id=request_id, **facts)
    return answer(refusal, request_id=request_id)


def log_and_answer_bug(error: Exception, *, request_id: str, **facts: str | None) -> Response:
    """Log where the bug in voicepass is, and return 500. The log omits the error's message, which may hold a secret."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    where = f"{frame.f_code.co_filename}:{line}"
    _log.error("request.failed", request_id=request_id, cause=type(error).__name__, where=where, **facts)
    return answer(InternalError(), request_id=request_id)


async def _refuse_invalid(_request: Request, _error: Exception) -> NoReturn:
    raise RequestInvalid(_WRONG_FORM) from None  # the error itself repeats what the caller sent


async def _refuse(request: Request, error: HTTPException) -> NoReturn:
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        # The framework names only the first route's methods.
        found = (route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE)
        methods = sorted({method for route in found for method in route.methods})
        raise MethodNotAllowed(headers={"Allow": ", ".join(methods)}) from None
    raise (NotFound if error.status_code == HTTPStatus.NOT_FOUND else RequestInvalid) from None


FRAMEWORK_ERRORS: Final[dict[Any, Any]] = {RequestValidationError: _refuse_invalid, HTTPException: _refuse}
"""Handlers that turn every error of the framework into a Refusal. The middleware answers it."""
