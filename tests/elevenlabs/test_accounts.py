"""ElevenLabs' records of conversations, read at the HTTP edge: one by its id, or many in pages."""

from typing import Any

import httpx
import pytest
import respx

from tests.conftest import AGENT_ID, NOW, UPSTREAM, Clock
from tests.settlement.given import make_row, open_provider
from tests.tables import table
from voicepass.errors import BadAnswer, Busy, ConversationUnknown, Unavailable
from voicepass.model import Agent, Transport

pytestmark = pytest.mark.anyio

ACCOUNT = "/v1/convai/conversations/conv_1"
LIVE_UNKNOWN = {"code": "conversation_not_found", "status": "conversation_history_not_found", "message": "…"}


@table(
    ("answer", "error"),
    [
        ({"status_code": 404, "json": {"detail": {"status": "document_not_found"}}}, ConversationUnknown),
        ({"status_code": 404, "json": {"detail": {"code": "not_found", "type": "not_found"}}}, ConversationUnknown),
        ({"status_code": 404, "json": {"detail": LIVE_UNKNOWN}}, ConversationUnknown),
        ({"status_code": 404, "json": {"detail": {"status": None, "code": "not_found"}}}, ConversationUnknown),
        ({"status_code": 404, "json": {"detail": {"status": 5, "code": ""}}}, BadAnswer),
        ({"status_code": 404, "json": {"detail": "Not Found"}}, BadAnswer),
        ({"status_code": 404, "html": "<h1>nginx</h1>"}, BadAnswer),
        ({"status_code": 422, "json": {"detail": []}}, BadAnswer),
        ({"status_code": 400, "json": {"detail": {"status": "invalid"}}}, BadAnswer),
        ({"status_code": 200, "html": "<h1>Please wait</h1>"}, BadAnswer),
        ({"status_code": 200, "json": []}, BadAnswer),
        ({"status_code": 200, "json": {"x": "y" * 4 * 1024 * 1024}}, BadAnswer),
        ({"status_code": 429, "json": {}}, Busy),
        ({"status_code": 500, "json": {}}, Unavailable),
    ],
)
async def test_only_an_answer_of_elevenlabs_itself_makes_a_conversation_unknown(
    upstream: respx.MockRouter, answer: dict[str, Any], error: type[Exception]
) -> None:
    upstream.get(ACCOUNT).respond(**answer)

    async with open_provider(UPSTREAM, Clock()) as provider:
        with pytest.raises(error):
            await provider.fetch_conversation(UPSTREAM, "conv_1")


async def test_a_record_with_a_long_transcript_is_read(upstream: respx.MockRouter) -> None:
    upstream.get(ACCOUNT).respond(json={"status": "done", "transcript": ["x" * 1024 * 1024]})

    async with open_provider(UPSTREAM, Clock()) as provider:
        assert (await provider.fetch_conversation(UPSTREAM, "conv_1"))["status"] == "done"


async def test_a_key_that_may_only_read_is_not_preferred_for_passes(upstream: respx.MockRouter) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.headers["xi-api-key"] == "sk_reader":
            return httpx.Response(200, json={"status": "done"})
        return httpx.Response(401, json={"detail": {"status": "missing_permissions"}})

    upstream.get(ACCOUNT).mock(side_effect=answer)
    async with open_provider(UPSTREAM, Clock(), "sk_writer", "sk_reader") as provider:
        await provider.fetch_conversation(UPSTREAM, "conv_1")
        agent = Agent(alias="default", agent_id=AGENT_ID, base_url=UPSTREAM)
        await provider.fetch_credential(agent, Transport.WEBSOCKET)

    assert upstream["signed_url"].calls.last.request.headers["xi-api-key"] == "sk_writer"
    assert upstream["signed_url"].call_count == 1


async def test_an_id_cannot_change_the_path_of_the_call(upstream: respx.MockRouter) -> None:
    route = upstream.get(path__regex=r".*").respond(json={"status": "done"})

    async with open_provider(UPSTREAM, Clock()) as provider:
        await provider.fetch_conversation(UPSTREAM, "../agents?x=1#y")

    assert route.calls.last.request.url.raw_path == b"/v1/convai/conversations/..%2Fagents%3Fx%3D1%23y"


async def test_a_record_of_another_conversation_is_a_bad_answer(upstream: respx.MockRouter) -> None:
    upstream.get(ACCOUNT).respond(json={"conversation_id": "conv_2", "status": "done"})

    async with open_provider(UPSTREAM, Clock()) as provider:
        with pytest.raises(BadAnswer) as refused:
            await provider.fetch_conversation(UPSTREAM, "conv_1")

    assert "another conversation" in refused.value.operator_note


LIST = "/v1/convai/conversations"


async def test_a_page_of_the_list_is_requested_by_agent_and_time(upstream: respx.MockRouter) -> None:
    route = upstream.get(LIST).respond(
        json={"conversations": [make_row("conv_1", "done", 42), 7, None], "has_more": True, "next_cursor": "c/2"}
    )

    async with open_provider(UPSTREAM, Clock()) as provider:
        page = await provider.list_conversations(UPSTREAM, AGENT_ID, since=NOW + 0.5, until=NOW + 60.5, cursor="c/1")

    assert [each["conversation_id"] for each in page.rows] == ["conv_1"]
    assert page.next_cursor == "c/2"
    assert dict(route.calls.last.request.url.params) == {
        "agent_id": AGENT_ID,
        "page_size": "100",
        "call_start_after_unix": str(NOW - 1),
        "call_start_before_unix": str(NOW + 62),
        "exclude_statuses": "initiated",
        "cursor": "c/1",
    }


@pytest.mark.parametrize("last", [{"has_more": False}, {"has_more": False, "next_cursor": "c/2"}])
async def test_the_last_page_has_no_cursor(upstream: respx.MockRouter, last: dict[str, Any]) -> None:
    upstream.get(LIST).respond(json={"conversations": [], **last})

    async with open_provider(UPSTREAM, Clock()) as provider:
        page = await provider.list_conversations(UPSTREAM, AGENT_ID, since=NOW, until=NOW)

    assert page == ([], "")


@table(
    "answer",
    [
        {"html": "<h1>Please wait</h1>"},
        {"json": []},
        {"json": {}},
        {"json": {"conversations": {}, "has_more": False}},
        {"json": {"conversations": [], "has_more": "no"}},
        {"json": {"conversations": [], "has_more": True}},
        {"json": {"conversations": [], "has_more": True, "next_cursor": ""}},
        {"json": {"conversations": [], "has_more": True, "next_cursor": 7}},
        {"status_code": 404, "json": {"detail": {"status": "not_found"}}},
        {"status_code": 404, "html": "<h1>nginx</h1>"},
        {"status_code": 422, "json": {"detail": []}},
    ],
)
async def test_an_answer_that_is_not_a_page_is_a_bad_answer(upstream: respx.MockRouter, answer: dict[str, Any]) -> None:
    upstream.get(LIST).respond(**answer)

    async with open_provider(UPSTREAM, Clock()) as provider:
        with pytest.raises(BadAnswer):
            await provider.list_conversations(UPSTREAM, AGENT_ID, since=NOW, until=NOW)
