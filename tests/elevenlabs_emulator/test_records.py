"""What the emulator records of calls and conversations, and what it never records."""

import json
import logging

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.elevenlabs_emulator.wire import (
    AGENT,
    JS_TEXT_INITIATION,
    KEY,
    SIGN,
    TOKEN,
    Service,
    open_conversation,
    parameters,
)


def test_no_signature_reaches_the_servers_log(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.INFO, logger="uvicorn")
    url = service.mint(include_conversation_id="true")
    signature = parameters(url)["conversation_signature"]

    with open_conversation(url) as talk:
        talk.read_answer()
    with open_conversation(url.replace("&conversation_signature", "%26conversation_signature")) as misspelt:
        misspelt.read_close()
    with pytest.raises(InvalidStatus):
        connect(url.replace("/conversation?", "/mistyped?"), proxy=None)
    httpx.get(url.replace("ws", "http", 1))

    clients = {"websockets", "httpx", "httpcore"}  # these run in this process too, and may log signatures
    server_log = [entry.getMessage() for entry in caplog.records if entry.name.partition(".")[0] not in clients]
    accepted = [line for line in server_log if "WebSocket /v1/convai/conversation?" in line]
    assert len(accepted) == 2
    assert not [line for line in server_log if signature in line or KEY in line]


def test_a_call_is_recorded_without_its_secrets_until_the_record_is_cleared(service: Service) -> None:
    service.http.get(
        SIGN,
        params={"agent_id": AGENT.agent_id, "conversation_signature": "s-1", "mistake": KEY},
        headers={"xi-api-key": KEY},
    )
    service.http.get("/v1/nowhere", headers={"xi-api-key": "sk_wrong"})
    service.http.post(TOKEN)

    assert service.http.get("/_emulator/requests").json()["calls"] == [
        {
            "method": "GET",
            "path": SIGN,
            "query": {"agent_id": AGENT.agent_id, "mistake": "[secret]"},
            "key": "right",
            "status": 200,
        },
        {"method": "GET", "path": "/v1/nowhere", "query": {}, "key": "wrong", "status": 501},
        {"method": "POST", "path": TOKEN, "query": {}, "key": "absent", "status": 405},
    ]
    service.http.delete("/_emulator/requests")
    assert service.http.get("/_emulator/requests").json() == {"calls": [], "conversations": []}


def test_a_conversation_is_recorded_from_its_opening_to_its_close(service: Service) -> None:
    url = service.mint(include_conversation_id="true") + "&source=js_sdk"
    conversation_id = parameters(url)["conversation_id"]

    with open_conversation(url) as talk:
        talk.read_answer()
        talk.send("user_activity")
        talk.socket.close(1000, "User ended conversation")

    [record] = service.http.get("/_emulator/requests").json()["conversations"]
    assert record == {
        "query": {"agent_id": AGENT.agent_id, "conversation_id": conversation_id, "source": "js_sdk"},
        "signed": True,
        "conversation_id": conversation_id,
        "initiation": JS_TEXT_INITIATION,
        "frames_received": {"user_activity": 1},
        "microphone_seconds": 0,
        "close_code": 1000,
        "close_reason": "User ended conversation",
        "closed_by": "client",
    }


def test_the_record_contains_no_secret_that_the_client_sent(service: Service) -> None:
    url = service.mint()
    signature = parameters(url)["conversation_signature"]
    deep: object = "bottom"
    for _ in range(90):
        deep = {"a": [deep]}
    initiation = JS_TEXT_INITIATION | {
        "dynamic_variables": {"user_name": "Ada", "secret__card": "4111", "copy": url},
        "custom_llm_extra_body": {"key": KEY, signature: 1, "deep": deep},
    }

    with open_conversation(url, initiation) as talk:
        talk.read_answer()
        talk.send(signature)
        talk.socket.close(1000, signature)

    record = service.http.get("/_emulator/requests").text
    assert json.loads(record)["conversations"][0]["initiation"]["dynamic_variables"]["secret__card"] == "[secret]"
    for secret in (signature, KEY, "4111"):
        assert secret not in record
