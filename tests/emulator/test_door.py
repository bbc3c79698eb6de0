"""Who gets in, who does not, and what the refused are told."""

import json

import pytest

from tests.emulator.wire import (
    AGENT,
    CONVAI,
    JS_TEXT_INITIATION,
    JS_VOICE_INITIATION,
    Frame,
    Serve,
    Service,
    talking,
)
from voicepass.emulator import CLOSINGS, EmulatedAgent, Emulator, Fault

UNAUTHORIZED = (3000, "Could not authorize the conversation.")
NO_PLACEHOLDERS = sorted(name for name, row in CLOSINGS.items() if not row.needs_facts)


@pytest.mark.parametrize(
    "spoilt",
    [
        lambda url: url.partition("&conversation_signature")[0],
        lambda url: url + "x",
        lambda url: url.replace(AGENT.agent_id, "agent_second"),
        lambda url: url + "&conversation_id=conv_another",
        lambda url: url.replace("&conversation_signature", "%26conversation_signature"),
    ],
    ids=["absent", "forged", "another agent's", "another conversation's", "smuggled into the agent id"],
)
def test_a_signature_that_does_not_fit_is_refused_before_the_metadata(serve: Serve, spoilt: object) -> None:
    service = serve(Emulator(agents=[AGENT, EmulatedAgent(agent_id="agent_second")]))
    assert callable(spoilt)

    with talking(spoilt(service.mint()), None, subprotocols=[CONVAI]) as talk:
        code, _ = talk.closed()

    assert code == 3000
    assert talk.frames == []
    assert service.emulator.records.conversations[0].closed_by == "emulator"


def test_a_url_without_a_conversation_id_opens_any_number_of_conversations(service: Service) -> None:
    url = service.mint()

    greetings = []
    for _ in range(2):
        with talking(url) as talk:
            greetings.append(talk.says())

    assert len(greetings) == 2
    first, second = service.emulator.records.conversations
    assert first.conversation_id != second.conversation_id


def test_a_url_with_a_conversation_id_opens_one_conversation_only(service: Service) -> None:
    url = service.mint(include_conversation_id="true")

    with talking(url) as first:
        first.says()
        with talking(url) as second:
            refusal = second.closed()

    assert refusal == UNAUTHORIZED


def test_a_url_is_good_for_fifteen_minutes_and_not_a_second_longer(serve: Serve) -> None:
    time = [1_000.0]
    service = serve(Emulator(agents=[AGENT], clock=lambda: time[0]))
    url = service.mint()

    time[0] += 899
    with talking(url) as in_time:
        in_time.says()
        time[0] += 1
        with talking(url) as too_late:
            refusal = too_late.closed()
        in_time.send({"type": "user_message", "text": "hello"})
        still_talking = in_time.says()

    assert refusal == UNAUTHORIZED
    assert still_talking.startswith("Hello!")


def test_a_public_agent_is_open_to_its_bare_id_but_not_to_a_forged_signature(serve: Serve) -> None:
    service = serve(Emulator(agents=[EmulatedAgent(agent_id="agent_public", requires_auth=False)]))
    url = service.public_url("agent_public")

    with talking(url) as bare:
        greeting = bare.says()
    with talking(f"{url}&conversation_signature=cvtkn_forged") as forged:
        refusal = forged.closed()

    assert greeting.startswith("Hello Ada!")
    assert refusal == UNAUTHORIZED


def test_an_unknown_agent_does_not_exist(service: Service) -> None:
    with talking(service.public_url("agent_x"), None) as talk:
        assert talk.closed() == (3000, "The AI agent you are trying to reach does not exist")


@pytest.mark.parametrize(
    ("origin", "is_welcome"),
    [("http://shop.example:8080", True), (None, True), ("http://shop.example", False), ("null", False)],
)
def test_an_allowlist_admits_exactly_its_hosts(serve: Serve, origin: str | None, *, is_welcome: bool) -> None:
    agent = EmulatedAgent(agent_id="agent_x", requires_auth=False, allowed_hosts=frozenset({"shop.example:8080"}))
    service = serve(Emulator(agents=[agent]))

    with talking(service.public_url("agent_x"), origin=origin) as talk:
        first = talk.next() if is_welcome else None
        refusal = None if is_welcome else talk.closed()

    if is_welcome:
        assert first is not None
    else:
        assert refusal is not None
        assert refusal[0] == 3000
        assert refusal[1].startswith("Host ")


@pytest.mark.parametrize(
    "first",
    [
        "hello",
        "[]",
        "null",
        '"conversation_initiation_client_data"',
        "[" * 100_000,
        json.dumps({"type": "user_message", "text": "hi"}),
        json.dumps({"user_audio_chunk": "AAAA"}),
        json.dumps({"type": ["conversation_initiation_client_data"]}),
        json.dumps(JS_TEXT_INITIATION | {"dynamic_variables": ["Ada"]}),
        json.dumps(JS_TEXT_INITIATION | {"dynamic_variables": {"user_name": None}}),
        json.dumps(JS_TEXT_INITIATION | {"dynamic_variables": {"user_name": {"first": "Ada"}}}),
        json.dumps(JS_TEXT_INITIATION | {"conversation_config_override": "text"}),
        b"\x00\x01",
    ],
)
def test_a_hostile_first_frame_closes_before_the_metadata(service: Service, first: str | bytes) -> None:
    with talking(service.mint(), None) as talk:
        talk.socket.send(first)
        refusal = talk.closed()

    assert refusal == (1008, "Invalid message received")
    assert talk.frames == []


def test_a_frame_beyond_the_bound_is_too_big(serve: Serve) -> None:
    service = serve(Emulator(agents=[AGENT], max_frame_characters=1_000))

    with talking(service.mint(), None) as talk:
        talk.socket.send("x" * 1_001)

        assert talk.closed() == (1009, "Message too big")


def test_who_says_nothing_first_is_closed_in_time(serve: Serve) -> None:
    service = serve(Emulator(agents=[AGENT], first_frame_timeout_seconds=0.01))

    with talking(service.mint(), None) as talk:
        assert talk.closed() == (1002, "No conversation initiation data received in time")


def _refused_at_the_start(service: Service, initiation: Frame) -> tuple[int, str, str]:
    with talking(service.mint(), initiation, subprotocols=[CONVAI]) as talk:
        code, reason = talk.closed()
    assert [frame["type"] for frame in talk.frames] == ["conversation_initiation_metadata", "error"]
    event = talk.frames[1]["error_event"]
    assert (event["code"], event["reason"]) == (code, reason)
    return code, reason, event.get("error_type", "")


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({}, "Missing required dynamic variables in first message: {'shop', 'user_name'}"),
        ({"shop": "x"}, "Missing required dynamic variables in first message: {'user_name'}"),
        ({"shop": "x", "user_name": "Ada"}, "Missing required dynamic variables in tools: {'order_id'}"),
    ],
)
def test_missing_variables_close_after_the_metadata(serve: Serve, variables: Frame, reason: str) -> None:
    agent = EmulatedAgent(
        agent_id=AGENT.agent_id,
        first_message="{{ user_name }} at {{shop}}",
        tool_variables=frozenset({"order_id", "user_name"}),
    )
    service = serve(Emulator(agents=[agent]))

    refusal = _refused_at_the_start(service, JS_TEXT_INITIATION | {"dynamic_variables": variables})

    assert refusal == (1008, reason, "missing_dynamic_variable")


def test_variables_nested_one_level_too_deep_count_as_missing(service: Service) -> None:
    nested = {
        "type": "conversation_initiation_client_data",
        "conversation_initiation_client_data": {"dynamic_variables": {"user_name": "Ada"}},
    }

    code, reason, _ = _refused_at_the_start(service, nested)

    assert (code, reason) == (1008, "Missing required dynamic variables in first message: {'user_name'}")


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ({"agent": {"first_message": "Hi"}}, "first_message"),
        ({"agent": {"prompt": {"prompt": "Obey"}}}, "prompt"),
        ({"tts": {"voice_id": ""}}, "voice_id"),
        ({"conversation": {"text_only": True}, "agent": {"language": "de"}}, "language"),
        ({"unheard_of": {"a": {"b": {"c": {"d": {"e": {"f": 1}}}}}}}, "e"),
    ],
)
def test_an_override_that_is_not_allowed_closes_after_the_metadata(
    service: Service, override: Frame, field: str
) -> None:
    refusal = _refused_at_the_start(service, JS_TEXT_INITIATION | {"conversation_config_override": override})

    assert refusal == (1008, f"Override for field '{field}' is not allowed by config.", "override_error")


def test_text_only_needs_its_permission_too(serve: Serve) -> None:
    service = serve(Emulator(agents=[EmulatedAgent(agent_id=AGENT.agent_id, allowed_overrides=frozenset())]))

    code, reason, _ = _refused_at_the_start(service, JS_TEXT_INITIATION)

    assert (code, reason) == (1008, "Override for field 'text_only' is not allowed by config.")


def test_empty_override_members_are_no_overrides(serve: Serve) -> None:
    service = serve(Emulator(agents=[EmulatedAgent(agent_id=AGENT.agent_id, allowed_overrides=frozenset())]))

    with talking(service.mint(), JS_VOICE_INITIATION) as talk:
        assert talk.says().startswith("Hello Ada!")


def test_an_allowed_override_is_let_through(serve: Serve) -> None:
    agent = EmulatedAgent(agent_id=AGENT.agent_id, allowed_overrides=frozenset({"agent.language"}))
    service = serve(Emulator(agents=[agent]))
    override = {"conversation_config_override": {"agent": {"language": "de"}}}

    with talking(service.mint(), JS_TEXT_INITIATION | override) as talk:
        assert talk.says().startswith("Hello Ada!")


def test_a_reason_longer_than_a_close_frame_is_cut_between_characters(service: Service) -> None:
    field = "ä\ud800" * 200

    _, reason, _ = _refused_at_the_start(service, JS_TEXT_INITIATION | {"conversation_config_override": {field: 1}})

    assert len(reason.encode()) <= 123
    assert reason.startswith("Override for field 'ä?ä?")


@pytest.mark.parametrize("name", NO_PLACEHOLDERS)
def test_every_row_of_the_table_that_needs_no_facts_can_be_forced(service: Service, name: str) -> None:
    row = CLOSINGS[name]
    service.emulator.trouble.put(Fault(target="conversation", closing=name, times=1))

    with talking(service.mint()) as forced:
        refusal = forced.closed()
    with talking(service.mint()) as after:
        greeting = after.says()

    assert refusal == (row.code, row.reason)
    expected = [] if row.moment == "door" else ["conversation_initiation_metadata", "error"]
    assert [frame["type"] for frame in forced.frames] == expected
    assert greeting.startswith("Hello Ada!")


def test_every_row_says_where_it_is_from_and_fits_a_close_frame() -> None:
    for name, row in CLOSINGS.items():
        assert row.name == name
        assert row.source
        assert len(row.reason.encode()) <= 123
        assert row.code in {1002, 1008, 1009, 1011} or 3000 <= row.code <= 4999
