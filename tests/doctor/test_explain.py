"""`explain` for pasted text: close codes, reasons, error bodies, console lines, and unknown texts."""

import json
import re
import tomllib
from pathlib import Path

from tests.canaries import API_KEY, SIGNATURE, secrets_in
from tests.tables import table
from voicepass.doctor.explain import explain
from voicepass.doctor.findings import CAUSES, CHECKS
from voicepass.elevenlabs.codes import BY_EVENT

PASTED = [
    ("1008 Missing required dynamic variables in tools: {'a', 'b'}", "variables_missing", "a, b (in its tools)"),
    ("Override for field 'voice_id' is not allowed by config.", "override_not_allowed", "'voice_id'"),
    ("closed: code=1008, reason=Override is not allowed for this AI agent", "override_not_allowed", ""),
    ("1008", "contract_broken", ""),
    ("1008 something new", "contract_broken", '"1008 something new"'),
    ("code 3000", "not_authorized", ""),
    ("3008", "concurrency_reached", ""),
    ("1000", "ended", ""),
    ("1005", "close_code_missing", ""),
    ("1006", "connection_broken", ""),
    ("Agent has exceeded its daily call limit of 100000", "daily_limit_reached", ""),
    ("Host app.example is not allowed to connect to this agent", "host_not_allowed", "app.example"),
    ("4711", "unknown_closing", "4711"),
    ('{"detail":{"status":"invalid_api_key","message":"Invalid API key"}}', "api_key_refused", ""),
    ('{"detail":{"status":"quota_exceeded","message":"…"}}', "quota_exhausted", ""),
    ('{"detail":{"type":"not_found","code":"agent_not_found","message":"…"}}', "agent_unknown", ""),
    ("401 Unauthorized", "api_key_refused", ""),
    ("HTTP 503", "elevenlabs_unavailable", ""),
    ("HTTP 401 quota_exceeded", "quota_exhausted", ""),
    ("POST /v1/signed-url 429 quota_exceeded", "voicepass_refused", "Minutes used up"),
    ("HTTP 429 too_many_concurrent_requests", "concurrency_reached", ""),
    ('{"code":"token_expired","status":401}', "voicepass_refused", "Token expired"),
    ("agent_not_allowed", "voicepass_refused", "Agent not allowed"),
    ("Failed to load the rawAudioProcessor worklet module", "worklet_blocked", ""),
    ("token refused: exp is not a number", "token_refused", "`exp`, `nbf` or `iat` is text"),
    ('{"note": "token refused: alg is not ES256", "level": "info"}', "token_refused", "algorithm"),
    ("token_invalid: token refused: iss is no configured issuer; the only", "token_refused", "`iss`"),
    ("not three segments", "token_refused", "no signed JWT"),
    ("VOICEPASS_PLAIN_HTTP_HOSTS must name each host alone, such as keycloak", "setting_refused", "a network"),
    ("X begins or ends with a quote that is not part of a pair: remove it", "setting_refused", "quote"),
]  # fmt: skip


@table(("pasted", "cause", "text"), PASTED)
def test_explain_explains_each_known_text(pasted: str, cause: str, text: str) -> None:
    finding = explain(pasted)

    assert finding is not None
    assert (finding.cause, bool(finding.remedy)) == (cause, True)
    assert text in finding.says


@table(
    "pasted",
    ["", "banana", "{", "{}", '{"detail": "?"}', '{"closeCode": "x"}', "200 OK", "1.1000", "\x1b[31m", "unauthorized"],
)
def test_explain_does_not_guess_an_unknown_text(pasted: str) -> None:
    assert explain(pasted) is None


def test_a_code_alone_is_not_repeated() -> None:
    finding = explain("1008\n")

    assert finding is not None
    assert "1008" not in finding.says


def test_secrets_that_are_pasted_are_not_repeated() -> None:
    for secret in (API_KEY, f"wss://x/?conversation_signature={SIGNATURE}"):
        for pasted in (f"1008 {secret}", f"1002 {secret}", f"Host {secret} is not allowed", f"1006 {secret}"):
            assert secrets_in(repr(explain(pasted))) == []


def test_every_cause_belongs_to_a_check() -> None:
    assert {cause.check for cause in CAUSES.values()} <= CHECKS.keys()


WIRE = [
    "missing_fields",
    "override_error",
    "missing_dynamic_variable",
    "missing_dynamic_variable_transfer",
    "invalid_message",
    "value_error",
    "llm_timeout",
    "llm_error",
    "custom_llm_error",
    "cascade_brain_error",
    "asr_transcription_error",
    "tts_cascade_error",
    "safety_violation",
    "max_duration_exceeded",
    "transport_receive_timeout",
    "websocket_disconnect",
    "asyncio_timeout",
    "redis_timeout_error",
    "http_exception",
    "mcp_tool_error",
    "vad_error",
    "turn_probability_error",
    "mcp_https_error",
    "telephony_agent_error",
    "unknown_websocket_crash",
]


@table("kind", WIRE)
def test_every_error_type_of_the_wire_is_known_alone_and_in_a_pasted_event(kind: str) -> None:
    event = {"type": "error", "error_event": {"code": 1008, "error_type": kind, "message": "vendor words"}}

    alone, in_event = explain(kind), explain(json.dumps(event))

    assert alone is not None
    assert in_event is not None
    assert alone.cause == in_event.cause != "contract_broken"
    assert kind in BY_EVENT or kind == "value_error"


LINES = tomllib.loads((Path(__file__).parent / "lines.toml").read_text())["line"]


@table("line", LINES)
def test_a_line_of_a_public_report_is_explained_or_reported_as_unknown(line: dict[str, str]) -> None:
    finding = explain(line["text"])

    assert (finding and finding.cause) == line.get("cause")
    assert finding is None or not re.search(r"\{\w+\}", f"{finding.says} {finding.remedy}")


def test_thirty_of_the_lines_are_from_public_reports() -> None:
    assert sum("#" in line.get("from", "") for line in LINES) >= 30
