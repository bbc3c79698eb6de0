"""Turns every refusal into application/problem+json (RFC 9457)."""

import math
import traceback
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, Field
from starlette.exceptions import HTTPException
from starlette.routing import Match

from voicepass.errors import (
    InternalError,
    LimitReached,
    MethodNotAllowed,
    NotFound,
    Refusal,
    RequestInvalid,
    SignatureInvalid,
    TokenMissing,
)
from voicepass.telemetry.logger import Logger, redact

PROBLEM_JSON: Final = "application/problem+json"

_MAX_LOGGED_CHARACTERS: Final = 100

_WRONG_FORM: Final = (
    "The path or the body does not have the form that this route takes. A body is JSON, with the header "
    "'Content-Type: application/json'."
)

_CHALLENGES: Final = {SignatureInvalid.code: "ElevenLabs-Signature", TokenMissing.code: "Bearer"}
"""The WWW-Authenticate header of each 401; of all others, that of a token that was refused (RFC 6750, section 3)."""

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
    headers = {}
    problem = Problem(
        type=f"urn:voicepass:problem:{refusal.code}",
        title=refusal.title,
        status=refusal.status,
        detail=refusal.detail,
        code=refusal.code,
        request_id=request_id,
        retry_after_seconds=refusal.retry_after_seconds,
        checks=dict(refusal.checks) or None,
    )
    if refusal.retry_after_seconds is not None:
        headers["Retry-After"] = str(refusal.retry_after_seconds)
    if refusal.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = _CHALLENGES.get(refusal.code, 'Bearer error="invalid_token"')
    if isinstance(refusal, LimitReached):  # draft-ietf-httpapi-ratelimit-headers
        problem.resets_at = datetime.fromtimestamp(math.ceil(refusal.resets_at), UTC)
        problem.plan = refusal.plan
        name, plan = refusal.limit_name, f';plan="{refusal.plan}"' if refusal.plan else ""
        headers["RateLimit-Policy"] = f'"{name}";q={refusal.most};w={refusal.window_seconds}{plan}'
        headers["RateLimit"] = f'"{name}";r=0;t={refusal.retry_after_seconds}'
    body = problem.model_dump_json(exclude_none=True)
    return Response(body, status_code=refusal.status, headers=headers, media_type=PROBLEM_JSON)


def log_and_answer(
    refusal: Refusal,
    *,
    request_id: str,
    client_request_id: str | None = None,
    service_token: str | None = None,
    asked: str | None = None,
) -> Response:
    """Log `refusal` with its request id, and return the response.

    `asked` is the method and the path. `service_token` is the name of the token that the request carried.
    """
    write = _log.error if refusal.is_operators_fault else _log.info
    write(
        "request.refused",
        code=refusal.code,
        asked=asked and redact(asked, most_characters=_MAX_LOGGED_CHARACTERS),
        note=refusal.operator_note or None,
        request_id=request_id,
        client_request_id=client_request_id,
        service_token=service_token,
    )
    return answer(refusal, request_id=request_id)


def log_and_answer_bug(error: Exception, *, request_id: str, client_request_id: str | None) -> Response:
    """Log where the bug in voicepass is, and return 500. The log omits the error's message, which may hold a secret."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    _log.error(
        "request.failed",
        request_id=request_id,
        client_request_id=client_request_id,
        cause=type(error).__name__,
        where=f"{frame.f_code.co_filename}:{line}",
    )
    return answer(InternalError(), request_id=request_id)


def handle_refusals(app: FastAPI) -> None:
    """Make `app` answer every refusal, and every error that the framework raises, as a problem."""

    @app.exception_handler(Refusal)
    async def answer_refusal(request: Request, refusal: Refusal) -> Response:
        if getattr(request.state, "is_attempt", False):  # the attempt's observers have logged it
            return answer(refusal, request_id=request.state.request_id)
        return _log_and_answer(request, refusal)

    @app.exception_handler(RequestValidationError)
    async def answer_invalid(request: Request, _error: RequestValidationError) -> Response:
        return _log_and_answer(request, RequestInvalid(_WRONG_FORM))  # the error itself repeats what the caller sent

    @app.exception_handler(HTTPException)
    async def answer_framework(request: Request, error: HTTPException) -> Response:
        if error.status_code != HTTPStatus.METHOD_NOT_ALLOWED:
            return _log_and_answer(request, NotFound() if error.status_code == NotFound.status else RequestInvalid())
        response = _log_and_answer(request, MethodNotAllowed())
        response.headers["Allow"] = ", ".join(_list_methods(request))  # the framework names only the first route's
        return response


def request_ids(request: Request) -> dict[str, Any]:
    """Return both ids by which a log line names its request: ours and the caller's."""
    return {"request_id": request.state.request_id, "client_request_id": request.state.client_request_id}


def _log_and_answer(request: Request, refusal: Refusal) -> Response:
    service_token = getattr(request.state, "service_token", None)
    asked = f"{request.method} {request.url.path}"  # without the query, which may hold a secret
    return log_and_answer(refusal, **request_ids(request), service_token=service_token, asked=asked)


def _list_methods(request: Request) -> list[str]:
    at_this_path = (route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE)
    return sorted({method for route in at_this_path for method in route.methods})
