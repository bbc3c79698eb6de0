"""One open conversation: the handshake, the agent's turns, the microphone, and the end."""

import asyncio
import json
import math
import re
from collections.abc import Mapping

from starlette.websockets import WebSocket

from elevenlabs_emulator import frames, script
from elevenlabs_emulator.accounts import Account
from elevenlabs_emulator.agents import EmulatedAgent
from elevenlabs_emulator.closings import CloseConversation
from elevenlabs_emulator.emulator import CLOCK_POLL_SECONDS, Emulator, make_id
from elevenlabs_emulator.frames import Channel, Initiation, split_speech

_FIRST_FRAME_SECONDS = 10
_PING_SECONDS = 2
_CLOCK_CHECK_SECONDS = 0.25  # how often an idle conversation compares its duration with the limit
_SECONDS_PER_SPOKEN_LINE = 3  # of microphone audio: enough for the agent to end its answer to the line before

_TOOL = {"type": "client", "tool_name": "create_product", "tool_has_been_called": True}
_PLACEHOLDER = re.compile(r"\{\{\s*+([\w.-]++)\s*+\}\}")


class Conversation:
    """Talks to one accepted WebSocket until either side ends it.

    One task does everything and sends pings between two frames, so no task is left when the socket is closed.
    """

    def __init__(self, websocket: WebSocket, *, emulator: Emulator, account: Account) -> None:
        self._channel = Channel(websocket, client_events=account.agent.client_events)
        self._emulator, self._account, self._record = emulator, account, account.record
        self._order = script.Order()
        self._tool_calls: dict[str, script.Order] = {}
        self._spoken_lines = iter(account.agent.spoken_lines)
        self._next_line_at_seconds = float(_SECONDS_PER_SPOKEN_LINE)
        self._speaks_from = self._speaks_until = 0.0
        self._ping_sent_at = 0.0
        self._ping_ms: int | None = None
        self._language_mark = ""
        self.has_begun = False
        """Whether the client has got the metadata: an `error` event must not come before it."""

    @property
    def _agent(self) -> EmulatedAgent:
        return self._account.agent

    async def hold(self, *, forced_closing: str | None = None) -> None:
        """Hold the conversation, or only begin it if `forced_closing` names the closing that it must end with.

        Raises `CloseConversation` or `ValidationError` to end it, `WebSocketDisconnect` when the client has ended it.
        """
        initiation = await self._receive_initiation()
        # The JavaScript SDK hangs on any other first frame.
        await self._channel.send(
            "conversation_initiation_metadata",
            conversation_id=self._record.conversation_id,
            agent_output_audio_format=frames.AUDIO_FORMAT,
            user_input_audio_format=frames.AUDIO_FORMAT,
        )
        self.has_begun = True
        if forced_closing:
            raise CloseConversation(forced_closing)
        self._override_agent(initiation.list_overrides())
        self._check_variables(initiation.dynamic_variables or {})
        self._emulator.count_start(self._agent)
        await self._wait_in_queue()
        agent_id = self._agent.agent_id
        self._emulator.open_conversations[agent_id] += 1
        try:
            if self._account.queue_seconds is not None:
                await self._channel.send("queue_status", status="admitted")
            await self._say(_fill(self._agent.first_message, initiation.dynamic_variables or {}))
            await self._listen()
        finally:
            self._emulator.open_conversations[agent_id] -= 1

    async def _receive_initiation(self) -> Initiation:
        try:
            async with asyncio.timeout(_FIRST_FRAME_SECONDS):
                frame = await self._channel.receive()
        except TimeoutError as late:
            raise CloseConversation("first_frame_timeout") from late
        scrubbed_frame = self._emulator.records.scrub(frame)
        self._record.initiation = scrubbed_frame
        initiation = Initiation.model_validate(frame)
        self._account.initiation = scrubbed_frame
        return initiation

    def _override_agent(self, overrides: dict[str, object]) -> None:
        # The Python SDK sends text_only outside `conversation`, which needs no permission.
        text_only = overrides.pop("text_only", False) is True
        if overrides.get("agent.language") == self._agent.language:
            del overrides["agent.language"]  # the vendor's widget sends it in each conversation
        if forbidden := sorted(overrides.keys() - self._agent.allowed_overrides):
            raise CloseConversation("override_not_allowed", field=forbidden[0].rpartition(".")[2])
        language = str(overrides.get("agent.language", self._agent.language))
        if language not in {self._agent.language, *self._agent.languages}:
            raise CloseConversation("language_unsupported", language=language)
        if text_only:
            overrides["conversation.text_only"] = True
        if language != self._agent.language:
            self._language_mark = f"[{language}] "
            overrides.setdefault("agent.first_message", self._mark_language(self._agent.first_message))
        self._account.agent = self._agent.override(overrides)
        self._channel.client_events = self._agent.client_events

    def _check_variables(self, variables: Mapping[str, object]) -> None:
        needed = {
            "first message": set(_PLACEHOLDER.findall(self._agent.first_message)),
            "prompt": set(_PLACEHOLDER.findall(self._agent.prompt)),
            "tools": self._agent.tool_variables,
        }
        for place, names in needed.items():
            if missing := sorted(name for name in names - variables.keys() if not name.startswith("system__")):
                raise CloseConversation("variables_missing", place=place, variables=", ".join(map(repr, missing)))

    async def _wait_in_queue(self) -> None:
        """Wait until the agent has fewer open conversations than its limit, or refuse the client."""
        agent, began_at = self._agent, self._emulator.now()
        if not self._emulator.is_at_limit(agent):
            return
        if not agent.queueing:
            raise CloseConversation("too_many_concurrent")
        await self._channel.send("queue_status", status="waiting")
        while self._emulator.is_at_limit(agent):
            if self._emulator.now() - began_at >= agent.queue_timeout_seconds:
                await self._channel.send("queue_status", status="timed_out")
                raise CloseConversation("too_many_concurrent")
            await self._receive_for(CLOCK_POLL_SECONDS)  # frames that come too early are dropped
        self._account.started_at = self._emulator.now()
        self._account.queue_seconds = self._account.started_at - began_at

    async def _listen(self) -> None:
        ends_at = self._account.started_at + self._agent.max_duration_seconds
        ping_at = _monotonic() + _PING_SECONDS
        while True:
            frame = await self._receive_for(min(_CLOCK_CHECK_SECONDS, max(0, ping_at - _monotonic())))
            if frame is not None:
                await self._handle(frame)
            if self._emulator.now() >= ends_at:
                raise CloseConversation("max_duration")
            if _monotonic() >= ping_at:
                # The Python SDK reads the key ping_ms without a default.
                await self._channel.send_numbered("ping", ping_ms=self._ping_ms)
                self._ping_sent_at = _monotonic()
                ping_at = self._ping_sent_at + _PING_SECONDS

    async def _receive_for(self, seconds: float) -> dict[str, object] | None:
        try:
            async with asyncio.timeout(seconds):
                return await self._channel.receive()
        except TimeoutError:
            return None

    async def _handle(self, frame: Mapping[str, object]) -> None:
        kind = "user_audio_chunk" if "user_audio_chunk" in frame else str(frame.get("type"))
        self._record.frames_received[self._emulator.records.scrub_text(kind)] += 1
        match frame:
            case {"user_audio_chunk": str(chunk)}:
                await self._handle_audio(chunk)
            case {"type": "user_message", "text": str(text)}:
                await self._answer(text)
            case {"type": "multimodal_message", "text": {"text": str(text)}}:
                await self._answer(text)
            case {"type": "multimodal_message"}:
                await self._say("I got your file, but I can only read text.")
            case {"type": "pong"} if self._ping_sent_at:
                self._ping_ms = round((_monotonic() - self._ping_sent_at) * 1000)
            case {"type": "client_tool_result", "tool_call_id": str(call_id)} if call_id in self._tool_calls:
                is_error = frame.get("is_error") is True
                await self._handle_tool_result(call_id, str(frame.get("result")), is_error=is_error)

    async def _handle_audio(self, chunk_base_64: str) -> None:
        """Count the audio, whatever is in it; after enough of it, take the next line of the script as spoken."""
        samples = len(chunk_base_64) * 3 / 4 / 2
        self._record.microphone_seconds += samples / frames.SAMPLES_PER_SECOND
        if self._agent.text_only:
            return
        await self._channel.send("vad_score", vad_score=1.0)
        if self._record.microphone_seconds < self._next_line_at_seconds:
            return
        self._next_line_at_seconds += _SECONDS_PER_SPOKEN_LINE
        if line := next(self._spoken_lines, None):
            beginning = " ".join(line.split()[:3])
            event_id = await self._channel.send_numbered("tentative_user_transcript", user_transcript=beginning)
            await self._channel.send("user_transcript", user_transcript=line, event_id=event_id)
            await self._answer(line)

    async def _answer(self, line: str) -> None:
        self._account.add_turn("user", line)
        if _monotonic() < self._speaks_until:
            await self._interrupt()
        words, self._order = script.answer(line, self._order)
        await self._say(self._mark_language(words))
        if words == script.GOODBYE:
            await self._hang_up()
        if self._order.is_complete:
            await self._call_tool(self._order)
            self._order = script.Order()

    async def _interrupt(self) -> None:
        """Stop speaking: the transcript keeps what was played until now."""
        turn = next(turn for turn in reversed(self._account.turns) if turn["role"] == "agent" and turn["message"])
        spoken = (_monotonic() - self._speaks_from) / (self._speaks_until - self._speaks_from)
        text = turn["message"]
        played = text[: math.ceil(len(text) * spoken)]
        turn.update(message=played, original_message=text, interrupted=True)
        self._speaks_until = 0
        # Clients drop the audio that they still have if its event id does not exceed this one.
        event_id = await self._channel.send_numbered("interruption")
        correction = {"original_agent_response": text, "corrected_agent_response": played, "event_id": event_id}
        await self._channel.send("agent_response_correction", **correction)

    async def _say(self, text: str) -> None:
        if not text:
            return  # an agent without a first message waits for the user
        self._account.add_turn("agent", text)
        if self._agent.text_only:
            event_id = await self._channel.send_numbered("agent_chat_response_part", type="start", text="")
            parts = [*(("delta", word) for word in re.findall(r"\S+\s*", text)), ("stop", "")]
            for kind, part in parts:
                await self._channel.send("agent_chat_response_part", type=kind, text=part, event_id=event_id)
            await self._channel.send("agent_response", agent_response=text, event_id=event_id)
            return
        await self._channel.send_numbered("agent_response", agent_response=text)
        speech = split_speech(text)
        for audio in speech:
            await self._channel.send_numbered("audio", **audio)
        self._speaks_from = _monotonic()
        self._speaks_until = max(self._speaks_until, self._speaks_from) + frames.TONE_SECONDS * len(speech)

    def _mark_language(self, text: str) -> str:
        """Mark a text as said in the overriding language: the script knows English only."""
        return self._language_mark + text if text else text

    async def _call_tool(self, order: script.Order) -> None:
        call_id = make_id("call")
        self._tool_calls[call_id] = order
        recorded_call = _TOOL | {"request_id": call_id, "params_as_json": json.dumps(order.parameters)}
        self._account.add_turn("agent", None, tool_calls=[recorded_call])
        call = {"tool_name": "create_product", "tool_call_id": call_id, "parameters": order.parameters}
        await self._channel.send_numbered("client_tool_call", **call)

    async def _handle_tool_result(self, call_id: str, result: str, *, is_error: bool) -> None:
        order = self._tool_calls.pop(call_id)
        outcome = _TOOL | {"request_id": call_id, "result_value": result, "is_error": is_error}
        self._account.add_turn("agent", None, tool_results=[outcome])
        await self._send_tool_response("create_product", call_id, "client", is_error=is_error)
        await self._say(self._mark_language(script.confirm(order, result, is_error=is_error)))

    async def _hang_up(self) -> None:
        await self._send_tool_response("end_call", make_id("call"), "system", is_error=False)
        raise CloseConversation("agent_ended")

    async def _send_tool_response(self, tool_name: str, call_id: str, tool_type: str, *, is_error: bool) -> None:
        response = {"tool_name": tool_name, "tool_call_id": call_id, "tool_type": tool_type, "is_error": is_error}
        await self._channel.send_numbered("agent_tool_response", **response, is_called=True)


def _fill(text: str, variables: Mapping[str, object]) -> str:
    return _PLACEHOLDER.sub(lambda match: str(variables.get(match[1], match[1])), text)


def _monotonic() -> float:
    return asyncio.get_running_loop().time()
