"""What a conversation really used. ElevenLabs says so in a signed webhook, in its list, or when voicepass asks.

None of them decides who pays: minutes are charged to the user whom the conversation was issued to. Whatever arrives
late, twice or in another order ends in the same ledger. Until ElevenLabs says it, the longest allowed time counts.
"""

import asyncio
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from voicepass.model import Clock, IssuedPass, Settlement

NEVER_OPENED_SECONDS: Final = 15.5 * 60
"""A pass can be opened for 15 minutes; the rest is for clocks that differ."""

_MAX_SECONDS: Final = 24 * 3600  # of a conversation: more is a mistake, and would lock its user out for good
_MAX_COUNT: Final = 2**31 - 1  # an INTEGER of PostgreSQL
_MAX_INSTANT: Final = 2**40  # seconds since the epoch
_UNSTORABLE: Final = re.compile("[\0\ud800-\udfff]")
_MAX_USER_ID_CHARACTERS: Final = 256  # no user that we issue to has so long an id


class Ledger(Protocol):
    """Every method raises LedgerUnavailable when it does not answer in time."""

    async def settle(self, settlement: Settlement, /) -> IssuedPass | None:
        """Return the pass if this settled it; None if it was settled before or is unknown (yet)."""

    async def expire(self, conversation_id: str, /, *, min_age_seconds: float) -> bool:
        """Release a pass that nobody opened and that is so old; return whether this released it."""

    async def note_opened(self, conversation_id: str, opened_at: float, /) -> bool:
        """Note that a conversation is open."""

    async def note_ended(self, conversation_id: str, /) -> bool:
        """Note that a conversation has ended; return whether it counted as open until now."""


class Status(StrEnum):
    """What is known of a conversation."""

    UNOPENED = "unopened"
    OPEN = "open"
    ENDED = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """ElevenLabs' account of a conversation. `settlement` is there once it has ended and says how long it was.

    `started_at`: seconds since the epoch, None where ElevenLabs does not say.
    """

    conversation_id: str
    status: Status
    started_at: float | None = None
    settlement: Settlement | None = None


class Outcome(StrEnum):
    """What an account did to a pass. The first three make its user's limits free again."""

    SETTLED = "settled"
    ENDED = "ended"
    EXPIRED = "expired"
    LEFT = "left"


Observer = Callable[[IssuedPass], None]
"""Is shown every pass when it has been settled. Must be quick and must not raise."""


def read_account(conversation_id: str, account: Mapping[str, object], *, source: str) -> Account:
    """Read the account of one conversation (`GET /v1/convai/conversations/{id}`). An unknown status means open."""
    metadata = account.get("metadata")
    started_at = metadata.get("start_time_unix_secs") if isinstance(metadata, dict) else None
    settlement = read_settlement(conversation_id, account, source=source)
    return _account(conversation_id, account.get("status"), started_at, settlement)


def read_row(row: Mapping[str, object], *, source: str) -> Account | None:
    """Read a row of the list of conversations; None where it names none."""
    conversation_id = row.get("conversation_id")
    if not isinstance(conversation_id, str):
        return None
    seconds = _seconds(row.get("call_duration_secs"))
    settlement = None
    if seconds is not None:
        settlement = Settlement(
            conversation_id=conversation_id, seconds=seconds, cost=_count(row.get("cost")), user_id=None, source=source
        )
    return _account(conversation_id, row.get("status"), row.get("start_time_unix_secs"), settlement)


def read_settlement(conversation_id: str, account: Mapping[str, object], *, source: str) -> Settlement | None:
    """Read how long a conversation was and what it cost; None where its account does not say how long."""
    metadata = account.get("metadata")
    if not isinstance(metadata, dict):
        return None
    seconds = _seconds(metadata.get("call_duration_secs"))
    if seconds is None:
        return None
    user_id = account.get("user_id")
    return Settlement(
        conversation_id=conversation_id,
        seconds=seconds,
        cost=_count(metadata.get("cost")),
        user_id=_storable(user_id) if isinstance(user_id, str) and user_id else None,
        source=source,
    )


def _account(conversation_id: str, status: object, started_at: object, settlement: Settlement | None) -> Account:
    started = float(started_at) if isinstance(started_at, int | float) and 0 < started_at < _MAX_INSTANT else None
    match status:
        case "done" | "failed":
            return Account(
                conversation_id=conversation_id, status=Status.ENDED, started_at=started, settlement=settlement
            )
        case "processing":  # its figures are not final yet
            return Account(conversation_id=conversation_id, status=Status.ENDED, started_at=started)
        case "initiated":
            return Account(conversation_id=conversation_id, status=Status.UNOPENED)
        case _:
            return Account(conversation_id=conversation_id, status=Status.OPEN, started_at=started)


def _count(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MAX_COUNT:
        return None  # NaN is in no range
    return math.ceil(value)


def _seconds(value: object) -> int | None:
    seconds = _count(value)
    return seconds if seconds is not None and seconds <= _MAX_SECONDS else None


def _storable(user_id: str) -> str:
    """Keep what the browser made up within what both databases can hold; no issued id is changed by it."""
    return _UNSTORABLE.sub("\ufffd", user_id[:_MAX_USER_ID_CHARACTERS])


class Settlements:
    """Writes what ElevenLabs says of conversations into the ledger, and tells the observers of each settlement."""

    def __init__(self, *, ledger: Ledger, observers: Sequence[Observer], clock: Clock) -> None:
        self._ledger = ledger
        self._observers = observers
        self._clock = clock

    async def settle(self, settlement: Settlement) -> None:
        """Close a conversation; one that was closed before, or is unknown, is no fault of the teller."""
        settled = await self._ledger.settle(settlement)
        if settled is not None:
            for observe in self._observers:
                observe(settled)

    async def record(self, account: Account) -> Outcome:
        """Settle, end, open or release the pass of a conversation, and say which. To do so twice changes nothing."""
        conversation_id = account.conversation_id
        if account.settlement is not None:
            await self.settle(account.settlement)
            return Outcome.SETTLED
        match account.status:
            case Status.ENDED:
                return Outcome.ENDED if await self._ledger.note_ended(conversation_id) else Outcome.LEFT
            case Status.UNOPENED:
                has_expired = await self._ledger.expire(conversation_id, min_age_seconds=NEVER_OPENED_SECONDS)
                return Outcome.EXPIRED if has_expired else Outcome.LEFT
            case Status.OPEN:
                await self._ledger.note_opened(conversation_id, account.started_at or self._clock())
                return Outcome.LEFT


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
