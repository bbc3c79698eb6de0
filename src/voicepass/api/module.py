"""Serves client.js, the browser's part of voicepass, and its types. Both are files beside this one."""

import hashlib
from functools import partial
from importlib.resources import files
from typing import Final

from fastapi import Request, Response
from starlette.routing import Route

# Unlike all other answers it may be stored, because it is the same for everyone. The browser asks about it each time,
# so that a page never runs the client of another release.
_HEADERS: Final = {"Cache-Control": "public, no-cache"}

_FILES: Final = {"client.js": "text/javascript", "client.d.ts": "text/plain"}
"""The module, which a page of a listed origin can import, and its types for people to read or save."""


def _serve_file(name: str, request: Request) -> Response:
    content = files(__package__).joinpath(name).read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = _HEADERS | {"ETag": etag}
    # A compressing proxy adds W/ in front of it, and no browser sends `*` (RFC 9110, section 13.1.2).
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=_FILES[name], headers=headers)


module_routes: Final = [Route(f"/v1/{name}", partial(_serve_file, name), include_in_schema=False) for name in _FILES]
