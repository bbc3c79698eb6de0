"""What ElevenLabs' refusals mean, by the vendor's own code or else by the HTTP status: ours, and what to do."""

import json
import re
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final

from voicepass.elevenlabs.answers import parse_json_object
from voicepass.errors import (
    AgentUnknown,
    BadAnswer,
    Busy,
    ElevenLabsRefusal,
    KeyRejected,
    QuotaExhausted,
    Unavailable,
)

_MAX_RETRY_AFTER_SECONDS: Final = 60  # After a longer wait than this, voicepass asks again to find out.
_QUOTED_CHARACTERS: Final = 300  # of the vendor's text, in the operator's log

SYSTEM_BUSY: Final = "system_busy"
"""Of this the documentation ("Errors") says that to ask again will generally succeed."""

_Meaning = tuple[type[ElevenLabsRefusal], str]
_KEY: _Meaning = (
    KeyRejected,
    "the API key was not accepted: mistyped, revoked, or of another region than the base URL",
)
_NO_KEY: _Meaning = (
    KeyRejected,
    "ElevenLabs received no API key: a proxy at ELEVENLABS_BASE_URL may remove the header xi-api-key",
)
_PERMISSION: _Meaning = (
    KeyRejected,
    "ELEVENLABS_API_KEY is valid but lacks the permission {permission}: give the key '{in_dashboard}'",
)
IN_DASHBOARD: Final[Mapping[str, str]] = {"convai_write": "ElevenAgents: Write", "convai_read": "ElevenAgents: Read"}
"""What the API key page calls each permission that voicepass uses."""

_NAMED_PERMISSION: Final = re.compile(r"missing the permission ([a-z_]{1,40})\b", re.ASCII)
_BLOCKED: _Meaning = (KeyRejected, "ElevenLabs blocks this account or network as unusual; a paid plan lifts that")
_AGENT: _Meaning = (
    AgentUnknown,
    "ElevenLabs knows no such agent there: check its id (ELEVENLABS_AGENT_ID or policy file) and the base URL",
)
_QUOTA: _Meaning = (QuotaExhausted, "the workspace's quota at ElevenLabs is used up: raise it or wait for its reset")
_AT_LIMIT: _Meaning = (Busy, "ElevenLabs is at a limit; if it stays, raise the plan's concurrency")
_OUT_OF_ORDER: _Meaning = (Unavailable, "ElevenLabs is out of order; see its status page")
_UNEXPECTED: _Meaning = (BadAnswer, "ElevenLabs answered unexpectedly; is the base URL right?")

_BY_CODE: Final[dict[str, _Meaning]] = {
    "invalid_api_key": _KEY,
    "invalid_authorization_header": _KEY,
    "sign_in_required": _KEY,
    "missing_api_key": _NO_KEY,
    "needs_authorization": _NO_KEY,
    "missing_permissions": _PERMISSION,
    "insufficient_permissions": _PERMISSION,
    "forbidden": _PERMISSION,
    "detected_unusual_activity": _BLOCKED,
    "document_not_found": _AGENT,
    "agent_not_found": _AGENT,
    "quota_exceeded": _QUOTA,
    "insufficient_credits": _QUOTA,
    "too_many_concurrent_requests": _AT_LIMIT,
    "concurrent_limit_exceeded": _AT_LIMIT,
    "rate_limit_exceeded": _AT_LIMIT,
    SYSTEM_BUSY: _AT_LIMIT,
}
_BY_STATUS: Final[dict[int, _Meaning]] = {
    400: _AGENT,
    401: _KEY,
    402: _QUOTA,
    403: _KEY,
    404: _AGENT,
    408: _OUT_OF_ORDER,
    422: _AGENT,
    429: _AT_LIMIT,
}


def refusal_for(
    status: int, body: bytes, *, retry_after: str | None, now: float, permission: str = "convai_write"
) -> ElevenLabsRefusal:
    """Turn an error answer into the refusal it means, with a note that tells the operator what to do.

    `permission` is the one that the call needs; the vendor's message may name another, which is then reported.

    The vendor's own code decides before the HTTP status: a key without the permission is 401 in the field and 403 in
    the documentation, and so is an exhausted quota 401 or 402. Both error envelopes are understood.
    """
    code, message = vendor_error(body)
    refusal, note = _BY_CODE.get(code) or _BY_STATUS.get(status) or (_OUT_OF_ORDER if status >= 500 else _UNEXPECTED)  # noqa: PLR2004
    wait = read_retry_after(retry_after, now=now) if refusal in {Busy, Unavailable} else None
    permission = named_permission(message) or permission
    note = note.format(permission=permission, in_dashboard=IN_DASHBOARD.get(permission, permission))
    said = f"ElevenLabs said HTTP {status}, {code or 'no code'}: {message}"
    return refusal(
        operator_note=f"{note} ({said})", retry_after_seconds=wait, vendor_code=code, pause_seconds=float(wait or 0)
    )


def vendor_error(body: bytes) -> tuple[str, str]:
    """Return (code, message) of either envelope, or of none. The message is the vendor's text: for the log alone.

    The live service sends `status` and `code` with different values: 401 has `code: unauthorized` beside
    `status: missing_permissions`. The first of `status` and `code` that is known here wins, else the first present.
    """
    try:
        detail = parse_json_object(body).get("detail")
    except BadAnswer:
        return "", _quoted(body.decode("utf-8", "replace"))
    if isinstance(detail, str):
        return "", _quoted(detail)
    if isinstance(detail, dict):
        sent = [code for code in (detail.get("status"), detail.get("code")) if isinstance(code, str) and code]
        if code := next((code for code in sent if code in _BY_CODE), sent[0] if sent else ""):
            return _quoted(code), _quoted(str(detail.get("message", "")))
    return "", _quoted(json.dumps(detail))


def named_permission(message: str) -> str | None:
    """Return the permission that ElevenLabs' message says the key lacks, or None."""
    named = _NAMED_PERMISSION.search(message)
    return named[1] if named else None


def _quoted(text: str) -> str:
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
