"""What holds for every request before any route sees it: ids, the caller's address, limits on headers and body.

It also answers every refusal.
"""

import asyncio
import ipaddress
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from voicepass.api.draining import Draining
from voicepass.api.problems import answer, log_and_answer, log_and_answer_bug
from voicepass.errors import BodyTooLarge, HeadersTooLarge, Malformed, Refusal
from voicepass.model import Clock, new_id
from voicepass.settlement.webhook import check_signature_header
from voicepass.telemetry.logger import redact

MAX_HEADER_BYTES: Final = 16 * 1024
MAX_HEADER_FIELDS: Final = 100
MAX_BODY_BYTES: Final = 16 * 1024
MAX_WEBHOOK_BYTES: Final = 1024 * 1024  # a long transcript; a recording is larger, and voicepass does not need it
WEBHOOK_PATH: Final = "/v1/webhooks/elevenlabs"
MAX_WEBHOOKS_AT_ONCE: Final = 16
MAX_LOGGED_CHARACTERS: Final = 100

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

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_WITH_PORT: Final = re.compile(r"([0-9.]{7,15}):[0-9]{1,5}|\[([0-9a-fA-F]{0,4}:[0-9a-fA-F:.]{1,40})\](?::[0-9]{1,5})?")

Fields = Mapping[str, Sequence[str]]
"""Header fields: by the name in lower case, their values as they came, in order."""


@dataclass(eq=False)
class Surface:
    """Plain ASGI, around everything but CORS.

    `request.state` has ids, client (its address), fields and body. Log lines name a request by its ids: a trusted
    proxy's X-Request-ID becomes request_id; any other caller's is client_request_id, because two callers may send the
    same id.

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
            _check_head(scope, fields)
            state["body"] = await self._read_body(scope, fields, receive)
            await self.app(scope, _receive_again(state["body"], receive), send_safely)
        except ClientDisconnect:
            return  # nobody waits for an answer
        except Refusal as refusal:
            if state.get("is_attempt"):  # the attempt's observers have logged it
                response = answer(refusal, request_id=ids["request_id"])
            else:  # the line omits the query, which may hold a secret
                asked = redact(f"{scope['method']} {scope['path']}", most_characters=MAX_LOGGED_CHARACTERS)
                response = log_and_answer(refusal, **ids, service_token=state.get("service_token"), asked=asked)
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
        is_from_proxy = _is_in(peer, self.trusted_proxies)
        ids = {
            "request_id": sent_id if sent_id is not None and is_from_proxy else new_id(),
            "client_request_id": None if is_from_proxy else sent_id,
        }
        client = client_address(peer, fields.get("x-forwarded-for", ()), self.trusted_proxies)
        state |= {"ids": ids, "client": client, "fields": fields}
        return ids

    async def _read_body(self, scope: Scope, fields: Fields, receive: Receive) -> bytes:
        """Return the whole body. Raises ClientDisconnect if the caller closes the connection.

        A body of more than 16 kB waits for one of the slots. A connection that sends nothing holds none.
        """
        most_bytes = MAX_BODY_BYTES
        if scope["method"] == "POST" and _path_in_app(scope) == WEBHOOK_PATH:
            check_signature_header(webhook_signature(fields), self.clock())
            most_bytes = MAX_WEBHOOK_BYTES
        declared = fields.get("content-length", ("",))[0]
        size = int(declared) if declared.isdecimal() else 0
        body, has_more = bytearray(), True
        async with AsyncExitStack() as slot:
            while has_more and size <= most_bytes:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                was_large = len(body) > MAX_BODY_BYTES
                body += message.get("body", b"")
                size = max(size, len(body))
                has_more = message.get("more_body", False)
                # Only once: with the chunk that crosses 16 kB.
                if has_more and not was_large and MAX_BODY_BYTES < len(body) <= most_bytes:
                    await slot.enter_async_context(self._webhook_slots)
        if size > most_bytes:
            raise BodyTooLarge(f"The body is larger than {most_bytes // 1024} kB.")
        return bytes(body)


def webhook_signature(fields: Fields) -> str:
    """Return the signature of a webhook. Two headers become one with a comma and a space, which none may hold."""
    return ", ".join(fields.get("elevenlabs-signature", ()))


def add_headers(headers: list[tuple[bytes, bytes]], *, request_id: str) -> None:
    """Add the headers that every answer has, but none that this one already has."""
    present = dict(headers)  # ASGI: names are in lower case
    is_page = present.get(b"content-type", b"").startswith(b"text/html")  # /docs, which needs its scripts
    skipped = {*present, _POLICY} if is_page else {*present}
    headers.append((b"x-request-id", request_id.encode("ascii")))
    headers.extend((name, value) for name, value in _SAFE_HEADERS.items() if name not in skipped)


def client_address(peer: str | None, forwarded_for: Sequence[str], trusted: Sequence[Network]) -> str | None:
    """Return the address a request came from: the rightmost hop that is not a trusted proxy.

    `forwarded_for` holds the values of the X-Forwarded-For headers, in order. A client can write anything into them.
    Only what a trusted proxy appended counts, so they are read from the right, and only if `peer` is trusted.
    """
    hops = [_remove_port(hop.strip()) for value in forwarded_for for hop in value.split(",")]
    address = peer
    while _is_in(address, trusted) and hops:
        nearer = hops.pop()
        if _parse(nearer) is None or "%" in nearer:  # the name of a zone, which may be any text
            break
        address = nearer
    return address


def _is_in(address: str | None, networks: Sequence[Network]) -> bool:
    """Whether `address` belongs to one of the networks; False for text that is not an address."""
    parsed = _parse(address) if networks and address is not None else None
    return parsed is not None and any(parsed in network for network in networks)


def _remove_port(hop: str) -> str:
    """Return the address in `192.0.2.1:4711`, `[2001:db8::1]:4711` or `[2001:db8::1]`; other text as it is."""
    written = _WITH_PORT.fullmatch(hop)
    return written[1] or written[2] if written else hop


def _parse(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return None
    # A socket for both versions reports 10.0.0.1 as ::ffff:10.0.0.1.
    return getattr(parsed, "ipv4_mapped", None) or parsed


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


def _check_head(scope: Scope, fields: Fields) -> None:
    """Refuse headers that are too large, and requests that two servers could understand differently."""
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
    headers = scope["headers"]
    size = sum(len(name) + len(value) for name, value in headers) + len(scope.get("raw_path", b""))
    if len(headers) > MAX_HEADER_FIELDS or size + len(scope["query_string"]) > MAX_HEADER_BYTES:
        raise HeadersTooLarge


def _receive_again(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives `body` first, and then what the connection gives."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive_again() -> Message:
        return next(messages, None) or await receive()

    return receive_again
