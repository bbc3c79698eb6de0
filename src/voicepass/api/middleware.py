"""What holds for every request before any route sees it: a request id, limits on headers and body, safe headers."""

import re
import uuid
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from voicepass.api.problems import internal_error, problem
from voicepass.errors import BodyTooLarge, HeadersTooLarge, Refusal

MAX_HEADER_BYTES: Final = 16 * 1024
MAX_HEADER_FIELDS: Final = 100
MAX_BODY_BYTES: Final = 16 * 1024

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{8,128}", re.ASCII)
_SAFE_HEADERS: Final = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Surface:
    """Plain ASGI, the outermost layer of the API.

    The body is read here, whole, before the app runs: it is small by decree, and so no route can meet half of one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; anything but HTTP passes untouched."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        begun = False

        async def send_safely(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                for name, value in _SAFE_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            _check_headers(scope)
            body = await _read(receive)
            if body is not None:
                await self._app(scope, _replayed(body, receive), send_safely)
        except Refusal as refusal:
            await problem(refusal, request_id=request_id)(scope, receive, send_safely)
        except Exception as error:  # noqa: BLE001 - the edge: nothing may reach the caller as a bare 500
            answer = internal_error(error, request_id=request_id)
            if not begun:
                await answer(scope, receive, send_safely)


def _request_id(scope: Scope) -> str:
    sent = Headers(scope=scope).getlist("x-request-id")
    if len(sent) == 1 and _REQUEST_ID.fullmatch(sent[0]):
        return sent[0]
    return uuid.uuid4().hex


def _check_headers(scope: Scope) -> None:
    headers = scope["headers"]
    size = sum(len(name) + len(value) for name, value in headers) + len(scope.get("raw_path", b""))
    if len(headers) > MAX_HEADER_FIELDS or size + len(scope["query_string"]) > MAX_HEADER_BYTES:
        raise HeadersTooLarge


async def _read(receive: Receive) -> bytes | None:
    """Return the whole body, or None where the caller hung up before its end: then nobody waits for an answer."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise BodyTooLarge
        if not message.get("more_body", False):
            return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()  # a disconnect, one day
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
