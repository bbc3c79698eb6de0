"""The HTTP client towards ElevenLabs: which one it is, and the bounds on what it takes in.

httpx's requests, answers and errors, carried by aiohttp: `benchmarks/README.md` says what that saves and how it was
chosen. Another client is another body of `http_transport`, and nothing else.
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


def is_loopback(host: str | None) -> bool:
    """Whether `host` is this machine, by its own name or address."""
    if host == "localhost":
        return True
    try:
        return host is not None and ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_safe_url(url: str, *, plain_http_hosts: Collection[str] = ()) -> bool:
    """Whether a secret, or trust in what comes back, may travel there.

    It may over https://, and over http:// to this machine or to a host that the operator named.
    """
    # `urlsplit` drops line breaks and takes spaces for part of a host; what dials the URL would not agree with it.
    if not url.isprintable() or any(mark in url for mark in " \\#"):
        return False
    try:
        parts = urlsplit(url)
        may_be_plain = is_loopback(parts.hostname) or parts.hostname in plain_http_hosts
        secure = parts.scheme == "https" or (parts.scheme == "http" and may_be_plain)
        return secure and bool(parts.hostname) and parts.username is None and parts.port != 0
    except ValueError:  # a port that is no number
        return False


class AnswerUnusableError(Exception):
    """The answer is beyond what is taken in. The message is for the log and repeats nothing of it."""


class CertificateRefusedError(httpx.ConnectError):
    """The server's certificate does not prove who it is. The message is for the log: the reason, and what to do."""


class Answer(NamedTuple):
    """A whole answer, within its bounds."""

    status: int
    headers: httpx.Headers
    body: bytes


def http_transport(*, connect_seconds: float) -> httpx.AsyncBaseTransport:
    """Return the one shared transport, in a running loop; `async with` closes it.

    No redirect is followed, for it would carry `xi-api-key` to another origin. No proxy is taken from the environment.
    Certificates are verified against the system's roots (or SSL_CERT_FILE) and certifi's, so an image without any will
    do. Only to connect, its name's lookup included, has a time limit of its own; a call that is cancelled gives its
    connection up at once.
    """
    return _Aiohttp(
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
    """Send `request`, which may be sent again, and return the whole answer.

    Raises AnswerUnusableError, httpx.ConnectError where the line broke before any answer, and other httpx errors. None
    of them repeats a header of the request.
    """
    # httpx's client in front of the transport would cost as much again as all the rest of a call.
    response = await transport.handle_async_request(request)
    try:
        return Answer(response.status_code, response.headers, await _body(response, most_bytes))
    finally:
        await response.aclose()


async def _body(response: httpx.Response, most_bytes: int) -> bytes:
    if sum(len(name) + len(value) for name, value in response.headers.raw) > MAX_HEADER_BYTES:
        raise AnswerUnusableError(f"the answer's headers are longer than {MAX_HEADER_BYTES} bytes")
    encoding = response.headers.get("content-encoding", "identity").lower()
    if encoding not in {"identity", "gzip", "x-gzip", "deflate"}:
        raise AnswerUnusableError("the answer is compressed in a way that voicepass did not ask for and cannot read")
    body = bytearray()
    # The stream itself: httpx's own readers would inflate it, or refuse an answer that a test has made.
    async for chunk in cast("httpx.AsyncByteStream", response.stream):
        body += chunk
        if len(body) > most_bytes:
            raise AnswerUnusableError(f"the answer is longer than {most_bytes} bytes")
    return bytes(body) if encoding == "identity" else _inflate(bytes(body), most_bytes)


def _inflate(body: bytes, most_bytes: int) -> bytes:
    """Return what `body` was before a proxy compressed it without being asked. It stops at `most_bytes`."""
    inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # 32: gzip or zlib, as the body's first bytes say
    try:
        inflated = inflater.decompress(body, most_bytes + 1)
    except zlib.error as error:
        raise AnswerUnusableError("the answer is not compressed as it says") from error
    if len(inflated) > most_bytes or not inflater.eof or inflater.unused_data:
        raise AnswerUnusableError(f"the answer is longer than {most_bytes} bytes when inflated, or not complete")
    return inflated


class _Connector(aiohttp.TCPConnector):
    """aiohttp's, but what it does not keep it drops at once, and it keeps none that speaks before it is asked.

    What it overrides is aiohttp's own affair: hence the narrow bound on its version.
    """

    async def _get(self, key: ConnectionKey, traces: list[Trace]) -> Connection | None:
        # aiohttp looks only when it puts a connection by: what comes later would be the answer to the next request.
        while (kept := await super()._get(key, traces)) and kept.protocol and kept.protocol.should_close:
            kept.close()
        return kept

    def _release(self, key: ConnectionKey, protocol: ResponseHandler, *, should_close: bool = False) -> None:
        if should_close or protocol.should_close:
            protocol.abort()  # to close TLS would take until the peer has said goodbye too, or half a minute
        super()._release(key, protocol, should_close=should_close)


async def _once(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Send a request once. aiohttp would send it again where the line breaks, whatever anyone's budget for that is."""
    try:
        return await send(request)
    except aiohttp.ClientConnectorCertificateError as error:
        raise _CertificateRefused(_explain(error)) from error
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise aiohttp.ClientConnectionError(type(error).__name__) from error


class _CertificateRefused(aiohttp.ClientConnectionError):
    """In aiohttp's hierarchy, yet no ClientOSError: aiohttp would send the request again after one."""


def _explain(error: aiohttp.ClientConnectorCertificateError) -> str:
    reason = getattr(error.certificate_error, "verify_message", "") or type(error.certificate_error).__name__
    return (
        f"the certificate of {error.host} was refused ({reason}); check the address, the clock and its expiry,"
        " and name a private CA in SSL_CERT_FILE"
    )


class _Aiohttp(httpx.AsyncBaseTransport):
    """httpx's transport API over an aiohttp session."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._url = lru_cache(maxsize=1024)(lambda url: URL(url, encoded=True))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request`. Raises httpx errors, none of which holds a header of it."""
        try:
            response = await self._session.request(
                request.method,
                self._url(str(request.url)),
                headers=request.headers.multi_items(),
                data=await request.aread() or None,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, ValueError) as error:
            failed = _as_httpx_words_it(error)
        else:
            return httpx.Response(response.status, headers=response.raw_headers, stream=_Stream(response))
        raise failed

    async def aclose(self) -> None:
        await self._session.close()


class _Stream(httpx.AsyncByteStream):
    """The body of an aiohttp answer. Closed before its end, it takes its connection with it."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except aiohttp.ClientError as error:
            failed = _as_httpx_words_it(error)
        else:
            return
        raise failed

    async def aclose(self) -> None:
        self._response.release()


def _as_httpx_words_it(error: Exception) -> httpx.HTTPError:
    """Return the error of httpx for one of aiohttp's: to be raised unchained, as that one may hold the key."""
    match error:
        case aiohttp.ConnectionTimeoutError():
            return httpx.ConnectTimeout("it took too long to connect")
        case _CertificateRefused():
            return CertificateRefusedError(str(error))
        case aiohttp.ClientConnectionError():
            return httpx.ConnectError(str(error))
        case aiohttp.ClientPayloadError():
            return httpx.ReadError("the connection broke in the middle of the answer")
        case ValueError():
            return httpx.LocalProtocolError("a header of the request holds what none can carry")
        case _:
            return httpx.DecodingError(type(error).__name__)
