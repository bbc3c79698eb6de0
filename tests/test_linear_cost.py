"""The cost of untrusted text is linear in its length: for every regular expression, and for a whole request.

No test here asserts a time. Each compares the CPU times of three inputs, whose lengths are as 1 to 4 to 16. Linear work
takes 4 times as long at each step, and quadratic work 16 times.
"""

import ast
import asyncio
import contextlib
import re
import socket
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import httpx
import pytest
from starlette.types import Message, Scope

from elevenlabs_emulator import script
from tests.cli.test_cli import ENVIRONMENT
from tests.conftest import settings_with
from tests.servers import free_port, started
from tests.tables import table
from voicepass.app import create_app
from voicepass.elevenlabs.codes import CAUSES
from voicepass.telemetry.logger import redact

SOURCE = Path(__file__).parents[1] / "src"
MEASURABLE_SECONDS = 50e-6
FUNCTIONS = {"compile", "search", "match", "fullmatch", "sub", "subn", "split", "findall", "finditer"}

# Patterns that the source builds from parts, by file and expression.
COMPOSED = {
    "voicepass/elevenlabs/codes.py: pattern": [p for cause in CAUSES.values() for p in (*cause.reasons, *cause.lines)],
    r"elevenlabs_emulator/script.py: f'\\b(?:{words})\\b'": [rf"\b(?:{words})\b" for words in script.SMALL_TALK],
}

# Each pattern must match in one of these texts. The test makes the worst cases of the pattern from the match.
EXAMPLES = [
    *(line["text"] for line in tomllib.loads((Path(__file__).parent / "doctor" / "lines.toml").read_text())["line"]),
    "missing the permission convai_read to",
    "counter_17.db",
    "tcp://10.0.0.1:8000",
    'api_key_env = "ELEVENLABS_API_KEY_EU"',
    "VOICEPASS_POSTGRES_SERVICE_HOST",
    "x",
    "application/vnd.api+json",
    "t=1700000000,v0=" + "0af" * 21 + "0",
    "conversation_signature=cvtkn_a1",
    "x-eyJhbGci-eyJ.eyJz.c2ln",
    "1008",
    "403",
    "{{  user.name  }}",
    "aB",
    "gauge_livesum_17.db",
    "Missing required dynamic variables in tools: {'a'",
    "postgresql://u:p@h/d",
    "%zz",
    "conv_01",
    "default-2",
    "ELEVENLABS_KEY",
    ":name",
    "sell my 12 red apples for 2.50",
    "$2.50 euro",
    "per dozen",
    "hello there",
    "\ud800",
    "Missing dynamic variable after agent transfer",
    "Override for field 'a' is not allowed",
    "Override is not allowed",
    "Language 'xx' is not supported",
    "daily call limit of 100",
    "exceeds your quota",
    "appears to be misconfigured",
    "Could not authorize",
    "Request error",
    "Host example.org is not allowed",
    "agent you are trying to reach does not exist",
    "too many concurrent",
    "already in CLOSING or CLOSED state",
    "no signed URL or conversation token was provided",
    "invalid authorization token",
    "KeyError: 'signed_url'",
    "Invalid agent ID",
    "/rtc/v1/validate",
    "worklet module",
    "closed due to a socket error",
    "goodbye",
    "thank you",
    "help",
]


def list_patterns() -> Iterator[tuple[str, int]]:
    yield from sorted(set(find_patterns()))


def find_patterns() -> Iterator[tuple[str, int]]:
    """Find every regular expression of the source, with its flags."""
    for path in sorted(SOURCE.rglob("*.py")):
        where = path.relative_to(SOURCE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.module == "re"), f"{where} must import re itself"
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="re"), attr=name), args=[pattern, *rest]) if (
                    name in FUNCTIONS
                ):
                    names = re.findall(r"re\.([A-Z]+)\b", " ".join(map(ast.unparse, rest)))
                    flags = sum(getattr(re, flag) for flag in names)
                    if isinstance(pattern, ast.Constant):
                        yield str(pattern.value), flags
                    else:
                        for text in COMPOSED[f"{where}: {ast.unparse(pattern)}"]:
                            yield text, flags


def make_worst_cases(found: str) -> set[tuple[str, str]]:
    """Make worst cases from a text that a pattern matches: a prefix of the text, and what to repeat after it."""
    spans = [(begin, end) for begin in range(len(found)) for end in range(begin + 1, begin + 3)]
    inside = {(found[:begin], found[begin:end]) for begin, end in spans}
    restarts = {("", found[:end] + joint) for end in range(1, len(found) + 1) for joint in ("", "-", " ")}
    return inside | restarts


def measure_seconds(work: Callable[[str], object], text: str) -> float:
    begun = time.thread_time()
    work(text)
    return time.thread_time() - begun


def is_linear(work: Callable[[str], object], beginning: str, unit: str, *, length: int = 500) -> bool:
    """Tell whether a text of four times the length takes about four times the work."""
    short, middle, long = (beginning + unit * (times * length // len(unit)) + "!\n" for times in (1, 4, 16))
    least = [float("inf")] * 3
    for _ in range(30):  # noise only adds time, so the shortest of many measurements is the best one
        least[2] = min(least[2], measure_seconds(work, long))
        if least[2] < MEASURABLE_SECONDS:
            return True
        least[1] = min(least[1], measure_seconds(work, middle))
        if least[2] < 8 * least[1]:
            return True
        least[0] = min(least[0], measure_seconds(work, short))
        if least[1] < 8 * least[0]:
            return True
    return False


@pytest.mark.long
@table(("pattern", "flags"), list_patterns())
def test_every_regular_expression_takes_linear_time(pattern: str, flags: int) -> None:
    compiled = re.compile(pattern, flags)
    matches = [match[0] for match in map(compiled.search, EXAMPLES) if match]
    assert matches, "add a text that this pattern matches to EXAMPLES"
    found = max(matches, key=len)

    for beginning, unit in make_worst_cases(found):
        for work in (compiled.fullmatch, lambda text: compiled.sub("", text)):
            assert is_linear(work, beginning, unit), beginning + 3 * unit


UNITS = ["eyJ-", "eyJa.", "sk_", "xsk_", "cvtkn_", "token=", "conversation_signature=", "%2e", "x"]


@table("unit", UNITS)
def test_redaction_takes_linear_time(unit: str) -> None:
    assert is_linear(lambda text: redact(text, most_characters=len(text)), "GET /", unit, length=1000)
    assert is_linear(redact, "GET /", unit, length=4000)


def make_request(path: str, name: str = "x-padding", value: str = "") -> Scope:
    """Make an HTTP request without a token, as a server passes it to the application."""
    return {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"x"), (name.encode(), value.encode())],
        "client": ("127.0.0.1", 50000),
    }


REQUESTS: dict[str, Callable[[str], Scope]] = {
    "path": lambda text: make_request(f"/{text}"),
    "path of a route": lambda text: make_request(f"/v1/conversations/{text}"),
    **{
        name: lambda text, name=name: make_request("/v1/usage", name, text)  # type: ignore[misc]
        for name in ("authorization", "cookie", "origin", "user-agent", "x-forwarded-for", "x-request-id")
    },
}


@pytest.mark.parametrize("unit", ["eyJ-", "127.0.0.1,"])
@pytest.mark.parametrize("place", REQUESTS)
def test_a_request_takes_time_in_proportion_to_its_length(place: str, unit: str) -> None:
    app = create_app(settings_with(voicepass_trusted_proxies="127.0.0.1", voicepass_session_cookie="session"))

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.add(message["status"])

    def ask(text: str) -> None:
        runner.run(app(REQUESTS[place](text.strip()), receive, send))

    statuses: set[int] = set()
    lifespan = app.router.lifespan_context(app)
    with asyncio.Runner() as runner:
        runner.run(lifespan.__aenter__())

        assert is_linear(ask, "", unit, length=4000)  # up to 64,000 characters: the parsers refuse more

        runner.run(lifespan.__aexit__(None, None, None))
    assert 431 in statuses
    assert max(statuses) < 500


@pytest.mark.long
@pytest.mark.alone
def test_healthz_is_as_quick_during_ten_hostile_connections_as_during_ten_ordinary_ones(tmp_path: Path) -> None:
    port = free_port()
    address = ("127.0.0.1", port)
    medians = {}

    def send_on(data: bytes, end: threading.Event) -> None:
        while not end.is_set():
            with contextlib.suppress(ConnectionError), socket.create_connection(address) as connection:
                connection.sendall(data)
                connection.recv(65_536)

    command = [sys.executable, "-m", "voicepass", "serve", "--port", str(port)]
    with started(command, cwd=tmp_path, environment=ENVIRONMENT), httpx.Client(trust_env=False, timeout=60) as client:
        for unit in ("abc-", "eyJ-", "xsk_"):
            data = b"GET /" + 15_000 * unit.encode() + b" HTTP/1.1\r\nHost: x\r\n\r\n"
            end, took = threading.Event(), []
            with ThreadPoolExecutor(10) as senders:
                for _ in range(10):
                    senders.submit(send_on, data, end)
                for _ in range(100):
                    begun = time.perf_counter()
                    assert client.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
                    took.append(1000 * (time.perf_counter() - begun))
                end.set()
            medians[unit] = median(took)
            print(f"/healthz beside ten times {unit}…: median {median(took):.1f} ms, longest {max(took):.1f} ms")

    assert max(medians.values()) < 10 * medians["abc-"]
