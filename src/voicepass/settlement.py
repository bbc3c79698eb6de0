"""What a conversation really used: ElevenLabs tells it by a signed webhook; where none came, the reconciler asks.

Neither is believed about who spoke: minutes are charged to the user the conversation was issued to. Whatever comes
late, twice or in another order ends in the same ledger. Until ElevenLabs tells, the longest that was allowed counts.
"""

import asyncio
import hashlib
import hmac
import json
import math
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final, Protocol

import structlog

from voicepass.errors import (
    BadAnswer,
    ConversationUnknown,
    ElevenLabsRefusal,
    KeyRejected,
    LedgerUnavailable,
    RequestInvalid,
    SignatureInvalid,
)
from voicepass.model import Clock, IssuedPass, Settlement

MAX_AGE_SECONDS: Final = 30 * 60
"""Of a signature: the tolerance of ElevenLabs' own SDKs, as long as a late delivery may take."""
MAX_AHEAD_SECONDS: Final = 5 * 60
"""For clocks that differ. The SDKs set no bound here."""

CALLS_PER_ROUND: Final = 20
NEVER_OPENED_SECONDS: Final = 16 * 60
"""A pass can be opened for 15 minutes; the rest is for clocks, and for what ElevenLabs writes down late."""
UNACCOUNTED_SECONDS: Final = 24 * 3600
"""A day of answers that tell nothing: then what was set aside counts as used, and ElevenLabs is asked no more."""

_SIGNATURE: Final = re.compile(r"t=([0-9]{1,12}),v0=([0-9a-f]{64})", re.ASCII)
_CONVERSATION_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)
_UNSTORABLE: Final = re.compile("[\0\ud800-\udfff]")
_MAX_USER_ID_CHARACTERS: Final = 256  # no user that we issue to has so long an id
_MAX_COUNT: Final = 2**31 - 1  # an INTEGER of PostgreSQL
_LEASE: Final = "reconciler"

_log = structlog.get_logger("voicepass.settlement")


class Ledger(Protocol):
    """Every method raises LedgerUnavailable when it does not answer in time."""

    async def settle(self, settlement: Settlement, /) -> IssuedPass | None:
        """Return the pass if this settled it; None if it was settled before or is unknown (yet)."""

    async def expire(self, conversation_id: str, /) -> None:
        """Release a pass that was never used."""

    async def due(self, most: int, /, *, after: float) -> list[IssuedPass]:
        """Return unsettled passes reserved after `after` and long enough ago, oldest first."""

    async def lease(self, name: str, seconds: float, /) -> bool:
        """Tell whether this is the caller's alone for that many seconds."""

    async def forget(self, *, age_seconds: int) -> None:
        """Delete what is older."""


class Provider(Protocol):
    """Raises an ElevenLabsRefusal when it does not answer."""

    async def conversation(self, agent_base_url: str, conversation_id: str, /) -> Mapping[str, object]:
        """Return ElevenLabs' account of a conversation, or raise ConversationUnknown."""


Observer = Callable[[IssuedPass], None]
"""Is shown every pass when it has been settled. Must be quick; what it raises changes nothing."""


def verify_signature(header: str, body: bytes, secrets: Sequence[str], now: float) -> None:
    """Raise SignatureInvalid unless ElevenLabs signed `body` with one of `secrets`, not long ago.

    `header` is the value of `ElevenLabs-Signature`, `t=<unix seconds>,v0=<hex>`: the HMAC-SHA256 of `t`, a dot and the
    raw body (documentation, "Post-call webhooks"). It is read as ElevenLabs writes it, and in no other way.
    """
    written = _SIGNATURE.fullmatch(header)
    if written is None:
        raise SignatureInvalid(operator_note="signature refused: none, or not t=<seconds>,v0=<64 hex digits>")
    signed_at, given = written[1], bytes.fromhex(written[2])
    if not now - MAX_AGE_SECONDS <= int(signed_at) <= now + MAX_AHEAD_SECONDS:
        raise SignatureInvalid(operator_note="signature refused: older than 30 minutes, or ahead; is the clock right?")
    signed = signed_at.encode() + b"." + body
    # A key that is empty is one that everybody has.
    made = [hmac.digest(secret.encode(), signed, hashlib.sha256) for secret in secrets if secret]
    if not made:
        raise SignatureInvalid(operator_note="signature refused: ELEVENLABS_WEBHOOK_SECRET is not set")
    if not any([hmac.compare_digest(one, given) for one in made]):  # noqa: C419 - both, whichever fits
        raise SignatureInvalid(operator_note="signature refused: it is not of ELEVENLABS_WEBHOOK_SECRET and this body")


def told(conversation_id: str, account: Mapping[str, object], *, source: str) -> Settlement | None:
    """Read ElevenLabs' account of a conversation; None where it does not tell how long that was."""
    metadata = account.get("metadata")
    if not isinstance(metadata, dict):
        return None
    seconds = _count(metadata.get("call_duration_secs"))
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


def _count(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MAX_COUNT:
        return None  # NaN is in no range
    return math.ceil(value)


def _storable(user_id: str) -> str:
    """Keep what the browser made up within what both databases can hold; no issued id is changed by it."""
    return _UNSTORABLE.sub("\ufffd", user_id[:_MAX_USER_ID_CHARACTERS])


class Settlements:
    """Closes conversations in the ledger, and tells the observers of each that was closed."""

    def __init__(self, *, ledger: Ledger, observers: Sequence[Observer]) -> None:
        self._ledger = ledger
        self._observers = observers

    async def settle(self, settlement: Settlement) -> None:
        """Close a conversation; one that was closed before, or is unknown, is no fault of the teller."""
        settled = await self._ledger.settle(settlement)
        if settled is not None:
            for observe in self._observers:
                with suppress(Exception):  # it is settled; `observe.Isolated` logs the mistake
                    observe(settled)


class Webhook:
    """Takes in ElevenLabs' post-call webhooks. Without a secret it takes in none."""

    def __init__(self, *, settlements: Settlements, secrets: Sequence[str], clock: Clock) -> None:
        self._settlements = settlements
        self._secrets = secrets
        self._clock = clock

    async def receive(self, *, signature: str, body: bytes) -> None:
        """Settle what a `post_call_transcription` tells; other events are taken in and ignored.

        Raises SignatureInvalid, RequestInvalid for a signed body that is no event, and LedgerUnavailable, which is the
        only one that a second delivery can mend.
        """
        verify_signature(signature, body, self._secrets, self._clock())
        kind, account = _event(body)
        if kind != "post_call_transcription":
            _log.info("webhook.ignored", kind=kind[:64])
            return
        conversation_id = account.get("conversation_id")
        if not isinstance(conversation_id, str) or not _CONVERSATION_ID.fullmatch(conversation_id):
            raise RequestInvalid("The event names no conversation.")
        settlement = told(conversation_id, account, source="webhook")
        if settlement is None:  # to count none would give the minutes away: the reconciler will ask
            _log.warning("webhook.duration_missing", conversation_id=conversation_id)
            return
        await self._settlements.settle(settlement)


def _event(body: bytes) -> tuple[str, Mapping[str, object]]:
    # Python's own parser, for it takes the half characters in which a browser may have named its user.
    try:
        match json.loads(body):
            case {"type": str(kind), "data": dict(account)}:
                return kind, account
    except (ValueError, RecursionError):
        pass
    raise RequestInvalid("The body is no event of ElevenLabs: an object with 'type' and 'data'.")


class Reconciler:
    """Asks ElevenLabs for what no webhook told, a few conversations a round, on one instance at a time.

    The same round forgets what is older than `keep_seconds`.

    `base_urls` tells for each agent's id which ElevenLabs host it lives on.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        provider: Provider,
        settlements: Settlements,
        base_urls: Mapping[str, str],
        every_seconds: float,
        keep_seconds: int,
        clock: Clock,
    ) -> None:
        self._ledger = ledger
        self._keep_seconds = keep_seconds
        self._provider = provider
        self._settlements = settlements
        self._base_urls = base_urls
        self._every_seconds = every_seconds
        self._clock = clock
        self._asked_until = 0.0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Hold a round every so often until the block ends."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._every_seconds)
            try:
                await self.round()
            except Exception as error:  # noqa: BLE001 - the edge: the next round may fare better
                _log.error("reconciler.failed", cause=type(error).__name__)

    async def round(self) -> None:
        """Ask for what is due, unless another instance does. It is over before its lease is."""
        lease_seconds = self._every_seconds * 0.9  # lapsed by the time of the next round
        try:
            async with asyncio.timeout(lease_seconds):
                if await self._ledger.lease(_LEASE, lease_seconds):
                    await self._reconcile()
                    await self._ledger.forget(age_seconds=self._keep_seconds)
        except TimeoutError:
            _log.warning("reconciler.cut_short", after_seconds=lease_seconds)
        except LedgerUnavailable as refusal:
            _log.warning("reconciler.stopped", code=refusal.code, note=refusal.operator_note)

    async def _reconcile(self) -> None:
        due = await self._ledger.due(CALLS_PER_ROUND, after=self._asked_until)
        # Round and round: what stays open for long must not keep the others waiting.
        self._asked_until = due[-1].reserved_at if len(due) == CALLS_PER_ROUND else 0.0
        outcomes: Counter[str] = Counter()
        silent: set[str] = set()
        for issued in due:
            base_url = self._base_urls.get(issued.agent_id)
            if base_url in silent:
                continue
            try:
                outcomes[await self._ask(issued, base_url)] += 1
            except ElevenLabsRefusal as refusal:
                silent.add(base_url or "")
                _log.warning("reconciler.stopped", host=base_url, code=refusal.code, note=_remedy(refusal))
        if outcomes:
            _log.info("passes.reconciled", **outcomes)

    async def _ask(self, issued: IssuedPass, base_url: str | None) -> str:
        """Settle, expire or leave one pass, and say which."""
        conversation_id = issued.conversation_id or ""
        age_seconds = self._clock() - issued.reserved_at
        account: Mapping[str, object] = {}
        try:
            if base_url is not None:  # else the agent is no longer ours to ask about
                account = await self._provider.conversation(base_url, conversation_id)
        except ConversationUnknown:
            account = {"status": "initiated"}  # as good as: nobody ever opened it
        except BadAnswer as refusal:
            _log.warning("conversation.unreadable", conversation_id=conversation_id, note=refusal.operator_note)
        settlement = None
        match account.get("status"):
            case "done" | "failed":
                settlement = told(conversation_id, account, source="reconciler")
            case "initiated" if age_seconds >= NEVER_OPENED_SECONDS:
                await self._ledger.expire(conversation_id)
                return "expired"
        if settlement is None and age_seconds >= UNACCOUNTED_SECONDS:
            _log.warning("conversation.unaccounted", conversation_id=conversation_id, seconds=issued.seconds)
            settlement = Settlement(
                conversation_id=conversation_id, seconds=issued.seconds, cost=None, user_id=None, source="reconciler"
            )
        if settlement is None:
            return "left"
        await self._settlements.settle(settlement)
        return "settled"


def _remedy(refusal: ElevenLabsRefusal) -> str:
    if isinstance(refusal, KeyRejected):
        return f"{refusal.operator_note}; or set VOICEPASS_RECONCILE_SECONDS=0 and rely on the webhook alone"
    return refusal.operator_note
