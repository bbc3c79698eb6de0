"""The one HTTP client, and the bounds on the answers that it accepts.

Callers see httpx's requests, answers and errors, and aiohttp transports them. `benchmarks/README.md` compares it with
other clients. To use another one, change only `http_transport`.
"""

import ipaddress
import ssl
import zlib
from collections.abc import AsyncIterator, Collection
from functools import cache, lru_cache
from typing import Final, NamedTuple, cast
from urllib.parse import urlsplit

import aiohttp
import certifi
import httpx
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.connector import Connection
from aiohttp.tracing import Trace
from yarl import URL

MAX_HEADER_BYTES: Final = 16 * 1024
IDLE_SECONDS: Final = 30

HEADERS: Final = {"accept": "application/json", "accept-encoding": "identity", "user-agent": "voicepass"}
"""Of every request. voicepass asks for no compression; some proxies compress all the same."""


def is_safe_url(url: str, *, plain_http_hosts: Collection[str] = ()) -> bool:
    """Whether a secret, or trust in what comes back, may travel there.

    It may over https://, and over http:// to this machine or to a host that the operator named.
    """
    # `urlsplit` drops line breaks and takes spaces for part of a host; what dials the URL would not agree with it.
    if not url.isprintable() or any(mark in url for mark in " \\#"):
        return False
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        is_secure = parts.scheme == "https"
        if parts.scheme == "http":
            is_secure = host == "localhost" or host in plain_http_hosts or ipaddress.ip_address(host).is_loopback
        return is_secure and bool(host) and parts.username is None and parts.port != 0
    except ValueError:  # a port that is no number, or another host's name
        return False


class AnswerUnusableError(httpx.DecodingError):
    """The answer is outside the bounds, or no HTTP. The message is for the log and repeats nothing of the answer."""


class CertificateRefusedError(httpx.ConnectError):
    """The server's certificate is not valid for it. The message is for the log: the reason, and what to do."""


class Answer(NamedTuple):
    """A whole answer, within the bounds."""

    status: int
    headers: httpx.Headers
    body: bytes


def http_transport(*, connect_seconds: float) -> httpx.AsyncBaseTransport:
    """Return the one shared transport, in a running loop; `async with` closes it.

    It follows no redirect, because that would send `xi-api-key` to another origin. It uses no proxy of the environment.
    It verifies certificates against the system's roots (or SSL_CERT_FILE) and certifi's, so it also works in an image
    without roots. Only connecting, with the lookup of the name, has a time limit of its own. A cancelled call closes
    its connection at once.
    """
    return AiohttpTransport(
        aiohttp.ClientSession(
            connector=_Connector(ssl=_trusting(), limit=0, keepalive_timeout=IDLE_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, connect=connect_seconds),
            skip_auto_headers=(*HEADERS, "content-type"),
            middlewares=[_once],
            auto_decompress=False,
            max_field_size=MAX_HEADER_BYTES,
        )
    )


@cache
def _trusting() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


async def get(transport: httpx.AsyncBaseTransport, request: httpx.Request, *, most_bytes: int) -> Answer:
    """Send `request` and return the whole answer.

    Raises AnswerUnusableError, httpx.ConnectError if the connection broke before any answer, httpx.ReadError if it
    broke in the middle of one, and other httpx errors. None of them repeats a header of the request.
    """
    # httpx's client in front of the transport would double the cost of a call.
    try:
        response = await transport.handle_async_request(request)
        try:
            return Answer(response.status_code, response.headers, await _body(response, most_bytes))
        finally:
            await response.aclose()
    except (aiohttp.ClientError, ValueError) as error:
        failed = _to_httpx_error(error)
    raise failed  # not from aiohttp's error, which may hold the API key


async def _body(response: httpx.Response, most_bytes: int) -> bytes:
    if sum(len(name) + len(value) for name, value in response.headers.raw) > MAX_HEADER_BYTES:
        raise AnswerUnusableError(f"the answer's headers are longer than {MAX_HEADER_BYTES} bytes")
    encoding = response.headers.get("content-encoding", "identity").lower()
    if encoding not in {"identity", "gzip", "x-gzip", "deflate"}:
        raise AnswerUnusableError("the answer is compressed in a way that voicepass did not ask for and cannot read")
    body = bytearray()
    # The raw stream, because httpx's own readers would inflate it, or refuse an answer that a test made.
    async for chunk in cast("httpx.AsyncByteStream", response.stream):
        body += chunk
        if len(body) > most_bytes:
            raise AnswerUnusableError(f"the answer is longer than {most_bytes} bytes")
    return bytes(body) if encoding == "identity" else _inflate(bytes(body), most_bytes)


def _inflate(body: bytes, most_bytes: int) -> bytes:
    """Return what `body` was before a proxy compressed it without being asked. It stops at `most_bytes`."""
    # 32: gzip or zlib, as the first bytes say. Some servers send deflate without zlib's header (RFC 9110, 8.4.1.2).
    has_header = body[:2] == b"\x1f\x8b" or body[:1] == b"\x78"
    inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32 if has_header else -zlib.MAX_WBITS)
    try:
        inflated = inflater.decompress(body, most_bytes + 1)
    except zlib.error as error:
        raise AnswerUnusableError("the answer is not compressed as it says") from error
    if len(inflated) > most_bytes or not inflater.eof or inflater.unused_data:
        raise AnswerUnusableError(f"the answer is longer than {most_bytes} bytes when inflated, or not complete")
    return inflated


class _Connector(aiohttp.TCPConnector):
    """aiohttp's connector, with two changes to the connections that it keeps.

    It aborts what it does not keep, and keeps none on which the peer sent something before the next request. Both
    methods are private to aiohttp, so pyproject.toml has a narrow bound on its version.
    """

    async def _get(self, key: ConnectionKey, traces: list[Trace]) -> Connection | None:
        # aiohttp checks only when it stores a connection. Bytes that come later would answer the next request.
        while (kept := await super()._get(key, traces)) and kept.protocol and kept.protocol.should_close:
            kept.close()
        return kept

    def _release(self, key: ConnectionKey, protocol: ResponseHandler, *, should_close: bool = False) -> None:
        if should_close or protocol.should_close:
            protocol.abort()  # closing TLS would wait for the peer, up to half a minute
        super()._release(key, protocol, should_close=should_close)


async def _once(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Send a request once. aiohttp would send it again if the connection breaks; `resilience` decides about retries."""
    try:
        return await send(request)
    except aiohttp.ClientConnectorCertificateError as error:
        reason = getattr(error.certificate_error, "verify_message", "") or type(error.certificate_error).__name__
        raise CertificateRefusedError(
            f"the certificate of {error.host} was refused ({reason}); check the address, the clock and its expiry,"
            " and name a private CA in SSL_CERT_FILE"
        ) from error
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise httpx.ConnectError(type(error).__name__) from error


class AiohttpTransport(httpx.AsyncBaseTransport):
    """Sends requests without a body, by httpx's transport API. Use `get`, which turns aiohttp's errors into httpx's."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._url = lru_cache(maxsize=1024)(lambda url: URL(url, encoded=True))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request`. Raises errors of httpx and of aiohttp."""
        response = await self._session.request(
            request.method,
            self._url(str(request.url)),
            headers=request.headers.multi_items(),
            allow_redirects=False,
        )
        return httpx.Response(response.status, headers=response.raw_headers, stream=_Stream(response))

    async def aclose(self) -> None:
        """Close every connection."""
        await self._session.close()


class _Stream(httpx.AsyncByteStream):
    """The body of an aiohttp answer. Closing it before its end also closes the connection."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._response.content.iter_any()

    async def aclose(self) -> None:
        self._response.release()


def _to_httpx_error(error: Exception) -> httpx.HTTPError:
    """Return httpx's error for one of aiohttp's."""
    match error:
        case aiohttp.ConnectionTimeoutError():
            return httpx.ConnectTimeout("connecting took too long")
        case aiohttp.ClientConnectionError():
            return httpx.ConnectError(str(error))
        case aiohttp.ClientPayloadError():
            return httpx.ReadError("the connection broke in the middle of the answer")
        case ValueError():
            return httpx.LocalProtocolError("a header of the request holds a character that headers must not hold")
        case _:
            return AnswerUnusableError(f"the answer is no whole HTTP answer ({type(error).__name__})")
