"""One open conversation: the handshake, the agent's turns, what the microphone brings, and the end."""

import asyncio
import json
import re
import secrets
from collections.abc import Mapping

from starlette.websockets import WebSocket, WebSocketDisconnect

from voicepass.emulator import frames, script, sound
from voicepass.emulator.closings import Refused
from voicepass.emulator.records import RecordedConversation, scrubbed
from voicepass.emulator.service import Admission, Emulator

_CLIENT_FRAMES = frozenset(
    {
        "client_tool_result",
        "contextual_update",
        "feedback",
        "mcp_tool_approval_result",
        "multimodal_message",
        "pong",
        "user_activity",
        "user_message",
    }
)


class Conversation:
    """Talks to one accepted WebSocket until either side ends it.

    One task does everything: pings are sent between two frames, so nothing is left running when the socket is gone.
    """

    def __init__(
        self, websocket: WebSocket, *, emulator: Emulator, admission: Admission, record: RecordedConversation
    ) -> None:
        self._websocket, self._emulator, self._admission, self._record = websocket, emulator, admission, record
        self._agent = script.OrderTaker()
        self._text_only = False
        self._event_id = 0
        self._pending_tool: str | None = None
        self._pinged: tuple[int, float] = (0, 0.0)
        self._ping_ms: int | None = None
        self._speaking_until = 0.0
        self._lines = iter(emulator.spoken_lines)
        self._sound_seconds = self._audio_seconds = self._unheard_seconds = 0.0

    async def hold(self) -> None:
        """Hold the conversation until it must be closed (`Refused`) or the client has gone (`WebSocketDisconnect`)."""
        initiation = await self._initiation()
        await self._send(frames.metadata(self._admission.conversation_id))
        if self._admission.forced:
            raise Refused(self._admission.forced)
        variables = self._accepted(initiation)
        await self._say(script.filled(self._admission.agent.first_message, variables))
        await self._listen()

    async def _initiation(self) -> dict[str, object]:
        try:
            async with asyncio.timeout(self._emulator.first_frame_timeout_seconds):
                frame = await self._receive()
        except TimeoutError as late:
            raise Refused("first_frame_timeout") from late
        if frame.get("type") != "conversation_initiation_client_data":
            raise Refused("invalid_message")
        self._record.initiation = scrubbed(frame, secrets=self._emulator.api_keys)
        for name in ("conversation_config_override", "dynamic_variables"):
            if not isinstance(frame.get(name, {}), dict):
                raise Refused("invalid_message")
        if not all(isinstance(value, str | int | float) for value in _members(frame, "dynamic_variables").values()):
            raise Refused("invalid_message")
        return frame

    def _accepted(self, initiation: Mapping[str, object]) -> Mapping[str, object]:
        """Check the wishes against the agent's configuration; returns the dynamic variables."""
        agent = self._admission.agent
        override = _members(initiation, "conversation_config_override")
        # The Python SDK says text_only here, outside `conversation`, where no permission is asked for.
        self._text_only = override.get("text_only") is True
        for path in _leaves({name: member for name, member in override.items() if name != "text_only"}):
            if path not in agent.allowed_overrides:
                raise Refused("override_not_allowed", field=path.rpartition(".")[2])
        self._text_only |= _members(override, "conversation").get("text_only") is True
        given = {
            name: value
            for name, value in _members(initiation, "dynamic_variables").items()
            if not name.startswith("system__")  # reserved: the service sets them itself
        }
        variables = given | {
            "system__agent_id": agent.agent_id,
            "system__conversation_id": self._admission.conversation_id,
            "system__is_text_only": self._text_only,
        }
        wanted = frozenset(script.PLACEHOLDER.findall(agent.first_message))
        if missing := wanted - variables.keys():
            raise Refused("variables_missing_in_first_message", variables=_python_set(missing))
        if missing := agent.tool_variables - variables.keys():
            raise Refused("variables_missing_in_tools", variables=_python_set(missing))
        return variables

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        ping_at = loop.time() + self._emulator.ping_interval_seconds
        while True:
            if loop.time() >= ping_at:
                ping_at = loop.time() + self._emulator.ping_interval_seconds
                self._pinged = (self._next_event_id(), loop.time())
                await self._send(frames.ping(self._pinged[0], self._ping_ms))
            try:
                async with asyncio.timeout_at(ping_at):
                    frame = await self._receive()
            except TimeoutError:
                continue
            await self._handle(frame)

    async def _handle(self, frame: Mapping[str, object]) -> None:
        match frame:
            case {"user_audio_chunk": str(chunk)}:
                self._record.frames_received["user_audio_chunk"] += 1
                await self._hear(sound.decoded(chunk))
                return
            case {"type": "pong", "event_id": int(event_id)} if event_id == self._pinged[0]:
                elapsed = asyncio.get_running_loop().time() - self._pinged[1]
                # Never 0: the Python SDK takes that for "not measured".
                self._ping_ms = max(1, round(elapsed * 1000))
            case {"type": "user_message", "text": str(text)}:
                await self._answer(text)
            case {"type": "multimodal_message", "text": {"text": str(text)}}:
                await self._answer(text)
            case {"type": "client_tool_result", "tool_call_id": str(call_id)} if call_id == self._pending_tool:
                self._pending_tool = None
                self._agent, actions = self._agent.tool_answered(
                    str(frame.get("result")), is_error=frame.get("is_error") is True
                )
                await self._perform(actions)
        kind = frame.get("type")
        self._record.frames_received[kind if isinstance(kind, str) and kind in _CLIENT_FRAMES else "unknown"] += 1

    async def _hear(self, pcm: bytes) -> None:
        seconds = sound.seconds_of(pcm)
        self._record.microphone_seconds += seconds
        if self._text_only:
            return
        if self._unheard_seconds > 0:
            self._unheard_seconds -= seconds
            return
        self._audio_seconds += seconds
        self._sound_seconds += 0 if sound.is_silent(pcm) else seconds
        if (
            self._sound_seconds < self._emulator.speech_seconds
            and self._audio_seconds < self._emulator.any_audio_seconds
        ):
            return
        self._sound_seconds = self._audio_seconds = 0.0
        self._unheard_seconds = self._emulator.pause_seconds
        if line := next(self._lines, None):
            await self._send(frames.user_transcript(self._next_event_id(), line))
            await self._answer(line)

    async def _answer(self, line: str) -> None:
        if asyncio.get_running_loop().time() < self._speaking_until:
            self._speaking_until = 0.0
            await self._send(frames.interruption(self._next_event_id()))
        self._agent, actions = self._agent.hear(line)
        await self._perform(actions)

    async def _perform(self, actions: tuple[script.Say | script.CallTool, ...]) -> None:
        for action in actions:
            match action:
                case script.Say(text):
                    await self._say(text)
                case script.CallTool(name, parameters):
                    self._pending_tool = f"call_{secrets.token_hex(8)}"
                    await self._send(
                        frames.client_tool_call(
                            self._next_event_id(),
                            tool_call_id=self._pending_tool,
                            tool_name=name,
                            parameters=parameters,
                        )
                    )

    async def _say(self, text: str) -> None:
        if not text:
            return  # an agent without a first message waits for the user
        event_id = self._next_event_id()
        if self._text_only:
            await self._send(frames.agent_chat_response_part(event_id, "start"))
            for words in re.findall(r"(?:\S+\s*){1,5}", text):
                await self._send(frames.agent_chat_response_part(event_id, "delta", words))
            await self._send(frames.agent_chat_response_part(event_id, "stop"))
            await self._send(frames.agent_response(event_id, text))
            return
        await self._send(frames.agent_response(event_id, text))
        seconds = min(0.4 + len(text) / 100, 1.5)
        self._speaking_until = max(self._speaking_until, asyncio.get_running_loop().time()) + seconds
        for chunk in sound.tone(seconds):
            await self._send(frames.audio(self._next_event_id(), chunk))

    def _next_event_id(self) -> int:
        # One counter for every kind of event: so no audio is ever older than the last interruption.
        self._event_id += 1
        return self._event_id

    async def _send(self, frame: frames.Frame) -> None:
        # Escaped to ASCII: what a client sent as a lone surrogate could not be encoded otherwise.
        await self._websocket.send_text(json.dumps(frame))

    async def _receive(self) -> dict[str, object]:
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005), message.get("reason"))
        text = message.get("text")
        if not isinstance(text, str):
            raise Refused("invalid_message")
        if len(text) > self._emulator.max_frame_characters:
            raise Refused("frame_too_big")
        try:
            frame = json.loads(text)
        except (ValueError, RecursionError) as unreadable:
            raise Refused("invalid_message") from unreadable
        if not isinstance(frame, dict):
            raise Refused("invalid_message")
        return frame


def _members(frame: Mapping[str, object], name: str) -> dict[str, object]:
    value = frame.get(name)
    return value if isinstance(value, dict) else {}


def _leaves(override: Mapping[str, object], prefix: str = "", *, depth: int = 5) -> list[str]:
    """List the dotted paths that are overridden. An empty object, as the JavaScript SDK always sends, is none."""
    paths: list[str] = []
    for name, member in override.items():
        path = f"{prefix}{name}"
        paths += _leaves(member, f"{path}.", depth=depth - 1) if isinstance(member, dict) and depth else [path]
    return paths


def _python_set(names: frozenset[str]) -> str:
    # The real reasons carry the printed form of a Python set; sorted here, so that it can be compared.
    return "{" + ", ".join(repr(name) for name in sorted(names)) + "}"
