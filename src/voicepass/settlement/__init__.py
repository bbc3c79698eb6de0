"""Finds out what each conversation really used, and writes it into the ledger.

Read in this order: `reports` parses what ElevenLabs reports. `Settlements` below writes it into the ledger, and
`Bypasses` warns of conversations without a pass. Three modules get reports: `webhook` receives them, `lookup` asks
before voicepass refuses a user, and `reconciler` asks for what no webhook reported. `retention` deletes old data.

A report never decides who pays: minutes are charged to the user to whom voicepass issued the conversation. Late,
repeated and reordered reports lead to the same ledger. Until ElevenLabs reports, the reserved time counts.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from voicepass.ledger import Ledger
from voicepass.ledger.rules import is_of_another_agent
from voicepass.model import Clock, IssuedPass, Settlement
from voicepass.settlement.reports import Report, Status
from voicepass.telemetry.logger import Logger

NEVER_OPENED_SECONDS: Final = 15.5 * 60
"""A pass can be opened for 15 minutes. The other 30 seconds are for clocks that differ."""

OPEN_METHODS: Final = frozenset({"public", "shareable_link"})
"""ElevenLabs' authorization methods with which anyone can begin a conversation."""

_MAX_REMEMBERED: Final = 10_000
_WRITES_AT_ONCE: Final = 5  # half of an instance's connections to the ledger

_log = Logger("voicepass.settlement")


class Outcome(StrEnum):
    """What a report changed about a pass. The first three free its user's limits."""

    SETTLED = "settled"
    ENDED = "ended"
    EXPIRED = "expired"
    LEFT = "left"


Observer = Callable[[IssuedPass], None]
"""Gets every pass that is settled. It must be quick. Its exceptions change nothing."""


class Bypasses:
    """Logs and counts conversations of our agents that began without a pass: nobody checked their user.

    Each is reported once for each process. `count` gets the reason.
    """

    def __init__(self, *, agent_ids: Collection[str], count: Callable[[str], None]) -> None:
        self._agent_ids = agent_ids
        self._count = count
        self._reported: OrderedDict[str, None] = OrderedDict()  # The list names a conversation several times.

    def check_method(self, report: Report) -> None:
        """Report a conversation of one of our agents that anyone could begin."""
        if report.agent_id in self._agent_ids and report.authorization_method in OPEN_METHODS:
            self.report(report, reason=report.authorization_method)

    def report(self, report: Report, *, reason: str) -> None:
        """Log and count a conversation, unless this process has reported it before."""
        if report.conversation_id in self._reported:
            return
        self._reported[report.conversation_id] = None
        if len(self._reported) > _MAX_REMEMBERED:
            self._reported.popitem(last=False)
        self._count(reason)
        _log.warning(
            "conversation.bypassed",
            conversation_id=report.conversation_id,
            agent_id=report.agent_id,
            reason=reason,
            note="this conversation began without a pass, so no limit counts it: enable authentication for the agent, "
            "revoke its shareable link, and look for other holders of an API key",
        )


@dataclass(kw_only=True, eq=False)
class Settlements:
    """Writes reports into the ledger, and shows each settled pass to the observer."""

    ledger: Ledger
    observe: Observer
    bypasses: Bypasses
    clock: Clock
    _writes: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_WRITES_AT_ONCE), init=False)

    async def settle(self, settlement: Settlement) -> None:
        """Settle a conversation. Nothing happens if it was settled before, or is unknown."""
        settled = await self.ledger.settle(settlement)
        if settled is not None:
            with suppress(Exception):  # the settlement stands
                self.observe(settled)
            return
        for issued in await self.ledger.find([settlement.conversation_id]):
            self._check_agent(issued, settlement.agent_id)

    async def apply(self, issued: IssuedPass, report: Report) -> Outcome:
        """Settle, end, open or release a pass as its report says. A second call changes nothing."""
        self.bypasses.check_method(report)
        if not self._check_agent(issued, report.agent_id):
            return Outcome.LEFT
        conversation_id = report.conversation_id
        async with self._writes:
            match report.status:
                case Status.DONE if report.settlement is not None:
                    await self.settle(report.settlement)
                    return Outcome.SETTLED
                case Status.DONE | Status.ENDED:
                    return Outcome.ENDED if await self.ledger.note_ended(conversation_id) else Outcome.LEFT
                case Status.UNOPENED:
                    released = await self.ledger.note_unopened(conversation_id, expires_seconds=NEVER_OPENED_SECONDS)
                    return Outcome.EXPIRED if released else Outcome.LEFT
                case Status.OPEN:
                    age_seconds = 0.0 if report.started_at is None else self.clock() - report.started_at
                    await self.ledger.note_opened(conversation_id, age_seconds)
                    return Outcome.LEFT

    def _check_agent(self, issued: IssuedPass, reported_agent_id: str | None) -> bool:
        """Return whether the report is about the agent that the pass was issued for. Log if it is not."""
        if not is_of_another_agent(issued.agent_id, reported_agent_id):
            return True
        _log.warning(
            "conversation.wrong_agent",
            conversation_id=issued.conversation_id,
            agent=issued.agent_alias,
            note="ElevenLabs reports another agent than the pass was issued for: nothing is settled",
        )
        return False


@asynccontextmanager
async def run_periodically(
    every_seconds: float, act: Callable[[], Awaitable[None]], *, on_failure: Callable[..., None]
) -> AsyncIterator[None]:
    """Call `act` every `every_seconds` until the block ends.

    A slow `act` does not delay the next call, unless it takes longer than `every_seconds`. `on_failure` gets the type
    of each exception as `cause`.
    """

    async def repeat() -> None:
        loop = asyncio.get_running_loop()
        next_at = loop.time() + every_seconds
        while True:
            await asyncio.sleep(next_at - loop.time())
            try:
                await act()
            except Exception as error:  # noqa: BLE001 - the next call may succeed
                on_failure(cause=type(error).__name__)
            next_at = max(next_at + every_seconds, loop.time())

    task = asyncio.create_task(repeat())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
