"""The only state: who was given which conversation, what it used, and who is blocked. One port, two engines.

Limits are questions that are asked and answered in the transaction that counts the new pass, so they are exact under
concurrency and across instances, and there is no second counter to drift. Everything fails closed: where the ledger
does not answer, nothing is handed out.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final, TypeVar

from voicepass.ledger import limits as questions
from voicepass.ledger import rules
from voicepass.ledger.dialogue import Dialogue, Row
from voicepass.model import Block, Credential, IssuedPass, Limit, Reservation, Settlement, Standing, Usage, User

Result = TypeVar("Result")

ANSWER_SECONDS: Final = 2.5
"""The longest that anyone waits for the ledger: well inside a request's deadline."""


class Ledger(ABC):
    """The rules over an engine. Every method raises LedgerUnavailable where the engine does not answer in time."""

    @abstractmethod
    async def _run(
        self, rule: Callable[[float], Dialogue[Result]], *, locks: Sequence[str] = (), is_durable: bool = True
    ) -> Result:
        """Run a rule at the present instant in one transaction, which survives a power cut when this returns.

        One that need not be durable is seen by all as well, and survives the end of this process, but no power cut
        until a durable one has followed it. Transactions that share a lock come one after the other.

        Raises LedgerUnavailable after ANSWER_SECONDS; then, and when the caller is cancelled, the rule is not run, or
        rolled back, unless its commit is under way already.
        """

    async def reserve(self, reservation: Reservation, limits: Sequence[Limit]) -> None:
        """Count one more pass. Raises UserBlocked or LimitReached; then nothing is counted."""
        whose = rules.reserved_row(reservation)
        locks = sorted(questions.counted_in(scope, whose) for scope in {limit.scope for limit in limits})
        # A power cut that takes it away takes away the attempt as well: the grant finds no row then, and no URL leaves.
        await self._run(lambda now: rules.reserve(reservation, limits, now), locks=locks, is_durable=False)

    async def grant(self, reservation: Reservation, credential: Credential) -> None:
        """Bind the conversation to its user. Raises BadAnswer where it is someone else's."""
        await self._run(lambda now: rules.grant(reservation, credential, now), locks=_lock(credential.conversation_id))

    async def release(self, reservation: Reservation) -> None:
        """Give back a reservation that came to nothing."""
        await self._run(lambda _now: rules.release(reservation.pass_id))

    async def usage(self, user: User, limits: Sequence[Limit]) -> list[Usage]:
        """Tell where a user stands with limits of the scope USER."""
        whose = {"token_issuer": user.issuer, "user_id": user.id}
        return await self._run(lambda now: questions.usage(whose, limits, now))

    async def issued(self, conversation_id: str) -> IssuedPass:
        """Tell to whom a conversation was issued. Raises ConversationUnknown."""
        return await self._run(lambda _now: rules.issued(conversation_id))

    async def settle(self, settlement: Settlement) -> IssuedPass | None:
        """Close a conversation with what it used; returns the pass if this closed it, else None (see the rule)."""
        return await self._run(lambda now: rules.settle(settlement, now), locks=_lock(settlement.conversation_id))

    async def expire(self, conversation_id: str) -> None:
        """Release a pass that was never used."""
        await self._run(lambda now: rules.expire(conversation_id, now), locks=_lock(conversation_id))

    async def due(self, most: int, *, after: float = 0.0) -> list[IssuedPass]:
        """Return passes reserved after `after`, older than 15 minutes, of which nothing is known; oldest first."""
        return await self._run(lambda now: rules.due(most, after, now))

    async def lease(self, name: str, seconds: float) -> bool:
        """Tell whether what is called `name` is the caller's alone, on all instances, for that many seconds."""
        return await self._run(lambda now: rules.lease(name, seconds, now))

    async def listed(self, *, user_id: str | None = None, most: int) -> list[IssuedPass]:
        """Return the latest passes, of one user or of all, newest first."""
        return await self._run(lambda _now: rules.listed(user_id, most))

    async def every_pass(self, *, page: int = 1000) -> AsyncIterator[IssuedPass]:
        """Walk through all passes, oldest first, without keeping them in memory or the ledger from its work."""

        async def following(after: tuple[float, str]) -> list[IssuedPass]:
            return await self._run(lambda _now: rules.page(after, page))

        passes = await following((0.0, ""))
        while passes:
            for issued in passes:
                yield issued
            passes = await following((passes[-1].reserved_at, passes[-1].pass_id))

    async def totals(self, *, window_seconds: int, most: int) -> list[Row]:
        """Return who used most in the window."""
        return await self._run(lambda now: rules.totals(window_seconds, most, now))

    async def standing(self) -> Standing:
        """Tell what is open, and what should have been settled and is not."""
        return await self._run(rules.standing)

    async def forget(self, *, age_seconds: int) -> None:
        """Delete what is older."""
        await self._run(lambda now: rules.forget(age_seconds, now))

    async def block(self, blocked: Block) -> None:
        """Give no more passes to a user, for an agent, or to anyone; at once, on every instance."""
        await self._run(lambda now: rules.block(blocked, now))

    async def unblock(self, blocked: Block) -> None:
        """Take a block back."""
        await self._run(lambda _now: rules.unblock(blocked))

    async def blocks(self) -> list[Block]:
        """Return all that is blocked."""
        return await self._run(lambda _now: rules.blocks())

    async def check(self) -> None:
        """Raise LedgerUnavailable unless the ledger answers."""
        await self.blocks()


def _lock(conversation_id: str | None) -> list[str]:
    # A pass and its settlement may arrive at the same instant, and either must see the other.
    return [] if conversation_id is None else [f"conversation {conversation_id}"]
