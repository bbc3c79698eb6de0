"""The API and the webhook show conversations as the models of the vendor's SDK describe them."""

import json
import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

import elevenlabs
import pytest
from jose import jwt
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from elevenlabs_emulator import Emulator
from tests.conftest import settings_with
from tests.elevenlabs_emulator.contract import check_strictly
from tests.elevenlabs_emulator.wire import (
    AGENT,
    JS_TEXT_INITIATION,
    JS_VOICE_INITIATION,
    KEY,
    TOKEN,
    Serve,
    Service,
    open_conversation,
    parameters,
)
from tests.servers import free_port, running

Delivery = tuple[bytes, str]
SECRET = "wsec_of_the_test"


class Receiver:
    """Receives webhooks and keeps each delivery, with its signature."""

    def __init__(self) -> None:
        self.url = ""
        self.deliveries: queue.Queue[Delivery] = queue.Queue()

    def next(self) -> dict[str, Any]:
        body, signature = self.deliveries.get(timeout=5)
        sdk = elevenlabs.ElevenLabs(api_key=KEY)
        event: dict[str, Any] = sdk.webhooks.construct_event(body.decode(), signature, SECRET)
        return event

    async def receive(self, request: Request) -> Response:
        self.deliveries.put((await request.body(), request.headers["elevenlabs-signature"]))
        return Response()


@pytest.fixture(scope="module")
def listener() -> Iterator[Callable[[Receiver], str]]:
    """A server that gives each receiver an address of its own: an earlier test's webhook may still be on its way."""
    receivers: list[Receiver] = []

    async def receive(request: Request) -> Response:
        number: int = request.path_params["number"]
        return await receivers[number].receive(request)

    def add(receiver: Receiver) -> str:
        receivers.append(receiver)
        return f"{url}/hook/{len(receivers) - 1}"

    with running(lambda _url: Starlette(routes=[Route("/hook/{number:int}", receive, methods=["POST"])])) as url:
        yield add


@pytest.fixture
def receiver(listener: Callable[[Receiver], str]) -> Receiver:
    receiver = Receiver()
    receiver.url = listener(receiver)
    return receiver


@pytest.fixture
def service(serve: Serve, receiver: Receiver) -> Service:
    now = time.time()  # moves only when a test advances it; the SDK accepts no old signature
    return serve(Emulator(agents=[AGENT], webhook_url=receiver.url, webhook_secret=SECRET, clock=lambda: now))


def converse(service: Service, *, seconds: float = 0) -> str:
    url = service.mint(include_conversation_id="true")
    with open_conversation(url) as talk:
        talk.read_answer()
        service.advance(seconds)
    conversation_id = parameters(url)["conversation_id"]
    service.await_end(conversation_id)
    return conversation_id


def fetch_record(service: Service, conversation_id: str, *, key: str = KEY) -> tuple[int, dict[str, Any]]:
    answer = service.http.get(f"/v1/convai/conversations/{conversation_id}", headers={"xi-api-key": key})
    return answer.status_code, answer.json()


def test_the_record_and_the_webhook_contain_the_whole_conversation(service: Service, receiver: Receiver) -> None:
    url = service.mint(include_conversation_id="true") + "&source=js_sdk&version=1.25.0"
    conversation_id = parameters(url)["conversation_id"]
    with open_conversation(
        url, JS_VOICE_INITIATION | {"source_info": {"source": "js_sdk", "version": "1.25.0"}}
    ) as talk:
        greeting = talk.read_answer()
        talk.send("", user_audio_chunk="AAAA")
        service.advance(42)
        talk.send("user_message", text="I want to sell eggs for 2 dollars each")
        repeated = talk.read_answer()
        call_id = talk.next("client_tool_call")["client_tool_call"]["tool_call_id"]
        talk.send("client_tool_result", tool_call_id=call_id, result="ok", is_error=False)
        confirmed = talk.read_answer()

    event = receiver.next()
    record = fetch_record(service, conversation_id)[1]

    check_strictly("GetConversationResponseModel", json.dumps(event["data"]))
    assert event["data"] == record
    turns = record["transcript"]
    assert [(turn["role"], turn["message"]) for turn in turns] == [
        ("agent", turns[0]["message"]),
        ("user", "I want to sell eggs for 2 dollars each"),
        ("agent", repeated),
        ("agent", None),
        ("agent", None),
        ("agent", confirmed),
    ]
    assert (turns[0]["original_message"], turns[0]["interrupted"]) == (greeting, True)
    assert [turn["time_in_call_secs"] for turn in turns] == [0, 42, 42, 42, 42, 42]
    assert turns[3]["tool_calls"][0]["tool_name"] == "create_product"
    assert turns[4]["tool_results"][0]["request_id"] == call_id
    audio = ("has_audio", "has_user_audio", "has_response_audio", "has_auxiliary_audio")
    assert [record[name] for name in audio] == [True, True, True, False]
    data = record["conversation_initiation_client_data"]
    assert data["dynamic_variables"].items() >= {"user_name": "Ada", "system__conversation_id": conversation_id}.items()
    assert data["user_id"] == JS_TEXT_INITIATION["user_id"]
    assert record["analysis"]["call_successful"] == "success"
    assert record["metadata"]["text_only"] is False
    assert record["metadata"]["conversation_initiation_source"] == "js_sdk"


def test_after_the_clock_is_advanced_all_times_match_it(service: Service, receiver: Receiver) -> None:
    service.advance(901)
    token = jwt.get_unverified_claims(service.ask(TOKEN).json()["token"])
    converse(service, seconds=42)

    event = receiver.next()

    now = int(service.emulator.now())
    metadata = event["data"]["metadata"]
    assert event["event_timestamp"] == now
    assert metadata["start_time_unix_secs"] + metadata["call_duration_secs"] == now
    assert token["nbf"] == now - 42


def test_a_deleted_conversation_is_unknown(service: Service) -> None:
    conversation_id = converse(service)
    path, headers = f"/v1/convai/conversations/{conversation_id}", {"xi-api-key": KEY}

    deleted = [service.http.delete(path, headers=headers).status_code for _ in range(2)]

    assert deleted == [200, 404]
    assert fetch_record(service, conversation_id)[0] == 404


def test_one_webhook_reports_a_conversation_when_it_has_ended(service: Service, receiver: Receiver) -> None:
    conversation_id = converse(service, seconds=42)

    event = receiver.next()

    assert event["type"] == "post_call_transcription"
    account = event["data"]
    assert (account["conversation_id"], account["user_id"]) == (conversation_id, JS_TEXT_INITIATION["user_id"])
    assert (account["status"], account["metadata"]["call_duration_secs"]) == ("done", 42)
    assert account["metadata"]["cost"] == 420
    assert (200, account) == fetch_record(service, conversation_id)
    assert receiver.deliveries.empty()


def test_a_conversation_is_unknown_until_it_is_opened_and_then_changes_its_status(
    service: Service, receiver: Receiver
) -> None:
    url = service.mint(include_conversation_id="true")
    conversation_id = parameters(url)["conversation_id"]

    before = fetch_record(service, conversation_id)
    with open_conversation(url, None) as talk:
        opened = fetch_record(service, conversation_id)
        talk.socket.send(json.dumps(JS_TEXT_INITIATION))
        talk.read_answer()
        during = fetch_record(service, conversation_id)
    receiver.next()
    after = fetch_record(service, conversation_id)

    assert before[0] == 404
    assert [account["status"] for _, account in (opened, during, after)] == ["initiated", "in-progress", "done"]


def test_only_a_key_that_may_read_gets_a_conversation(serve: Serve) -> None:
    keys = {"sk_writer": frozenset({"convai_write"}), KEY: frozenset({"convai_read"})}
    service = serve(Emulator(agents=[AGENT], api_keys=keys))

    answers = [fetch_record(service, "conv_1", key=key) for key in (KEY, "sk_writer", "sk_wrong")]

    assert [(status, body["detail"]["status"]) for status, body in answers] == [
        (404, "conversation_history_not_found"),
        (401, "missing_permissions"),
        (401, "invalid_api_key"),
    ]
    assert "convai_read" in answers[1][1]["detail"]["message"]


@pytest.mark.parametrize(
    ("closing", "status"),
    [("quota_exceeded", "done"), ("internal_error", "failed"), ("agent_misconfigured", "failed")],
)
def test_the_record_of_a_refused_conversation_has_its_error(
    service: Service, receiver: Receiver, closing: str, status: str
) -> None:
    service.http.put("/_emulator/faults", json={"target": "conversation", "closing": closing})
    with open_conversation(service.mint()) as talk:
        code, reason = talk.read_close()

    account = receiver.next()["data"]

    assert account["status"] == status
    assert account["metadata"]["error"] == {"code": code, "reason": reason}
    assert account["metadata"]["termination_reason"] == reason


def test_the_emulator_can_report_a_fixed_duration(serve: Serve, receiver: Receiver) -> None:
    service = serve(Emulator(agents=[AGENT], webhook_url=receiver.url, webhook_secret=SECRET, conversation_seconds=90))
    converse(service)

    assert receiver.next()["data"]["metadata"]["call_duration_secs"] == 90


def put_conversations(service: Service, **settings: object) -> None:
    assert service.http.put("/_emulator/conversations", json=settings).status_code == 204


def test_a_conversation_is_processing_for_the_set_time_and_has_its_duration_meanwhile(
    service: Service, receiver: Receiver
) -> None:
    put_conversations(service, processing_seconds=30)
    url = service.mint(include_conversation_id="true")
    conversation_id = parameters(url)["conversation_id"]
    with open_conversation(url) as talk:
        talk.read_answer()
        service.advance(42)
        open_still = fetch_record(service, conversation_id)[1]
    service.await_end(conversation_id)

    service.advance(29)
    processing = fetch_record(service, conversation_id)[1]
    was_early = not receiver.deliveries.empty()
    service.advance(1)
    webhook = receiver.next()["data"]
    done = fetch_record(service, conversation_id)[1]

    accounts = (open_still, processing, webhook, done)
    assert [bool(account["transcript"]) for account in accounts] == [False, True, True, True]
    assert [account["status"] for account in accounts] == ["in-progress", "processing", "done", "done"]
    assert [account["metadata"]["call_duration_secs"] for account in accounts] == [0, 42, 42, 42]
    assert open_still["metadata"]["termination_reason"] is None
    assert processing["metadata"]["termination_reason"] == "Client disconnected: 1000"
    assert not was_early


def test_a_failed_conversation_is_processing_first(serve: Serve) -> None:
    service = serve(Emulator(agents=[AGENT], processing_seconds=30))
    service.http.put("/_emulator/faults", json={"target": "conversation", "closing": "internal_error"})
    url = service.mint(include_conversation_id="true")
    with open_conversation(url) as talk:
        _, reason = talk.read_close()
    conversation_id = parameters(url)["conversation_id"]
    service.await_end(conversation_id)

    processing = fetch_record(service, conversation_id)[1]
    service.advance(30)
    failed = fetch_record(service, conversation_id)[1]

    assert (processing["status"], failed["status"]) == ("processing", "failed")
    assert failed["metadata"]["termination_reason"] == reason


@pytest.mark.parametrize("settings", [{"processing_seconds": -1}, {"unopened": "lost"}, {"procesing_seconds": 1}])
def test_a_wrong_setting_of_conversations_is_refused(service: Service, settings: dict[str, object]) -> None:
    assert service.http.put("/_emulator/conversations", json=settings).status_code == 422


def test_an_unopened_conversation_has_the_status_initiated_if_that_is_set(service: Service) -> None:
    put_conversations(service, unopened="initiated")
    url = service.mint(include_conversation_id="true")
    conversation_id = parameters(url)["conversation_id"]
    token_id = service.ask(TOKEN).json()["conversation_id"]

    (status, unopened), (token_status, unopened_token) = (
        fetch_record(service, conversation_id),
        fetch_record(service, token_id),
    )
    with open_conversation(url) as talk:
        talk.read_answer()
        opened = fetch_record(service, conversation_id)[1]

    assert (status, token_status) == (200, 200)
    assert [account["status"] for account in (unopened, unopened_token, opened)] == [
        "initiated",
        "initiated",
        "in-progress",
    ]
    assert unopened["metadata"]["call_duration_secs"] == 0
    assert unopened_token["metadata"]["authorization_method"] == "livekit_token"


def test_a_fault_can_lose_double_reorder_or_delay_a_webhook(service: Service, receiver: Receiver) -> None:
    ids = []
    for fault in (
        {"delivery": "lost"},
        {"delivery": "twice"},
        {"delivery": "held_back"},
        {"latency_seconds": 0.01},
    ):
        service.http.put("/_emulator/faults", json={"target": "webhook", "times": 1} | fault)
        ids.append(converse(service))

    lost, twice, held_back, late = ids
    received: list[str] = []
    while len(received) < 4:  # a webhook of an earlier test may arrive late
        reported = receiver.next()["data"]["conversation_id"]
        received += [reported] if reported in ids else []
    assert lost not in received
    assert received == [twice, twice, late, held_back]


def test_voicepass_accepts_the_default_secret_of_the_webhook(serve: Serve) -> None:
    secret = serve(Emulator(agents=[AGENT])).emulator.webhooks.secret

    settings = settings_with(elevenlabs_webhook_secret=SecretStr(secret))

    assert settings.webhook_secrets == [secret]


def test_the_emulator_continues_without_a_receiver_of_webhooks(serve: Serve) -> None:
    service = serve(Emulator(agents=[AGENT], webhook_url=f"http://127.0.0.1:{free_port()}/hook"))

    converse(service)
    conversation_id = converse(service)

    assert fetch_record(service, conversation_id)[0] == 200
