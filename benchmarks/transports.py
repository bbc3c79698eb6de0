"""What one call to ElevenLabs costs by each HTTP client that httpx can stand on, and which of them survives abuse."""

import argparse
import asyncio
import json
import random
import resource
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final, NamedTuple

import aiohttp
import httpx
import httpx2
import httpx_aiohttp
import pyqwest
import pyreqwest.client
import uvloop
from pyqwest.httpx import AsyncPyqwestTransport
from pyreqwest.compatibility.httpx import HttpxTransport

from voicepass import outbound
from voicepass.elevenlabs import ElevenLabs, Workspace
from voicepass.model import Agent, Transport

PATH: Final = "/v1/convai/conversation/get-signed-url?agent_id=agent_7x&include_conversation_id=true"
HEADERS: Final = {"accept": "application/json", "accept-encoding": "identity", "xi-api-key": "sk_" + "0" * 48}
CROWD: Final = 200  # abused calls at once
CONNECTIONS: Final = (1, 16, 64, 256, 1000)
ROUNDS: Final = 3
CALL_SECONDS: Final = 10.0


class Pool(NamedTuple):
    """How many connections it may have, where it has a limit, and how long it keeps one that is idle."""

    most: int
    idle_seconds: float


FAST: Final = Pool(most=1000, idle_seconds=30)
CHURNED: Final = Pool(most=CROWD + 50, idle_seconds=1)  # what is open for longer, and a place that is lost, has leaked

Call = Callable[[str], Awaitable[int]]
"""Asks for a URL, reads the whole answer, and returns its status."""


# --- the upstream: in a process and on a core of its own ---


class Upstream(asyncio.Protocol):
    """Answers as ElevenLabs does. `/slow`: after 200 ms; `/abort`: amid the body; `/reset`: not at all."""

    def __init__(self) -> None:
        self._received = b""
        self._count = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way back."""
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        """Answer every request that is complete."""
        self._received += data
        while b"\r\n\r\n" in self._received:
            request, _, self._received = self._received.partition(b"\r\n\r\n")
            self._count += 1
            host = request.lower().partition(b"\r\nhost: ")[2].partition(b"\r\n")[0].decode()
            query = f"agent_id=agent_7x&conversation_id=conv_{id(self)}{self._count}&conversation_signature={'x' * 40}"
            body = json.dumps({"signed_url": f"ws://{host}/v1/convai/conversation?{query}"}).encode()
            answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            if request.startswith(b"GET /slow"):
                asyncio.get_running_loop().call_later(0.2, self._answer, answer % (len(body), body))
            elif request.startswith(b"GET /abort"):
                self._transport.write(answer % (len(body) + 100, body))
                self._transport.close()
            elif request.startswith(b"GET /reset"):
                self._transport.abort()
            else:
                self._transport.write(answer % (len(body), body))

    def _answer(self, answer: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(answer)


async def serve(port: int) -> None:
    """Answer until killed."""
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", port, backlog=4096)
    print("listening", flush=True)
    await server.serve_forever()


# --- the subjects ---


def over(transport: httpx.AsyncBaseTransport) -> AbstractAsyncContextManager[Call]:
    """Use an httpx client on `transport`."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[Call]:
        async with httpx.AsyncClient(
            transport=transport, headers=HEADERS, timeout=CALL_SECONDS, trust_env=False
        ) as client:

            async def call(url: str) -> int:
                response = await client.send(client.build_request("GET", url), stream=True)
                try:
                    async for _ in response.aiter_raw():
                        pass
                finally:
                    await response.aclose()
                return response.status_code

            yield call

    return opened()


def directly(transport: httpx.AsyncBaseTransport) -> AbstractAsyncContextManager[Call]:
    """Use `transport` with no client before it."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[Call]:
        async with transport:
            timeout = httpx.Timeout(CALL_SECONDS).as_dict()

            async def call(url: str) -> int:
                request = httpx.Request("GET", url, headers=HEADERS, extensions={"timeout": timeout})
                response = await transport.handle_async_request(request)
                try:
                    async for _ in response.stream:  # type: ignore[union-attr]
                        pass
                finally:
                    await response.aclose()
                return response.status_code

            yield call

    return opened()


@asynccontextmanager
async def over_httpx2(pool: Pool) -> AsyncIterator[Call]:
    """Use httpx2, the continuation of httpx under another name."""
    limits = httpx2.Limits(
        max_connections=pool.most, max_keepalive_connections=pool.most, keepalive_expiry=pool.idle_seconds
    )
    async with httpx2.AsyncClient(headers=HEADERS, timeout=CALL_SECONDS, trust_env=False, limits=limits) as client:

        async def call(url: str) -> int:
            async with client.stream("GET", url) as response:
                async for _ in response.aiter_raw():
                    pass
            return response.status_code

        yield call


@asynccontextmanager
async def over_aiohttp(pool: Pool) -> AsyncIterator[Call]:
    """Use aiohttp itself: what the transport on it could reach at best."""
    connector = aiohttp.TCPConnector(limit=pool.most, keepalive_timeout=pool.idle_seconds)
    async with aiohttp.ClientSession(connector=connector, headers=HEADERS) as session:

        async def call(url: str) -> int:
            async with session.get(url, timeout=aiohttp.ClientTimeout(total=CALL_SECONDS)) as response:
                await response.read()
            return response.status

        yield call


@asynccontextmanager
async def over_pyreqwest(pool: Pool) -> AsyncIterator[Call]:
    """Use pyreqwest itself."""
    async with _reqwest(pool) as client:

        async def call(url: str) -> int:
            response = await client.get(url).headers(HEADERS).build().send()
            await response.bytes()
            return response.status

        yield call


def _reqwest(pool: Pool) -> pyreqwest.client.Client:
    builder = pyreqwest.client.ClientBuilder().no_proxy().follow_redirects(enable=False)
    return (
        builder.timeout(timedelta(seconds=CALL_SECONDS)).pool_idle_timeout(timedelta(seconds=pool.idle_seconds)).build()
    )


def _httpcore(pool: Pool) -> httpx.AsyncHTTPTransport:
    limits = httpx.Limits(
        max_connections=pool.most, max_keepalive_connections=pool.most, keepalive_expiry=pool.idle_seconds
    )
    return httpx.AsyncHTTPTransport(limits=limits, trust_env=False)


def _aiohttp(pool: Pool) -> httpx.AsyncBaseTransport:
    limits = httpx.Limits(max_connections=pool.most, keepalive_expiry=pool.idle_seconds)
    return httpx_aiohttp.AiohttpTransport(limits=limits, trust_env=False)


def _pyqwest(pool: Pool) -> httpx.AsyncBaseTransport:
    return AsyncPyqwestTransport(
        pyqwest.HTTPTransport(pool_idle_timeout=pool.idle_seconds, follow_redirects=False, enable_otel=False)
    )


@asynccontextmanager
async def ours(pool: Pool) -> AsyncIterator[Call]:
    """Use what voicepass uses: the transport alone, the URL and the headers parsed once."""
    outbound.IDLE_SECONDS = pool.idle_seconds
    async with outbound.http_transport(connect_seconds=CALL_SECONDS) as transport:
        known: dict[str, httpx.Request] = {}

        async def call(url: str) -> int:
            request = known.get(url) or known.setdefault(url, httpx.Request("GET", url, headers=HEADERS))
            return (await outbound.get(transport, request, most_bytes=65_536)).status

        yield call


@asynccontextmanager
async def our_adapter(_pool: Pool) -> AsyncIterator[Call]:
    """Use the whole adapter: the same, guarded, and the answer read and checked."""
    async with outbound.http_transport(connect_seconds=CALL_SECONDS) as transport:
        opened: dict[str, tuple[ElevenLabs, Agent]] = {}

        def at(base_url: str) -> tuple[ElevenLabs, Agent]:
            workspace = Workspace(base_url=base_url, api_keys=[HEADERS["xi-api-key"]])
            provider = ElevenLabs(
                transport=transport,
                workspaces=[workspace],
                deadline_seconds=CALL_SECONDS,
                max_calls=1000,
                clock=time.time,
            )
            return provider, Agent(alias="default", agent_id="agent_7x", base_url=base_url)

        async def call(url: str) -> int:
            base_url = url.removesuffix(PATH)
            provider, agent = opened.get(base_url) or opened.setdefault(base_url, at(base_url))
            await provider.fetch_credential(agent, Transport.WEBSOCKET)
            return 200

        yield call


SUBJECTS: Final[dict[str, Callable[[Pool], AbstractAsyncContextManager[Call]]]] = {
    "httpx": lambda pool: over(_httpcore(pool)),
    "httpx2": over_httpx2,
    "httpx on httpx-aiohttp": lambda pool: over(_aiohttp(pool)),
    "httpx on pyqwest": lambda pool: over(_pyqwest(pool)),
    "httpx on pyreqwest": lambda pool: over(HttpxTransport(_reqwest(pool))),
    "httpx-aiohttp, transport alone": lambda pool: directly(_aiohttp(pool)),
    "pyqwest, transport alone": lambda pool: directly(_pyqwest(pool)),
    "pyreqwest, transport alone": lambda pool: directly(HttpxTransport(_reqwest(pool))),
    "voicepass: aiohttp, transport alone, parsed once": ours,
    "voicepass: the whole adapter": our_adapter,
    "aiohttp, without httpx": over_aiohttp,
    "pyreqwest, without httpx": over_pyreqwest,
}


# --- what is measured ---


async def measure(call: Call, base_url: str, connections: int, seconds: float) -> dict[str, float]:
    """Keep `connections` callers busy for `seconds`, after a third of that to warm up."""
    took: list[float] = []
    begin, end = time.perf_counter() + seconds / 3, time.perf_counter() + seconds * 4 / 3

    async def caller() -> None:
        while (begun := time.perf_counter()) < end:
            assert await call(base_url + PATH) == 200  # noqa: PLR2004
            if begun >= begin:
                took.append(time.perf_counter() - begun)

    callers = [asyncio.create_task(caller()) for _ in range(connections)]
    await asyncio.sleep(seconds / 3)
    spent = _cpu_seconds()
    await asyncio.sleep(end - time.perf_counter())
    spent = _cpu_seconds() - spent
    await asyncio.gather(*callers)
    return {
        "cpu_us": spent / len(took) * 1e6,
        "p99_ms": quantiles(took, n=100)[98] * 1e3 if len(took) > 1 else took[0] * 1e3,
        "per_second": len(took) / seconds,
    }


async def churn(call: Call, base_url: str, calls: int) -> dict[str, float]:
    """Cancel, time out and cut off `calls` calls, many at once; then see whether 100 good ones get through."""
    dice = random.Random(7)
    open_before = _open_files()
    crowd = asyncio.Semaphore(CROWD)

    async def abused() -> None:
        async with crowd:
            way = dice.choice(["cancel", "cancel", "time out", "/abort", "/reset"])
            path = way if way.startswith("/") else dice.choice(["/slow", "/fast"])
            task = asyncio.ensure_future(call(base_url + path))
            with suppress(Exception, asyncio.CancelledError):
                if way == "time out":
                    async with asyncio.timeout(dice.random() * 0.02):
                        await task
                elif way == "cancel":
                    await asyncio.sleep(dice.random() * 0.02)
                    task.cancel()
                await task

    await asyncio.gather(*(abused() for _ in range(calls)))

    async def good() -> bool:
        with suppress(Exception):
            async with asyncio.timeout(2):
                return await call(base_url + PATH) == 200  # noqa: PLR2004
        return False

    passed = sum(await asyncio.gather(*(good() for _ in range(100))))
    await asyncio.sleep(CHURNED.idle_seconds * 2.5)
    with suppress(Exception):
        await call(base_url + PATH)  # some pools look at their idle connections only now
    await asyncio.sleep(CHURNED.idle_seconds * 2.5)
    return {"passed": passed, "leaked": _open_files() - open_before}


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)  # with all threads: some clients have their own
    return usage.ru_utime + usage.ru_stime


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def run_subject(name: str, base_url: str, connections: int, seconds: float, calls: int) -> dict[str, float]:
    """Measure one subject in this process."""
    async with SUBJECTS[name](CHURNED if calls else FAST) as call:
        await call(base_url + PATH)
        return await (churn(call, base_url, calls) if calls else measure(call, base_url, connections, seconds))


def in_a_process(*arguments: object, core: int) -> "subprocess.Popen[str]":
    """Run this script again, on one core."""
    command = ["taskset", "-c", str(core), sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def result(process: "subprocess.Popen[str]") -> dict[str, float] | None:
    """Wait for what a subject measured; None where it failed."""
    written, _ = process.communicate(timeout=300)
    return json.loads(written) if process.returncode == 0 else None


def print_costs(base_url: str, names: Sequence[str], *, rounds: int, seconds: float) -> None:
    """Print what a call costs."""
    print(f"| client | {' | '.join(f'{n} at once' for n in CONNECTIONS)} |\n|---|{'---:|' * len(CONNECTIONS)}")
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(rounds):
        for name in names:
            for connections in CONNECTIONS:
                subject = in_a_process("--subject", name, base_url, connections, seconds, 0, core=0)
                if (measured := result(subject)) is not None:
                    found.setdefault((name, connections), []).append(measured)
    for name in names:
        cells = [_cell(found.get((name, connections), [])) for connections in CONNECTIONS]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def print_survival(base_url: str, names: Sequence[str], *, calls: int) -> None:
    """Print what is left after abuse."""
    print("\n| client | of 100 calls after the churn | sockets left open |\n|---|---:|---:|")
    for name in names:
        if SUBJECTS[name] is our_adapter:
            continue  # its breaker would spare it most of the churn
        survived = result(in_a_process("--subject", name, base_url, 0, 0, calls, core=0))
        cells = [f"{survived['passed']:.0f}", f"{survived['leaked']:.0f}"] if survived else ["failed", "?"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--calls", type=int, default=10_000, help="of the churn")
    parser.add_argument("--only", nargs="*", default=list(SUBJECTS))
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--subject", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        uvloop.run(serve(options.serve))
        return
    if options.subject:
        name, base_url, connections, seconds, calls = options.subject
        print(json.dumps(uvloop.run(run_subject(name, base_url, int(connections), float(seconds), int(calls)))))
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    upstream = in_a_process("--serve", port, core=1)
    assert upstream.stdout
    upstream.stdout.readline()
    base_url = f"http://127.0.0.1:{port}"
    try:
        if options.rounds:
            print_costs(base_url, options.only, rounds=options.rounds, seconds=options.seconds)
        print_survival(base_url, options.only, calls=options.calls)
    finally:
        upstream.terminate()


def _cell(measured: list[dict[str, float]]) -> str:
    if not measured:
        return "failed"
    cpu, p99, rate = (median(one[key] for one in measured) for key in ("cpu_us", "p99_ms", "per_second"))
    return f"{cpu:,.0f} µs, {p99:,.1f} ms, {rate:,.0f}/s"


if __name__ == "__main__":
    main()
