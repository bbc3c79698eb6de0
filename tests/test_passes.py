"""The use case with hand-made ports: its order, and that every attempt is closed exactly once."""

import asyncio

import pytest

from voicepass.errors import AgentNotAllowed, LedgerUnavailable, Refusal, TokenInvalid, Unavailable
from voicepass.model import Agent, Attempt, Credential, Credentials, Grant, PassRequest, Transport, User
from voicepass.passes import Passes
from voicepass.policy import AgentRules, Policy, Rule

pytestmark = pytest.mark.anyio

AGENT = Agent(alias="default", agent_id="agent_1", base_url="https://x")
CREDENTIALS = Credentials(authorization=("Bearer t",))
CREDENTIAL = Credential(secret="wss://x/?s=1", conversation_id="conv_1", expires_at=900.0)


class Ports:
    """All three ports at once; each call is noted, and `failing` names the one that raises `error`."""

    def __init__(self, failing: str = "", error: BaseException | None = None) -> None:
        self.calls: list[str] = []
        self.grants: list[Grant] = []
        self.attempts: list[Attempt] = []
        self._failing = failing
        self._error = error or RuntimeError("unset")

    async def authenticate(self, credentials: Credentials) -> User:
        self._note("authenticate")
        assert credentials == CREDENTIALS
        return User(issuer="i", id="u-1", name="Ada", claims={})

    async def credential(self, agent: Agent, transport: Transport) -> Credential:
        self._note("credential")
        assert (agent, transport) == (AGENT, Transport.WEBSOCKET)
        return CREDENTIAL

    async def record(self, grant: Grant) -> None:
        self._note("record")
        self.grants.append(grant)

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call == self._failing:
            raise self._error


def passes(ports: Ports) -> Passes:
    return Passes(
        authenticator=ports,
        policy=Policy({"default": AgentRules(agent=AGENT, allow=(Rule({}),))}),
        provider=ports,
        ledger=ports,
        observers=[ports.attempts.append],
        clock=lambda: 0.0,
    )


def asked(alias: str = "default") -> PassRequest:
    return PassRequest(request_id="r-1", credentials=CREDENTIALS, alias=alias, transport=Transport.WEBSOCKET)


async def test_the_pass_leaves_only_after_its_row_is_written() -> None:
    ports = Ports()

    voice_pass = await passes(ports).issue(asked())

    assert ports.calls == ["authenticate", "credential", "record"]
    assert voice_pass.credential is CREDENTIAL
    assert voice_pass.dynamic_variables == {"user_id": "u-1", "user_name": "Ada"}
    (grant,) = ports.grants
    assert (grant.user_id, grant.conversation_id, grant.credential_sha256) == ("u-1", "conv_1", CREDENTIAL.sha256)


@pytest.mark.parametrize(
    ("failing", "error", "reached"),
    [
        ("authenticate", TokenInvalid(operator_note="why"), ["authenticate"]),
        ("credential", Unavailable(operator_note="why"), ["authenticate", "credential"]),
        ("record", LedgerUnavailable(operator_note="why"), ["authenticate", "credential", "record"]),
    ],
)
async def test_a_refusal_stops_everything_behind_it_and_is_observed_once(
    failing: str, error: Refusal, reached: list[str]
) -> None:
    ports = Ports(failing, error)

    with pytest.raises(type(error)):
        await passes(ports).issue(asked())

    assert ports.calls == reached
    assert [(attempt.outcome, attempt.operator_note) for attempt in ports.attempts] == [(error.code, "why")]


async def test_an_alias_that_is_not_allowed_costs_nothing_upstream() -> None:
    ports = Ports()

    with pytest.raises(AgentNotAllowed):
        await passes(ports).issue(asked("other"))

    assert ports.calls == ["authenticate"]
    assert [attempt.outcome for attempt in ports.attempts] == ["agent_not_allowed"]


@pytest.mark.parametrize(
    ("error", "outcome"), [(RuntimeError("a bug"), "internal_error"), (asyncio.CancelledError(), "cancelled")]
)
async def test_an_attempt_is_observed_whatever_happens(error: BaseException, outcome: str) -> None:
    ports = Ports("credential", error)

    with pytest.raises(type(error)):
        await passes(ports).issue(asked())

    assert [attempt.outcome for attempt in ports.attempts] == [outcome]
    assert ports.attempts[0].user is not None
