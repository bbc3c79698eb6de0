"""What is said over the WebSocket once the door is open."""

import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.emulator.wire import (
    AGENT,
    CONVAI,
    JS_TEXT_INITIATION,
    JS_VOICE_INITIATION,
    Frame,
    Serve,
    Service,
    parameters,
    talking,
)
from voicepass.emulator import EmulatedAgent, Emulator

SECOND_OF_SILENCE = base64.b64encode(bytes(32_000)).decode()
SECOND_OF_SOUND = base64.b64encode(b"\x00\x10\x00\xf0" * 8_000).decode()
EGGS = {"item": "eggs", "price": 2, "currency": "USD", "unit": "each"}

# The members of each event, from the vendor's message schema.
SHAPES: dict[str, tuple[str, dict[str, type | tuple[type, ...]]]] = {
    "conversation_initiation_metadata": (
        "conversation_initiation_metadata_event",
        {"conversation_id": str, "agent_output_audio_format": str, "user_input_audio_format": str},
    ),
    "ping": ("ping_event", {"event_id": int, "ping_ms": (int, type(None))}),
    "agent_response": ("agent_response_event", {"agent_response": str, "event_id": int}),
    "agent_chat_response_part": ("text_response_part", {"text": str, "type": str, "event_id": int}),
    "audio": ("audio_event", {"audio_base_64": str, "event_id": int}),
    "interruption": ("interruption_event", {"event_id": int}),
    "user_transcript": ("user_transcription_event", {"user_transcript": str, "event_id": int}),
    "client_tool_call": (
        "client_tool_call",
        {"tool_name": str, "tool_call_id": str, "parameters": dict, "event_id": int},
    ),
    "error": ("error_event", {"code": int, "message": str, "reason": str, "error_type": str}),
}


def _assert_well_formed(frame: Frame) -> None:
    event_name, members = SHAPES[frame["type"]]
    assert frame.keys() == {"type", event_name}
    event = frame[event_name]
    assert event.keys() <= members.keys()
    assert members.keys() - event.keys() <= {"error_type"}
    for name, value in event.items():
        assert isinstance(value, members[name]), (frame["type"], name)


def test_the_first_frame_is_the_metadata_and_names_the_conversation_of_the_url(service: Service) -> None:
    url = service.mint(include_conversation_id="true")

    with talking(url) as talk:
        first = talk.next()

    assert first["type"] == "conversation_initiation_metadata"
    event = first["conversation_initiation_metadata_event"]
    assert event["conversation_id"] == parameters(url)["conversation_id"]
    assert event["agent_output_audio_format"] == event["user_input_audio_format"] == "pcm_16000"


def test_the_subprotocol_is_answered_only_when_offered(service: Service) -> None:
    with talking(service.mint(), subprotocols=[CONVAI]) as browser, talking(service.mint()) as python:
        answered = (browser.socket.subprotocol, python.socket.subprotocol)

    assert answered == ("convai", None)


def test_an_order_is_taken_created_and_confirmed(service: Service) -> None:
    with talking(service.mint()) as talk:
        greeting = talk.says()
        talk.send({"type": "user_message", "text": "I want to sell eggs for 2 dollars each"})
        repeated = talk.says()
        call = talk.next("client_tool_call")["client_tool_call"]
        talk.send(
            {"type": "client_tool_result", "tool_call_id": call["tool_call_id"], "result": "ok", "is_error": False}
        )
        confirmed = talk.says()

    assert greeting == "Hello Ada! What would you like to sell today?"
    assert "eggs for $2 each" in repeated
    assert (call["tool_name"], call["parameters"]) == ("create_product", EGGS)
    assert confirmed.startswith("Done! You are now selling eggs")


def test_a_failed_tool_is_apologised_for_and_a_strange_result_is_ignored(service: Service) -> None:
    with talking(service.mint()) as talk:
        talk.says()
        talk.send({"type": "user_message", "text": "sell eggs for 2 dollars each"})
        call = talk.next("client_tool_call")["client_tool_call"]
        talk.send({"type": "client_tool_result", "tool_call_id": "call_other", "result": "ok", "is_error": False})
        talk.send(
            {"type": "client_tool_result", "tool_call_id": call["tool_call_id"], "result": "no", "is_error": True}
        )
        answer = talk.says()

    assert answer == "I am sorry, I could not create eggs: no. Please try again."


def test_in_text_the_sentence_comes_in_parts_and_then_whole(service: Service) -> None:
    with talking(service.mint()) as talk:
        whole = talk.says()

    parts = [frame["text_response_part"] for frame in talk.frames if frame["type"] == "agent_chat_response_part"]
    assert [parts[0]["type"], parts[-1]["type"]] == ["start", "stop"]
    assert {part["type"] for part in parts[1:-1]} == {"delta"}
    assert "".join(part["text"] for part in parts) == whole
    assert talk.frames[-1]["agent_response_event"]["event_id"] == parts[0]["event_id"]


def test_text_only_outside_conversation_as_the_python_sdk_says_it_needs_no_permission(serve: Serve) -> None:
    agent = EmulatedAgent(agent_id=AGENT.agent_id, allowed_overrides=frozenset())
    initiation = JS_TEXT_INITIATION | {"conversation_config_override": {"text_only": True}}
    service = serve(Emulator(agents=[agent]))

    with talking(service.mint(), initiation) as talk:
        talk.says()

    assert "agent_chat_response_part" in {frame["type"] for frame in talk.frames}


def test_with_a_voice_the_agent_sounds_softly_and_does_not_send_parts(service: Service) -> None:
    with talking(service.mint(), JS_VOICE_INITIATION) as talk:
        talk.says()
        chunks = [talk.next("audio")["audio_event"] for _ in range(4)]

    samples = base64.b64decode(chunks[1]["audio_base_64"])
    assert len(samples) == 8_000
    assert any(samples)
    assert [chunk["event_id"] for chunk in chunks] == sorted({chunk["event_id"] for chunk in chunks})
    assert "agent_chat_response_part" not in {frame["type"] for frame in talk.frames}


@pytest.mark.parametrize(("chunk", "seconds"), [(SECOND_OF_SOUND, 1), (SECOND_OF_SILENCE, 4)])
def test_enough_microphone_audio_is_transcribed_and_answered(service: Service, chunk: str, seconds: int) -> None:
    with talking(service.mint(), JS_VOICE_INITIATION) as talk:
        for _ in range(seconds):
            talk.send({"user_audio_chunk": chunk})
        heard = talk.next("user_transcript")["user_transcription_event"]["user_transcript"]
        answer = talk.says()

    assert heard == "I want to sell eggs for two dollars each"
    assert answer.startswith("Got it: eggs for $2 each.")


def test_after_a_line_the_voice_goes_unheard_for_a_while_and_at_the_end_for_good(serve: Serve) -> None:
    emulator = Emulator(agents=[AGENT], spoken_lines=("hello", "thanks"), pause_seconds=2)
    service = serve(emulator)

    with talking(service.mint(), JS_VOICE_INITIATION) as talk:
        for _ in range(20):
            talk.send({"user_audio_chunk": SECOND_OF_SOUND})
        talk.send({"type": "user_message", "text": "goodbye"})
        while not talk.says().startswith("Goodbye"):
            pass

    heard = [frame for frame in talk.frames if frame["type"] == "user_transcript"]
    assert [frame["user_transcription_event"]["user_transcript"] for frame in heard] == ["hello", "thanks"]
    assert emulator.records.conversations[0].microphone_seconds == 20


def test_speaking_over_the_agent_interrupts_it_and_later_audio_is_newer(service: Service) -> None:
    with talking(service.mint(), JS_VOICE_INITIATION) as talk:
        talk.next("audio")
        talk.send({"type": "user_message", "text": "hello"})
        interrupted = talk.next("interruption")["interruption_event"]["event_id"]
        newer = talk.next("audio")["audio_event"]["event_id"]

    assert newer > interrupted


def test_pings_carry_the_key_ping_ms_null_first_and_then_never_zero(serve: Serve) -> None:
    emulator = Emulator(agents=[AGENT], ping_interval_seconds=0.01)
    service = serve(emulator)

    with talking(service.mint()) as talk:
        first = talk.next("ping")["ping_event"]
        talk.send({"type": "pong", "event_id": first["event_id"]})
        talk.send({"type": "user_message", "text": "hello"})
        while (measured := talk.next("ping")["ping_event"])["ping_ms"] is None:
            talk.send({"type": "pong", "event_id": measured["event_id"]})

    assert first["ping_ms"] is None
    assert measured["ping_ms"] >= 1
    assert emulator.records.conversations[0].frames_received["pong"] >= 1


def test_frames_without_an_answer_are_tolerated_and_counted(service: Service) -> None:
    silent: list[Frame] = [
        {"type": "user_activity"},
        {"type": "contextual_update", "text": "the user scrolled"},
        {"type": "feedback", "event_id": 1, "score": "like"},
        {"type": "client_tool_result", "tool_call_id": "call_x", "result": "", "is_error": False},
        {"type": "user_message", "text": None},
        {"type": "tomorrow's", "x": 1},
        {"type": ["nothing"]},
        {"user_audio_chunk": "not base64"},
        {},
    ]

    with talking(service.mint()) as talk:
        talk.says()
        for frame in silent:
            talk.send(frame)
        talk.send({"type": "multimodal_message", "text": {"type": "user_message", "text": "hello"}})
        answer = talk.says()

    assert answer == "Hello! What would you like to sell?"
    assert service.emulator.records.conversations[0].frames_received == {
        "user_activity": 1,
        "contextual_update": 1,
        "feedback": 1,
        "client_tool_result": 1,
        "user_message": 1,
        "multimodal_message": 1,
        "user_audio_chunk": 1,
        "unknown": 3,
    }


def test_every_frame_has_the_documented_shape_and_event_ids_never_fall(serve: Serve) -> None:
    emulator = Emulator(agents=[AGENT], ping_interval_seconds=0.01)
    service = serve(emulator)

    with talking(service.mint(), JS_VOICE_INITIATION) as voice:
        voice.send({"user_audio_chunk": SECOND_OF_SOUND})
        voice.next("client_tool_call")
        voice.next("ping")
    with talking(service.mint()) as text:
        text.says()
    with talking(service.mint(), JS_TEXT_INITIATION | {"dynamic_variables": {}}) as refused:
        refused.closed()

    frames = [*voice.frames, *text.frames, *refused.frames]
    for frame in frames:
        _assert_well_formed(frame)
    assert {frame["type"] for frame in frames} == SHAPES.keys()
    ids = [member["event_id"] for frame in voice.frames for member in frame.values() if "event_id" in member]
    assert ids == sorted(ids)


def test_an_agent_without_a_first_message_waits_for_the_user(serve: Serve) -> None:
    agent = EmulatedAgent(agent_id=AGENT.agent_id, first_message="")
    service = serve(Emulator(agents=[agent]))

    with talking(service.mint()) as talk:
        talk.next()
        talk.send({"type": "user_message", "text": "hi"})
        first_words = talk.says()

    assert first_words == "Hello! What would you like to sell?"


def test_the_services_own_variables_cannot_be_set_by_the_client(serve: Serve) -> None:
    agent = EmulatedAgent(agent_id=AGENT.agent_id, first_message="{{system__agent_id}} {{system__is_text_only}}")
    initiation = JS_TEXT_INITIATION | {"dynamic_variables": {"system__agent_id": "agent_forged"}}
    service = serve(Emulator(agents=[agent]))

    with talking(service.mint(), initiation) as talk:
        greeting = talk.says()

    assert greeting == f"{AGENT.agent_id} true"


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def test_no_frame_makes_the_conversation_fail_inside(service: Service) -> None:
    kinds = st.sampled_from(["pong", "user_message", "multimodal_message", "client_tool_result", "feedback", "x"])
    members = st.dictionaries(st.sampled_from(["text", "event_id", "tool_call_id", "user_audio_chunk"]), json_values)

    with talking(service.mint()) as talk:
        talk.says()

        @settings(max_examples=100, deadline=None)
        @given(kinds, members)
        def sent(kind: str, extra: Frame) -> None:
            talk.socket.send(json.dumps({"type": kind} | extra))

        sent()
        talk.send({"type": "user_message", "text": "goodbye"})
        while not talk.says().startswith("Goodbye"):
            pass

    assert service.emulator.records.conversations[0].closed_by != "emulator"
