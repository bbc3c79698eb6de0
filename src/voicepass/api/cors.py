"""Which pages of other origins may read the answers: those listed, letter for letter."""

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from voicepass.api.middleware import label
from voicepass.api.problems import noted
from voicepass.errors import OriginNotAllowed
from voicepass.model import new_id
from voicepass.telemetry.logs import redact

PREFLIGHT_SECONDS = 600


class Cors(CORSMiddleware):
    """Starlette's CORS for an exact list; it stands around all else, so that a listed page can read refusals too."""

    def __init__(self, app: ASGIApp, *, allowed_origins: Sequence[str], with_cookies: bool) -> None:
        super().__init__(
            app,
            allow_origins=allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-ID", "traceparent", "tracestate"],
            expose_headers=["X-Request-ID", "Retry-After", "RateLimit", "RateLimit-Policy"],
            allow_credentials=with_cookies,
            max_age=PREFLIGHT_SECONDS,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a preflight; one that is turned away is a problem like any other."""
        request_id = new_id()
        response = super().preflight_response(request_headers)
        if response.status_code != 200:  # noqa: PLR2004
            origin = redact(request_headers.get("origin", ""), most_characters=100)
            refusal = OriginNotAllowed(
                operator_note=f"the preflight of {origin!r} was turned away: if it is yours, list it in "
                "VOICEPASS_ALLOWED_ORIGINS; headers may be Authorization, Content-Type, X-Request-ID, traceparent "
                "and tracestate"
            )
            response = noted(refusal, request_id=request_id)
            response.headers["Vary"] = "Origin"
        label(response.raw_headers, request_id=request_id)
        return response
