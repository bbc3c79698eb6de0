"""Settles what no webhook told: reads ElevenLabs' list of conversations, and asks about single ones that it lacks."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol

import structlog

from voicepass.elevenlabs.answers import ConversationsPage
from voicepass.errors import BadAnswer, ConversationUnknown, KeyRejected, LedgerUnavailable, Refusal
from voicepass.model import Clock, IssuedPass, Listing, Settlement
from voicepass.settlement import (
    NEVER_OPENED_SECONDS,
    Account,
    Outcome,
    Settlements,
    Status,
    read_account,
    read_row,
    repeating,
)

LIST_SECONDS: Final = 210.0
"""The list is read by the first round after this time. So with a round a minute it is read every four minutes, even if
rounds do not begin exactly on time. Each reading costs a call for 100 conversations that began since the last one."""
MIN_RECENT_SECONDS: Final = 20 * 60.0
RECENT_SPARE_SECONDS: Final = 60.0
CALLS_PER_ROUND: Final = 20
"""Conversations that are asked about one by one in a round."""
UNACCOUNTED_SECONDS: Final = 24 * 3600
"""After a day of answers that tell nothing, what was reserved counts as used, and ElevenLabs is asked no more."""
MIN_LEASE_SECONDS: Final = 120.0
"""A round may take so long even if rounds follow one another faster."""

_WINDOW_SECONDS: Final = 1800.0  # progress is saved after each, so a long backlog is not read from its start again
MOST_FOUND: Final = 200  # of a page: ElevenLabs has 100 on one
_MAX_PAGES: Final = 1000  # of one window: no service of ours has so many conversations in half an hour
_AT_ONCE: Final = 5  # writes to the ledger: half of the connections that an instance has
_LEASE: Final = "reconciler"

_log = structlog.get_logger("voicepass.settlement")


class Ledger(Protocol):
    """The part of the ledger that the reconciler needs. Every method raises LedgerUnavailable."""

    async def lease(self, name: str, seconds: float, /) -> bool:
        """Tell whether this is the caller's alone for that many seconds."""

    async def end_lease(self, name: str, /, *, after_seconds: float) -> None:
        """Let a lease lapse earlier than it would."""

    async def begin_listing(self, agent_id: str, /, *, every_seconds: float, recent_seconds: float) -> Listing | None:
        """Return which part of the agent's list to read now."""

    async def note_listed(self, agent_id: str, until: float, /) -> None:
        """Note how far the list was read."""

    async def find(self, conversation_ids: Sequence[str], /) -> list[IssuedPass]:
        """Return the passes behind these conversations."""

    async def never_opened(self, agent_id: str, most: int, /, *, min_age_seconds: float) -> list[IssuedPass]:
        """Return passes that are too old to be opened and whose conversations are not in the list."""

    async def due(self, most: int, /, *, after: float, min_age_seconds: float) -> list[IssuedPass]:
        """Return old unsettled passes reserved after `after`, oldest first."""


class Provider(Protocol):
    """Raises an ElevenLabsRefusal or Overloaded when it does not answer."""

    async def conversation(self, agent_base_url: str, conversation_id: str, /) -> Mapping[str, object]:
        """Return ElevenLabs' account of a conversation, or raise ConversationUnknown."""

    async def conversations(
        self, agent_base_url: str, agent_id: str, /, *, since: float, until: float, cursor: str
    ) -> ConversationsPage:
        """Return a page of the agent's conversations that began in this time."""


class Reconciler:
    """Settles in rounds, on one instance at a time.

    `base_urls`: the ElevenLabs host of each agent's id. `conversation_seconds`: the longest that one may last.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        provider: Provider,
        settlements: Settlements,
        base_urls: Mapping[str, str],
        every_seconds: float,
        conversation_seconds: int,
        clock: Clock,
    ) -> None:
        self._ledger = ledger
        self._provider = provider
        self._settlements = settlements
        self._base_urls = base_urls
        self._every_seconds = every_seconds
        # The list is read again for conversations that began so recently; older ones are asked about one by one.
        self._recent_seconds = max(MIN_RECENT_SECONDS, conversation_seconds + LIST_SECONDS + RECENT_SPARE_SECONDS)
        self._clock = clock
        self._asked_until = 0.0

    def running(self) -> AbstractAsyncContextManager[None]:
        """Hold a round every so often until the block ends."""
        return repeating(
            self._every_seconds, self.round, report=lambda cause: _log.error("reconciler.failed", cause=cause)
        )

    async def round(self) -> None:
        """Settle what can be settled now, unless another instance does. It is over before its lease is."""
        usual_seconds = self._every_seconds * 0.9  # then no other instance holds a round before the next one is due
        lease_seconds = max(usual_seconds, MIN_LEASE_SECONDS)
        ticks = asyncio.get_running_loop().time
        began = ticks()
        try:
            async with asyncio.timeout(lease_seconds):
                if await self._ledger.lease(_LEASE, lease_seconds):
                    await self._reconcile()
                    left_seconds = max(0.0, usual_seconds - (ticks() - began))
                    await self._ledger.end_lease(_LEASE, after_seconds=left_seconds)
        except TimeoutError:
            _log.warning("reconciler.cut_short", after_seconds=lease_seconds)
        except LedgerUnavailable as refusal:
            _log.warning("reconciler.stopped", code=refusal.code, note=refusal.operator_note)

    async def _reconcile(self) -> None:
        outcomes: Counter[str] = Counter()
        silent: set[str] = set()
        for agent_id, base_url in self._base_urls.items():
            if base_url not in silent:
                await self._unless_refused(self._read_list(agent_id, base_url, outcomes), silent, base_url)
        due = await self._ledger.due(CALLS_PER_ROUND, after=self._asked_until, min_age_seconds=self._recent_seconds)
        # Each round goes on where the last one ended: a conversation that stays open must not keep others waiting.
        self._asked_until = due[-1].reserved_at if len(due) == CALLS_PER_ROUND else 0.0
        for issued in due:
            base_url = self._base_urls.get(issued.agent_id, "")
            if base_url not in silent:
                await self._unless_refused(self._ask(issued, base_url, outcomes), silent, base_url)
        if outcomes:
            _log.info("passes.reconciled", **outcomes)

    async def _unless_refused(self, step: Awaitable[None], silent: set[str], base_url: str) -> None:
        """Take a step; a host that refuses is asked no more in this round."""
        try:
            await step
        except LedgerUnavailable:
            raise
        except Refusal as refusal:
            silent.add(base_url)
            _log.warning("reconciler.stopped", host=base_url, code=refusal.code, note=_remedy(refusal))

    async def _read_list(self, agent_id: str, base_url: str, outcomes: Counter[str]) -> None:
        """Read the list where it may tell something new, then release what is too old to be opened and not in it."""
        listing = await self._ledger.begin_listing(
            agent_id, every_seconds=LIST_SECONDS, recent_seconds=self._recent_seconds
        )
        if listing is not None:
            since = listing.since
            while since < listing.until:
                until = min(since + _WINDOW_SECONDS, listing.until)
                await self._read_window(agent_id, base_url, Listing(since=since, until=until), outcomes)
                await self._ledger.note_listed(agent_id, until)
                since = until
        has_released = True
        while has_released:
            unopened = await self._ledger.never_opened(agent_id, _AT_ONCE, min_age_seconds=NEVER_OPENED_SECONDS)
            has_released = await self._record([(each, _unopened(each)) for each in unopened], outcomes)

    async def _read_window(self, agent_id: str, base_url: str, window: Listing, outcomes: Counter[str]) -> None:
        """Record every conversation that began in the window. Raises BadAnswer where the list does not end."""
        cursors = {""}
        cursor = ""
        for _ in range(_MAX_PAGES):
            page = await self._provider.conversations(
                base_url, agent_id, since=window.since, until=window.until, cursor=cursor
            )
            await self._record_page(page, outcomes)
            cursor = page.next_cursor
            if not cursor:
                return
            if cursor in cursors:
                break
            cursors.add(cursor)
        raise BadAnswer(operator_note="ElevenLabs' list of conversations does not end: its pages repeat")

    async def _record_page(self, page: ConversationsPage, outcomes: Counter[str]) -> None:
        accounts = {
            account.conversation_id: account
            for row in page.rows
            if (account := read_row(row, source="reconciler")) is not None
        }
        issued = await self._ledger.find(list(accounts)[:MOST_FOUND])
        unsettled = [(each, accounts[each.conversation_id or ""]) for each in issued if _is_unsettled(each)]
        await self._record(unsettled, outcomes)

    async def _record(self, told: Sequence[tuple[IssuedPass, Account]], outcomes: Counter[str]) -> bool:
        """Record what ElevenLabs says of these passes; return whether that changed any of them."""
        recorded: list[Outcome] = []
        for start in range(0, len(told), _AT_ONCE):
            some = told[start : start + _AT_ONCE]
            recorded += await asyncio.gather(*(self._settlements.record(*each) for each in some))
        outcomes.update(recorded)
        return any(outcome is not Outcome.LEFT for outcome in recorded)

    async def _ask(self, issued: IssuedPass, base_url: str, outcomes: Counter[str]) -> None:
        """Ask about one conversation, and record the answer; after a day without one, what was reserved counts."""
        conversation_id = issued.conversation_id or ""
        account: Account | None = None
        try:
            if base_url:  # else the agent is no longer configured, and nobody can be asked
                answer = await self._provider.conversation(base_url, conversation_id)
                account = read_account(conversation_id, answer, source="reconciler")
        except ConversationUnknown:
            account = _unopened(issued)
        except BadAnswer as refusal:
            _log.warning("conversation.unreadable", conversation_id=conversation_id, note=refusal.operator_note)
        outcome = Outcome.LEFT if account is None else await self._settlements.record(issued, account)
        if outcome is Outcome.LEFT and self._clock() - issued.reserved_at >= UNACCOUNTED_SECONDS:
            _log.warning("conversation.unaccounted", conversation_id=conversation_id, seconds=issued.seconds)
            in_full = Settlement(
                conversation_id=conversation_id, seconds=issued.seconds, cost=None, user_id=None, source="reconciler"
            )
            await self._settlements.settle(in_full)
            outcome = Outcome.SETTLED
        outcomes[outcome] += 1


def _unopened(issued: IssuedPass) -> Account:
    return Account(conversation_id=issued.conversation_id or "", status=Status.UNOPENED)


def _is_unsettled(issued: IssuedPass) -> bool:
    return issued.settled_at is None or issued.settled_by == "expiry"


def _remedy(refusal: Refusal) -> str:
    if isinstance(refusal, KeyRejected):
        return f"{refusal.operator_note}; or set VOICEPASS_RECONCILE_SECONDS=0 and rely on the webhook alone"
    return refusal.operator_note
