"""Honest users and attackers at once, for minutes: memory, descriptors and the longest stall of the real service.

    python -m benchmarks.mixed --minutes 10

The stall is the longest answer of /healthz, which waits for nothing but the event loop and the processor. The emulator
and the callers share the processor with the service.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import httpx
from jose import jwt

SECRET: Final = "a-secret-of-the-benchmark-of-32-bytes-or-more"  # noqa: S105
KEY: Final = "sk_emulator"
SETTINGS: Final = {
    "ELEVENLABS_API_KEY": KEY,
    "ELEVENLABS_AGENT_ID": "agent_demo",
    "ELEVENLABS_WEBHOOK_SECRET": "wsec_0123456789abcdef0123456789abcdef",
    "VOICEPASS_JWT_SECRET": SECRET,
    "VOICEPASS_JWT_ISSUER": "https://login.example",
    "VOICEPASS_JWT_AUDIENCE": "voicepass",
    "VOICEPASS_ALLOWED_ORIGINS": "https://app.example",
}
PATH: Final = "/v1/signed-url"

Act = Callable[[httpx.AsyncClient, int], Awaitable[int]]


def sign(user: str) -> dict[str, str]:
    """Return the header of a signed-in user."""
    claims = {"iss": "https://login.example", "aud": "voicepass", "sub": user, "exp": int(time.time()) + 600}
    return {"Authorization": f"Bearer {jwt.encode(claims, SECRET, 'HS256')}"}


async def ask_for_a_pass(client: httpx.AsyncClient, _port: int) -> int:
    return (await client.post(PATH, headers=sign(f"u-{random.randrange(5000)}"))).status_code


async def ask_too_often(client: httpx.AsyncClient, _port: int) -> int:
    return (await client.post(PATH, headers=sign("greedy"))).status_code


async def send_a_bad_token(client: httpx.AsyncClient, _port: int) -> int:
    token = sign("u-1")["Authorization"][:-4] + "AAAA"
    return (await client.post(PATH, headers={"Authorization": token})).status_code


async def send_a_long_path(client: httpx.AsyncClient, _port: int) -> int:
    return (await client.get("/" + "eyJ-" * random.randrange(1, 12_000))).status_code


async def send_a_large_body(client: httpx.AsyncClient, _port: int) -> int:
    return (await client.post(PATH, headers=sign("u-2"), content=b"x" * 100_000)).status_code


async def send_a_forged_webhook(client: httpx.AsyncClient, _port: int) -> int:
    headers = {"ElevenLabs-Signature": f"t={int(time.time())},v0={'0' * 64}"}
    return (await client.post("/v1/webhooks/elevenlabs", headers=headers, content=b"{}" * 4000)).status_code


async def send_a_foreign_preflight(client: httpx.AsyncClient, _port: int) -> int:
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    return (await client.options(PATH, headers=headers)).status_code


async def close_early(_client: httpx.AsyncClient, port: int) -> int:
    """Send a request for a pass, and close the connection before the answer."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: {sign('u-3')['Authorization']}\r\n\r\n".encode())
    await writer.drain()
    writer.transport.abort()
    return 0


async def send_half_a_request(_client: httpx.AsyncClient, port: int) -> int:
    """Send headers that never end, and let the service close the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: ")
    await reader.read()
    writer.close()
    return 1


ACTS: Final[dict[Act, int]] = {
    ask_for_a_pass: 6,
    ask_too_often: 1,
    send_a_bad_token: 2,
    send_a_long_path: 1,
    send_a_large_body: 1,
    send_a_forged_webhook: 1,
    send_a_foreign_preflight: 1,
    close_early: 1,
    send_half_a_request: 1,
}


async def act(client: httpx.AsyncClient, port: int, until: float, outcomes: Counter[str]) -> None:
    """Do random acts one after the other, about ten a second."""
    while time.monotonic() < until:
        (what,) = random.choices([*ACTS], weights=[*ACTS.values()])
        try:
            outcomes[f"{what.__name__} {await what(client, port)}"] += 1
        except (httpx.HTTPError, OSError) as error:
            outcomes[f"{what.__name__} {type(error).__name__}"] += 1
        await asyncio.sleep(random.uniform(0, 0.2))


async def watch(client: httpx.AsyncClient, until: float, stalls: list[float]) -> None:
    """Ask /healthz twenty times a second."""
    while time.monotonic() < until:
        began = time.monotonic()
        await client.get("/healthz")
        stalls.append(time.monotonic() - began)
        await asyncio.sleep(0.05)


async def sample(pid: int, until: float) -> None:
    """Print the service's memory and descriptors each minute."""
    began = time.monotonic()
    while time.monotonic() < until:
        await asyncio.sleep(min(60.0, max(0.1, until - time.monotonic())))
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        memory = next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        print(f"| {(time.monotonic() - began) / 60:.1f} | {memory:.0f} | {descriptors} |", flush=True)


async def run(port: int, pid: int, *, seconds: float, callers: int) -> None:
    """Load the service, then print the figures."""
    until, outcomes, stalls = time.monotonic() + seconds, Counter[str](), list[float]()
    async with (
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as watcher,
    ):
        print("| minutes | memory, MiB | descriptors |\n|---|---|---|", flush=True)
        await asyncio.gather(
            watch(watcher, until, stalls),
            sample(pid, until),
            *(act(client, port, until, outcomes) for _ in range(callers)),
        )
    print(json.dumps(dict(sorted(outcomes.items())), indent=1))
    ordered = sorted(stalls)
    print(f"/healthz: {len(stalls)} answers, median {ordered[len(ordered) // 2] * 1000:.1f} ms,", end=" ")
    print(f"p99 {ordered[len(ordered) * 99 // 100] * 1000:.0f} ms, longest {ordered[-1] * 1000:.0f} ms")


def main() -> None:
    """Start the emulator and the service, load them, and stop them."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--minutes", type=float, default=10)
    options.add_argument("--callers", type=int, default=20)
    options.add_argument("--port", type=int, default=18_080)
    chosen = options.parse_args()
    voicepass = [sys.executable, "-m", "voicepass"]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | SETTINGS | {"ELEVENLABS_BASE_URL": f"http://127.0.0.1:{chosen.port + 1}"}
        emulator = subprocess.Popen([*voicepass, "emulator", "--port", str(chosen.port + 1)], cwd=folder)
        with Path(folder, "log").open("w") as log:
            service = subprocess.Popen(
                [*voicepass, "serve", "--port", str(chosen.port)], cwd=folder, env=environment, stderr=log
            )
        try:
            wait_for(f"http://127.0.0.1:{chosen.port}/readyz")
            asyncio.run(run(chosen.port, service.pid, seconds=chosen.minutes * 60, callers=chosen.callers))
        finally:
            for process in (service, emulator):
                process.terminate()
                process.wait(timeout=30)


def wait_for(url: str) -> None:
    """Wait until the service is ready."""
    for _ in range(200):
        try:
            if httpx.get(url).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"{url} is not ready")


if __name__ == "__main__":
    main()
