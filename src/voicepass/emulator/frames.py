"""The JSON frames the service sends, shaped as the vendor's published message schema has them."""

from collections.abc import Mapping
from typing import Literal

from voicepass.emulator.closings import Closing

Frame = dict[str, object]

AUDIO_FORMAT = "pcm_16000"


def metadata(conversation_id: str) -> Frame:
    """Say that the conversation is on. It must be the first frame: the JavaScript SDK hangs on any other."""
    return {
        "type": "conversation_initiation_metadata",
        "conversation_initiation_metadata_event": {
            "conversation_id": conversation_id,
            "agent_output_audio_format": AUDIO_FORMAT,
            "user_input_audio_format": AUDIO_FORMAT,
        },
    }


def ping(event_id: int, ping_ms: int | None) -> Frame:
    """Ask for a pong. The key `ping_ms` is always there: the Python SDK reads it without a default."""
    return {"type": "ping", "ping_event": {"event_id": event_id, "ping_ms": ping_ms}}


def agent_response(event_id: int, text: str) -> Frame:
    """Say a whole sentence of the agent."""
    return {"type": "agent_response", "agent_response_event": {"agent_response": text, "event_id": event_id}}


def agent_chat_response_part(event_id: int, part: Literal["start", "delta", "stop"], text: str = "") -> Frame:
    """Say a piece of a sentence, as text conversations do before the whole."""
    return {
        "type": "agent_chat_response_part",
        "text_response_part": {"text": text, "type": part, "event_id": event_id},
    }


def audio(event_id: int, audio_base_64: str) -> Frame:
    """Let the agent be heard: raw signed 16-bit little-endian mono samples at 16 kHz."""
    return {"type": "audio", "audio_event": {"audio_base_64": audio_base_64, "event_id": event_id}}


def interruption(event_id: int) -> Frame:
    """Stop what is playing: clients drop audio whose event id does not exceed this one."""
    return {"type": "interruption", "interruption_event": {"event_id": event_id}}


def user_transcript(event_id: int, text: str) -> Frame:
    """Say what was understood of the user's voice."""
    return {"type": "user_transcript", "user_transcription_event": {"user_transcript": text, "event_id": event_id}}


def client_tool_call(event_id: int, *, tool_call_id: str, tool_name: str, parameters: Mapping[str, object]) -> Frame:
    """Ask the client to run one of its tools and to send a `client_tool_result` with the same id."""
    return {
        "type": "client_tool_call",
        "client_tool_call": {
            "tool_name": tool_name,
            "tool_call_id": tool_call_id,
            "parameters": dict(parameters),
            "event_id": event_id,
        },
    }


def error(closing: Closing) -> Frame:
    """Say why the socket is about to be closed."""
    event: dict[str, object] = {"code": closing.code, "message": closing.reason, "reason": closing.reason}
    if closing.error_type:
        event["error_type"] = closing.error_type
    return {"type": "error", "error_event": event}
