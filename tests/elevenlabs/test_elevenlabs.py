"""The adapter at its HTTP edge: what it requests and returns, and how it translates each refusal of ElevenLabs."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import respx

from tests.canaries import API_KEY, secrets_in
from tests.conftest import AGENT_ID, SIGNED_URL_PATH, UPSTREAM, signed_url
from tests.faults import asked, good, http
from tests.logs import capture_logs
from tests.servers import listening
from tests.tables import table
from voicepass.elevenlabs import ElevenLabs, Workspace
from voicepass.elevenlabs.refusals import refusal_for, vendor_error
from voicepass.errors import AgentUnknown, BadAnswer, Busy, ElevenLabsRefusal, KeyRejected, Timeout, Unavailable
from voicepass.model import Agent, Transport
from voicepass.outbound import http_transport

pytestmark = pytest.mark.anyio


def make_agent(base_url: str) -> Agent:
    return Agent(alias="default", agent_id=AGENT_ID, base_url=base_url)


AGENT = make_agent(UPSTREAM)
NOW = 1_790_000_000.0


@asynccontextmanager
async def open_adapter(
    base_url: str = UPSTREAM, *, api_keys: Sequence[str] = (API_KEY,), deadline_seconds: float = 4.0
) -> AsyncIterator[ElevenLabs]:
    async with http_transport(connect_seconds=deadline_seconds / 4) as transport:
        workspace = Workspace(base_url=base_url, api_keys=api_keys)
        provider = ElevenLabs(
            transport=transport,
            workspaces=[workspace],
            deadline_seconds=deadline_seconds,
            max_calls=8,
            clock=lambda: NOW,
        )
        yield provider
        await provider.aclose()


@pytest.mark.usefixtures("upstream")
async def test_a_signed_url_is_returned_with_its_conversation_and_its_expiry() -> None:
    async with open_adapter() as provider:
        credential = await provider.fetch_credential(AGENT, Transport.WEBSOCKET)

    assert credential.secret == signed_url()
    assert credential.conversation_id == "conv_1"
    assert credential.expires_at == NOW + 900


@table(
    ("answer", "conversation_id"),
    [
        ({"signed_url": signed_url(), "conversation_id": "conv_json"}, "conv_1"),
        ({"signed_url": signed_url().partition("&conversation_id")[0], "conversation_id": "conv_json"}, "conv_json"),
        ({"signed_url": signed_url().partition("&conversation_id")[0]}, None),
        ({"signed_url": signed_url(conversation_id="a%20b")}, None),
        ({"signed_url": f"{UPSTREAM.replace('https', 'wss')}/x?conversation_id=conv_2&token=t"}, "conv_2"),
    ],
)
async def test_the_conversation_id_is_read_from_the_url_or_else_from_the_answer(
    upstream: respx.MockRouter, answer: dict[str, str], conversation_id: str | None
) -> None:
    upstream["signed_url"].respond(json=answer)

    async with open_adapter() as provider:
        credential = await provider.fetch_credential(AGENT, Transport.WEBSOCKET)

    assert credential.conversation_id == conversation_id


@table(
    "url",
    [
        signed_url(scheme="ws"),
        signed_url(scheme="https"),
        signed_url(scheme="javascript"),
        signed_url(host="elevenlabs.io.evil.test"),
        signed_url(host="evilelevenlabs.io"),
        signed_url(host="127.0.0.1"),
        signed_url(host="api.elevenlabs.io:8443"),
        signed_url(host="api.elevenlabs.io:99999"),
        signed_url(host="user@api.elevenlabs.io"),
        signed_url(host="api.elevenlabs.io@evil.test"),
        signed_url(host="evil.test\\api.elevenlabs.io"),
        signed_url(host="evil.test#api.elevenlabs.io"),
        signed_url(host=""),
        signed_url(agent_id="agent_other"),
        signed_url() + "&agent_id=agent_other",
        signed_url() + "#fragment",
        signed_url() + "\n",
        signed_url() + " ",
        signed_url() + "\u202e",
        "wss://api.elevenlabs.io/v1/convai/conversation",
        f"wss://api.elevenlabs.io/v1/convai/conversation?agent_id={AGENT_ID}&conversation_id=conv_1",
        f"wss://api.elevenlabs.io/v1/convai/conversation?agent_id={AGENT_ID}&branch_id=agtbrch_1&environment=staging",
        "//api.elevenlabs.io/x?a=b",
        "",
        None,
        7,
        ["wss://api.elevenlabs.io/x?a=b"],
    ],
)
async def test_a_url_that_is_not_a_signed_url_of_this_agent_is_refused(upstream: respx.MockRouter, url: object) -> None:
    upstream["signed_url"].respond(json={"signed_url": url})

    async with open_adapter() as provider:
        with pytest.raises(BadAnswer) as refused:
            await provider.fetch_credential(AGENT, Transport.WEBSOCKET)

    assert secrets_in(refused.value.operator_note) == []


async def test_a_url_on_another_host_of_elevenlabs_is_returned_and_logged(upstream: respx.MockRouter) -> None:
    upstream["signed_url"].respond(json={"signed_url": signed_url(host="api.us.elevenlabs.io")})

    with capture_logs() as logged:
        async with open_adapter() as provider:
            credential = await provider.fetch_credential(AGENT, Transport.WEBSOCKET)

    assert credential.secret.startswith("wss://api.us.elevenlabs.io/")
    assert [line["event"] for line in logged] == ["signed_url.host_differed"]


async def test_a_url_on_a_host_of_elevenlabs_is_refused_if_the_base_url_is_not_elevenlabs() -> None:
    with respx.mock(base_url="https://proxy.example", using="voicepass") as router:
        router.get(SIGNED_URL_PATH).respond(json={"signed_url": signed_url()})

        async with open_adapter("https://proxy.example") as provider:
            with pytest.raises(BadAnswer):
                await provider.fetch_credential(make_agent("https://proxy.example"), Transport.WEBSOCKET)


@table("token", [None, "", 7, "a b", "a\r\nX: y"])
async def test_an_unusable_token_is_refused(upstream: respx.MockRouter, token: object) -> None:
    upstream.get("/v1/convai/conversation/token").respond(json={"token": token})

    async with open_adapter() as provider:
        with pytest.raises(BadAnswer):
            await provider.fetch_credential(AGENT, Transport.WEBRTC)


@table(
    "answer",
    [
        {"html": "<h1>Please wait</h1>"},
        {"content": b""},
        {"content": b"\xff\xfe"},
        {"content": b"[" * 50_000},
        {"json": []},
        {"json": {}},
        {"content": gzip.compress(b" " * 1_000_000), "headers": {"content-encoding": "gzip"}},
        {"content": b"{" + b" " * 70_000 + b"}"},
        {"status_code": 204},
        {"status_code": 302, "headers": {"location": "https://evil.test/"}},
        {"status_code": 405, "json": {"detail": "Method Not Allowed"}},
    ],
)
async def test_an_unusable_answer_is_a_bad_answer(upstream: respx.MockRouter, answer: dict[str, Any]) -> None:
    upstream.reset()
    upstream["signed_url"].respond(**answer)

    async with open_adapter() as provider:
        with pytest.raises(BadAnswer):
            await provider.fetch_credential(AGENT, Transport.WEBSOCKET)

    assert len(upstream.calls) == 1, "a redirect was followed, which sends the key to another host"


@table(
    ("error", "refusal"),
    [
        (httpx.ConnectTimeout, Timeout),
        (httpx.ReadTimeout, Timeout),
        (httpx.PoolTimeout, Timeout),
        (httpx.ConnectError, Unavailable),
        (httpx.ReadError, Unavailable),
        (httpx.RemoteProtocolError, Unavailable),
    ],
)
async def test_a_connection_error_becomes_a_refusal_that_names_the_error(
    upstream: respx.MockRouter, error: type[httpx.TransportError], refusal: type[ElevenLabsRefusal]
) -> None:
    upstream["signed_url"].mock(side_effect=error(API_KEY))

    async with open_adapter() as provider:
        with pytest.raises(refusal) as refused:
            await provider.fetch_credential(AGENT, Transport.WEBSOCKET)

    assert error.__name__ in refused.value.operator_note
    assert API_KEY not in refused.value.operator_note


@pytest.mark.parametrize(
    "part",
    [
        http(200, b"{").replace(b": 1", b": 99"),
        http(200).replace(b": 0", b": 99"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n50\r\n{",
        b"HTTP/1.1 200 OK\r\nContent-Le",
    ],
    ids=["in the body", "before the body", "in a chunk", "in the headers"],
)
async def test_an_answer_that_is_cut_off_is_an_outage_and_the_call_is_retried(part: bytes) -> None:
    script = [good, good, good, good, good, None, good, None, None]  # five calls allow one retry

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await asked(reader):
            say = script.pop(0)
            writer.write(say(base_url) if say else part)
            if say is None:
                return

    async with listening(answer) as base_url, open_adapter(base_url) as provider:
        for _ in range(6):
            await provider.fetch_credential(make_agent(base_url), Transport.WEBSOCKET)
        after_the_retry = len(script)
        with pytest.raises(Unavailable) as refused:
            await provider.fetch_credential(make_agent(base_url), Transport.WEBSOCKET)

    assert after_the_retry == 2
    assert "is the base URL right" not in refused.value.operator_note


def legacy(status: str, message: str = "vendor words") -> dict[str, object]:
    return {"detail": {"status": status, "message": message}}


def current(code: str, kind: str = "x") -> dict[str, object]:
    return {"detail": {"type": kind, "code": code, "message": "vendor words", "status": code, "request_id": "r"}}


@table(
    ("status", "body", "code", "remedy"),
    [
        (401, legacy("invalid_api_key"), "elevenlabs_key_rejected", "mistyped, revoked, or of another region"),
        (401, current("invalid_api_key"), "elevenlabs_key_rejected", "mistyped, revoked, or of another region"),
        (401, legacy("missing_permissions"), "elevenlabs_key_rejected", "lacks the permission convai_write"),
        (403, current("insufficient_permissions"), "elevenlabs_key_rejected", "lacks the permission convai_write"),
        (403, "<html>", "elevenlabs_key_rejected", "mistyped"),
        (401, legacy("detected_unusual_activity"), "elevenlabs_key_rejected", "unusual"),
        (401, legacy("quota_exceeded"), "elevenlabs_quota_exhausted", "used up"),
        (402, current("insufficient_credits"), "elevenlabs_quota_exhausted", "used up"),
        (402, {"detail": "pay"}, "elevenlabs_quota_exhausted", "used up"),
        (404, legacy("document_not_found"), "elevenlabs_agent_unknown", "Check its id"),
        (404, current("agent_not_found"), "elevenlabs_agent_unknown", "Check its id"),
        (400, {"detail": "Invalid agent ID"}, "elevenlabs_agent_unknown", "Invalid agent ID"),
        (
            422,
            {"detail": [{"loc": ["query", "agent_id"], "msg": "m", "type": "t"}]},
            "elevenlabs_agent_unknown",
            "agent_id",
        ),
        (429, legacy("too_many_concurrent_requests"), "elevenlabs_busy", "limit"),
        (429, current("rate_limit_exceeded"), "elevenlabs_busy", "limit"),
        (429, "", "elevenlabs_busy", "limit"),
        (503, legacy("system_busy"), "elevenlabs_busy", "limit"),
        (500, current("internal_error"), "elevenlabs_unavailable", "out of order"),
        (502, "Bad gateway", "elevenlabs_unavailable", "Bad gateway"),
        (503, current("maintenance"), "elevenlabs_unavailable", "maintenance"),
        (504, "", "elevenlabs_unavailable", "out of order"),
        (418, {}, "elevenlabs_bad_answer", "HTTP 418"),
    ],
)
def test_every_error_gets_its_code_and_a_note_with_the_remedy(
    status: int, body: object, code: str, remedy: str
) -> None:
    sent = body.encode() if isinstance(body, str) else json.dumps(body).encode()

    refusal = refusal_for(status, sent, retry_after=None, now=NOW)

    assert refusal.code == code
    assert remedy in refusal.operator_note
    assert "vendor words" not in refusal.detail


def deny(permission: str) -> dict[str, object]:
    """Make the live service's answer to a key without a permission, as users have quoted it."""
    message = f"The API key you used is missing the permission {permission} to execute this operation."
    kind, code, status = "authentication_error", "unauthorized", "missing_permissions"
    return {"detail": {"type": kind, "code": code, "message": message, "status": status}}


def make_error(status: object, code: object) -> dict[str, object]:
    return {"detail": {"type": "x", "code": code, "message": "vendor words", "status": status, "request_id": "r"}}


@table(
    ("status", "body", "vendor_code", "code", "remedy"),
    [
        (401, deny("convai_read"), "missing_permissions", "elevenlabs_key_rejected", "'ElevenAgents: Read'"),
        (401, deny("convai_write"), "missing_permissions", "elevenlabs_key_rejected", "'ElevenAgents: Write'"),
        (401, deny("user_read"), "missing_permissions", "elevenlabs_key_rejected", "permission user_read. Give"),
        (401, make_error("quota_exceeded", "unauthorized"), "quota_exceeded", "elevenlabs_quota_exhausted", "used up"),
        (401, make_error("quota_exceeded", None), "quota_exceeded", "elevenlabs_quota_exhausted", "used up"),
        (401, make_error("detected_unusual_activity", "unauthorized"), "detected_unusual_activity",
         "elevenlabs_key_rejected", "unusual"),
        (401, make_error("needs_authorization", "unauthorized"), "needs_authorization", "elevenlabs_key_rejected",
         "received no API key"),
        (401, current("unauthorized"), "unauthorized", "elevenlabs_key_rejected", "mistyped, revoked"),
        (404, make_error("conversation_history_not_found", "conversation_not_found"),
         "conversation_history_not_found", "elevenlabs_agent_unknown", ""),
        (401, make_error("unauthorized", "missing_permissions"), "missing_permissions", "elevenlabs_key_rejected",
         "lacks the permission convai_write"),
        (429, make_error("system_busy", "rate_limit_exceeded"), "system_busy", "elevenlabs_busy", "limit"),
        (401, make_error("something_new", "unauthorized"), "something_new", "elevenlabs_key_rejected", "mistyped"),
    ],
)  # fmt: skip
def test_a_known_status_decides_and_otherwise_a_known_code(
    status: int, body: object, vendor_code: str, code: str, remedy: str
) -> None:
    refusal = refusal_for(status, json.dumps(body).encode(), retry_after=None, now=NOW)

    assert (refusal.vendor_code, refusal.code) == (vendor_code, code)
    assert remedy in refusal.operator_note


@table("odd", [None, 5, True, 1.5, "", [], {}, ["quota_exceeded"], {"quota_exceeded": 1}])
def test_a_status_or_code_that_is_not_text_is_ignored(odd: object) -> None:
    for body in (make_error(odd, "quota_exceeded"), make_error("quota_exceeded", odd)):
        assert vendor_error(json.dumps(body).encode()) == ("quota_exceeded", "vendor words")
    assert vendor_error(json.dumps(make_error(odd, odd)).encode())[0] == ""


@table(
    "body",
    [
        b'{"detail": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
        b'{"detail": {"status": "x", "message": ' + b"[" * 5_000 + b"]" * 5_000 + b"}}",
        b'{"detail": {"status": "x\\n{\\u001b", "message": {"a": NaN}}}',
        b'{"detail": {"status": "' + b"x" * 50_000 + b'", "code": "\\ud800"}}',
        b'{"detail": {"message": "missing the permission ' + b"x" * 50_000 + b'", "status": "missing_permissions"}}',
        b'{"detail": {"message": "missing the permission {0.__class__}", "status": "missing_permissions"}}',
        b'{"detail": null}',
        b'{"detail": {}}',
        b'{"status": "missing_permissions"}',
        b"\xff\xfe",
        b"",
    ],
)
def test_an_error_of_any_shape_gives_one_short_printable_note(body: bytes) -> None:
    refusal = refusal_for(401, body, retry_after=None, now=NOW)

    assert refusal.code == "elevenlabs_key_rejected"
    assert refusal.operator_note.isprintable()
    assert len(refusal.operator_note) < 1_000


@table(
    ("retry_after", "seconds"),
    [
        (None, 5),
        ("1", 1),
        ("0", 1),
        ("60", 60),
        ("3600", 60),
        ("99999999999999999999", 60),
        ("Mon, 21 Sep 2026 14:13:50 GMT", 30),
        ("Mon, 21 Sep 2020 14:13:50 GMT", 1),
        ("soon", 5),
        ("-3", 5),
        ("1.5", 5),
        ("\u0663", 5),
        ("", 5),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_read_in_every_form_up_to_a_minute(retry_after: str | None, seconds: int, status: int) -> None:
    refusal = refusal_for(status, b"{}", retry_after=retry_after, now=NOW)

    assert refusal.retry_after_seconds == seconds


def test_the_vendors_message_cannot_forge_a_log_line_or_flood_the_log() -> None:
    words = 'a\n{"event": "pass.granted"}\x1b[31m\u2028' + "x" * 10_000

    note = refusal_for(500, json.dumps(legacy("x", words)).encode(), retry_after=None, now=NOW).operator_note

    assert note.isprintable()
    assert len(note) < 500


async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")  # an answer before the request would be another fault
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 5000\r\n\r\n")
    while not writer.is_closing():
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.02)


async def never_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    del writer
    await reader.read()


@pytest.mark.parametrize("behave", [trickle, never_answer])
async def test_a_call_to_a_slow_or_silent_upstream_ends_at_the_deadline(behave: Any) -> None:
    loop = asyncio.get_running_loop()
    async with listening(behave) as base_url, open_adapter(base_url, deadline_seconds=0.3) as provider:
        begun = loop.time()

        with pytest.raises(Timeout):
            await provider.fetch_credential(make_agent(base_url), Transport.WEBSOCKET)

        assert loop.time() - begun < 3


async def test_a_caller_who_hangs_up_does_not_block_the_next_call(upstream: respx.MockRouter) -> None:
    release = asyncio.Event()

    async def answer_late(_request: httpx.Request) -> httpx.Response:
        await release.wait()
        return httpx.Response(200, json={"signed_url": signed_url()})

    upstream["signed_url"].mock(side_effect=answer_late)

    async with open_adapter() as provider:
        caller = asyncio.create_task(provider.fetch_credential(AGENT, Transport.WEBSOCKET))
        await asyncio.sleep(0)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        release.set()
        credential = await provider.fetch_credential(AGENT, Transport.WEBSOCKET)

    assert credential.conversation_id == "conv_1"


def make_key_check(*bad_keys: str) -> Callable[[httpx.Request], httpx.Response]:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.headers["xi-api-key"] in bad_keys:
            return httpx.Response(401, json=legacy("invalid_api_key"))
        return httpx.Response(200, json={"signed_url": signed_url()})

    return answer


async def test_while_keys_are_rotated_the_working_key_is_found_once_and_reused(upstream: respx.MockRouter) -> None:
    upstream["signed_url"].mock(side_effect=make_key_check("sk_old"))

    with capture_logs() as logged:
        async with open_adapter(api_keys=("sk_old", "sk_new")) as provider:
            for _ in range(3):
                await provider.fetch_credential(AGENT, Transport.WEBSOCKET)

    assert [call.request.headers["xi-api-key"] for call in upstream.calls] == ["sk_old", "sk_new", "sk_new", "sk_new"]
    assert [(line["event"], line["position"], line["of"]) for line in logged] == [("api_key.switched", 2, 2)]
    assert "sk_" not in str(logged)


async def test_two_rejected_keys_cause_one_refusal(upstream: respx.MockRouter) -> None:
    upstream["signed_url"].mock(side_effect=make_key_check("sk_old", "sk_new"))

    async with open_adapter(api_keys=("sk_old", "sk_new")) as provider:
        with pytest.raises(KeyRejected):
            await provider.fetch_credential(AGENT, Transport.WEBSOCKET)

    assert len(upstream.calls) == 2


async def test_the_second_key_is_not_tried_if_the_refusal_is_not_about_the_key(upstream: respx.MockRouter) -> None:
    upstream["signed_url"].respond(404, json=legacy("document_not_found"))

    async with open_adapter(api_keys=("sk_old", "sk_new")) as provider:
        with pytest.raises(AgentUnknown):
            await provider.fetch_credential(AGENT, Transport.WEBSOCKET)

    assert len(upstream.calls) == 1


# The pause after an answer that the next call would get as well.


class Ticks:
    """A monotonic clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def open_with_ticks(ticks: Ticks) -> AsyncIterator[ElevenLabs]:
    async with http_transport(connect_seconds=1) as transport:
        provider = ElevenLabs(
            transport=transport,
            workspaces=[Workspace(base_url=UPSTREAM, api_keys=[API_KEY])],
            deadline_seconds=4,
            max_calls=8,
            clock=lambda: NOW,
            ticks=ticks,
        )
        yield provider
        await provider.aclose()


async def fetch_refusal(provider: ElevenLabs) -> ElevenLabsRefusal | None:
    try:
        await provider.fetch_credential(AGENT, Transport.WEBSOCKET)
    except ElevenLabsRefusal as refusal:
        return refusal
    return None


async def test_after_a_rejected_key_calls_pause_for_a_time_that_grows_to_30_seconds(upstream: respx.MockRouter) -> None:
    route = upstream["signed_url"]
    route.respond(401, json={"detail": {"status": "invalid_api_key", "message": "m"}})
    ticks = Ticks()
    pauses = []
    async with open_with_ticks(ticks) as provider:
        for _ in range(7):
            await fetch_refusal(provider)
            began, calls = ticks.now, route.call_count
            while route.call_count == calls:
                ticks.now += 0.5
                refused = await fetch_refusal(provider)
                assert isinstance(refused, KeyRejected)
                assert refused.retry_after_seconds is None
            pauses.append(ticks.now - began)
            ticks.now = began + pauses[-1]

    assert pauses == [1, 2, 4, 8, 16, 30, 30]


async def test_a_good_answer_resets_the_pause(upstream: respx.MockRouter) -> None:
    route = upstream["signed_url"]
    rejected = httpx.Response(401, json={"detail": {"status": "invalid_api_key", "message": "m"}})
    good = httpx.Response(200, json={"signed_url": signed_url()})
    route.side_effect = [rejected, rejected, good, rejected, good]
    ticks = Ticks()
    async with open_with_ticks(ticks) as provider:
        got = [await fetch_refusal(provider)]
        ticks.now += 1
        got.append(await fetch_refusal(provider))
        ticks.now += 2
        got += [await fetch_refusal(provider), await fetch_refusal(provider)]
        ticks.now += 1
        got.append(await fetch_refusal(provider))

    assert [refusal is None for refusal in got] == [False, False, True, False, True]


async def test_a_429_pauses_every_call_of_its_workspace(upstream: respx.MockRouter) -> None:
    route = upstream["signed_url"]
    busy = httpx.Response(429, headers={"Retry-After": "7"}, json={"detail": {"status": "rate_limit_exceeded"}})
    route.side_effect = [busy, httpx.Response(200, json={"signed_url": signed_url()})]
    ticks = Ticks()
    async with open_with_ticks(ticks) as provider:
        first = await fetch_refusal(provider)
        ticks.now += 2.5
        others = [await fetch_refusal(provider) for _ in range(20)]
        word = await provider.explain_pause()
        ticks.now += 4.5
        after = await fetch_refusal(provider)

    assert first is not None
    assert (first.retry_after_seconds, first.has_reached_elevenlabs) == (7, True)
    assert {type(other) for other in others} == {Busy}
    assert {(other.retry_after_seconds, other.has_reached_elevenlabs) for other in others if other} == {(5, False)}
    assert word == "refuses, and is left alone for now"
    assert after is None
    assert route.call_count == 2


async def test_a_call_that_began_before_the_pause_ends_it_if_it_succeeds(upstream: respx.MockRouter) -> None:
    is_asked, release = asyncio.Event(), asyncio.Event()

    async def answer(_request: httpx.Request) -> httpx.Response:
        if is_asked.is_set():
            return httpx.Response(429, headers={"Retry-After": "7"}, json={"detail": {"status": "rate_limit_exceeded"}})
        is_asked.set()
        await release.wait()
        return httpx.Response(200, json={"signed_url": signed_url()})

    upstream["signed_url"].mock(side_effect=answer)
    async with open_with_ticks(Ticks()) as provider:
        slow = asyncio.create_task(fetch_refusal(provider))
        await is_asked.wait()
        refused = await fetch_refusal(provider)
        paused = await provider.explain_pause()
        release.set()
        await slow
        then = await provider.explain_pause()

    assert isinstance(refused, Busy)
    assert (paused, then) == ("refuses, and is left alone for now", None)


async def test_a_429_that_asks_for_an_hour_pauses_calls_for_a_minute(upstream: respx.MockRouter) -> None:
    route = upstream["signed_url"]
    busy = httpx.Response(429, headers={"Retry-After": "3600"}, json={"detail": {"status": "rate_limit_exceeded"}})
    route.side_effect = [busy, httpx.Response(200, json={"signed_url": signed_url()})]
    ticks = Ticks()
    async with open_with_ticks(ticks) as provider:
        first = await fetch_refusal(provider)
        ticks.now += 59
        held_back = await fetch_refusal(provider)
        ticks.now += 1
        after = await fetch_refusal(provider)

    assert [refusal and refusal.retry_after_seconds for refusal in (first, held_back, after)] == [60, 1, None]


async def test_a_key_that_one_agent_rejects_does_not_pause_calls_for_another(
    upstream: respx.MockRouter,
) -> None:
    other = Agent(alias="other", agent_id="agent_other", base_url=UPSTREAM)
    route = upstream["signed_url"]
    route.side_effect = [
        httpx.Response(403, json={"detail": "m"}),
        httpx.Response(200, json={"signed_url": signed_url()}),
    ]
    async with open_with_ticks(Ticks()) as provider:
        with pytest.raises(KeyRejected):
            await provider.fetch_credential(other, Transport.WEBSOCKET)
        with pytest.raises(KeyRejected):
            await provider.fetch_credential(other, Transport.WEBSOCKET)

        assert await fetch_refusal(provider) is None
    assert route.call_count == 2


async def test_a_429_without_retry_after_does_not_pause_other_calls(upstream: respx.MockRouter) -> None:
    route = upstream["signed_url"]
    busy = httpx.Response(429, json={"detail": {"status": "concurrent_limit_exceeded"}})
    route.side_effect = [busy, httpx.Response(200, json={"signed_url": signed_url()})]
    async with open_with_ticks(Ticks()) as provider:
        got = [await fetch_refusal(provider), await fetch_refusal(provider)]

    assert [refusal is None for refusal in got] == [False, True]
