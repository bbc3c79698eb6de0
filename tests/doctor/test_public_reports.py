"""States of a service that users reported in public. The doctor must name the cause of each.

These reports have no state here, because nothing at ElevenLabs or in voicepass was wrong:

- packages#87: the API key in a NEXT_PUBLIC variable (no server can see what a page was built with)
- elevenlabs-python#619, elevenlabs-examples#156: mistakes of old SDKs, fixed since
- packages#200: no microphone audio over WebRTC (the emulator has no WebRTC server)
- packages#17: `url` in place of `signedUrl` (the page never connects; its console shows that)
- elevenlabs-docs#1320: a key's credit limit that ElevenLabs does not apply (no request fails)

The last table holds texts that only a page or a console shows. People paste them into `explain`.
"""

import pytest

from tests.conftest import settings_with
from tests.doctor.conftest import Examine, State, list_troubles
from tests.tables import table
from voicepass.config.build import configure
from voicepass.config.environment import SettingsRefusedError
from voicepass.doctor.explain import explain

PROMPT = {"overrides": {"agent.prompt.prompt": "You are a pirate."}}
GERMAN = {"overrides": {"agent.language": "de"}}


def closed_with(closing: str) -> State:
    return State(fault={"target": "conversation", "closing": closing})


REPORTS = [
    ("packages#23", State(frontend={"overrides": {"agent.first_message": "Ahoy!"}}), "override_not_allowed"),
    ("packages#337", State(frontend=PROMPT), "override_not_allowed"),
    ("packages#241", State(agent={"allowed_overrides": {"agent.language"}}, frontend=GERMAN), "language_unsupported"),
    ("packages#19", State(frontend=PROMPT), "override_not_allowed"),
    ("packages#63", State(agent={"first_message": "Hi {{name}}"}), "variables_missing"),
    ("packages#626", closed_with("request_error"), "request_refused"),
    ("packages#911", closed_with("quota_exceeded"), "quota_exhausted"),
    ("elevenlabs-examples#167", closed_with("quota_exceeded"), "quota_exhausted"),
    ("packages#360", State(agent={"tool_variables": {"a", "b"}}), "variables_missing"),
    ("simliai/create-simli-app-elevenlabs#1", State(agent={"first_message": "{{username}}"}), "variables_missing"),
    ("elevenlabs-examples#138", State(agent={"prompt": "Call from {{caller}}"}), "variables_missing"),
    ("elevenlabs-examples#137", closed_with("agent_misconfigured"), "agent_misconfigured"),
    ("elevenlabs-examples#125", State(api_key="sk_from_an_old_env"), "api_key_refused"),
    ("elevenlabs-python#407", State(fault={"body": "no_credential"}), "answer_unusable"),
    ("elevenlabs-python#434", State(agent={"max_duration_seconds": 180}), "duration_short"),
    ("packages#472", State(agent={"agent_id": "agent_of_another_age"}), "agent_unknown"),
    ("elevenlabs/cli#80", State(permissions=("convai_read",)), "permission_missing"),
    ("danielmiessler/LifeOS#667", State(permissions=("user_read",)), "permission_missing"),
    ("TypeWhisper#1103", State(permissions=()), "permission_missing"),
    ("ASHR12/elevenlabs-conversational-ai-agents#1", State(agent={"requires_auth": False}), "authentication_off"),
    ("elevenlabs-docs#768", closed_with("internal_error"), "internal_error"),
    ("a signed URL in the source code", closed_with("unauthorized"), "not_authorized"),
]


@table(("report", "state", "cause"), REPORTS)
def test_the_doctor_names_the_cause_of_each_public_report(
    examine_state: Examine, report: str, state: State, cause: str
) -> None:
    findings = examine_state(state)

    assert cause in {named for _, named in list_troubles(findings)}, report


@pytest.mark.parametrize("cause", ["override_not_allowed", "variables_missing"])
def test_the_conversation_confirms_each_finding_about_the_settings(examine_state: Examine, cause: str) -> None:
    states = [state for _, state, named in REPORTS if named == cause]

    for state in states:
        assert list_troubles(examine_state(state))[-1] == ("conversation", cause)


@pytest.mark.parametrize(
    ("report", "agent_id", "said"),
    [
        ("a conversation's id as the agent's", "conv_01k0", "ELEVENLABS_AGENT_ID is a conversation's id"),
        ("a query in the agent's id", "agent_x&conversation_signature=cvtkn_1", "ELEVENLABS_AGENT_ID must be the bare"),
    ],
)
def test_settings_refuse_an_agent_id_that_is_another_id_or_a_query(report: str, agent_id: str, said: str) -> None:
    with pytest.raises(SettingsRefusedError, match=said) as refused:
        configure(settings_with(elevenlabs_agent_id=agent_id))

    assert "cvtkn_1" not in str(refused.value), report


PASTED = [
    ("packages#337", "WebSocket is already in CLOSING or CLOSED state.", "socket_was_closed"),
    ("packages#23", "1008 Override for field 'first_message' is not allowed by config.", "override_not_allowed"),
    ("packages#63", "Missing required dynamic variables in first message: {'name'}", "variables_missing"),
    ("packages#360", "1008 Missing required dynamic variables in tools: {'a', 'b'}", "variables_missing"),
    ("packages#626", '{"closeCode": 3000, "closeReason": "Request error"}', "request_refused"),
    ("packages#911", "received 1002 (protocol error) This request exceeds your quota limit.", "quota_exhausted"),
    ("elevenlabs-examples#125", "Failed to get signed URL", "error_taken_for_answer"),
    ("elevenlabs-python#407", "KeyError: 'signed_url'", "error_taken_for_answer"),
    ("elevenlabs-python#413", 'HTTP 405 {"detail":"Method Not Allowed"}', "answer_unusable"),
    ("swift-sdk#86", "invalid authorization token", "wrong_credential"),
    ("packages#694", "GET https://livekit.rtc.elevenlabs.io/rtc/v1/validate 404 (Not Found)", "rtc_path_404"),
    ("packages#472", "Invalid agent ID", "agent_unknown"),
    ("elevenlabs/cli#80", '401 {"detail":{"status":"missing_permissions","message":"…"}}', "permission_missing"),
    ("elevenlabs-docs#768", "1011", "internal_error"),
    ("a hard-coded signed URL", "3000 Could not authorize the conversation.", "not_authorized"),
    ("a bare agent id", "Your agent has authentication enabled, but no signed URL or conversation token was provided.",
     "not_authorized"),
]  # fmt: skip


@table(("report", "pasted", "cause"), PASTED)
def test_explain_names_the_cause_of_what_a_page_showed(report: str, pasted: str, cause: str) -> None:
    finding = explain(pasted)

    assert finding is not None, report
    assert finding.cause == cause, report
