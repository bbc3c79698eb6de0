"""`serve --admin-port` over real sockets: which port serves which route, and that no request avoids this split."""

import contextlib
import json
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.api.test_draining import is_closed
from tests.api.test_server import ask
from tests.cli.test_cli import ENVIRONMENT, run
from tests.conftest import settings_with
from tests.servers import free_port, running, started
from voicepass.api.server import UVICORN_OPTIONS
from voicepass.app import create_app

SERVICE_TOKEN = "canary-service-token-of-the-operator-5d1e"
SERVICE = {"Authorization": f"Bearer {SERVICE_TOKEN}"}
EVERYONE = {"kind": "everyone"}

PUBLIC_ANSWERS = {
    ("GET", "/metrics"): 404,
    ("HEAD", "/metrics"): 404,
    ("GET", "/v1/blocks"): 404,
    ("POST", "/v1/blocks"): 404,
    ("DELETE", "/v1/blocks"): 404,
    ("POST", "/v1/extensions"): 404,
    ("GET", "/v1/extensions"): 404,
    ("DELETE", "/v1/extensions"): 404,
    ("GET", "/healthz"): 200,
    ("GET", "/readyz"): 200,
    ("GET", "/v1/client.js"): 200,
    ("POST", "/v1/signed-url"): 401,
    ("GET", "/v1/usage"): 401,
    ("GET", "/v1/conversations/conv_1"): 404,  # the service token is valid; this conversation was never issued
}
ADMIN_ANSWERS = {
    ("GET", "/metrics"): 200,
    ("GET", "/v1/blocks"): 405,
    ("POST", "/v1/blocks"): 204,
    ("DELETE", "/v1/blocks"): 204,
    ("POST", "/v1/extensions"): 422,  # this table sends it no body
    ("GET", "/v1/extensions"): 200,
    ("DELETE", "/v1/extensions"): 422,
    ("GET", "/healthz"): 200,
    ("GET", "/readyz"): 200,
    ("GET", "/v1/client.js"): 404,
    ("POST", "/v1/signed-url"): 404,
    ("GET", "/v1/usage"): 404,
    ("GET", "/v1/conversations/conv_1"): 404,
    ("GET", "/"): 404,
}

# Requests to the public port that pretend to be for the admin port. {admin} is the number of the admin port.
FORGED = {
    "the Host": "GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:{admin}\r\n",
    "the headers of a proxy": (
        "GET /metrics HTTP/1.1\r\nHost: a\r\nX-Forwarded-Host: 127.0.0.1:{admin}\r\nX-Forwarded-Port: {admin}\r\n"
        "X-Forwarded-Server: 127.0.0.1:{admin}\r\nForwarded: for=127.0.0.1;host=127.0.0.1:{admin}\r\n"
    ),
    "the target": "GET http://127.0.0.1:{admin}/metrics HTTP/1.1\r\nHost: 127.0.0.1:{admin}\r\n",
    "a line feed after the path": "GET /metrics%0A HTTP/1.1\r\nHost: a\r\n",
    "an escaped letter": "GET /%6Detrics HTTP/1.1\r\nHost: a\r\n",
    "two slashes": "GET //metrics HTTP/1.1\r\nHost: a\r\n",
    "a slash at the end": "GET /metrics/ HTTP/1.1\r\nHost: a\r\n",
    "a path with dots": "GET /healthz/../metrics HTTP/1.1\r\nHost: a\r\n",
    "a query": "GET /metrics?x HTTP/1.1\r\nHost: a\r\n",
    "HTTP/1.0 without a Host": "GET /metrics HTTP/1.0\r\n",
    "a block": (
        f"POST /v1/blocks HTTP/1.1\r\nHost: 127.0.0.1:{{admin}}\r\nAuthorization: Bearer {SERVICE_TOKEN}\r\n"
        "Content-Type: application/json\r\nContent-Length: 19\r\n"
    ),
    "a block with a line feed after the path": (
        f"POST /v1/blocks%0A HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {SERVICE_TOKEN}\r\n"
        "Content-Type: application/json\r\nContent-Length: 19\r\n"
    ),
}


@dataclass(frozen=True)
class Ports:
    """The two ports of one service on 127.0.0.1."""

    public: int
    admin: int


@pytest.fixture(scope="module")
def ports() -> Iterator[Ports]:
    """One service on two ports, in this process."""
    settings = settings_with(voicepass_service_tokens=SERVICE_TOKEN)
    with socket.socket() as admin:
        admin.bind(("127.0.0.1", 0))
        admin_port = admin.getsockname()[1]
        with running(
            lambda _url: create_app(settings, admin_port=admin_port),
            more_sockets=[admin],
            **UVICORN_OPTIONS,
        ) as url:
            yield Ports(public=int(url.rpartition(":")[2]), admin=admin_port)


def fetch_statuses(port: int, routes: dict[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=SERVICE, trust_env=False) as client:
        return {
            (method, path): client.request(method, path, json=EVERYONE if path == "/v1/blocks" else None).status_code
            for method, path in routes
        }


def test_the_public_port_serves_everything_but_metrics_and_blocks(ports: Ports) -> None:
    assert fetch_statuses(ports.public, PUBLIC_ANSWERS) == PUBLIC_ANSWERS


def test_the_admin_port_serves_metrics_blocks_and_probes_and_nothing_else(ports: Ports) -> None:
    assert fetch_statuses(ports.admin, ADMIN_ANSWERS) == ADMIN_ANSWERS


def test_blocks_still_need_a_service_token_on_the_admin_port(ports: Ports) -> None:
    answer = httpx.post(f"http://127.0.0.1:{ports.admin}/v1/blocks", json=EVERYONE, trust_env=False)

    assert (answer.status_code, answer.json()["code"]) == (401, "token_missing")


def test_an_admin_route_on_the_public_port_is_refused_like_a_path_that_does_not_exist(ports: Ports) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{ports.public}", trust_env=False) as client:
        hidden, unknown = client.get("/metrics"), client.get("/nothing")

    assert remove_request_id(hidden) == remove_request_id(unknown)
    assert set(hidden.headers) == set(unknown.headers)
    assert (hidden.status_code, hidden.json()["code"]) == (404, "not_found")


def remove_request_id(answer: httpx.Response) -> dict[str, object]:
    return {name: value for name, value in answer.json().items() if name != "request_id"}


@pytest.mark.parametrize("what", FORGED)
def test_a_request_to_the_public_port_cannot_claim_the_admin_port(ports: Ports, what: str) -> None:
    request = FORGED[what].format(admin=ports.admin).encode() + b"Connection: close\r\n\r\n"
    body = json.dumps(EVERYONE, separators=(",", ":")).encode() if "POST" in FORGED[what] else b""

    (answer,) = ask(("127.0.0.1", ports.public), request + body)

    assert str(answer) == "404 not_found"


@pytest.mark.parametrize("what", ["a line feed after the path", "an escaped letter", "a query"])
def test_on_the_admin_port_these_spellings_of_the_path_reach_the_metrics(ports: Ports, what: str) -> None:
    request = FORGED[what].encode() + b"Connection: close\r\n\r\n"

    (answer,) = ask(("127.0.0.1", ports.admin), request)

    assert answer.status == 200
    assert b"voicepass_ledger_up" in answer.body


@pytest.mark.parametrize("server", [None, ("/run/voicepass.sock", None), "absent"])
@pytest.mark.anyio
async def test_a_request_whose_port_is_unknown_is_public(server: tuple[str, None] | str | None) -> None:
    app = create_app(settings_with(voicepass_service_tokens=SERVICE_TOKEN), admin_port=8001)

    async def without_port(scope: Scope, receive: Receive, send: Send) -> None:
        if server == "absent":
            del scope["server"]
        else:
            scope["server"] = server
        await app(scope, receive, send)

    async with app.router.lifespan_context(app):
        codes = {path: await fetch_status(without_port, path) for path in ("/metrics", "/healthz")}
        on_admin_port = await fetch_status(app, "/metrics")

    assert codes == {"/metrics": 404, "/healthz": 200}
    assert on_admin_port == 200


async def fetch_status(app: ASGIApp, path: str) -> int:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://a:8001") as client:
        return (await client.get(path)).status_code


def test_serve_refuses_one_port_for_both_and_one_that_is_in_use(tmp_path: Path) -> None:
    port = str(free_port())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        in_use = str(taken.getsockname()[1])

        same = run("serve", "--port", port, "--admin-port", port, cwd=tmp_path)
        other = run("serve", "--port", port, "--admin-port", in_use, cwd=tmp_path)

    assert (same.returncode, same.stderr) == (1, f"--admin-port and --port are both {port}: choose two ports\n")
    assert other.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {in_use}" in other.stderr
    assert "choose another with --admin-port" in other.stderr


@contextlib.contextmanager
def serve_two_ports(tmp_path: Path, *, workers: int, drain_seconds: int) -> Iterator[tuple[Ports, int]]:
    """Run the real command. Once it listens, yield its ports and the id of the process that handles signals."""
    ports = Ports(public=free_port(), admin=free_port())
    options = {"--port": ports.public, "--admin-port": ports.admin, "--workers": workers}
    command = [sys.executable, "-m", "voicepass", "serve", *(str(part) for pair in options.items() for part in pair)]
    environment = ENVIRONMENT | {
        "VOICEPASS_DRAIN_SECONDS": str(drain_seconds),
        "VOICEPASS_SERVICE_TOKENS": SERVICE_TOKEN,
    }
    with started(command, cwd=tmp_path, environment=environment) as log, open_client() as client:
        for port in (ports.public, ports.admin):
            while is_closed(client, url_of(port)):  # it does not listen yet
                pass
        while not (found := re.search(r"Started (?:parent|server) process \[(\d+)\]", "".join(log))):
            pass
        yield ports, int(found[1])


def open_client() -> httpx.Client:
    """A client that opens a connection for each request."""
    return httpx.Client(trust_env=False, timeout=30, limits=httpx.Limits(max_keepalive_connections=0))


def url_of(port: int) -> str:
    return f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def open_request(port: int, path: str, body: dict[str, str]) -> Iterator[Callable[[], str]]:
    """Send a request without the last byte of its body. Yield a function that sends it and returns the status."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {SERVICE_TOKEN}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=20) as peer:
        peer.sendall(head.encode() + content[:-1])

        def finish() -> str:
            peer.sendall(content[-1:])
            return peer.recv(65_536).decode().partition("\r\n")[0].split(" ")[1]

        yield finish


@pytest.mark.long
@pytest.mark.alone
def test_on_sigterm_both_ports_close_and_open_requests_on_both_are_answered(tmp_path: Path) -> None:
    with (
        serve_two_ports(tmp_path, workers=1, drain_seconds=0) as (ports, pid),
        open_client() as client,
        open_request(ports.public, "/v1/signed-url", {"agent": "default"}) as finish_on_public,
        open_request(ports.admin, "/v1/blocks", {"kind": "user", "key": "u-2"}) as finish_on_admin,
    ):
        before = [client.get(f"{url_of(port)}/metrics").status_code for port in (ports.public, ports.admin)]

        os.kill(pid, signal.SIGTERM)
        for port in (ports.public, ports.admin):
            while not is_closed(client, url_of(port)):
                pass
        statuses = [finish_on_public(), finish_on_admin()]

    assert before == [404, 200]
    assert statuses == ["401", "204"], "a service token is no user token"


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.alone
def test_while_the_service_drains_both_ports_are_not_ready_and_still_serve(tmp_path: Path, workers: int) -> None:
    with open_client() as client:
        with (
            serve_two_ports(tmp_path, workers=workers, drain_seconds=2) as (ports, pid),
            open_request(ports.public, "/v1/signed-url", {"agent": "default"}) as finish_on_public,
            open_request(ports.admin, "/v1/blocks", {"kind": "user", "key": "u-2"}) as finish_on_admin,
        ):
            urls = [url_of(port) for port in (ports.public, ports.admin)]
            before = [client.get(f"{url}/metrics").status_code for url in urls * 10]

            os.kill(pid, signal.SIGTERM)
            during = [wait_until_not_ready(client, url) for url in urls]
            metrics = [client.get(f"{url}/metrics").status_code for url in urls]
            statuses = [finish_on_public(), finish_on_admin()]
        after = [is_closed(client, url) for url in urls]

    assert before == [404, 200] * 10
    assert during == ["shutting_down", "shutting_down"]
    assert metrics == [404, 200]
    assert statuses == ["401", "204"]
    assert after == [True, True]


def wait_until_not_ready(client: httpx.Client, url: str) -> str:
    while (ready := client.get(f"{url}/readyz")).status_code == 200:
        pass
    code: str = ready.json()["code"]
    return code
