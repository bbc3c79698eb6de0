"""An upstream that fails in every way we know of, over real sockets, and the answer that voicepass gives for each."""

import asyncio
import contextlib
import datetime as dt
import gzip
import json
import socket
import ssl
import struct
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from email.utils import format_datetime
from functools import cache
from ipaddress import ip_address
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.conftest import signed_url
from tests.servers import free_port, listening

Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Place = Callable[[], AbstractAsyncContextManager[str]]
"""Opens the upstream, and yields its base URL."""

TIMEOUT = (504, "elevenlabs_timeout")
UNAVAILABLE = (503, "elevenlabs_unavailable")
BAD_ANSWER = (502, "elevenlabs_bad_answer")
KEY_REJECTED = (502, "elevenlabs_key_rejected")
AGENT_UNKNOWN = (502, "elevenlabs_agent_unknown")
QUOTA = (503, "elevenlabs_quota_exhausted")
BUSY = (503, "elevenlabs_busy")


class Fault(NamedTuple):
    """An upstream that fails, and voicepass's answer. `retry_after` is set if the upstream determines the wait."""

    place: Place
    answer: tuple[int, str]
    retry_after: range | None = None


def http(status: int, body: bytes = b"", *headers: str) -> bytes:
    """Build a complete answer."""
    lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def good(base_url: str) -> bytes:
    """Build an answer with a signed URL, for a new conversation each time."""
    conversation_id = f"conv_{uuid.uuid4().hex}"
    url = signed_url(scheme="ws", host=base_url.removeprefix("http://"), conversation_id=conversation_id)
    return http(200, json.dumps({"signed_url": url}).encode())


async def asked(reader: asyncio.StreamReader) -> bytes:
    """Read the head of the next request; return b"" if the peer has closed the connection."""
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""


def saying(answer: bytes) -> Place:
    """Send these bytes to the first request and close. The answer announces that, or the client would reuse it."""
    status, line_end, rest = answer.partition(b"\r\n")
    if status.startswith(b"HTTP/1.1"):
        answer = status + line_end + b"connection: close\r\n" + rest

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked(reader)
        writer.write(answer)
        await writer.drain()

    return lambda: listening(behave)


def trickle(begin: bytes, drop: bytes) -> Place:
    """Begin an answer and never end it: send `drop` every 20 ms, so that no timeout between two bytes applies."""

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked(reader)
        writer.write(begin)
        while not writer.is_closing():
            writer.write(drop)
            await writer.drain()
            await asyncio.sleep(0.02)

    return lambda: listening(behave)


def never_answer() -> AbstractAsyncContextManager[str]:
    """Accept and read, but never answer."""

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        del writer
        await reader.read()

    return listening(behave)


def reset_connection() -> AbstractAsyncContextManager[str]:
    """Answer a request with a RST."""

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked(reader)
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    return listening(behave)


@asynccontextmanager
async def yield_url(base_url: str) -> AsyncIterator[str]:
    """Yield this URL; whether a server listens there does not matter."""
    yield base_url


@asynccontextmanager
async def open_full_port() -> AsyncIterator[str]:
    """Yield the URL of a port whose backlog is full. Connecting never succeeds, as behind a firewall that drops."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)  # noqa: FBT003
            with contextlib.suppress(BlockingIOError):
                filler.connect(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@cache
def self_signed() -> bytes:
    """Make a certificate for 127.0.0.1 that no authority has signed, and its key (PEM)."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    return certificate.public_bytes(pem) + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)


def tls() -> ssl.SSLContext:
    """Make a server's TLS context with that certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile() as file:
        file.write(self_signed())
        file.flush()
        context.load_cert_chain(file.name)
    return context


async def _answer_in_plain_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    writer.write(http(200, b"{}"))
    await writer.drain()


@asynccontextmanager
async def serve_without_tls() -> AsyncIterator[str]:
    """Yield an https: URL whose server speaks no TLS."""
    async with listening(_answer_in_plain_http) as base_url:
        yield base_url.replace("http:", "https:")


def legacy(code: str) -> bytes:
    """Build an error in the older envelope."""
    return json.dumps({"detail": {"status": code, "message": "vendor words"}}).encode()


def current(code: str) -> bytes:
    """Build an error in the newer envelope."""
    return json.dumps({"detail": {"type": "t", "code": code, "message": "vendor words", "status": code}}).encode()


def format_date_in_30_seconds() -> str:
    """Format the time 30 seconds from now as an HTTP date."""
    later = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=30)
    return format_datetime(later, usegmt=True)


def _busy(code: str, *headers: str) -> Place:
    """Answer 429. The date is made when the server starts: near an older one, voicepass would wait and ask again."""

    def start() -> AbstractAsyncContextManager[str]:
        dated = (header.format(in_30_seconds=format_date_in_30_seconds()) for header in headers)
        return saying(http(429, legacy(code), *dated))()

    return start


def _url(url: object) -> Place:
    return saying(http(200, json.dumps({"signed_url": url}).encode()))


FAULTS: dict[str, Fault] = {
    "refused": Fault(lambda: yield_url(f"http://127.0.0.1:{free_port()}"), UNAVAILABLE),
    "blackholed": Fault(open_full_port, TIMEOUT),
    "no such name": Fault(lambda: yield_url("https://voicepass.invalid"), UNAVAILABLE),
    "certificate not trusted": Fault(lambda: listening(_answer_in_plain_http, tls=tls()), UNAVAILABLE),
    "no TLS": Fault(serve_without_tls, UNAVAILABLE),
    "silent": Fault(never_answer, TIMEOUT),
    "closed before the answer": Fault(saying(b""), UNAVAILABLE),
    "closed within the headers": Fault(saying(b"HTTP/1.1 200 OK\r\ncontent-le"), UNAVAILABLE),
    "reset": Fault(reset_connection, UNAVAILABLE),
    "headers trickle": Fault(trickle(b"HTTP/1.1 200 OK\r\n", b"x: y\r\n"), TIMEOUT),
    "body trickles": Fault(trickle(b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n", b" "), TIMEOUT),
    "body truncated": Fault(saying(http(200, b"{}").replace(b": 2", b": 99")), UNAVAILABLE),
    "bad chunk": Fault(saying(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}"), BAD_ANSWER),
    "not HTTP": Fault(saying(b"SSH-2.0-OpenSSH_9.6\r\n"), BAD_ANSWER),
    "two lengths": Fault(saying(http(200, b"{}", "content-length: 3")), BAD_ANSWER),
    "a header of 200 kB": Fault(saying(http(200, b"{}", "x: " + "y" * 200_000)), BAD_ANSWER),
    "headers without end": Fault(saying(b"HTTP/1.1 200 OK\r\nx: " + b"y" * 5_000_000), BAD_ANSWER),
    "gzip bomb": Fault(saying(http(200, gzip.compress(b" " * 20_000_000, 1), "content-encoding: gzip")), BAD_ANSWER),
    "10 MB": Fault(saying(http(200, b"{" + b" " * 10_000_000 + b"}")), BAD_ANSWER),
    "HTML": Fault(saying(http(200, b"<h1>Please wait</h1>", "content-type: text/html")), BAD_ANSWER),
    "no signed_url": Fault(saying(http(200, b"{}")), BAD_ANSWER),
    "signed_url is a number": Fault(_url(7), BAD_ANSWER),
    "signed_url leads elsewhere": Fault(_url(signed_url(host="evil.test")), BAD_ANSWER),
    "signed_url is ws:": Fault(_url(signed_url(scheme="ws")), BAD_ANSWER),
    "no content": Fault(saying(b"HTTP/1.1 204 No Content\r\n\r\n"), BAD_ANSWER),
    "redirect": Fault(saying(http(302, b"", "location: https://evil.test/")), BAD_ANSWER),
    "key rejected": Fault(saying(http(401, legacy("invalid_api_key"))), KEY_REJECTED),
    "key rejected, newer": Fault(saying(http(401, current("invalid_api_key"))), KEY_REJECTED),
    "quota exceeded": Fault(saying(http(401, legacy("quota_exceeded"))), QUOTA),
    "no agent": Fault(saying(http(404, current("agent_not_found"))), AGENT_UNKNOWN),
    "bad agent": Fault(saying(http(422, b'{"detail": [{"loc": ["query", "agent_id"]}]}')), AGENT_UNKNOWN),
    **{
        f"{code}, Retry-After {name}": Fault(_busy(code, *headers), BUSY, waits)
        for code in ("too_many_concurrent_requests", "system_busy")
        for name, headers, waits in (
            ("absent", (), range(5, 6)),
            ("1", ("retry-after: 1",), range(1, 2)),
            ("3600", ("retry-after: 3600",), range(60, 61)),
            ("a date", ("retry-after: {in_30_seconds}",), range(1, 31)),
            ("garbage", ("retry-after: soon, or -3",), range(5, 6)),
        )
    },
    **{
        f"{status}, {envelope.__name__}": Fault(saying(http(status, envelope("internal_error"))), UNAVAILABLE)
        for status in (500, 502, 503, 504)
        for envelope in (legacy, current)
    },
}
