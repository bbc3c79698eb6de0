"""Receives ElevenLabs' post-call webhooks: checks the signature, parses the event and settles its conversation."""

import hashlib
import hmac
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from voicepass.elevenlabs.answers import find_conversation_id
from voicepass.errors import RequestInvalid, SignatureInvalid
from voicepass.model import Clock
from voicepass.settlement import Settlements
from voicepass.settlement.reports import parse_record
from voicepass.telemetry.logger import Logger

MAX_AGE_SECONDS: Final = 30 * 60
"""The oldest signature that is accepted, as in ElevenLabs' own SDKs. A delivery may be that late."""
MAX_AHEAD_SECONDS: Final = 5 * 60
"""A signature may be that far in the future, because clocks differ. The SDKs set no limit here."""

_SIGNATURE: Final = re.compile(r"t=([0-9]{1,12}),v0=([0-9a-f]{64})", re.ASCII)

_log = Logger("voicepass.settlement")


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """Receives post-call webhooks. Without a secret it refuses all of them."""

    settlements: Settlements
    secrets: Sequence[str] = field(repr=False)
    clock: Clock

    async def receive(self, *, signature: str, body: bytes) -> None:
        """Settle the conversation of a `post_call_transcription`. Accept other events and ignore them.

        Raises SignatureInvalid, RequestInvalid if the signed body is no event, or LedgerUnavailable. Only after
        LedgerUnavailable can a second delivery succeed.
        """
        verify_signature(signature, body, self.secrets, self.clock())
        kind, record = _parse_event(body)
        if kind != "post_call_transcription":
            _log.info("webhook.ignored", kind=kind[:64])
            return
        conversation_id = find_conversation_id(record.get("conversation_id"))
        if conversation_id is None:
            raise RequestInvalid("The event names no conversation.")
        report = parse_record(conversation_id, record, source="webhook")
        self.settlements.bypasses.check_method(report)
        if report.settlement is None:
            # Zero seconds would give the minutes away. The reconciler will ask for the real length.
            _log.warning("webhook.duration_missing", conversation_id=conversation_id)
            return
        await self.settlements.settle(report.settlement)


def verify_signature(header: str, body: bytes, secrets: Sequence[str], now: float) -> None:
    """Raise SignatureInvalid unless ElevenLabs signed `body` with one of `secrets` a short time ago.

    `header` is the value of `ElevenLabs-Signature`, `t=<unix seconds>,v0=<hex>`: the HMAC-SHA256 of `t`, a dot and the
    raw body (documentation, "Post-call webhooks"). No other spelling is accepted.
    """
    signed_at, given_mac = check_signature_header(header, now)
    signed = signed_at.encode() + b"." + body
    # Anyone can sign with an empty secret.
    macs = [hmac.digest(secret.encode(), signed, hashlib.sha256) for secret in secrets if secret]
    if not macs:
        raise SignatureInvalid(operator_note="signature refused: ELEVENLABS_WEBHOOK_SECRET is not set")
    if not any([hmac.compare_digest(mac, given_mac) for mac in macs]):  # noqa: C419 - compare both, for constant time
        raise SignatureInvalid(operator_note="signature refused: it is not of ELEVENLABS_WEBHOOK_SECRET and this body")


def check_signature_header(header: str, now: float) -> tuple[str, bytes]:
    """Return the signing time and the MAC. Raise SignatureInvalid if the header has another form or a wrong time."""
    parts = _SIGNATURE.fullmatch(header)
    if parts is None:
        raise SignatureInvalid(operator_note="signature refused: none, or not t=<seconds>,v0=<64 hex digits>")
    if not now - MAX_AGE_SECONDS <= int(parts[1]) <= now + MAX_AHEAD_SECONDS:
        raise SignatureInvalid(operator_note="signature refused: older than 30 minutes, or ahead; is the clock right?")
    return parts[1], bytes.fromhex(parts[2])


def _parse_event(body: bytes) -> tuple[str, Mapping[str, object]]:
    # Use Python's own parser: it accepts lone surrogates, which a browser may have put into a user id.
    try:
        match json.loads(body):
            case {"type": str(kind), "data": dict(record)}:
                return kind, record
    except (ValueError, RecursionError):
        pass
    raise RequestInvalid("The body is no event of ElevenLabs: an object with 'type' and 'data'.")
