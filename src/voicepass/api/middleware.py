"""What holds for every request before any route sees it: a request id, limits on headers and body, safe headers."""

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from voicepass.api.draining import Draining
from voicepass.api.problems import internal_error, noted
from voicepass.api.proxies import Network, client_address, is_in
from voicepass.errors import BodyTooLarge, HeadersTooLarge, Malformed, Refusal
from voicepass.model import Clock, new_id
from voicepass.settlement.webhook import check_signature_header

MAX_HEADER_BYTES: Final = 16 * 1024
MAX_HEADER_FIELDS: Final = 100
MAX_BODY_BYTES: Final = 16 * 1024
MAX_WEBHOOK_BYTES: Final = 1024 * 1024  # a long transcript; recordings are larger, and of no use here
WEBHOOK_PATH: Final = "/v1/webhooks/elevenlabs"
MAX_WEBHOOKS_AT_ONCE: Final = 16

_VERSIONS: Final = {"1.0", "1.1", "2", "3"}  # a parser may also report 0.9, 1.2 or 2.0
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
_SAFE_HEADERS: Final = {
    b"cache-control": b"no-store",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-site",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
}
_HTML: Final = b"text/html"  # /docs, where it is asked for, needs its scripts


Fields = Mapping[str, Sequence[str]]
"""Header fields: by the name in lower case, their values as they came, in order."""


class Surface:
    """Plain ASGI, around everything but CORS.

    `request.state` has request_id, client_request_id, client (its address), fields and body. A trusted proxy's
    X-Request-ID becomes request_id. Any other caller's is client_request_id, because two callers may send the same one.

    The body is read here, whole, before the app runs: it is small by decree, and so no route can meet half of one.
    A webhook's may be larger. Anyone can send one, so its signature's form and age are checked first. A few large ones
    are read at a time, and the others wait in their sockets.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        trusted_proxies: Sequence[Network] = (),
        draining: Draining | None = None,
        clock: Clock = time.time,
    ) -> None:
        self._app = app
        self._clock = clock
        self._trusted_proxies = trusted_proxies
        self._draining = draining
        self._webhooks = asyncio.Semaphore(MAX_WEBHOOKS_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; anything but HTTP passes untouched."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        fields = _fields(scope)
        peer = scope["client"][0] if scope.get("client") else None
        sent_id = _sent_request_id(fields)
        is_from_proxy = is_in(peer, self._trusted_proxies)
        request_id = sent_id if sent_id is not None and is_from_proxy else new_id()
        client_request_id = None if is_from_proxy else sent_id
        client = client_address(peer, fields.get("x-forwarded-for", ()), self._trusted_proxies)
        state = scope.setdefault("state", {})
        ids: dict[str, Any] = {"request_id": request_id, "client_request_id": client_request_id}
        state |= ids | {"client": client, "fields": fields}
        begun = False

        async def send_safely(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                label(message["headers"], request_id=request_id)
                if self._draining is not None and self._draining.has_begun:
                    # Else the peer might send its next request just as we hang up.
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            _check_form(scope, fields)
            _check_headers(scope)
            body = await self._body(scope, fields, receive)
            if body is not None:
                state["body"] = body
                await self._app(scope, _replayed(body, receive), send_safely)
        except Refusal as refusal:
            refused = noted(refusal, **ids, asked=f"{scope['method']} {scope['path']}")
            if isinstance(refusal, Malformed):
                refused.headers["Connection"] = "close"  # where the next request begins is anyone's guess
            await refused(scope, receive, send_safely)
        except Exception as error:  # noqa: BLE001 - the edge: nothing may reach the caller as a bare 500
            answer = internal_error(error, **ids)
            if not begun:
                await answer(scope, receive, send_safely)

    async def _body(self, scope: Scope, fields: Fields, receive: Receive) -> bytes | None:
        if scope["path"] != WEBHOOK_PATH or scope["method"] != "POST":
            return await _read(receive, MAX_BODY_BYTES)
        check_signature_header(webhook_signature(fields), self._clock())
        return await _read(receive, MAX_WEBHOOK_BYTES, slots=self._webhooks)


def webhook_signature(fields: Fields) -> str:
    """Return the signature of a webhook. Two headers become one with a comma and a space, which none may hold."""
    return ", ".join(fields.get("elevenlabs-signature", ()))


def label(headers: list[tuple[bytes, bytes]], *, request_id: str) -> None:
    """Give an answer the headers that every answer of ours bears, but for those that it has already."""
    given = dict(headers)  # ASGI: names are in lower case
    headers.append((b"x-request-id", request_id.encode("ascii")))
    headers.extend(header for header in _SAFE_HEADERS.items() if header[0] not in given)
    if given.get(b"content-type", b"").startswith(_HTML):
        headers.remove((b"content-security-policy", _SAFE_HEADERS[b"content-security-policy"]))


def _fields(scope: Scope) -> Fields:
    fields: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        fields.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))
    return fields


def _sent_request_id(fields: Fields) -> str | None:
    """Return the one well-formed X-Request-ID; None for any other, and for two headers."""
    sent = fields.get("x-request-id", ())
    return sent[0] if len(sent) == 1 and _REQUEST_ID.fullmatch(sent[0]) else None


def _check_form(scope: Scope, fields: Fields) -> None:
    """Refuse what two readers of the same bytes could take in two ways: each parser lets one or another through."""
    version, hosts = scope.get("http_version", "1.0"), len(fields.get("host", ()))
    is_chunked, lengths = "transfer-encoding" in fields, fields.get("content-length", ["0"])
    has_body = is_chunked or lengths[0] != "0"
    if (
        version not in _VERSIONS
        or hosts > 1
        or (hosts == 0 and version == "1.1")
        or (is_chunked and "content-length" in fields)
        or ("upgrade" in fields and has_body)  # httptools drops such a body, or takes it for the next request
    ):
        raise Malformed


def _check_headers(scope: Scope) -> None:
    headers = scope["headers"]
    size = sum(len(name) + len(value) for name, value in headers) + len(scope.get("raw_path", b""))
    if len(headers) > MAX_HEADER_FIELDS or size + len(scope["query_string"]) > MAX_HEADER_BYTES:
        raise HeadersTooLarge


async def _read(receive: Receive, most_bytes: int, *, slots: asyncio.Semaphore | None = None) -> bytes | None:
    """Return the whole body, or None where the caller hung up before its end: then nobody waits for an answer.

    What is longer than 16 kB waits for one of the `slots`: a connection that sends nothing holds none.
    """
    body = bytearray()
    async with AsyncExitStack() as stack:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > most_bytes:
                raise BodyTooLarge(f"The body is larger than {most_bytes // 1024} kB.")
            if not message.get("more_body", False):
                return bytes(body)
            if slots is not None and len(body) > MAX_BODY_BYTES:
                await stack.enter_async_context(slots)
                slots = None


def _replayed(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()  # a disconnect, one day
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
