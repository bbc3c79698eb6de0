"""What a conversation really used. ElevenLabs says so in a signed webhook, in its list, or when voicepass asks.

None of them decides who pays: minutes are charged to the user whom the conversation was issued to. Whatever arrives
late, twice or in another order ends in the same ledger. Until ElevenLabs says it, the longest allowed time counts.
"""

import asyncio
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

import structlog

from voicepass.ledger.rules import is_of_another_agent
from voicepass.model import Clock, IssuedPass, Settlement

NEVER_OPENED_SECONDS: Final = 15.5 * 60
"""A pass can be opened for 15 minutes; the rest is for clocks that differ."""

CONVERSATION_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)

_MAX_SECONDS: Final = 24 * 3600  # of a conversation: more is a mistake, and would lock its user out for good
_MAX_COUNT: Final = 2**31 - 1  # an INTEGER of PostgreSQL
_MAX_INSTANT: Final = 2**40  # seconds since the epoch
_UNSTORABLE: Final = re.compile("[\0\ud800-\udfff]")
_MAX_USER_ID_CHARACTERS: Final = 256  # no user that we issue to has so long an id

_log = structlog.get_logger("voicepass.settlement")


class Ledger(Protocol):
    """Every method raises LedgerUnavailable when it does not answer in time."""

    async def settle(self, settlement: Settlement, /) -> IssuedPass | None:
        """Return the pass if this settled it; None if it was settled before or is unknown (yet)."""

    async def note_unopened(self, conversation_id: str, /, *, expires_seconds: float) -> bool:
        """Note that nobody has opened a conversation; return whether its pass was so old that this released it."""

    async def find(self, conversation_ids: Sequence[str], /) -> list[IssuedPass]:
        """Return the passes behind these conversations."""

    async def note_opened(self, conversation_id: str, opened_at: float, /) -> bool:
        """Note that a conversation is open."""

    async def note_ended(self, conversation_id: str, /) -> bool:
        """Note that a conversation has ended; return whether it counted as open until now."""


class Status(StrEnum):
    """What is known of a conversation."""

    UNOPENED = "unopened"
    OPEN = "open"
    ENDED = "ended"


_STATUSES: Final = {
    "initiated": Status.UNOPENED,
    "processing": Status.ENDED,
    "done": Status.ENDED,
    "failed": Status.ENDED,
}
"""What ElevenLabs' statuses mean; any other means open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """ElevenLabs' account of a conversation. `settlement` is there once it has ended and says how long it was.

    `started_at`: seconds since the epoch, None where ElevenLabs does not say.
    """

    conversation_id: str
    status: Status
    agent_id: str | None = None
    started_at: float | None = None
    settlement: Settlement | None = None


class Outcome(StrEnum):
    """What an account did to a pass. The first three make its user's limits free again."""

    SETTLED = "settled"
    ENDED = "ended"
    EXPIRED = "expired"
    LEFT = "left"


Observer = Callable[[IssuedPass], None]
"""Is shown every pass when it has been settled. Must be quick; what it raises changes nothing."""


def read_account(conversation_id: str, account: Mapping[str, object], *, source: str) -> Account:
    """Read the account of one conversation (`GET /v1/convai/conversations/{id}`). An unknown status means open."""
    metadata = account.get("metadata")
    started_at = metadata.get("start_time_unix_secs") if isinstance(metadata, dict) else None
    settlement = read_settlement(conversation_id, account, source=source)
    return _account(conversation_id, account, started_at, settlement)


def read_row(row: Mapping[str, object], *, source: str) -> Account | None:
    """Read a row of the list of conversations; None where it names none."""
    conversation_id = row.get("conversation_id")
    if not isinstance(conversation_id, str) or not CONVERSATION_ID.fullmatch(conversation_id):
        return None
    seconds = _seconds(row.get("call_duration_secs"))
    settlement = None
    if seconds is not None:
        settlement = Settlement(
            conversation_id=conversation_id, seconds=seconds, cost=_count(row.get("cost")), user_id=None, source=source
        )
    return _account(conversation_id, row, row.get("start_time_unix_secs"), settlement)


def read_settlement(conversation_id: str, account: Mapping[str, object], *, source: str) -> Settlement | None:
    """Read how long a conversation was and what it cost; None where its account does not say how long."""
    metadata = account.get("metadata")
    if not isinstance(metadata, dict):
        return None
    seconds = _seconds(metadata.get("call_duration_secs"))
    if seconds is None:
        return None
    sent = account.get("conversation_initiation_client_data")
    variables = sent.get("dynamic_variables") if isinstance(sent, dict) else None
    return Settlement(
        conversation_id=conversation_id,
        seconds=seconds,
        cost=_count(metadata.get("cost")),
        user_id=_user_id(account.get("user_id")),
        variable_user_id=_user_id(variables.get("user_id")) if isinstance(variables, dict) else None,
        agent_id=read_agent_id(account),
        source=source,
    )


def _account(
    conversation_id: str, answer: Mapping[str, object], started_at: object, settlement: Settlement | None
) -> Account:
    status = str(answer.get("status"))  # it may be anything
    is_final = status in {"done", "failed"}  # the figures of "processing" are not
    return Account(
        conversation_id=conversation_id,
        status=_STATUSES.get(status, Status.OPEN),
        agent_id=read_agent_id(answer),
        started_at=float(started_at) if isinstance(started_at, int | float) and 0 < started_at < _MAX_INSTANT else None,
        settlement=settlement if is_final else None,
    )


def _count(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MAX_COUNT:
        return None  # NaN is in no range
    return math.ceil(value)


def _seconds(value: object) -> int | None:
    seconds = _count(value)
    return seconds if seconds is not None and seconds <= _MAX_SECONDS else None


def read_agent_id(account: Mapping[str, object]) -> str | None:
    """Return which agent an account or a row of the list is about; None where it does not say."""
    agent_id = account.get("agent_id")
    return _UNSTORABLE.sub("\ufffd", agent_id[:_MAX_USER_ID_CHARACTERS]) if isinstance(agent_id, str) else None


def _user_id(claimed: object) -> str | None:
    """Keep what the browser made up within what both databases can hold; no issued id is changed by it."""
    if isinstance(claimed, int | float) and not isinstance(claimed, bool):
        claimed = str(claimed)
    if not isinstance(claimed, str) or not claimed:
        return None
    return _UNSTORABLE.sub("\ufffd", claimed[:_MAX_USER_ID_CHARACTERS])


class Settlements:
    """Writes what ElevenLabs says of conversations into the ledger, and tells the observers of each settlement."""

    def __init__(self, *, ledger: Ledger, observers: Sequence[Observer], clock: Clock) -> None:
        self._ledger = ledger
        self._observers = observers
        self._clock = clock

    async def settle(self, settlement: Settlement) -> None:
        """Close a conversation. It is not an error if it was closed before, or is unknown."""
        settled = await self._ledger.settle(settlement)
        if settled is not None:
            for observe in self._observers:
                with suppress(Exception):  # it is settled; `observe.Isolated` logs the mistake
                    observe(settled)
            return
        for issued in await self._ledger.find([settlement.conversation_id]):
            self._check_agent(issued, settlement.agent_id)

    async def record(self, issued: IssuedPass, account: Account) -> Outcome:
        """Settle, end, open or release a pass, and say which. To do so twice changes nothing."""
        if not self._check_agent(issued, account.agent_id):
            return Outcome.LEFT
        conversation_id = account.conversation_id
        if account.settlement is not None:
            await self.settle(account.settlement)
            return Outcome.SETTLED
        match account.status:
            case Status.ENDED:
                return Outcome.ENDED if await self._ledger.note_ended(conversation_id) else Outcome.LEFT
            case Status.UNOPENED:
                has_expired = await self._ledger.note_unopened(conversation_id, expires_seconds=NEVER_OPENED_SECONDS)
                return Outcome.EXPIRED if has_expired else Outcome.LEFT
            case Status.OPEN:
                await self._ledger.note_opened(conversation_id, account.started_at or self._clock())
                return Outcome.LEFT

    def _check_agent(self, issued: IssuedPass, told_agent_id: str | None) -> bool:
        """Tell whether ElevenLabs tells of the agent that the pass was issued for; log it where it does not."""
        is_right = not is_of_another_agent(issued.agent_id, told_agent_id)
        if not is_right:
            _log.warning(
                "conversation.wrong_agent",
                conversation_id=issued.conversation_id,
                agent=issued.agent_alias,
                note="ElevenLabs tells of another agent than the pass was issued for: nothing is settled",
            )
        return is_right


@asynccontextmanager
async def repeating(
    every_seconds: float, act: Callable[[], Awaitable[None]], *, report: Callable[[str], None]
) -> AsyncIterator[None]:
    """Call `act` every so often until the block ends; `report` is told the type of whatever it raises.

    The time that `act` takes does not delay the next call, unless it takes longer than `every_seconds`.
    """

    async def repeat() -> None:
        loop = asyncio.get_running_loop()
        next_at = loop.time() + every_seconds
        while True:
            await asyncio.sleep(next_at - loop.time())
            try:
                await act()
            except Exception as error:  # noqa: BLE001 - the edge: the next time may go better
                report(type(error).__name__)
            next_at = max(next_at + every_seconds, loop.time())

    task = asyncio.create_task(repeat())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
