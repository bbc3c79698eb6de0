"""Whatever somebody pastes: a close code, a reason, an error's body, a console line, or nothing that we know."""

import pytest

from elevenlabs_emulator import CLOSINGS
from tests.canaries import API_KEY, SIGNATURE, secrets_in
from voicepass.doctor.causes import CAUSES, CHECKS
from voicepass.doctor.closings import SYMPTOMS, explain

PASTED = [
    ("1008 Missing required dynamic variables in tools: {'a', 'b'}", "variables_missing", "a, b (in its tools)"),
    ("Override for field 'voice_id' is not allowed by config.", "override_not_allowed", "'voice_id'"),
    ("closed: code=1008, reason=Override is not allowed for this AI agent", "override_not_allowed", ""),
    ("1008", "contract_broken", ""),
    ("1008 something new", "contract_broken", '"1008 something new"'),
    ("code 3000", "not_authorized", ""),
    ("3008", "concurrency_reached", ""),
    ("1000", "ended", ""),
    ("1005", "no_code", ""),
    ("1006", "no_goodbye", ""),
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
]  # fmt: skip


@pytest.mark.parametrize(("pasted", "cause", "said"), PASTED)
def test_what_is_known_is_explained(pasted: str, cause: str, said: str) -> None:
    finding = explain(pasted)

    assert finding is not None
    assert (finding.cause, bool(finding.remedy)) == (cause, True)
    assert said in finding.says


@pytest.mark.parametrize(
    "pasted",
    ["", "banana", "{", "{}", '{"detail": "?"}', '{"closeCode": "x"}', "200 OK", "1.1000", "\x1b[31m", "unauthorized"],
)
def test_what_is_not_known_is_not_guessed(pasted: str) -> None:
    assert explain(pasted) is None


def test_a_code_alone_is_not_quoted_back() -> None:
    finding = explain("1008\n")

    assert finding is not None
    assert "1008" not in finding.says


def test_every_close_of_the_emulator_is_known() -> None:
    for closing in CLOSINGS.values():
        finding = explain(f"{closing.code} {closing.reason}")

        assert finding is not None
        assert finding.cause != "unknown_closing", closing.name


def test_secrets_that_are_pasted_are_not_repeated() -> None:
    for secret in (API_KEY, f"wss://x/?conversation_signature={SIGNATURE}"):
        for pasted in (f"1008 {secret}", f"1002 {secret}", f"Host {secret} is not allowed", f"1006 {secret}"):
            assert secrets_in(repr(explain(pasted))) == []


def test_the_tables_agree_with_each_other() -> None:
    assert {cause.check for cause in CAUSES.values()} <= CHECKS.keys()
    assert {symptom.cause for symptom in SYMPTOMS} <= CAUSES.keys()
    assert len({(symptom.code, symptom.text) for symptom in SYMPTOMS}) == len(SYMPTOMS)
