"""The use case, and the page to read first: `Passes.issue` and `_issue` show how a request becomes a pass.

The four ports below hide the token, the vendor and the database. `settlement` settles the conversation afterwards.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from voicepass.errors import LedgerUnavailable, LimitReached, QuotaExceeded, Refusal, TooManyConversations, UserBlocked
from voicepass.model import Agent, Credential, Credentials, Limit, PassRequest, Reservation, Transport, User, VoicePass
from voicepass.policy import LimitPlan, Policy
from voicepass.telemetry.attempt import Attempt, StepName


class Authenticator(Protocol):
    """Raises TokenMissing, TokenInvalid, TokenExpired or KeysUnavailable for anyone but a signed-in user."""

    async def authenticate(self, credentials: Credentials, /) -> User: ...


class VoiceProvider(Protocol):
    """Raises an ElevenLabsRefusal or Overloaded if it has no credential."""

    async def fetch_credential(self, agent: Agent, transport: Transport, /) -> Credential: ...


class Ledger(Protocol):
    """Raises LedgerUnavailable if the ledger does not answer in time. A grant survives a power cut."""

    async def reserve(self, reservation: Reservation, limits: Sequence[Limit], /, *, ready: Credential | None) -> None:
        """Count one more pass, or raise UserBlocked or LimitReached and count nothing: one atomic step.

        If the credential is `ready`, the same step grants it, and keeps its `sealed` form.
        """

    async def grant(self, reservation: Reservation, credential: Credential, /) -> None:
        """Bind the conversation to its user and keep the `sealed` form, or raise BadAnswer if another user has it."""

    async def release(self, reservation: Reservation, /, *, has_reached: bool) -> None:
        """Stop counting a pass. If its request has reached ElevenLabs, it counts as a request for a minute."""

    async def read_seconds_left(
        self, limits: Sequence[Limit], /, *, conversation_id: str | None, pass_id: str
    ) -> int | None:
        """Return how long the user of a pass may still talk, or None if no limit counts the user's minutes."""


class OpenPasses(Protocol):
    """Finds out what a user really has open. Every method raises LedgerUnavailable."""

    async def refresh(self, reservation: Reservation, limit: Limit, /) -> bool:
        """Ask ElevenLabs about what `limit` counts. Returns whether the ledger may decide differently now."""

    async def reissue(self, reservation: Reservation, agent: Agent, refusal: LimitReached, /) -> Credential:
        """Return the credential of an unopened pass that the user holds, or raise `refusal`."""


Seal = Callable[[Agent, str, Credential], bytes | None]
"""Encrypts a credential for the holder of the API key, bound to the id of its pass."""

TakeReady = Callable[[Agent, Transport], AbstractContextManager[Credential | None]]
"""Takes a credential that was fetched ahead, if there is one. After LimitReached or UserBlocked, nobody has used it."""

Observer = Callable[[Attempt], None]
"""Gets every attempt once, when it is over. It must be quick. Its exceptions change nothing."""


@dataclass(kw_only=True, eq=False)
class Passes:
    """Issues passes."""

    authenticator: Authenticator
    policy: Policy
    provider: VoiceProvider
    take_ready: TakeReady
    ledger: Ledger
    open_passes: OpenPasses
    seal: Seal
    observe: Observer
    tells_seconds_left: bool = False
    _releases: set[asyncio.Future[None]] = field(default_factory=set, init=False)

    async def issue(self, request: PassRequest) -> VoicePass:
        """Return a pass for one conversation, or raise the Refusal that says why not.

        The observer gets the attempt exactly once, however it ends.
        """
        attempt = Attempt(request)
        try:
            voice_pass = await self._issue(request, attempt)
        except Refusal as refusal:
            attempt.outcome, attempt.operator_note = refusal.code, refusal.operator_note
            attempt.is_operators_fault, attempt.cause = refusal.is_operators_fault, refusal.__cause__
            raise
        except asyncio.CancelledError:
            attempt.outcome = "cancelled"
            raise
        except Exception as error:
            attempt.is_operators_fault, attempt.cause = True, error  # its outcome stays internal_error
            raise
        else:
            attempt.outcome = "granted"
            return voice_pass
        finally:
            attempt.seconds = time.monotonic() - attempt.began
            with suppress(Exception):  # the outcome stands
                self.observe(attempt)

    async def _issue(self, request: PassRequest, attempt: Attempt) -> VoicePass:
        with attempt.step(StepName.VERIFY):
            attempt.user = user = await self.authenticator.authenticate(request.credentials)
            attempt.agent = agent = self.policy.agent_for(user, request.alias)
            plan = self.policy.plan_for(user)
            attempt.plan = plan.name
        reservation = self._make_reservation(request, user, agent, plan.name)
        try:
            with self.take_ready(agent, request.transport) as ready:
                await self._reserve(attempt, reservation, agent, plan, ready=ready)
            if ready is not None:
                credential = ready
                attempt.note_credential(credential)
            else:
                with attempt.step(StepName.UPSTREAM):
                    attempt.has_asked = True
                    credential = await self.provider.fetch_credential(agent, request.transport)
                attempt.note_credential(credential)
                with attempt.step(StepName.GRANT):  # The credential leaves voicepass only after this commit.
                    sealed = self.seal(agent, reservation.pass_id, credential)
                    await self.ledger.grant(reservation, replace(credential, sealed=sealed))
        except (TooManyConversations, QuotaExceeded) as refusal:
            with attempt.step(StepName.LOOKUP):
                credential = await self.open_passes.reissue(reservation, agent, refusal)
            attempt.note_credential(credential)
            attempt.is_reissued = True
        except (LimitReached, UserBlocked):
            raise  # The ledger has counted nothing.
        except BaseException as error:
            await self._release(attempt, reservation, error)
            raise
        variables = self.policy.variables_for(user, agent)
        if self.tells_seconds_left:
            variables["seconds_left"] = await self._read_seconds_left(plan, reservation, credential)
        return VoicePass(
            transport=request.transport,
            credential=credential,
            agent=agent,
            user_id=user.id,
            dynamic_variables=variables,
        )

    def _make_reservation(self, request: PassRequest, user: User, agent: Agent, plan: str | None) -> Reservation:
        return Reservation(
            request_id=request.request_id,
            token_issuer=user.issuer,
            user_id=user.id,
            agent_alias=agent.alias,
            agent_id=agent.agent_id,
            transport=request.transport,
            seconds=self.policy.conversation_seconds,
            plan=plan,
        )

    async def _reserve(
        self, attempt: Attempt, reservation: Reservation, agent: Agent, plan: LimitPlan, *, ready: Credential | None
    ) -> None:
        """Reserve a pass. If a credential is ready, grant it in the same transaction.

        If a limit leaves no room, find out what the user really has open, and try once more.
        """
        step_name = StepName.RESERVE if ready is None else StepName.WARM
        ready = ready and replace(ready, sealed=self.seal(agent, reservation.pass_id, ready))
        reserve = partial(self.ledger.reserve, reservation, plan.limits, ready=ready)
        try:
            with attempt.step(step_name):
                await reserve()
        except (TooManyConversations, QuotaExceeded) as refusal:
            (limit,) = [limit for limit in plan.limits if limit.name == refusal.limit_name]
            with attempt.step(StepName.LOOKUP):
                has_changed = await self.open_passes.refresh(reservation, limit)
            if not has_changed:
                raise
            with attempt.step(step_name):
                await reserve()

    async def _read_seconds_left(self, plan: LimitPlan, reservation: Reservation, credential: Credential) -> int:
        """Return how long the user may still talk. A conversation ends at once if its agent misses a variable."""
        seconds_left = None
        with suppress(LedgerUnavailable):  # the pass is granted and counted
            seconds_left = await self.ledger.read_seconds_left(
                plan.limits, conversation_id=credential.conversation_id, pass_id=reservation.pass_id
            )
        return self.policy.conversation_seconds if seconds_left is None else seconds_left

    async def _release(self, attempt: Attempt, reservation: Reservation, error: BaseException) -> None:
        """Stop counting a pass that failed with `error`. The release goes on if the caller hangs up."""
        has_reached = attempt.has_asked and getattr(error, "has_reached_elevenlabs", True)
        release = asyncio.ensure_future(self.ledger.release(reservation, has_reached=has_reached))
        self._releases.add(release)
        release.add_done_callback(self._forget_release)
        # A reservation that cannot be released lapses after 15 minutes.
        with suppress(LedgerUnavailable), attempt.step(StepName.RELEASE):
            await asyncio.wait([release])  # not `shield`, see settlement/lookup
            release.result()

    async def aclose(self) -> None:
        """Wait for the releases in flight."""
        await asyncio.gather(*self._releases, return_exceptions=True)

    def _forget_release(self, release: asyncio.Future[None]) -> None:
        self._releases.discard(release)
        if not release.cancelled():
            release.exception()  # Without this, asyncio reports the exception as lost if the caller is gone.
