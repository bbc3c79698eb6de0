"""A conversation has one owner and one row, and the row ends the same in whatever order its events arrive."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ledger.given import (
    ALONE_ON_POSTGRES,
    START,
    RecordingLedger,
    TurnedClock,
    credential,
    find_refusal,
    grant_pass,
    limit,
    reservation,
    rows,
    settlement,
)
from tests.tables import table
from voicepass.errors import BadAnswer, ConversationUnknown, LedgerUnavailable
from voicepass.ledger import Ledger
from voicepass.model import Counted, IssuedPass, Reservation, Standing

pytestmark = pytest.mark.anyio


async def test_a_row_names_the_user_and_the_pass_of_a_conversation(ledger: Ledger, clock: TurnedClock) -> None:
    reserved, given_out = reservation(), credential("conv_1")
    await ledger.reserve(reserved, [])
    clock.now = START + 2
    await ledger.grant(reserved, given_out)

    found = await ledger.find_pass("conv_1")

    assert found == IssuedPass(
        pass_id=reserved.pass_id,
        request_id="r-1",
        token_issuer="https://login.example",
        user_id="u-1",
        agent_alias="default",
        agent_id="agent_1",
        transport="websocket",
        reserved_at=START,
        lapses_at=START + 1560,  # 930 and 600 seconds, and the rest of the minute
        seconds=600,
        granted_at=START + 2,
        conversation_id="conv_1",
        credential_sha256=given_out.sha256,
        opened_at=None,
        settled_at=None,
        settled_by=None,
        cost=None,
        reported_user_id=None,
    )


async def test_a_ready_credential_is_reserved_and_granted_in_one_durable_transaction(ledger: Ledger) -> None:
    recording, ready = RecordingLedger(ledger), credential("conv_1")
    await ledger.reserve(reservation(pass_id="two steps"), [])
    await ledger.grant(reservation(pass_id="two steps"), replace(credential("conv_2"), sealed=b"sealed"))

    await recording.reserve(reservation(pass_id="one step"), [], ready=replace(ready, sealed=b"sealed"))

    two_steps, one_step = await rows(ledger, "SELECT * FROM passes ORDER BY conversation_id DESC")
    its_own = {"pass_id": "one step", "conversation_id": "conv_1", "credential_sha256": ready.sha256}
    assert recording.is_durable == [True]
    assert one_step == {**two_steps, **its_own}


async def test_a_ready_credential_of_another_users_conversation_is_refused_and_nothing_is_counted(
    ledger: Ledger,
) -> None:
    await grant_pass(ledger)
    (before,) = await rows(ledger, "SELECT conversation_id FROM passes")
    sums = await rows(ledger, "SELECT * FROM sums")

    with pytest.raises(BadAnswer):
        await ledger.reserve(reservation("u-2"), [], ready=credential(before["conversation_id"]))

    assert await rows(ledger, "SELECT conversation_id FROM passes") == [before]
    assert await rows(ledger, "SELECT * FROM sums") == sums


async def test_the_standing_counts_open_and_unsettled_conversations(ledger: Ledger, clock: TurnedClock) -> None:
    for conversation in ("conv_1", "conv_2", "conv_3"):
        reserved = reservation()
        await ledger.reserve(reserved, [])
        await ledger.grant(reserved, credential(conversation))
    young = await ledger.read_standing()
    await ledger.settle(settlement("conv_3"))
    clock.now = START + 1000
    old = await ledger.read_standing()
    clock.now = START + 1600

    assert young == Standing(open_conversations=3, unsettled=0, oldest_unsettled_seconds=0)
    assert old == Standing(open_conversations=2, unsettled=2, oldest_unsettled_seconds=1000)
    assert (await ledger.read_standing()).open_conversations == 0


@pytest.mark.parametrize("unknown", ["conv_2", "CONV_1", "conv_1 ", "", "%", "conv_1' OR '1'='1"])
async def test_only_the_exact_conversation_id_is_found(ledger: Ledger, unknown: str) -> None:
    reserved = reservation()
    await ledger.reserve(reserved, [])
    await ledger.grant(reserved, credential("conv_1"))

    with pytest.raises(ConversationUnknown):
        await ledger.find_pass(unknown)


async def test_a_conversation_of_another_user_is_refused_and_keeps_its_owner(ledger: Ledger) -> None:
    first = reservation()
    others = [reservation("u-2"), reservation(token_issuer="https://other.example"), reservation("U-1")]
    for each in (first, *others):
        await ledger.reserve(each, [])
    await ledger.grant(first, credential("conv_1"))

    for other in others:
        with pytest.raises(BadAnswer):
            await ledger.grant(other, credential("conv_1"))
        await ledger.release(other)

    assert (await ledger.find_pass("conv_1")).pass_id == first.pass_id
    assert len(await rows(ledger, "SELECT pass_id FROM passes")) == 1


async def test_a_conversation_that_is_granted_to_its_user_twice_has_one_row(ledger: Ledger) -> None:
    first, again = reservation(), reservation()
    for each in (first, again):
        await ledger.reserve(each, [])
        await ledger.grant(each, credential("conv_1"))
        await ledger.settle(settlement("conv_1", seconds=84))

    await ledger.reserve(reservation(), [], ready=credential("conv_1"))

    (row,) = await rows(ledger, "SELECT pass_id, seconds FROM passes")
    assert (row["pass_id"], row["seconds"]) == (first.pass_id, 84), "the seconds used are still charged"
    assert await rows(ledger, "SELECT * FROM failed_requests") == []


async def test_passes_without_a_conversation_id_are_separate_rows(ledger: Ledger) -> None:
    nameless = credential("conv_1").__class__(secret="t", conversation_id=None, expires_at=None)
    for each in (reservation(), reservation("u-2")):
        await ledger.reserve(each, [])
        await ledger.grant(each, nameless)

    assert len(await rows(ledger, "SELECT pass_id FROM passes WHERE granted_at IS NOT NULL")) == 2


async def test_a_released_pass_is_not_counted_and_a_granted_pass_cannot_be_released(ledger: Ledger) -> None:
    reserved = reservation()
    await ledger.reserve(reserved, [limit(1)])
    await ledger.release(reserved)
    for _ in range(2):
        assert await find_refusal(ledger, [limit(1)], pass_id="p") is None
        await ledger.release(reservation(pass_id="p"))
    await ledger.reserve(reserved, [limit(1)])
    await ledger.grant(reserved, credential("conv_1"))

    await ledger.release(reserved)

    assert (await ledger.find_pass("conv_1")).pass_id == reserved.pass_id


async def test_a_pass_without_a_row_cannot_be_granted(ledger: Ledger, clock: TurnedClock) -> None:
    released, lapsed = reservation(), reservation()
    await ledger.reserve(released, [])
    await ledger.reserve(lapsed, [])
    await ledger.release(released)
    clock.now += 900
    await ledger.reserve(reservation("u-2"), [])

    for gone in (released, lapsed, reservation("never-reserved")):
        with pytest.raises(LedgerUnavailable):
            await ledger.grant(gone, credential())


async def test_the_seconds_that_were_used_replace_the_reserved_seconds(ledger: Ledger, clock: TurnedClock) -> None:
    conversation_id = await grant_pass(ledger)
    clock.now += 100

    settled = await ledger.settle(settlement(conversation_id, seconds=42, user_id="u-2"))

    assert settled == await ledger.find_pass(conversation_id)
    assert (settled.seconds, settled.cost, settled.settled_at, settled.settled_by) == (42, 7, START + 100, "webhook")
    assert (settled.reported_user_id, settled.identity_mismatch) == ("u-2", True)


@table(
    ("agent_id", "reported_agent_id", "is_settled"),
    [
        ("agent_1", "agent_1", True),
        ("agent_1", "agent_2", False),
        ("agent_1", None, True),
        ("agent_1", "seng_1", True),
        ("seng_1", "agent_1", True),
    ],
)
async def test_a_settlement_of_another_agent_is_ignored(
    ledger: Ledger, agent_id: str, reported_agent_id: str | None, *, is_settled: bool
) -> None:
    conversation_id = await grant_pass(ledger, agent_id=agent_id)

    settled = await ledger.settle(settlement(conversation_id, agent_id=reported_agent_id))

    assert (settled is not None) is is_settled
    assert ((await ledger.find_pass(conversation_id)).settled_at is not None) is is_settled


@table(
    ("user_id", "variable_user_id", "reported"),
    [
        (None, None, None),
        ("u-1", None, "u-1"),
        (None, "u-1", "u-1"),
        ("u-1", "u-2", "u-2"),
        ("u-2", "u-1", "u-2"),
        ("u-2", "u-3", "u-2"),
    ],
)
async def test_of_two_user_ids_that_elevenlabs_reports_the_one_of_another_user_is_kept(
    ledger: Ledger, user_id: str | None, variable_user_id: str | None, reported: str | None
) -> None:
    conversation_id = await grant_pass(ledger)

    await ledger.settle(settlement(conversation_id, user_id=user_id, variable_user_id=variable_user_id))

    assert (await ledger.find_pass(conversation_id)).reported_user_id == reported


async def test_the_first_report_of_a_conversation_returns_its_pass_also_after_an_expiry(ledger: Ledger) -> None:
    reported, expired = await grant_pass(ledger), await grant_pass(ledger)
    await ledger.note_unopened(expired, expires_seconds=0)

    of_reported = [await ledger.settle(settlement(reported, source=each)) for each in ("reconciler", "webhook")]
    of_expired = [await ledger.settle(settlement(expired, source=each)) for each in ("reconciler", "webhook")]

    assert [settled is not None for settled in of_reported] == [True, False]
    assert [settled is not None for settled in of_expired] == [True, False]
    assert (await ledger.find_pass(reported)).settled_by == "webhook"


async def test_very_large_numbers_are_stored(ledger: Ledger) -> None:
    conversation_id = await grant_pass(ledger)

    settled = await ledger.settle(settlement(conversation_id, seconds=2**40, cost=2**60))

    assert settled is not None
    assert (settled.seconds, settled.cost) == (2**40, 2**60)
    assert await find_refusal(ledger, [limit(10**6, counted=Counted.SECONDS)]) is not None


async def test_a_pass_that_was_never_used_gives_its_minutes_back(ledger: Ledger) -> None:
    minutes = [limit(600, counted=Counted.SECONDS), limit(1, counted=Counted.CONVERSATIONS)]
    conversation_id = await grant_pass(ledger, minutes)
    assert await find_refusal(ledger, minutes) is not None

    await ledger.note_unopened(conversation_id, expires_seconds=0)

    assert await find_refusal(ledger, minutes) is None


async def test_old_unsettled_passes_are_listed_oldest_first(ledger: Ledger, clock: TurnedClock) -> None:
    conversations = []
    for _ in range(4):
        conversations.append(await grant_pass(ledger))
        clock.now += 1
    await ledger.settle(settlement(conversations[1]))
    await ledger.reserve(reservation(), [])
    clock.now = START + 900
    at_the_edge = await ledger.list_unsettled(10, min_age_seconds=1200)
    clock.now = START + 1800

    due = await ledger.list_unsettled(2, min_age_seconds=1200)
    following = await ledger.list_unsettled(2, after=due[-1].reserved_at, min_age_seconds=1200)

    assert at_the_edge == []
    assert [each.conversation_id for each in due] == [conversations[0], conversations[2]]
    assert [each.conversation_id for each in following] == [conversations[3]]


# -- any order -------------------------------------------------------------------------------------------------------

Events = dict[str, Callable[[], Awaitable[object]]]
EVENTS = ["grant", "webhook", "webhook again", "reconciler", "expiry"]


def make_events(ledger: Ledger, reserved: Reservation, conversation_id: str) -> Events:
    webhook = settlement(conversation_id, seconds=42)
    return {
        "grant": lambda: ledger.grant(reserved, credential(conversation_id)),
        "webhook": lambda: ledger.settle(webhook),
        "webhook again": lambda: ledger.settle(webhook),
        "reconciler": lambda: ledger.settle(settlement(conversation_id, seconds=41, cost=None, source="reconciler")),
        "expiry": lambda: ledger.note_unopened(conversation_id, expires_seconds=0),
    }


async def apply_events(ledger: Ledger, order: list[str] | tuple[str, ...]) -> tuple[object, ...]:
    reserved = reservation()
    conversation_id = f"conv_{reserved.pass_id}"
    await ledger.reserve(reserved, [])
    apply = make_events(ledger, reserved, conversation_id)
    settled = [await apply[event]() for event in order]
    row = await ledger.find_pass(conversation_id)
    orphans = await rows(ledger, "SELECT * FROM orphans WHERE conversation_id = :id", id=conversation_id)
    # A settlement that waits for its pass does not keep the user that the browser reported.
    assert row.reported_user_id == "u-1" or order.index("grant") > min(map(order.index, EVENTS[1:4]))
    assert len([each for each in settled if isinstance(each, IssuedPass)]) <= 2
    return row.seconds, row.cost, row.settled_by, row.user_id, len(orphans)


@ALONE_ON_POSTGRES
async def test_every_order_of_grant_webhook_reconciler_and_expiry_ends_the_same(ledger: Ledger) -> None:
    endings = {order: await apply_events(ledger, order) for order in permutations(EVENTS)}

    assert len(endings) == 120
    assert set(endings.values()) == {(42, 7, "webhook", "u-1", 0)}


ORDERS = st.lists(st.sampled_from([event for event in EVENTS if event != "grant"]), max_size=6).flatmap(
    lambda repeated: st.permutations([*EVENTS, *repeated])
)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["sqlite", "postgres"], indirect=True)
@given(order=ORDERS)
@settings(max_examples=5000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_every_order_with_repetitions_ends_the_same(ledger: Ledger, order: list[str]) -> None:
    assert await apply_events(ledger, order) == (42, 7, "webhook", "u-1", 0)


async def test_a_cost_in_dollars_is_stored_even_if_it_arrives_before_its_pass(ledger: Ledger) -> None:
    conversation_id = await grant_pass(ledger)
    await ledger.settle(settlement(conversation_id, cost_fiat=0.25))
    await ledger.settle(settlement("conv_early", cost_fiat=1.5))
    reserved = reservation()
    await ledger.reserve(reserved, [])
    await ledger.grant(reserved, credential("conv_early"))

    found = [await ledger.find_pass(each) for each in (conversation_id, "conv_early")]

    assert [(each.cost_fiat, each.settled_at) for each in found] == [(0.25, START), (1.5, START)]
