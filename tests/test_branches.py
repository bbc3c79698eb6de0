"""Two aliases of one agent, each with its own branch and environment: voicepass never mixes them up."""

import asyncio

import pytest
from pydantic import SecretStr

from elevenlabs_emulator import EmulatedAgent, Emulator
from tests.conftest import UNLIMITED, ServiceClient, policy_file, serving
from tests.elevenlabs_emulator.conftest import serve, stage  # noqa: F401 - fixtures
from tests.elevenlabs_emulator.wire import KEY, Serve, Service, open_conversation

pytestmark = pytest.mark.anyio

AGENT_ID = "agent_market"
AGENTS = f"""
[agents.default]
id = "{AGENT_ID}"
allow = "everyone"

[agents.staged]
id = "{AGENT_ID}"
allow = "everyone"
branch_id = "agtbrch_b"
version_id = "agtvrsn_v"
environment = "staging"
"""
GREETINGS = {"default": "This is the main branch.", "staged": "This is the branch."}


@pytest.fixture
def elevenlabs(serve: Serve) -> Service:  # noqa: F811
    agent = {
        "agent_id": AGENT_ID,
        "first_message": GREETINGS["default"],
        "branches": {"agtbrch_b": {"agent_id": AGENT_ID, "first_message": GREETINGS["staged"]}},
        "versions": {"agtvrsn_v"},
        "environments": {"production", "staging"},
    }
    return serve(Emulator(agents=[EmulatedAgent.model_validate(agent)]))


def settings(elevenlabs: Service, limits: str = UNLIMITED, **more: object) -> dict[str, object]:
    return {
        "elevenlabs_base_url": elevenlabs.url,
        "elevenlabs_api_key": SecretStr(KEY),
        "elevenlabs_agent_id": None,
        "voicepass_policy_file": policy_file(AGENTS + limits),
        **more,
    }


async def ask(api: ServiceClient, bearer: dict[str, str], alias: str) -> tuple[int, str]:
    answer = await api.post("/v1/signed-url", headers=bearer, json={"agent": alias})
    return answer.status_code, answer.json().get("signed_url", "")


def greet(url: str) -> str:
    with open_conversation(url) as talk:
        return talk.read_answer()


@pytest.mark.parametrize("warm_passes", [0, 4])
async def test_each_url_opens_the_branch_of_its_alias(
    elevenlabs: Service, bearer: dict[str, str], warm_passes: int
) -> None:
    async with serving(**settings(elevenlabs, voicepass_warm_passes=warm_passes)) as api:
        aliases = ["default", "staged"] * 3
        urls = [(await ask(api, bearer, alias))[1] for alias in aliases]

    assert [await asyncio.to_thread(greet, url) for url in urls] == [GREETINGS[alias] for alias in aliases]


async def test_a_conversation_token_is_asked_for_with_the_same_names(
    elevenlabs: Service, bearer: dict[str, str]
) -> None:
    async with serving(**settings(elevenlabs)) as api:
        for alias in GREETINGS:
            await api.post("/v1/conversation-token", headers=bearer, json={"agent": alias})

    selected = {"branch_id": "agtbrch_b", "version_id": "agtvrsn_v", "environment": "staging"}
    assert [call.query for call in elevenlabs.emulator.records.calls] == [
        {"agent_id": AGENT_ID},
        {"agent_id": AGENT_ID, **selected},
    ]


async def test_an_unopened_pass_is_returned_again_for_its_own_alias_only(
    elevenlabs: Service, bearer: dict[str, str]
) -> None:
    limits = UNLIMITED.replace('open_conversations = "off"', "open_conversations = 1")
    async with serving(**settings(elevenlabs, limits)) as api:
        first = await ask(api, bearer, "default")
        other = await ask(api, bearer, "staged")
        again = await ask(api, bearer, "default")

    assert (first[0], other) == (200, (429, ""))
    assert again == first
