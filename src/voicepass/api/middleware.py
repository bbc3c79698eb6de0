"""What holds for every request before any route sees it: a request id, limits on headers and body, safe headers."""

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from voicepass.api.draining import Draining
from voicepass.api.problems import log_and_answer, log_and_answer_bug
from voicepass.api.proxies import Network, client_address, is_in
from voicepass.errors import BodyTooLarge, HeadersTooLarge, Malformed, Refusal
from voicepass.model import Clock, new_id
from voicepass.settlement.webhook import check_signature_header

MAX_HEADER_BYTES: Final = 16 * 1024
MAX_HEADER_FIELDS: Final = 100
MAX_BODY_BYTES: Final = 16 * 1024
MAX_WEBHOOK_BYTES: Final = 1024 * 1024  # a long transcript; a recording is larger, and voicepass does not need it
WEBHOOK_PATH: Final = "/v1/webhooks/elevenlabs"
MAX_WEBHOOKS_AT_ONCE: Final = 16

_VERSIONS: Final = {"1.0", "1.1", "2", "3"}  # a parser may also report 0.9, 1.2 or 2.0
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
_POLICY: Final = b"content-security-policy"
_SAFE_HEADERS: Final = {
    b"cache-control": b"no-store",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-site",
    _POLICY: b"default-src 'none'; frame-ancestors 'none'",
}

Fields = Mapping[str, Sequence[str]]
"""Header fields: by the name in lower case, their values as they came, in order."""


@dataclass(eq=False)
class Surface:
    """Plain ASGI, around everything but CORS.

    `request.state` has request_id, client_request_id, client (its address), fields and body. A trusted proxy's
    X-Request-ID becomes request_id. Any other caller's is client_request_id, because two callers may send the same one.

    It reads the whole body before the app runs, so no route can receive half of one. A webhook may be larger. Anyone
    can send one, so its signature's form and age are checked first. A few large ones are read at a time, and the others
    wait in their sockets.
    """

    app: ASGIApp
    trusted_proxies: Sequence[Network] = ()
    draining: Draining | None = None
    clock: Clock = time.time
    _webhook_slots: asyncio.Semaphore = field(
        default_factory=lambda: asyncio.Semaphore(MAX_WEBHOOKS_AT_ONCE), init=False
    )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Anything but HTTP goes to the app unchanged."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        _remove_repeated_prefix(scope)
        fields = _read_fields(scope)
        state = scope.setdefault("state", {})
        ids = self._identify(scope, fields, state)
        has_begun = False

        async def send_safely(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                add_headers(message["headers"], request_id=ids["request_id"])
                if self.draining is not None and self.draining.has_begun:
                    # Otherwise the peer might send its next request just as the server closes the connection.
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            _check_form(scope, fields)
            _check_headers(scope)
            body = await self._read_body(scope, fields, receive)
            if body is not None:
                state["body"] = body
                await self.app(scope, _receive_again(body, receive), send_safely)
        except Refusal as refusal:
            response = log_and_answer(refusal, **ids, asked=f"{scope['method']} {scope['path']}")
            if isinstance(refusal, Malformed):
                response.headers["Connection"] = "close"  # nobody knows where the next request begins
            await response(scope, receive, send_safely)
        except Exception as error:  # noqa: BLE001 - the edge: the caller always gets a problem document
            response = log_and_answer_bug(error, **ids)
            if not has_begun:
                await response(scope, receive, send_safely)

    def _identify(self, scope: Scope, fields: Fields, state: dict[str, Any]) -> dict[str, Any]:
        """Put into `state` which request this is and from where, and return both ids."""
        peer = scope["client"][0] if scope.get("client") else None
        sent = fields.get("x-request-id", ())
        sent_id = sent[0] if len(sent) == 1 and _REQUEST_ID.fullmatch(sent[0]) else None
        is_from_proxy = is_in(peer, self.trusted_proxies)
        ids = {
            "request_id": sent_id if sent_id is not None and is_from_proxy else new_id(),
            "client_request_id": None if is_from_proxy else sent_id,
        }
        client = client_address(peer, fields.get("x-forwarded-for", ()), self.trusted_proxies)
        state |= ids | {"client": client, "fields": fields}
        return ids

    async def _read_body(self, scope: Scope, fields: Fields, receive: Receive) -> bytes | None:
        most_bytes, slots = MAX_BODY_BYTES, None
        if scope["method"] == "POST" and _path_in_app(scope) == WEBHOOK_PATH:
            check_signature_header(webhook_signature(fields), self.clock())
            most_bytes, slots = MAX_WEBHOOK_BYTES, self._webhook_slots
        declared = fields.get("content-length", ("",))[0]
        if declared.isdecimal() and int(declared) > most_bytes:
            raise _body_too_large(most_bytes)
        return await _receive_body(receive, most_bytes, slots)


def webhook_signature(fields: Fields) -> str:
    """Return the signature of a webhook. Two headers become one with a comma and a space, which none may hold."""
    return ", ".join(fields.get("elevenlabs-signature", ()))


def add_headers(headers: list[tuple[bytes, bytes]], *, request_id: str) -> None:
    """Add the headers that every answer has, but none that this one already has."""
    present = dict(headers)  # ASGI: names are in lower case
    is_page = present.get(b"content-type", b"").startswith(b"text/html")  # /docs, which needs its scripts
    headers.append((b"x-request-id", request_id.encode("ascii")))
    headers.extend(
        (name, value)
        for name, value in _SAFE_HEADERS.items()
        if name not in present and not (is_page and name == _POLICY)
    )


def _path_in_app(scope: Scope) -> str:
    """Return the path without the prefix of a mount or of --root-path."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _remove_repeated_prefix(scope: Scope) -> None:
    """Remove the prefix that a proxy did not remove. uvicorn puts --root-path in front of every path."""
    prefix = scope.get("root_path", "")
    path = _path_in_app(scope)
    if prefix and path.startswith(f"{prefix}/") and not path.startswith("/v1/"):
        scope["path"] = path


def _read_fields(scope: Scope) -> Fields:
    fields: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        fields.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))
    return fields


def _check_form(scope: Scope, fields: Fields) -> None:
    """Refuse a request that two servers could understand differently. Each parser accepts one or another of these."""
    version, hosts = scope.get("http_version", "1.0"), len(fields.get("host", ()))
    is_chunked, lengths = "transfer-encoding" in fields, fields.get("content-length", ["0"])
    has_body = is_chunked or lengths[0] != "0"
    if (
        version not in _VERSIONS
        or hosts > 1
        or (hosts == 0 and version == "1.1")
        or len(fields.get("origin", ())) > 1
        or (is_chunked and "content-length" in fields)
        or ("upgrade" in fields and has_body)  # httptools without our protocol does not read such a body
    ):
        raise Malformed


def _check_headers(scope: Scope) -> None:
    headers = scope["headers"]
    size = sum(len(name) + len(value) for name, value in headers) + len(scope.get("raw_path", b""))
    if len(headers) > MAX_HEADER_FIELDS or size + len(scope["query_string"]) > MAX_HEADER_BYTES:
        raise HeadersTooLarge


async def _receive_body(receive: Receive, most_bytes: int, slots: asyncio.Semaphore | None) -> bytes | None:
    """Return the whole body, or None if the caller closed the connection: then nobody waits for an answer.

    A body of more than 16 kB waits for one of the `slots`. A connection that sends nothing holds none.
    """
    body = bytearray()
    async with AsyncExitStack() as stack:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > most_bytes:
                raise _body_too_large(most_bytes)
            if not message.get("more_body", False):
                return bytes(body)
            if slots is not None and len(body) > MAX_BODY_BYTES:
                await stack.enter_async_context(slots)
                slots = None


def _body_too_large(most_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body is larger than {most_bytes // 1024} kB.")


def _receive_again(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives `body` first, and then what the connection gives."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive_again() -> Message:
        return next(messages, None) or await receive()

    return receive_again
