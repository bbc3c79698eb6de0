"""The reconciler settles what no webhook reported, from the list of conversations, on one instance at a time."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect

from elevenlabs_emulator import Emulator, Fault
from tests.conftest import AGENT_ID, NOW, Clock
from tests.logs import capture_logs
from tests.settlement.given import (
    HERE,
    FakeProvider,
    grant,
    make_record,
    make_row,
    make_settlements,
    open_provider,
    run_emulator,
)
from tests.simulation.virtual_time import FreezingLedger, VirtualTime, run
from tests.tables import table
from voicepass.elevenlabs import ElevenLabs
from voicepass.elevenlabs.answers import ConversationsPage
from voicepass.errors import (
    BadAnswer,
    Busy,
    ConversationUnknown,
    KeyRejected,
    LedgerUnavailable,
    Overloaded,
    QuotaExhausted,
    Timeout,
    Unavailable,
)
from voicepass.ledger import Ledger
from voicepass.ledger.sqlite import open_sqlite
from voicepass.settlement import NEVER_OPENED_SECONDS, run_periodically
from voicepass.settlement.reconciler import (
    CALLS_PER_ROUND,
    LIST_SECONDS,
    MAX_ROWS,
    MIN_LEASE_SECONDS,
    UNACCOUNTED_SECONDS,
    Reconciler,
)

pytestmark = pytest.mark.anyio

OLD = 20 * 60 + 1
"""From this age on, the reconciler asks about a pass individually."""

OPEN = (None, 600)
EXPIRED = ("expiry", 0)
IN_FULL = ("reconciler", 600)
USED = ("reconciler", 42)


def make_reconciler(
    ledger: Ledger,
    provider: ElevenLabs,
    clock: Clock,
    *,
    base_urls: Mapping[str, str] | None = None,
    every_seconds: float = 60,
    bypasses: list[str] | None = None,
) -> Reconciler:
    return Reconciler(
        ledger=ledger,
        provider=provider,
        settlements=make_settlements(ledger, clock, bypasses=bypasses),
        base_urls={AGENT_ID: HERE} if base_urls is None else base_urls,
        every_seconds=every_seconds,
        conversation_seconds=600,
        clock=clock,
    )


# The list.


ROWS: dict[str, tuple[dict[str, Any], tuple[str | None, int]]] = {
    "done": (make_row("conv_1", "done", 42), USED),
    "failed": (make_row("conv_1", "failed", 42), USED),
    "done, without a duration": (make_row("conv_1", "done", None), (None, 300)),
    "processing: the time since the grant counts": (make_row("conv_1", "processing", 42), (None, 300)),
    "still open": (make_row("conv_1", "in-progress"), OPEN),
    "an unknown status counts as open": (make_row("conv_1", "archived", 42), OPEN),
    "no status": ({"conversation_id": "conv_1"}, OPEN),
    "a status that is no text": (make_row("conv_1", ["done"], 42), OPEN),  # type: ignore[arg-type]
    "an id that no database holds": (make_row("conv_\ud800", "done", 42), OPEN),
    "a negative duration": (make_row("conv_1", "done", -1), (None, 300)),
    "a huge duration": (make_row("conv_1", "done", 10**9), (None, 300)),
    "a duration that is no number": (make_row("conv_1", "done", "42"), (None, 300)),
    "another conversation": (make_row("conv_2", "done", 42), OPEN),
    "another agent": (make_row("conv_1", "done", 42, agent_id="agent_other"), OPEN),
    "no conversation": ({"status": "done"}, OPEN),
}


@table("case", ROWS)
async def test_each_kind_of_row_settles_a_pass_ends_it_or_leaves_it_open(case: str) -> None:
    listed, expected = ROWS[case]
    clock = Clock()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        await grant(ledger)
        clock.now += 300

        await make_reconciler(ledger, FakeProvider(pages=[[listed]]), clock).run_round()

        found = await ledger.find_pass("conv_1")
    assert (found.settled_by, found.seconds) == expected


async def test_every_page_is_read_and_100_conversations_cost_one_call() -> None:
    clock = Clock()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        for number in range(250):
            await grant(ledger, f"conv_{number}")
        clock.now += 300
        rows = [make_row(f"conv_{number}", "done", 42) for number in range(250)]
        provider = FakeProvider(pages=[rows[:100], rows[100:200], rows[200:]])

        await make_reconciler(ledger, provider, clock).run_round()

        settled = [(await ledger.find_pass(f"conv_{number}")).settled_by for number in range(250)]
    assert settled == ["reconciler"] * 250
    assert len(provider.listed) == 3
    assert provider.asked_about == []


async def test_every_row_of_a_page_counts_even_beyond_the_batch_size() -> None:
    clock = Clock()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        for number in range(3):
            await grant(ledger, f"conv_{number}")
        clock.now += 300
        others = [make_row(f"conv_other_{number}", "in-progress", agent_id="agent_other") for number in range(MAX_ROWS)]
        first, second, third = (make_row(f"conv_{number}", "done", 42) for number in range(3))
        page = [first, *others, second, *others, third]

        await make_reconciler(ledger, FakeProvider(pages=[page]), clock).run_round()

        settled = [(await ledger.find_pass(f"conv_{number}")).settled_by for number in range(3)]
    assert settled == ["reconciler"] * 3


async def test_each_row_of_a_page_is_applied_once() -> None:
    clock = Clock()
    page = [make_row("conv_9", "done", agent_id="agent_other"), make_row("conv_1", "done", 42, agent_id="agent_other")]
    async with open_sqlite(":memory:", clock=clock) as ledger:
        await grant(ledger)
        clock.now += 300

        with capture_logs() as logged:
            await make_reconciler(ledger, FakeProvider(pages=[page]), clock).run_round()

    assert [line["event"] for line in logged].count("conversation.wrong_agent") == 1


async def test_the_list_is_read_every_four_minutes() -> None:
    clock, provider = Clock(), FakeProvider()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        reconciler = make_reconciler(ledger, provider, clock)
        await grant(ledger)
        clock.now += 30
        calls = []
        for _ in range(9):
            await reconciler.run_round()
            calls.append(len(provider.listed))
            clock.now += 60

    assert calls == [1, 1, 1, 1, 2, 2, 2, 2, 3]


def test_a_slow_round_does_not_shift_the_times_of_the_later_rounds() -> None:
    time = VirtualTime()
    began: list[float] = []

    async def act() -> None:
        began.append(time.now)
        await asyncio.sleep([20, 0, 150, 0, 0][len(began) - 1])

    async def repeat() -> None:
        async with run_periodically(60, act, on_failure=pytest.fail):
            await asyncio.sleep(400)

    run(time, repeat)

    assert began == [60, 120, 180, 330, 390]


async def test_the_list_is_read_from_the_last_reading_on_or_from_the_oldest_open_conversation() -> None:
    clock, provider = Clock(), FakeProvider()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        reconciler = make_reconciler(ledger, provider, clock)
        await grant(ledger, "conv_1")
        clock.now += 100
        await reconciler.run_round()
        await grant(ledger, "conv_2")
        provider.pages = [[make_row("conv_2", "in-progress", began=NOW + 101)]]
        clock.now += LIST_SECONDS
        await reconciler.run_round()
        clock.now += LIST_SECONDS
        await reconciler.run_round()

    first, second, third = provider.listed
    assert first == (NOW - 60, NOW + 85)  # a minute of overlap; the list may lack those of the last 15 s
    assert second == (NOW + 85 - 60, NOW + 295)
    assert third == (NOW + 101 - 5, NOW + 505)  # conv_1 is not in the list, so it has not begun


async def test_conversations_without_a_pass_are_seen_also_if_the_only_open_conversation_began_later() -> None:
    clock, provider = Clock(), FakeProvider()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        reconciler = make_reconciler(ledger, provider, clock)
        await grant(ledger, "conv_1")
        clock.now += 100
        await reconciler.run_round()
        clock.now += LIST_SECONDS
        await ledger.note_opened("conv_1", 0)
        await reconciler.run_round()

    assert provider.listed[1] == (NOW + 100 - 15 - 60, NOW + 100 + LIST_SECONDS - 15)


async def test_a_pass_that_is_too_old_to_be_opened_and_not_in_the_list_is_released() -> None:
    clock, provider = Clock(), FakeProvider()
    released = []
    async with open_sqlite(":memory:", clock=clock) as ledger:
        for number in range(30):
            await grant(ledger, f"conv_{number}")
        reconciler = make_reconciler(ledger, provider, clock)
        for _ in range(20):
            clock.now += 60
            await reconciler.run_round()
            passes = await ledger.list_passes(most=30)
            released.append(sum(each.settled_by == "expiry" for each in passes))

    assert released.index(30) + 1 <= 20  # minutes
    assert released.index(30) * 60 >= NEVER_OPENED_SECONDS - 60
    assert set(released) == {0, 30}
    assert provider.asked_about == []


async def test_one_round_releases_more_passes_than_one_batch_and_logs_the_number() -> None:
    clock = Clock()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        for number in range(101):
            await grant(ledger, f"conv_{number}")
        clock.now += NEVER_OPENED_SECONDS + 60
        with capture_logs() as logged:
            await make_reconciler(ledger, FakeProvider(), clock).run_round()

    assert logged == [{"event": "passes.reconciled", "log_level": "info", "expired": 101}]


async def test_no_pass_is_released_while_the_list_cannot_be_read_to_its_end() -> None:
    clock, provider = Clock(), FakeProvider(listing=Unavailable())
    async with open_sqlite(":memory:", clock=clock) as ledger:
        await grant(ledger)
        reconciler = make_reconciler(ledger, provider, clock)
        for _ in range(19):
            clock.now += 60
            await reconciler.run_round()

        found = await ledger.find_pass("conv_1")
    assert (found.settled_by, found.seconds) == OPEN


@pytest.mark.parametrize("cursors", [["1", "1"], ["1", "2", "1"], ["same"] * 2])
async def test_the_reconciler_stops_reading_an_endless_list_and_settles_its_rows_so_far(cursors: list[str]) -> None:
    class Endless(FakeProvider):
        calls = 0

        async def list_conversations(
            self, agent_base_url: str, agent_id: str, *, since: float, until: float, cursor: str = ""
        ) -> ConversationsPage:
            del agent_base_url, agent_id, since, until, cursor
            self.calls += 1
            return ConversationsPage([make_row("conv_1", "done", 42)], cursors[(self.calls - 1) % len(cursors)])

    clock, provider = Clock(), Endless()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        for conversation_id in ("conv_1", "conv_2"):
            await grant(ledger, conversation_id)
        clock.now += NEVER_OPENED_SECONDS + 60

        with capture_logs() as logged:
            await make_reconciler(ledger, provider, clock).run_round()

        found = [await ledger.find_pass(conversation_id) for conversation_id in ("conv_1", "conv_2")]
    assert provider.calls <= 3
    assert [(each.settled_by, each.seconds) for each in found] == [USED, OPEN]
    assert "does not end" in next(line["note"] for line in logged if line["event"] == "reconciler.stopped")


async def test_the_list_settles_a_conversation_of_more_than_20_minutes() -> None:
    clock = Clock()
    provider = FakeProvider(pages=[[make_row("conv_1", "in-progress", began=NOW)]])
    async with open_sqlite(":memory:", clock=clock) as ledger:
        await grant(ledger)
        reconciler = Reconciler(
            ledger=ledger,
            provider=provider,
            settlements=make_settlements(ledger, clock),
            base_urls={AGENT_ID: HERE},
            every_seconds=60,
            conversation_seconds=3600,
            clock=clock,
        )
        for _ in range(50):
            clock.now += 60
            await reconciler.run_round()
        asked_before = list(provider.asked_about)
        provider.pages = [[make_row("conv_1", "done", 3000, began=NOW)]]
        for _ in range(5):
            clock.now += 60
            await reconciler.run_round()

        found = await ledger.find_pass("conv_1")
    assert asked_before == []
    assert (found.settled_by, found.seconds) == ("reconciler", 3000)


async def test_a_conversation_that_appears_after_its_pass_was_released_counts_again() -> None:
    clock, provider = Clock(), FakeProvider()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        reconciler = make_reconciler(ledger, provider, clock)
        await grant(ledger)
        clock.now += NEVER_OPENED_SECONDS + 30
        await reconciler.run_round()
        released = await ledger.find_pass("conv_1")
        provider.pages = [[make_row("conv_1", "in-progress", began=clock.now - 20)]]
        await grant(ledger, "conv_2")
        clock.now += LIST_SECONDS
        await reconciler.run_round()
        open_again = await ledger.find_pass("conv_1")
        provider.pages = [[make_row("conv_1", "done", 42)]]
        clock.now += LIST_SECONDS
        await reconciler.run_round()
        found = await ledger.find_pass("conv_1")

    assert (released.settled_by, released.seconds) == EXPIRED
    assert (open_again.settled_by, open_again.seconds) == OPEN
    assert (found.settled_by, found.seconds) == USED


# Questions about single conversations, for passes that the list does not settle.


ANSWERS: dict[str, tuple[object, float, tuple[str | None, int]]] = {
    "done": (make_record("done", call_duration_secs=42), OLD, USED),
    "failed": (make_record("failed", call_duration_secs=42), OLD, USED),
    "done, without a duration": (make_record("done"), OLD, OPEN),
    "still open": (make_record("in-progress", call_duration_secs=0), OLD, OPEN),
    "processing": (make_record("processing", call_duration_secs=0), OLD, OPEN),
    "never really opened": (make_record("initiated", call_duration_secs=0), OLD, EXPIRED),
    "never opened": (ConversationUnknown(), OLD, EXPIRED),
    "a status of tomorrow": (make_record("archived", call_duration_secs=42), OLD, OPEN),
    "no status at all": ({"detail": []}, OLD, OPEN),
    "not readable": (BadAnswer(), OLD, OPEN),
    "not readable for a day": (BadAnswer(), UNACCOUNTED_SECONDS, IN_FULL),
    "processing for a day": (make_record("processing"), UNACCOUNTED_SECONDS, IN_FULL),
    "out of order for a day": (Unavailable(), UNACCOUNTED_SECONDS, OPEN),
    "done, after a day": (make_record("done", call_duration_secs=42), UNACCOUNTED_SECONDS, USED),
}


@table("case", ANSWERS)
async def test_each_kind_of_answer_settles_a_pass_expires_it_or_leaves_it_open(case: str) -> None:
    answer, age_seconds, expected = ANSWERS[case]
    clock = Clock()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        await grant(ledger)
        await ledger.note_opened("conv_1", 0) if "opened" not in case else None
        clock.now += age_seconds

        await make_reconciler(ledger, FakeProvider({"conv_1": answer}), clock).run_round()

        found = await ledger.find_pass("conv_1")
    assert (found.settled_by, found.seconds) == expected


async def test_a_round_logs_unreadable_records_full_charges_and_its_outcomes() -> None:
    clock, provider = Clock(), FakeProvider(default=BadAnswer(operator_note="the answer is not JSON"))
    async with open_sqlite(":memory:", clock=clock) as ledger:
        for conversation_id in ("conv_1", "conv_2"):
            await grant(ledger, conversation_id)
            await ledger.note_opened(conversation_id, 0)
        clock.now += UNACCOUNTED_SECONDS - OLD
        await grant(ledger, "conv_3")
        await ledger.note_opened("conv_3", 0)
        clock.now += OLD
        with capture_logs() as logged:
            await make_reconciler(ledger, provider, clock).run_round()

    ids = ("conv_1", "conv_2", "conv_3")
    unreadable = {"event": "conversation.unreadable", "log_level": "warning", "note": "the answer is not JSON"}
    in_full = {"event": "conversation.unaccounted", "log_level": "warning", "seconds": 600}
    outcomes = {"event": "passes.reconciled", "log_level": "info", "settled": 2, "left": 1}
    assert [line for line in logged if line["event"] == unreadable["event"]] == [
        {"conversation_id": conversation_id} | unreadable for conversation_id in ids
    ]
    assert [line for line in logged if line["event"] == in_full["event"]] == [
        {"conversation_id": conversation_id} | in_full for conversation_id in ids[:2]
    ]
    assert logged[-1] == outcomes


async def test_the_reconciler_does_not_ask_about_a_pass_that_the_list_may_still_settle() -> None:
    clock, provider = Clock(), FakeProvider()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        await grant(ledger)
        await ledger.note_opened("conv_1", 0)
        clock.now += OLD - 1

        await make_reconciler(ledger, provider, clock).run_round()

    assert provider.asked_about == []


async def test_a_pass_of_an_agent_that_is_no_longer_configured_is_charged_in_full_after_a_day() -> None:
    clock, provider = Clock(), FakeProvider()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        await grant(ledger, agent_id="agent_gone")
        reconciler = make_reconciler(ledger, provider, clock)
        clock.now += OLD
        await reconciler.run_round()
        left = await ledger.find_pass("conv_1")
        clock.now += UNACCOUNTED_SECONDS
        await reconciler.run_round()
        found = await ledger.find_pass("conv_1")

    assert provider.asked_about == []
    assert left.settled_by is None
    assert (found.settled_by, found.seconds) == IN_FULL


async def test_a_round_asks_about_20_passes_and_the_next_round_about_the_others() -> None:
    clock, provider = Clock(), FakeProvider()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        for number in range(25):
            clock.now += 1
            await grant(ledger, f"conv_{number}")
            await ledger.note_opened(f"conv_{number}", 0)
        clock.now += OLD
        reconciler = make_reconciler(ledger, provider, clock)
        per_round = []
        for _ in range(3):
            await reconciler.run_round()
            per_round.append(provider.asked_about[:])
            provider.asked_about.clear()
            clock.now += 60

    ids = [f"conv_{number}" for number in range(25)]
    assert per_round == [ids[:CALLS_PER_ROUND], ids[CALLS_PER_ROUND:], ids[:CALLS_PER_ROUND]]


@table("refusal", [Busy(), Unavailable(), Timeout(), QuotaExhausted(), KeyRejected(), Overloaded()])
async def test_a_host_that_refuses_is_asked_once_a_round_and_the_others_are_still_asked(refusal: Exception) -> None:
    clock, provider = (
        Clock(),
        FakeProvider({"https://there": refusal}, default=make_record("done", call_duration_secs=42)),
    )
    async with open_sqlite(":memory:", clock=clock) as ledger:
        for number in range(6):
            await grant(ledger, f"conv_{number}", agent_id=AGENT_ID if number % 2 else "agent_there")
            await ledger.note_opened(f"conv_{number}", 0)
        clock.now += OLD
        base_urls = {AGENT_ID: HERE, "agent_there": "https://there"}

        with capture_logs() as logged:
            await make_reconciler(ledger, provider, clock, base_urls=base_urls).run_round()

        settled = [(await ledger.find_pass(f"conv_{number}")).settled_by for number in range(6)]
    assert settled == [None, "reconciler"] * 3
    assert provider.asked_about == ["conv_0", "conv_1", "conv_3", "conv_5"]
    assert [(line["event"], line.get("host")) for line in logged] == [
        ("reconciler.stopped", "https://there"),
        ("passes.reconciled", None),
    ]


# One instance at a time, and no failure ends the reconciler.


async def test_of_two_instances_only_one_asks(tmp_path: Path) -> None:
    clock, provider = Clock(), FakeProvider()
    path = str(tmp_path / "ledger.db")
    async with open_sqlite(path, clock=clock) as one, open_sqlite(path, clock=clock) as other:
        await grant(one)
        await one.note_opened("conv_1", 0)
        clock.now += OLD
        instances = [make_reconciler(ledger, provider, clock) for ledger in (one, other)]

        held = await one.take_lease("reconciler", 60)
        await asyncio.gather(*(instance.run_round() for instance in instances))
        while_held = len(provider.asked_about)
        await one.end_lease("reconciler")
        await instances[0].run_round()

    assert held
    assert while_held == 0
    assert len(provider.asked_about) == 1


async def test_a_lease_belongs_to_one_instance_until_it_lapses_or_is_ended() -> None:
    clock = Clock()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        got = [await ledger.take_lease("a", 10), await ledger.take_lease("a", 10), await ledger.take_lease("b", 10)]
        clock.now += 9.9
        got.append(await ledger.take_lease("a", 10))
        clock.now += 0.1
        got += [await ledger.take_lease("a", 10), await ledger.take_lease("a", 10)]
        await ledger.end_lease("a")
        got.append(await ledger.take_lease("a", 10))

    assert got == [True, False, True, False, True, False, True]


CUT_SHORT = {"event": "reconciler.cut_short", "log_level": "warning", "after_seconds": 120}


@table(
    ("reading_seconds", "ends_after", "is_free_after", "lines"),
    [(20, 20, 54, []), (100, 100, 100, []), (130, 120, 120, [CUT_SHORT])],
)
def test_a_round_keeps_other_instances_away_until_shortly_before_the_next_one_and_is_cut_short_with_its_lease(
    reading_seconds: float, ends_after: float, is_free_after: float, lines: list[dict[str, Any]]
) -> None:
    class Slow(FakeProvider):
        async def list_conversations(
            self, agent_base_url: str, agent_id: str, *, since: float, until: float, cursor: str = ""
        ) -> ConversationsPage:
            await asyncio.sleep(reading_seconds)
            return await super().list_conversations(agent_base_url, agent_id, since=since, until=until, cursor=cursor)

    time = VirtualTime()

    async def hold() -> tuple[float, float]:
        async with open_sqlite(":memory:", clock=lambda: NOW + time.now) as real:
            ledger = FreezingLedger(real, time)
            await asyncio.sleep(1000)
            await make_reconciler(ledger, Slow(), Clock()).run_round()
            ended_at = time.now
            while not await ledger.take_lease("reconciler", 60):  # noqa: ASYNC110 - other instances ask like this
                await asyncio.sleep(0.5)
            return ended_at - 1000, time.now - 1000

    with capture_logs() as logged:
        assert run(time, hold) == (ends_after, is_free_after)
    assert logged == lines


async def test_after_a_round_that_fails_any_instance_may_run_the_next_one(tmp_path: Path) -> None:
    class Failing(FakeProvider):
        async def list_conversations(
            self, agent_base_url: str, agent_id: str, *, since: float, until: float, cursor: str = ""
        ) -> ConversationsPage:
            await super().list_conversations(agent_base_url, agent_id, since=since, until=until, cursor=cursor)
            raise LedgerUnavailable(operator_note="the disk is full")

    clock, failing, working = Clock(), Failing(), FakeProvider(pages=[[make_row("conv_1", "done", 42)]])
    path = str(tmp_path / "ledger.db")
    async with open_sqlite(path, clock=clock) as one, open_sqlite(path, clock=clock) as other:
        await grant(one)
        clock.now += 300

        await make_reconciler(one, failing, clock).run_round()
        is_free = await other.take_lease("reconciler", MIN_LEASE_SECONDS)
        await other.end_lease("reconciler")
        clock.now += LIST_SECONDS
        await make_reconciler(other, working, clock).run_round()

        found = await one.find_pass("conv_1")
    assert is_free
    assert len(failing.listed) == 1
    assert (found.settled_by, found.seconds) == USED


async def test_a_listed_conversation_that_was_never_issued_is_reported_once() -> None:
    clock, bypasses = Clock(), list[str]()
    rows = [
        make_row("conv_1", "in-progress"),
        make_row("conv_9", "done", 42),
        make_row("conv_9", "done", 42),
        {"status": "done"},
    ]
    provider = FakeProvider(pages=[rows])
    async with open_sqlite(":memory:", clock=clock) as ledger:
        await grant(ledger)
        reconciler = make_reconciler(ledger, provider, clock, bypasses=bypasses)
        with capture_logs() as logged:
            for _ in range(3):
                clock.now += LIST_SECONDS
                await reconciler.run_round()

    assert len(provider.listed) == 3
    assert bypasses == ["not_issued"]
    lines = [line for line in logged if line["event"] == "conversation.bypassed"]
    assert [(line["conversation_id"], line["agent_id"], line["reason"]) for line in lines] == [
        ("conv_9", AGENT_ID, "not_issued")
    ]


async def test_the_list_is_read_for_conversations_without_a_pass_even_if_no_pass_is_open() -> None:
    clock, bypasses = Clock(), list[str]()
    provider = FakeProvider(pages=[[make_row("conv_9", "in-progress", began=NOW - 30)]])
    async with open_sqlite(":memory:", clock=clock) as ledger:
        await make_reconciler(ledger, provider, clock, bypasses=bypasses).run_round()

    assert bypasses == ["not_issued"]


@table("ahead", [-3600, 3600])
async def test_elevenlabs_is_asked_in_real_time_also_if_the_clock_of_the_ledger_is_wrong(ahead: int) -> None:
    clock = Clock()
    async with open_sqlite(":memory:", clock=lambda: clock() + ahead) as ledger:
        await grant(ledger)
        clock.now += 300
        provider = FakeProvider(pages=[[make_row("conv_1", "in-progress", began=clock.now - 30)]])

        await make_reconciler(ledger, provider, clock).run_round()

        found = await ledger.find_pass("conv_1")
    assert provider.listed == [(NOW - 60, clock.now - 15)]
    assert found.opened_at == clock.now - 30 + ahead


async def test_a_record_of_a_conversation_without_authorization_is_reported() -> None:
    clock, bypasses = Clock(), list[str]()
    record = make_record("in-progress", authorization_method="public") | {"agent_id": AGENT_ID}
    async with open_sqlite(":memory:", clock=clock) as ledger:
        await grant(ledger)
        await ledger.note_opened("conv_1", 0)
        clock.now += OLD

        await make_reconciler(ledger, FakeProvider({"conv_1": record}), clock, bypasses=bypasses).run_round()

    assert bypasses == ["public"]


async def test_a_ledger_that_fails_ends_the_round_and_not_the_reconciler() -> None:
    class FailingLedger:
        async def take_lease(self, _name: str, _seconds: float) -> bool:
            raise LedgerUnavailable(operator_note="the disk is full")

    with capture_logs() as logged:
        await make_reconciler(FailingLedger(), FakeProvider(), Clock()).run_round()  # type: ignore[arg-type]

    assert logged == [
        {
            "event": "reconciler.stopped",
            "log_level": "warning",
            "code": "ledger_unavailable",
            "note": "the disk is full",
        }
    ]


async def test_no_failure_ends_the_reconciler_and_the_service_ends_it_at_once() -> None:
    clock, enough = Clock(), asyncio.Event()

    class Broken(FakeProvider):
        async def fetch_conversation(
            self, agent_base_url: str, conversation_id: str, *, is_lookup: bool = False
        ) -> dict[str, object]:
            await super().fetch_conversation(agent_base_url, conversation_id, is_lookup=is_lookup)
            clock.now += 200  # the lease has lapsed
            if len(self.asked_about) == 3:
                enough.set()
                await asyncio.Event().wait()
            raise RuntimeError("a bug")

    before = asyncio.all_tasks()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        await grant(ledger)
        await ledger.note_opened("conv_1", 0)
        clock.now += OLD
        reconciler = make_reconciler(ledger, Broken(), clock, every_seconds=0.01)

        with capture_logs() as logged:
            async with reconciler.run(), asyncio.timeout(5):
                await enough.wait()

    assert [(line["event"], line["cause"]) for line in logged] == [("reconciler.failed", "RuntimeError")] * 2
    assert asyncio.all_tasks() == before


# Over real sockets, with the emulator.


@contextlib.asynccontextmanager
async def open_reconciler(url: str, ledger: Ledger, clock: Clock) -> AsyncIterator[Reconciler]:
    async with open_provider(url, clock) as provider:
        yield make_reconciler(ledger, provider, clock, base_urls={AGENT_ID: url})


async def converse(emulator: Emulator, url: str, *, seconds: int) -> str:
    """Hold a conversation that lasts `seconds` by the emulator's clock; return its id."""
    conversation_signature, conversation_id = emulator.issue(AGENT_ID, bound=True)
    query = f"agent_id={AGENT_ID}&conversation_signature={conversation_signature}"
    initiation = {"type": "conversation_initiation_client_data", "user_id": "u-2", "dynamic_variables": {}}
    with connect(f"{url.replace('http', 'ws', 1)}/v1/convai/conversation?{query}", proxy=None) as socket:
        socket.send(json.dumps(initiation | {"dynamic_variables": {"user_name": "Ada"}}))
        socket.recv(timeout=5)
        emulator.advance(seconds)
    assert conversation_id is not None
    async with asyncio.timeout(5):
        while emulator.accounts[conversation_id].seconds is None:  # noqa: ASYNC110 - the server is in another thread
            await asyncio.sleep(0.001)
    return conversation_id


async def test_passes_are_settled_after_an_outage() -> None:
    clock = Clock()
    with run_emulator("convai_read") as (emulator, url):
        async with open_sqlite(":memory:", clock=clock) as ledger, open_reconciler(url, ledger, clock) as reconciler:
            ids = [await converse(emulator, url, seconds=5) for _ in range(3)]
            for conversation_id in ids:
                await grant(ledger, conversation_id)
                await ledger.note_opened(conversation_id, 0)
            clock.now += OLD
            emulator.faults["account"] = Fault(target="account", status=503)
            await reconciler.run_round()
            during = [(await ledger.find_pass(conversation_id)).settled_by for conversation_id in ids]
            calls = len(emulator.records.calls)

            emulator.faults.clear()
            clock.now += 60
            await reconciler.run_round()

            after = [(await ledger.find_pass(conversation_id)).settled_by for conversation_id in ids]
    assert (during, calls) == ([None] * 3, 3)  # the list, the first conversation and its retry
    assert after == ["reconciler"] * 3


async def test_a_key_that_may_not_read_is_logged_with_the_remedy_once_a_round() -> None:
    clock = Clock()
    with run_emulator() as (emulator, url):
        async with open_sqlite(":memory:", clock=clock) as ledger, open_reconciler(url, ledger, clock) as reconciler:
            for number in range(3):
                await grant(ledger, f"conv_{number}")
                await ledger.note_opened(f"conv_{number}", 0)
            clock.now += OLD

            with capture_logs() as logged:
                await reconciler.run_round()

    (line,) = logged
    assert (line["event"], line["code"]) == ("reconciler.stopped", "elevenlabs_key_rejected")
    assert "lacks the permission convai_read. Give that same key 'ElevenAgents: Read'" in line["note"]
    assert "VOICEPASS_RECONCILE_SECONDS=0" in line["note"]
    assert len(emulator.records.calls) == 1
