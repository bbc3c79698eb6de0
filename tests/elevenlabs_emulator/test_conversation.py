"""What the client and the emulator send over the WebSocket of a conversation."""

import base64
import itertools
import json

import pytest

from elevenlabs_emulator import EmulatedAgent, Emulator
from elevenlabs_emulator.script import ORDERS, SPOKEN_LINES
from tests.elevenlabs_emulator.contract import FRAMES, Frame
from tests.elevenlabs_emulator.wire import (
    AGENT,
    JS_TEXT_INITIATION,
    JS_VOICE_INITIATION,
    Serve,
    Service,
    open_conversation,
    parameters,
)

SECOND_OF_AUDIO = base64.b64encode(bytes(32_000)).decode()
SALE = "I want to sell eggs for 2 dollars each"


def hold_every_kind_of_conversation(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> list[Frame]:
    """Hold conversations with every kind of frame; return the frames. `Talk` checks each of them."""
    monkeypatch.setattr("elevenlabs_emulator.conversation._PING_SECONDS", 0.05)
    events = AGENT.client_events | {"vad_score", "agent_tool_response"}
    agent = AGENT.model_copy(update={"client_events": events, "concurrency_limit": 1, "spoken_lines": ORDERS})
    service = serve(Emulator(agents=[agent]))
    with open_conversation(service.mint(), JS_VOICE_INITIATION) as voice:
        for _ in range(3):
            voice.send("", user_audio_chunk=SECOND_OF_AUDIO)
        call = voice.next("client_tool_call")["client_tool_call"]
        voice.send("client_tool_result", tool_call_id=call["tool_call_id"], result="ok", is_error=False)
        voice.next("agent_tool_response")
        voice.send("pong", event_id=voice.next("ping")["ping_event"]["event_id"])
        pings = (voice.next("ping")["ping_event"] for _ in range(50))  # some may be on their way before the pong
        assert next(ping for ping in pings if ping["ping_ms"] is not None)
        with open_conversation(service.mint()) as queued:
            queued.next("queue_status")
            voice.socket.close()
            queued.read_answer()
    with open_conversation(service.mint(), JS_TEXT_INITIATION | {"dynamic_variables": {}}) as refused:
        refused.read_close()
    return [*voice.frames, *queued.frames, *refused.frames]


def test_every_kind_of_frame_is_sent_and_event_ids_never_fall(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = hold_every_kind_of_conversation(serve, monkeypatch)

    assert {frame["type"] for frame in frames} == FRAMES.keys()
    of_voice = list(itertools.takewhile(lambda frame: frame["type"] != "queue_status", frames))
    ids = [event["event_id"] for frame in of_voice for event in frame.values() if "event_id" in event]
    assert ids == sorted(ids)
    round_trips = [frame["ping_event"]["ping_ms"] for frame in of_voice if frame["type"] == "ping"]
    assert round_trips[0] is None
    assert 0 <= round_trips[-1] < 5_000


def test_the_first_frame_is_the_metadata_and_names_the_conversation_of_the_url(service: Service) -> None:
    url = service.mint(include_conversation_id="true")

    with open_conversation(url) as talk:
        event = talk.next()["conversation_initiation_metadata_event"]

    assert event == {
        "conversation_id": parameters(url)["conversation_id"],
        "agent_output_audio_format": "pcm_16000",
        "user_input_audio_format": "pcm_16000",
    }


def test_the_subprotocol_is_answered_only_when_offered(service: Service) -> None:
    with (
        open_conversation(service.mint(), subprotocol="convai") as browser,
        open_conversation(service.mint()) as python,
    ):
        assert browser.socket.subprotocol == "convai"
        assert python.socket.subprotocol is None


def test_the_agent_repeats_an_order_creates_the_product_and_confirms_it(service: Service) -> None:
    with open_conversation(service.mint()) as talk:
        greeting = talk.read_answer()
        talk.send("user_message", text=SALE)
        repeated = talk.read_answer()
        call = talk.next("client_tool_call")["client_tool_call"]
        talk.send("client_tool_result", tool_call_id="call_of_somebody", result="ok", is_error=True)
        talk.send("client_tool_result", tool_call_id=call["tool_call_id"], result="ok", is_error=False)
        confirmed = talk.read_answer()

    assert greeting == "Hello Ada! What would you like to sell today?"
    assert "eggs for $2 each" in repeated
    assert call["tool_name"] == "create_product"
    assert call["parameters"] == {"item": "eggs", "price": 2, "currency": "USD", "unit": "each"}
    assert confirmed.startswith("Done! You are now selling eggs")


def test_in_text_each_sentence_is_sent_in_parts_and_then_as_a_whole(service: Service) -> None:
    with open_conversation(service.mint()) as talk:
        whole = talk.read_answer()

    parts = [frame["text_response_part"] for frame in talk.frames if "text_response_part" in frame]
    assert [part["type"] for part in parts] == ["start", *["delta"] * len(whole.split()), "stop"]
    assert "".join(part["text"] for part in parts) == whole


def test_three_seconds_of_audio_count_as_one_line_and_goodbye_ends_the_call(service: Service) -> None:
    with open_conversation(service.mint(), JS_VOICE_INITIATION) as talk:
        for _ in range(9):
            talk.send("", user_audio_chunk=SECOND_OF_AUDIO)
        closing = talk.read_close()

    assert closing == (1000, "")
    assert {"error", "client_tool_call"} & {*talk.kinds} == set()
    transcripts = [frame["user_transcription_event"] for frame in talk.frames if frame["type"] == "user_transcript"]
    assert tuple(event["user_transcript"] for event in transcripts) == SPOKEN_LINES


def test_a_message_while_the_agent_speaks_interrupts_and_corrects_it(service: Service) -> None:
    with open_conversation(service.mint(), JS_VOICE_INITIATION) as talk:
        greeting = talk.read_answer()
        talk.next("audio")
        talk.send("user_message", text="hello")
        interrupted = talk.next("interruption")["interruption_event"]["event_id"]
        correction = talk.next("agent_response_correction")["agent_response_correction_event"]
        audio = talk.next("audio")["audio_event"]

    assert correction["original_agent_response"] == greeting
    assert greeting.startswith(correction["corrected_agent_response"])
    assert correction["corrected_agent_response"] != greeting
    assert audio["event_id"] > interrupted
    assert any(base64.b64decode(audio["audio_base_64"]))
    assert "agent_chat_response_part" not in talk.kinds


def test_frames_that_need_no_answer_are_accepted_and_counted(service: Service) -> None:
    with open_conversation(service.mint()) as talk:
        talk.read_answer()
        talk.send("pong", event_id=7)
        talk.send("contextual_update", text="the user looks at eggs")
        talk.send("client_tool_result", tool_call_id=["call_unknown"], result="ok")
        talk.send("user_message", text=7)
        talk.send("", user_audio_chunk=SECOND_OF_AUDIO)
        talk.send("user_message", text="hello")
        answer = talk.read_answer()

    assert answer == "Hello! What would you like to sell?"
    assert service.emulator.records.conversations[0].frames_received == {
        "pong": 1,
        "contextual_update": 1,
        "client_tool_result": 1,
        "user_message": 2,
        "user_audio_chunk": 1,
    }


def test_the_audio_of_a_sentence_names_the_characters_that_it_contains(service: Service) -> None:
    with open_conversation(service.mint(), JS_VOICE_INITIATION) as talk:
        greeting = talk.read_answer()
        spoken = ""
        while spoken != greeting:
            spoken += "".join(talk.next("audio")["audio_event"]["alignment"]["chars"])
            assert greeting.startswith(spoken)


def test_a_file_and_text_are_answered_and_binary_frames_are_read(service: Service) -> None:
    file = {"type": "file_input", "file_id": "file_1"}
    with open_conversation(service.mint(), None) as talk:
        talk.socket.send(json.dumps(JS_TEXT_INITIATION).encode())
        talk.read_answer()
        talk.send("multimodal_message", file=file)
        about_file = talk.read_answer()
        talk.send("multimodal_message", text={"type": "user_message", "text": "hello"}, file=file)
        about_text = talk.read_answer()

    assert about_file == "I got your file, but I can only read text."
    assert about_text == "Hello! What would you like to sell?"


def test_an_invalid_frame_during_a_conversation_gets_an_error_event_before_the_close(service: Service) -> None:
    with open_conversation(service.mint()) as talk:
        talk.read_answer()
        talk.socket.send("{")
        closing = talk.read_close()

    error = talk.frames[-1]["error_event"]
    assert closing == (1008, "Invalid message received")
    assert (error["code"], error["error_type"]) == (1008, "invalid_message")


def test_null_overrides_and_variables_count_as_absent(serve: Serve) -> None:
    service = serve(Emulator(agents=[AGENT.model_copy(update={"first_message": "Hi"})]))
    nothing = {"conversation_config_override": None, "dynamic_variables": None, "user_id": None}

    with open_conversation(service.mint(), JS_VOICE_INITIATION | nothing) as talk:
        assert talk.read_answer() == "Hi"


def test_an_agent_without_a_first_message_waits_for_the_user(serve: Serve) -> None:
    service = serve(Emulator(agents=[EmulatedAgent(agent_id=AGENT.agent_id, first_message="")]))

    with open_conversation(service.mint()) as talk:
        talk.send("user_message", text="hi")
        assert talk.read_answer() == "Hello! What would you like to sell?"
