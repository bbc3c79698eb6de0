"""The HTTP client's limits: which servers it trusts, how much it reads, and how it closes a connection."""

import asyncio
import contextlib
import select
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from tests.canaries import API_KEY
from tests.conftest import UPSTREAM
from tests.faults import asked, http, saying, self_signed, tls
from tests.servers import free_port, listening
from voicepass.outbound import AnswerUnusableError, get, http_transport

pytestmark = pytest.mark.anyio

CALLS = """
import asyncio, sys
import httpx
from voicepass.outbound import get, http_transport

async def main():
    async with http_transport(connect_seconds=5) as transport:
        for url in sys.argv[1:]:
            try:
                answer = await get(transport, httpx.Request("GET", url), most_bytes=100)
                print(answer.status)
            except httpx.HTTPError as error:
                print(type(error).__name__)

asyncio.run(main())
"""

GIVE_UP = """
import asyncio, contextlib, sys
import httpx
from voicepass.outbound import AnswerUnusableError, get, http_transport

async def main():
    async with http_transport(connect_seconds=5) as transport:
        with contextlib.suppress(TimeoutError, AnswerUnusableError):
            async with asyncio.timeout(1):
                await get(transport, httpx.Request("GET", sys.argv[1]), most_bytes=100)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


async def call_in_a_process(*urls: str, environment: dict[str, str]) -> list[str]:
    """Make the calls in a process with this environment, which must exit 0; return the result of each."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CALLS, *urls, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return output.decode().split()


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await asked(reader):
        writer.write(http(200, b"{}"))


async def test_a_certificate_is_accepted_only_from_a_trusted_issuer_and_only_for_its_own_name(tmp_path: Path) -> None:
    roots = tmp_path / "roots.pem"
    roots.write_bytes(self_signed())

    async with listening(serve, tls=tls()) as base_url:
        urls = [base_url, base_url.replace("127.0.0.1", "localhost")]
        trusting = await call_in_a_process(*urls, environment={"SSL_CERT_FILE": str(roots)})
        refused = await call_in_a_process(*urls, environment={"SSL_CERT_FILE": "/none", "SSL_CERT_DIR": "/none"})

    assert trusting == ["200", "CertificateRefusedError"]
    assert refused == ["CertificateRefusedError", "CertificateRefusedError"]


async def test_no_call_goes_through_a_proxy_that_the_environment_names() -> None:
    proxy = f"http://127.0.0.1:{free_port()}"  # no server listens, so a call through it would fail
    environment = dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"), proxy)

    async with listening(serve) as base_url:
        assert await call_in_a_process(base_url, environment=environment) == ["200"]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (http(200, b"x" * 101), AnswerUnusableError),
        (http(200, b"x" * 10_000_000), AnswerUnusableError),
        (http(200, b"{}", "content-encoding: br"), AnswerUnusableError),
        (http(200, b"{}", *(f"x-{number}: {'y' * 6_000}" for number in range(3))), AnswerUnusableError),
        (http(200, b"{}", "x: " + "y" * 17_000), httpx.DecodingError),
        (http(200, b"{}", *(f"x-{number}: y" for number in range(5000))), httpx.DecodingError),
    ],
)
async def test_an_answer_beyond_the_size_limits_is_refused(answer: bytes, error: type[Exception]) -> None:
    async with saying(answer)() as base_url, http_transport(connect_seconds=5) as transport:
        with pytest.raises(error):
            await get(transport, httpx.Request("GET", base_url), most_bytes=100)


async def test_a_redirect_is_returned_and_not_followed() -> None:
    async with (
        listening(serve) as elsewhere,
        saying(http(302, b"", f"location: {elsewhere}"))() as base_url,
        http_transport(connect_seconds=5) as transport,
    ):
        answer = await get(transport, httpx.Request("GET", base_url), most_bytes=100)

    assert answer.status == 302


async def test_a_cookie_of_an_answer_is_not_sent_with_the_next_request() -> None:
    requests: list[bytes] = []

    async def set_cookie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while request := await asked(reader):
            requests.append(request)
            writer.write(http(200, b"{}", "set-cookie: session=canary; Path=/"))

    async with listening(set_cookie) as base_url, http_transport(connect_seconds=5) as transport:
        url = base_url.replace("127.0.0.1", "localhost")  # aiohttp's own jar keeps no cookie of an address
        for _ in range(2):
            await get(transport, httpx.Request("GET", url), most_bytes=100)

    assert len(requests) == 2
    assert b"canary" not in b"".join(requests)


async def test_a_name_that_does_not_resolve_fails_after_the_connection_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_arguments, **_more: over.wait())

    try:
        async with http_transport(connect_seconds=0.1) as transport, asyncio.timeout(5):
            with pytest.raises(httpx.ConnectTimeout):
                await get(transport, httpx.Request("GET", UPSTREAM), most_bytes=100)
    finally:
        over.set()


@pytest.mark.parametrize("answer", [b"", http(200, b"x" * 200)[:-1]])
def test_a_call_that_times_out_closes_its_connection_even_if_its_peer_does_not(tmp_path: Path, answer: bytes) -> None:
    roots = tmp_path / "roots.pem"
    roots.write_bytes(self_signed())

    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        command = [sys.executable, "-c", GIVE_UP, url]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, env={"SSL_CERT_FILE": str(roots)})
        stack.callback(process.communicate)  # closes its input, on which it ends
        line = stack.enter_context(tls().wrap_socket(listener.accept()[0], server_side=True))
        line.recv(65_536)
        line.sendall(answer)
        hung_up = select.poll()
        hung_up.register(line, select.POLLRDHUP)

        assert hung_up.poll(5_000) != []
    assert process.returncode == 0


@pytest.mark.parametrize("answer", [http(200, b"1"), b"HTTP/1.1 204 X\r\n\r\n"])
async def test_an_answer_without_a_request_is_not_given_to_a_later_request(answer: bytes) -> None:
    connections = 0

    async def say_more(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await asked(reader)
        writer.write(answer)
        await writer.drain()
        await may_say_more.wait()
        writer.write(http(200, b"more"))
        await reader.read()

    async with listening(say_more) as base_url, http_transport(connect_seconds=5) as transport:
        answers = []
        for _ in range(3):
            may_say_more = asyncio.Event()
            async with asyncio.timeout(5):
                answers.append((await get(transport, httpx.Request("GET", base_url), most_bytes=100)).body)
            may_say_more.set()
            await asyncio.sleep(0.05)

    assert answers == [answer.partition(b"\r\n\r\n")[2]] * 3
    assert connections == 3


async def test_get_works_with_any_transport_of_httpx() -> None:
    async def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"asked": request.headers["xi-api-key"]})

    request = httpx.Request("GET", UPSTREAM, headers={"xi-api-key": "k"})

    assert (await get(httpx.MockTransport(answer), request, most_bytes=100)).body == b'{"asked":"k"}'


@pytest.mark.parametrize(
    ("key", "answer", "error"),
    [
        (f"{API_KEY}\n", b"", httpx.LocalProtocolError),
        (f"{API_KEY}\r\nx: y", b"", httpx.LocalProtocolError),
        (API_KEY, b"", httpx.ConnectError),
        (API_KEY, b"SSH-2.0-OpenSSH_9.6\r\n", httpx.DecodingError),
        (API_KEY, http(200, b"{}").replace(b": 2", b": 99"), httpx.ReadError),
    ],
)
async def test_the_key_is_in_no_error(key: str, answer: bytes, error: type[Exception]) -> None:
    request = httpx.Request("GET", UPSTREAM, headers={b"xi-api-key": key.encode()})

    async with saying(answer)() as base_url, http_transport(connect_seconds=5) as transport:
        request.url = httpx.URL(base_url)
        with pytest.raises(error) as raised:
            await get(transport, request, most_bytes=100)

    found: BaseException | None = raised.value
    while found is not None:
        assert API_KEY not in repr(found) + repr(vars(found))
        found = found.__cause__ or found.__context__
