"""The use case with fake ports: its order, what it releases, and that it observes every attempt exactly once."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import pytest

from tests.tables import table
from voicepass.errors import (
    AgentNotAllowed,
    AgentUnknown,
    BadAnswer,
    Busy,
    KeyRejected,
    LedgerUnavailable,
    LimitReached,
    Overloaded,
    QuotaExceeded,
    RateLimited,
    Refusal,
    Timeout,
    TokenInvalid,
    TooManyConversations,
    Unavailable,
    UserBlocked,
)
from voicepass.model import (
    Agent,
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
from voicepass.telemetry.attempt import Attempt, StepName
from voicepass.telemetry.lines import notify

pytestmark = pytest.mark.anyio

AGENT = Agent(alias="default", agent_id="agent_1", base_url="https://x")
CREDENTIALS = Credentials(authorization=("Bearer t",))
CREDENTIAL = Credential(secret="wss://x/?s=1", conversation_id="conv_1", expires_at=900.0)
SEALED = b"sealed"
LIMITS = (Limit(name="n", scope=Scope.USER, counted=Counted.PASSES, most=1, window_seconds=60),)


class Ports:
    """Fakes of all ports in one class. It lists each call in `calls`; `failing` names the calls that raise."""

    def __init__(
        self,
        failing: Mapping[str, BaseException | list[BaseException]] | None = None,
        *,
        lookup_changes: bool = True,
        unopened: Credential | None = None,
        ready: Credential | None = None,
    ) -> None:
        self._ready = ready
        self._lookup_changes = lookup_changes
        self._unopened = unopened
        self.calls: list[str] = []
        self.reservations: list[Reservation] = []
        self.attempts: list[Attempt] = []
        self._failing = failing or {}

    async def authenticate(self, credentials: Credentials) -> User:
        self._note("authenticate")
        assert credentials == CREDENTIALS
        return User(issuer="i", id="u-1", name="Ada", claims={})

    @contextlib.contextmanager
    def take_ready(self, agent: Agent, transport: Transport) -> Iterator[Credential | None]:
        assert (agent, transport) == (AGENT, Transport.WEBSOCKET)
        try:
            yield self._ready
        except (LimitReached, UserBlocked):
            if self._ready is not None:
                self.calls.append("give back")
            raise

    async def reserve(
        self,
        reservation: Reservation,
        limits: Sequence[Limit],
        *,
        ready: Credential | None,
    ) -> None:
        assert (limits, ready) == (LIMITS, self._ready and dataclasses.replace(self._ready, sealed=SEALED))
        if reservation not in self.reservations:
            self.reservations.append(reservation)
        self._note("reserve")

    async def fetch_credential(self, agent: Agent, transport: Transport) -> Credential:
        self._note("credential")
        assert (agent, transport) == (AGENT, Transport.WEBSOCKET)
        return CREDENTIAL

    async def grant(self, reservation: Reservation, credential: Credential) -> None:
        self._note("grant")
        assert (reservation, credential) == (self.reservations[-1], dataclasses.replace(CREDENTIAL, sealed=SEALED))

    async def release(self, reservation: Reservation, *, has_reached: bool) -> None:
        self.has_reached = has_reached
        self._note("release")
        assert reservation == self.reservations[-1]

    async def read_seconds_left(
        self, limits: Sequence[Limit], *, conversation_id: str | None, pass_id: str
    ) -> int | None:
        self._note("read_seconds_left")
        assert (limits, conversation_id, pass_id) == (LIMITS, "conv_1", self.reservations[-1].pass_id)
        return None

    async def refresh(self, reservation: Reservation, limit: Limit) -> bool:
        self._note("refresh")
        assert (reservation, limit) == (self.reservations[-1], LIMITS[0])
        return self._lookup_changes

    async def reissue(self, reservation: Reservation, agent: Agent, refusal: LimitReached) -> Credential:
        self._note("reissue")
        assert (reservation, agent) == (self.reservations[-1], AGENT)
        if self._unopened is None:
            raise refusal
        return self._unopened

    def seal(self, agent: Agent, pass_id: str, credential: Credential) -> bytes:
        if self.reservations:
            assert pass_id == self.reservations[-1].pass_id
        assert (agent, credential) == (AGENT, self._ready or CREDENTIAL)
        return SEALED

    def _note(self, call: str) -> None:
        self.calls.append(call)
        failure = self._failing.get(call)
        if isinstance(failure, list):
            failure = failure.pop(0) if failure else None
        if failure is not None:
            raise failure


def make_passes(ports: Ports, *observers: Observer) -> Passes:
    return Passes(
        authenticator=ports,
        policy=Policy({"default": AgentRules(agent=AGENT, allow=(Rule({}),))}, LIMITS, 600),
        provider=ports,
        take_ready=ports.take_ready,
        ledger=ports,
        open_passes=ports,
        seal=ports.seal,
        observe=partial(notify, [*observers, ports.attempts.append]),
    )


def make_request(alias: str = "default") -> PassRequest:
    return PassRequest(request_id="r-1", credentials=CREDENTIALS, alias=alias, transport=Transport.WEBSOCKET)


async def test_a_pass_is_reserved_before_elevenlabs_is_asked_and_granted_before_it_is_returned() -> None:
    ports = Ports()

    voice_pass = await make_passes(ports).issue(make_request())

    assert ports.calls == ["authenticate", "reserve", "credential", "grant"]
    assert voice_pass.credential is CREDENTIAL
    assert voice_pass.dynamic_variables == {"user_id": "u-1", "user_name": "Ada"}
    (reservation,) = ports.reservations
    assert (reservation.user_id, reservation.agent_alias, reservation.seconds) == ("u-1", "default", 600)


@table(
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
async def test_a_refusal_stops_the_later_steps_and_releases_the_reservation(
    failing: str, error: Refusal, reached: list[str]
) -> None:
    ports = Ports({failing: error})

    with pytest.raises(type(error)):
        await make_passes(ports).issue(make_request())

    assert ports.calls == reached
    assert [(attempt.outcome, attempt.operator_note) for attempt in ports.attempts] == [(error.code, "why")]


async def test_a_granted_pass_is_returned_even_if_the_seconds_left_cannot_be_read() -> None:
    ports = Ports({"read_seconds_left": LedgerUnavailable()})

    voice_pass = await dataclasses.replace(make_passes(ports), tells_seconds_left=True).issue(make_request())

    assert ports.calls == ["authenticate", "reserve", "credential", "grant", "read_seconds_left"]
    assert voice_pass.dynamic_variables["seconds_left"] == 600


async def test_a_failed_release_does_not_hide_the_first_error() -> None:
    ports = Ports({"credential": Unavailable(), "release": LedgerUnavailable()})

    with pytest.raises(Unavailable):
        await make_passes(ports).issue(make_request())

    assert ports.calls[-1] == "release"
    assert [(step.name, step.has_failed) for step in ports.attempts[0].steps[-2:]] == [
        (StepName.UPSTREAM, True),
        (StepName.RELEASE, True),
    ]


class SlowRelease(Ports):
    """Its release waits for `may_end`."""

    def __init__(self) -> None:
        super().__init__({"credential": Unavailable()})
        self.has_begun, self.may_end = asyncio.Event(), asyncio.Event()

    async def release(self, reservation: Reservation, *, has_reached: bool) -> None:
        self.has_begun.set()
        await self.may_end.wait()
        await super().release(reservation, has_reached=has_reached)


async def test_a_caller_who_hangs_up_during_the_release_does_not_stop_it() -> None:
    ports = SlowRelease()
    use_case = make_passes(ports)
    issuing = asyncio.create_task(use_case.issue(make_request()))
    await ports.has_begun.wait()

    issuing.cancel()
    outcomes = await asyncio.gather(issuing, return_exceptions=True)
    ports.may_end.set()
    await use_case.aclose()

    assert isinstance(outcomes[0], asyncio.CancelledError)
    assert ports.calls[-1] == "release"


async def test_an_alias_that_is_not_allowed_reserves_nothing() -> None:
    ports = Ports()

    with pytest.raises(AgentNotAllowed):
        await make_passes(ports).issue(make_request("other"))

    assert ports.calls == ["authenticate"]
    assert [attempt.outcome for attempt in ports.attempts] == ["agent_not_allowed"]


@pytest.mark.parametrize(
    ("error", "outcome"), [(RuntimeError("a bug"), "internal_error"), (asyncio.CancelledError(), "cancelled")]
)
async def test_an_attempt_that_fails_in_any_way_is_observed_and_released(error: BaseException, outcome: str) -> None:
    ports = Ports({"credential": error})

    with pytest.raises(type(error)):
        await make_passes(ports).issue(make_request())

    assert ports.calls[-1] == "release"
    (attempt,) = ports.attempts
    assert attempt.outcome == outcome
    assert (attempt.is_operators_fault, attempt.cause) == (
        (True, error) if outcome == "internal_error" else (False, None)
    )
    assert attempt.user is not None


def make_limit_reached(kind: type[LimitReached]) -> LimitReached:
    return kind(operator_note="the limit n is reached", limit_name="n")


@pytest.mark.parametrize("kind", [TooManyConversations, QuotaExceeded])
async def test_at_a_limit_conversations_are_looked_up_and_the_ledger_decides_again(
    kind: type[LimitReached],
) -> None:
    ports = Ports({"reserve": [make_limit_reached(kind)]})

    voice_pass = await make_passes(ports).issue(make_request())

    assert ports.calls == ["authenticate", "reserve", "refresh", "reserve", "credential", "grant"]
    assert voice_pass.credential is CREDENTIAL
    assert [(attempt.outcome, attempt.is_reissued) for attempt in ports.attempts] == [("granted", False)]
    (attempt,) = ports.attempts
    assert [step.name for step in attempt.steps] == ["verify", "reserve", "lookup", "reserve", "upstream", "grant"]


@pytest.mark.parametrize("kind", [TooManyConversations, QuotaExceeded])
async def test_a_user_at_the_limit_gets_the_unopened_pass_again(kind: type[LimitReached]) -> None:
    unopened = Credential(secret="wss://x/?s=0", conversation_id="conv_0", expires_at=800.0)
    ports = Ports({"reserve": [make_limit_reached(kind), make_limit_reached(kind)]}, unopened=unopened)

    voice_pass = await make_passes(ports).issue(make_request())

    assert ports.calls == ["authenticate", "reserve", "refresh", "reserve", "reissue"]
    assert voice_pass.credential is unopened
    assert [(attempt.outcome, attempt.is_reissued, attempt.conversation_id) for attempt in ports.attempts] == [
        ("granted", True, "conv_0")
    ]
    assert ports.attempts[0].credential_sha256 == unopened.sha256


async def test_the_ledger_decides_only_once_if_a_lookup_changed_nothing() -> None:
    ports = Ports({"reserve": make_limit_reached(TooManyConversations)}, lookup_changes=False)

    with pytest.raises(TooManyConversations):
        await make_passes(ports).issue(make_request())

    assert ports.calls == ["authenticate", "reserve", "refresh", "reissue"]
    assert [attempt.outcome for attempt in ports.attempts] == ["too_many_conversations"]


async def test_a_ledger_that_fails_during_the_lookup_refuses_the_pass() -> None:
    ports = Ports({"reserve": make_limit_reached(TooManyConversations), "refresh": LedgerUnavailable()})

    with pytest.raises(LedgerUnavailable):
        await make_passes(ports).issue(make_request())

    assert ports.calls == ["authenticate", "reserve", "refresh", "release"]


def make_unavailable_before_the_call() -> Unavailable:
    return Unavailable(operator_note="not asked", has_reached_elevenlabs=False)


@table(
    ("failing", "error", "has_reached"),
    [
        ("reserve", LedgerUnavailable(), False),
        ("credential", KeyRejected(), True),
        ("credential", AgentUnknown(), True),
        ("credential", Busy(), True),
        ("credential", Timeout(), True),
        ("credential", asyncio.CancelledError(), True),
        ("credential", RuntimeError("a bug"), True),
        ("credential", Overloaded(), False),
        ("credential", make_unavailable_before_the_call(), False),
        ("grant", LedgerUnavailable(), True),
    ],
)
async def test_a_request_that_reached_elevenlabs_counts_although_it_failed(
    failing: str, error: BaseException, *, has_reached: bool
) -> None:
    ports = Ports({failing: error})

    with pytest.raises(type(error)):
        await make_passes(ports).issue(make_request())

    assert ports.has_reached is has_reached


def fail_with(error: BaseException) -> Observer:
    def observe(_attempt: Attempt) -> None:
        raise error

    return observe


@pytest.mark.parametrize("error", [OSError("disk full"), BrokenPipeError(), RecursionError(), MemoryError()])
async def test_an_observer_that_raises_refuses_no_pass_and_later_observers_still_run(error: Exception) -> None:
    ports = Ports()

    voice_pass = await make_passes(ports, fail_with(error), fail_with(error)).issue(make_request())

    assert voice_pass.credential is CREDENTIAL
    assert [attempt.outcome for attempt in ports.attempts] == ["granted"]


async def test_an_observer_that_raises_does_not_change_why_an_attempt_was_refused() -> None:
    ports = Ports({"reserve": RateLimited()})

    with pytest.raises(RateLimited):
        await make_passes(ports, fail_with(OSError())).issue(make_request())

    assert [attempt.outcome for attempt in ports.attempts] == ["rate_limited"]


@pytest.mark.parametrize("error", [asyncio.CancelledError(), KeyboardInterrupt()])
async def test_an_observer_does_not_hold_up_a_cancellation_or_an_exit(error: BaseException) -> None:
    with pytest.raises(type(error)):
        await make_passes(Ports(), fail_with(error)).issue(make_request())


READY = Credential(secret="wss://x/?s=2", conversation_id="conv_2", expires_at=900.0, is_warm=True)


async def test_a_credential_that_is_ready_is_reserved_and_granted_in_one_step() -> None:
    ports = Ports(ready=READY)

    voice_pass = await make_passes(ports).issue(make_request())

    assert ports.calls == ["authenticate", "reserve"]
    assert voice_pass.credential is READY
    (attempt,) = ports.attempts
    assert [step.name for step in attempt.steps] == ["verify", "warm"]
    assert (attempt.outcome, attempt.is_warm, attempt.credential_sha256) == ("granted", True, READY.sha256)


@pytest.mark.parametrize(
    ("error", "after"),
    [
        (RateLimited(), ["give back"]),
        (UserBlocked(), ["give back"]),
        (make_limit_reached(QuotaExceeded), ["refresh", "reserve", "give back", "reissue"]),
        # The ledger may have granted the credential, so no other user may get it.
        (LedgerUnavailable(), ["release"]),
        (BadAnswer(), ["release"]),
    ],
)
async def test_a_refused_user_does_not_get_the_ready_credential(error: Refusal, after: list[str]) -> None:
    ports = Ports({"reserve": error}, ready=READY)

    with pytest.raises(type(error)):
        await make_passes(ports).issue(make_request())

    assert ports.calls == ["authenticate", "reserve", *after]
    assert ports.attempts[0].credential_sha256 is None
    assert not ports.attempts[0].has_asked
