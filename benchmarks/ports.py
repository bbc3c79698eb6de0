"""The ports of the use case, as cheap as they can be: what a real one costs is what it takes more than these."""

import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final

from voicepass.errors import LimitReached
from voicepass.model import Agent, Credential, Credentials, Limit, Reservation, Transport, User

ISSUER: Final = "https://login.example"


class NoLedger:
    """Says yes to everything and keeps nothing."""

    async def reserve(
        self, reservation: Reservation, limits: Sequence[Limit], /, *, ready: Credential | None, sealed: bytes | None
    ) -> None: ...
    async def grant(self, reservation: Reservation, credential: Credential, /, *, sealed: bytes | None) -> None: ...
    async def release(self, reservation: Reservation, /, *, has_reached: bool) -> None: ...

    async def read_seconds_left(
        self, _limits: Sequence[Limit], /, *, conversation_id: str | None, pass_id: str
    ) -> int | None:
        del conversation_id, pass_id
        return None


class NeverAtALimit:
    """What looks up open passes, for users whom no limit refuses."""

    async def refresh(self, _reservation: Reservation, _limit: Limit, /) -> bool:
        return False

    async def reissue(self, _reservation: Reservation, _agent: Agent, refusal: LimitReached, /) -> Credential:
        raise refusal


class Stranger:
    """The authenticator: each who asks is a new user, so that nobody comes near a limit."""

    async def authenticate(self, _credentials: Credentials, /) -> User:
        return User(issuer=ISSUER, id=f"new-{uuid.uuid4().hex}", name=None, claims={})


def take_nothing(_agent: Agent, _transport: Transport) -> AbstractContextManager[None]:
    """Take no credential that was fetched ahead: there is none."""
    return nullcontext()


class AtOnce:
    """The provider: ElevenLabs, if it took no time."""

    async def fetch_credential(self, _agent: Agent, _transport: Transport, /) -> Credential:
        conversation_id = f"conv_{uuid.uuid4().hex}"
        return Credential(secret=f"wss://{conversation_id}", conversation_id=conversation_id, expires_at=2e9)
