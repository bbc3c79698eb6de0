"""Agents, tools and the webhook: the official SDK reads them, and control routes change them."""

import pytest
from elevenlabs import ElevenLabs
from elevenlabs.core.api_error import ApiError

from elevenlabs_emulator import EmulatedAgent, Emulator
from tests.elevenlabs_emulator.wire import (
    AGENT,
    JS_VOICE_INITIATION,
    KEY,
    Serve,
    Service,
    open_conversation,
    parameters,
)

EVERYTHING = {
    "requires_auth": True,
    "allowed_hosts": {"shop.example"},
    "requires_origin": True,
    "allowed_overrides": {"agent.prompt.prompt"},
    "languages": {"de"},
    "tool_variables": {"item", "size"},
    "is_archived": True,
    "is_shareable": True,
    "max_duration_seconds": 90,
    "concurrency_limit": 3,
    "daily_limit": 7,
    "bursting": False,
    "webhook_id": "wh_own",
}


@pytest.fixture
def sdk(serve: Serve) -> tuple[ElevenLabs, Service]:
    agent = EmulatedAgent.model_validate(EVERYTHING | {"agent_id": AGENT.agent_id})
    keys = {KEY: frozenset({"convai_write", "convai_read", "webhooks_write"}), "sk_writer": frozenset({"convai_write"})}
    service = serve(Emulator(agents=[agent], api_keys=keys, webhook_url="http://127.0.0.1:1/hook"))
    return ElevenLabs(api_key=KEY, base_url=service.url, httpx_client=service.http), service


def test_the_official_sdk_reads_every_setting_of_an_agent(sdk: tuple[ElevenLabs, Service]) -> None:
    agent = sdk[0].conversational_ai.agents.get(AGENT.agent_id)

    platform, conversation = agent.platform_settings, agent.conversation_config.conversation
    assert platform
    assert platform.auth
    assert platform.overrides
    assert platform.call_limits
    assert platform.workspace_overrides
    assert platform.workspace_overrides.webhooks
    assert conversation
    assert (platform.archived, platform.auth.enable_auth, platform.auth.require_origin_header) == (True, True, True)
    assert [entry.hostname for entry in platform.auth.allowlist or []] == ["shop.example"]
    assert platform.auth.shareable_token
    allowed = platform.overrides.conversation_config_override
    assert allowed
    assert allowed.agent
    assert allowed.agent.prompt
    assert allowed.conversation
    assert (allowed.agent.prompt.prompt, allowed.conversation.text_only) == (True, False)
    limits = platform.call_limits
    assert (limits.agent_concurrency_limit, limits.daily_limit, limits.bursting_enabled) == (3, 7, False)
    assert platform.workspace_overrides.webhooks.post_call_webhook_id == "wh_own"
    assert conversation.max_duration_seconds == 90
    assert set(agent.conversation_config.language_presets or {}) == {"de"}


def test_the_official_sdk_reads_the_tool_and_the_webhook(sdk: tuple[ElevenLabs, Service]) -> None:
    client = sdk[0]
    agent = client.conversational_ai.agents.get(AGENT.agent_id).conversation_config.agent
    assert agent
    assert agent.prompt

    (tool_id,) = agent.prompt.tool_ids or []
    tool = client.conversational_ai.tools.get(tool_id).model_dump_json()
    (webhook,) = client.webhooks.list().webhooks
    settings = client.conversational_ai.settings.get()

    assert '"url":"https://shop.example/{{item}}"' in tool
    assert '"dynamic_variable":"size"' in tool
    assert (webhook.webhook_url, webhook.auth_type, webhook.is_disabled) == ("http://127.0.0.1:1/hook", "hmac", False)
    assert settings.webhooks
    assert settings.webhooks.post_call_webhook_id == webhook.webhook_id


def test_the_widget_gets_settings_without_a_key_but_for_a_private_agent_needs_a_signature(serve: Serve) -> None:
    public = EmulatedAgent(agent_id="agent_public", requires_auth=False)
    service = serve(Emulator(agents=[AGENT, public]))
    private_path = f"/v1/convai/agents/{AGENT.agent_id}/widget"

    settings = service.http.get("/v1/convai/agents/agent_public/widget").json()
    refused = service.http.get(private_path)
    signature = parameters(service.mint())["conversation_signature"]
    admitted = service.http.get(private_path, params={"conversation_signature": signature})

    assert settings["widget_config"]["first_message"] == public.first_message
    assert (refused.status_code, admitted.status_code) == (401, 200)


def test_a_call_without_the_permission_that_it_needs_is_refused(sdk: tuple[ElevenLabs, Service]) -> None:
    client = ElevenLabs(api_key="sk_writer", base_url=sdk[1].url, httpx_client=sdk[1].http)

    for read in (lambda: client.conversational_ai.agents.get(AGENT.agent_id), client.webhooks.list):
        with pytest.raises(ApiError) as refused:
            read()
        assert refused.value.status_code == 401
        assert refused.value.body["detail"]["status"] == "missing_permissions"


def test_keys_and_the_webhook_can_be_changed_by_http(sdk: tuple[ElevenLabs, Service]) -> None:
    client, service = sdk

    keys = service.http.put("/_emulator/keys", json={KEY: ["webhooks_write"]})
    changed = {"url": "http://127.0.0.1:1/other", "is_disabled": True, "secret": "wsec_another"}
    webhook = service.http.put("/_emulator/webhook", json=changed)
    misspelt = service.http.put("/_emulator/webhook", json={"uri": "http://127.0.0.1:1/other"})

    assert (keys.status_code, webhook.status_code, misspelt.status_code) == (204, 204, 422)
    assert service.emulator.webhooks.secret == "wsec_another"
    (shown,) = client.webhooks.list().webhooks
    assert (shown.webhook_url, shown.is_disabled) == ("http://127.0.0.1:1/other", True)
    with pytest.raises(ApiError, match="missing the permission convai_read"):
        client.conversational_ai.agents.get(AGENT.agent_id)


@pytest.mark.parametrize(
    ("settings", "override", "reason"),
    [
        ({"languages": {"de"}}, {"agent": {"language": "de"}}, None),
        ({}, {"agent": {"language": "de"}}, "Language 'de' is not supported by this agent"),
        ({"prompt": "{{shop}}"}, {}, "Missing required dynamic variables in prompt: {'shop'}"),
        ({"prompt": "{{system__time}}"}, {}, None),
    ],
)
def test_languages_and_the_prompts_variables_are_checked(
    serve: Serve, settings: dict[str, object], override: dict[str, object], reason: str | None
) -> None:
    values = {"agent_id": AGENT.agent_id, "allowed_overrides": {"agent.language"}} | settings
    service = serve(Emulator(agents=[EmulatedAgent.model_validate(values)]))

    with open_conversation(service.mint(), JS_VOICE_INITIATION | {"conversation_config_override": override}) as talk:
        if reason is None:
            assert "Hello Ada" in talk.read_answer()
        else:
            assert talk.read_close() == (1008, reason)


def test_a_client_without_an_origin_is_refused_if_one_is_required(serve: Serve) -> None:
    values = {"agent_id": AGENT.agent_id, "allowed_hosts": {"shop.example"}, "requires_origin": True}
    service = serve(Emulator(agents=[EmulatedAgent.model_validate(values)]))

    with open_conversation(service.mint()) as nobody:
        refused = nobody.read_close()
    with open_conversation(service.mint(), origin="https://shop.example") as page:
        greeting = page.read_answer()

    assert refused[0] == 3000
    assert greeting.startswith("Hello Ada")
