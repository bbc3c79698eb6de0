"""The HTTP client towards ElevenLabs: which one it is, and the bounds on what it takes in.

httpx's requests, answers and errors, carried by reqwest: `benchmarks/README.md` says what that saves and how it was
chosen. Another transport is another body of `http_transport`, and nothing else.
"""

import asyncio
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Final, NamedTuple, cast

import certifi
import httpx
from pyreqwest.client import ClientBuilder
from pyreqwest.compatibility.httpx import HttpxTransport
from pyreqwest.exceptions import PyreqwestError

MAX_HEADER_BYTES: Final = 16 * 1024
IDLE_SECONDS: Final = 30
SETTLE_SECONDS: Final = 0.05

HEADERS: Final = {"accept": "application/json", "accept-encoding": "identity", "user-agent": "voicepass"}
"""Of every request. Compression is not asked for: a bomb would inflate before any cap could see it."""


class AnswerUnusableError(Exception):
    """The answer is beyond what is taken in. The message is for the log and repeats nothing of it."""


class Answer(NamedTuple):
    """A whole answer, within its bounds."""

    status: int
    headers: httpx.Headers
    body: bytes


class _Transport(HttpxTransport):
    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request`. Raises httpx errors, none of which holds a header of it."""
        try:
            return await super().handle_async_request(request)
        except ValueError:
            pass  # its text is the header that cannot be sent: so it is not even chained
        raise httpx.LocalProtocolError("a header of the request holds what none can carry")

    async def aclose(self) -> None:
        """Close the connections, and let reqwest's thread come to rest.

        The interpreter must not end while that thread still holds it: it would abort the process, instead of exit 0.
        """
        await super().aclose()
        await asyncio.sleep(SETTLE_SECONDS)


def http_transport(*, deadline_seconds: float) -> httpx.AsyncBaseTransport:
    """Return the one shared transport; `async with` closes it.

    No redirect is followed, for it would carry `xi-api-key` to another origin. No proxy is taken from the environment.
    Certificates are verified against the system's roots (or SSL_CERT_FILE) and certifi's, so an image without any will
    do. A call cannot outlive the `timeout` of its request, which reqwest counts from its beginning to the last byte;
    one that is given up in Python ends by it too, and not earlier.
    """
    client = (
        ClientBuilder()
        .no_proxy()
        .follow_redirects(enable=False)
        .danger_accept_invalid_certs(enable=False)
        .add_root_certificate_pem(Path(certifi.where()).read_bytes())
        .default_cookie_store(enable=False)
        .gzip(enable=False)
        .brotli(enable=False)
        .zstd(enable=False)
        .deflate(enable=False)
        .http1_only()
        .timeout(timedelta(seconds=deadline_seconds))
        .connect_timeout(timedelta(seconds=deadline_seconds / 4))
        .pool_idle_timeout(timedelta(seconds=IDLE_SECONDS))
        .build()
    )
    return _Transport(client)


async def get(
    transport: httpx.AsyncBaseTransport, request: httpx.Request, *, most_bytes: int, within_seconds: float
) -> Answer:
    """Send a copy of `request`, and return the whole answer within `within_seconds`.

    Raises AnswerUnusableError, httpx.ConnectError where the line broke before any answer, and other httpx errors. None
    of them repeats a header of the request.
    """
    # httpx's client in front of the transport would cost as much again as all the rest of a call. The copy is cheap, as
    # the URL and the headers are not parsed again.
    timeout = {"read": within_seconds}
    sent = httpx.Request("GET", request.url, headers=request.headers, extensions={"timeout": timeout})
    try:
        response = await transport.handle_async_request(sent)
        try:
            return Answer(response.status_code, response.headers, await _body(response, most_bytes))
        finally:
            with suppress(PyreqwestError):  # what was read, or found wanting, counts
                await response.aclose()
    except TimeoutError as error:  # reqwest's own, amid a long body
        raise httpx.ReadTimeout("the answer took too long") from error
    except PyreqwestError as error:
        raise httpx.ReadError(type(error).__name__) from error


async def _body(response: httpx.Response, most_bytes: int) -> bytes:
    if sum(len(name) + len(value) for name, value in response.headers.raw) > MAX_HEADER_BYTES:
        raise AnswerUnusableError(f"the answer's headers are longer than {MAX_HEADER_BYTES} bytes")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise AnswerUnusableError("the answer is compressed, though compression was not asked for")
    body = bytearray()
    # The stream itself: httpx's own readers would inflate it, or refuse an answer that a test has made.
    async for chunk in cast("httpx.AsyncByteStream", response.stream):
        body += chunk
        if len(body) > most_bytes:
            raise AnswerUnusableError(f"the answer is longer than {most_bytes} bytes")
    return bytes(body)
