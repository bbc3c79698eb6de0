"""The use case: who asks, may they, get a credential, write it down, hand it over. No HTTP, vendor or database here."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from voicepass.errors import InternalError, Refusal
from voicepass.model import (
    Agent,
    Attempt,
    Clock,
    Credential,
    Credentials,
    Grant,
    PassRequest,
    Transport,
    User,
    VoicePass,
)
from voicepass.policy import Policy


class Authenticator(Protocol):
    """Raises a refusal for anyone who is not a signed-in user."""

    async def authenticate(self, credentials: Credentials, /) -> User: ...


class VoiceProvider(Protocol):
    """Raises an ElevenLabsRefusal when it has no credential to give."""

    async def credential(self, agent: Agent, transport: Transport, /) -> Credential: ...


class Ledger(Protocol):
    """Raises LedgerUnavailable when the row is not durable."""

    async def record(self, grant: Grant, /) -> None: ...


Observer = Callable[[Attempt], None]
"""Is shown every attempt once, when it is over. Must be quick and must not raise."""


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
        clock: Clock,
    ) -> None:
        self._authenticator = authenticator
        self._policy = policy
        self._provider = provider
        self._ledger = ledger
        self._observers = observers
        self._clock = clock

    async def issue(self, request: PassRequest) -> VoicePass:
        """Return a pass for one conversation, or raise the Refusal that says why not."""
        with self._attempt(request) as attempt:
            attempt.user = user = await self._authenticator.authenticate(request.credentials)
            attempt.agent = agent = self._policy.agent_for(user, request.alias)
            variables = self._policy.variables_for(user, agent)
            credential = await self._provider.credential(agent, request.transport)
            attempt.conversation_id = credential.conversation_id
            attempt.credential_sha256 = credential.sha256
            await self._ledger.record(self._grant(attempt, user, agent, credential))  # no row, no pass
            return VoicePass(
                transport=request.transport,
                credential=credential,
                agent=agent,
                user_id=str(variables["user_id"]),
                dynamic_variables=variables,
            )

    def _grant(self, attempt: Attempt, user: User, agent: Agent, credential: Credential) -> Grant:
        return Grant(
            request_id=attempt.request_id,
            granted_at=self._clock(),
            token_issuer=user.issuer,
            user_id=user.id,
            agent_alias=agent.alias,
            agent_id=agent.agent_id,
            transport=attempt.transport,
            conversation_id=credential.conversation_id,
            credential_sha256=credential.sha256,
            expires_at=credential.expires_at,
        )

    @contextmanager
    def _attempt(self, request: PassRequest) -> Iterator[Attempt]:
        """Open an attempt and close it exactly once, whatever happens; the observers see it then."""
        attempt = Attempt(
            request_id=request.request_id, transport=request.transport, alias=request.alias, client=request.client
        )
        begun = time.monotonic()
        try:
            yield attempt
            attempt.outcome = "granted"
        except Refusal as refusal:
            attempt.outcome, attempt.operator_note = refusal.code, refusal.operator_note
            attempt.cause = refusal.__cause__
            raise
        except asyncio.CancelledError:
            attempt.outcome = "cancelled"
            raise
        except Exception as error:
            attempt.outcome, attempt.cause = InternalError.code, error
            raise
        finally:
            attempt.duration_seconds = time.monotonic() - begun
            for observe in self._observers:
                observe(attempt)
