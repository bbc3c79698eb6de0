"""The CPU that each layer of voicepass adds to a pass: services with one layer more each, under the same load."""

import argparse
import cProfile
import json
import os
import pstats
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Final

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from benchmarks.peers.figures import markdown, show
from benchmarks.peers.machine import HERE, Load, Subject, load, run_subject, run_upstream
from benchmarks.peers.subjects import ASK, build_settings, free_port, wait_for_first_pass, write_tokens
from benchmarks.ports import InstantProvider, NewUsers, NoLedger
from voicepass.api.cors import Cors
from voicepass.api.middleware import Surface
from voicepass.api.server import UVICORN_OPTIONS, run
from voicepass.app import create_app
from voicepass.model import Agent, PassRequest, Transport, VoicePass
from voicepass.passes import Passes

RUNGS: Final = {
    "asgi": "uvicorn and a bare ASGI app",
    "guards": "+ limits below ASGI (`server`)",
    "surface": "+ request id, limits, headers, CORS (`api.middleware`, `api.cors`)",
    "route": "+ FastAPI's routing, the request read, the answer encoded (`api.routes`, `api.schemas`)",
    "passes": "+ the use case and its rules (`passes`, `policy`)",
    "token": "+ the token verified (`identity`)",
    "ledger": "+ reserved and granted on disk, five limits (`ledger.sqlite`)",
    "client": "+ ElevenLabs asked, its answer checked (`elevenlabs`)",
    "observers": "+ log line and metrics (`observe`): all of it",
}
OURS: Final = "/src/voicepass/"
PACKAGES: Final = {
    "starlette": "fastapi, starlette",
    "fastapi": "fastapi, starlette",
    "yarl": "aiohttp",
    "multidict": "aiohttp",
    "cryptography": "jose",
}
"""The project of each package that has another name."""
ANSWER: Final = b'{"signed_url":"wss://x"}'
AGENT: Final = Agent(alias="default", agent_id="agent_1", base_url="https://x")


async def bare(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer every request with the same body."""
    if scope["type"] == "lifespan":
        for event in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{event}.complete"})
        return
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(ANSWER)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": ANSWER})


class FakePasses:
    """Issues a pass to everyone, without the use case."""

    async def issue(self, request: PassRequest) -> VoicePass:
        """Return a pass."""
        credential = await InstantProvider().fetch_credential(AGENT, request.transport)
        return VoicePass(
            transport=Transport.WEBSOCKET,
            credential=credential,
            agent=AGENT,
            user_id="u-1",
            dynamic_variables={"user_id": "u-1", "user_name": "Ada"},
        )


def build_rung() -> ASGIApp:
    """Build the service up to the layer that the variable RUNG names. If PROFILE names a file, profile it."""
    names = [*RUNGS]
    layers = set(names[: names.index(os.environ["RUNG"]) + 1])
    if "surface" not in layers:
        return bare
    if "route" not in layers:
        return Cors(Surface(bare), allowed_origins=[], with_cookies=False)
    app = create_app()
    whole = app.router.lifespan_context

    @asynccontextmanager
    async def replace_ports(app: FastAPI) -> AsyncIterator[None]:
        async with whole(app):
            real = app.state.passes
            app.state.passes = (
                Passes(
                    authenticator=real.authenticator if "token" in layers else NewUsers(),
                    policy=real.policy,
                    provider=real.provider if "client" in layers else InstantProvider(),
                    take_ready=real.take_ready,
                    ledger=real.ledger if "ledger" in layers else NoLedger(),
                    open_passes=real.open_passes,
                    seal=real.seal,
                    observe=real.observe if "observers" in layers else lambda _attempt: None,
                )
                if "passes" in layers
                else FakePasses()
            )
            profile = cProfile.Profile()
            if "PROFILE" in os.environ:
                profile.enable()
            yield
            if "PROFILE" in os.environ:
                profile.disable()
                profile.dump_stats(os.environ["PROFILE"])
            app.state.passes = real

    app.router.lifespan_context = replace_ports
    return app


def serve(port: int) -> None:
    """Serve the rung: the first one by plain uvicorn, the others by the service's own server."""
    if os.environ["RUNG"] == "asgi":
        uvicorn.run(bare, port=port, **UVICORN_OPTIONS)
    else:
        run("benchmarks.layers:build_rung", host="127.0.0.1", port=port, grace_seconds=1, factory=True)


def measure_rungs(
    *, delay: int, rounds: int, seconds: float, connections: int, is_profiled: bool = False
) -> dict[str, list[Load]]:
    """Load every rung in each round, and do not count the first round; or profile the last rung alone."""
    loads: dict[str, list[Load]] = {name: [] for name in RUNGS}
    with tempfile.TemporaryDirectory(prefix="vp") as name, ExitStack() as stack:
        directory = Path(name)
        upstream = stack.enter_context(run_upstream(delay, directory))
        tokens = write_tokens(directory / "tokens")
        subjects: list[Subject] = []
        for layer in [*RUNGS][-1:] if is_profiled else RUNGS:
            cwd = directory / layer
            cwd.mkdir()
            environment = build_settings(upstream, cwd) | {"RUNG": layer, "PYTHONPATH": str(HERE.parent.parent)}
            if is_profiled:
                environment["PROFILE"] = str(directory / "profile")
            port = free_port()
            command = [sys.executable, "-m", "benchmarks.layers", "--serve", port]
            subject = stack.enter_context(run_subject(layer, command, port=port, cwd=cwd, environment=environment))
            wait_for_first_pass(subject, time.monotonic())
            subjects.append(subject)
        for number in range(rounds + 1):
            for subject in subjects:
                sys.stderr.write(f"round {number}: {subject.name}\033[K\r")
                one = load(subject, connections=connections, seconds=seconds, request=ASK, tokens=tokens)
                if one.failed:
                    sys.stderr.write(f"{subject.name}: {one.failed} requests got no pass; see {subject.log}\n")
                subject.wait_until_idle()
                if number:
                    loads[subject.name].append(one)
        sys.stderr.write(f"of {subject.name}, the event loop's thread: {subject.first_thread_share():.0%}\033[K\n")
        if is_profiled:
            stack.close()  # it writes its profile when it ends
            stats = pstats.Stats(str(directory / "profile"))
            stats.sort_stats("tottime").print_stats(45)
            sys.stdout.write(markdown(tabulate_shares(stats)))
    return loads


def tabulate_shares(stats: pstats.Stats) -> list[dict[str, str]]:
    """Tabulate the event loop's time by the owner of the code; a function in C counts for its caller."""
    seconds: dict[str, float] = defaultdict(float)
    for (file, _line, _name), (_, _, own, _, callers) in stats.stats.items():  # type: ignore[attr-defined]
        parts = (
            [(caller, part) for (caller, _, _), (_, _, part, _) in callers.items()] if file == "~" else [(file, own)]
        )
        for whose, part in parts:
            seconds[_owner(whose)] += part
            if OURS in whose:
                seconds[f"of that, `{whose.rpartition(OURS)[2].removesuffix('.py')}`"] += part
    total = sum(part for owner, part in seconds.items() if not owner.startswith("of that"))
    ranked = sorted(seconds.items(), key=lambda each: -each[1])
    return [{"whose code": owner, "share": f"{part / total:.1%}"} for owner, part in ranked if part > total / 100]


def _owner(file: str) -> str:
    if OURS in file:
        return "voicepass"
    package = file.rpartition("/site-packages/")[2].partition("/")[0] if "/site-packages/" in file else ""
    return PACKAGES.get(package, package) or "Python's own library"


def tabulate(loads: dict[str, list[Load]]) -> list[dict[str, str]]:
    """Tabulate the rungs, and the CPU that each adds to the one before it."""
    table, below = [], [0.0] * len(loads["asgi"])
    for name, title in RUNGS.items():
        cpu_us = [load.cpu_us for load in loads[name]]
        more = median(here - there for here, there in zip(cpu_us, below, strict=True))  # in the same round
        row = {"up to": title, "CPU µs a pass": show(median(cpu_us)), "this layer": show(more)}
        row["passes/s"] = show(median(load.per_second for load in loads[name]))
        table.append(row | {"median ms": show(median(load.median_ms for load in loads[name]))})
        below = cpu_us
    return table


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--delay", type=int, default=0, help="of the upstream, in ms")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2, help="of one load")
    parser.add_argument("--functions", action="store_true", help="profile the whole service by function and by package")
    parser.add_argument("--json", type=Path, help="a file for the table")
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    loads = measure_rungs(
        delay=options.delay,
        rounds=options.rounds,
        seconds=options.seconds,
        connections=options.connections,
        is_profiled=options.functions,
    )
    if options.functions:
        return
    table = tabulate(loads)
    sys.stderr.write("\033[K")
    sys.stdout.write(markdown(table))
    if options.json:
        options.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
