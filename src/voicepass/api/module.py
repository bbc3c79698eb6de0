"""Serves client.js, the browser's part of voicepass, and its types. Both are files beside this one."""

import hashlib
from importlib.resources import files
from typing import Final

from fastapi import APIRouter, Request, Response

# Unlike all other answers it may be stored, because it is the same for everyone. The browser asks about it each time,
# so that a page never runs the client of another release.
_HEADERS: Final = {"Cache-Control": "public, no-cache"}

module_routes = APIRouter(prefix="/v1", include_in_schema=False)


@module_routes.head("/client.js")
@module_routes.get("/client.js")
def get_client(request: Request) -> Response:
    """Serve the module. A page of another origin can import it if that origin is listed."""
    return _serve_file("client.js", "text/javascript", request)


@module_routes.head("/client.d.ts")
@module_routes.get("/client.d.ts")
def get_client_types(request: Request) -> Response:
    """Serve the module's types, for people to read or save."""
    return _serve_file("client.d.ts", "text/plain", request)


def _serve_file(name: str, media_type: str, request: Request) -> Response:
    content = files(__package__).joinpath(name).read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = _HEADERS | {"ETag": etag}
    # A compressing proxy adds W/ in front of it, and no browser sends `*` (RFC 9110, section 13.1.2).
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=media_type, headers=headers)
