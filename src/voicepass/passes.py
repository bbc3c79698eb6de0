"""The use case: who asks, may they, get a credential, write it down, hand it over. No HTTP, vendor or database here."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Protocol

from voicepass.errors import InternalError, LedgerUnavailable, LimitReached, Refusal, UserBlocked
from voicepass.model import (
    Agent,
    Attempt,
    Credential,
    Credentials,
    Limit,
    PassRequest,
    Reservation,
    Transport,
    User,
    VoicePass,
    new_id,
)
from voicepass.policy import Policy


class Authenticator(Protocol):
    """Raises a refusal for anyone who is not a signed-in user."""

    async def authenticate(self, credentials: Credentials, /) -> User: ...


class VoiceProvider(Protocol):
    """Raises an ElevenLabsRefusal when it has no credential to give."""

    async def credential(self, agent: Agent, transport: Transport, /) -> Credential: ...


class Ledger(Protocol):
    """Every method raises LedgerUnavailable where it was not done; what `grant` has done survives a power cut."""

    async def reserve(self, reservation: Reservation, limits: Sequence[Limit], /) -> None:
        """Count one more pass, or raise UserBlocked or LimitReached; then nothing is counted."""

    async def grant(self, reservation: Reservation, credential: Credential, /) -> None:
        """Bind the conversation to its user, or raise BadAnswer where it is someone else's."""

    async def release(self, reservation: Reservation, /) -> None: ...


Observer = Callable[[Attempt], None]
"""Is shown every attempt once, when it is over. Must be quick; what it raises changes nothing."""


class Passes:
    """Issues passes: the product, in its order."""

    def __init__(
        self,
        *,
        authenticator: Authenticator,
        policy: Policy,
        provider: VoiceProvider,
        ledger: Ledger,
        observers: Sequence[Observer],
    ) -> None:
        self._authenticator = authenticator
        self._policy = policy
        self._provider = provider
        self._ledger = ledger
        self._observers = observers
        self._releases: set[asyncio.Future[None]] = set()

    async def issue(self, request: PassRequest) -> VoicePass:
        """Return a pass for one conversation, or raise the Refusal that says why not."""
        with self._attempt(request) as attempt:
            with attempt.step("verify"):
                attempt.user = user = await self._authenticator.authenticate(request.credentials)
                attempt.agent = agent = self._policy.agent_for(user, request.alias)
            async with self._reserved(attempt, user, agent) as reservation:
                with attempt.step("upstream") as step:
                    credential = await self._provider.credential(agent, request.transport)
                    step.name = "warm" if credential.is_warm else "upstream"
                attempt.conversation_id, attempt.is_warm = credential.conversation_id, credential.is_warm
                attempt.credential_sha256 = credential.sha256
                with attempt.step("grant"):
                    await self._ledger.grant(reservation, credential)  # no row, no pass
            return VoicePass(
                transport=request.transport,
                credential=credential,
                agent=agent,
                user_id=user.id,
                dynamic_variables=self._policy.variables_for(user, agent),
            )

    async def aclose(self) -> None:
        """Wait until what came to nothing has been given back."""
        await asyncio.gather(*self._releases, return_exceptions=True)

    @asynccontextmanager
    async def _reserved(self, attempt: Attempt, user: User, agent: Agent) -> AsyncIterator[Reservation]:
        """Count one more pass within the limits, and give it back where the block comes to nothing."""
        reservation = Reservation(
            pass_id=new_id(),
            request_id=attempt.request_id,
            token_issuer=user.issuer,
            user_id=user.id,
            agent_alias=agent.alias,
            agent_id=agent.agent_id,
            transport=attempt.transport,
            seconds=self._policy.conversation_seconds,
        )
        try:
            with attempt.step("reserve"):
                await self._ledger.reserve(reservation, self._policy.limits)
            yield reservation
        except (LimitReached, UserBlocked):
            raise  # nothing was counted
        except BaseException:
            release = asyncio.ensure_future(self._ledger.release(reservation))
            self._releases.add(release)
            release.add_done_callback(self._released)
            with suppress(LedgerUnavailable), attempt.step("release"):  # then it lapses by itself, after 15 minutes
                await asyncio.shield(release)  # even while the caller hangs up
            raise

    def _released(self, release: asyncio.Future[None]) -> None:
        self._releases.discard(release)
        if not release.cancelled():
            release.exception()  # retrieved, or asyncio would report it as lost when the caller is gone

    @contextmanager
    def _attempt(self, request: PassRequest) -> Iterator[Attempt]:
        """Open an attempt and close it exactly once, whatever happens; the observers see it then."""
        attempt = Attempt(
            request_id=request.request_id,
            transport=request.transport,
            alias=request.alias,
            client=request.client,
            traceparent=request.traceparent,
        )
        try:
            yield attempt
            attempt.outcome = "granted"
        except Refusal as refusal:
            attempt.outcome, attempt.operator_note = refusal.code, refusal.operator_note
            attempt.is_operators_fault = refusal.is_operators_fault
            attempt.cause = refusal.__cause__
            raise
        except asyncio.CancelledError:
            attempt.outcome = "cancelled"
            raise
        except Exception as error:
            attempt.outcome, attempt.is_operators_fault, attempt.cause = InternalError.code, True, error
            raise
        finally:
            attempt.duration_seconds = time.monotonic() - attempt.began
            for observe in self._observers:
                with suppress(Exception):  # a granted pass is granted; `observe.Isolated` logs the mistake
                    observe(attempt)
