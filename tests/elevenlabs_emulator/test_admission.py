"""Which clients the emulator admits, and how it closes the others."""

import json
from collections.abc import Callable

import pytest

from elevenlabs_emulator import CLOSINGS, EmulatedAgent, Emulator, Fault
from tests.conftest import Clock
from tests.elevenlabs_emulator.contract import Frame
from tests.elevenlabs_emulator.wire import (
    AGENT,
    JS_TEXT_INITIATION,
    JS_VOICE_INITIATION,
    Serve,
    Service,
    open_conversation,
)
from tests.tables import table

UNAUTHORIZED = (3000, "Could not authorize the conversation.")


@pytest.mark.parametrize(
    "damage",
    [
        lambda url: url.partition("&conversation_signature")[0],
        lambda url: url + "x",
        lambda url: url.replace(AGENT.agent_id, "agent_second"),
        lambda url: url + "&conversation_id=conv_another",
    ],
    ids=["absent", "forged", "another agent's", "another conversation's"],
)
def test_a_wrong_signature_is_refused_before_the_metadata(serve: Serve, damage: Callable[[str], str]) -> None:
    service = serve(Emulator(agents=[AGENT, EmulatedAgent(agent_id="agent_second")]))

    with open_conversation(damage(service.mint()), None, subprotocol="convai") as talk:
        refusal = talk.read_close()

    assert refusal == UNAUTHORIZED
    assert talk.frames == []
    assert service.emulator.records.conversations[0].closed_by == "emulator"


def test_only_a_url_with_a_conversation_id_opens_a_single_conversation(service: Service) -> None:
    bound, unbound = service.mint(include_conversation_id="true"), service.mint()

    with open_conversation(bound) as first:
        assert first.read_answer().startswith("Hello Ada!")
        with open_conversation(bound) as second:
            assert second.read_close() == UNAUTHORIZED
    with open_conversation(unbound) as first, open_conversation(unbound) as second:
        assert first.read_answer() == second.read_answer()


def test_a_url_can_be_opened_for_less_than_fifteen_minutes(serve: Serve) -> None:
    clock = Clock(1_000)
    service = serve(Emulator(agents=[AGENT], clock=clock))
    url = service.mint()

    clock.now += 899
    with open_conversation(url) as in_time:
        in_time.read_answer()
        clock.now += 1
        with open_conversation(url) as too_late:
            assert too_late.read_close() == UNAUTHORIZED
        in_time.send("user_message", text="hello")
        assert in_time.read_answer().startswith("Hello!")


def test_a_public_agent_admits_clients_without_a_signature_but_not_with_a_forged_one(serve: Serve) -> None:
    service = serve(Emulator(agents=[EmulatedAgent(agent_id="agent_public", requires_auth=False)]))
    url = service.public_url("agent_public")

    with open_conversation(url) as bare, open_conversation(f"{url}&conversation_signature=cvtkn_forged") as forged:
        assert bare.read_answer().startswith("Hello Ada!")
        assert forged.read_close() == UNAUTHORIZED


def test_an_unknown_agent_is_refused(service: Service) -> None:
    with open_conversation(service.public_url("agent_x"), None) as talk:
        assert talk.read_close() == (3000, "The AI agent you are trying to reach does not exist")


def test_an_allowlist_admits_its_hosts_and_clients_without_an_origin(serve: Serve) -> None:
    agent = EmulatedAgent(agent_id="agent_x", requires_auth=False, allowed_hosts=frozenset({"shop.example:8080"}))
    url = serve(Emulator(agents=[agent])).public_url("agent_x")

    for origin in ("http://shop.example:8080", None):
        with open_conversation(url, origin=origin) as welcome:
            assert welcome.read_answer().startswith("Hello Ada!")
    for origin, host in {"http://shop.example": "shop.example", "null": ""}.items():
        with open_conversation(url, origin=origin) as foreign:
            assert foreign.read_close() == (3000, f"Host {host} is not allowed to connect to this agent")


@table(
    "first",
    [
        "hello",
        "[]",
        "[" * 100_000,
        b"\x00\x01",
        json.dumps({"type": "user_message", "text": "hi"}),
        json.dumps(JS_TEXT_INITIATION | {"user_id": "\ud800"}),
        json.dumps(JS_TEXT_INITIATION | {"dynamic_variables": ["Ada"]}),
        json.dumps(JS_TEXT_INITIATION | {"dynamic_variables": {"user_name": {"first": "Ada"}}}),
        json.dumps(JS_TEXT_INITIATION | {"conversation_config_override": "text"}),
        json.dumps(JS_TEXT_INITIATION | {"user_id": 5}),
        json.dumps(JS_TEXT_INITIATION | {"dynamic_variables": {"user_name": "Ada", "system__time": "now"}}),
    ],
)
def test_a_hostile_first_frame_closes_before_the_metadata(service: Service, first: str | bytes) -> None:
    with open_conversation(service.mint(), None) as talk:
        talk.socket.send(first)
        refusal = talk.read_close()

    assert refusal == (1008, "Invalid message received")
    assert talk.frames == []


def test_a_client_that_sends_no_first_frame_is_closed_in_time(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elevenlabs_emulator.conversation._FIRST_FRAME_SECONDS", 0.01)

    with open_conversation(service.mint(), None) as talk:
        assert talk.read_close() == (1002, "No conversation initiation data received in time")


def _read_refusal(service: Service, initiation: Frame) -> tuple[int, str, str]:
    with open_conversation(service.mint(), initiation) as talk:
        code, reason = talk.read_close()
    assert talk.kinds == ["conversation_initiation_metadata", "error"]
    event = talk.frames[1]["error_event"]
    assert (event["code"], event["reason"]) == (code, reason)
    return code, reason, event["error_type"]


@pytest.mark.parametrize(
    ("variables", "missing"),
    [
        ({}, "first message: {'shop', 'user_name'}"),
        ({"shop": "x"}, "first message: {'user_name'}"),
        ({"shop": "x", "user_name": "Ada"}, "tools: {'order_id'}"),
    ],
)
def test_missing_variables_close_after_the_metadata(serve: Serve, variables: Frame, missing: str) -> None:
    first_message, tools = "{{ user_name }} at {{shop}}", frozenset({"order_id", "user_name"})
    agent = EmulatedAgent(agent_id=AGENT.agent_id, first_message=first_message, tool_variables=tools)
    service = serve(Emulator(agents=[agent]))

    refusal = _read_refusal(service, JS_TEXT_INITIATION | {"dynamic_variables": variables})

    assert refusal == (1008, f"Missing required dynamic variables in {missing}", "missing_dynamic_variable")


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ({"agent": {"first_message": "Hi"}}, "first_message"),
        ({"agent": {"prompt": {"ä" * 200: "Obey"}}}, "ä" * 200),  # cut to what a close frame carries
        ({"conversation": {"text_only": True}, "agent": {"language": "de"}}, "language"),
    ],
)
def test_a_forbidden_override_closes_after_the_metadata(service: Service, override: Frame, field: str) -> None:
    refusal = _read_refusal(service, JS_TEXT_INITIATION | {"conversation_config_override": override})

    reason = f"Override for field '{field}' is not allowed by config."
    assert refusal == (1008, reason.encode()[:123].decode(errors="ignore"), "override_error")


def test_text_only_must_be_an_allowed_override_and_empty_overrides_need_not(serve: Serve) -> None:
    service = serve(Emulator(agents=[EmulatedAgent(agent_id=AGENT.agent_id, allowed_overrides=frozenset())]))

    _, reason, _ = _read_refusal(service, JS_TEXT_INITIATION)
    with open_conversation(service.mint(), JS_VOICE_INITIATION) as talk:
        greeting = talk.read_answer()

    assert reason == "Override for field 'text_only' is not allowed by config."
    assert greeting.startswith("Hello Ada!")


def test_the_agents_own_language_is_allowed_because_the_widget_always_sends_it(service: Service) -> None:
    own_language = {"conversation_config_override": {"agent": {"language": "en"}}}

    with open_conversation(service.mint(), JS_VOICE_INITIATION | own_language) as talk:
        greeting = talk.read_answer()

    assert greeting.startswith("Hello Ada!")


def test_a_fault_forces_each_closing_of_the_table_once(service: Service) -> None:
    for name, row in CLOSINGS.items():
        service.emulator.faults["conversation"] = Fault(target="conversation", closing=name, times=1)

        with open_conversation(service.mint()) as forced:
            assert forced.read_close() == (row.code, row.reason)

        begins = [] if row.moment == "before_metadata" else ["conversation_initiation_metadata"]
        ends = ["error"] if begins and row.code in {1000, 1002, 1008, 1011} and name != "agent_ended" else []
        assert forced.kinds == begins + ends
    with open_conversation(service.mint()) as after:
        assert after.read_answer().startswith("Hello Ada!")
