"""What operators and machines read: liveness, readiness, metrics, and the OpenAPI document."""

import gc
import json
import re
from typing import Any

import httpx
import pytest
import respx
from starlette.responses import HTMLResponse

from tests.conftest import ServiceClient, policy_file, serving
from voicepass.api.middleware import Surface
from voicepass.api.operators import run_checks
from voicepass.api.schemas import list_refusals
from voicepass.app import COLLECT_EVERY
from voicepass.errors import KeysUnavailable, LedgerUnavailable, Refusal

pytestmark = pytest.mark.anyio

BODIES: dict[str, dict[str, Any]] = {
    "/v1/blocks": {"json": {"kind": "everyone"}},
    "/v1/extensions": {"json": {"user_id": "u-1", "minutes": 30, "ends_at": "2026-12-31T23:59:59Z"}},
}
OPERATIONS = {("get", "/healthz"), ("get", "/readyz"), ("get", "/metrics")}
BACKENDS = {("get", "/v1/conversations/{conversation_id}"), ("post", "/v1/blocks"), ("delete", "/v1/blocks")}
BACKENDS |= {(method, "/v1/extensions") for method in ("post", "get", "delete")}
OTHERS = {("get", "/v1/usage"), ("post", "/v1/webhooks/elevenlabs")}
PASSES = {(m, p) for m in ("get", "post") for p in ("/v1/signed-url", "/v1/conversation-token")}


async def test_liveness_and_readiness_answer_without_a_token(api: httpx.AsyncClient) -> None:
    health = await api.get("/healthz")
    ready = await api.get("/readyz")

    assert health.json() == {"status": "ok"}
    checks = {"settings": "ok", "ledger": "ok", "keys": "ok", "elevenlabs": "ok"}
    assert ready.json() == {"status": "ready", "ledger": "ok", "checks": checks}
    assert health.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v1/client.js", "/v1/client.d.ts"])
async def test_a_probe_may_ask_by_head(api: httpx.AsyncClient, path: str) -> None:
    head, get, post = await api.head(path), await api.get(path), await api.post(path)

    assert (head.status_code, head.headers["content-type"]) == (200, get.headers["content-type"])
    assert set(post.headers["allow"].split(", ")) == {"GET", "HEAD"}


@pytest.mark.parametrize("policy", [None, b"default-src 'self'"])
async def test_a_page_keeps_its_own_content_security_policy(policy: bytes | None) -> None:
    page = HTMLResponse("x", headers={"Content-Security-Policy": policy.decode()} if policy else None)

    async with ServiceClient(Surface(page)) as client:
        answer = await client.get("/")

    assert answer.status_code == 200
    assert answer.headers.get("content-security-policy") == (policy and policy.decode())
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.usefixtures("nothing_is_frozen")
async def test_garbage_is_collected_seldom_while_the_service_runs_and_as_before_afterwards() -> None:
    before = gc.get_threshold(), gc.get_freeze_count()
    async with serving():
        threshold, frozen = gc.get_threshold()[0], gc.get_freeze_count()

    assert threshold == COLLECT_EVERY
    assert frozen > before[1]
    assert (gc.get_threshold(), gc.get_freeze_count()) == before


NO_KEYS = {
    "voicepass_jwt_algorithm": "RS256",
    "voicepass_jwt_secret": None,
    "voicepass_jwks_url": "http://127.0.0.1:1/jwks",
}
ONE_OF_TWO = """
[[issuers]]
issuer = "https://down.example"
algorithm = "RS256"
jwks_url = "http://127.0.0.1:1/jwks"
audience = "voicepass"
"""


async def fetch_readiness(**settings: object) -> httpx.Response:
    async with serving(**settings) as client:
        return await client.get("/readyz")


async def test_an_instance_without_any_signing_key_is_not_ready_and_names_the_failed_check() -> None:
    ready = await fetch_readiness(**NO_KEYS)

    assert (ready.status_code, ready.json()["code"]) == (503, "keys_unavailable")
    assert ready.json()["checks"] == {"settings": "ok", "ledger": "ok", "keys": "failed", "elevenlabs": "ok"}


async def test_an_instance_that_lacks_one_issuers_keys_is_ready_and_reports_the_number_of_issuers() -> None:
    ready = await fetch_readiness(voicepass_policy_file=policy_file(ONE_OF_TWO))

    assert (ready.status_code, ready.json()["status"]) == (200, "ready")
    assert ready.json()["checks"] == {"settings": "ok", "ledger": "ok", "keys": "of 1 of 2 issuers", "elevenlabs": "ok"}


async def test_during_an_outage_of_elevenlabs_an_instance_stays_ready_and_reports_it(
    api: httpx.AsyncClient, upstream: respx.MockRouter, bearer: dict[str, str]
) -> None:
    upstream["signed_url"].respond(500)
    for _ in range(6):
        await api.post("/v1/signed-url", headers=bearer)

    ready = await api.get("/readyz")

    assert ready.status_code == 200
    assert ready.json()["checks"]["elevenlabs"] == "out of order, and left alone for now"


async def test_the_ledger_is_reported_before_the_keys() -> None:
    async def fail_ledger() -> None:
        raise LedgerUnavailable

    async def fail_keys() -> None:
        raise KeysUnavailable

    with pytest.raises(LedgerUnavailable) as refused:
        await run_checks({"ledger": fail_ledger, "keys": fail_keys})

    assert refused.value.checks == {"settings": "ok", "ledger": "failed", "keys": "failed"}


@pytest.mark.parametrize("api", [{"voicepass_docs": True}], indirect=True)
async def test_every_route_but_probes_and_metrics_refuses_a_request_without_credentials(api: httpx.AsyncClient) -> None:
    document = (await api.get("/openapi.json")).json()
    routes = {(method, path) for path, methods in document["paths"].items() for method in methods}

    answers = {
        route: (await api.request(route[0], route[1], **BODIES.get(route[1], {}))).status_code for route in routes
    }

    assert answers == dict.fromkeys(PASSES | BACKENDS | OTHERS, 401) | dict.fromkeys(OPERATIONS, 200)


@pytest.mark.parametrize("api", [{"voicepass_docs": True}], indirect=True)
async def test_the_openapi_document_shows_every_refusal_of_a_pass(api: httpx.AsyncClient) -> None:
    document = (await api.get("/openapi.json")).json()

    for method, path in PASSES:
        answers = document["paths"][path][method]["responses"]
        described = {
            code: int(status) for status, answer in answers.items() for code in find_codes(answer["description"])
        }
        assert described == {refusal.code: refusal.status for refusal in list_refusals("pass")}
        assert "application/problem+json" in answers["422"]["content"]
    all_codes = {refusal.code for refusal in list_subclasses(Refusal)}
    assert all_codes - set(find_codes(json.dumps(document))) == {
        "not_found",
        "method_not_allowed",
        "not_started",
    }, "no route of a running service has these"
    assert "HTTPValidationError" not in json.dumps(document)


def find_codes(text: str) -> list[str]:
    return re.findall(r"`([a-z_]+)`", text)


def list_subclasses(refusal: type[Refusal]) -> list[type[Refusal]]:
    found = [refusal] if hasattr(refusal, "code") else []
    return found + [subclass for child in refusal.__subclasses__() for subclass in list_subclasses(child)]


async def test_metrics_are_prometheus_text(api: httpx.AsyncClient, bearer: dict[str, str]) -> None:
    await api.post("/v1/signed-url", headers=bearer)
    await api.post("/v1/signed-url")

    response = await api.get("/metrics")

    assert response.headers["content-type"].startswith("text/plain; version=")
    assert 'voicepass_attempts_total{agent="default",outcome="granted",transport="websocket"} 1.0' in response.text
    assert 'voicepass_attempts_total{agent="",outcome="token_missing",transport="websocket"} 1.0' in response.text
    assert "voicepass_open_conversations 1.0" in response.text
    assert "voicepass_ledger_up 1.0" in response.text
