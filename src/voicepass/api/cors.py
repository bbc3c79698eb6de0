"""Which web pages of other origins may read the answers: those of listed origins, compared letter for letter."""

import string
from collections.abc import Sequence
from http import HTTPStatus
from time import monotonic
from typing import Final

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from voicepass.api.middleware import MAX_LOGGED_CHARACTERS, add_headers
from voicepass.api.problems import answer
from voicepass.errors import OriginNotAllowed
from voicepass.model import MonotonicClock, new_id
from voicepass.telemetry.logger import Logger, redact

PREFLIGHT_SECONDS: Final = 600
MAX_REQUEST_HEADERS: Final = 20
WARNING_SECONDS: Final = 3600.0
"""A refused preflight is logged once in this time for each origin."""
MAX_WARNINGS: Final = 1000
"""The most origins that the log warns of in this time. Anyone can invent origins."""

_TOKEN_CHARACTERS: Final = frozenset(string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~")  # RFC 9110, 5.6.2

_log = Logger("voicepass.api")


class Cors(CORSMiddleware):
    """Starlette's CORS. It is the outermost layer, so that a page of a listed origin can also read refusals."""

    def __init__(
        self, app: ASGIApp, *, allowed_origins: Sequence[str], with_cookies: bool, ticks: MonotonicClock = monotonic
    ) -> None:
        super().__init__(
            app,
            allow_origins=allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-ID", "Retry-After", "RateLimit", "RateLimit-Policy"],
            allow_credentials=with_cookies,
            max_age=PREFLIGHT_SECONDS,
        )
        self._ticks = ticks
        self._warned_at: dict[str, float] = {}

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a preflight. The page of a listed origin decides which headers it sends."""
        request_id = new_id()
        response = super().preflight_response(request_headers)
        if response.status_code != HTTPStatus.OK or len(request_headers.getlist("origin")) > 1:
            refusal = self._explain(request_headers)
            self._warn(refusal, request_id=request_id)
            response = answer(refusal, request_id=request_id)
            response.headers["Vary"] = "Origin"
        elif (asked := request_headers.get("access-control-request-headers")) is not None:
            response.headers["Access-Control-Allow-Headers"] = ", ".join(_list_tokens(asked))
        add_headers(response.raw_headers, request_id=request_id)
        return response

    def _warn(self, refusal: OriginNotAllowed, *, request_id: str) -> None:
        now = self._ticks()
        note = refusal.operator_note
        self._warned_at = {other: at for other, at in self._warned_at.items() if now - at < WARNING_SECONDS}
        if note not in self._warned_at and len(self._warned_at) < MAX_WARNINGS:
            self._warned_at[note] = now
            _log.warning("request.refused", code=refusal.code, note=note, request_id=request_id)

    def _explain(self, request_headers: Headers) -> OriginNotAllowed:
        origins = request_headers.getlist("origin")
        shown = redact(", ".join(origins), most_characters=MAX_LOGGED_CHARACTERS)
        if len(origins) == 1 and self.is_allowed_origin(origins[0]):
            method = redact(request_headers["access-control-request-method"], most_characters=MAX_LOGGED_CHARACTERS)
            note = f"{shown!r} is listed, but its preflight asks for {method!r} or for a private network"
            return OriginNotAllowed("Pages of other origins may send GET and POST only.", operator_note=note)
        note = f"the preflight of {shown!r} is refused: if the page is yours, list it in VOICEPASS_ALLOWED_ORIGINS"
        return OriginNotAllowed(operator_note=note)


def _list_tokens(asked: str) -> list[str]:
    names = [name for part in asked.split(",") if (name := part.strip()) and _TOKEN_CHARACTERS.issuperset(name)]
    return names[:MAX_REQUEST_HEADERS]
