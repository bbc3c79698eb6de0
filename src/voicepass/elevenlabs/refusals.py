"""ElevenLabs' error answers become refusals of ours, by the vendor's own code or else by the HTTP status."""

import json
import re
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final

from voicepass.elevenlabs.answers import parse_json_object
from voicepass.elevenlabs.codes import BY_CODE, BY_STATUS, CAUSES
from voicepass.errors import BadAnswer, Busy, ElevenLabsRefusal, Unavailable

_MAX_RETRY_AFTER_SECONDS: Final = 60  # After a longer wait than this, voicepass asks again to find out.
_QUOTED_CHARACTERS: Final = 300  # of the vendor's text, in the operator's log

_OUTAGES_TO_RETRY: Final = {502, 503, 504}
_SYSTEM_BUSY: Final = "system_busy"
"""Of this code the documentation ("Errors") says that a second try generally succeeds."""

IN_DASHBOARD: Final[Mapping[str, str]] = {"convai_write": "ElevenAgents: Write", "convai_read": "ElevenAgents: Read"}
"""The names on the API key page of the permissions that voicepass uses."""

_PERMISSION: Final = re.compile(r"missing the permission ([a-z_]{1,40})\b", re.ASCII)
_REFUSALS: Final = {kind.code: kind for kind in ElevenLabsRefusal.__subclasses__()}


def refusal_for(
    status: int, body: bytes, *, retry_after: str | None, now: float, permission: str = "convai_write"
) -> ElevenLabsRefusal:
    """Turn an error answer into the refusal it means, with a note that tells the operator what to do.

    `permission` is the one that the call needs. If the vendor's message names another, the refusal reports that one.

    The vendor's own code decides before the HTTP status, because the two disagree: for a missing permission the live
    service sends 401, its documentation says 403. Both of its error envelopes are understood.
    """
    code, message = vendor_error(body)
    usual = CAUSES["elevenlabs_unavailable" if status >= 500 else "answer_unusable"]  # noqa: PLR2004
    cause = BY_CODE.get(code) or BY_STATUS.get(status, usual)
    kind = _REFUSALS[cause.refusal]
    wait = read_retry_after(retry_after, now=now) if kind in {Busy, Unavailable} else None
    note = " ".join(cause.fill(**describe_permission(find_permission(message) or permission)))
    return kind(
        operator_note=f"{note} (ElevenLabs said HTTP {status}, {code or 'no code'}: {message})",
        retry_after_seconds=wait,
        vendor_code=code,
        pause_seconds=float(wait or 0),
        may_retry=code == _SYSTEM_BUSY or (kind is Unavailable and status in _OUTAGES_TO_RETRY),
    )


def describe_permission(permission: str) -> dict[str, str]:
    """Return the facts of a missing permission: its name, and its name on the API key page."""
    return {"permission": permission, "access": IN_DASHBOARD.get(permission, permission)}


def vendor_error(body: bytes) -> tuple[str, str]:
    """Return (code, message) of either envelope, or of none. The message is the vendor's text: for the log alone.

    The live service sends `status` and `code` with different values: 401 has `code: unauthorized` beside
    `status: missing_permissions`. The first of `status` and `code` that is known here wins, else the first present.
    """
    try:
        detail = parse_json_object(body).get("detail")
    except BadAnswer:
        detail = body.decode("utf-8", "replace")
    if isinstance(detail, dict):
        sent = [code for code in (detail.get("status"), detail.get("code")) if isinstance(code, str) and code]
        if code := next((code for code in sent if code in BY_CODE), sent[0] if sent else ""):
            return _quote(code), _quote(str(detail.get("message", "")))
    return "", _quote(detail if isinstance(detail, str) else json.dumps(detail))


def find_permission(message: str) -> str | None:
    """Return the permission that ElevenLabs' message says the key lacks, or None."""
    named = _PERMISSION.search(message)
    return named[1] if named else None


def _quote(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text[:_QUOTED_CHARACTERS])


def read_retry_after(value: str | None, *, now: float) -> int | None:
    """Read a Retry-After header (seconds or a date, RFC 9110 section 10.2.3); None for anything else."""
    if value is None:
        return None
    if value.isascii() and value.isdigit():
        seconds = float(value[:10])
    else:
        try:
            until = parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = (until if until.tzinfo else until.replace(tzinfo=UTC)).timestamp() - now
    return max(1, min(round(seconds), _MAX_RETRY_AFTER_SECONDS))
