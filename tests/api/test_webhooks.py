"""The webhook's route: which deliveries it accepts, what a delivery changes, and that it changes it once."""

import asyncio
import contextlib
import json
import queue
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import respx
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from elevenlabs_emulator import EmulatedAgent, Emulator, create_emulator
from tests.canaries import API_KEY
from tests.conftest import AGENT_ID, MakeToken, ServiceClient, serving, settings_with
from tests.logs import capture_logs
from tests.servers import running
from tests.settlement.test_webhook import OLD_SECRET, SECRET, event, hostile, signature
from tests.tables import table
from voicepass.api.middleware import MAX_WEBHOOK_BYTES, MAX_WEBHOOKS_AT_ONCE, WEBHOOK_PATH, Surface
from voicepass.app import create_app

pytestmark = pytest.mark.anyio

SERVICE_TOKEN = "canary-service-token-of-the-webhook-tests"
SETTINGS: dict[str, Any] = {
    "elevenlabs_webhook_secret": SecretStr(f"{SECRET}, {OLD_SECRET}"),
    "voicepass_service_tokens": SERVICE_TOKEN,
}
with_secret = pytest.mark.parametrize("api", [SETTINGS], indirect=True)


async def deliver(api: httpx.AsyncClient, body: bytes, *, secret: str = SECRET) -> httpx.Response:
    headers = {"ElevenLabs-Signature": signature(int(time.time()), body, secret=secret)}
    return await api.post(WEBHOOK_PATH, content=body, headers=headers)


async def conversation(api: httpx.AsyncClient) -> dict[str, Any]:
    answer = await api.get("/v1/conversations/conv_1", headers={"Authorization": f"Bearer {SERVICE_TOKEN}"})
    told: dict[str, Any] = answer.raise_for_status().json()
    return told


@with_secret
async def test_every_hostile_signature_is_refused_and_none_causes_an_internal_error(
    api: httpx.AsyncClient, bearer: dict[str, str]
) -> None:
    await api.post("/v1/signed-url", headers=bearer)

    answers = {}
    for case, (values, body) in hostile(int(time.time())).items():
        headers = [(b"ElevenLabs-Signature", value.encode() if isinstance(value, str) else value) for value in values]
        answer = await api.post(WEBHOOK_PATH, content=body, headers=headers)
        answers[case] = (answer.status_code, answer.json()["code"], answer.headers["www-authenticate"])

    assert len(answers) >= 60
    assert answers == dict.fromkeys(answers, (401, "signature_invalid", "ElevenLabs-Signature"))
    assert (await conversation(api))["settled_at"] is None


async def test_without_a_webhook_secret_every_delivery_is_refused(api: httpx.AsyncClient) -> None:
    for secret in (SECRET, "", "None"):
        assert (await deliver(api, event(), secret=secret)).status_code == 401


@with_secret
@pytest.mark.parametrize("secret", [SECRET, OLD_SECRET])
async def test_a_webhook_settles_what_a_conversation_used(
    api: httpx.AsyncClient, bearer: dict[str, str], secret: str
) -> None:
    await api.post("/v1/signed-url", headers=bearer)

    answer = await deliver(api, event(), secret=secret)

    assert (answer.status_code, answer.json()) == (200, {"status": "received"})
    told = await conversation(api)
    assert (told["seconds"], told["user_id"], told["identity_mismatch"]) == (42, "u-1", False)
    assert told["settled_at"] is not None


@with_secret
async def test_a_hundred_copies_at_once_count_once(api: httpx.AsyncClient, bearer: dict[str, str]) -> None:
    await api.post("/v1/signed-url", headers=bearer)

    answers = await asyncio.gather(*(deliver(api, event()) for _ in range(100)))

    assert {answer.status_code for answer in answers} == {200}
    metrics = (await api.get("/metrics")).text
    assert 'voicepass_settlements_total{source="webhook"} 1.0' in metrics
    assert 'voicepass_settled_seconds_total{source="webhook"} 42.0' in metrics
    assert 'voicepass_settlement_lag_seconds_count{source="webhook"} 1.0' in metrics


@with_secret
async def test_a_webhook_that_comes_before_its_pass_waits_for_it(
    api: httpx.AsyncClient, bearer: dict[str, str]
) -> None:
    early = await deliver(api, event())

    await api.post("/v1/signed-url", headers=bearer)

    assert early.status_code == 200
    assert (await conversation(api))["seconds"] == 42


@with_secret
async def test_a_webhook_that_comes_after_its_pass_expired_counts(api: ServiceClient, bearer: dict[str, str]) -> None:
    await api.post("/v1/signed-url", headers=bearer)
    await api.app.state.ledger.note_unopened("conv_1", expires_seconds=0)
    expired = await conversation(api)

    await deliver(api, event())

    assert (expired["seconds"], (await conversation(api))["seconds"]) == (0, 42)


@with_secret
async def test_who_claims_to_be_another_is_noticed_and_charged_as_who_they_are(
    api: httpx.AsyncClient, bearer: dict[str, str]
) -> None:
    await api.post("/v1/signed-url", headers=bearer)

    with capture_logs() as logged:
        await deliver(api, event(user_id="u-victim"))

    told = await conversation(api)
    assert (told["user_id"], told["seconds"], told["identity_mismatch"]) == ("u-1", 42, True)
    assert [(line["event"], line["log_level"], line["user_id"]) for line in logged] == [
        ("conversation.settled", "info", "u-1"),
        ("conversation.identity_mismatch", "warning", "u-1"),
    ]
    assert "u-victim" not in str(logged)
    assert "voicepass_identity_mismatches_total 1.0" in (await api.get("/metrics")).text


@with_secret
@pytest.mark.parametrize("kind", ["post_call_audio", "call_initiation_failure"])
async def test_an_event_of_no_use_is_taken_in(api: httpx.AsyncClient, kind: str) -> None:
    assert (await deliver(api, event(type=kind))).status_code == 200


@with_secret
@table("body", [b"", b"{", b"[]", b'{"type": "x"}', event(None), b"[" * 100_000])
async def test_a_signed_body_that_is_no_event_is_refused_so_that_nobody_sends_it_again(
    api: httpx.AsyncClient, body: bytes
) -> None:
    answer = await deliver(api, body)

    assert (answer.status_code, answer.json()["code"]) == (422, "request_invalid")
    assert "agent" not in answer.json()["detail"]


@pytest.mark.long
async def test_a_ledger_that_is_out_asks_for_another_delivery(
    tmp_path: Path, upstream: respx.MockRouter, bearer: dict[str, str]
) -> None:
    path = tmp_path / "ledger.db"
    del upstream
    async with serving(**SETTINGS, voicepass_database_url=f"sqlite:///{path}") as api:
        await api.post("/v1/signed-url", headers=bearer)
        with contextlib.closing(sqlite3.connect(path)) as blocker:
            blocker.execute("BEGIN IMMEDIATE")
            out = await deliver(api, event())
            blocker.rollback()
        again = await deliver(api, event())

        assert (out.status_code, out.json()["code"], out.headers["retry-after"]) == (503, "ledger_unavailable", "5")
        assert again.status_code == 200
        assert (await conversation(api))["seconds"] == 42


# Its size.


def event_of(size: int) -> bytes:
    bare = event(padding="")
    return event(padding="x" * (size - len(bare)))


@with_secret
async def test_a_webhook_may_hold_a_transcript_and_no_recording(api: httpx.AsyncClient) -> None:
    largest = await deliver(api, event_of(MAX_WEBHOOK_BYTES))
    too_large = await deliver(api, event_of(MAX_WEBHOOK_BYTES + 1))

    assert largest.status_code == 200
    assert (too_large.status_code, too_large.json()["code"]) == (413, "body_too_large")
    assert too_large.json()["detail"] == "The body is larger than 1024 kB."


@with_secret
@pytest.mark.parametrize("path", ["/v1/signed-url", f"{WEBHOOK_PATH}/", f"{WEBHOOK_PATH}x", "//v1/webhooks/elevenlabs"])
async def test_no_other_path_may_be_sent_as_much(api: httpx.AsyncClient, path: str) -> None:
    answer = await api.post(f"http://voicepass.test{path}", content=event_of(17 * 1024))

    assert (answer.status_code, answer.json()["detail"]) == (413, "The body is larger than 16 kB.")


class Sender:
    """A caller of the middleware who sends these parts of a body, and then nothing until `go_on` is set."""

    def __init__(self, *parts: bytes) -> None:
        self.sent = 0
        self.go_on = asyncio.Event()
        self.status = 0
        self._parts = parts

    async def receive(self) -> Message:
        if self.sent < len(self._parts):
            self.sent += 1
            return {"type": "http.request", "body": self._parts[self.sent - 1], "more_body": True}
        await self.go_on.wait()
        return {"type": "http.request", "body": b""}

    async def send(self, message: Message) -> None:
        self.status = message.get("status", self.status)


def webhook_scope(header: bytes | None = None) -> Scope:
    good = signature(int(time.time()), b"{}").encode()
    headers = [(b"elevenlabs-signature", good if header is None else header)]
    return {"type": "http", "method": "POST", "path": WEBHOOK_PATH, "headers": headers, "query_string": b""}


async def answered(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body"})


async def until_waiting(senders: list[Sender]) -> list[int]:
    """Wait until none of them can send more; returns how many parts each has sent."""
    before: list[int] = []
    while (now := [sender.sent for sender in senders]) != before or not before:
        before = now
        for _ in range(10):
            await asyncio.sleep(0)
    return before


async def test_a_few_large_webhooks_are_read_at_a_time_and_the_others_wait_in_their_sockets() -> None:
    surface = Surface(answered)
    senders = [Sender(b"x" * 17_000, b"x") for _ in range(100)]
    requests = [asyncio.create_task(surface(webhook_scope(), each.receive, each.send)) for each in senders]

    sent = await until_waiting(senders)
    for sender in senders:
        sender.go_on.set()
    await asyncio.gather(*requests)

    assert sent.count(2) == MAX_WEBHOOKS_AT_ONCE
    assert sent.count(1) == 100 - MAX_WEBHOOKS_AT_ONCE
    assert {sender.status for sender in senders} == {200}


async def test_silent_connections_delay_no_signed_webhook() -> None:
    surface = Surface(answered)
    silent = [Sender(b"{") for _ in range(100)]
    requests = [asyncio.create_task(surface(webhook_scope(), each.receive, each.send)) for each in silent]
    await until_waiting(silent)

    honest = Sender(b"x" * 17_000, b"x")
    honest.go_on.set()
    async with asyncio.timeout(5):
        await surface(webhook_scope(), honest.receive, honest.send)
    for sender in silent:
        sender.go_on.set()
    await asyncio.gather(*requests)

    assert honest.status == 200


@pytest.mark.parametrize("header", [b"", b"t=1,v0=", b"t=1600000000,v0=" + b"0" * 64])
async def test_the_form_and_the_age_of_a_signature_are_checked_before_the_body_is_waited_for(header: bytes) -> None:
    sender = Sender()

    async with asyncio.timeout(5):
        await Surface(answered)(webhook_scope(header), sender.receive, sender.send)

    assert sender.status == 401


LARGE = json.dumps(json.loads(event()) | {"filler": "x" * 17_000}).encode()


def mounted(app: ASGIApp) -> ASGIApp:
    return Starlette(routes=[Mount("/voice", app)])


def behind_prefix(app: ASGIApp) -> ASGIApp:
    """As uvicorn calls an app with --root-path /voice: the prefix stands before every path."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "root_path": "/voice", "path": f"/voice{scope['path']}"}, receive, send)

    return call


@pytest.mark.parametrize(
    ("place", "prefix"),
    [(mounted, "/voice"), (behind_prefix, ""), (behind_prefix, "/voice")],
    ids=["mounted", "a proxy that removes the prefix", "a proxy that keeps the prefix"],
)
@pytest.mark.usefixtures("upstream")
async def test_everything_works_behind_a_path_prefix(
    place: Callable[[ASGIApp], ASGIApp], prefix: str, bearer: dict[str, str]
) -> None:
    app = create_app(settings_with(**SETTINGS))
    large = LARGE, {"ElevenLabs-Signature": signature(int(time.time()), LARGE, secret=SECRET)}
    async with (
        app.router.lifespan_context(app),
        ServiceClient(place(app)) as api,
    ):
        webhook = await api.post(prefix + WEBHOOK_PATH, content=large[0], headers=large[1])
        answers = [
            await api.get(f"{prefix}{path}", headers=bearer)
            for path in ("/v1/signed-url", "/v1/client.js", "/v1/usage", "/healthz", "/readyz", "/metrics")
        ]
        too_large = await api.post(f"{prefix}/v1/signed-url", content=LARGE, headers=bearer)
        nothing = await api.get(f"{prefix}/voice/voice/healthz")

    assert (webhook.status_code, webhook.json()) == (200, {"status": "received"})
    assert {answer.status_code for answer in answers} == {200}
    assert (too_large.status_code, nothing.status_code) == (413, 404)


# The whole way, over real sockets.


class Tapped:
    """An app around the service that tells when it has answered a webhook."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.answered: queue.Queue[int] = queue.Queue()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def tapped(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.start" and scope["path"] == WEBHOOK_PATH:
                self.answered.put(message["status"])

        await self._app(scope, receive, tapped if scope["type"] == "http" else send)


@pytest.fixture
def journey() -> Iterator[tuple[Emulator, httpx.Client, "queue.Queue[int]"]]:
    emulator = Emulator(
        agents=[EmulatedAgent(agent_id=AGENT_ID)],
        api_keys={API_KEY: frozenset({"convai_write"})},
        webhook_secret=SECRET,
    )
    with running(lambda _url: create_emulator(emulator)) as elevenlabs:
        service = Tapped(create_app(settings_with(**SETTINGS, elevenlabs_base_url=elevenlabs)))
        with running(lambda _url: service) as url, httpx.Client(base_url=url, trust_env=False) as client:
            emulator.webhooks.url = f"{url}{WEBHOOK_PATH}"
            yield emulator, client, service.answered


def converse(voice_pass: dict[str, Any], emulator: Emulator, *, user_id: str, seconds: int) -> None:
    """Open the conversation as the SDK does, in the name of `user_id`, and end it `seconds` later."""
    begin = {
        "type": "conversation_initiation_client_data",
        "conversation_config_override": {"conversation": {"text_only": True}},
        "dynamic_variables": voice_pass["dynamic_variables"],
        "user_id": user_id,
    }
    with connect(voice_pass["signed_url"], subprotocols=[Subprotocol("convai")], proxy=None) as socket:
        socket.send(json.dumps(begin))
        socket.recv(timeout=5)
        emulator.advance(seconds)


@pytest.mark.parametrize(("user_id", "mismatch"), [("u-1", False), ("u-victim", True)])
def test_a_conversation_is_held_and_what_it_used_is_known(
    journey: tuple[Emulator, httpx.Client, "queue.Queue[int]"],
    make_token: MakeToken,
    user_id: str,
    mismatch: bool,  # noqa: FBT001 - a column of the table
) -> None:
    emulator, client, answered = journey
    service = {"Authorization": f"Bearer {SERVICE_TOKEN}"}
    voice_pass = client.post("/v1/signed-url", headers={"Authorization": f"Bearer {make_token()}"}).json()
    path = f"/v1/conversations/{voice_pass['conversation_id']}"
    before = client.get(path, headers=service).json()

    converse(voice_pass, emulator, user_id=user_id, seconds=42)

    assert answered.get(timeout=5) == 200
    after = client.get(path, headers=service).json()
    assert (before["settled_at"], before["seconds"]) == (None, None)
    assert (after["user_id"], after["seconds"], after["identity_mismatch"]) == ("u-1", 42, mismatch)
    assert after["settled_at"] is not None


async def test_background_tasks_end_with_the_service(upstream: respx.MockRouter) -> None:
    del upstream
    before = asyncio.all_tasks()
    running_ones = {}
    for every_seconds in (0, 60):
        async with serving(voicepass_reconcile_seconds=every_seconds):
            running_ones[every_seconds] = len(asyncio.all_tasks() - before)

    assert running_ones[60] == running_ones[0] + 1  # the reconciler; old data is deleted in either case
    assert running_ones[0] >= 1
    assert asyncio.all_tasks() == before
