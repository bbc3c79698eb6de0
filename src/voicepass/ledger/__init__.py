"""The only state: who got which conversation, what it used, and who is blocked. One class of rules, two engines.

The transaction that counts a new pass also checks the limits, so they are exact under concurrency and across instances.
The ledger fails closed: if it does not answer, voicepass hands out nothing.

Read in this order: `rules` (a pass from its reservation to its settlement), `limits`, `extensions`, `sums`, `opened`
(what is really open), `records` (lists and blocks), then the engines `sqlite` and `postgres`.
"""

import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, Final, TypeVar

from voicepass.errors import LedgerUnavailable
from voicepass.ledger import opened, records, rules, sums
from voicepass.ledger.dialogue import Dialogue, Row
from voicepass.ledger.limits import name_scope, prepare_question
from voicepass.ledger.opened import Listing, SealedPass
from voicepass.model import (
    Block,
    Credential,
    IssuedPass,
    Limit,
    LookupTurn,
    Reservation,
    Scope,
    Settlement,
    Standing,
    Usage,
    User,
)

Result = TypeVar("Result")

RECENT_SECONDS: Final = 20 * 60.0
"""ElevenLabs' list covers conversations that began so recently. The reconciler asks about each older one."""

ANSWER_SECONDS: Final = 2.5
"""The longest that a caller waits for the ledger. A request may take longer."""


class Ledger(ABC):
    """The rules on an engine. Every method raises LedgerUnavailable if the engine does not answer in time."""

    _has_a_pass_failed = False

    @abstractmethod
    async def run(
        self, rule: Callable[[float], Dialogue[Result]], *, locks: Sequence[str] = (), is_durable: bool = True
    ) -> Result:
        """Run a rule in one transaction. When this returns, the transaction survives a power cut.

        A transaction that is not durable survives the end of this process, but a power cut only after a durable one
        has followed it. Transactions that share the first lock run one after the other. The rule takes the other locks
        itself (LOCK_SCOPES): all callers share these, so it holds them only for a short time.

        Raises LedgerUnavailable after ANSWER_SECONDS. Then, and if the caller is cancelled, the rule is not run, or is
        rolled back, unless its commit is in flight already.
        """

    def _ahead_seconds(self) -> float:
        """Return how far the ledger's clock is ahead of the real time, which ElevenLabs uses."""
        return 0.0

    async def reserve(
        self,
        reservation: Reservation,
        limits: Sequence[Limit],
        *,
        ready: Credential | None = None,
        sealed: bytes | None = None,
    ) -> None:
        """Count one more pass. Raises UserBlocked or LimitReached; then nothing is counted.

        If the credential is `ready`, this grants it in the same transaction, and raises what `grant` raises.
        """
        question, whose = _prepare_question(tuple(limits)), rules.reserved_row(reservation)
        locks = [name_scope(scope, whose) for scope in (Scope.USER, *question.shared_scopes)]
        rule = partial(rules.reserve, reservation, question, ready=ready, sealed=sealed)
        with self._note_failure():
            # If a power cut undoes a mere reservation, the grant finds no row, and no URL leaves.
            while not await self.run(rule, locks=locks, is_durable=ready is not None):
                await self.run(rules.lapse, is_durable=False)

    async def grant(self, reservation: Reservation, credential: Credential, *, sealed: bytes | None = None) -> None:
        """Bind the conversation to its user. Raises BadAnswer if it belongs to someone else.

        `sealed` is the credential that `unopened` returns. Nobody can read it who has only the ledger.
        """
        with self._note_failure():
            await self.run(
                lambda now: rules.grant(reservation, credential, now, sealed=sealed),
                locks=_lock(credential.conversation_id),
            )

    async def release(self, reservation: Reservation, *, has_reached: bool = False) -> None:
        """Delete a reservation without a pass. If its request reached ElevenLabs, it still counts as a request."""
        await self.run(lambda _now: rules.release(reservation.pass_id, has_reached=has_reached))

    async def usage(self, user: User, limits: Sequence[Limit], *, agent_alias: str = "") -> list[Usage]:
        """Return what this user, this agent or all have used of each limit, by its scope."""
        whose = {"token_issuer": user.issuer, "user_id": user.id, "agent_alias": agent_alias}
        while (answers := await self.run(lambda now: rules.read_usage(whose, limits, now))) is None:
            await self.run(rules.lapse, is_durable=False)
        return answers

    async def read_seconds_left(
        self, limits: Sequence[Limit], *, conversation_id: str | None, pass_id: str = ""
    ) -> int | None:
        """Return how long the user of a pass may still talk; None without a limit. Raises ConversationUnknown."""
        return await self.run(
            lambda now: rules.read_seconds_left(limits, now, conversation_id=conversation_id, pass_id=pass_id)
        )

    async def find_pass(self, conversation_id: str) -> IssuedPass:
        """Return the pass of a conversation: to whom it was issued. Raises ConversationUnknown."""
        return await self.run(lambda _now: rules.find_issued(conversation_id))

    async def settle(self, settlement: Settlement) -> IssuedPass | None:
        """Close a conversation with what it used. Returns the pass if this closed it, else None (see the rule)."""
        return await self.run(lambda now: rules.settle(settlement, now), locks=_lock(settlement.conversation_id))

    async def expire(self, conversation_id: str, *, min_age_seconds: float = 0.0) -> bool:
        """Release a pass that nobody opened and that is old enough. Returns whether this released it."""
        return await self.run(
            lambda now: rules.expire(conversation_id, now, min_age_seconds=min_age_seconds),
            locks=_lock(conversation_id),
        )

    async def begin_lookup(self, reservation: Reservation, limit: Limit, *, seconds: float) -> LookupTurn:
        """Take the turn to ask ElevenLabs about the passes that `limit` counts for this reservation's user."""
        whose, key = _lookup(reservation, limit)
        return await self.run(
            lambda now: opened.begin_lookup(key, whose, limit, seconds=seconds, now=now), is_durable=False
        )

    async def end_lookup(self, reservation: Reservation, limit: Limit, *, has_freed: bool) -> None:
        """Give the turn back. If the lookup freed nothing, nobody takes it for two seconds."""
        _, key = _lookup(reservation, limit)
        await self.run(lambda now: opened.end_lookup(key, has_freed=has_freed, now=now), is_durable=False)

    async def is_lookup_running(self, reservation: Reservation, limit: Limit) -> bool:
        """Tell whether another caller looks this up at the moment."""
        _, key = _lookup(reservation, limit)
        return await self.run(lambda now: opened.is_lookup_running(key, now), is_durable=False)

    async def is_in_flight(self, reservation: Reservation) -> bool:
        """Tell whether a pass of this user is about to be granted."""
        whose = rules.reserved_row(reservation)
        return await self.run(lambda now: opened.is_in_flight(whose, now), is_durable=False)

    async def note_unopened(self, conversation_id: str, *, expires_seconds: float) -> bool:
        """Note that nobody has opened a conversation yet. Returns whether its pass was old enough to be released."""
        return await self.run(
            lambda now: opened.note_unopened(conversation_id, now, expires_seconds=expires_seconds),
            locks=_lock(conversation_id),
        )

    async def note_opened(self, conversation_id: str, opened_at: float) -> bool:
        """Note that a conversation is open since this real time. Returns whether its pass was released as unopened."""
        since = opened_at + self._ahead_seconds()
        return await self.run(lambda _now: opened.note_opened(conversation_id, since), locks=_lock(conversation_id))

    async def note_ended(self, conversation_id: str) -> bool:
        """Note that a conversation has ended. Returns whether it counted as open until now."""
        return await self.run(lambda now: opened.note_ended(conversation_id, now), locks=_lock(conversation_id))

    async def list_unopened(self, reservation: Reservation) -> list[SealedPass]:
        """Return the user's passes for this agent and transport that a lookup just found unopened, newest first."""
        whose = rules.reserved_row(reservation)
        return await self.run(lambda now: opened.list_unopened(whose, now), is_durable=False)

    async def erase_sealed(self) -> None:
        """Erase sealed credentials that are too old to be used."""
        await self.run(opened.erase_sealed)

    async def begin_listing(
        self, agent_id: str, *, every_seconds: float, recent_seconds: float = RECENT_SECONDS
    ) -> Listing | None:
        """Return which part of the agent's list to read now, in real time; None if it was read just now."""
        listing = await self.run(
            lambda now: opened.begin_listing(agent_id, now, every_seconds=every_seconds, recent_seconds=recent_seconds)
        )
        ahead = self._ahead_seconds()
        return listing and Listing(since=listing.since - ahead, until=listing.until - ahead)

    async def note_listed(self, agent_id: str, until: float) -> None:
        """Note that the agent's list was read: all conversations that began before the real time `until`."""
        listed_until = until + self._ahead_seconds()
        await self.run(lambda _now: opened.note_listed(agent_id, listed_until))

    async def list_never_opened(self, agent_id: str, most: int, *, min_age_seconds: float) -> list[IssuedPass]:
        """Return passes that were old enough when the list was last read, and are not in it."""
        return await self.run(lambda _now: opened.list_never_opened(agent_id, most, min_age_seconds=min_age_seconds))

    async def find(self, conversation_ids: Sequence[str]) -> list[IssuedPass]:
        """Return the passes of these conversations. A conversation that voicepass did not issue has none."""
        return await self.run(lambda _now: opened.find(list(conversation_ids)))

    async def list_unsettled(
        self, most: int, *, after: float = 0.0, min_age_seconds: float = RECENT_SECONDS
    ) -> list[IssuedPass]:
        """Return passes reserved after `after` that are old enough and not settled, oldest first."""
        return await self.run(lambda now: records.list_overdue(most, after, now, min_age_seconds=min_age_seconds))

    async def take_lease(self, name: str, seconds: float) -> bool:
        """Take the lease `name` for that many seconds. Returns whether no other instance holds it."""
        # With the lock, each caller reads a later time than the one that wrote the lease it finds.
        return await self.run(lambda now: records.lease(name, seconds, now), locks=[f"lease {name}"])

    async def end_lease(self, name: str, *, after_seconds: float = 0.0) -> None:
        """Shorten a lease, so that it ends after these seconds."""
        await self.run(lambda now: records.end_lease(name, now, after_seconds=after_seconds))

    async def list_passes(self, *, user_id: str | None = None, most: int) -> list[IssuedPass]:
        """Return the latest passes, of one user or of all, newest first."""
        return await self.run(lambda _now: records.list_latest(user_id, most))

    async def read_every_pass(self, *, page: int = 1000) -> AsyncIterator[IssuedPass]:
        """Iterate over all passes, oldest first, in pages: neither memory nor other callers suffer."""

        async def read_page(after: tuple[float, str]) -> list[IssuedPass]:
            return await self.run(lambda _now: records.list_page(after, page))

        passes = await read_page((0.0, ""))
        while passes:
            for issued in passes:
                yield issued
            passes = await read_page((passes[-1].reserved_at, passes[-1].pass_id))

    async def sum_usage(self, *, window_seconds: int, most: int) -> list[Row]:
        """Return who used most in the window."""
        return await self.run(lambda now: records.sum_by_user(window_seconds, most, now))

    async def read_standing(self) -> Standing:
        """Return how many conversations are open, and how many passes should have been settled and are not."""
        return await self.run(records.read_standing)

    async def delete_old(self, *, age_seconds: int) -> None:
        """Delete passes that are older. `age_seconds` is 31 days at least."""
        await self.run(lambda now: records.delete_old(age_seconds, now))

    async def fix_sums(self) -> list[Row]:
        """Compare the sums of the last 31 days with their passes. Correct each sum that differs, and return these."""
        first_day, last_day = await self.run(sums.find_days)
        corrections: list[Row] = []
        for day in range(first_day, last_day + 1):
            for hour in range(day * 24, day * 24 + 24):
                corrections += await self.run(partial(sums.fix_hour, hour))
            corrections += await self.run(partial(sums.fix_day, day))
        return corrections + await self.run(sums.fix_open)

    async def block(self, blocked: Block) -> None:
        """Block a user, an agent or everyone, at once on every instance."""
        await self.run(lambda now: records.block(blocked, now))

    async def unblock(self, blocked: Block) -> bool:
        """Remove a block. Returns whether there was one."""
        return await self.run(lambda _now: records.unblock(blocked))

    async def list_blocks(self) -> list[Block]:
        """Return all that is blocked."""
        return await self.run(lambda _now: records.list_blocks())

    async def check(self) -> None:
        """Write a row durably and delete it again. Raises LedgerUnavailable if that fails: then a pass would fail, too.

        After a pass has failed, this writes as much as a pass does: a disk may have room for one row only.
        """
        name, is_whole = f"check {uuid.uuid4().hex}", self._has_a_pass_failed
        await self.run(lambda now: records.check(name, now, is_whole=is_whole))
        if is_whole:
            self._has_a_pass_failed = False

    @contextmanager
    def _note_failure(self) -> Iterator[None]:
        try:
            yield
        except LedgerUnavailable:
            self._has_a_pass_failed = True
            raise


_prepare_question = lru_cache(maxsize=64)(prepare_question)


def _lookup(reservation: Reservation, limit: Limit) -> tuple[dict[str, Any], str]:
    """Return whose passes the limit counts, and the key of their lookup."""
    whose = rules.reserved_row(reservation)
    return whose, f"{limit.counted} of {name_scope(limit.scope, whose)}"


def _lock(conversation_id: str | None) -> list[str]:
    # A grant and a settlement may arrive at the same instant, and the second must see the first.
    return [] if conversation_id is None else [f"conversation {conversation_id}"]
