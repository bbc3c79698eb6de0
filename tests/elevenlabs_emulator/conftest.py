from collections.abc import Iterator

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from elevenlabs_emulator import Emulator, create_emulator
from tests.elevenlabs_emulator.wire import AGENT, Serve, Service
from tests.servers import running
from voicepass.telemetry.logs import configure_logging


class _Stage:
    """The app behind the one server of a test run: whatever a test has put on it."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)


@pytest.fixture(scope="session")
def stage() -> Iterator[tuple[_Stage, str]]:
    stage = _Stage()
    configure_logging(log_format="console", level="error")  # or websockets would log, at DEBUG, what it is asked
    with running(lambda _url: stage) as url:
        yield stage, url


@pytest.fixture
def serve(stage: tuple[_Stage, str]) -> Iterator[Serve]:
    with httpx.Client(base_url=stage[1], trust_env=False) as http:

        def served(emulator: Emulator) -> Service:
            stage[0].app = create_emulator(emulator)
            return Service(emulator=emulator, url=stage[1], http=http)

        yield served


@pytest.fixture
def service(serve: Serve) -> Service:
    return serve(Emulator(agents=[AGENT]))
