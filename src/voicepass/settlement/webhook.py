"""Takes in ElevenLabs' post-call webhooks: whose signature counts, and what a body tells."""

import hashlib
import hmac
import json
import re
from collections.abc import Mapping, Sequence
from typing import Final

import structlog

from voicepass.errors import RequestInvalid, SignatureInvalid
from voicepass.model import Clock
from voicepass.settlement import CONVERSATION_ID, Settlements, read_settlement

MAX_AGE_SECONDS: Final = 30 * 60
"""Of a signature: the tolerance of ElevenLabs' own SDKs, as long as a late delivery may take."""
MAX_AHEAD_SECONDS: Final = 5 * 60
"""For clocks that differ. The SDKs set no bound here."""

_SIGNATURE: Final = re.compile(r"t=([0-9]{1,12}),v0=([0-9a-f]{64})", re.ASCII)

_log = structlog.get_logger("voicepass.settlement")


def verify_signature(header: str, body: bytes, secrets: Sequence[str], now: float) -> None:
    """Raise SignatureInvalid unless ElevenLabs signed `body` with one of `secrets`, not long ago.

    `header` is the value of `ElevenLabs-Signature`, `t=<unix seconds>,v0=<hex>`: the HMAC-SHA256 of `t`, a dot and the
    raw body (documentation, "Post-call webhooks"). It is read as ElevenLabs writes it, and in no other way.
    """
    signed_at, given = check_signature_header(header, now)
    signed = signed_at.encode() + b"." + body
    # A key that is empty is one that everybody has.
    made = [hmac.digest(secret.encode(), signed, hashlib.sha256) for secret in secrets if secret]
    if not made:
        raise SignatureInvalid(operator_note="signature refused: ELEVENLABS_WEBHOOK_SECRET is not set")
    if not any([hmac.compare_digest(one, given) for one in made]):  # noqa: C419 - both, whichever fits
        raise SignatureInvalid(operator_note="signature refused: it is not of ELEVENLABS_WEBHOOK_SECRET and this body")


def check_signature_header(header: str, now: float) -> tuple[str, bytes]:
    """Return when it was signed and the MAC. Raise SignatureInvalid for another form, and for one too old or ahead."""
    written = _SIGNATURE.fullmatch(header)
    if written is None:
        raise SignatureInvalid(operator_note="signature refused: none, or not t=<seconds>,v0=<64 hex digits>")
    if not now - MAX_AGE_SECONDS <= int(written[1]) <= now + MAX_AHEAD_SECONDS:
        raise SignatureInvalid(operator_note="signature refused: older than 30 minutes, or ahead; is the clock right?")
    return written[1], bytes.fromhex(written[2])


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
        if not isinstance(conversation_id, str) or not CONVERSATION_ID.fullmatch(conversation_id):
            raise RequestInvalid("The event names no conversation.")
        settlement = read_settlement(conversation_id, account, source="webhook")
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
