"""The frames of a conversation, in the shapes of the vendor's published message schema."""

import base64
import itertools
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, StrictStr, TypeAdapter
from starlette.websockets import WebSocket, WebSocketDisconnect

from elevenlabs_emulator.failures import read_table

AUDIO_FORMAT = "pcm_16000"  # signed 16-bit little-endian mono samples, 16,000 a second
SAMPLES_PER_SECOND = 16_000
TONE_SECONDS = 0.25

_FRAME = TypeAdapter(dict[str, object])
_EVENTS = read_table("events.toml")


def _refuse_system_name(name: str) -> str:
    if name.startswith("system__"):
        raise ValueError("only the service sets variables named system__…")
    return name


class Initiation(BaseModel):
    """The client's first frame, as far as the vendor's model of a conversation shows it."""

    type: Literal["conversation_initiation_client_data"]
    conversation_config_override: dict[str, object] | None = None
    dynamic_variables: dict[Annotated[str, AfterValidator(_refuse_system_name)], str | int | float | bool] | None = None
    user_id: StrictStr | None = None
    source_info: object = None
    custom_llm_extra_body: object = None
    branch_id: object = None
    environment: object = None

    def list_overrides(self) -> dict[str, object]:
        """List what the client overrides, by dotted path."""
        return dict(_list_leaves(self.conversation_config_override or {}))


class Channel:
    """Sends and receives the frames of one accepted WebSocket."""

    def __init__(self, websocket: WebSocket, *, client_events: Iterable[str]) -> None:
        self._websocket, self._kinds = websocket, {*_EVENTS["always_sent"], *client_events}
        self._event_ids = itertools.count(1)

    async def send(self, kind: str, **event: object) -> None:
        """Send an event, if the agent's settings let the client have it."""
        if kind in self._kinds:
            frame = {"type": kind, _EVENTS["members"].get(kind, f"{kind}_event"): event}
            await self._websocket.send_text(json.dumps(frame))

    async def send_numbered(self, kind: str, **event: object) -> int:
        """Send an event with the next event id, and return the id."""
        event_id = next(self._event_ids)
        await self.send(kind, event_id=event_id, **event)
        return event_id

    async def receive(self) -> dict[str, object]:
        """Wait for a frame. Raises pydantic's `ValidationError` or `WebSocketDisconnect`."""
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005), message.get("reason"))
        return _FRAME.validate_json(message.get("text") or message.get("bytes") or "")


def split_speech(text: str) -> list[dict[str, object]]:
    """Return the audio of a sentence: tones of equal length, each with its characters."""
    count = min(2 + len(text) // 25, 6)
    size = math.ceil(len(text) / count)
    return [{"audio_base_64": _TONE, "alignment": _align(text[n * size : (n + 1) * size])} for n in range(count)]


def _align(text: str) -> dict[str, object]:
    step = int(TONE_SECONDS * 1000) // max(1, len(text))
    starts = [n * step for n in range(len(text))]
    return {"chars": list(text), "char_start_times_ms": starts, "char_durations_ms": [step] * len(text)}


def _list_leaves(override: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    # An empty object, which the JavaScript SDK always sends, overrides nothing; nor does null.
    for name, member in override.items():
        if isinstance(member, dict):
            yield from _list_leaves(member, f"{prefix}{name}.")
        elif member is not None:
            yield f"{prefix}{name}", member


def _make_tone() -> str:
    """Synthesise a soft tone that swells and fades, in base64."""
    count = int(TONE_SECONDS * SAMPLES_PER_SECOND)
    loudness = [2_600 * math.sin(math.pi * n / count) for n in range(count)]
    samples = [int(loudness[n] * math.sin(math.tau * 330 * n / SAMPLES_PER_SECOND)) for n in range(count)]
    return base64.b64encode(struct.pack(f"<{count}h", *samples)).decode()


_TONE = _make_tone()
