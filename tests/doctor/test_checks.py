"""Each check finds what is broken, and nothing in a correct service."""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.routing import Mount
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as serve_socket
from websockets.typing import Subprotocol

from elevenlabs_emulator import CLOSINGS, EmulatedAgent, Emulator, create_emulator
from tests.canaries import API_KEY, SIGNATURE, secrets_in
from tests.conftest import settings_with
from tests.doctor.conftest import AGENT_ID, ConfiguredAgent, Examine, State, build_emulator, list_troubles
from tests.ledger.given import rows
from tests.servers import free_port
from tests.tables import table
from voicepass.config.build import configure
from voicepass.doctor import examine
from voicepass.doctor.conversation import try_conversation
from voicepass.doctor.findings import AGENT_CHECKS, CAUSES, CHECKS, Case, Finding
from voicepass.doctor.workspace import check_workspace
from voicepass.elevenlabs import REGIONS, ElevenLabs
from voicepass.elevenlabs.codes import Outcome
from voicepass.errors import AgentUnknown
from voicepass.ledger.sqlite import open_sqlite
from voicepass.model import Agent

CORRECT = State()
NO_KEYS = {
    "voicepass_jwt_algorithm": "RS256",
    "voicepass_jwt_secret": None,
    "voicepass_jwks_url": "http://127.0.0.1:1/jwks",
}
SHOP = "https://shop.example"
SHOPPING = State(settings={"voicepass_allowed_origins": [SHOP]}, frontend={"origin": SHOP})
NO_WEBHOOK = {"elevenlabs_webhook_secret": None}
KLINGON = {"overrides": {"agent.language": "tlh"}}
LIMITED = 'allow = "everyone"\n[limits.agent]\nopen_conversations = 5\npasses_per_day = 50\n'


def agent(**settings: object) -> State:
    return State(agent=settings)


def with_own_webhook(**settings: object) -> State:
    """Return a state whose agent has its own post-call webhook with these settings."""
    own = {"post_call_webhook_id": "wh_emulated", "events": ["transcript"]} | settings
    return agent(at={"platform_settings.workspace_overrides.webhooks": own})


def on_branch(selection: str) -> str:
    return f'allow = "everyone"\n{selection}\n'


BRANCHED = {
    "branches": {"agtbrch_b": ConfiguredAgent(agent_id=AGENT_ID, is_archived=True)},
    "environments": {"staging"},
}
OPEN = {
    "override_open_prompt": "conversation_config_override.agent.prompt.prompt",
    "override_open_llm": "conversation_config_override.agent.prompt.llm",
    "override_open_tools": "conversation_config_override.agent.prompt.tool_ids",
    "override_open_first_message": "conversation_config_override.agent.first_message",
    "override_open_llm_body": "custom_llm_extra_body",
    "override_open_procedures": "enable_procedure_ids_from_client",
    "override_open_workflow_node": "enable_starting_workflow_node_id_from_client",
    "override_open_duration": "conversation_config_override.conversation.max_duration_seconds",
}
BROKEN = [
    ("nobody_allowed", State(rules="")),
    ("ledger_unavailable", State(settings={"voicepass_database_url": "postgresql://u:p@127.0.0.1:1/x"})),
    ("ledger_folder_missing", State(settings={"voicepass_database_url": "sqlite:////nowhere/voicepass.db"})),
    ("ledger_missing", State(settings={"voicepass_database_url": "sqlite:///voicepass-that-nobody-made.db"})),
    ("default_missing", State(frontend={"alias": "seller"})),
    ("origin_not_allowed", State(settings={"voicepass_allowed_origins": ["https://a"]}, frontend={"origin": SHOP})),
    ("ledger_in_memory", State(settings={"voicepass_database_url": "sqlite://"})),
    ("keys_unavailable", State(settings=NO_KEYS)),
    ("api_key_refused", State(api_key="sk_mistyped")),
    ("api_key_spare", State(api_key=f"sk_mistyped,{API_KEY}")),
    ("account_blocked", State(fault={"status": 401, "code": "detected_unusual_activity"})),
    ("elevenlabs_unavailable", State(fault={"status": 503})),
    ("elevenlabs_busy", State(fault={"status": 429, "code": "system_busy"})),
    ("concurrency_reached", State(fault={"status": 429, "code": "too_many_concurrent_requests"})),
    ("quota_exhausted", State(fault={"status": 401, "code": "quota_exceeded"})),
    ("answer_unusable", State(fault={"body": "html200"})),
    ("permission_missing", State(permissions=("convai_read", "webhooks_write"))),
    ("agent_unknown", agent(agent_id="agent_other")),
    ("settings_unreadable", State(permissions=("convai_write",))),
    ("endings_unknown", State(permissions=("convai_write",), settings=NO_WEBHOOK)),
    ("selection_unknown", State(rules=on_branch("branch_id = 'agtbrch_gone'"))),
    ("selection_unknown", State(rules=on_branch("version_id = 'agtvrsn_gone'"))),
    ("selection_unknown", State(rules=on_branch("environment = 'test'"))),
    ("selection_unknown", State(fault={"status": 404, "times": 1}, rules=on_branch("version_id = 'agtvrsn_gone'"))),
    ("archived", State(agent=BRANCHED, rules=on_branch("branch_id = 'agtbrch_b'"))),
    ("archived", agent(is_archived=True)),
    ("authentication_off", agent(requires_auth=False)),
    ("host_not_allowed", replace(SHOPPING, agent={"allowed_hosts": {"app.example"}})),
    ("host_not_allowed", State(agent={"allowed_hosts": {"a.example"}}, settings={"voicepass_allowed_origins": ["http://b"]})),
    ("allowlist_beside_signed_urls", agent(allowed_hosts={"app.example"})),
    ("origin_required", State(agent={"allowed_hosts": {"a.example"}, "requires_origin": True}, frontend={"origin": "http://a.example"})),
    ("shareable_link", agent(is_shareable=True)),
    ("override_not_allowed", State(frontend={"overrides": {"agent.prompt.prompt": "Be rude."}})),
    ("text_only_not_allowed", agent(allowed_overrides=set())),
    ("language_unsupported", State(agent={"allowed_overrides": {"agent.language"}}, frontend=KLINGON)),
    ("variables_missing", agent(first_message="Hi {{ username }}")),
    ("variables_missing", agent(prompt="You serve {{shop}}.")),
    ("variables_missing", agent(tool_variables={"item", "amount"})),
    ("variables_secret", agent(tool_variables={"secret__token"})),
    ("variables_optional", State(agent={"prompt": "{{plan}}"}, rules='allow = "everyone"\nvariables.plan = "plan"\n')),
    ("duration_short", agent(max_duration_seconds=60)),
    ("duration_beyond", agent(max_duration_seconds=1200)),
    ("concurrency_zero", agent(concurrency_limit=0, queueing=False)),
    ("concurrency_tighter", agent(concurrency_limit=4)),
    ("daily_limit_zero", agent(daily_limit=0)),
    ("daily_limit_tighter", State(agent={"daily_limit": 10}, rules=LIMITED)),
    ("bursting_exceeds", agent(concurrency_limit=4)),
    ("webhook_missing", State(webhook={"url": None})),
    ("webhook_missing", agent(webhook_id="wh_other")),
    ("webhook_elsewhere", State(webhook={"url": "http://127.0.0.1:1/hook"})),
    ("webhook_unsigned", State(webhook={"auth_type": "oauth2"})),
    ("webhook_disabled", State(webhook={"is_disabled": True})),
    ("webhook_secret_unset", State(settings=NO_WEBHOOK)),
    ("webhooks_unreadable", State(permissions=("convai_write", "convai_read"))),
    *((cause, agent(at={f"platform_settings.overrides.{path}": True})) for cause, path in OPEN.items()),
    ("duration_beyond", agent(max_duration_seconds=1501)),
    ("silence_unlimited", agent(at={"conversation_config.turn.silence_end_call_timeout": None})),
    ("telephone_output", agent(at={"conversation_config.tts.agent_output_audio_format": "ulaw_8000"})),
    ("telephone_input", agent(at={"conversation_config.asr.user_input_audio_format": "ulaw_8000"})),
    ("zero_retention", agent(at={"platform_settings.privacy": {"zero_retention_mode": True}})),
    ("queue_on", agent(at={"platform_settings.queueing_config": {"enabled": True}})),
    ("webhook_without_transcript", with_own_webhook(events=["audio"])),
    ("webhook_with_audio", with_own_webhook(events=["transcript", "audio"])),
    ("webhook_in_opentelemetry", with_own_webhook(transcript_format="opentelemetry")),
    ("webhook_in_opentelemetry",
     replace(with_own_webhook(transcript_format="opentelemetry"), permissions=("convai_write", "convai_read"))),
    ("answer_unreadable", agent(at={"platform_settings": "?"})),
    ("answer_unreadable", agent(at={"platform_settings.auth": [1]})),
    ("answer_unreadable", agent(at={"conversation_config.conversation": {"max_duration_seconds": "long"}})),
    ("not_asked", State(frontend={"with_conversation": False})),
]  # fmt: skip
SOUND = [
    CORRECT,
    State(
        agent={"allowed_overrides": {"conversation.text_only", "agent.language"}, "languages": {"de"}},
        frontend={"overrides": {"agent.language": "de", "conversation.text_only": True}},
    ),
    State(
        agent={"first_message": "{{user_name}} {{ plan }} {{system__time}}", "tool_variables": {"user_id", "plan"}},
        rules='allow = "everyone"\nvariables.plan = { claim = "plan", default = "free" }\n',
    ),
    State(agent={"concurrency_limit": 5, "daily_limit": 50}, rules=LIMITED),
    State(rules='allow = "everyone"\nvariables.plan = "plan"\n'),
    State(agent=BRANCHED, rules=on_branch("environment = 'staging'")),
    SHOPPING,
    agent(webhook_id="wh_emulated"),
]
PRECISE: list[tuple[State, list[tuple[str, str]]]] = [
    (State(agent={"concurrency_limit": 4, "bursting": False}, rules=LIMITED), [("concurrency", "concurrency_tighter")]),
    (State(agent={"allowed_hosts": {"localhost:3000"}, "requires_origin": True},
           settings={"voicepass_allowed_origins": ["http://localhost:3000"]}),
     [("allowlist", "allowlist_beside_signed_urls"), ("allowlist", "origin_required")]),
    (State(agent={"allowed_overrides": set()}, frontend={"overrides": {"conversation.text_only": True}}),
     [("overrides", "override_not_allowed"), ("conversation", "override_not_allowed")]),
    (State(agent={"prompt": "{{plan}}"}, rules='allow = "everyone"\nvariables.plan = "plan"\n'),
     [("variables", "variables_optional")]),
    (State(permissions=("convai_read", "webhooks_write")),
     [("permission", "permission_missing"), ("conversation", "not_reached")]),
    (State(fault={"status": 401, "code": "quota_exceeded"}),
     [("conversation", "quota_exhausted")]),
    (State(agent=BRANCHED, rules=on_branch("environment = 'test'")), [("conversation", "selection_unknown")]),
    (State(fault={"target": "conversation", "closing": "request_error"}), [("conversation", "request_refused")]),
]  # fmt: skip


@table("state", SOUND)
def test_the_doctor_finds_nothing_if_everything_is_right(examine_state: Examine, state: State) -> None:
    findings = examine_state(state)

    assert list_troubles(findings) == []
    assert [finding.check for finding in findings] == list(CHECKS)


def test_a_sum_that_differs_from_its_passes_is_corrected_with_a_warning(examine_state: Examine, tmp_path: Path) -> None:
    state = State(settings={"voicepass_database_url": f"sqlite:///{tmp_path}/voicepass.db"})
    asyncio.run(make_ledger(tmp_path / "voicepass.db"))

    first, second = list_troubles(examine_state(state)), list_troubles(examine_state(state))

    assert first == [("ledger", "sums_corrected")]
    assert second == []


async def make_ledger(path: Path) -> None:
    async with open_sqlite(str(path), clock=time.time) as ledger:
        await rows(ledger, "INSERT INTO sums VALUES ('all', 86400, :day, 1, 0, 60, 0)", day=int(time.time() // 86_400))


@table(("cause", "state"), BROKEN)
def test_a_check_names_what_is_broken_and_what_to_do(examine_state: Examine, cause: str, state: State) -> None:
    findings = examine_state(state)

    named = {finding.cause: finding for finding in findings}
    assert cause in named
    assert "{" not in named[cause].says.replace("{{", "")
    assert [check for check in CHECKS if check not in {finding.check for finding in findings}] == []
    if CAUSES[cause].outcome is Outcome.FAILED:
        assert find_first_failure(findings).cause == cause
    assert secrets_in(repr(findings)) == []


@table(("state", "expected"), PRECISE)
def test_the_doctor_finds_only_what_is_broken(
    examine_state: Examine, state: State, expected: list[tuple[str, str]]
) -> None:
    assert list_troubles(examine_state(state)) == expected


@pytest.mark.parametrize(
    ("permissions", "settings", "failed"),
    [
        (("convai_write",), NO_WEBHOOK, [("webhook", "endings_unknown")]),
        (("convai_write",), {}, []),
        (("convai_write", "convai_read"), NO_WEBHOOK, []),
        ((), NO_WEBHOOK, [("permission", "permission_missing"), ("webhook", "endings_unknown")]),
    ],
)
def test_a_key_that_cannot_look_up_conversations_fails_only_if_no_webhook_replaces_the_lookup(
    examine_state: Examine, permissions: tuple[str, ...], settings: Mapping[str, Any], failed: list[tuple[str, str]]
) -> None:
    findings = examine_state(State(permissions=permissions, settings=settings))

    assert [(finding.check, finding.cause) for finding in findings if finding.outcome is Outcome.FAILED] == failed


@pytest.mark.parametrize(
    ("state", "proven"),
    [
        (State(api_key="sk_mistyped"), set()),
        (State(permissions=()), {"api_key", "region"}),
        (agent(agent_id="agent_other"), {"api_key", "permission", "region"}),
        (State(fault={"status": 429, "code": "too_many_concurrent_requests"}), {"api_key", "permission", "region"}),
    ],
)
def test_a_refusal_proves_what_elevenlabs_checks_before_it(
    examine_state: Examine, state: State, proven: set[str]
) -> None:
    findings = examine_state(state)

    checks = {"api_key", "permission", "region", "agent"}
    assert {finding.check for finding in findings if finding.outcome is Outcome.OK} & checks == proven


def find_first_failure(findings: list[Finding]) -> Finding:
    return next(finding for finding in findings if finding.outcome is Outcome.FAILED)


@pytest.fixture
def two_regions(stage: tuple[Any, str]) -> tuple[str, Emulator]:
    """Two emulators, at /us and /eu: the first refuses the doctor's keys, the second accepts them."""
    us, eu = Emulator(agents=[], api_keys={}), build_emulator(CORRECT)
    stage[0].app = Starlette(routes=[Mount("/us", create_emulator(us)), Mount("/eu", create_emulator(eu))])
    return stage[1], us


def build_case(base_url: str, regions: Mapping[str, str]) -> Case:
    settings = settings_with(
        elevenlabs_agent_id=AGENT_ID, elevenlabs_base_url=base_url, elevenlabs_api_key=SecretStr(API_KEY)
    )
    return Case(settings=settings, configuration=configure(settings), alias="default", regions=regions)


def test_a_key_of_another_region_is_distinguished_from_a_wrong_key(two_regions: tuple[str, Emulator]) -> None:
    url, _ = two_regions
    case = build_case(f"{url}/us", {"the US region": f"{url}/us", "EU residency": f"{url}/eu"})

    findings = asyncio.run(examine(case))

    (region,) = [finding for finding in findings if finding.check == "region"]
    assert (region.cause, region.outcome) == ("region_wrong", Outcome.FAILED)
    assert f"EU residency, not to 127.0.0.1. Set ELEVENLABS_BASE_URL={url}/eu" in f"{region.says} {region.remedy}"


def test_a_refused_key_is_sent_to_no_host_that_is_not_the_vendors(two_regions: tuple[str, Emulator]) -> None:
    url, us = two_regions
    assert all(host.endswith(".elevenlabs.io") and host.startswith("https://") for host in REGIONS.values())

    findings = asyncio.run(examine(build_case(f"{url}/eu/nowhere", {"the US region": f"{url}/us"})))

    assert find_first_failure(findings).check == "agent"
    assert list(us.records.calls) == []


def test_every_check_that_can_fail_has_its_test() -> None:
    proven = {CAUSES[cause].check for cause, _ in BROKEN} | {"settings", "region"}

    assert proven == set(CHECKS)


CLOSED = {
    "unauthorized": "not_authorized",
    "unknown_agent": "agent_unknown",
    "host_not_allowed": "host_not_allowed",
    "request_error": "request_refused",
    "variables_missing": "variables_missing",
    "override_not_allowed": "override_not_allowed",
    "language_unsupported": "language_unsupported",
    "max_duration": "ended",
    "agent_ended": "ended",
    "invalid_message": "message_invalid",
    "first_frame_timeout": "operation_failed",
    "quota_exceeded": "quota_exhausted",
    "agent_misconfigured": "agent_misconfigured",
    "daily_limit": "daily_limit_reached",
    "too_many_concurrent": "concurrency_reached",
    "internal_error": "internal_error",
}


@table(("closing", "cause"), CLOSED.items())
def test_a_closed_conversation_is_reported_with_its_cause(examine_state: Examine, closing: str, cause: str) -> None:
    findings = examine_state(State(fault={"target": "conversation", "closing": closing}))

    assert list_troubles(findings) == [("conversation", cause)]


def test_every_way_the_emulator_ends_a_conversation_is_tried() -> None:
    assert CLOSED.keys() == CLOSINGS.keys()


class FakeAdapter:
    """An adapter that returns this agent and no document."""

    def __init__(self, agent: object) -> None:
        self.agent = agent

    async def fetch_agent(self, _agent: Agent) -> Any:
        return self.agent

    async def fetch_document(self, _base_url: str, _kind: str, _document_id: str = "") -> Any:
        raise AgentUnknown


def test_settings_of_a_new_shape_are_skipped_and_cause_no_crash() -> None:
    case = build_case("http://127.0.0.1:1", {})
    settings = EmulatedAgent(agent_id=AGENT_ID, allowed_hosts=frozenset({"a"}), languages=frozenset({"de"})).as_json()

    for spoilt in spoil_each_member(settings):
        findings = asyncio.run(check_workspace(case, cast("ElevenLabs", FakeAdapter(spoilt))))
        assert {finding.check for finding in findings} == {"agent", "webhook", *AGENT_CHECKS}


def spoil_each_member(value: Any) -> Iterator[Any]:
    """Yield copies of a document. In each copy, one member has another type or is null."""
    for name, member in value.items() if isinstance(value, dict) else enumerate(value):
        for other in (None, True, 3, "x", [], ["x"], {}, {"x": 1}):
            copy = value.copy()
            copy[name] = other
            yield copy
        if isinstance(member, dict | list):
            for spoilt in spoil_each_member(member):
                copy = value.copy()
                copy[name] = spoilt
                yield copy


def test_a_missing_tool_hides_no_other_finding() -> None:
    agent = EmulatedAgent(agent_id=AGENT_ID, prompt="{{shop}}", tool_variables=frozenset({"item"}))

    shown = cast("ElevenLabs", FakeAdapter(agent.as_json()))
    findings = asyncio.run(check_workspace(build_case("http://127.0.0.1:1", {}), shown))

    assert ("variables", "tool_unknown") in list_troubles(findings)
    assert ("variables", "variables_missing") in list_troubles(findings)


async def try_server(behave: Callable[[ServerConnection], Awaitable[None]]) -> Finding:
    """Return the doctor's finding on a conversation with a server that behaves like this."""

    async with serve_socket(behave, "127.0.0.1", 0, subprotocols=[Subprotocol("convai")]) as server:
        port = server.sockets[0].getsockname()[1]
        url = f"ws://127.0.0.1:{port}/?conversation_signature={SIGNATURE}"
        return await try_url(url)


async def try_url(url: str) -> Finding:
    case = replace(build_case("http://127.0.0.1:1", {}), watch_seconds=0)
    return await try_conversation(case, url, open_seconds=0.2)


@pytest.mark.anyio
async def test_the_signed_url_is_in_no_log_even_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    async def behave(socket: ServerConnection) -> None:
        await socket.close(3000, "Could not authorize the conversation.")

    with caplog.at_level(logging.DEBUG, logger="websockets.client"):
        await try_server(behave)

    assert secrets_in("\n".join(record.getMessage() for record in caplog.records)) == []


@pytest.mark.anyio
async def test_a_reason_that_only_the_error_event_has_is_reported() -> None:
    async def behave(socket: ServerConnection) -> None:
        await socket.recv()
        message = "received 1002 (protocol error) This request exceeds your quota limit."
        await socket.send(json.dumps({"type": "error", "message": message}))
        await socket.close(1002)

    assert (await try_server(behave)).cause == "quota_exhausted"


@pytest.mark.anyio
async def test_the_doctor_does_not_wait_for_a_silent_server() -> None:
    async def behave(socket: ServerConnection) -> None:
        await socket.wait_closed()

    assert (await try_server(behave)).cause == "conversation_not_begun"


@pytest.mark.anyio
async def test_the_finding_of_a_broken_connection_holds_no_secret() -> None:
    async def behave(socket: ServerConnection) -> None:
        socket.transport.abort()

    broken = await try_server(behave)
    refused = await try_url(f"ws://127.0.0.1:{free_port()}/?conversation_signature={SIGNATURE}")

    assert (broken.cause, refused.cause) == ("connection_broken", "connection_broken")
    assert secrets_in(f"{broken} {refused}") == []
