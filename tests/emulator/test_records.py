"""What is remembered of the calls, and what never is."""

import json
import logging
from collections.abc import Iterator

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from tests.emulator.wire import AGENT, CONVAI, JS_TEXT_INITIATION, KEY, Service, parameters, talking


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def server_log() -> Iterator[list[str]]:
    root, uvicorn, handler = logging.getLogger(), logging.getLogger("uvicorn"), _Lines()
    before = root.level, uvicorn.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    uvicorn.setLevel(logging.INFO)
    # The clients live in this process and log their own requests, which is not what is claimed here.
    clients = [logging.getLogger(name) for name in ("websockets.client", "httpx", "httpcore")]
    for client in clients:
        client.setLevel(logging.CRITICAL)
    yield handler.lines
    for client in clients:
        client.setLevel(logging.NOTSET)
    root.removeHandler(handler)
    root.setLevel(before[0])
    uvicorn.setLevel(before[1])


def test_no_signature_reaches_the_servers_log(service: Service, server_log: list[str]) -> None:
    url = service.mint(include_conversation_id="true")
    signature = parameters(url)["conversation_signature"]

    with talking(url) as talk:
        talk.says()
    with talking(url.replace("&conversation_signature", "%26conversation_signature")) as smuggled:
        smuggled.closed()
    with pytest.raises(InvalidStatus):
        connect(url.replace("/conversation?", "/mistyped?"), proxy=None)
    httpx.get(url.replace("ws", "http", 1))

    accepted = [line for line in server_log if "WebSocket /v1/convai/conversation?" in line]
    assert len(accepted) == 2
    assert not [line for line in server_log if signature in line or KEY in line]


def test_a_call_is_recorded_with_everything_but_its_secrets(service: Service) -> None:
    service.http.get(
        "/v1/convai/conversation/get-signed-url",
        params={"agent_id": AGENT.agent_id, "token": "t-1", "mistake": KEY},
        headers={"xi-api-key": KEY, "x-request-id": "r-1"},
    )
    service.http.get("/v1/nowhere", headers={"xi-api-key": "sk_wrong"})
    service.http.post("/v1/convai/conversation/token")

    first, second, third = service.emulator.records.calls
    assert (first.method, first.path, first.status) == ("GET", "/v1/convai/conversation/get-signed-url", 200)
    assert first.query == {"agent_id": AGENT.agent_id, "mistake": "[secret]"}
    assert {"xi-api-key", "x-request-id"} <= set(first.header_names)
    assert [call.key for call in (first, second, third)] == ["right", "wrong", "absent"]
    assert [call.status for call in (second, third)] == [404, 405]


def test_a_conversation_is_recorded_from_its_opening_to_its_close(service: Service) -> None:
    url = service.mint(include_conversation_id="true") + "&source=js_sdk&version=1.25.0"

    with talking(url, subprotocols=[CONVAI, Subprotocol("bearer.abc")], origin="http://shop.example") as talk:
        talk.says()
        talk.socket.close(1000, "User ended conversation")

    [record] = service.http.get("/_emulator/requests").json()["conversations"]
    assert record == {
        "agent_id": AGENT.agent_id,
        "signed": True,
        "source": "js_sdk",
        "version": "1.25.0",
        "origin": "http://shop.example",
        "subprotocols": ["convai", "bearer.[secret]"],
        "conversation_id": parameters(url)["conversation_id"],
        "initiation": JS_TEXT_INITIATION,
        "frames_received": {},
        "microphone_seconds": 0,
        "close_code": 1000,
        "close_reason": "User ended conversation",
        "closed_by": "client",
    }


def test_the_record_over_the_wire_holds_no_secret_whatever_the_client_sends(service: Service) -> None:
    url = service.mint()
    signature = parameters(url)["conversation_signature"]
    deep: object = "bottom"
    for _ in range(400):
        deep = {"a": [deep]}
    initiation = JS_TEXT_INITIATION | {
        "dynamic_variables": {"user_name": "Ada", "secret__card": "4111", "copy": url, "half": "\ud800"},
        "custom_llm_extra_body": {"key": KEY, signature: float("inf"), "deep": deep},
    }

    with talking(url, None) as talk:
        talk.socket.send(json.dumps(initiation).replace("Infinity", "1e999"))
        talk.says()
        talk.socket.close(1000, signature)

    record = service.http.get("/_emulator/requests")
    assert record.status_code == 200
    assert record.json()["conversations"][0]["initiation"]["dynamic_variables"]["secret__card"] == "[secret]"
    for secret in (signature, KEY, "4111"):
        assert secret not in record.text


def test_the_record_can_be_cleared(service: Service) -> None:
    service.mint()

    service.http.delete("/_emulator/requests")

    assert service.http.get("/_emulator/requests").json() == {"calls": [], "conversations": []}
