"""Every refusal as application/problem+json (RFC 9457): one place words them all."""

import math
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from voicepass.errors import (
    BodyTooLarge,
    HeadersTooLarge,
    InternalError,
    LimitReached,
    MethodNotAllowed,
    NotFound,
    Refusal,
    RequestInvalid,
)
from voicepass.telemetry.logs import redact

PROBLEM_JSON = "application/problem+json"

_ASKED_CHARACTERS = 100

_OF_ANOTHER_FORM = (
    "The path or the body is not of the form that this route takes; a body is JSON, with the header "
    "'Content-Type: application/json'. With VOICEPASS_DOCS=true, /docs shows every form."
)

_log = structlog.get_logger("voicepass.api")

_BY_STATUS: dict[int, type[Refusal]] = {
    refusal.status: refusal for refusal in (NotFound, MethodNotAllowed, BodyTooLarge, HeadersTooLarge, RequestInvalid)
}


def problem_body(refusal: Refusal, *, request_id: str) -> dict[str, Any]:
    """Word `refusal` for the one who asked: code, status, what to do, and the id to look for in the log."""
    body: dict[str, Any] = {
        "type": f"urn:voicepass:problem:{refusal.code}",
        "title": refusal.title,
        "status": refusal.status,
        "detail": refusal.detail,
        "code": refusal.code,
        "request_id": request_id,
    }
    if refusal.retry_after_seconds is not None:
        body["retry_after_seconds"] = refusal.retry_after_seconds
    if refusal.checks:
        body["checks"] = dict(refusal.checks)
    if isinstance(refusal, LimitReached):
        resets_at = datetime.fromtimestamp(math.ceil(refusal.resets_at), UTC)
        body["resets_at"] = resets_at.isoformat().replace("+00:00", "Z")
    return body


def problem(refusal: Refusal, *, request_id: str) -> JSONResponse:
    """Answer with `refusal`."""
    headers = dict(refusal.headers)
    if refusal.retry_after_seconds is not None:
        headers["Retry-After"] = str(refusal.retry_after_seconds)
    if refusal.status == HTTPStatus.UNAUTHORIZED:
        invalid = "" if refusal.code == "token_missing" else ' error="invalid_token"'
        headers.setdefault("WWW-Authenticate", f"Bearer{invalid}")  # RFC 6750, section 3
    if isinstance(refusal, LimitReached):  # draft-ietf-httpapi-ratelimit-headers
        name = refusal.limit_name
        headers["RateLimit-Policy"] = f'"{name}";q={refusal.most};w={refusal.window_seconds}'
        headers["RateLimit"] = f'"{name}";r=0;t={refusal.retry_after_seconds}'
    body = problem_body(refusal, request_id=request_id)
    return JSONResponse(body, status_code=refusal.status, headers=headers, media_type=PROBLEM_JSON)


def noted(
    refusal: Refusal,
    *,
    request_id: str,
    client_request_id: str | None = None,
    service_token: str | None = None,
    asked: str | None = None,
) -> JSONResponse:
    """Answer with `refusal`, and write a line for the request id to lead to.

    `asked`: method and path. `service_token`: the name of the one that the request carried.
    """
    write = _log.error if refusal.is_operators_fault else _log.info
    write(
        "request.refused",
        code=refusal.code,
        asked=asked and redact(asked, most_characters=_ASKED_CHARACTERS),
        note=refusal.operator_note or None,
        request_id=request_id,
        client_request_id=client_request_id,
        service_token=service_token,
    )
    return problem(refusal, request_id=request_id)


def internal_error(error: Exception, *, request_id: str, client_request_id: str | None) -> JSONResponse:
    """Answer 500 for a mistake of ours. The log has where it happened, and not the message, which may hold anything."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else None
    _log.error(
        "request.failed",
        request_id=request_id,
        client_request_id=client_request_id,
        cause=type(error).__name__,
        where=where,
    )
    return problem(InternalError(), request_id=request_id)


def word_problems(app: FastAPI) -> None:
    """Make `app` answer every refusal, and every error that the framework raises itself, as a problem."""

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> JSONResponse:
        if getattr(request.state, "is_attempt", False):  # its observers have written it down
            return problem(refusal, request_id=request.state.request_id)
        service_token = getattr(request.state, "service_token", None)
        return noted(refusal, **request_ids(request), service_token=service_token, asked=_asked(request))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, _error: RequestValidationError) -> JSONResponse:
        # Not a word of the error: it repeats what was sent.
        return noted(RequestInvalid(_OF_ANOTHER_FORM), **request_ids(request), asked=_asked(request))

    @app.exception_handler(HTTPException)
    async def from_framework(request: Request, error: HTTPException) -> JSONResponse:
        refusal = _BY_STATUS.get(error.status_code, RequestInvalid)()
        response = noted(refusal, **request_ids(request), asked=_asked(request))
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            response.headers["Allow"] = ", ".join(_methods_of(request))  # the framework names the first route's only
        return response


def request_ids(request: Request) -> dict[str, Any]:
    """Return the ids that lead from a line to its request: ours, and the caller's."""
    return {"request_id": request.state.request_id, "client_request_id": request.state.client_request_id}


def _asked(request: Request) -> str:
    return f"{request.method} {request.url.path}"  # without the query: it may hold what should not be written


def _methods_of(request: Request) -> list[str]:
    at_this_path = (route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE)
    return sorted({method for route in at_this_path for method in route.methods})
