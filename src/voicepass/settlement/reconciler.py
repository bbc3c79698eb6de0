"""Settles what no webhook reported: reads ElevenLabs' list of conversations, and asks for single ones that it lacks."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from voicepass.elevenlabs import ElevenLabs
from voicepass.errors import BadAnswer, ElevenLabsRefusal, KeyRejected, LedgerUnavailable, Overloaded
from voicepass.ledger import Ledger
from voicepass.model import Clock, IssuedPass, Settlement
from voicepass.settlement import NEVER_OPENED_SECONDS, Outcome, Settlements, run_periodically
from voicepass.settlement.reports import Report, Status, fetch_report, parse_row
from voicepass.telemetry.logger import Logger

LIST_SECONDS: Final = 210.0
"""The first round after this time reads the list: with a round a minute, every fourth round, even if rounds are not
exactly on time. A reading costs one call for 100 conversations that began since the last reading."""
LIST_LAG_SECONDS: Final = 15.0
"""ElevenLabs' list may lack a conversation that began less than this ago."""
MIN_RECENT_SECONDS: Final = 20 * 60.0
RECENT_SPARE_SECONDS: Final = 60.0
CALLS_PER_ROUND: Final = 20
"""A round asks for this many single conversations at most."""
UNACCOUNTED_SECONDS: Final = 24 * 3600
"""If a day of answers has not settled a pass, its reserved time counts as used, and voicepass stops asking."""
MIN_LEASE_SECONDS: Final = 120.0
"""A round may take this time, even if rounds follow one another faster."""

MAX_ROWS: Final = 200
"""voicepass asks the ledger about this many rows at once. ElevenLabs sends 100 on a page."""

_WINDOW_SECONDS: Final = 1800.0  # The ledger saves the progress after each window, so a long backlog is read once.
_RELEASED_AT_ONCE: Final = 100
_LEASE: Final = "reconciler"

_log = Logger("voicepass.settlement")


@dataclass(kw_only=True, eq=False)
class Reconciler:
    """Settles in rounds, on one instance at a time.

    `base_urls`: the ElevenLabs host of each agent's id. `conversation_seconds`: the longest allowed conversation.
    """

    ledger: Ledger
    provider: ElevenLabs
    settlements: Settlements
    base_urls: Mapping[str, str]
    every_seconds: float
    conversation_seconds: int
    clock: Clock
    _asked_until: float = field(default=0.0, init=False)
    _outcomes: Counter[str] = field(default_factory=Counter, init=False)
    """What this round has changed."""
    _failed_hosts: set[str] = field(default_factory=set, init=False)

    @property
    def _recent_seconds(self) -> float:
        """The list covers conversations that began so recently. voicepass asks for each older one."""
        return max(MIN_RECENT_SECONDS, self.conversation_seconds + LIST_SECONDS + RECENT_SPARE_SECONDS)

    def run(self) -> AbstractAsyncContextManager[None]:
        """Hold a round every `every_seconds` until the block ends."""
        return run_periodically(self.every_seconds, self.run_round, on_failure=partial(_log.error, "reconciler.failed"))

    async def run_round(self) -> None:
        """Settle what can be settled now, unless another instance does. The round ends before its lease ends."""
        usual_seconds = self.every_seconds * 0.9  # Then no other instance holds a round before the next one.
        lease_seconds = max(usual_seconds, MIN_LEASE_SECONDS)
        began_at = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(lease_seconds):
                if not await self.ledger.take_lease(_LEASE, lease_seconds):
                    return
                left_seconds = 0.0  # After a failure, the next round of any instance may try at once.
                try:
                    await self._reconcile()
                    left_seconds = max(0.0, usual_seconds - (asyncio.get_running_loop().time() - began_at))
                finally:
                    await self.ledger.end_lease(_LEASE, after_seconds=left_seconds)
        except TimeoutError:
            _log.warning("reconciler.cut_short", after_seconds=lease_seconds)
        except LedgerUnavailable as refusal:
            _log.warning("reconciler.stopped", code=refusal.code, note=refusal.operator_note)

    async def _reconcile(self) -> None:
        self._outcomes.clear()
        self._failed_hosts.clear()
        for agent_id, base_url in self.base_urls.items():
            await self._try(base_url, partial(self._read_list, agent_id, base_url))
        unsettled = await self.ledger.list_unsettled(
            CALLS_PER_ROUND, after=self._asked_until, min_age_seconds=self._recent_seconds
        )
        # The next round continues here, so that a conversation that stays open does not delay the others.
        self._asked_until = unsettled[-1].reserved_at if len(unsettled) == CALLS_PER_ROUND else 0.0
        for issued in unsettled:
            base_url = self.base_urls.get(issued.agent_id, "")
            await self._try(base_url, partial(self._ask, issued, base_url))
        if self._outcomes:
            _log.info("passes.reconciled", **self._outcomes)

    async def _try(self, base_url: str, step: Callable[[], Awaitable[None]]) -> None:
        """Take a step. After a refusal, this round does not ask the host again."""
        if base_url in self._failed_hosts:
            return
        try:
            await step()
        except (ElevenLabsRefusal, Overloaded) as refusal:
            self._failed_hosts.add(base_url)
            note = refusal.operator_note
            if isinstance(refusal, KeyRejected):
                note += "; or set VOICEPASS_RECONCILE_SECONDS=0 and rely on the webhook alone"
            _log.warning("reconciler.stopped", host=base_url, code=refusal.code, note=note)

    async def _read_list(self, agent_id: str, base_url: str) -> None:
        """Read the agent's list if it is time. Then release each pass that is too old to be opened and not listed."""
        recent_seconds = self._recent_seconds
        age = await self.ledger.begin_listing(agent_id, every_seconds=LIST_SECONDS, recent_seconds=recent_seconds)
        if age is not None:
            since, end = self.clock() - age, self.clock() - LIST_LAG_SECONDS
            while since < end:
                until = min(since + _WINDOW_SECONDS, end)
                await self._read_window(agent_id, base_url, since, until)
                await self.ledger.note_listed(agent_id, self.clock() - until)
                since = until
        has_released = True
        while has_released:
            unopened = await self.ledger.list_never_opened(
                agent_id, _RELEASED_AT_ONCE, min_age_seconds=NEVER_OPENED_SECONDS
            )
            has_released = False
            for issued in unopened:
                report = Report(conversation_id=issued.conversation_id or "", status=Status.UNOPENED)
                outcome = await self._apply(issued, report)
                has_released = has_released or outcome is not Outcome.LEFT

    async def _read_window(self, agent_id: str, base_url: str, since: float, until: float) -> None:
        """Apply the report of every conversation that began in the window. Raises BadAnswer if the list is endless."""
        read_page = partial(self.provider.list_conversations, base_url, agent_id, since=since, until=until)
        cursors: set[str] = set()
        cursor = ""
        while cursor not in cursors:
            cursors.add(cursor)
            rows, cursor = await read_page(cursor=cursor)
            for start in range(0, len(rows), MAX_ROWS):
                await self._apply_rows(rows[start : start + MAX_ROWS])
            if not cursor:
                return
        raise BadAnswer(operator_note="ElevenLabs' list of conversations does not end: its pages repeat")

    async def _apply_rows(self, rows: Sequence[Mapping[str, object]]) -> None:
        parsed = [parse_row(row, source="reconciler") for row in rows]
        reports = {report.conversation_id: report for report in parsed if report is not None}
        for issued in await self.ledger.find(list(reports)):
            report = reports.pop(issued.conversation_id or "")
            if issued.settled_at is None or issued.settled_by == "expiry":
                await self._apply(issued, report)
        for report in reports.values():
            self.settlements.bypasses.report(report, reason="not_issued")

    async def _apply(self, issued: IssuedPass, report: Report) -> Outcome:
        outcome = await self.settlements.apply(issued, report)
        self._outcomes[outcome] += 1
        return outcome

    async def _ask(self, issued: IssuedPass, base_url: str) -> None:
        """Ask for one conversation and apply the answer. After a day without one, charge the reserved time."""
        conversation_id = issued.conversation_id or ""
        outcome = Outcome.LEFT
        try:
            if base_url:  # Otherwise the agent is no longer configured, and voicepass can ask nobody.
                report = await fetch_report(self.provider, base_url, issued, source="reconciler")
                outcome = await self.settlements.apply(issued, report)
        except BadAnswer as refusal:
            _log.warning("conversation.unreadable", conversation_id=conversation_id, note=refusal.operator_note)
        if outcome is Outcome.LEFT and self.clock() - issued.reserved_at >= UNACCOUNTED_SECONDS:
            _log.warning("conversation.unaccounted", conversation_id=conversation_id, seconds=issued.seconds)
            await self.settlements.settle(
                Settlement(conversation_id=conversation_id, seconds=issued.seconds, source="reconciler")
            )
            outcome = Outcome.SETTLED
        self._outcomes[outcome] += 1
