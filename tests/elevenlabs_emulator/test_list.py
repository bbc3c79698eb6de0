"""The list of conversations, requested by the official SDK and checked by the vendor's models."""

from typing import Any

import httpx
import pytest
from elevenlabs import ElevenLabs

from elevenlabs_emulator import EmulatedAgent, Emulator
from elevenlabs_emulator.records import RecordedConversation
from tests.conftest import Clock
from tests.elevenlabs_emulator.contract import check_strictly
from tests.elevenlabs_emulator.wire import AGENT, KEY, Serve, Service, open_conversation, parameters
from tests.tables import table

LIST = "/v1/convai/conversations"
START = 1_800_000_000
OTHER = EmulatedAgent(agent_id="agent_other")


def converse(
    emulator: Emulator, clock: Clock, *, agent: EmulatedAgent = AGENT, seconds: int | None = 42, user_id: str = "u-1"
) -> str:
    """Begin a conversation now that lasts `seconds`, or stays open if that is None."""
    _, conversation_id = emulator.issue(agent.agent_id, bound=True)
    record = RecordedConversation(query={}, signed=True, conversation_id=conversation_id)
    account = emulator.open_account(agent, record, "signed_url")
    account.client_data = {"user_id": user_id}
    if seconds is not None:
        record.closed_by, record.close_code, record.close_reason = "client", 1000, ""
        account.end(seconds=seconds, done_at=clock.now + seconds)
    return str(conversation_id)


def fetch_page(service: Service, **query: Any) -> Any:
    sdk = ElevenLabs(api_key=KEY, base_url=service.url, httpx_client=service.http)
    answer = sdk.conversational_ai.conversations.list(**query)
    check_strictly("GetConversationsPageResponseModel", answer.model_dump_json())
    return answer


def fetch_ids(service: Service, **query: Any) -> list[str]:
    return [row.conversation_id for row in fetch_page(service, **query).conversations]


@pytest.fixture
def clock() -> Clock:
    return Clock(START)


@pytest.fixture
def service_with_clock(serve: Serve, clock: Clock) -> Service:
    return serve(Emulator(agents=[AGENT, OTHER], clock=clock))


def get(service: Service, *, key: str = KEY, **query: str) -> httpx.Response:
    return service.http.get(LIST, params=query, headers={"xi-api-key": key})


def test_a_row_has_what_a_settlement_needs_and_equals_the_record(service_with_clock: Service) -> None:
    url = service_with_clock.mint(include_conversation_id="true")
    conversation_id = parameters(url)["conversation_id"]
    with open_conversation(url) as talk:
        talk.read_answer()
        service_with_clock.advance(42)
        (while_open,) = fetch_page(service_with_clock).conversations
    service_with_clock.await_end(conversation_id)

    (row,) = fetch_page(service_with_clock).conversations

    account = service_with_clock.http.get(f"{LIST}/{conversation_id}", headers={"xi-api-key": KEY}).json()
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
def test_every_conversation_is_on_exactly_one_page_even_if_others_begin_meanwhile(
    service_with_clock: Service, clock: Clock, direction: str
) -> None:
    expected = []
    for number in range(125):
        expected.append(converse(service_with_clock.emulator, clock))
        clock.now += number % 2  # two of them begin in the same second
    sizes, found, cursor = list[int](), list[str](), None
    while not sizes or cursor:
        answer = fetch_page(service_with_clock, page_size=50, cursor=cursor, sort_direction=direction)
        sizes.append(len(answer.conversations))
        found += [row.conversation_id for row in answer.conversations]
        assert answer.has_more == (answer.next_cursor is not None)
        cursor = answer.next_cursor
        if len(sizes) == 1:
            clock.now += 1
            late = converse(service_with_clock.emulator, clock)

    assert sizes == ([50, 50, 26] if direction == "asc" else [50, 50, 25])
    assert len(found) == len(set(found))
    assert set(found) - {late} == set(expected)
    starts = [service_with_clock.emulator.accounts[conversation_id].started_at for conversation_id in found]
    assert starts == sorted(starts, reverse=direction == "desc")


def test_by_default_a_page_has_thirty_rows_with_the_newest_first(service_with_clock: Service, clock: Clock) -> None:
    for _ in range(31):
        newest = converse(service_with_clock.emulator, clock)
        clock.now += 1

    answer = fetch_page(service_with_clock)

    assert (len(answer.conversations), answer.has_more) == (30, True)
    assert answer.conversations[0].conversation_id == newest


def test_rows_can_be_filtered_by_agent_user_and_start_time(service_with_clock: Service, clock: Clock) -> None:
    first = converse(service_with_clock.emulator, clock)
    clock.now += 10
    second = converse(service_with_clock.emulator, clock)
    other = converse(service_with_clock.emulator, clock, agent=OTHER, user_id="u-2")
    clock.now += 10
    third = converse(service_with_clock.emulator, clock)

    assert fetch_ids(service_with_clock, agent_id=AGENT.agent_id, sort_direction="asc") == [first, second, third]
    assert fetch_ids(service_with_clock, agent_id=OTHER.agent_id) == [other]
    assert fetch_ids(service_with_clock, agent_id="agent_x") == []
    assert fetch_ids(service_with_clock, user_id="u-2") == [other]
    assert fetch_ids(service_with_clock, call_start_after_unix=START + 11) == [third]
    assert fetch_ids(service_with_clock, call_start_before_unix=START + 9) == [first]
    assert set(fetch_ids(service_with_clock, call_start_after_unix=START + 10, call_start_before_unix=START + 10)) == {
        second,
        other,
    }


def test_one_or_several_statuses_can_be_excluded(service_with_clock: Service, clock: Clock) -> None:
    emulator = service_with_clock.emulator
    emulator.unopened = "initiated"
    done = converse(emulator, clock, seconds=0)
    unopened = emulator.issue(AGENT.agent_id, bound=True)[1]
    going_on = converse(emulator, clock, seconds=None)
    processing = converse(emulator, clock, seconds=10)

    assert {row.conversation_id: row.status for row in fetch_page(service_with_clock).conversations} == {
        done: "done",
        unopened: "initiated",
        going_on: "in-progress",
        processing: "processing",
    }
    assert set(fetch_ids(service_with_clock, exclude_statuses="done")) == {unopened, going_on, processing}
    assert fetch_ids(service_with_clock, exclude_statuses=["initiated", "in-progress", "processing"]) == [done]


def test_a_conversation_that_nobody_opened_is_not_listed_by_default(service_with_clock: Service) -> None:
    service_with_clock.mint(include_conversation_id="true")

    assert fetch_ids(service_with_clock) == []


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


def test_other_filters_are_ignored(service: Service) -> None:
    assert get(service, summary_mode="exclude", rating_min="3").status_code == 200


def test_a_fault_makes_the_list_fail(service: Service) -> None:
    def get_with_fault(**fault: object) -> httpx.Response:
        assert service.http.put("/_emulator/faults", json={"target": "list", "times": 1} | fault).status_code == 204
        return get(service)

    assert get_with_fault(status=429, code="system_busy", retry_after_seconds=7).headers["retry-after"] == "7"
    assert get_with_fault(body="html200").text.startswith("<!doctype html>")
    assert get_with_fault(body="no_credential").json() == {}
    assert get_with_fault(body="wrong_type").json()["conversations"] == [[]]
    service.http.timeout = httpx.Timeout(0.1)
    with pytest.raises(httpx.ReadTimeout):
        get_with_fault(latency_seconds=1)
    service.http.timeout = httpx.Timeout(5)
    assert get(service).json() == {"conversations": [], "next_cursor": None, "has_more": False}


def test_the_emulator_keeps_the_latest_ten_thousand_conversations(service_with_clock: Service) -> None:
    opened = [f"conv_{number}" for number in range(10_001)]

    for conversation_id in opened:
        record = RecordedConversation(query={}, signed=True, conversation_id=conversation_id)
        service_with_clock.emulator.open_account(AGENT, record, "signed_url")

    assert list(service_with_clock.emulator.accounts) == opened[1:]
