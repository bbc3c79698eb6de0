"""The list of conversations, as the official SDK asks for it and as the vendor's models describe it."""

from typing import Any

import httpx
import pytest
from elevenlabs import ElevenLabs

from elevenlabs_emulator import EmulatedAgent, Emulator
from elevenlabs_emulator.records import RecordedConversation
from tests.conftest import Clock
from tests.elevenlabs_emulator.contract import check_strictly
from tests.elevenlabs_emulator.wire import AGENT, KEY, Serve, Service, parameters, talking
from tests.tables import table

LIST = "/v1/convai/conversations"
START = 1_800_000_000
OTHER = EmulatedAgent(agent_id="agent_other")


def converse(
    emulator: Emulator, clock: Clock, *, agent: EmulatedAgent = AGENT, seconds: int | None = 42, user_id: str = "u-1"
) -> str:
    """Begin a conversation now that lasts so many seconds; with None it stays open."""
    _, conversation_id = emulator.issue(agent.agent_id, bound=True)
    record = RecordedConversation(query={}, signed=True, conversation_id=conversation_id)
    account = emulator.open_account(agent, record, "signed_url")
    account.client_data = {"user_id": user_id}
    if seconds is not None:
        record.closed_by, record.close_code, record.close_reason = "client", 1000, ""
        account.end(seconds=seconds, done_at=clock.now + seconds)
    return str(conversation_id)


def page(service: Service, **query: Any) -> Any:
    sdk = ElevenLabs(api_key=KEY, base_url=service.url, httpx_client=service.http)
    answer = sdk.conversational_ai.conversations.list(**query)
    check_strictly("GetConversationsPageResponseModel", answer.model_dump_json())
    return answer


def ids(service: Service, **query: Any) -> list[str]:
    return [row.conversation_id for row in page(service, **query).conversations]


@pytest.fixture
def clock() -> Clock:
    return Clock(START)


@pytest.fixture
def listed(serve: Serve, clock: Clock) -> Service:
    return serve(Emulator(agents=[AGENT, OTHER], clock=clock))


def get(service: Service, *, key: str = KEY, **query: str) -> httpx.Response:
    return service.http.get(LIST, params=query, headers={"xi-api-key": key})


def test_a_row_has_what_a_settlement_needs_and_says_the_same_as_the_account(listed: Service) -> None:
    url = listed.mint(include_conversation_id="true")
    conversation_id = parameters(url)["conversation_id"]
    with talking(url) as talk:
        talk.says()
        listed.advance(42)
        (while_open,) = page(listed).conversations
    listed.await_end(conversation_id)

    (row,) = page(listed).conversations

    account = listed.http.get(f"{LIST}/{conversation_id}", headers={"xi-api-key": KEY}).json()
    assert (while_open.status, while_open.call_duration_secs, while_open.termination_reason) == ("in-progress", 0, None)
    assert (row.conversation_id, row.agent_id, row.status) == (conversation_id, AGENT.agent_id, "done")
    assert (row.call_duration_secs, row.cost, row.cost_fiat, row.call_successful) == (42, 420, 0.063, "success")
    assert row.termination_reason == "Client disconnected: 1000"
    metadata = account["metadata"]
    assert (row.start_time_unix_secs, row.call_duration_secs, row.cost, row.termination_reason) == (
        metadata["start_time_unix_secs"],
        metadata["call_duration_secs"],
        metadata["cost"],
        metadata["termination_reason"],
    )


@pytest.mark.parametrize("direction", ["asc", "desc"])
def test_every_conversation_is_on_one_page_though_others_begin_between_the_pages(
    listed: Service, clock: Clock, direction: str
) -> None:
    expected = []
    for number in range(125):
        expected.append(converse(listed.emulator, clock))
        clock.now += number % 2  # two of them begin in the same second
    sizes, found, cursor = list[int](), list[str](), None
    while not sizes or cursor:
        answer = page(listed, page_size=50, cursor=cursor, sort_direction=direction)
        sizes.append(len(answer.conversations))
        found += [row.conversation_id for row in answer.conversations]
        assert answer.has_more == (answer.next_cursor is not None)
        cursor = answer.next_cursor
        if len(sizes) == 1:
            clock.now += 1
            late = converse(listed.emulator, clock)

    assert sizes == ([50, 50, 26] if direction == "asc" else [50, 50, 25])
    assert len(found) == len(set(found))
    assert set(found) - {late} == set(expected)
    starts = [listed.emulator.accounts[conversation_id].started_at for conversation_id in found]
    assert starts == sorted(starts, reverse=direction == "desc")


def test_by_default_a_page_has_thirty_rows_and_the_newest_comes_first(listed: Service, clock: Clock) -> None:
    for _ in range(31):
        newest = converse(listed.emulator, clock)
        clock.now += 1

    answer = page(listed)

    assert (len(answer.conversations), answer.has_more) == (30, True)
    assert answer.conversations[0].conversation_id == newest


def test_rows_are_chosen_by_agent_and_by_the_time_of_their_start(listed: Service, clock: Clock) -> None:
    first = converse(listed.emulator, clock)
    clock.now += 10
    second = converse(listed.emulator, clock)
    other = converse(listed.emulator, clock, agent=OTHER, user_id="u-2")
    clock.now += 10
    third = converse(listed.emulator, clock)

    assert ids(listed, agent_id=AGENT.agent_id, sort_direction="asc") == [first, second, third]
    assert ids(listed, agent_id=OTHER.agent_id) == [other]
    assert ids(listed, agent_id="agent_x") == []
    assert ids(listed, user_id="u-2") == [other]
    assert ids(listed, call_start_after_unix=START + 11) == [third]
    assert ids(listed, call_start_before_unix=START + 9) == [first]
    assert set(ids(listed, call_start_after_unix=START + 10, call_start_before_unix=START + 10)) == {second, other}


def test_statuses_can_be_left_out_one_or_several(listed: Service, clock: Clock) -> None:
    emulator = listed.emulator
    emulator.unopened = "initiated"
    done = converse(emulator, clock, seconds=0)
    unopened = emulator.issue(AGENT.agent_id, bound=True)[1]
    going_on = converse(emulator, clock, seconds=None)
    processing = converse(emulator, clock, seconds=10)

    assert {row.conversation_id: row.status for row in page(listed).conversations} == {
        done: "done",
        unopened: "initiated",
        going_on: "in-progress",
        processing: "processing",
    }
    assert set(ids(listed, exclude_statuses="done")) == {unopened, going_on, processing}
    assert ids(listed, exclude_statuses=["initiated", "in-progress", "processing"]) == [done]


def test_a_conversation_that_nobody_opened_is_not_listed_by_default(listed: Service) -> None:
    listed.mint(include_conversation_id="true")

    assert ids(listed) == []


def test_the_list_needs_a_key_that_may_read(serve: Serve) -> None:
    service = serve(Emulator(agents=[AGENT], api_keys={"sk_writer": frozenset({"convai_write"})}))

    refusals = [get(service, key=key) for key in ("sk_writer", "sk_wrong")]

    assert [(answer.status_code, answer.json()["detail"]["status"]) for answer in refusals] == [
        (401, "missing_permissions"),
        (401, "invalid_api_key"),
    ]
    assert "convai_read" in refusals[0].json()["detail"]["message"]


@table(
    "query",
    [
        {"page_size": "0"},
        {"page_size": "101"},
        {"exclude_statuses": "over"},
        {"sort_direction": "up"},
        {"cursor": "nonsense"},
        {"call_start_after_unix": "yesterday"},
    ],
)
def test_a_wrong_query_is_refused(service: Service, query: dict[str, str]) -> None:
    assert get(service, **query).status_code == 422


def test_other_filters_are_tolerated(service: Service) -> None:
    assert get(service, summary_mode="exclude", rating_min="3").status_code == 200


def test_the_list_fails_on_demand(service: Service) -> None:
    def faulty(**fault: object) -> httpx.Response:
        assert service.http.put("/_emulator/faults", json={"target": "list", "times": 1} | fault).status_code == 204
        return get(service)

    assert faulty(status=429, code="system_busy", retry_after_seconds=7).headers["retry-after"] == "7"
    assert faulty(body="html200").text.startswith("<!doctype html>")
    assert faulty(body="no_credential").json() == {}
    assert faulty(body="wrong_type").json()["conversations"] == [[]]
    service.http.timeout = httpx.Timeout(0.1)
    with pytest.raises(httpx.ReadTimeout):
        faulty(latency_seconds=1)
    service.http.timeout = httpx.Timeout(5)
    assert get(service).json() == {"conversations": [], "next_cursor": None, "has_more": False}


def test_of_very_many_conversations_the_latest_are_kept(listed: Service) -> None:
    opened = [f"conv_{number}" for number in range(10_001)]

    for conversation_id in opened:
        record = RecordedConversation(query={}, signed=True, conversation_id=conversation_id)
        listed.emulator.open_account(AGENT, record, "signed_url")

    assert list(listed.emulator.accounts) == opened[1:]
