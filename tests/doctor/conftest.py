"""A service with an emulated ElevenLabs in any state. The doctor must name what is broken in it."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from elevenlabs_emulator import EmulatedAgent, Emulator, Fault
from tests.canaries import API_KEY
from tests.conftest import UNLIMITED, policy_file, settings_with
from tests.elevenlabs_emulator.conftest import serve, stage  # noqa: F401 - fixtures
from tests.elevenlabs_emulator.wire import Serve
from voicepass.config.build import configure, open_ledger
from voicepass.doctor import examine
from voicepass.doctor.findings import Case, Finding

AGENT_ID = "agent_market"
ALL_PERMISSIONS = ("convai_write", "convai_read", "webhooks_write")
WEBHOOK_SECRET = "wsec_canary_0123456789"


# By default, a new agent waits forever in silence, and queues callers.
SOUND_AGENT = {
    "conversation_config.turn.silence_end_call_timeout": 60,
    "platform_settings.queueing_config.enabled": False,
}


class ConfiguredAgent(EmulatedAgent):
    """An emulated agent, by default a correct one. `at` sets any setting of the vendor's model by its dotted path."""

    at: Mapping[str, Any] = {}

    def as_json(self) -> dict[str, object]:
        """Return the agent with these settings."""
        shown: dict[str, object] = super().as_json()
        for path, value in (SOUND_AGENT | dict(self.at)).items():
            *sections, name = path.split(".")
            node: Any = shown
            for section in sections:
                node = node.setdefault(section, {})
            node[name] = value
        return shown


@dataclass(frozen=True, kw_only=True)
class State:
    """The differences from a correct service."""

    agent: Mapping[str, Any] = field(default_factory=dict)
    permissions: tuple[str, ...] = ALL_PERMISSIONS
    api_key: str = API_KEY
    webhook: Mapping[str, Any] = field(default_factory=dict)
    fault: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    rules: str = 'allow = "everyone"\n'
    """The policy file's lines after the agent's id."""
    frontend: Mapping[str, Any] = field(default_factory=dict)
    """Options of the doctor: the agent's alias, and the overrides and the origin of the frontend."""


Examine = Callable[[State], list[Finding]]


@pytest.fixture(scope="session")
def ledger_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("ledger") / "voicepass.db"
    settings = settings_with(voicepass_database_url=f"sqlite:///{path}")

    async def make() -> None:
        async with open_ledger(settings, clock=time.time):
            pass

    asyncio.run(make())
    return settings.voicepass_database_url


def build_emulator(state: State) -> Emulator:
    """Build the emulated ElevenLabs of this state."""
    return Emulator(
        agents=[ConfiguredAgent(**{"agent_id": AGENT_ID} | dict(state.agent))],
        api_keys={API_KEY: frozenset(state.permissions)},
        faults=[Fault(**state.fault)] if state.fault else [],
    )


@pytest.fixture
def examine_state(serve: Serve, ledger_url: str) -> Examine:  # noqa: F811
    def build_and_examine(state: State) -> list[Finding]:
        emulator = build_emulator(state)
        url = serve(emulator).url
        emulator.webhooks.url = f"{url}/v1/webhooks/elevenlabs"
        for name, value in state.webhook.items():
            setattr(emulator.webhooks, name, value)
        alias = state.frontend.get("alias", "default")
        agents = f'[agents.{alias}]\nid = "{AGENT_ID}"\n{state.rules}'
        values = {
            "elevenlabs_api_key": SecretStr(state.api_key),
            "elevenlabs_agent_id": None,
            "elevenlabs_base_url": url,
            "elevenlabs_webhook_secret": SecretStr(WEBHOOK_SECRET),
            "voicepass_database_url": ledger_url,
            "voicepass_policy_file": policy_file(agents if "[limits" in agents else agents + UNLIMITED),
        }
        settings = settings_with(**(values | dict(state.settings)))
        case = Case(
            settings=settings,
            configuration=configure(settings),
            watch_seconds=0,
            **{"regions": {"here": url}, "alias": alias} | dict(state.frontend),
        )
        return asyncio.run(examine(case))

    return build_and_examine


def list_troubles(findings: list[Finding]) -> list[tuple[str, str]]:
    """Return the check and the cause of each finding that has a cause."""
    return [(finding.check, finding.cause) for finding in findings if finding.cause]
