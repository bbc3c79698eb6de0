"""The use case with hand-made ports: its order, what is given back, and that every attempt is closed exactly once."""

import asyncio
from collections.abc import Sequence

import pytest

from voicepass.errors import (
    AgentNotAllowed,
    BadAnswer,
    LedgerUnavailable,
    RateLimited,
    Refusal,
    TokenInvalid,
    Unavailable,
    UserBlocked,
)
from voicepass.model import (
    Agent,
    Attempt,
    Counted,
    Credential,
    Credentials,
    Limit,
    PassRequest,
    Reservation,
    Scope,
    Transport,
    User,
)
from voicepass.passes import Observer, Passes
from voicepass.policy import AgentRules, Policy, Rule

pytestmark = pytest.mark.anyio

AGENT = Agent(alias="default", agent_id="agent_1", base_url="https://x")
CREDENTIALS = Credentials(authorization=("Bearer t",))
CREDENTIAL = Credential(secret="wss://x/?s=1", conversation_id="conv_1", expires_at=900.0)
LIMITS = (Limit(name="n", scope=Scope.USER, counted=Counted.PASSES, most=1, window_seconds=60),)


class Ports:
    """All three ports at once; each call is noted, and `failing` names those that raise."""

    def __init__(self, failing: dict[str, BaseException] | None = None) -> None:
        self.calls: list[str] = []
        self.reservations: list[Reservation] = []
        self.attempts: list[Attempt] = []
        self._failing = failing or {}

    async def authenticate(self, credentials: Credentials) -> User:
        self._note("authenticate")
        assert credentials == CREDENTIALS
        return User(issuer="i", id="u-1", name="Ada", claims={})

    async def reserve(self, reservation: Reservation, limits: Sequence[Limit]) -> None:
        assert limits == LIMITS
        self.reservations.append(reservation)
        self._note("reserve")

    async def credential(self, agent: Agent, transport: Transport) -> Credential:
        self._note("credential")
        assert (agent, transport) == (AGENT, Transport.WEBSOCKET)
        return CREDENTIAL

    async def grant(self, reservation: Reservation, credential: Credential) -> None:
        self._note("grant")
        assert (reservation, credential) == (self.reservations[-1], CREDENTIAL)

    async def release(self, reservation: Reservation) -> None:
        self._note("release")
        assert reservation == self.reservations[-1]

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call in self._failing:
            raise self._failing[call]


def passes(ports: Ports, *observers: Observer) -> Passes:
    return Passes(
        authenticator=ports,
        policy=Policy({"default": AgentRules(agent=AGENT, allow=(Rule({}),))}, LIMITS, 600),
        provider=ports,
        ledger=ports,
        observers=[*observers, ports.attempts.append],
    )


def asked(alias: str = "default") -> PassRequest:
    return PassRequest(request_id="r-1", credentials=CREDENTIALS, alias=alias, transport=Transport.WEBSOCKET)


async def test_a_pass_is_counted_before_it_is_asked_for_and_written_before_it_leaves() -> None:
    ports = Ports()

    voice_pass = await passes(ports).issue(asked())

    assert ports.calls == ["authenticate", "reserve", "credential", "grant"]
    assert voice_pass.credential is CREDENTIAL
    assert voice_pass.dynamic_variables == {"user_id": "u-1", "user_name": "Ada"}
    (reservation,) = ports.reservations
    assert (reservation.user_id, reservation.agent_alias, reservation.seconds) == ("u-1", "default", 600)


@pytest.mark.parametrize(
    ("failing", "error", "reached"),
    [
        ("authenticate", TokenInvalid(operator_note="why"), ["authenticate"]),
        ("reserve", RateLimited(operator_note="why"), ["authenticate", "reserve"]),
        ("reserve", UserBlocked(operator_note="why"), ["authenticate", "reserve"]),
        ("reserve", LedgerUnavailable(operator_note="why"), ["authenticate", "reserve", "release"]),
        ("credential", Unavailable(operator_note="why"), ["authenticate", "reserve", "credential", "release"]),
        (
            "grant",
            LedgerUnavailable(operator_note="why"),
            ["authenticate", "reserve", "credential", "grant", "release"],
        ),
        ("grant", BadAnswer(operator_note="why"), ["authenticate", "reserve", "credential", "grant", "release"]),
    ],
)
async def test_a_refusal_stops_everything_behind_it_and_gives_back_what_was_counted(
    failing: str, error: Refusal, reached: list[str]
) -> None:
    ports = Ports({failing: error})

    with pytest.raises(type(error)):
        await passes(ports).issue(asked())

    assert ports.calls == reached
    assert [(attempt.outcome, attempt.operator_note) for attempt in ports.attempts] == [(error.code, "why")]


async def test_what_cannot_be_given_back_does_not_hide_why_it_came_to_nothing() -> None:
    ports = Ports({"credential": Unavailable(), "release": LedgerUnavailable()})

    with pytest.raises(Unavailable):
        await passes(ports).issue(asked())

    assert ports.calls[-1] == "release"


async def test_an_alias_that_is_not_allowed_costs_nothing() -> None:
    ports = Ports()

    with pytest.raises(AgentNotAllowed):
        await passes(ports).issue(asked("other"))

    assert ports.calls == ["authenticate"]
    assert [attempt.outcome for attempt in ports.attempts] == ["agent_not_allowed"]


@pytest.mark.parametrize(
    ("error", "outcome"), [(RuntimeError("a bug"), "internal_error"), (asyncio.CancelledError(), "cancelled")]
)
async def test_an_attempt_is_observed_and_given_back_whatever_happens(error: BaseException, outcome: str) -> None:
    ports = Ports({"credential": error})

    with pytest.raises(type(error)):
        await passes(ports).issue(asked())

    assert ports.calls[-1] == "release"
    assert [attempt.outcome for attempt in ports.attempts] == [outcome]
    assert ports.attempts[0].user is not None


def broken(error: BaseException) -> Observer:
    def observe(_attempt: Attempt) -> None:
        raise error

    return observe


@pytest.mark.parametrize("error", [OSError("disk full"), BrokenPipeError(), RecursionError(), MemoryError()])
async def test_an_observer_that_raises_costs_nobody_a_pass_and_hides_nothing_from_the_next(error: Exception) -> None:
    ports = Ports()

    voice_pass = await passes(ports, broken(error), broken(error)).issue(asked())

    assert voice_pass.credential is CREDENTIAL
    assert [attempt.outcome for attempt in ports.attempts] == ["granted"]


async def test_an_observer_that_raises_does_not_change_why_an_attempt_was_refused() -> None:
    ports = Ports({"reserve": RateLimited()})

    with pytest.raises(RateLimited):
        await passes(ports, broken(OSError())).issue(asked())

    assert [attempt.outcome for attempt in ports.attempts] == ["rate_limited"]


@pytest.mark.parametrize("error", [asyncio.CancelledError(), KeyboardInterrupt()])
async def test_what_ends_a_task_or_the_process_is_not_held_up_by_an_observer(error: BaseException) -> None:
    with pytest.raises(type(error)):
        await passes(Ports(), broken(error)).issue(asked())
