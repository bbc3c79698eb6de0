"""What the emulator must send: the vendor's published message schema as models, and those of its Python SDK.

The message schema is `packages/types/schemas/agent.asyncapi.yaml` of elevenlabs/packages. It lacks `queue_status`,
which only the vendor's widget shows.
"""

import functools
import re
import typing
from typing import Any, Literal

from elevenlabs import types
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

Frame = dict[str, Any]


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


AudioFormat = Literal["pcm_8000", "pcm_16000", "pcm_22050", "pcm_24000", "pcm_44100", "pcm_48000", "ulaw_8000"]
ErrorType = Literal[
    "unknown",
    "invalid_message",
    "override_error",
    "missing_dynamic_variable",
    "custom_llm_error",
    "max_duration_exceeded",
]


class Metadata(StrictModel):
    conversation_id: str
    agent_output_audio_format: AudioFormat
    user_input_audio_format: AudioFormat


class Alignment(StrictModel):
    chars: list[str]
    char_start_times_ms: list[int]
    char_durations_ms: list[int]


class Event(StrictModel):
    event_id: int


class Ping(Event):
    ping_ms: int | None  # optional in the schema, but the Python SDK reads it without a default


class Audio(Event):
    audio_base_64: str = Field(min_length=1)
    alignment: Alignment | None = None


class UserTranscript(Event):
    user_transcript: str


class AgentResponse(Event):
    agent_response: str


class Correction(Event):
    original_agent_response: str
    corrected_agent_response: str


class ResponsePart(Event):
    text: str
    type: Literal["start", "delta", "stop"]


class ToolCall(Event):
    tool_name: str
    tool_call_id: str
    parameters: dict[str, Any]


class ToolResponse(Event):
    tool_name: str
    tool_call_id: str
    tool_type: str
    is_error: bool
    is_called: bool


class VadScore(StrictModel):
    vad_score: float = Field(ge=0, le=1)


class QueueStatus(StrictModel):
    status: Literal["waiting", "admitted", "timed_out"]


class Error(StrictModel):
    code: Literal[1000, 1002, 1008, 1011]
    message: str
    reason: str
    error_type: ErrorType | None = None


# type -> the member that contains the event, and the event's model
FRAMES: dict[str, tuple[str, type[BaseModel]]] = {
    "agent_chat_response_part": ("text_response_part", ResponsePart),
    "agent_response": ("agent_response_event", AgentResponse),
    "agent_response_correction": ("agent_response_correction_event", Correction),
    "agent_tool_response": ("agent_tool_response", ToolResponse),
    "audio": ("audio_event", Audio),
    "client_tool_call": ("client_tool_call", ToolCall),
    "conversation_initiation_metadata": ("conversation_initiation_metadata_event", Metadata),
    "error": ("error_event", Error),
    "interruption": ("interruption_event", Event),
    "ping": ("ping_event", Ping),
    "queue_status": ("queue_status_event", QueueStatus),
    "tentative_user_transcript": ("tentative_user_transcription_event", UserTranscript),
    "user_transcript": ("user_transcription_event", UserTranscript),
    "vad_score": ("vad_score_event", VadScore),
}


def check_frame(frame: Frame) -> None:
    """Raise unless the frame is valid by the message schema."""
    member, event = FRAMES[frame["type"]]
    assert frame.keys() == {"type", member}
    event.model_validate(frame[member])


_CONVAI = "/v1/convai"
# path -> the name of the SDK's model of the answer (the SDK imports a model when it is first named, in seconds)
ANSWERS: dict[str, str] = {
    f"{_CONVAI}/conversation/get.signed.url": "ConversationSignedUrlResponseModel",
    f"{_CONVAI}/conversation/token": "TokenResponseModel",
    f"{_CONVAI}/conversations": "GetConversationsPageResponseModel",
    f"{_CONVAI}/conversations/[^/]+": "GetConversationResponseModel",
    f"{_CONVAI}/agents/[^/]+": "GetAgentResponseModel",
    f"{_CONVAI}/agents/[^/]+/widget": "GetAgentEmbedResponseModel",
    f"{_CONVAI}/tools/[^/]+": "ToolResponseModel",
    f"{_CONVAI}/settings": "GetConvAiSettingsResponseModel",
    f"{_CONVAI}/analytics/live-count": "GetLiveCountResponse",
    "/v1/workspace/webhooks": "WorkspaceWebhookListResponseModel",
}


class LiveError(StrictModel):
    type: str
    code: str
    message: str
    status: str
    request_id: str


class InvalidParameter(BaseModel):
    loc: list[str | int]
    msg: str
    type: str


class ErrorAnswer(StrictModel):
    detail: LiveError | list[InvalidParameter] | Literal["Method Not Allowed"]


def check_answer(method: str, path: str, status: int, body: str) -> None:
    """Raise unless the answer is valid by the SDK's models, or an error in the live form."""
    if status >= 400:
        ErrorAnswer.model_validate_json(body)
        return
    if method == "GET":
        (model,) = (model for pattern, model in ANSWERS.items() if re.fullmatch(pattern, path))
        check_strictly(model, body)


def check_strictly(model: str, body: str) -> None:
    """Raise if the answer does not match the SDK's model. The SDK itself accepts any answer."""
    _check_members(_find_adapter(model).validate_json(body, strict=True))


@functools.cache
def _find_adapter(model: str) -> TypeAdapter[Any]:
    return TypeAdapter(getattr(types, model))


def _check_members(value: object) -> None:
    if isinstance(value, BaseModel):
        assert not value.model_extra, f"{type(value).__name__} has no {list(value.model_extra)}"
        for name, field in type(value).model_fields.items():
            member = getattr(value, name)
            allowed = _list_literals(field.annotation)
            assert member is None or not allowed or member in allowed, f"{type(value).__name__}.{name}: {member!r}"
            _check_members(member)
    for member in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_members(member)


def _list_literals(annotation: Any) -> list[Any]:
    """List the values of an enumeration, which the SDK writes as `Union[Literal[…], Any]`."""
    members = typing.get_args(annotation)
    return [value for each in members if typing.get_origin(each) is Literal for value in typing.get_args(each)]
