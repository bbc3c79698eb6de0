"""The official Python SDK, unchanged, against the emulator."""

import queue
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from elevenlabs_emulator import CLOSINGS, Emulator, Fault
from tests.elevenlabs_emulator.wire import AGENT, KEY, SIGN, Serve, Service

with warnings.catch_warnings():
    # The SDK names a class of the old websockets API in an annotation, which warns while the module is imported.
    warnings.filterwarnings("ignore", message=r"websockets\.(WebSocketClientProtocol|legacy) is deprecated")
    from elevenlabs.client import ElevenLabs
    from elevenlabs.conversational_ai.conversation import (
        AudioInterface,
        ClientTools,
        Conversation,
        ConversationInitiationData,
        DisconnectionDetails,
    )
    from elevenlabs.core.api_error import ApiError

SALE = "I want to sell eggs for 2 dollars each"


class _Microphone(AudioInterface):
    """Sends three seconds of speech at once, and counts the bytes that the agent plays."""

    def __init__(self) -> None:
        self.played = 0

    def start(self, input_callback: Callable[[bytes], None]) -> None:
        for _ in range(12):
            input_callback(bytes(8_000))

    def stop(self) -> None:
        pass

    def output(self, audio: bytes) -> None:
        self.played += len(audio)

    def interrupt(self) -> None:
        pass


def _make_client(service: Service, *, key: str = KEY) -> ElevenLabs:
    # The SDK never closes an HTTP client that it made itself. The fixture closes this one.
    return ElevenLabs(api_key=key, base_url=service.url, httpx_client=service.http)


class _Call:
    """One conversation held through the SDK."""

    def __init__(self, service: Service, **changed: Any) -> None:
        self.replies: queue.Queue[str] = queue.Queue()
        self.created: queue.Queue[dict[str, object]] = queue.Queue()
        self.transcripts: list[str] = []
        self.ended = threading.Event()
        self.details: DisconnectionDetails | None = None
        tools = ClientTools()
        tools.register("create_product", self._create)
        options: dict[str, Any] = {
            "agent_id": AGENT.agent_id,
            "requires_auth": True,
            "config": ConversationInitiationData(dynamic_variables={"user_name": "Ada"}),
            **changed,
        }
        self.conversation = Conversation(
            _make_client(service),
            client_tools=tools,
            callback_agent_response=self.replies.put,
            callback_user_transcript=self.transcripts.append,
            callback_disconnect=self._record_end,
            **options,
        )
        self.conversation.start_session()  # type: ignore[no-untyped-call]  # the SDK's

    def _create(self, parameters: dict[str, object]) -> str:
        self.created.put(parameters)
        return "created"

    def _record_end(self, details: DisconnectionDetails) -> None:
        self.details = details
        self.ended.set()

    def end(self) -> str | None:
        self.conversation.end_session()  # type: ignore[no-untyped-call]  # the SDK's
        return self.conversation.wait_for_session_end()

    def read_refusal(self) -> tuple[int | None, str | None]:
        assert self.ended.wait(5)
        self.conversation.wait_for_session_end()
        assert self.details is not None
        return self.details.close_code, self.details.close_reason


def test_in_a_text_conversation_the_agent_takes_an_order_and_calls_the_client_tool(service: Service) -> None:
    call = _Call(service)
    greeting = call.replies.get(timeout=5)

    call.conversation.send_user_message(SALE)
    repeated, confirmed = call.replies.get(timeout=5), call.replies.get(timeout=5)
    conversation_id = call.end()

    assert greeting == "Hello Ada! What would you like to sell today?"
    assert "eggs for $2 each" in repeated
    assert (
        call.created.get(timeout=5).items() >= {"item": "eggs", "price": 2, "currency": "USD", "unit": "each"}.items()
    )
    assert confirmed.startswith("Done!")
    [record] = service.emulator.records.conversations
    assert (record.conversation_id, record.query["source"]) == (conversation_id, "python_sdk")
    assert [(call.path, call.key) for call in service.emulator.records.calls] == [(SIGN, "right")]


def test_in_a_voice_conversation_the_agent_gets_the_microphone_and_is_played(serve: Serve) -> None:
    microphone = _Microphone()
    service = serve(Emulator(agents=[AGENT.model_copy(update={"spoken_lines": (SALE,)})]))

    call = _Call(service, audio_interface=microphone)
    lines = [call.replies.get(timeout=5) for _ in range(3)]
    call.end()

    assert call.transcripts == [SALE]
    assert any(line.startswith("Done!") for line in lines)
    assert microphone.played > 0


@pytest.mark.parametrize(
    ("changed", "code", "reason"),
    [
        ({"requires_auth": False}, 3000, "Could not authorize the conversation."),
        ({"config": None}, 1008, "Missing required dynamic variables in first message: {'user_name'}"),
    ],
)
def test_the_sdk_reports_a_refusal(service: Service, changed: dict[str, Any], code: int, reason: str) -> None:
    assert _Call(service, **changed).read_refusal() == (code, reason)


def test_the_sdk_reports_every_closing(service: Service) -> None:
    for name, row in CLOSINGS.items():
        service.emulator.faults["conversation"] = Fault(target="conversation", closing=name, times=1)

        assert _Call(service).read_refusal() == (row.code, row.reason), name


def test_a_refused_call_is_an_api_error(service: Service) -> None:
    with pytest.raises(ApiError) as raised:
        _make_client(service, key="sk_wrong").conversational_ai.conversations.get_signed_url(agent_id=AGENT.agent_id)

    assert raised.value.status_code == 401
