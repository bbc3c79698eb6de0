"""The warm store: no wait where it holds something, never one URL twice, never an old one, never in a user's way."""

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterator
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
    """Both clocks; they part only where a test sets one of them."""

    ticks: float = 0.0
    wall: float = START

    def passes(self, seconds: float) -> None:
        self.ticks += seconds
        self.wall += seconds


@dataclass
class Source(ElevenLabs):
    """Gives numbered URLs, at once or when a test lets it, and remembers what was asked."""

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


Opened = Callable[..., WarmStore]


def opened(source: Source, *, most: int = 10) -> WarmStore:
    return WarmStore(source=source, most=most, clock=lambda: source.time.wall, ticks=lambda: source.time.ticks)


async def settled() -> None:
    """Run every task that can run."""
    for _ in range(5):
        await asyncio.sleep(0)


async def taken(store: WarmStore, *, agent: Agent = AGENT) -> Credential:
    credential = await take_or_fetch(store, agent)
    await settled()
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


async def refused(store: WarmStore, refusal: Refusal) -> None:
    with pytest.raises(type(refusal)):
        await store.fetch_credential(AGENT, Transport.WEBSOCKET)
    await settled()


async def test_the_first_user_waits_and_the_next_does_not(source: Source) -> None:
    store = opened(source)

    first = await taken(store)
    source.gate.clear()  # from now on ElevenLabs takes for ever
    second = await asyncio.wait_for(take_or_fetch(store), 1)

    assert (first.is_warm, second.is_warm) == (False, True)
    assert first.secret != second.secret
    await store.aclose()


async def test_ten_thousand_who_come_at_once_get_ten_thousand_urls(source: Source) -> None:
    store = opened(source, most=500)
    for _ in range(600):
        await taken(store)
    assert store.held == {"default": 500}

    credentials = await asyncio.gather(*(take_or_fetch(store) for _ in range(10_000)))

    assert len({credential.secret for credential in credentials}) == 10_000
    assert sum(credential.is_warm for credential in credentials) >= 500
    await store.aclose()


async def test_the_next_user_gets_a_url_that_was_given_back(source: Source) -> None:
    store = opened(source)
    await taken(store)
    with take_and_refuse(store) as credential:
        assert credential is not None

    assert (await taken(store)) is credential


async def test_a_url_that_is_given_back_after_its_key_was_rejected_is_not_held(source: Source) -> None:
    store = opened(source)
    await taken(store)
    with take_and_refuse(store) as credential:
        assert credential is not None
        source.refusal = KeyRejected()
        await refused(store, source.refusal)

    assert store.held == {"default": 0}


async def test_a_url_that_is_given_back_after_its_key_was_replaced_is_not_held(source: Source) -> None:
    store = opened(source)
    await taken(store)
    with take_and_refuse(store) as credential:
        assert credential is not None
        source.key = 1
        await taken(store)

    assert (await taken(store)).secret.startswith("wss://x/websocket/conv_agent_1_1_")


async def test_a_key_that_is_in_use_again_brings_no_old_url_back(source: Source) -> None:
    store = opened(source)
    for _ in range(3):
        await taken(store)
    source.key = 1
    await taken(store)
    source.key = 0

    assert not (await taken(store)).is_warm


@pytest.mark.parametrize("error", [LedgerUnavailable(), asyncio.CancelledError(), RuntimeError()], ids=repr)
async def test_nobody_gets_a_url_that_the_ledger_may_have_granted(source: Source, error: BaseException) -> None:
    store = opened(source)
    await taken(store)

    with pytest.raises(type(error)), store.take(AGENT, Transport.WEBSOCKET) as ready:
        raise error
    later = [await taken(store) for _ in range(10)]

    assert ready is not None
    assert ready not in later


@pytest.mark.parametrize("refusal", [UserBlocked(), RateLimited()], ids=repr)
async def test_a_url_is_given_back_if_the_ledger_granted_nothing(source: Source, refusal: Refusal) -> None:
    store = opened(source)
    await taken(store)

    with pytest.raises(type(refusal)), store.take(AGENT, Transport.WEBSOCKET) as ready:
        raise refusal

    assert (await taken(store)) == ready


async def test_users_who_are_refused_cause_no_call_and_no_url_more(source: Source) -> None:
    store = opened(source, most=8)
    for _ in range(8):
        await take_or_fetch(store)
    await settled()
    held, calls = store.held, source.ahead

    for _ in range(5):
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                stack.enter_context(take_and_refuse(store))
            await settled()
        await settled()

    assert (store.held, source.ahead) == (held, calls)


async def test_no_more_is_held_than_twice_what_the_last_ten_seconds_took(source: Source, time: Time) -> None:
    store = opened(source, most=8)
    for _ in range(3):
        await taken(store)
    after_three = dict(store.held)
    for _ in range(20):
        await taken(store)
    after_many = dict(store.held)

    time.passes(DEMAND_SECONDS + 1)
    for _ in range(30):
        time.passes(DEMAND_SECONDS + 1)
        await taken(store)

    assert (after_three, after_many) == ({"default": 6}, {"default": 8})
    assert store.held == {"default": 2}
    assert source.ahead + source.users <= 23 + 30 + 8


async def test_nothing_is_fetched_where_nobody_comes(source: Source, time: Time) -> None:
    store = opened(source)
    await taken(store)
    asked = source.ahead + source.users

    time.passes(3600)
    await settled()

    assert asked == 3
    assert source.ahead + source.users == 3
    assert store.held == {"default": 2}  # too old by now, and passed over by the next who comes


@pytest.mark.parametrize("age", [900 - SPARED_SECONDS, 900, 86_400])
async def test_a_url_is_not_handed_out_within_two_minutes_of_its_expiry(source: Source, time: Time, age: float) -> None:
    store = opened(source)
    await taken(store)
    time.passes(900 - SPARED_SECONDS - 1)
    good = await taken(store)
    time.passes(age)

    fresh = await taken(store)

    assert good.is_warm
    assert not fresh.is_warm
    assert fresh.expires_at == time.wall + 900


@pytest.mark.parametrize("wall", [-86_400, 86_400])
async def test_a_wall_clock_that_jumps_makes_no_old_url_young(source: Source, time: Time, wall: float) -> None:
    store = opened(source)
    await taken(store)
    time.wall += wall
    time.ticks += 900

    assert not (await taken(store)).is_warm


async def test_after_a_suspend_no_expired_url_is_returned(source: Source, time: Time) -> None:
    store = opened(source)
    await taken(store)
    time.wall += 3600  # monotonic time stood still

    assert not (await taken(store)).is_warm


@pytest.mark.parametrize(
    "other",
    [
        replace(AGENT, agent_id="agent_2"),
        replace(AGENT, base_url="https://api.eu.residency.elevenlabs.io"),
        replace(AGENT, alias="seller", agent_id="agent_2"),
    ],
)
async def test_one_agents_urls_are_never_anothers(source: Source, other: Agent) -> None:
    store = opened(source)
    await taken(store)

    credential = await taken(store, agent=other)

    assert not credential.is_warm
    assert other.agent_id in credential.secret


async def test_a_pass_made_with_an_old_key_is_not_returned(source: Source) -> None:
    store = opened(source)
    source.gate.clear()
    waiting = asyncio.create_task(store.fetch_credential(AGENT, Transport.WEBSOCKET))
    await settled()  # one for the user, one ahead, both under way when the key changes
    source.key = 1
    source.gate.set()
    await waiting
    await settled()

    credential = await taken(store)

    assert not credential.is_warm
    assert credential.secret.startswith("wss://x/websocket/conv_agent_1_1_")


@pytest.mark.parametrize("refusal", [KeyRejected(), AgentUnknown()])
async def test_a_key_or_an_agent_that_is_gone_empties_the_store(source: Source, refusal: Refusal) -> None:
    store = opened(source)
    for _ in range(3):
        await taken(store)
    assert store.held == {"default": 6}

    source.refusal = refusal
    await taken(store)  # held before anyone knew

    assert store.held == {"default": 0}
    with pytest.raises(type(refusal)):
        await taken(store)


async def test_warm_passes_bridge_an_outage_and_then_users_get_its_refusal(source: Source, time: Time) -> None:
    store = opened(source)
    for _ in range(4):
        await taken(store)
    source.refusal = Unavailable()

    bridged = [await taken(store) for _ in range(8)]
    with pytest.raises(Unavailable):
        await taken(store)
    source.refusal = None
    time.passes(60)
    after = [await taken(store) for _ in range(2)]

    assert all(credential.is_warm for credential in bridged)
    assert [credential.is_warm for credential in after] == [False, True]


@pytest.mark.parametrize(
    ("refusal", "pause"), [(Unavailable(retry_after_seconds=2), 2), (Busy(retry_after_seconds=30), 30)]
)
async def test_after_a_refusal_nothing_is_fetched_ahead_for_a_while(
    source: Source, time: Time, refusal: Refusal, pause: float
) -> None:
    store = opened(source)
    source.refusal = refusal
    for _ in range(20):
        await refused(store, refusal)
    asked = source.ahead
    time.passes(pause - 0.5)
    await refused(store, refusal)
    still = source.ahead
    time.passes(1)
    await refused(store, refusal)

    assert (asked, still) == (2, 2)
    assert source.ahead > 2


@pytest.mark.parametrize("unknown", ["expires_at", "conversation_id"])
async def test_what_may_not_be_single_use_is_not_held(source: Source, unknown: str) -> None:
    store = opened(source)
    source.changes = {unknown: None}

    credentials = [await taken(store) for _ in range(3)]

    assert not any(credential.is_warm for credential in credentials)
    assert store.held == {"default": 0}


async def test_conversation_tokens_are_asked_for_one_by_one(source: Source) -> None:
    store = opened(source)

    for _ in range(3):
        await store.fetch_credential(AGENT, Transport.WEBRTC)
        await settled()

    assert (source.users, source.ahead) == (3, 0)


async def test_a_user_who_hangs_up_takes_nothing_from_the_others(source: Source) -> None:
    store = opened(source)
    source.gate.clear()
    hanging = [asyncio.create_task(store.fetch_credential(AGENT, Transport.WEBSOCKET)) for _ in range(5)]
    await settled()
    for task in hanging:
        task.cancel()
    source.gate.set()
    await settled()

    credentials = [await taken(store) for _ in range(8)]

    assert len({credential.secret for credential in credentials}) == 8
    assert all(credential.is_warm for credential in credentials)
