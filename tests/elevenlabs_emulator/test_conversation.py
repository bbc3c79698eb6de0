"""What is said over the WebSocket once the door is open."""

import base64

import pytest

from elevenlabs_emulator import EmulatedAgent, Emulator
from tests.elevenlabs_emulator.wire import (
    AGENT,
    JS_TEXT_INITIATION,
    JS_VOICE_INITIATION,
    Serve,
    Service,
    parameters,
    talking,
)

SECOND_OF_AUDIO = base64.b64encode(bytes(32_000)).decode()
SALE = "I want to sell eggs for 2 dollars each"

# The members of each type's event, from the vendor's message schema.
SHAPES = {
    "conversation_initiation_metadata": (
        "conversation_initiation_metadata_event",
        {"conversation_id", "agent_output_audio_format", "user_input_audio_format"},
    ),
    "ping": ("ping_event", {"event_id", "ping_ms"}),
    "agent_response": ("agent_response_event", {"event_id", "agent_response"}),
    "agent_chat_response_part": ("text_response_part", {"event_id", "type", "text"}),
    "audio": ("audio_event", {"event_id", "audio_base_64"}),
    "interruption": ("interruption_event", {"event_id"}),
    "user_transcript": ("user_transcription_event", {"event_id", "user_transcript"}),
    "client_tool_call": ("client_tool_call", {"event_id", "tool_call_id", "tool_name", "parameters"}),
    "error": ("error_event", {"code", "message", "reason", "error_type"}),
}


def test_every_frame_has_the_documented_shape_and_event_ids_never_fall(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elevenlabs_emulator.conversation._PING_SECONDS", 0.05)

    with talking(service.mint(), JS_VOICE_INITIATION) as voice:
        for _ in range(3):
            voice.send("", user_audio_chunk=SECOND_OF_AUDIO)
        voice.next("client_tool_call")
        voice.next("ping")
    with talking(service.mint()) as text:
        text.says()
    with talking(service.mint(), JS_TEXT_INITIATION | {"dynamic_variables": {}}) as refused:
        refused.closed()

    frames = [*voice.frames, *text.frames, *refused.frames]
    for frame in frames:
        event_name, members = SHAPES[frame["type"]]
        assert frame.keys() == {"type", event_name}
        assert frame[event_name].keys() == members
    assert {frame["type"] for frame in frames} == SHAPES.keys()
    ids = [event["event_id"] for frame in voice.frames for event in frame.values() if "event_id" in event]
    assert ids == sorted(ids)


def test_the_first_frame_is_the_metadata_and_names_the_conversation_of_the_url(service: Service) -> None:
    url = service.mint(include_conversation_id="true")

    with talking(url) as talk:
        event = talk.next()["conversation_initiation_metadata_event"]

    assert event == {
        "conversation_id": parameters(url)["conversation_id"],
        "agent_output_audio_format": "pcm_16000",
        "user_input_audio_format": "pcm_16000",
    }


def test_the_subprotocol_is_answered_only_when_offered(service: Service) -> None:
    with talking(service.mint(), subprotocol="convai") as browser, talking(service.mint()) as python:
        assert browser.socket.subprotocol == "convai"
        assert python.socket.subprotocol is None


def test_an_order_is_taken_created_and_confirmed(service: Service) -> None:
    with talking(service.mint()) as talk:
        greeting = talk.says()
        talk.send("user_message", text=SALE)
        repeated = talk.says()
        call = talk.next("client_tool_call")["client_tool_call"]
        talk.send("client_tool_result", tool_call_id="call_of_somebody", result="ok", is_error=True)
        talk.send("client_tool_result", tool_call_id=call["tool_call_id"], result="ok", is_error=False)
        confirmed = talk.says()

    assert greeting == "Hello Ada! What would you like to sell today?"
    assert "eggs for $2 each" in repeated
    assert call["tool_name"] == "create_product"
    assert call["parameters"] == {"item": "eggs", "price": 2, "currency": "USD", "unit": "each"}
    assert confirmed.startswith("Done! You are now selling eggs")


def test_in_text_the_sentence_comes_in_parts_and_then_whole(service: Service) -> None:
    with talking(service.mint()) as talk:
        whole = talk.says()

    parts = [frame["text_response_part"] for frame in talk.frames if "text_response_part" in frame]
    assert [part["type"] for part in parts] == ["start", *["delta"] * len(whole.split()), "stop"]
    assert "".join(part["text"] for part in parts) == whole


def test_a_line_is_heard_for_every_three_seconds_of_audio_until_the_script_ends(service: Service) -> None:
    with talking(service.mint(), JS_VOICE_INITIATION) as talk:
        for _ in range(20):
            talk.send("", user_audio_chunk=SECOND_OF_AUDIO)
        talk.send("user_message", text="hello")
        while not talk.says().startswith("Hello!"):
            pass

    heard = [frame["user_transcription_event"] for frame in talk.frames if frame["type"] == "user_transcript"]
    assert [event["user_transcript"] for event in heard] == [
        SALE,
        "I am also selling honey for 7.50 a jar",
        "That is all, thank you, goodbye",
    ]


def test_speaking_over_the_agent_interrupts_it_and_later_audio_is_newer(service: Service) -> None:
    with talking(service.mint(), JS_VOICE_INITIATION) as talk:
        talk.next("audio")
        talk.send("user_message", text="hello")
        interrupted = talk.next("interruption")["interruption_event"]["event_id"]
        audio = talk.next("audio")["audio_event"]

    assert audio["event_id"] > interrupted
    assert any(base64.b64decode(audio["audio_base_64"]))
    assert "agent_chat_response_part" not in talk.kinds


def test_frames_without_an_answer_are_tolerated_and_counted(service: Service) -> None:
    with talking(service.mint()) as talk:
        talk.says()
        talk.send("pong", event_id=7)
        talk.send("contextual_update", text="the user looks at eggs")
        talk.send("client_tool_result", tool_call_id=["call_unknown"], result="ok")
        talk.send("user_message", text=7)
        talk.send("", user_audio_chunk=SECOND_OF_AUDIO)
        talk.send("user_message", text="hello")
        answer = talk.says()

    assert answer == "Hello! What would you like to sell?"
    assert service.emulator.records.conversations[0].frames_received == {
        "pong": 1,
        "contextual_update": 1,
        "client_tool_result": 1,
        "user_message": 2,
        "user_audio_chunk": 1,
    }


def test_an_agent_without_a_first_message_waits_for_the_user(serve: Serve) -> None:
    service = serve(Emulator(agents=[EmulatedAgent(agent_id=AGENT.agent_id, first_message="")]))

    with talking(service.mint()) as talk:
        talk.send("user_message", text="hi")
        assert talk.says() == "Hello! What would you like to sell?"
