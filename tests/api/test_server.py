"""The limits below ASGI, seen from a raw socket: what is no request, what never becomes one, and what is left alone."""

import asyncio
import contextlib
import json
import re
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from starlette.types import Message, Receive, Scope, Send
from websockets.sync.client import connect

from tests.cli.test_cli import CLEAN
from tests.servers import free_port, running, started
from tests.tables import table
from voicepass.api.middleware import Surface
from voicepass.api.server import MAX_PIPELINED, RECEIVE_SECONDS, UVICORN_OPTIONS, GuardedProtocol, write_prefix

pytestmark = pytest.mark.alone

DEADLINE, IDLE = 0.2, 0.5
KIBI, MEBI = 1024, 1024 * 1024
GET = b"GET /x HTTP/1.1\r\nHost: a\r\n"
POST = b"POST /x HTTP/1.1\r\nHost: a\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
WEBSOCKET = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
BAD = "400 request_malformed"

Address = tuple[str, int]

# What a client sends, and the answers.
SHAPES: dict[str, tuple[bytes, list[str]]] = {
    "length and chunks": (POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + GET, [BAD]),
    "chunks and length": (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", [BAD]),
    "two lengths": (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", [BAD]),
    "one length twice": (POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", [BAD]),
    "a length with a plus": (POST + b"Content-Length: +5\r\n\r\nhello", [BAD]),
    "a negative length": (POST + b"Content-Length: -5\r\n\r\nhello", [BAD]),
    "a length in hexadecimal": (POST + b"Content-Length: 0x5\r\n\r\nhello", [BAD]),
    "identity as transfer encoding": (POST + b"Transfer-Encoding: identity\r\nContent-Length: 5\r\n\r\nhello", [BAD]),
    "identity after chunked": (POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", [BAD]),
    "two hosts": (GET + b"Host: b\r\n\r\n", [BAD]),
    "no host": (b"GET /x HTTP/1.1\r\n\r\n", [BAD]),
    "a folded header": (GET + b"X-A: a\r\n b\r\n\r\n", [BAD]),
    "bare line feeds": (b"GET /x HTTP/1.1\nHost: a\n\n", [BAD]),
    "bare carriage returns": (b"GET /x HTTP/1.1\rHost: a\r\r", [BAD]),
    "an absolute target": (b"GET http://b/x HTTP/1.1\r\nHost: a\r\n\r\n", ["200 GET /x"]),
    "NUL in a header": (GET + b"X-A: a\0b\r\n\r\n", [BAD]),
    "a carriage return in a header": (GET + b"X-A: a\rX-B: b\r\n\r\n", [BAD]),
    "a line break in the path": (b"GET /x\r\nX: y HTTP/1.1\r\nHost: a\r\n\r\n", [BAD]),
    "space before a colon": (POST + b"Content-Length : 5\r\n\r\nhello", [BAD]),
    "no colon": (GET + b"abc\r\n\r\n", [BAD]),
    "a chunk extension": (CHUNKED + b"5;a=b\r\nhello\r\n0\r\n\r\n", ["200 POST /x hello"]),
    "a chunk size that is none": (CHUNKED + b"zz\r\nhello\r\n0\r\n\r\n", [BAD]),
    "a chunk size with 0x": (CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n", [BAD]),
    "a token in a trailer": (CHUNKED + b"5\r\nhello\r\n0\r\nAuthorization: x\r\n\r\n", ["200 POST /x hello"]),
    "a method in small letters": (b"get /x HTTP/1.1\r\nHost: a\r\n\r\n", [BAD]),
    "a method of 5 kB": (b"A" * 5000 + b" /x HTTP/1.1\r\nHost: a\r\n\r\n", [BAD]),
    "HTTP/0.9": (b"GET /x\r\n\r\n", [BAD]),
    "HTTP/1.0": (b"GET /x HTTP/1.0\r\n\r\n", ["200 GET /x"]),
    "the HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [BAD]),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)), [BAD]),
    "an upgrade to h2c": (GET + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n", ["200 GET /x"]),
    "h2c with a body like a request": (
        POST + H2C + b"Content-Length: 28\r\n\r\n" + GET + b"\r\n",
        [f"200 POST /x {GET.decode()}".rstrip()],
    ),
    "h2c with a body in chunks": (
        POST + H2C + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n" + GET + b"\r\n",
        ["200 POST /x hello", "200 GET /x"],
    ),
    "h2c behind another request": (
        GET + b"\r\n" + POST + H2C + b"Connection: x\r\nContent-Length: 5\r\n\r\nhello",
        ["200 GET /x", "200 POST /x hello"],
    ),
    "another protocol with a body": (
        POST + b"Connection: Upgrade\r\nUpgrade: TLS/1.0\r\nContent-Length: 5\r\n\r\nhello",
        ["200 POST /x hello"],
    ),
    "a handshake without its key": (GET + WEBSOCKET + b"\r\n", ["400"]),
    "a handshake by POST": (POST + WEBSOCKET + b"Content-Length: 5\r\n\r\nhello", [BAD]),
    "a handshake of 300 headers": (GET + WEBSOCKET + b"X-A: a\r\n" * 300 + b"\r\n", [BAD]),
    "junk after the body": (
        POST + b"Content-Length: 5\r\n\r\nhelloJUNK\r\n\r\n",
        ["200 POST /x hello"],
    ),
    "a request after the last": (GET + b"Connection: close\r\n\r\n" + GET + b"\r\n", ["200 GET /x"]),
    "two requests at once": (GET + b"\r\n" + POST + b"Content-Length: 0\r\n\r\n", ["200 GET /x", "200 POST /x"]),
}

# What opens the connection, and what then trickles in.
STUCK = {
    "silent": (b"", b""),
    "header": (GET + b"X-A: ", b"a"),
    "body": (POST + b"Content-Length: 9999\r\n\r\n", b"a"),
}
STUCK_IN_ODD_PLACES = {
    "a pipelined header": (GET + b"\r\n" + GET + b"X-A: ", b"a"),
    "a pipelined request without its body": (GET + b"\r\n" + POST + b"Content-Length: 9\r\n\r\n", b""),
    "a body that was refused": (POST + b"Content-Length: 999999\r\n\r\n" + b"a" * 17 * KIBI, b"a"),
    "chunks": (CHUNKED, b"1\r\na\r\n"),
    "a handshake": (POST + WEBSOCKET + b"\r\n", b""),
}

ENDLESS = {
    "a header": GET + b"X-A: ",
    "a target": b"GET /",
    "a trailer": CHUNKED + b"0\r\nX-A: ",
    "a chunk extension": CHUNKED + b"1;a=",
}


async def understood(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with what has been understood of the request; some paths do something else."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"]})
    if scope["type"] != "http":
        return
    body = (await receive())["body"].decode()
    answer = f"{scope['method']} {scope['path']} {body}".strip()
    match scope["path"]:
        case "/client":
            answer = f"{scope['scheme']} {scope['client'][0]}"
        case "/slow":
            await asyncio.sleep(2 * DEADLINE)
        case "/large":
            answer = "a" * 32 * MEBI
    if any(name == b"authorization" for name, _ in scope["headers"]):
        answer += " with a token"
    start: Message = {
        "type": "http.response.start",
        "status": 200,
        "headers": [(b"content-length", str(len(answer)).encode())],
    }
    await send(start)
    await send({"type": "http.response.body", "body": answer.encode()})


app = Surface(understood)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def __str__(self) -> str:
        is_problem = self.headers.get("content-type") == "application/problem+json"
        said = json.loads(self.body)["code"] if is_problem else self.body.decode() * (self.status == 200)
        return f"{self.status} {said}".strip()


def answers_in(received: bytes) -> list[Answer]:
    answers = []
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        status_line, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        length = int(headers.get("content-length", "0"))
        answers.append(Answer(int(status_line.split()[1]), headers, received[:length]))
        received = received[length:]
    return answers


def ask(address: Address, *parts: bytes, pause_seconds: float = 0) -> list[Answer]:
    """Send, and read until the server hangs up."""
    received = b""
    with socket.create_connection(address, timeout=20) as peer:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                peer.sendall(part)
                time.sleep(pause_seconds)
        with contextlib.suppress(ConnectionError):
            while chunk := peer.recv(64 * KIBI):
                received += chunk
    return answers_in(received)


async def seconds_until_closed(address: Address, opening: bytes, trickle: bytes, *, every_seconds: float) -> float:
    async def read_to_the_end() -> None:
        with contextlib.suppress(ConnectionError):
            while await reader.read(64 * KIBI):
                pass

    reader, writer = await asyncio.open_connection(*address)
    begun = time.monotonic()
    closed = asyncio.create_task(read_to_the_end())
    writer.write(opening)
    while not closed.done() and time.monotonic() - begun < 2 * RECEIVE_SECONDS:
        writer.write(trickle)
        await asyncio.wait([closed], timeout=every_seconds)
    seconds = time.monotonic() - begun
    closed.cancel()
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return seconds


class ImpatientProtocol(GuardedProtocol):
    receive_seconds = DEADLINE


@pytest.fixture(scope="module")
def server() -> Iterator[Address]:
    """A server that waits DEADLINE for a request and IDLE for the next, so that every connection comes to its end."""
    options = dict(UVICORN_OPTIONS) | {"http": ImpatientProtocol, "timeout_keep_alive": IDLE}
    with running(lambda _url: app, **options) as url:
        host, port = url.removeprefix("http://").split(":")
        yield host, int(port)


@pytest.fixture(scope="module")
def answers(server: Address) -> dict[str, list[Answer]]:
    with ThreadPoolExecutor(len(SHAPES)) as pool:
        return dict(zip(SHAPES, pool.map(lambda shape: ask(server, shape[0]), SHAPES.values()), strict=True))


@table("shape", SHAPES)
def test_a_strange_request_is_refused_or_means_what_it_says(answers: dict[str, list[Answer]], shape: str) -> None:
    assert [str(answer) for answer in answers[shape]] == SHAPES[shape][1]


def test_what_cannot_be_read_is_answered_with_a_problem_like_any_other(server: Address) -> None:
    (answer,) = ask(server, b"\0\0\0\0\r\n\r\n")

    problem = json.loads(answer.body)
    assert set(problem) == {"type", "title", "status", "detail", "code", "request_id"}
    assert problem["type"] == "urn:voicepass:problem:request_malformed"
    assert (answer.status, problem["status"]) == (400, 400)
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cross-origin-resource-policy"] == "same-site"
    assert answer.headers["x-request-id"] == problem["request_id"]
    assert answer.headers["connection"] == "close"
    assert "server" not in answer.headers


@pytest.mark.parametrize(
    ("filler", "refused"),
    [
        (b"X-A: " + b"a" * 15 * KIBI + b"\r\n", []),
        (b"X-A: " + b"a" * 17 * KIBI + b"\r\n", ["431 headers_too_large"]),
        (b"X-A: " + b"a" * 60 * KIBI + b"\r\n", ["431 headers_too_large"]),
        (b"X-A: a\r\n" * 98, []),
        (b"X-A: a\r\n" * 99, ["431 headers_too_large"]),
    ],
    ids=["15 kB", "17 kB", "60 kB", "100 fields", "101 fields"],
)
def test_headers_end_at_16_kb_and_at_100_fields(server: Address, filler: bytes, refused: list[str]) -> None:
    answers = ask(server, GET + b"Connection: close\r\n" + filler + b"\r\n")

    assert [str(answer) for answer in answers] == (refused or ["200 GET /x"])


@pytest.mark.parametrize("what", ENDLESS)
def test_an_endless_part_of_a_request_is_refused_before_it_has_arrived(server: Address, what: str) -> None:
    begun = time.monotonic()

    answers = ask(server, ENDLESS[what], *[b"a" * 64 * KIBI] * 128)

    assert [str(answer) for answer in answers] == ["431 headers_too_large"]
    assert answers[0].headers["connection"] == "close"
    assert time.monotonic() - begun < DEADLINE + 1


def test_a_body_in_chunks_ends_at_16_kb_too(server: Address) -> None:
    chunks = [b"400\r\n" + b"a" * KIBI + b"\r\n"] * 17

    answers = ask(server, POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n", *chunks, b"0\r\n\r\n")

    assert [str(answer) for answer in answers] == ["413 body_too_large"]


def test_a_body_that_breaks_after_its_answer_gets_no_second_one(server: Address) -> None:
    with socket.create_connection(server, timeout=20) as peer:
        peer.sendall(CHUNKED + b"4400\r\n" + b"a" * 17 * KIBI + b"\r\n")
        first = answers_in(peer.recv(64 * KIBI))
        peer.sendall(b"zz\r\n\r\n")
        rest = peer.recv(64 * KIBI)

    assert [str(answer) for answer in first] == ["413 body_too_large"]
    assert rest == b""


@pytest.mark.parametrize("more", [b"", b"Expect: 100-continue\r\n"])
def test_a_body_that_is_declared_too_long_is_refused_before_any_of_it_has_arrived(server: Address, more: bytes) -> None:
    answers = ask(server, POST + more + b"Content-Length: %d\r\n\r\n" % (17 * KIBI))

    assert [str(answer) for answer in answers] == ["413 body_too_large"]


def test_a_body_that_is_too_long_may_be_sent_to_its_end_and_another_request_after_it(server: Address) -> None:
    answers = ask(server, POST + b"Content-Length: %d\r\n\r\n" % MEBI, b"a" * MEBI, GET + b"Connection: close\r\n\r\n")

    assert [str(answer) for answer in answers] == ["413 body_too_large", "200 GET /x"]


def test_junk_behind_a_request_does_not_cost_it_its_answer(server: Address) -> None:
    first, *rest = ask(server, GET + b"\r\n" + b"\0" * 9)

    assert str(first) == "200 GET /x"
    assert [str(answer) for answer in rest] in ([], [BAD])
    assert [first, *rest][-1].headers["connection"] == "close"


@pytest.mark.parametrize("request_head", [GET, GET + H2C])
def test_no_more_requests_are_queued_than_a_few(server: Address, request_head: bytes) -> None:
    answers = ask(server, (request_head + b"\r\n") * 999 + GET + b"Connection: close\r\n\r\n")

    assert {str(answer) for answer in answers} == {"200 GET /x"}
    assert len(answers) == 1 + MAX_PIPELINED


def test_a_stuck_peer_is_let_go_whatever_it_is_stuck_in(server: Address) -> None:
    kinds = [*STUCK.values()] * 10 + [*STUCK_IN_ODD_PLACES.values()]

    async def all_at_once() -> list[float]:
        return await asyncio.gather(*(seconds_until_closed(server, *kind, every_seconds=0.05) for kind in kinds))

    seconds = asyncio.run(all_at_once())

    assert max(seconds) < DEADLINE + 1


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how long a peer has read nothing")
def test_a_peer_that_never_reads_its_answer_is_disconnected(server: Address) -> None:
    received = 0
    with socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * KIBI)
        peer.settimeout(20)
        peer.connect(server)
        peer.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        time.sleep(DEADLINE + 2)  # the kernel looks ever more seldom

        with contextlib.suppress(ConnectionResetError):
            while chunk := peer.recv(64 * KIBI):
                received += len(chunk)

    assert 0 < received < 32 * MEBI


def test_a_slow_answer_is_waited_for(server: Address) -> None:
    answers = ask(server, b"GET /slow HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")

    assert [str(answer) for answer in answers] == ["200 GET /slow"]


def test_a_request_that_comes_in_parts_but_in_time_is_answered(server: Address) -> None:
    last = b"Connection: close\r\nContent-Length: 5\r\n\r\n"

    answers = ask(server, GET, b"\r\n", POST, last, b"hello", pause_seconds=DEADLINE / 10)

    assert [str(answer) for answer in answers] == ["200 GET /x", "200 POST /x hello"]


def test_a_connection_may_rest_longer_between_requests_than_within_one(server: Address) -> None:
    with socket.create_connection(server, timeout=20) as peer:
        peer.sendall(GET + b"\r\n")
        first = peer.recv(64 * KIBI)
        time.sleep(1.5 * DEADLINE)
        peer.sendall(POST + b"Content-Length: 5\r\n\r\nhello")
        second = peer.recv(64 * KIBI)

    assert [str(answer) for answer in answers_in(first + second)] == ["200 GET /x", "200 POST /x hello"]


def test_an_open_websocket_has_no_deadline(server: Address) -> None:
    with connect(f"ws://{server[0]}:{server[1]}/", proxy=None) as peer:
        time.sleep(1.5 * DEADLINE)
        peer.send("still here")

        assert peer.recv(timeout=10) == "still here"


def test_nobody_chooses_their_own_address(server: Address) -> None:
    lies = (
        b"X-Forwarded-For: 10.0.0.1\r\nX-Forwarded-Proto: https\r\nForwarded: for=10.0.0.1\r\nX-Real-IP: 10.0.0.1\r\n"
    )

    answers = ask(server, b"GET /client HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" + lies + b"\r\n")

    assert [str(answer) for answer in answers] == ["200 http 127.0.0.1"]


@contextlib.contextmanager
def serving() -> Iterator[tuple[Address, int]]:
    """The real `run`, with the real deadline, in a process of its own: its address and its process id."""
    port = free_port()
    program = (
        "from voicepass.telemetry.logs import configure_logging; from voicepass.api.server import run\n"
        "configure_logging(log_format='console', level='info')\n"
        f"run('tests.api.test_server:app', host='127.0.0.1', port={port}, grace_seconds=1)"
    )
    with started([sys.executable, "-c", program], cwd=Path(__file__).parents[2], environment=CLEAN) as output:
        (pid,) = re.findall(r"Started server process \[(\d+)\]", "".join(output))
        yield ("127.0.0.1", port), int(pid)


@pytest.mark.long
def test_the_server_may_open_as_many_files_as_the_hard_limit_allows() -> None:
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 2048))\n"
        "from voicepass.telemetry.logs import configure_logging; from voicepass.api.server import run\n"
        "configure_logging(log_format='console', level='info')\n"
        f"run('tests.api.test_server:app', host='127.0.0.1', port={free_port()}, grace_seconds=1)"
    )
    with started([sys.executable, "-c", program], cwd=Path(__file__).parents[2], environment=CLEAN) as output:
        (pid,) = re.findall(r"Started server process \[(\d+)\]", "".join(output))
        limits = Path(f"/proc/{pid}/limits").read_text()

    assert re.search(r"Max open files +2048 +2048", limits)


def resident_bytes(pid: int, *, peak: bool = False) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", status)[0]) * KIBI


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_flood_of_endless_headers_and_pipelines_stays_out_of_memory() -> None:
    filler = [b"a" * MEBI] * 8
    with serving() as (address, pid), ThreadPoolExecutor(50) as pool:
        ask(address, GET + b"Connection: close\r\n\r\n")
        before = resident_bytes(pid)

        answers = list(pool.map(lambda n: ask(address, [*ENDLESS.values()][n % 4], *filler), range(200)))
        list(pool.map(lambda _n: flood(address, (GET + b"\r\n") * 10_000), range(4)))

        grown = resident_bytes(pid, peak=True) - before
        (after,) = ask(address, GET + b"Connection: close\r\n\r\n")

    print(f"200 endless requests of 8 MB and 4 pipelines: {grown / MEBI:.1f} MiB more at the peak")
    assert {str(answer) for given in answers for answer in given} <= {"431 headers_too_large"}
    assert grown < 30 * MEBI
    assert after.status == 200


def flood(address: Address, requests: bytes, *, seconds: float = 3) -> None:
    """Send as fast as the server takes it, and read all the while."""
    until = time.monotonic() + seconds
    with socket.create_connection(address, timeout=seconds) as peer, ThreadPoolExecutor(1) as reader:
        reading = reader.submit(lambda: [None for _ in iter(lambda: peer.recv(MEBI), b"")])
        with contextlib.suppress(OSError):
            while time.monotonic() < until:
                peer.sendall(requests)
        with contextlib.suppress(OSError):
            peer.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            reading.result()


@pytest.mark.long
def test_500_stuck_peers_are_let_go_and_honest_ones_never_notice() -> None:
    kinds = [*STUCK.values()] * 167
    latencies: list[float] = []
    honest_answers: set[str] = set()

    async def honest(address: Address) -> None:
        while True:
            begun = time.monotonic()
            answers = await asyncio.to_thread(ask, address, GET + b"Connection: close\r\n\r\n")
            latencies.append(time.monotonic() - begun)
            honest_answers.update(str(answer) for answer in answers)
            await asyncio.sleep(0.02)

    async def stuck_while_honest_ones_ask(address: Address) -> list[float]:
        asking = asyncio.create_task(honest(address))
        stuck = [seconds_until_closed(address, *kind, every_seconds=0.5) for kind in kinds[:500]]
        seconds = await asyncio.gather(*stuck)
        asking.cancel()
        await asyncio.wait([asking])
        return seconds

    with serving() as (address, _pid):
        seconds = asyncio.run(stuck_while_honest_ones_ask(address))

    p99 = sorted(latencies)[int(len(latencies) * 0.99)]
    print(
        f"500 stuck peers closed after {min(seconds):.2f} to {max(seconds):.2f} s; "
        f"{len(latencies)} honest requests, p99 {p99 * 1000:.1f} ms"
    )
    assert max(seconds) <= RECEIVE_SECONDS + 1
    assert honest_answers == {"200 GET /x"}


def test_a_path_prefix_may_be_written_with_or_without_slashes_at_its_ends() -> None:
    written = [write_prefix(prefix) for prefix in ("", "/", "/voice", "/voice/", "voice", "a/b/")]

    assert written == ["", "", "/voice", "/voice", "/voice", "/a/b"]
