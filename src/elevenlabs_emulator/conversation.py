"""One open conversation: the handshake, the agent's turns, what the microphone brings, and the end.

Frames have the shapes of the vendor's published message schema.
"""

import asyncio
import base64
import itertools
import json
import math
import re
import secrets
import struct
from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import BaseModel, TypeAdapter
from starlette.websockets import WebSocket, WebSocketDisconnect

from elevenlabs_emulator import script
from elevenlabs_emulator.agents import EmulatedAgent
from elevenlabs_emulator.closings import Refused
from elevenlabs_emulator.records import RecordedConversation
from elevenlabs_emulator.service import Emulator

_FIRST_FRAME_SECONDS = 10
_PING_SECONDS = 2

_FRAME = TypeAdapter(dict[str, object])
_PLACEHOLDER = re.compile(r"\{\{\s*+([\w.-]++)\s*+\}\}")
# The member that holds the event, where it is not `<type>_event`.
_EVENTS = {
    "agent_chat_response_part": "text_response_part",
    "client_tool_call": "client_tool_call",
    "user_transcript": "user_transcription_event",
}

_AUDIO_FORMAT = "pcm_16000"  # signed 16-bit little-endian mono samples, 16 000 a second
_SAMPLES_PER_SECOND = 16_000
_TONE_SECONDS = 0.25
_SECONDS_PER_SPOKEN_LINE = 3  # of microphone audio: time enough for the agent to end its answer to the line before


class Initiation(BaseModel):
    """What matters of the client's first frame."""

    type: Literal["conversation_initiation_client_data"]
    conversation_config_override: dict[str, object] = {}
    dynamic_variables: dict[str, str | int | float | bool] = {}


class Conversation:
    """Talks to one accepted WebSocket until either side ends it.

    One task does everything: pings are sent between two frames, so nothing is left running when the socket is gone.
    """

    def __init__(
        self, websocket: WebSocket, *, emulator: Emulator, agent: EmulatedAgent, record: RecordedConversation
    ) -> None:
        self._websocket, self._emulator, self._agent, self._record = websocket, emulator, agent, record
        self._event_ids = itertools.count(1)
        self._text_only = False
        self._order = script.Order()
        self._tool_calls: dict[str, script.Order] = {}
        self._spoken_lines = iter(script.SPOKEN_LINES)
        self._next_line_at_seconds = float(_SECONDS_PER_SPOKEN_LINE)
        self._speaking_until = 0.0

    async def hold(self, *, forced: str | None = None) -> None:
        """Hold the conversation, or only begin it when `forced` names the closing that it must end with.

        Raises `Refused` or pydantic's `ValidationError` when the client must go, `WebSocketDisconnect` when it went.
        """
        initiation = await self._initiation()
        # Nothing may come before the metadata: the JavaScript SDK hangs on any other first frame.
        await self._send(
            "conversation_initiation_metadata",
            conversation_id=self._record.conversation_id,
            agent_output_audio_format=_AUDIO_FORMAT,
            user_input_audio_format=_AUDIO_FORMAT,
        )
        if forced:
            raise Refused(forced)
        self._override(initiation.conversation_config_override)
        await self._say(self._greeting(initiation.dynamic_variables))
        await self._listen()

    async def _initiation(self) -> Initiation:
        try:
            async with asyncio.timeout(_FIRST_FRAME_SECONDS):
                frame = await self._receive()
        except TimeoutError as late:
            raise Refused("first_frame_timeout") from late
        self._record.initiation = self._emulator.records.scrubbed(frame)
        return Initiation.model_validate(frame)

    def _override(self, override: Mapping[str, object]) -> None:
        wishes = dict(_leaves(override))
        # The Python SDK says text_only outside `conversation`, where no permission is asked for.
        if forbidden := sorted(wishes.keys() - self._agent.allowed_overrides - {"text_only"}):
            raise Refused("override_not_allowed", field=forbidden[0].rpartition(".")[2])
        language = str(wishes.get("agent.language", self._agent.language))
        if language not in {self._agent.language, *self._agent.languages}:
            raise Refused("language_unsupported", language=language)
        self._text_only = True in (wishes.get("text_only"), wishes.get("conversation.text_only"))

    def _greeting(self, variables: Mapping[str, object]) -> str:
        first_message = self._agent.first_message
        wanted = {
            "first message": set(_PLACEHOLDER.findall(first_message)),
            "prompt": set(_PLACEHOLDER.findall(self._agent.prompt)),
            "tools": self._agent.tool_variables,
        }
        for place, names in wanted.items():
            if missing := sorted(name for name in names - variables.keys() if not name.startswith("system__")):
                raise Refused("variables_missing", place=place, variables=", ".join(map(repr, missing)))
        return _PLACEHOLDER.sub(lambda match: str(variables.get(match[1], match[1])), first_message)

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        ping_at = loop.time() + _PING_SECONDS
        while True:
            try:
                async with asyncio.timeout_at(ping_at):
                    frame = await self._receive()
            except TimeoutError:
                # Nothing is measured, but the key must be there: the Python SDK reads it without a default.
                await self._send("ping", event_id=next(self._event_ids), ping_ms=None)
                ping_at = loop.time() + _PING_SECONDS
            else:
                await self._handle(frame)

    async def _handle(self, frame: Mapping[str, object]) -> None:
        kind = "user_audio_chunk" if "user_audio_chunk" in frame else str(frame.get("type"))
        self._record.frames_received[self._emulator.records.scrubbed_text(kind)] += 1
        match frame:
            case {"user_audio_chunk": str(chunk)}:
                await self._hear(chunk)
            case {"type": "user_message", "text": str(text)}:
                await self._answer(text)
            case {"type": "client_tool_result", "tool_call_id": str(call_id)} if call_id in self._tool_calls:
                order, is_error = self._tool_calls.pop(call_id), frame.get("is_error") is True
                await self._say(script.outcome(order, str(frame.get("result")), is_error=is_error))

    async def _hear(self, chunk_base_64: str) -> None:
        """Count the audio, whatever is in it: enough of it, and the next line of the script counts as spoken."""
        samples = len(chunk_base_64) * 3 / 4 / 2
        self._record.microphone_seconds += samples / _SAMPLES_PER_SECOND
        if self._text_only or self._record.microphone_seconds < self._next_line_at_seconds:
            return
        self._next_line_at_seconds += _SECONDS_PER_SPOKEN_LINE
        if line := next(self._spoken_lines, None):
            await self._send("user_transcript", user_transcript=line, event_id=next(self._event_ids))
            await self._answer(line)

    async def _answer(self, line: str) -> None:
        if asyncio.get_running_loop().time() < self._speaking_until:
            self._speaking_until = 0
            # Clients drop what they have of audio whose event id does not exceed this one.
            await self._send("interruption", event_id=next(self._event_ids))
        words, self._order = script.answer(line, self._order)
        await self._say(words)
        if self._order.is_complete:
            call_id = f"call_{secrets.token_hex(8)}"
            await self._send(
                "client_tool_call",
                tool_name="create_product",
                tool_call_id=call_id,
                parameters=self._order.parameters,
                event_id=next(self._event_ids),
            )
            self._tool_calls[call_id] = self._order
            self._order = script.Order()

    async def _say(self, text: str) -> None:
        if not text:
            return  # an agent without a first message waits for the user
        event_id = next(self._event_ids)
        if self._text_only:
            parts = [("start", ""), *(("delta", word) for word in re.findall(r"\S+\s*", text)), ("stop", "")]
            for kind, part in parts:
                await self._send("agent_chat_response_part", type=kind, text=part, event_id=event_id)
        await self._send("agent_response", agent_response=text, event_id=event_id)
        if self._text_only:
            return
        for _ in range(min(2 + len(text) // 25, 6)):
            await self._send("audio", audio_base_64=_TONE, event_id=next(self._event_ids))
            self._speaking_until = max(self._speaking_until, asyncio.get_running_loop().time()) + _TONE_SECONDS

    async def _send(self, kind: str, **event: object) -> None:
        await self._websocket.send_text(framed(kind, **event))

    async def _receive(self) -> dict[str, object]:
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005), message.get("reason"))
        return _FRAME.validate_json(message.get("text") or "")


def framed(kind: str, **event: object) -> str:
    """Put an event into a frame of its type."""
    return json.dumps({"type": kind, _EVENTS.get(kind, f"{kind}_event"): event})


def _leaves(override: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """List what is overridden, by dotted path. An empty object, as the JavaScript SDK always sends, is nothing."""
    for name, member in override.items():
        if isinstance(member, dict):
            yield from _leaves(member, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", member


def _tone() -> str:
    """Synthesise a soft tone that swells and fades, in base64."""
    count = int(_TONE_SECONDS * _SAMPLES_PER_SECOND)
    loudness = [2_600 * math.sin(math.pi * n / count) for n in range(count)]
    samples = [int(loudness[n] * math.sin(math.tau * 330 * n / _SAMPLES_PER_SECOND)) for n in range(count)]
    return base64.b64encode(struct.pack(f"<{count}h", *samples)).decode()


_TONE = _tone()
