"""A pytest plugin: the fixture `elevenlabs` is an emulator that listens on a loopback port for one test.

A package of its own, because pytest imports it in every run: the emulator and FastAPI are imported only when a test
asks for the fixture.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from elevenlabs_emulator import Emulator
    from elevenlabs_emulator.records import RecordedCall


@dataclass(frozen=True, kw_only=True)
class RunningEmulator:
    """An emulator that listens at `base_url`. Change `emulator` to set agents, faults or the clock."""

    base_url: str
    api_key: str
    agent_id: str
    emulator: Emulator

    @property
    def requests(self) -> list[RecordedCall]:
        """Return the REST calls that it received, without secrets."""
        return list(self.emulator.records.calls)


@pytest.fixture
def elevenlabs() -> Iterator[RunningEmulator]:
    """Run an emulated ElevenLabs with the agent `agent_demo`."""
    import uvicorn  # noqa: PLC0415 - see the module

    from elevenlabs_emulator import EmulatedAgent, Emulator, create_emulator  # noqa: PLC0415 - see the module

    emulator = Emulator(agents=[EmulatedAgent(agent_id="agent_demo")])
    config = uvicorn.Config(
        create_emulator(emulator), log_config=None, ws="websockets-sansio", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()  # the listener accepts connections already: a client waits until the server answers
        try:
            base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            yield RunningEmulator(base_url=base_url, api_key="sk_emulator", agent_id="agent_demo", emulator=emulator)
        finally:
            server.should_exit = True
            thread.join(timeout=10)
