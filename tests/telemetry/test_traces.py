"""The traces for a collector: one for each attempt, without any secret, and no request waits for the collector."""

import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import pytest
import respx
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from starlette.types import Receive, Scope, Send

from tests.canaries import CanaryLog, secrets_in
from tests.conftest import MakeToken, serving, settings_with
from tests.servers import free_port, running
from voicepass.app import create_app
from voicepass.telemetry.traces import FLUSH_SECONDS

pytestmark = pytest.mark.anyio

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@dataclass
class Collector:
    """Receives what OpenTelemetry exports, as an OTLP collector does over HTTP."""

    received: list[bytes] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.received.append(body)
        self.paths.add(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for body in self.received
            for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans
            for of_scope in of_resource.scope_spans
            for span in of_scope.spans
        ]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    collector = Collector()
    with running(lambda _url: collector) as url:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        yield collector


async def test_a_pass_is_one_span_for_each_step_within_the_callers_trace(
    collector: Collector, upstream: respx.MockRouter, bearer: dict[str, str]
) -> None:
    begun = time.time()
    async with serving() as client:
        headers = bearer | {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        answer = await client.post("/v1/signed-url", headers=headers)
    ended = time.time()

    server, *steps = sorted(collector.spans, key=lambda span: (span.start_time_unix_nano, -span.end_time_unix_nano))
    assert (server.name, server.kind) == ("issue a pass", Span.SPAN_KIND_SERVER)
    assert (server.trace_id.hex(), server.parent_span_id.hex()) == (TRACE, PARENT)
    assert {attribute.key: attribute.value.string_value for attribute in server.attributes} == {
        "voicepass.request_id": answer.headers["x-request-id"],
        "voicepass.transport": "websocket",
        "voicepass.agent": "default",
        "voicepass.outcome": "granted",
        "voicepass.conversation_id": "conv_1",
    }
    assert [step.name for step in steps] == ["verify", "reserve", "upstream", "grant"]
    assert {(step.trace_id, step.parent_span_id) for step in steps} == {(server.trace_id, server.span_id)}
    times = [begun * 1e9, server.start_time_unix_nano]
    times += [at for step in steps for at in (step.start_time_unix_nano, step.end_time_unix_nano)]
    times += [server.end_time_unix_nano, ended * 1e9]
    assert all(later - earlier > -1e6 for earlier, later in itertools.pairwise(times)), times
    sent = [dict(call.request.headers) for call in upstream["signed_url"].calls]
    assert "traceparent" not in json.dumps(sent), "ElevenLabs does not get the caller's trace"


async def test_no_span_holds_a_secret_or_the_callers_text(
    collector: Collector, upstream: respx.MockRouter, make_token: MakeToken, canary_log: CanaryLog
) -> None:
    token = make_token(sub="u-someone", name="Ada Private")
    async with serving() as client:
        await client.post(
            "/v1/signed-url", headers={"Authorization": f"Bearer {token}", "traceparent": "canary-parent"}
        )
        await client.get("/v1/signed-url?agent=canary-alias", headers={"Authorization": f"Bearer {token}"})
        await client.post("/v1/signed-url", headers={"Authorization": f"Bearer {token}x"})
        upstream["signed_url"].respond(503, json={"detail": "canary-vendor"})
        await client.post("/v1/signed-url", headers={"Authorization": f"Bearer {token}", "tracestate": "canary=1"})

    written = b"".join(collector.received).decode("latin-1")
    assert len([span for span in collector.spans if not span.parent_span_id]) == 4
    assert secrets_in(written) == []
    assert [text for text in ("canary", "u-someone", "Private", token) if text in written] == []
    assert canary_log.leaking() == []


async def test_a_failing_step_is_an_error_and_so_is_the_attempt_if_the_operator_must_act(
    collector: Collector, upstream: respx.MockRouter, bearer: dict[str, str]
) -> None:
    upstream["signed_url"].respond(401, json={"detail": {"status": "invalid_api_key"}})
    async with serving() as client:
        await client.post("/v1/signed-url", headers=bearer)
        await client.post("/v1/signed-url")

    failed = {
        (span.name, span.status.message) for span in collector.spans if span.status.code == Status.STATUS_CODE_ERROR
    }
    assert failed == {("issue a pass", "elevenlabs_key_rejected"), ("upstream", ""), ("verify", "")}


@pytest.mark.parametrize(
    "variables",
    [
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
        {"OTEL_TRACES_EXPORTER": "zipkin"},
    ],
)
async def test_nothing_is_sent_unless_the_variables_ask_for_it(
    collector: Collector,
    upstream: respx.MockRouter,
    bearer: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
) -> None:
    del upstream
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    async with serving() as client:
        answer = await client.post("/v1/signed-url", headers=bearer)

    assert (answer.status_code, collector.received) == (200, [])


def test_the_framework_sends_no_trace_of_its_own(
    collector: Collector, upstream: respx.MockRouter, bearer: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    del upstream
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")  # FastAPI reads this when a server starts the app

    with running(lambda _url: create_app(settings_with())) as url:
        answer = httpx.post(f"{url}/v1/signed-url", headers=bearer, trust_env=False)

    assert answer.status_code == 200
    assert collector.paths == {"/v1/traces"}
    assert len(collector.spans) == 5


async def test_without_the_extra_the_service_serves_and_logs_what_to_install(
    upstream: respx.MockRouter,
    bearer: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    del upstream
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)

    async with serving() as client:
        answer = await client.post("/v1/signed-url", headers=bearer)

    assert answer.status_code == 200
    assert "install the extra 'traces'" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.alone
async def test_with_a_dead_collector_passes_are_granted_and_the_process_ends(
    upstream: respx.MockRouter, bearer: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    del upstream
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")

    async with serving() as client:
        answers = {(await client.post("/v1/signed-url", headers=bearer)).status_code for _ in range(3)}
        begun = time.monotonic()

    assert answers == {200}
    assert time.monotonic() - begun < FLUSH_SECONDS + 3
