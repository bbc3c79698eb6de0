"""An emulated ElevenLabs for the processes that this folder's tests start."""

from collections.abc import Iterator

import pytest

from elevenlabs_emulator import EmulatedAgent, Emulator, create_emulator
from tests.canaries import API_KEY
from tests.servers import running


@pytest.fixture(scope="module")
def elevenlabs() -> Iterator[str]:
    """The base URL of an emulator that accepts the service's key."""
    emulator = Emulator(agents=[EmulatedAgent(agent_id="agent_demo")], api_keys={API_KEY: frozenset({"convai_write"})})
    with running(lambda _url: create_emulator(emulator)) as url:
        yield url
