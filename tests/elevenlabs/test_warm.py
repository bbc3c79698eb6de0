"""The warm store gives URLs without a wait. It never gives a URL twice or an old one, and never delays a user."""

import asyncio
import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest

from voicepass.elevenlabs import ElevenLabs
from voicepass.elevenlabs.warm import DEMAND_SECONDS, SPARED_SECONDS, WarmStore
from voicepass.errors import (
    AgentUnknown,
    Busy,
    KeyRejected,
    LedgerUnavailable,
    RateLimited,
    Refusal,
    Unavailable,
    UserBlocked,
)
from voicepass.model import Agent, Credential, Transport

pytestmark = pytest.mark.anyio

START = 1_800_000_000.0
AGENT = Agent(alias="default", agent_id="agent_1", base_url="https://api.elevenlabs.io")


@dataclass
class Time:
    """Both clocks; they differ only if a test sets one of them."""

    ticks: float = 0.0
    wall: float = START

    def passes(self, seconds: float) -> None:
        self.ticks += seconds
        self.wall += seconds


@dataclass
class Source(ElevenLabs):
    """Gives numbered URLs, at once or when `gate` is set, and counts the calls."""

    time: Time
    key: int = 0
    refusal: Refusal | None = None
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    users: int = 0
    ahead: int = 0
    changes: dict[str, object] = field(default_factory=dict)
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.gate.set()

    async def fetch_credential(self, agent: Agent, transport: Transport, *, only_if_idle: bool = False) -> Credential:
        if only_if_idle:
            self.ahead += 1
        else:
            self.users += 1
        expires_at = self.time.wall + 900
        await self.gate.wait()
        if self.refusal is not None:
            raise self.refusal
        name = f"conv_{agent.agent_id}_{self.key}_{next(self._numbers)}"
        given = Credential(secret=f"wss://x/{transport}/{name}", conversation_id=name, expires_at=expires_at)
        return replace(given, **self.changes)  # type: ignore[arg-type]

    def get_key_position(self, agent: Agent) -> int:
        del agent
        return self.key


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def source(time: Time) -> Source:
    return Source(time)


def make_store(source: Source, *, most: int = 10) -> WarmStore:
    return WarmStore(source=source, most=most, clock=lambda: source.time.wall, ticks=lambda: source.time.ticks)


async def run_ready_tasks() -> None:
    """Run every task that can run."""
    for _ in range(5):
        await asyncio.sleep(0)


async def take_and_refill(store: WarmStore, *, agent: Agent = AGENT) -> Credential:
    credential = await take_or_fetch(store, agent)
    await run_ready_tasks()
    return credential


async def take_or_fetch(store: WarmStore, agent: Agent = AGENT) -> Credential:
    with store.take(agent, Transport.WEBSOCKET) as ready:
        pass
    return ready or await store.fetch_credential(agent, Transport.WEBSOCKET)


@contextlib.contextmanager
def take_and_refuse(store: WarmStore) -> Iterator[Credential | None]:
    """Take a credential for a user whom the ledger refuses when the block ends."""
    with contextlib.suppress(UserBlocked), store.take(AGENT, Transport.WEBSOCKET) as ready:
        yield ready
        raise UserBlocked


async def expect_refusal(store: WarmStore, refusal: Refusal) -> None:
    with pytest.raises(type(refusal)):
        await store.fetch_credential(AGENT, Transport.WEBSOCKET)
    await run_ready_tasks()


async def test_the_first_user_waits_and_the_next_does_not(source: Source) -> None:
    store = make_store(source)

    first = await take_and_refill(store)
    source.gate.clear()  # from now on ElevenLabs does not answer
    second = await asyncio.wait_for(take_or_fetch(store), 1)

    assert (first.is_warm, second.is_warm) == (False, True)
    assert first.secret != second.secret
    await store.aclose()


async def test_ten_thousand_users_at_once_get_ten_thousand_urls(source: Source) -> None:
    store = make_store(source, most=500)
    for _ in range(600):
        await take_and_refill(store)
    assert store.held == {"default": 500}

    credentials = await asyncio.gather(*(take_or_fetch(store) for _ in range(10_000)))

    assert len({credential.secret for credential in credentials}) == 10_000
    assert sum(credential.is_warm for credential in credentials) >= 500
    await store.aclose()


async def test_the_next_user_gets_a_url_that_was_given_back(source: Source) -> None:
    store = make_store(source)
    await take_and_refill(store)
    with take_and_refuse(store) as credential:
        assert credential is not None

    assert (await take_and_refill(store)) is credential


async def test_a_url_that_is_given_back_after_its_key_was_rejected_is_not_held(source: Source) -> None:
    store = make_store(source)
    await take_and_refill(store)
    with take_and_refuse(store) as credential:
        assert credential is not None
        source.refusal = KeyRejected()
        await expect_refusal(store, source.refusal)

    assert store.held == {"default": 0}


async def test_a_url_that_is_given_back_after_its_key_was_replaced_is_not_held(source: Source) -> None:
    store = make_store(source)
    await take_and_refill(store)
    with take_and_refuse(store) as credential:
        assert credential is not None
        source.key = 1
        await take_and_refill(store)

    assert (await take_and_refill(store)).secret.startswith("wss://x/websocket/conv_agent_1_1_")


async def test_urls_of_an_old_key_are_not_used_when_that_key_is_in_use_again(source: Source) -> None:
    store = make_store(source)
    for _ in range(3):
        await take_and_refill(store)
    source.key = 1
    await take_and_refill(store)
    source.key = 0

    assert not (await take_and_refill(store)).is_warm


@pytest.mark.parametrize("error", [LedgerUnavailable(), asyncio.CancelledError(), RuntimeError()], ids=repr)
async def test_nobody_gets_a_url_that_the_ledger_may_have_granted(source: Source, error: BaseException) -> None:
    store = make_store(source)
    await take_and_refill(store)

    with pytest.raises(type(error)), store.take(AGENT, Transport.WEBSOCKET) as ready:
        raise error
    later = [await take_and_refill(store) for _ in range(10)]

    assert ready is not None
    assert ready not in later


@pytest.mark.parametrize("refusal", [UserBlocked(), RateLimited()], ids=repr)
async def test_a_url_is_given_back_if_the_ledger_granted_nothing(source: Source, refusal: Refusal) -> None:
    store = make_store(source)
    await take_and_refill(store)

    with pytest.raises(type(refusal)), store.take(AGENT, Transport.WEBSOCKET) as ready:
        raise refusal

    assert (await take_and_refill(store)) == ready


async def test_refused_users_cause_no_call_and_fill_no_store(source: Source) -> None:
    store = make_store(source, most=8)
    for _ in range(8):
        await take_or_fetch(store)
    await run_ready_tasks()
    held, calls = store.held, source.ahead

    for _ in range(5):
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                stack.enter_context(take_and_refuse(store))
            await run_ready_tasks()
        await run_ready_tasks()

    assert (store.held, source.ahead) == (held, calls)


async def test_the_store_holds_at_most_twice_the_urls_taken_in_the_last_ten_seconds(source: Source, time: Time) -> None:
    store = make_store(source, most=8)
    for _ in range(3):
        await take_and_refill(store)
    after_three = dict(store.held)
    for _ in range(20):
        await take_and_refill(store)
    after_many = dict(store.held)

    time.passes(DEMAND_SECONDS + 1)
    for _ in range(30):
        time.passes(DEMAND_SECONDS + 1)
        await take_and_refill(store)

    assert (after_three, after_many) == ({"default": 6}, {"default": 8})
    assert store.held == {"default": 2}
    assert source.ahead + source.users <= 23 + 30 + 8


async def test_no_url_is_fetched_while_no_user_asks(source: Source, time: Time) -> None:
    store = make_store(source)
    await take_and_refill(store)
    calls = source.ahead + source.users

    time.passes(3600)
    await run_ready_tasks()

    assert calls == 3
    assert source.ahead + source.users == 3
    assert store.held == {"default": 2}  # they have expired, and the next user does not get them


@pytest.mark.parametrize("age", [900 - SPARED_SECONDS, 900, 86_400])
async def test_a_url_is_not_handed_out_within_two_minutes_of_its_expiry(source: Source, time: Time, age: float) -> None:
    store = make_store(source)
    await take_and_refill(store)
    time.passes(900 - SPARED_SECONDS - 1)
    good = await take_and_refill(store)
    time.passes(age)

    fresh = await take_and_refill(store)

    assert good.is_warm
    assert not fresh.is_warm
    assert fresh.expires_at == time.wall + 900


@pytest.mark.parametrize("wall", [-86_400, 86_400])
async def test_an_expired_url_is_not_returned_after_a_wall_clock_jump(source: Source, time: Time, wall: float) -> None:
    store = make_store(source)
    await take_and_refill(store)
    time.wall += wall
    time.ticks += 900

    assert not (await take_and_refill(store)).is_warm


async def test_after_a_suspend_no_expired_url_is_returned(source: Source, time: Time) -> None:
    store = make_store(source)
    await take_and_refill(store)
    time.wall += 3600  # the monotonic clock does not count the suspended time

    assert not (await take_and_refill(store)).is_warm


@pytest.mark.parametrize(
    "other",
    [
        replace(AGENT, agent_id="agent_2"),
        replace(AGENT, base_url="https://api.eu.residency.elevenlabs.io"),
        replace(AGENT, alias="seller", agent_id="agent_2"),
    ],
)
async def test_a_url_of_one_agent_is_never_given_for_another(source: Source, other: Agent) -> None:
    store = make_store(source)
    await take_and_refill(store)

    credential = await take_and_refill(store, agent=other)

    assert not credential.is_warm
    assert other.agent_id in credential.secret


async def test_a_pass_made_with_an_old_key_is_not_returned(source: Source) -> None:
    store = make_store(source)
    source.gate.clear()
    waiting = asyncio.create_task(store.fetch_credential(AGENT, Transport.WEBSOCKET))
    await run_ready_tasks()  # a call for the user and one for the store are in flight when the key changes
    source.key = 1
    source.gate.set()
    await waiting
    await run_ready_tasks()

    credential = await take_and_refill(store)

    assert not credential.is_warm
    assert credential.secret.startswith("wss://x/websocket/conv_agent_1_1_")


@pytest.mark.parametrize("refusal", [KeyRejected(), AgentUnknown()])
async def test_a_rejected_key_or_an_unknown_agent_empties_the_store(source: Source, refusal: Refusal) -> None:
    store = make_store(source)
    for _ in range(3):
        await take_and_refill(store)
    assert store.held == {"default": 6}

    source.refusal = refusal
    await take_and_refill(store)  # the store held it before the refusal

    assert store.held == {"default": 0}
    with pytest.raises(type(refusal)):
        await take_and_refill(store)


async def test_in_an_outage_users_get_the_warm_passes_and_then_the_refusal(source: Source, time: Time) -> None:
    store = make_store(source)
    for _ in range(4):
        await take_and_refill(store)
    source.refusal = Unavailable()

    bridged = [await take_and_refill(store) for _ in range(8)]
    with pytest.raises(Unavailable):
        await take_and_refill(store)
    source.refusal = None
    time.passes(60)
    after = [await take_and_refill(store) for _ in range(2)]

    assert all(credential.is_warm for credential in bridged)
    assert [credential.is_warm for credential in after] == [False, True]


@pytest.mark.parametrize(
    ("refusal", "pause"), [(Unavailable(retry_after_seconds=2), 2), (Busy(retry_after_seconds=30), 30)]
)
async def test_after_a_refusal_nothing_is_fetched_ahead_for_a_while(
    source: Source, time: Time, refusal: Refusal, pause: float
) -> None:
    store = make_store(source)
    source.refusal = refusal
    for _ in range(20):
        await expect_refusal(store, refusal)
    calls = source.ahead
    time.passes(pause - 0.5)
    await expect_refusal(store, refusal)
    still = source.ahead
    time.passes(1)
    await expect_refusal(store, refusal)

    assert (calls, still) == (2, 2)
    assert source.ahead > 2


@pytest.mark.parametrize("unknown", ["expires_at", "conversation_id"])
async def test_a_url_without_an_expiry_or_conversation_id_is_not_held(source: Source, unknown: str) -> None:
    store = make_store(source)
    source.changes = {unknown: None}

    credentials = [await take_and_refill(store) for _ in range(3)]

    assert not any(credential.is_warm for credential in credentials)
    assert store.held == {"default": 0}


async def test_conversation_tokens_are_not_fetched_ahead(source: Source) -> None:
    store = make_store(source)

    for _ in range(3):
        await store.fetch_credential(AGENT, Transport.WEBRTC)
        await run_ready_tasks()

    assert (source.users, source.ahead) == (3, 0)


async def test_urls_fetched_for_users_who_hung_up_go_to_other_users(source: Source) -> None:
    store = make_store(source)
    source.gate.clear()
    hanging = [asyncio.create_task(store.fetch_credential(AGENT, Transport.WEBSOCKET)) for _ in range(5)]
    await run_ready_tasks()
    for task in hanging:
        task.cancel()
    source.gate.set()
    await run_ready_tasks()

    credentials = [await take_and_refill(store) for _ in range(8)]

    assert len({credential.secret for credential in credentials}) == 8
    assert all(credential.is_warm for credential in credentials)
