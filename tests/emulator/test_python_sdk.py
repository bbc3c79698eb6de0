"""The official Python SDK, unchanged, against the emulator."""

import queue
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from tests.emulator.wire import AGENT, KEY, Serve, Service
from voicepass.emulator import EmulatedAgent, Emulator

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
    """Speaks two seconds of sound at once, and collects what the agent plays."""

    def __init__(self) -> None:
        self.played = 0

    def start(self, input_callback: Callable[[bytes], None]) -> None:
        for _ in range(8):
            input_callback(b"\x00\x10\x00\xf0" * 2_000)

    def stop(self) -> None:
        pass

    def output(self, audio: bytes) -> None:
        self.played += len(audio)

    def interrupt(self) -> None:
        pass


def _client(service: Service, *, key: str = KEY) -> ElevenLabs:
    # The SDK never closes an HTTP client of its own making; this one its fixture closes.
    return ElevenLabs(api_key=key, base_url=service.url, httpx_client=service.http)


class _Call:
    """One conversation held through the SDK."""

    def __init__(self, service: Service, **changed: Any) -> None:
        self.said: queue.Queue[str] = queue.Queue()
        self.created: queue.Queue[dict[str, object]] = queue.Queue()
        self.heard: list[str] = []
        self.latencies: queue.Queue[int] = queue.Queue()
        self.ended = threading.Event()
        self.details: DisconnectionDetails | None = None
        tools = ClientTools()
        tools.register("create_product", self._create)
        options: dict[str, Any] = {
            "agent_id": AGENT.agent_id,
            "requires_auth": True,
            "user_id": "user-1",
            "config": ConversationInitiationData(dynamic_variables={"user_name": "Ada"}),
            **changed,
        }
        self.conversation = Conversation(
            _client(service),
            client_tools=tools,
            callback_agent_response=self.said.put,
            callback_user_transcript=self.heard.append,
            callback_latency_measurement=self.latencies.put,
            callback_disconnect=self._disconnected,
            **options,
        )
        self.conversation.start_session()  # type: ignore[no-untyped-call]  # the SDK's

    def _create(self, parameters: dict[str, object]) -> str:
        self.created.put({name: value for name, value in parameters.items() if name != "tool_call_id"})
        return "created"

    def _disconnected(self, details: DisconnectionDetails) -> None:
        self.details = details
        self.ended.set()

    def end(self) -> str | None:
        self.conversation.end_session()  # type: ignore[no-untyped-call]  # the SDK's
        return self.conversation.wait_for_session_end()

    def refusal(self) -> tuple[str, int | None, str | None]:
        assert self.ended.wait(5)
        self.conversation.wait_for_session_end()
        assert self.details is not None
        return self.details.reason, self.details.close_code, self.details.close_reason


def test_a_text_conversation_takes_an_order_and_calls_the_client_tool(service: Service) -> None:
    call = _Call(service)
    greeting = call.said.get(timeout=5)

    call.conversation.send_user_message(SALE)
    repeated, confirmed = call.said.get(timeout=5), call.said.get(timeout=5)
    conversation_id = call.end()

    assert greeting == "Hello Ada! What would you like to sell today?"
    assert "eggs for $2 each" in repeated
    assert call.created.get(timeout=5) == {"item": "eggs", "price": 2, "currency": "USD", "unit": "each"}
    assert confirmed.startswith("Done!")
    [record] = service.emulator.records.conversations
    assert (record.conversation_id, record.source) == (conversation_id, "python_sdk")
    assert [(sdk.path, sdk.key) for sdk in service.emulator.records.calls] == [
        ("/v1/convai/conversation/get-signed-url", "right")
    ]


def test_a_voice_conversation_hears_the_microphone_and_plays_the_agent(serve: Serve) -> None:
    service = serve(Emulator(agents=[AGENT], ping_interval_seconds=0.05))
    microphone = _Microphone()

    call = _Call(service, audio_interface=microphone)
    lines = [call.said.get(timeout=5) for _ in range(3)]
    latency = call.latencies.get(timeout=5)
    call.end()

    assert call.heard == ["I want to sell eggs for two dollars each"]
    assert any(line.startswith("Done!") for line in lines)
    assert microphone.played > 0
    assert latency >= 1


def test_a_public_agent_needs_no_signed_url(serve: Serve) -> None:
    service = serve(Emulator(agents=[EmulatedAgent(agent_id="agent_public", requires_auth=False)]))

    call = _Call(service, agent_id="agent_public", requires_auth=False)
    greeting = call.said.get(timeout=5)
    call.end()

    assert greeting.startswith("Hello Ada!")
    assert not service.emulator.records.calls


def test_a_private_agent_without_a_signed_url_is_refused(service: Service) -> None:
    call = _Call(service, requires_auth=False)

    assert call.refusal() == ("error", 3000, "Could not authorize the conversation.")


def test_missing_variables_are_named_in_the_close(service: Service) -> None:
    call = _Call(service, config=ConversationInitiationData())

    refusal = call.refusal()

    assert refusal == ("error", 1008, "Missing required dynamic variables in first message: {'user_name'}")


def test_a_forbidden_override_is_named_in_the_close(service: Service) -> None:
    override = {"agent": {"first_message": "Hi"}}

    call = _Call(service, config=ConversationInitiationData(conversation_config_override=override))

    assert call.refusal() == ("error", 1008, "Override for field 'first_message' is not allowed by config.")


@pytest.mark.parametrize(("agent_id", "key", "status"), [("agent_x", KEY, 404), (AGENT.agent_id, "sk_wrong", 401)])
def test_a_refused_call_is_an_api_error(service: Service, agent_id: str, key: str, status: int) -> None:
    client = _client(service, key=key)

    with pytest.raises(ApiError) as raised:
        client.conversational_ai.conversations.get_signed_url(agent_id=agent_id)

    assert raised.value.status_code == status
