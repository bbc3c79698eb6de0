"""Conversations that began without a pass: each is counted and logged once."""

import pytest

from tests.conftest import AGENT_ID
from tests.logs import capture_logs
from voicepass.settlement import Bypasses
from voicepass.settlement.reports import Report, Status


def make_report(conversation_id: str) -> Report:
    return Report(conversation_id=conversation_id, status=Status.OPEN, agent_id=AGENT_ID)


def test_the_line_names_the_conversation_the_agent_the_reason_and_the_remedy() -> None:
    counted: list[str] = []
    with capture_logs() as logged:
        Bypasses(agent_ids=[AGENT_ID], count=counted.append).report(make_report("conv_9"), reason="not_issued")

    note = logged[0].pop("note")
    assert logged == [
        {
            "event": "conversation.bypassed",
            "log_level": "warning",
            "conversation_id": "conv_9",
            "agent_id": AGENT_ID,
            "reason": "not_issued",
        }
    ]
    assert "enable authentication for the agent" in note
    assert counted == ["not_issued"]


@pytest.mark.long
def test_the_last_ten_thousand_conversations_are_reported_only_once() -> None:
    counted: list[str] = []
    bypasses = Bypasses(agent_ids=[AGENT_ID], count=counted.append)
    with capture_logs():
        for number in range(10_000):
            bypasses.report(make_report(f"conv_{number}"), reason="public")
        for conversation_id in ("conv_0", "conv_9999", "conv_10000", "conv_1", "conv_10000", "conv_0"):
            bypasses.report(make_report(conversation_id), reason=conversation_id)

    assert counted[10_000:] == ["conv_10000", "conv_0"]
