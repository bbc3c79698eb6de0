"""The only state: who was given which conversation, what it used, and who is blocked. One port, two engines.

Limits are questions that are asked and answered in the transaction that counts the new pass, so they are exact under
concurrency and across instances, and there is no second counter to drift. Everything fails closed: where the ledger
does not answer, nothing is handed out.
"""

import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from voicepass.errors import LedgerUnavailable
from voicepass.ledger import limits as questions
from voicepass.ledger import opened, rules
from voicepass.ledger.dialogue import Dialogue, Row
from voicepass.model import (
    Block,
    Credential,
    IssuedPass,
    Limit,
    Listing,
    LookupTurn,
    Reservation,
    SealedPass,
    Settlement,
    Standing,
    Usage,
    User,
)

Result = TypeVar("Result")

RECENT_SECONDS: Final = 20 * 60.0
"""ElevenLabs' list tells of conversations that began so recently; older ones are asked about one by one."""

ANSWER_SECONDS: Final = 2.5
"""The longest that anyone waits for the ledger: well inside a request's deadline."""


class Ledger(ABC):
    """The rules over an engine. Every method raises LedgerUnavailable where the engine does not answer in time."""

    _has_a_pass_failed = False

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

    def _ahead_seconds(self) -> float:
        """Return how far the ledger's clock is ahead of the real time, which ElevenLabs' instants are in."""
        return 0.0

    async def reserve(self, reservation: Reservation, limits: Sequence[Limit]) -> None:
        """Count one more pass. Raises UserBlocked or LimitReached; then nothing is counted."""
        whose = rules.reserved_row(reservation)
        locks = sorted(questions.counted_in(scope, whose) for scope in {limit.scope for limit in limits})
        # A power cut that takes it away takes away the attempt as well: the grant finds no row then, and no URL leaves.
        with self._noting_a_failure():
            await self._run(lambda now: rules.reserve(reservation, limits, now), locks=locks, is_durable=False)

    async def grant(self, reservation: Reservation, credential: Credential, *, sealed: bytes | None = None) -> None:
        """Bind the conversation to its user. Raises BadAnswer where it is someone else's.

        `sealed` is the credential for `unopened` to return, readable for nobody who has only the ledger.
        """
        with self._noting_a_failure():
            await self._run(
                lambda now: rules.grant(reservation, credential, now, sealed=sealed),
                locks=_lock(credential.conversation_id),
            )

    async def release(self, reservation: Reservation, *, has_reached: bool = False) -> None:
        """Give back a reservation that came to nothing; if it has reached ElevenLabs, it counts as a request."""
        await self._run(lambda _now: rules.release(reservation.pass_id, has_reached=has_reached))

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

    async def expire(self, conversation_id: str, *, min_age_seconds: float = 0.0) -> bool:
        """Release a pass that nobody opened and that is so old; returns whether this released it."""
        return await self._run(
            lambda now: rules.expire(conversation_id, now, min_age_seconds=min_age_seconds),
            locks=_lock(conversation_id),
        )

    async def begin_lookup(self, reservation: Reservation, limit: Limit, *, seconds: float) -> LookupTurn:
        """Take the turn to look up what is really open of what `limit` counts for this reservation's user."""
        whose, key = _lookup(reservation, limit)
        return await self._run(
            lambda now: opened.begin_lookup(key, whose, limit, seconds=seconds, now=now), is_durable=False
        )

    async def end_lookup(self, reservation: Reservation, limit: Limit, *, has_freed: bool) -> None:
        """Give the turn back; if the lookup freed nothing, nobody takes it for two seconds."""
        _, key = _lookup(reservation, limit)
        await self._run(lambda now: opened.end_lookup(key, has_freed=has_freed, now=now), is_durable=False)

    async def is_lookup_running(self, reservation: Reservation, limit: Limit) -> bool:
        """Tell whether another caller looks this up at the moment."""
        _, key = _lookup(reservation, limit)
        return await self._run(lambda now: opened.is_running(key, now), is_durable=False)

    async def is_in_flight(self, reservation: Reservation) -> bool:
        """Tell whether a pass of this user is about to be granted."""
        whose = rules.reserved_row(reservation)
        return await self._run(lambda now: opened.is_in_flight(whose, now), is_durable=False)

    async def note_unopened(self, conversation_id: str, *, expires_seconds: float) -> bool:
        """Note that nobody has opened a conversation yet; returns whether its pass was so old that this released it."""
        return await self._run(
            lambda now: opened.note_unopened(conversation_id, now, expires_seconds=expires_seconds),
            locks=_lock(conversation_id),
        )

    async def note_opened(self, conversation_id: str, opened_at: float) -> bool:
        """Note that a conversation is open, since this real time; returns whether its pass was released as unopened."""
        since = opened_at + self._ahead_seconds()
        return await self._run(lambda _now: opened.note_opened(conversation_id, since), locks=_lock(conversation_id))

    async def note_ended(self, conversation_id: str) -> bool:
        """Note that a conversation has ended; returns whether it counted as open until now."""
        return await self._run(lambda now: opened.note_ended(conversation_id, now), locks=_lock(conversation_id))

    async def unopened(self, reservation: Reservation) -> list[SealedPass]:
        """Return the user's passes for this agent and transport that were just found to be unopened, newest first."""
        whose = rules.reserved_row(reservation)
        return await self._run(lambda now: opened.unopened(whose, now), is_durable=False)

    async def erase_sealed(self) -> None:
        """Erase sealed credentials that are too old to be used."""
        await self._run(opened.erase_sealed)

    async def begin_listing(
        self, agent_id: str, *, every_seconds: float, recent_seconds: float = RECENT_SECONDS
    ) -> Listing | None:
        """Return which part of the agent's list to read now, in real time; None if it was read just now."""
        listing = await self._run(
            lambda now: opened.begin_listing(agent_id, now, every_seconds=every_seconds, recent_seconds=recent_seconds)
        )
        ahead = self._ahead_seconds()
        return listing and Listing(since=listing.since - ahead, until=listing.until - ahead)

    async def note_listed(self, agent_id: str, until: float) -> None:
        """Note that the agent's list was read for all conversations that began before the real time `until`."""
        listed_until = until + self._ahead_seconds()
        await self._run(lambda _now: opened.note_listed(agent_id, listed_until))

    async def never_opened(self, agent_id: str, most: int, *, min_age_seconds: float) -> list[IssuedPass]:
        """Return passes that were so old when the list was last read, and are not in it."""
        return await self._run(lambda _now: opened.never_opened(agent_id, most, min_age_seconds=min_age_seconds))

    async def find(self, conversation_ids: Sequence[str]) -> list[IssuedPass]:
        """Return the passes behind these conversations, as far as they were issued here."""
        return await self._run(lambda _now: opened.find(list(conversation_ids)))

    async def due(self, most: int, *, after: float = 0.0, min_age_seconds: float = RECENT_SECONDS) -> list[IssuedPass]:
        """Return passes reserved after `after` that are so old and not settled; oldest first."""
        return await self._run(lambda now: rules.due(most, after, now, min_age_seconds=min_age_seconds))

    async def lease(self, name: str, seconds: float) -> bool:
        """Tell whether what is called `name` is the caller's alone, on all instances, for that many seconds."""
        # With a lock, so that each caller's time is later than that of the lease that it finds.
        return await self._run(lambda now: rules.lease(name, seconds, now), locks=[f"lease {name}"])

    async def end_lease(self, name: str, *, after_seconds: float = 0.0) -> None:
        """Let a lease lapse earlier than it would."""
        await self._run(lambda now: rules.end_lease(name, now, after_seconds=after_seconds))

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
        """Write a row durably and take it back. Raises LedgerUnavailable if that fails, as a pass would then fail.

        After a pass has failed, this writes as much as a pass does: a disk may have room for one row and no more.
        """
        name, is_whole = f"check {uuid.uuid4().hex}", self._has_a_pass_failed
        await self._run(lambda now: rules.check(name, now, is_whole=is_whole))
        if is_whole:
            self._has_a_pass_failed = False

    @contextmanager
    def _noting_a_failure(self) -> Iterator[None]:
        try:
            yield
        except LedgerUnavailable:
            self._has_a_pass_failed = True
            raise


def _lookup(reservation: Reservation, limit: Limit) -> tuple[dict[str, Any], str]:
    """Return whom the limit counts, and the name of a lookup for them."""
    whose = rules.reserved_row(reservation)
    return whose, f"{limit.counted} of {questions.counted_in(limit.scope, whose)}"


def _lock(conversation_id: str | None) -> list[str]:
    # A pass and its settlement may arrive at the same instant, and either must see the other.
    return [] if conversation_id is None else [f"conversation {conversation_id}"]
