"""The browser's half of voicepass, client.js and its types, as they lie beside this file."""

import hashlib
from importlib.resources import files
from typing import Final

from fastapi import APIRouter, Request, Response

# Not no-store, as all else: it is the same for everyone and holds nothing of anyone. But asked about each time, so
# that a page never runs the client of another release than the service's: 304 costs less than a stale bug.
_HEADERS: Final = {"Cache-Control": "public, no-cache"}

module_routes = APIRouter(prefix="/v1", include_in_schema=False)


@module_routes.get("/client.js")
def get_client(request: Request) -> Response:
    """Serve the module. Cross-origin imports need CORS, which listed origins have."""
    return _shipped("client.js", "text/javascript", request)


@module_routes.get("/client.d.ts")
def get_client_types(request: Request) -> Response:
    """Serve its types, to be read or saved; no browser runs them."""
    return _shipped("client.d.ts", "text/plain", request)


def _shipped(name: str, media_type: str, request: Request) -> Response:
    content = files(__package__).joinpath(name).read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = _HEADERS | {"ETag": etag}
    # Compressing proxies make it weak, and `*` is no browser's: enough of RFC 9110, section 13.1.2, for a module.
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=media_type, headers=headers)
