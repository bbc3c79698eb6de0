"""One open conversation: the handshake, the agent's turns, the microphone, and the end."""

import asyncio
import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from time import monotonic
from typing import Final

from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from pydantic import ValidationError

from elevenlabs_emulator import script
from elevenlabs_emulator.accounts import Account
from elevenlabs_emulator.emulator import CLOCK_POLL_SECONDS, Emulator, Running, make_id
from elevenlabs_emulator.failures import CLOSINGS, CloseConversation
from elevenlabs_emulator.frames import AUDIO_FORMAT, SAMPLES_PER_SECOND, TONE_SECONDS, Channel, Initiation, split_speech
from elevenlabs_emulator.records import RAW_QUERY, RecordedConversation

_FIRST_FRAME_SECONDS = 10
_PING_SECONDS = 2
_CLOCK_CHECK_SECONDS = 0.25  # how often an idle conversation compares its duration with the limit
_SECONDS_PER_SPOKEN_LINE = 3  # of microphone audio: enough for the agent to end its answer to the line before

_TOOL = {"type": "client", "tool_name": "create_product", "tool_has_been_called": True}
_PLACEHOLDER = re.compile(r"\{\{\s*+([\w.-]++)\s*+\}\}")

CONVERSATION_PATH = "/v1/convai/conversation"
routes: Final = APIRouter()


@routes.websocket(CONVERSATION_PATH)
async def _converse(websocket: WebSocket, emulator: Running) -> None:
    query: dict[str, str] = websocket.scope[RAW_QUERY]
    record = RecordedConversation(query=dict(websocket.query_params), signed="conversation_signature" in query)
    emulator.records.conversations.append(record)
    forced_closing, account, conversation = emulator.take_fault("conversation").closing, None, None
    try:
        # Accepted before it is refused, as by the live service: a browser that gets 403 sees no code and no reason.
        # Browsers insist on the subprotocol that they offered; the Python SDK offers none and rejects one.
        await websocket.accept(subprotocol="convai" if "convai" in websocket.scope["subprotocols"] else None)
        if forced_closing and CLOSINGS[forced_closing].moment == "before_metadata":
            raise CloseConversation(forced_closing)  # noqa: TRY301 - handled like every other closing
        agent, record.conversation_id = emulator.admit(query, origin=websocket.headers.get("origin"))
        account = emulator.open_account(agent, record, "signed_url" if record.signed else "public")
        conversation = Conversation(websocket, emulator=emulator, account=account)
        await conversation.hold(forced_closing=forced_closing)
    except (CloseConversation, ValidationError) as end:
        closing = end.closing if isinstance(end, CloseConversation) else CLOSINGS["invalid_message"]
        record.closed_by, record.close_code, record.close_reason = "emulator", closing.code, closing.reason
        if account:
            account.final_status = closing.record
        with suppress(WebSocketDisconnect):  # the client closed first
            if conversation and conversation.has_begun and closing.error_event:
                await websocket.send_json({"type": "error", "error_event": closing.error_event})
            await websocket.close(closing.code, closing.reason)
    except WebSocketDisconnect as end:
        record.closed_by, record.close_code = "client", end.code
        record.close_reason = emulator.records.scrub_text(end.reason or "")
    if account:
        await emulator.close_account(account)


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
        self._speaks_from = self._speaks_until = 0.0
        self._ping_sent_at = 0.0
        self._ping_ms: int | None = None
        self._language_mark = ""  # of what the agent says in another language: the script knows English only
        # Whether the client has got the metadata: an `error` event must not come before it.
        self.has_begun = False

    async def hold(self, *, forced_closing: str | None = None) -> None:
        """Hold the conversation, or only begin it if `forced_closing` names the closing that it must end with.

        Raises `CloseConversation` or `ValidationError` to end it, `WebSocketDisconnect` when the client has ended it.
        """
        initiation = await self._receive_initiation()
        formats = {"agent_output_audio_format": AUDIO_FORMAT, "user_input_audio_format": AUDIO_FORMAT}
        metadata = {"conversation_id": self._record.conversation_id, **formats}
        # The JavaScript SDK hangs on any other first frame.
        await self._channel.send("conversation_initiation_metadata", **metadata)
        self.has_begun = True
        if forced_closing:
            raise CloseConversation(forced_closing)
        variables = initiation.dynamic_variables or {}
        self._override_agent(initiation.list_overrides())
        self._check_variables(variables)
        agent = self._account.agent
        self._emulator.count_start(agent)
        await self._wait_in_queue()
        self._emulator.open_conversations[agent.agent_id] += 1
        try:
            if self._account.queue_seconds is not None:
                await self._channel.send("queue_status", status="admitted")
            await self._say(_PLACEHOLDER.sub(lambda found: str(variables.get(found[1], found[1])), agent.first_message))
            await self._listen()
        finally:
            self._emulator.open_conversations[agent.agent_id] -= 1

    async def _receive_initiation(self) -> Initiation:
        frame = await self._receive_for(_FIRST_FRAME_SECONDS)
        if frame is None:
            raise CloseConversation("first_frame_timeout")
        scrub = self._emulator.records.scrub
        self._record.initiation = scrub(frame)
        initiation = Initiation.model_validate(frame)
        self._account.client_data = scrub(initiation.model_dump(exclude={"type"}, exclude_none=True))
        return initiation

    def _override_agent(self, overrides: dict[str, object]) -> None:
        agent = self._account.agent
        # The Python SDK sends text_only outside `conversation`, which needs no permission.
        text_only = overrides.pop("text_only", False) is True
        language = str(overrides.get("agent.language", agent.language))
        if language == agent.language:
            overrides.pop("agent.language", None)  # the vendor's widget sends it in each conversation
        if forbidden := sorted(overrides.keys() - agent.allowed_overrides):
            raise CloseConversation("override_not_allowed", field=forbidden[0].rpartition(".")[2])
        if language not in {agent.language, *agent.languages}:
            raise CloseConversation("language_unsupported", language=language)
        if text_only:
            overrides["conversation.text_only"] = True
        if language != agent.language:
            self._language_mark = f"[{language}] "
            if agent.first_message:
                overrides.setdefault("agent.first_message", self._language_mark + agent.first_message)
        self._account.agent = agent.override(overrides)

    def _check_variables(self, variables: Mapping[str, object]) -> None:
        agent = self._account.agent
        needed = {
            "first message": set(_PLACEHOLDER.findall(agent.first_message)),
            "prompt": set(_PLACEHOLDER.findall(agent.prompt)),
            "tools": agent.tool_variables,
        }
        for place, names in needed.items():
            if missing := sorted(name for name in names - variables.keys() if not name.startswith("system__")):
                raise CloseConversation("variables_missing", place=place, variables=", ".join(map(repr, missing)))

    async def _wait_in_queue(self) -> None:
        """Wait until the agent has fewer open conversations than its limit, or refuse the client."""
        agent, began_at = self._account.agent, self._emulator.now()
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
        ends_at = self._account.started_at + self._account.agent.max_duration_seconds
        ping_at = monotonic() + _PING_SECONDS
        while self._emulator.now() < ends_at:
            if (frame := await self._receive_for(_CLOCK_CHECK_SECONDS)) is not None:
                await self._handle(frame)
            if monotonic() >= ping_at:
                # The Python SDK reads the key ping_ms without a default.
                await self._channel.send_numbered("ping", ping_ms=self._ping_ms)
                self._ping_sent_at = monotonic()
                ping_at = self._ping_sent_at + _PING_SECONDS
        raise CloseConversation("max_duration")

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
                self._ping_ms = round((monotonic() - self._ping_sent_at) * 1000)
            case {"type": "client_tool_result", "tool_call_id": str(call_id)} if call_id in self._tool_calls:
                is_error = frame.get("is_error") is True
                await self._handle_tool_result(call_id, str(frame.get("result")), is_error=is_error)

    async def _handle_audio(self, chunk_base_64: str) -> None:
        """Count the audio, whatever is in it; after enough of it, take the next line of the script as spoken."""
        samples = len(chunk_base_64) * 3 / 4 / 2
        lines_before = self._record.microphone_seconds // _SECONDS_PER_SPOKEN_LINE
        self._record.microphone_seconds += samples / SAMPLES_PER_SECOND
        if self._account.agent.text_only:
            return
        await self._channel.send("vad_score", vad_score=1.0)
        if self._record.microphone_seconds // _SECONDS_PER_SPOKEN_LINE == lines_before:
            return
        if line := next(self._spoken_lines, None):
            beginning = " ".join(line.split()[:3])
            event_id = await self._channel.send_numbered("tentative_user_transcript", user_transcript=beginning)
            await self._channel.send("user_transcript", user_transcript=line, event_id=event_id)
            await self._answer(line)

    async def _answer(self, line: str) -> None:
        self._account.add_turn("user", line)
        if monotonic() < self._speaks_until:
            await self._interrupt()
        words, self._order = script.answer(line, self._order)
        await self._say(self._language_mark + words)
        if words == script.GOODBYE:
            await self._send_tool_response("end_call", make_id("call"), tool_type="system", is_error=False)
            raise CloseConversation("agent_ended")
        if self._order.is_complete:
            await self._call_tool(self._order)
            self._order = script.Order()

    async def _interrupt(self) -> None:
        """Stop speaking: the transcript keeps what was played until now."""
        turn = next(turn for turn in reversed(self._account.turns) if turn["role"] == "agent" and turn["message"])
        spoken = (monotonic() - self._speaks_from) / (self._speaks_until - self._speaks_from)
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
        if self._account.agent.text_only:
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
        self._speaks_from = monotonic()
        self._speaks_until = max(self._speaks_until, self._speaks_from) + TONE_SECONDS * len(speech)

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
        await self._send_tool_response("create_product", call_id, tool_type="client", is_error=is_error)
        await self._say(self._language_mark + script.confirm(order, result, is_error=is_error))

    async def _send_tool_response(self, tool_name: str, call_id: str, *, tool_type: str, is_error: bool) -> None:
        response = {"tool_name": tool_name, "tool_call_id": call_id, "tool_type": tool_type, "is_error": is_error}
        await self._channel.send_numbered("agent_tool_response", **response, is_called=True)
