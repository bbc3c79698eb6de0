from collections.abc import Iterator

import httpx
import pytest

from tests.emulator.wire import AGENT, Serve, Service, Stage
from tests.servers import running
from voicepass.emulator import Emulator, create_emulator


@pytest.fixture(scope="session")
def stage() -> Stage:
    return Stage()


@pytest.fixture(scope="session")
def base_url(stage: Stage) -> Iterator[str]:
    with running(lambda _: stage) as url:
        yield url


@pytest.fixture
def serve(stage: Stage, base_url: str) -> Iterator[Serve]:
    with httpx.Client(base_url=base_url) as http:

        def served(emulator: Emulator) -> Service:
            stage.app = create_emulator(emulator)
            return Service(emulator=emulator, url=base_url, http=http)

        yield served


@pytest.fixture
def service(serve: Serve) -> Service:
    return serve(Emulator(agents=[AGENT]))
