"""Before voicepass refuses a user, it asks ElevenLabs which conversations have ended, and returns an unopened pass."""

import asyncio
import contextlib
import gc
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.canaries import API_KEY
from tests.conftest import AGENT_ID, NOW, TOKEN_ISSUER, Clock, signed_url
from tests.logs import capture_logs
from tests.settlement.given import HERE, FakeProvider, make_record
from tests.tables import table
from voicepass.elevenlabs import ElevenLabs, Workspace
from voicepass.elevenlabs.sealing import SealBrokenError, Seals
from voicepass.errors import (
    BadAnswer,
    Busy,
    ConversationUnknown,
    KeyRejected,
    LedgerUnavailable,
    Overloaded,
    Timeout,
    TooManyConversations,
    Unavailable,
)
from voicepass.ledger import Ledger
from voicepass.ledger.sqlite import open_sqlite
from voicepass.model import Agent, Counted, Credential, IssuedPass, Limit, Reservation, Scope, Transport
from voicepass.settlement import NEVER_OPENED_SECONDS, Bypasses, Outcome, Settlements
from voicepass.settlement.lookup import DEADLINE_SHARE, OpenPasses
from voicepass.settlement.reports import Report, Status, fetch_report

pytestmark = pytest.mark.anyio

AGENT = Agent(alias="default", agent_id=AGENT_ID, base_url=HERE)
LIMIT = Limit(name="open", scope=Scope.USER, counted=Counted.CONVERSATIONS, most=3, window_seconds=86_400)
SEALS = Seals([Workspace(base_url=HERE, api_keys=[API_KEY])])


class HeldProvider(FakeProvider):
    """Answers only once `may_answer` is set."""

    def __init__(self, *, default: object) -> None:
        super().__init__(default=default)
        self.is_asked, self.may_answer = asyncio.Event(), asyncio.Event()

    async def fetch_conversation(
        self, agent_base_url: str, conversation_id: str, *, is_lookup: bool = False
    ) -> dict[str, object]:
        self.is_asked.set()
        await self.may_answer.wait()
        return await super().fetch_conversation(agent_base_url, conversation_id, is_lookup=is_lookup)


START = 1000.0


class Ticks:
    """A monotonic clock that moves only when the code sleeps."""

    def __init__(self) -> None:
        self.now = START
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


class Setup:
    """A ledger in memory, a clock, and `OpenPasses` with a provider."""

    def __init__(self, ledger: Ledger, clock: Clock, provider: ElevenLabs) -> None:
        self.ledger, self.clock, self.ticks = ledger, clock, Ticks()
        self.settled: list[IssuedPass] = []
        self.open_passes = self.open_instance(provider)

    def open_instance(
        self, provider: ElevenLabs, *, settlements: type[Settlements] = Settlements, deadline_seconds: float = 4.0
    ) -> OpenPasses:
        return OpenPasses(
            ledger=self.ledger,
            provider=provider,
            settlements=settlements(
                ledger=self.ledger,
                observe=self.settled.append,
                bypasses=Bypasses(agent_ids=[AGENT_ID], count=pytest.fail),
                clock=self.clock,
            ),
            seals=SEALS,
            base_urls={AGENT_ID: HERE},
            deadline_seconds=deadline_seconds,
            clock=self.clock,
            ticks=self.ticks,
            sleep=self.ticks.sleep,
        )

    async def grant(self, conversation_id: str, **facts: Any) -> Reservation:
        given = make_reservation(**facts)
        credential = Credential(
            secret=signed_url(conversation_id=conversation_id),
            conversation_id=conversation_id,
            expires_at=self.clock.now + 900,
        )
        await self.ledger.reserve(given, [LIMIT])
        await self.ledger.grant(given, replace(credential, sealed=SEALS.seal(AGENT, given.pass_id, credential)))
        return given

    async def find_refusal(self) -> TooManyConversations | None:
        try:
            await self.ledger.reserve(make_reservation(), [LIMIT])
        except TooManyConversations as refusal:
            return refusal
        return None


def make_reservation(**facts: Any) -> Reservation:
    known: dict[str, Any] = {
        "pass_id": uuid.uuid4().hex,
        "request_id": "r-1",
        "token_issuer": TOKEN_ISSUER,
        "user_id": "u-1",
        "agent_alias": "default",
        "agent_id": AGENT_ID,
        "transport": Transport.WEBSOCKET,
        "seconds": 600,
    }
    return Reservation(**(known | facts))


@contextlib.asynccontextmanager
async def set_up(provider: ElevenLabs | None = None, *, conversations: Sequence[str] = ()) -> AsyncIterator[Setup]:
    clock = Clock()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        built = Setup(ledger, clock, provider or FakeProvider())
        for conversation_id in conversations:
            await built.grant(conversation_id)
        clock.now += 60
        yield built
        await built.open_passes.aclose()


THREE = ("conv_1", "conv_2", "conv_3")


@table(
    ("answer", "is_freed", "settled_by", "seconds"),
    [
        (make_record("done", call_duration_secs=42), True, "lookup", 42),
        (make_record("failed", call_duration_secs=42), True, "lookup", 42),
        (make_record("processing", call_duration_secs=42), True, None, 60),
        (make_record("done"), True, None, 60),
        (make_record("done", call_duration_secs=-5), True, None, 60),
        (make_record("done", call_duration_secs=10**12), True, None, 60),
        (make_record("done", call_duration_secs=42) | {"agent_id": "agent_other"}, False, None, 600),
        (make_record("processing") | {"agent_id": "agent_other"}, False, None, 600),
        (make_record("done", call_duration_secs=42) | {"agent_id": "seng_1"}, True, "lookup", 42),
        (make_record("in-progress"), False, None, 600),
        (make_record("initiated"), False, None, 600),
        (make_record("a status of tomorrow", call_duration_secs=42), False, None, 600),
        ({}, False, None, 600),
        ({"status": 7}, False, None, 600),
        ({"status": ["done"]}, False, None, 600),
        ({"status": {}}, False, None, 600),
        (ConversationUnknown(), False, None, 600),
        (BadAnswer(), False, None, 600),
        (Unavailable(), False, None, 600),
        (Timeout(), False, None, 600),
        (Busy(), False, None, 600),
        (Overloaded(), False, None, 600),
        (KeyRejected(), False, None, 600),
    ],
)
async def test_only_a_conversation_that_has_ended_frees_the_limit(
    answer: object, *, is_freed: bool, settled_by: str | None, seconds: int
) -> None:
    provider = FakeProvider({"conv_2": answer}, default=make_record("in-progress"))
    async with set_up(provider, conversations=THREE) as given:
        before = await given.find_refusal()

        await given.open_passes.refresh(make_reservation(), LIMIT)

        after = await given.find_refusal()
        found = await given.ledger.find_pass("conv_2")
    assert before is not None
    assert (after is None) == is_freed
    assert (found.settled_by, found.seconds) == (settled_by, seconds)
    assert set(provider.asked_about) == set(THREE) or isinstance(answer, KeyRejected)  # which ends the lookup
    assert [each.conversation_id for each in given.settled] == (["conv_2"] if settled_by else [])


async def test_a_lookup_releases_a_pass_that_can_no_longer_be_opened() -> None:
    async with set_up(FakeProvider(default=ConversationUnknown()), conversations=THREE) as given:
        given.clock.now += 900

        await given.open_passes.refresh(make_reservation(), LIMIT)

        found = [await given.ledger.find_pass(each) for each in THREE]
        assert [(each.settled_by, each.seconds) for each in found] == [("expiry", 0)] * 3
        assert await given.find_refusal() is None


async def test_the_result_of_a_lookup_is_stored_and_later_requests_do_not_ask() -> None:
    provider = FakeProvider(default=make_record("done", call_duration_secs=1))
    async with set_up(provider, conversations=THREE) as given:
        await given.open_passes.refresh(make_reservation(), LIMIT)
        questions = len(provider.asked_about)

        for _ in range(3):
            assert await given.find_refusal() is None
    assert (questions, len(provider.asked_about)) == (3, 3)


async def test_a_lookup_that_freed_nothing_is_not_repeated_for_two_seconds_on_any_instance() -> None:
    provider = FakeProvider(default=make_record("in-progress"))
    async with set_up(provider, conversations=THREE) as given:
        instances = [given.open_passes, given.open_instance(provider)]
        changed = [await instances[0].refresh(make_reservation(), LIMIT)]
        changed += [await open_instance.refresh(make_reservation(), LIMIT) for open_instance in instances]
        during = len(provider.asked_about)
        given.clock.now += 2
        changed.append(await instances[1].refresh(make_reservation(), LIMIT))

    assert (during, len(provider.asked_about)) == (3, 6)
    assert changed == [True, False, False, True]


async def test_ten_short_conversations_in_a_row_are_all_granted() -> None:
    provider = FakeProvider(default=make_record("done", call_duration_secs=1))
    async with set_up(provider) as given:
        for number in range(10):
            try:
                await given.grant(f"conv_{number}")
            except TooManyConversations:
                await given.open_passes.refresh(make_reservation(), LIMIT)
                await given.grant(f"conv_{number}")
            given.clock.now += 1

    assert len(provider.asked_about) == 9  # asks about each ended conversation once, three at a time


async def test_callers_at_the_same_time_share_one_lookup() -> None:
    provider = FakeProvider(default=make_record("done", call_duration_secs=1))
    async with set_up(provider, conversations=THREE) as given:
        changed = await asyncio.gather(*(given.open_passes.refresh(make_reservation(), LIMIT) for _ in range(40)))

        assert changed == [True] * 40
        assert len(provider.asked_about) == 3


EVERYONE = Limit(name="all", scope=Scope.ALL, counted=Counted.CONVERSATIONS, most=30, window_seconds=86_400)
PER_AGENT = Limit(name="agent", scope=Scope.AGENT, counted=Counted.CONVERSATIONS, most=30, window_seconds=86_400)


@table(
    ("limits", "other", "asking"),
    [
        ((LIMIT, LIMIT), {"user_id": "u-2"}, {"user_id": "u-2"}),
        ((LIMIT, LIMIT), {"token_issuer": "https://other.example"}, {"token_issuer": "https://other.example"}),
        ((PER_AGENT, PER_AGENT), {"agent_alias": "other"}, {"agent_alias": "other"}),
        ((LIMIT, EVERYONE), {"user_id": "u-2"}, {}),
    ],
)
async def test_callers_whose_limits_count_other_passes_share_no_lookup(
    limits: Sequence[Limit], other: dict[str, Any], asking: dict[str, Any]
) -> None:
    provider = FakeProvider(default=make_record("in-progress"))
    async with set_up(provider, conversations=["conv_1"]) as given:
        await given.grant("conv_2", **other)

        who = [make_reservation(), make_reservation(**asking)]
        await asyncio.gather(*map(given.open_passes.refresh, who, limits))

    assert set(provider.asked_about) == {"conv_1", "conv_2"}


async def test_a_caller_of_another_instance_waits_for_the_running_lookup() -> None:
    provider = HeldProvider(default=make_record("done", call_duration_secs=1))
    async with set_up(provider, conversations=THREE) as given:
        first = asyncio.create_task(given.open_passes.refresh(make_reservation(), LIMIT))
        await provider.is_asked.wait()
        second = asyncio.create_task(given.open_instance(provider).refresh(make_reservation(), LIMIT))
        while not given.ticks.slept:  # noqa: ASYNC110 - the code under test polls too
            await asyncio.sleep(0)
        was_waiting = not second.done()
        provider.may_answer.set()

        assert was_waiting
        assert list(await asyncio.gather(first, second)) == [True, True]
        assert len(provider.asked_about) == 3
        assert await given.find_refusal() is None


async def test_a_lookup_waits_for_a_pass_in_flight_and_asks_about_it() -> None:
    async with set_up(UNOPENED) as given:
        reserved = make_reservation()
        await given.ledger.reserve(reserved, [LIMIT])
        lookup = asyncio.create_task(given.open_passes.refresh(make_reservation(), LIMIT))
        while not given.ticks.slept:  # noqa: ASYNC110 - the code under test polls too
            await asyncio.sleep(0)
        fresh = Credential(secret="s", conversation_id="conv_9", expires_at=NOW + 900)
        await given.ledger.grant(reserved, replace(fresh, sealed=SEALS.seal(AGENT, reserved.pass_id, fresh)))
        await lookup

        credential = await given.open_passes.reissue(make_reservation(), AGENT, TooManyConversations())
    assert credential == fresh


async def test_a_lookup_waits_half_of_its_time_for_a_pass_that_is_not_granted() -> None:
    async with set_up() as given:
        await given.ledger.reserve(make_reservation(), [LIMIT])

        await given.open_passes.refresh(make_reservation(), LIMIT)

    assert given.ticks.now - START == pytest.approx(4 * DEADLINE_SHARE / 2, abs=0.1)


async def test_a_lookup_ends_after_a_third_of_the_deadline_and_uses_the_answers_so_far() -> None:
    class Slow(FakeProvider):
        async def fetch_conversation(
            self, agent_base_url: str, conversation_id: str, *, is_lookup: bool = False
        ) -> dict[str, object]:
            if conversation_id == "conv_2":
                await asyncio.Event().wait()
            return await super().fetch_conversation(agent_base_url, conversation_id, is_lookup=is_lookup)

    provider = Slow(default=make_record("done", call_duration_secs=1))
    async with set_up(conversations=THREE) as given:
        async with asyncio.timeout(5):
            await given.open_instance(provider, deadline_seconds=0.3).refresh(make_reservation(), LIMIT)

        found = [(await given.ledger.find_pass(each)).settled_by for each in THREE]
    assert found == ["lookup", None, "lookup"]


async def test_an_open_conversation_counts_from_its_start_or_from_now_if_its_record_has_none() -> None:
    async with set_up(conversations=["conv_1", "conv_2"]) as given:
        now = given.clock.now
        records = {
            "conv_1": make_record("in-progress", start_time_unix_secs=now - 40),
            "conv_2": make_record("in-progress", start_time_unix_secs=None),
        }
        await given.open_instance(FakeProvider(records)).refresh(make_reservation(), LIMIT)

        opened_at = [(await given.ledger.find_pass(conversation_id)).opened_at for conversation_id in records]
    assert opened_at == [now - 40, now]


async def test_a_caller_who_hangs_up_does_not_cancel_the_lookup() -> None:
    provider = HeldProvider(default=make_record("done", call_duration_secs=1))
    async with set_up(provider, conversations=THREE) as given:
        caller = asyncio.create_task(given.open_passes.refresh(make_reservation(), LIMIT))
        await provider.is_asked.wait()
        caller.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await caller
        provider.may_answer.set()
        await given.open_passes.aclose()

        assert await given.find_refusal() is None


class Failing(Settlements):
    async def apply(self, issued: IssuedPass, report: Report) -> Outcome:
        del issued, report
        raise LedgerUnavailable(operator_note="the disk is full")


async def test_a_ledger_that_fails_during_a_lookup_fails_closed_and_the_next_lookup_waits() -> None:
    provider = FakeProvider(default=make_record("done", call_duration_secs=1))
    async with set_up(provider, conversations=THREE) as given:
        with pytest.raises(LedgerUnavailable):
            await given.open_instance(provider, settlements=Failing).refresh(make_reservation(), LIMIT)

        assert not await given.open_passes.refresh(make_reservation(), LIMIT)
        assert len(provider.asked_about) == 3


async def test_a_lookup_whose_ledger_fails_for_one_pass_ends_when_the_other_answers_are_written() -> None:
    class FailingOnce(Settlements):
        async def apply(self, issued: IssuedPass, report: Report) -> Outcome:
            if issued.conversation_id == "conv_2":
                raise LedgerUnavailable(operator_note="the disk is full")
            for _ in range(10):
                await asyncio.sleep(0)
            return await super().apply(issued, report)

    provider = FakeProvider(default=make_record("done", call_duration_secs=1))
    async with set_up(provider, conversations=THREE) as given:
        with pytest.raises(LedgerUnavailable):
            await given.open_instance(provider, settlements=FailingOnce).refresh(make_reservation(), LIMIT)

        assert sorted(str(each.conversation_id) for each in given.settled) == ["conv_1", "conv_3"]


@table("is_closing", [True, False])
async def test_a_lookup_that_fails_after_its_caller_hung_up_raises_nothing_anywhere(*, is_closing: bool) -> None:
    provider = HeldProvider(default=make_record("done", call_duration_secs=1))
    async with set_up(provider, conversations=THREE) as given:
        open_passes = given.open_instance(provider, settlements=Failing)
        before = asyncio.all_tasks()
        caller = asyncio.create_task(open_passes.refresh(make_reservation(), LIMIT))
        await provider.is_asked.wait()
        caller.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await caller
        provider.may_answer.set()

        if is_closing:
            await open_passes.aclose()
        else:
            await asyncio.wait(asyncio.all_tasks() - before)

    gc.collect()  # asyncio reports a lost exception when it collects the task, and then the test fails


async def test_a_write_that_takes_longer_than_the_lookup_may_ask_still_counts() -> None:
    class Slow(Settlements):
        async def apply(self, issued: IssuedPass, report: Report) -> Outcome:
            outcome = await super().apply(issued, report)
            await asyncio.sleep(0.2)  # longer than a third of the deadline
            return outcome

    provider = FakeProvider(default=make_record("done", call_duration_secs=1))
    async with set_up(provider, conversations=THREE) as given:
        open_passes = given.open_instance(provider, settlements=Slow, deadline_seconds=0.3)
        await open_passes.refresh(make_reservation(), LIMIT)

        is_paused = not await open_passes.refresh(make_reservation(), LIMIT)
    assert not is_paused  # only a lookup that freed nothing is followed by a pause
    assert len(given.settled) == 3


async def test_a_key_that_may_not_read_is_logged_once_an_hour() -> None:
    provider = FakeProvider(default=KeyRejected(operator_note="it lacks convai_read"))
    async with set_up(provider, conversations=THREE) as given:
        with capture_logs() as logged:
            for _ in range(121):
                await given.open_passes.refresh(make_reservation(), LIMIT)
                given.clock.now += 60
                given.ticks.now += 60
                if given.clock.now < NOW + 1500:
                    continue
                for conversation_id in THREE:  # the first three have lapsed, so grant new ones
                    with contextlib.suppress(TooManyConversations):
                        await given.grant(f"{conversation_id}_{given.clock.now}")

    warnings = [line for line in logged if line["event"] == "lookup.not_possible"]
    assert len(warnings) == 3  # at 0, 60 and 120 minutes
    assert {line["host"] for line in warnings} == {HERE}
    assert "convai_read" in warnings[0]["note"]
    assert "webhook" in warnings[0]["note"]
    assert {line["log_level"] for line in warnings} == {"warning"}


async def test_after_a_rejected_key_lookups_do_not_ask_for_a_minute() -> None:
    provider = FakeProvider(default=KeyRejected(operator_note="it lacks convai_read"))
    questions = []
    async with set_up(provider, conversations=["conv_1"]) as given:
        for seconds in (0, 59, 1):
            given.clock.now += 3  # longer than the pause after a lookup
            given.ticks.now += seconds
            await given.open_passes.refresh(make_reservation(), LIMIT)
            questions.append(len(provider.asked_about))

    assert questions == [1, 1, 2]


async def test_lookups_do_not_ask_about_passes_of_an_agent_that_is_no_longer_configured() -> None:
    provider = FakeProvider(default=make_record("done", call_duration_secs=1))
    async with set_up(provider) as given:
        await given.grant("conv_1", agent_id="agent_gone")

        await given.open_passes.refresh(make_reservation(), LIMIT)

    assert provider.asked_about == []


async def test_a_lookup_that_gets_no_answer_is_logged() -> None:
    provider = FakeProvider(default=Unavailable(operator_note="it is down"))
    async with set_up(provider, conversations=["conv_1"]) as given:
        with capture_logs() as logged:
            await given.open_passes.refresh(make_reservation(), LIMIT)

    assert logged == [
        {
            "event": "lookup.failed",
            "log_level": "info",
            "conversation_id": "conv_1",
            "code": "elevenlabs_unavailable",
            "note": "it is down",
        }
    ]


@table(("source", "by_lookups"), [("lookup", ["conv_1"]), ("reconciler", [])])
async def test_only_a_lookup_takes_the_calls_that_are_kept_for_lookups(source: str, by_lookups: list[str]) -> None:
    provider = FakeProvider()
    async with set_up(conversations=["conv_1"]) as given:
        await fetch_report(provider, HERE, await given.ledger.find_pass("conv_1"), source=source)

    assert provider.asked_about == ["conv_1"]
    assert provider.asked_by_lookups == by_lookups


@table(
    ("status", "age_seconds", "outcomes"),
    [
        (Status.DONE, 60, [Outcome.ENDED, Outcome.LEFT]),  # without a length
        (Status.ENDED, 60, [Outcome.ENDED, Outcome.LEFT]),
        (Status.OPEN, 60, [Outcome.LEFT, Outcome.LEFT]),
        (Status.UNOPENED, 60, [Outcome.LEFT, Outcome.LEFT]),
        (Status.UNOPENED, NEVER_OPENED_SECONDS, [Outcome.EXPIRED, Outcome.LEFT]),
    ],
)
async def test_a_report_frees_a_limit_once_and_only_if_the_pass_counted_as_open(
    status: Status, age_seconds: float, outcomes: list[Outcome]
) -> None:
    async with set_up(conversations=["conv_1"]) as given:
        given.clock.now = NOW + age_seconds
        issued = await given.ledger.find_pass("conv_1")
        report = Report(conversation_id="conv_1", status=status)

        applied = [await given.open_passes.settlements.apply(issued, report) for _ in range(2)]
    assert applied == outcomes


# The unopened pass.


UNOPENED = FakeProvider(default=ConversationUnknown())


async def test_the_newest_unopened_pass_is_returned_again() -> None:
    refusal = TooManyConversations()
    async with set_up(UNOPENED, conversations=THREE) as given:
        await given.open_passes.refresh(make_reservation(), LIMIT)
        credential = await given.open_passes.reissue(make_reservation(), AGENT, refusal)

    assert (credential.secret, credential.conversation_id) == (signed_url(conversation_id="conv_3"), "conv_3")
    assert credential.expires_at == NOW + 900


@pytest.mark.parametrize("facts", [{"user_id": "u-2"}, {"agent_id": "agent_2"}, {"transport": Transport.WEBRTC}])
async def test_a_pass_of_another_user_agent_or_transport_is_not_returned(facts: dict[str, Any]) -> None:
    refusal = TooManyConversations()
    async with set_up(UNOPENED, conversations=THREE) as given:
        await given.open_passes.refresh(make_reservation(), LIMIT)
        with pytest.raises(TooManyConversations) as raised:
            await given.open_passes.reissue(make_reservation(**facts), AGENT, refusal)

    assert raised.value is refusal


@table(
    "answer",
    [
        make_record("in-progress"),
        make_record("processing"),
        make_record("done"),
        {},
        Unavailable(),
        Timeout(),
        KeyRejected(),
    ],
)
async def test_only_a_pass_that_elevenlabs_calls_unopened_is_returned_again(answer: object) -> None:
    async with set_up(FakeProvider(default=answer), conversations=THREE) as given:
        await given.open_passes.refresh(make_reservation(), LIMIT)

        with pytest.raises(TooManyConversations):
            await given.open_passes.reissue(make_reservation(), AGENT, TooManyConversations())


async def test_a_lookups_answer_that_a_pass_is_unopened_is_valid_only_for_a_few_seconds() -> None:
    async with set_up(UNOPENED, conversations=THREE) as given:
        await given.open_passes.refresh(make_reservation(), LIMIT)
        given.clock.now += 2
        within = await given.open_passes.reissue(make_reservation(), AGENT, TooManyConversations())
        given.clock.now += 3

        with pytest.raises(TooManyConversations):
            await given.open_passes.reissue(make_reservation(), AGENT, TooManyConversations())
    assert within.conversation_id == "conv_3"


async def test_a_pass_is_returned_again_only_while_it_is_valid_for_thirty_more_seconds() -> None:
    async with set_up(UNOPENED, conversations=["conv_1"]) as given:
        given.clock.now = NOW + 870
        await given.open_passes.refresh(make_reservation(), LIMIT)
        last = await given.open_passes.reissue(make_reservation(), AGENT, TooManyConversations())
        given.clock.now += 1

        with pytest.raises(TooManyConversations):
            await given.open_passes.reissue(make_reservation(), AGENT, TooManyConversations())
    assert last.conversation_id == "conv_1"


async def test_a_seal_that_is_broken_is_logged_and_the_pass_before_it_is_returned() -> None:
    async with set_up(UNOPENED, conversations=["conv_1"]) as given:
        changed = make_reservation()
        await given.ledger.reserve(changed, [LIMIT])
        newest = Credential(secret="s", conversation_id="conv_2", expires_at=NOW + 900)
        sealed = bytearray(SEALS.seal(AGENT, changed.pass_id, newest) or b"")
        sealed[-1] ^= 1
        await given.ledger.grant(changed, replace(newest, sealed=bytes(sealed)))

        await given.open_passes.refresh(make_reservation(), LIMIT)

        with capture_logs() as logged:
            credential = await given.open_passes.reissue(make_reservation(), AGENT, TooManyConversations())

    assert credential.conversation_id == "conv_1"
    assert [(line["event"], line["pass_id"]) for line in logged] == [("pass.seal_broken", changed.pass_id)]
    assert "the API key was replaced" in logged[0]["note"]


# The seal.


def credential() -> Credential:
    return Credential(secret=signed_url(), conversation_id="conv_1", expires_at=NOW + 900.5)


def make_seals(*api_keys: str) -> Seals:
    return Seals([Workspace(base_url=HERE, api_keys=api_keys)])


def test_a_sealed_credential_opens_with_the_same_api_key_for_the_same_pass() -> None:
    sealed = make_seals("sk_a").seal(AGENT, "p-1", credential())

    assert sealed is not None
    assert make_seals("sk_a").unseal(AGENT, "p-1", sealed) == credential()
    assert make_seals("sk_b", "sk_a").unseal(AGENT, "p-1", sealed) == credential()


def test_two_seals_of_one_credential_differ_in_nonce_and_text() -> None:
    one, other = (make_seals("sk_a").seal(AGENT, "p-1", credential()) for _ in range(2))

    assert one is not None
    assert other is not None
    assert one[:12] != other[:12]
    assert one[12:] != other[12:]


@pytest.mark.parametrize("sealed", ["text", 9_999_999_999, 1.5])
def test_a_sealed_value_of_another_type_does_not_open(sealed: Any) -> None:
    with pytest.raises(SealBrokenError):
        SEALS.unseal(AGENT, "p-1", sealed)


@table(
    ("api_key", "pass_id", "change"),
    [
        ("sk_b", "p-1", lambda sealed: sealed),
        ("sk_a", "p-2", lambda sealed: sealed),
        ("sk_a", "p-1", lambda sealed: sealed[:-1]),
        ("sk_a", "p-1", lambda sealed: sealed + b"\0"),
        ("sk_a", "p-1", lambda sealed: bytes([sealed[0] ^ 1]) + sealed[1:]),
        ("sk_a", "p-1", lambda sealed: sealed[:12] + bytes([sealed[12] ^ 1]) + sealed[13:]),
        ("sk_a", "p-1", lambda _sealed: b""),
        ("sk_a", "p-1", lambda _sealed: b"\0" * 12),
    ],
)
def test_a_changed_value_another_pass_or_another_key_opens_no_seal(api_key: str, pass_id: str, change: Any) -> None:
    sealed = make_seals("sk_a").seal(AGENT, "p-1", credential())

    with pytest.raises(SealBrokenError):
        make_seals(api_key).unseal(AGENT, pass_id, change(sealed))


@pytest.mark.parametrize("missing", ["conversation_id", "expires_at"])
def test_a_credential_without_conversation_or_expiry_is_not_sealed(missing: str) -> None:
    facts: dict[str, Any] = {"secret": "s", "conversation_id": "conv_1", "expires_at": 1.0} | {missing: None}

    assert SEALS.seal(AGENT, "p-1", Credential(**facts)) is None
