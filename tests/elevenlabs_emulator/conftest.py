from collections.abc import Iterator

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from elevenlabs_emulator import Emulator, create_emulator
from tests.elevenlabs_emulator.contract import check_answer
from tests.elevenlabs_emulator.wire import AGENT, Serve, Service
from tests.servers import NO_CERTIFICATES, running
from voicepass.telemetry.logs import configure_logging


class _Stage:
    """The app of the one server of a test run. Each test sets `app`."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)


@pytest.fixture(scope="session")
def stage() -> Iterator[tuple[_Stage, str]]:
    stage = _Stage()
    configure_logging(log_format="console", level="error")  # otherwise websockets logs each request at DEBUG
    with running(lambda _url: stage) as url:
        yield stage, url


@pytest.fixture
def serve(stage: tuple[_Stage, str]) -> Iterator[Serve]:
    """Serves an emulator. Compares its answers with the vendor's models, unless a fault breaks them."""
    has_broken_answers = False

    def check(response: httpx.Response) -> None:
        nonlocal has_broken_answers
        request = response.request
        if request.url.path == "/_emulator/faults":
            has_broken_answers |= b'"body"' in request.content or b'"legacy"' in request.content
        if request.url.path.startswith("/v1/") and not has_broken_answers:
            check_answer(request.method, request.url.path, response.status_code, response.read().decode())

    hooks = {"response": [check]}
    with httpx.Client(base_url=stage[1], trust_env=False, verify=NO_CERTIFICATES, event_hooks=hooks) as http:

        def serve_emulator(emulator: Emulator) -> Service:
            stage[0].app = create_emulator(emulator)
            return Service(emulator=emulator, url=stage[1], http=http)

        yield serve_emulator


@pytest.fixture
def service(serve: Serve) -> Service:
    return serve(Emulator(agents=[AGENT]))
