"""The only state: who got which conversation, what it used, and who is blocked. One class of rules, two engines.

The transaction that counts a new pass also checks the limits, so they are exact under concurrency and across instances.
The ledger fails closed: if it does not answer, voicepass hands out nothing.

Read in this order: `rules` (a pass from its reservation to its settlement), `limits`, `extensions`, `sums`, `opened`
(what is really open), `records` (lists and blocks), then the engines `sqlite` and `postgres`. The statements of each
module are in the SQL file beside it.
"""

import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from voicepass.errors import LedgerUnavailable
from voicepass.ledger import opened, records, rules, sums
from voicepass.ledger.dialogue import Dialogue, Row
from voicepass.ledger.limits import name_scope, prepare_question
from voicepass.model import Credential, IssuedPass, Limit, Reservation, Scope, Usage, User

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

ANSWER_SECONDS: Final = 2.5
"""The longest that a caller waits for the ledger. A request may take longer."""

REPLY_SECONDS: Final = 0.5
"""An engine gives up this much earlier than the caller does. Its message then arrives in time."""

_prepare_question = lru_cache(maxsize=64)(prepare_question)


def _make_method(
    rule: Callable[Concatenate[float, Arguments], Dialogue[Result]],
    *,
    name_lock: Callable[[Any], str] | None = None,
    is_durable: bool = True,
) -> Callable[Concatenate["Ledger", Arguments], Coroutine[Any, Any, Result]]:
    """Return a method that runs the rule in one transaction, under the lock that its first argument names."""

    async def method(self: "Ledger", /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        locks = [] if name_lock is None else [name_lock(args[0])]
        return await self.run(lambda now: rule(now, *args, **kwargs), locks=locks, is_durable=is_durable)

    method.__name__, method.__doc__ = rule.__name__, rule.__doc__
    return method


def _name_lock(conversation_id: str) -> str:
    # A grant and a settlement may arrive at the same instant, and the second must see the first.
    return f"conversation {conversation_id}"


class Ledger(ABC):
    """The rules on an engine. Every method raises LedgerUnavailable if the engine does not answer in time.

    Most methods run one rule in one transaction, and have the docstring of that rule.
    """

    _has_a_pass_failed = False

    @abstractmethod
    async def run(
        self, rule: Callable[[float], Dialogue[Result]], *, locks: Sequence[str] = (), is_durable: bool = True
    ) -> Result:
        """Run a rule in one transaction. When this returns, the transaction survives a power cut.

        A transaction that is not durable survives the end of this process. A power cut may undo it until a durable one
        follows. Transactions with the same first lock run one after the other. The rule itself takes the other locks
        (LOCK_SCOPES), as late as it can: all callers share them.

        Raises LedgerUnavailable after ANSWER_SECONDS. Then, and if the caller is cancelled, the rule is not run, or is
        rolled back, unless its commit is in flight already.
        """

    async def reserve(
        self, reservation: Reservation, limits: Sequence[Limit], *, ready: Credential | None = None
    ) -> None:
        """Count one more pass. Raises UserBlocked or LimitReached; then nothing is counted.

        If the credential is `ready`, this grants it in the same transaction, and raises what `grant` raises.
        """
        question, whose = _prepare_question(tuple(limits)), rules.reserved_row(reservation)
        locks = [name_scope(scope, whose) for scope in (Scope.USER, *question.shared_scopes)]
        rule = partial(rules.reserve, reservation=reservation, question=question, ready=ready)
        with self._note_failure():
            # If a power cut undoes a mere reservation, the grant finds no row, and no URL leaves.
            while not await self.run(rule, locks=locks, is_durable=ready is not None):
                await self.run(rules.lapse, is_durable=False)

    async def grant(self, reservation: Reservation, credential: Credential) -> None:
        """Bind the conversation to its user. Raises BadAnswer if it belongs to someone else."""
        locks = [] if credential.conversation_id is None else [_name_lock(credential.conversation_id)]
        with self._note_failure():
            await self.run(lambda now: rules.grant(now, reservation, credential), locks=locks)

    @contextmanager
    def _note_failure(self) -> Iterator[None]:
        try:
            yield
        except LedgerUnavailable:
            self._has_a_pass_failed = True
            raise

    async def check(self) -> None:
        """Write a row durably and delete it again. Raises LedgerUnavailable if that fails: then a pass would fail, too.

        After a pass has failed, this writes as much as a pass does: a disk may have room for one row only.
        """
        name, is_whole = f"check {uuid.uuid4().hex}", self._has_a_pass_failed
        await self.run(lambda now: records.check(now, name, is_whole=is_whole))
        if is_whole:
            self._has_a_pass_failed = False

    async def release(self, reservation: Reservation, *, has_reached: bool = False) -> None:
        """Delete a reservation without a pass. If its request reached ElevenLabs, it still counts as a request."""
        await self.run(lambda _now: rules.release(reservation.pass_id, has_reached=has_reached))

    async def usage(self, user: User, limits: Sequence[Limit], *, agent_alias: str = "") -> list[Usage]:
        """Return what this user, this agent or all have used of each limit, by its scope."""
        whose = {"token_issuer": user.issuer, "user_id": user.id, "agent_alias": agent_alias}
        while (answers := await self.run(lambda now: rules.read_usage(now, whose, limits))) is None:
            await self.run(rules.lapse, is_durable=False)
        return answers

    read_seconds_left = _make_method(rules.read_seconds_left)
    find_pass = _make_method(rules.find_pass)
    settle = _make_method(rules.settle, name_lock=lambda settlement: _name_lock(settlement.conversation_id))

    # What is really open.
    begin_lookup = _make_method(opened.begin_lookup, is_durable=False)
    end_lookup = _make_method(opened.end_lookup, is_durable=False)
    is_lookup_running = _make_method(opened.is_lookup_running, is_durable=False)
    is_in_flight = _make_method(opened.is_in_flight, is_durable=False)
    list_unopened = _make_method(opened.list_unopened, is_durable=False)
    note_unopened = _make_method(opened.note_unopened, name_lock=_name_lock)
    note_opened = _make_method(opened.note_opened, name_lock=_name_lock)
    note_ended = _make_method(opened.note_ended, name_lock=_name_lock)
    list_never_opened = _make_method(opened.list_never_opened)
    find = _make_method(opened.find)
    begin_listing = _make_method(opened.begin_listing)
    note_listed = _make_method(opened.note_listed)
    erase_sealed = _make_method(opened.erase_sealed)

    # Many passes, leases and blocks.
    list_unsettled = _make_method(records.list_unsettled)
    list_passes = _make_method(records.list_passes)
    sum_usage = _make_method(records.sum_usage)
    read_standing = _make_method(records.read_standing)
    delete_old = _make_method(records.delete_old)
    block = _make_method(records.block)
    unblock = _make_method(records.unblock)
    list_blocks = _make_method(records.list_blocks)
    # The lock puts callers in order. Each reads the time after the caller before it has written its lease.
    take_lease = _make_method(records.take_lease, name_lock=lambda name: f"lease {name}")
    end_lease = _make_method(records.end_lease)
    _list_page = _make_method(records.list_page)

    async def read_every_pass(self) -> AsyncIterator[IssuedPass]:
        """Iterate over all passes, oldest first, in pages: neither memory nor other callers suffer."""
        after = (0.0, "")
        while passes := await self._list_page(after, 1000):
            for issued in passes:
                yield issued
            after = (passes[-1].reserved_at, passes[-1].pass_id)

    async def fix_sums(self) -> list[Row]:
        """Compare the sums of the last 31 days with their passes. Correct each sum that differs, and return these."""
        corrections: list[Row] = []
        for day in await self.run(sums.find_days):
            for hour in range(day * 24, day * 24 + 24):
                corrections += await self.run(partial(sums.fix_hour, hour=hour))
            corrections += await self.run(partial(sums.fix_day, day=day))
        return corrections + await self.run(sums.fix_open)
