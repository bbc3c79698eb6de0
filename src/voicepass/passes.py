"""The use case: who asks, may they, get a credential, write it down, hand it over. No HTTP, vendor or database here."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Protocol

from voicepass.errors import (
    InternalError,
    LedgerUnavailable,
    LimitReached,
    QuotaExceeded,
    Refusal,
    TooManyConversations,
    UserBlocked,
)
from voicepass.model import (
    Agent,
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
from voicepass.telemetry.attempt import Attempt, StepName


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

    async def grant(self, reservation: Reservation, credential: Credential, /, *, sealed: bytes | None) -> None:
        """Bind the conversation to its user, or raise BadAnswer where it is someone else's."""

    async def release(self, reservation: Reservation, /, *, has_reached: bool) -> None:
        """Count the pass no more; where its request has reached ElevenLabs, that still counts for a minute."""


class OpenPasses(Protocol):
    """What a user really has open, by ElevenLabs' word. Every method raises LedgerUnavailable."""

    async def look_up(self, reservation: Reservation, limit: Limit, /) -> bool:
        """Ask about what `limit` counts; return whether the ledger may decide otherwise now."""

    async def reissue(self, reservation: Reservation, agent: Agent, refusal: LimitReached, /) -> Credential:
        """Return the credential of a pass that the user holds and nobody opened, or raise `refusal`."""


Seal = Callable[[Agent, str, Credential], bytes | None]
"""Makes a credential unreadable for all but the holder of the API key, bound to the id of its pass."""


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
        open_passes: OpenPasses,
        seal: Seal,
        observers: Sequence[Observer],
    ) -> None:
        self._authenticator = authenticator
        self._policy = policy
        self._provider = provider
        self._ledger = ledger
        self._open_passes = open_passes
        self._seal = seal
        self._observers = observers
        self._releases: set[asyncio.Future[None]] = set()

    async def issue(self, request: PassRequest) -> VoicePass:
        """Return a pass for one conversation, or raise the Refusal that says why not."""
        with self._attempt(request) as attempt:
            with attempt.step(StepName.VERIFY):
                attempt.user = user = await self._authenticator.authenticate(request.credentials)
                attempt.agent = agent = self._policy.agent_for(user, request.alias)
            reservation = self._reservation_for(attempt, user, agent)
            try:
                async with self._reserved(attempt, reservation):
                    with attempt.step(StepName.UPSTREAM) as step:
                        attempt.has_asked = True
                        credential = await self._provider.credential(agent, request.transport)
                        step.name = StepName.WARM if credential.is_warm else StepName.UPSTREAM
                    attempt.note_credential(credential)
                    attempt.has_asked = not credential.is_warm
                    with attempt.step(StepName.GRANT):
                        sealed = self._seal(agent, reservation.pass_id, credential)
                        await self._ledger.grant(reservation, credential, sealed=sealed)  # no row, no pass
            except (TooManyConversations, QuotaExceeded) as refusal:
                with attempt.step(StepName.LOOKUP):
                    credential = await self._open_passes.reissue(reservation, agent, refusal)
                attempt.note_credential(credential)
                attempt.is_reissued = True
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

    def _reservation_for(self, attempt: Attempt, user: User, agent: Agent) -> Reservation:
        return Reservation(
            pass_id=new_id(),
            request_id=attempt.request_id,
            token_issuer=user.issuer,
            user_id=user.id,
            agent_alias=agent.alias,
            agent_id=agent.agent_id,
            transport=attempt.transport,
            seconds=self._policy.conversation_seconds,
        )

    async def _reserve(self, attempt: Attempt, reservation: Reservation) -> None:
        """Count one more pass. Before a user is refused, look up what is really open and decide once more."""
        try:
            with attempt.step(StepName.RESERVE):
                await self._ledger.reserve(reservation, self._policy.limits)
        except (TooManyConversations, QuotaExceeded) as refusal:
            (limit,) = [limit for limit in self._policy.limits if limit.name == refusal.limit_name]
            with attempt.step(StepName.LOOKUP):
                has_changed = await self._open_passes.look_up(reservation, limit)
            if not has_changed:
                raise
            with attempt.step(StepName.RESERVE):
                await self._ledger.reserve(reservation, self._policy.limits)

    @asynccontextmanager
    async def _reserved(self, attempt: Attempt, reservation: Reservation) -> AsyncIterator[None]:
        """Count one more pass within the limits, and give it back where the block comes to nothing."""
        try:
            await self._reserve(attempt, reservation)
            yield
        except (LimitReached, UserBlocked):
            raise  # nothing was counted
        except BaseException as error:
            has_reached = attempt.has_asked and getattr(error, "has_reached_elevenlabs", True)
            release = asyncio.ensure_future(self._ledger.release(reservation, has_reached=has_reached))
            self._releases.add(release)
            release.add_done_callback(self._released)
            with (
                suppress(LedgerUnavailable),
                attempt.step(StepName.RELEASE),
            ):  # else it lapses after 15 minutes
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
            client_request_id=request.client_request_id,
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
                with suppress(Exception):  # a granted pass is granted; `lines.isolate` logs the mistake
                    observe(attempt)
