"""Which web pages of other origins may read the answers: those of listed origins, compared letter for letter."""

import string
from collections.abc import Sequence
from typing import Final

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp

from voicepass.api.middleware import add_headers
from voicepass.api.problems import log_and_answer
from voicepass.errors import OriginNotAllowed
from voicepass.model import new_id
from voicepass.telemetry.logs import redact

PREFLIGHT_SECONDS: Final = 600
MAX_REQUEST_HEADERS: Final = 20
MAX_SHOWN_CHARACTERS: Final = 100

_TOKEN_CHARACTERS: Final = frozenset(string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~")  # RFC 9110, 5.6.2


class Cors(CORSMiddleware):
    """Starlette's CORS. It is the outermost layer, so that a page of a listed origin can also read refusals."""

    def __init__(self, app: ASGIApp, *, allowed_origins: Sequence[str], with_cookies: bool) -> None:
        super().__init__(
            app,
            allow_origins=allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-ID", "Retry-After", "RateLimit", "RateLimit-Policy"],
            allow_credentials=with_cookies,
            max_age=PREFLIGHT_SECONDS,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a preflight. The page of a listed origin decides which headers it sends."""
        request_id = new_id()
        refusal = self._find_refusal(request_headers)
        if refusal is None:
            headers = {**self.preflight_headers, "Access-Control-Allow-Origin": request_headers["origin"]}
            if names := _list_tokens(request_headers.get("access-control-request-headers", "")):
                headers["Access-Control-Allow-Headers"] = ", ".join(names)
            response: Response = PlainTextResponse("OK", headers=headers)
        else:
            response = log_and_answer(refusal, request_id=request_id)
            response.headers["Vary"] = "Origin"
        add_headers(response.raw_headers, request_id=request_id)
        return response

    def _find_refusal(self, request_headers: Headers) -> OriginNotAllowed | None:
        origins = request_headers.getlist("origin")
        method = request_headers["access-control-request-method"]
        shown = redact(", ".join(origins), most_characters=MAX_SHOWN_CHARACTERS)
        if len(origins) > 1 or not self.is_allowed_origin(origins[0]):
            note = f"the preflight of {shown!r} is refused: if the page is yours, list it in VOICEPASS_ALLOWED_ORIGINS"
            return OriginNotAllowed(operator_note=note)
        if method not in self.allow_methods or "access-control-request-private-network" in request_headers:
            shown_method = redact(method, most_characters=MAX_SHOWN_CHARACTERS)
            note = f"{shown!r} is listed, but its preflight asks for {shown_method!r} or for a private network"
            return OriginNotAllowed("Pages of other origins may send GET and POST only.", operator_note=note)
        return None


def _list_tokens(asked: str) -> list[str]:
    names = [name for part in asked.split(",") if (name := part.strip()) and _TOKEN_CHARACTERS.issuperset(name)]
    return names[:MAX_REQUEST_HEADERS]
