"""The real nginx and Caddy with the files of `deploy/`: which routes they publish, and restarts behind them."""

import asyncio
import os
import re
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tests.conftest import UNLIMITED, MakeToken, settings_with
from tests.ledger.given import Engine, TurnedClock
from tests.ledger.test_instances import elevenlabs as elevenlabs  # noqa: PLC0414 - a fixture, used by its name
from tests.ledger.test_instances import environment
from tests.ledger.test_rolling import Instance
from tests.servers import free_port, running
from voicepass.app import create_app

pytestmark = [pytest.mark.anyio, pytest.mark.long, pytest.mark.alone]

DEPLOY = Path(__file__).parents[1] / "deploy"
PUBLIC = {
    "/healthz",
    "/v1/signed-url",
    "/v1/conversation-token",
    "/v1/usage",
    "/v1/client.js",
    "/v1/client.d.ts",
    "/v1/webhooks/elevenlabs",
}
DISGUISED = (
    "/v1/usage/../blocks",
    "//metrics",
    "/%6detrics",
    "/v1//blocks",
    "/v1/signed-url/../../metrics",
    "/v1/USAGE/",
)


def require(program: str) -> str:
    found = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")
    if found is None:
        if "REQUIRE_PROXIES" in os.environ:
            pytest.fail(f"{program} is not installed")
        pytest.skip(f"{program} is not installed (Debian: apt-get install {program})")
    return found


def write_nginx(folder: Path, port: int, upstreams: Sequence[str]) -> list[str]:
    """Write the site's file with other ports and a new certificate; return the command that runs nginx."""
    certificate, key = folder / "voicepass.pem", folder / "voicepass.key"
    subject = ["-subj", "/CN=voicepass.example", "-days", "1", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    openssl = ["openssl", "req", "-x509", "-nodes", *subject, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(openssl, check=True, capture_output=True)
    site = (DEPLOY / "nginx.conf").read_text()
    changes = {
        "listen 443": f"listen 127.0.0.1:{port}",
        "/etc/ssl/certs/voicepass.pem": str(certificate),
        "/etc/ssl/private/voicepass.key": str(key),
        "127.0.0.1:8001": upstreams[0],
        "127.0.0.1:8002": upstreams[1],
    }
    for old, new in changes.items():
        assert old in site
        site = site.replace(old, new)
    (folder / "site.conf").write_text(site)
    temporary = "".join(
        f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.getuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"{user}\ndaemon off;\nmaster_process on;\npid {folder}/pid;\nerror_log {folder}/errors;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{temporary}include {folder}/site.conf;\n}}\n"
    )
    return [require("nginx"), "-c", str(folder / "nginx.conf"), "-p", str(folder), "-e", str(folder / "errors")]


def write_caddy(folder: Path, port: int, upstreams: Sequence[str]) -> list[str]:
    site = (DEPLOY / "Caddyfile").read_text()
    changes = {
        "\nvoicepass.example {": f"\nhttp://127.0.0.1:{port}, http://voicepass.example:{port} {{",
        "127.0.0.1:8001": upstreams[0],
        "127.0.0.1:8002": upstreams[1],
    }
    for old, new in changes.items():
        assert old in site
        site = site.replace(old, new)
    (folder / "Caddyfile").write_text(f"{{\n\tadmin off\n}}\n{site}")
    return [require("caddy"), "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]


WRITERS = {"nginx": write_nginx, "caddy": write_caddy}


@contextmanager
def run_proxy(name: str, folder: Path, upstreams: Sequence[str]) -> Iterator[str]:
    """Run the proxy in front of these addresses until the block ends; yields its URL."""
    port = free_port()
    command = WRITERS[name](folder, port, upstreams)
    environment = os.environ | {"HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        for _ in range(300):
            assert process.poll() is None, (folder / "output").read_text()
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield f"{'https' if name == 'nginx' else 'http'}://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=20)


async def show_request(request: Request) -> JSONResponse:
    await request.body()
    return JSONResponse({"path": request.url.path, "headers": dict(request.headers)})


@pytest.mark.parametrize("name", WRITERS)
async def test_a_proxy_publishes_only_the_public_routes_and_replaces_forged_headers(name: str, tmp_path: Path) -> None:
    methods = ["GET", "POST"]
    service = create_app(settings_with(voicepass_docs=True))
    every_path = {re.sub(r"\{\w+\}", "conv_1", route.path) for route in service.routes if isinstance(route, Route)}
    forged = {"X-Forwarded-For": "198.51.100.7", "X-Request-ID": "forged", "X-Forwarded-Proto": "gopher"}

    with running(lambda _url: Starlette(routes=[Route("/{path:path}", show_request, methods=methods)])) as upstream:
        address = upstream.removeprefix("http://")
        with run_proxy(name, tmp_path, [address, address]) as url:
            async with httpx.AsyncClient(verify=False, trust_env=False, base_url=url) as client:  # noqa: S501 - a certificate of the test
                answers = {path: await client.get(path) for path in every_path}
                disguised = [await client.get(httpx.URL(url, raw_path=path.encode())) for path in DISGUISED]
                webhook = await client.post("/v1/webhooks/elevenlabs", content=b"x" * 1_000_000)
                seen = (await client.get("/v1/usage", headers=forged)).json()["headers"]

    assert every_path > PUBLIC
    assert {path for path, answer in answers.items() if answer.status_code == 200} == PUBLIC
    assert {answer.status_code for path, answer in answers.items() if path not in PUBLIC} == {404}
    assert not {answer.json()["path"] for answer in disguised if answer.status_code == 200} - PUBLIC
    assert webhook.status_code == 200
    assert seen["x-forwarded-for"] == "127.0.0.1"
    assert "forged" not in seen["x-request-id"]
    assert seen["x-forwarded-proto"] == url.partition(":")[0]


@pytest.mark.parametrize("name", WRITERS)
async def test_no_request_fails_while_the_instances_behind_a_proxy_restart_in_turn(
    name: str, elevenlabs: str, make_token: MakeToken, tmp_path: Path
) -> None:
    engine = Engine("sqlite", str(tmp_path / "ledger.db"), TurnedClock())
    user = {"Authorization": f"Bearer {make_token()}"}
    served = [Instance(tmp_path, environment(elevenlabs, engine, UNLIMITED)) for _ in range(2)]
    answers: Counter[int] = Counter()
    is_done = asyncio.Event()

    async def call(client: httpx.AsyncClient) -> None:
        while not is_done.is_set():
            answers[(await client.post("/v1/signed-url", headers=user)).status_code] += 1
            await asyncio.sleep(0.05)

    async def restart(instance: Instance) -> None:
        await instance.end()
        instance.is_ready = False
        instance.start()
        await instance.wait_until_ready()

    async with httpx.AsyncClient(trust_env=False, timeout=1) as probing:
        probes = [asyncio.create_task(instance.probe(probing)) for instance in served]
        try:
            for instance in served:
                instance.start()
                await instance.wait_until_ready()
            upstreams = [instance.url.removeprefix("http://") for instance in served]
            with run_proxy(name, tmp_path, upstreams) as url:
                async with httpx.AsyncClient(verify=False, trust_env=False, base_url=url, timeout=30) as client:  # noqa: S501
                    callers = [asyncio.create_task(call(client)) for _ in range(8)]
                    for instance in served:
                        await restart(instance)
                    is_done.set()
                    await asyncio.gather(*callers)
        finally:
            for task in probes:
                task.cancel()
            for instance in served:
                instance.kill()

    print(f"{name}: answers {dict(answers)}")
    assert answers.keys() == {200}
