"""The ports of the use case, as cheap as possible: the cost of a real port is its difference from these."""

import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final

from voicepass.errors import LimitReached
from voicepass.model import Agent, Credential, Credentials, Limit, Reservation, Transport, User

ISSUER: Final = "https://login.example"


class NoLedger:
    """Accepts everything and stores nothing."""

    async def reserve(
        self, reservation: Reservation, limits: Sequence[Limit], /, *, ready: Credential | None
    ) -> None: ...
    async def grant(self, reservation: Reservation, credential: Credential, /) -> None: ...
    async def release(self, reservation: Reservation, /, *, has_reached: bool) -> None: ...

    async def read_seconds_left(
        self, _limits: Sequence[Limit], /, *, conversation_id: str | None, pass_id: str
    ) -> int | None:
        del conversation_id, pass_id
        return None


class NoOpenPasses:
    """The lookup of open passes, for users whom no limit refuses."""

    async def refresh(self, _reservation: Reservation, _limit: Limit, /) -> bool:
        return False

    async def reissue(self, _reservation: Reservation, _agent: Agent, refusal: LimitReached, /) -> Credential:
        raise refusal


class NewUsers:
    """The authenticator: every request is from a new user, so that no user reaches a limit."""

    async def authenticate(self, _credentials: Credentials, /) -> User:
        return User(issuer=ISSUER, id=f"new-{uuid.uuid4().hex}", name=None, claims={})


def take_nothing(_agent: Agent, _transport: Transport) -> AbstractContextManager[None]:
    """Take no credential, because none was fetched ahead."""
    return nullcontext()


class InstantProvider:
    """The provider: an ElevenLabs that answers at once."""

    async def fetch_credential(self, _agent: Agent, _transport: Transport, /) -> Credential:
        conversation_id = f"conv_{uuid.uuid4().hex}"
        return Credential(secret=f"wss://{conversation_id}", conversation_id=conversation_id, expires_at=2e9)
