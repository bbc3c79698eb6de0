"""The emulator applies an agent's limits and overrides."""

from typing import Any

import pytest

from elevenlabs_emulator import Emulator
from tests.elevenlabs_emulator.contract import Frame
from tests.elevenlabs_emulator.wire import (
    AGENT,
    JS_TEXT_INITIATION,
    JS_VOICE_INITIATION,
    KEY,
    Serve,
    Service,
    open_conversation,
)

OVERRIDES = frozenset(
    {
        "agent.first_message",
        "agent.language",
        "agent.prompt.prompt",
        "conversation.text_only",
        "conversation.max_duration_seconds",
    }
)


def serve_agent(serve: Serve, **settings: Any) -> Service:
    now = 1_800_000_000.0  # moves only when a test advances it
    return serve(Emulator(agents=[AGENT.model_copy(update=settings)], clock=lambda: now))


def make_initiation(**sections: Any) -> Frame:
    return JS_TEXT_INITIATION | {"conversation_config_override": sections}


@pytest.mark.parametrize(
    ("agent_seconds", "override"), [(600, {}), (900, {"conversation": {"max_duration_seconds": 600}})]
)
def test_the_longest_duration_ends_the_conversation_by_the_emulators_clock(
    serve: Serve, agent_seconds: int, override: Any
) -> None:
    service = serve_agent(serve, max_duration_seconds=agent_seconds, allowed_overrides=OVERRIDES)

    with open_conversation(service.mint(), make_initiation(**override)) as talk:
        talk.read_answer()
        service.advance(599)
        talk.send("user_message", text="hello")
        talk.read_answer()
        service.advance(1)
        closing = talk.read_close()

    error = talk.frames[-1]["error_event"]
    assert closing == (1000, "Max call duration exceeded")
    assert (error["code"], error["error_type"]) == (1000, "max_duration_exceeded")


def test_an_agent_at_its_limit_queues_a_client_until_another_disconnects(serve: Serve) -> None:
    service = serve_agent(serve, concurrency_limit=1)
    count = "/v1/convai/analytics/live-count"

    with open_conversation(service.mint()) as first, open_conversation(service.mint()) as second:
        first.read_answer()
        waiting = second.next("queue_status")["queue_status_event"]
        live = service.http.get(count, headers={"xi-api-key": KEY}).json()
        service.advance(5)
        first.socket.close()
        admitted = second.next("queue_status")["queue_status_event"]
        greeting = second.read_answer()
        conversation_id = second.frames[0]["conversation_initiation_metadata_event"]["conversation_id"]
        second.socket.close()
        service.await_end(conversation_id)

    metadata = service.emulator.accounts[conversation_id].as_json()["metadata"]
    assert (waiting, admitted) == ({"status": "waiting"}, {"status": "admitted"})
    assert live == {"count": 1}
    assert greeting.startswith("Hello Ada")
    assert second.kinds.index("conversation_initiation_metadata") == 0
    assert isinstance(metadata, dict)
    assert (metadata["queue_wait_secs"], metadata["call_duration_secs"]) == (5, 0)


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({"queueing": False}, ["conversation_initiation_metadata"]),
        ({"queue_timeout_seconds": 0}, ["conversation_initiation_metadata", "queue_status", "queue_status"]),
    ],
)
def test_an_agent_at_its_limit_refuses_a_client_that_it_does_not_queue(
    serve: Serve, settings: Any, kinds: list[str]
) -> None:
    service = serve_agent(serve, concurrency_limit=1, **settings)

    with open_conversation(service.mint()) as first, open_conversation(service.mint()) as second:
        first.read_answer()
        closing = second.read_close()

    assert closing == (3008, "too many concurrent connections")
    assert second.kinds == kinds


def test_the_daily_limit_lasts_for_a_day(serve: Serve) -> None:
    service = serve_agent(serve, daily_limit=1)

    with open_conversation(service.mint()) as first:
        first.read_answer()
    with open_conversation(service.mint()) as second:
        closing = second.read_close()
    service.advance(24 * 3600)
    with open_conversation(service.mint()) as next_day:
        greeting = next_day.read_answer()

    assert closing == (1008, "Agent has exceeded its daily call limit of 1")
    assert greeting.startswith("Hello Ada")


def test_an_archived_agent_opens_no_conversation(serve: Serve) -> None:
    service = serve_agent(serve, is_archived=True)

    with open_conversation(service.mint()) as talk:
        assert talk.read_close() == (3000, "The AI agent you are trying to reach does not exist")


@pytest.mark.parametrize(
    ("override", "first", "second"),
    [
        ({"agent": {"first_message": "Welcome!"}}, "Welcome!", "Hello! What would you like to sell?"),
        ({"agent": {"language": "de"}}, "[de] Hello Ada!", "[de] Hello!"),
        ({"agent": {"language": "de", "first_message": "Hallo!"}}, "Hallo!", "[de] Hello!"),
    ],
)
def test_an_allowed_override_changes_what_the_agent_says(serve: Serve, override: Any, first: str, second: str) -> None:
    service = serve_agent(serve, allowed_overrides=OVERRIDES, languages=frozenset({"de"}))

    with open_conversation(service.mint(), make_initiation(**override)) as talk:
        greeting = talk.read_answer()
        talk.send("user_message", text="hello")
        answer = talk.read_answer()

    assert greeting.startswith(first)
    assert answer.startswith(second)
    assert "audio" in talk.kinds


def test_an_allowed_override_turns_audio_off(serve: Serve) -> None:
    service = serve_agent(serve, allowed_overrides=OVERRIDES)

    with open_conversation(service.mint(), make_initiation(conversation={"text_only": True})) as text:
        text.read_answer()
        text.send("user_message", text="goodbye")
        text.read_close()

    assert "audio" not in text.kinds


def test_only_the_events_of_the_agents_settings_are_sent(serve: Serve) -> None:
    service = serve_agent(serve, client_events=frozenset({"vad_score"}))

    with open_conversation(service.mint(), JS_VOICE_INITIATION) as talk:
        talk.send("", user_audio_chunk="AAAA")
        talk.send("user_message", text="goodbye")
        talk.read_close()

    assert talk.kinds == ["conversation_initiation_metadata", "vad_score"]


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ({"agent": {"prompt": {"prompt": "{{shop}}"}}}, "Missing required dynamic variables in prompt: {'shop'}"),
        ({"conversation": {"max_duration_seconds": "long"}}, "Invalid message received"),
    ],
)
def test_an_allowed_override_is_checked(serve: Serve, override: Any, reason: str) -> None:
    service = serve_agent(serve, allowed_overrides=OVERRIDES)

    with open_conversation(service.mint(), make_initiation(**override)) as talk:
        assert talk.read_close() == (1008, reason)
