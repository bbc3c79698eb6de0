"""Branches, versions and environments of an agent: existing ones open, and others are closed with 3000."""

import pytest

from elevenlabs_emulator import EmulatedAgent, Emulator
from tests.elevenlabs_emulator.wire import KEY, Serve, open_conversation

AGENT_ID = "agent_market"
BRANCHES = {"agtbrch_b": {"agent_id": AGENT_ID, "first_message": "This is the branch."}}
EXISTING = {"branches": BRANCHES, "versions": ["agtvrsn_v"], "environments": ["production", "staging"]}
MAIN = "This is the main branch."
REFUSED = (3000, "Request error")


@pytest.mark.parametrize(
    ("asked", "added", "expected"),
    [
        ({}, "", MAIN),
        ({"branch_id": "agtbrch_b"}, "", "This is the branch."),
        ({"branch_id": "agtbrch_b", "version_id": "agtvrsn_v", "environment": "staging"}, "", "This is the branch."),
        ({"environment": "production"}, "", MAIN),
        ({}, "&environment=staging", MAIN),
        ({"branch_id": "agtbrch_gone"}, "", REFUSED),
        ({"version_id": "agtvrsn_gone"}, "", REFUSED),
        ({"environment": "test"}, "", REFUSED),
        ({}, "&branch_id=agtbrch_gone", REFUSED),
        ({"branch_id": "agtbrch_gone"}, "&branch_id=agtbrch_b", REFUSED),
    ],
)
def test_a_url_opens_its_own_branch_or_is_refused_before_the_metadata(
    serve: Serve, asked: dict[str, str], added: str, expected: object
) -> None:
    agent = EmulatedAgent.model_validate(EXISTING | {"agent_id": AGENT_ID, "first_message": MAIN})
    service = serve(Emulator(agents=[agent]))

    with open_conversation(service.mint(include_conversation_id="true", **asked) + added) as talk:
        found = talk.read_close() if expected == REFUSED else talk.read_answer()

    assert found == expected
    assert bool(talk.frames) == (expected != REFUSED)


def test_the_settings_of_a_branch_are_returned_and_an_unknown_branch_is_not_found(serve: Serve) -> None:
    service = serve(Emulator(agents=[]))
    service.http.put("/_emulator/agents", json=EXISTING | {"agent_id": AGENT_ID}).raise_for_status()

    answers = [
        service.http.get(f"/v1/convai/agents/{AGENT_ID}", params={"branch_id": branch_id}, headers={"xi-api-key": KEY})
        for branch_id in ("agtbrch_b", "agtbrch_gone")
    ]

    assert [answer.status_code for answer in answers] == [200, 404]
    assert answers[0].json()["conversation_config"]["agent"]["first_message"] == "This is the branch."
