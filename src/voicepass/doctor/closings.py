"""What ends a conversation, read as a cause: close codes and reasons, errors over HTTP, lines of a console."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from voicepass import errors
from voicepass.doctor.causes import Finding, found
from voicepass.elevenlabs.refusals import IN_DASHBOARD, named_permission, refusal_for
from voicepass.errors import ElevenLabsRefusal
from voicepass.telemetry.logs import redact

_QUOTED_CHARACTERS: Final = 200
_CLOSE_CODE: Final = re.compile(r"(?<![\w.])(1\d{3}|[34]\d{3})(?![\w.])")
_STATUS: Final = re.compile(r"(?<![\w.])([45]\d\d)(?![\w.])")


@dataclass(frozen=True, slots=True)
class Symptom:
    """What is seen, and the cause that it means. A text decides before a bare code; the first row that fits is it."""

    code: int | None
    text: str
    cause: str


# fmt: off
SYMPTOMS: Final = (
    Symptom(
        1008, r"Missing required dynamic variables in (?P<place>[^:{]{1,99}): \{(?P<names>[^}]*)", "variables_missing"
    ),
    Symptom(1008, r"Missing dynamic variable after agent (?P<place>transfer)", "variables_missing"),
    Symptom(1008, r"Override for field '(?P<field>[^']+)' is not allowed", "override_not_allowed"),
    Symptom(1008, r"Override is not allowed", "override_not_allowed"),
    Symptom(1008, r"Language '(?P<language>[^']+)' is not supported", "language_unsupported"),
    Symptom(1008, r"daily call limit of (?P<limit>\d+)", "daily_limit_reached"),
    Symptom(1002, r"exceeds your quota", "quota_exhausted"),
    Symptom(1002, r"appears to be misconfigured", "agent_misconfigured"),
    Symptom(3000, r"Could not authorize", "not_authorized"),
    Symptom(3000, r"Request error", "request_refused"),
    Symptom(3000, r"Host (?P<host>\S+) is not allowed", "host_not_allowed"),
    Symptom(3000, r"agent you are trying to reach does not exist", "agent_unknown"),
    Symptom(3008, r"too many concurrent", "concurrency_reached"),
    Symptom(None, r"already in CLOSING or CLOSED state", "socket_was_closed"),
    Symptom(None, r"no signed URL or conversation token was provided", "not_authorized"),
    Symptom(None, r"invalid authorization token", "wrong_credential"),
    Symptom(None, r"KeyError:? '?signed_url'?|Failed to get signed URL", "error_taken_for_answer"),
    Symptom(None, r"Invalid agent ID", "agent_unknown"),
    Symptom(None, r"/rtc/v1/validate", "validate_404"),
    Symptom(None, r"worklet module", "worklet_blocked"),
    Symptom(None, r"closed due to a socket error", "no_goodbye"),
    Symptom(1000, "", "ended"),
    Symptom(1001, "", "went_away"),
    Symptom(1002, "", "operation_failed"),
    Symptom(1005, "", "no_code"),
    Symptom(1006, "", "no_goodbye"),
    Symptom(1008, "", "contract_broken"),
    Symptom(1011, "", "internal_error"),
    Symptom(3000, "", "not_authorized"),
    Symptom(3008, "", "concurrency_reached"),
)
# fmt: on

_BY_VENDOR_CODE: Final = {
    "invalid_api_key": "api_key_refused",
    "missing_api_key": "api_key_absent",
    "needs_authorization": "api_key_absent",
    "missing_permissions": "permission_missing",
    "insufficient_permissions": "permission_missing",
    "forbidden": "permission_missing",
    "detected_unusual_activity": "account_blocked",
    "too_many_concurrent_requests": "concurrency_reached",
    "concurrent_limit_exceeded": "concurrency_reached",
    "quota_exceeded": "quota_exhausted",
    "insufficient_credits": "quota_exhausted",
    "conversation_history_not_found": "conversation_unknown",
    "conversation_not_found": "conversation_unknown",
}
# "unauthorized" is too common a word to look for in a line of text.
_BY_CODE_IN_BODY: Final = _BY_VENDOR_CODE | {"unauthorized": "api_key_refused"}
_BY_REFUSAL: Final[Mapping[type[ElevenLabsRefusal], str]] = {
    errors.KeyRejected: "api_key_refused",
    errors.AgentUnknown: "agent_unknown",
    errors.BadAnswer: "answer_unusable",
    errors.Busy: "elevenlabs_busy",
    errors.QuotaExhausted: "quota_exhausted",
    errors.Unavailable: "elevenlabs_unavailable",
    errors.Timeout: "elevenlabs_unavailable",
}
_OUR_REFUSALS: Final = {kind.code: kind for kind in vars(errors).values() if hasattr(kind, "code")}
_USUAL_FACTS: Final = {
    "place": "settings",
    "names": "a variable",
    "hint": "",
    "field": "something",
    "language": "it",
    "host": "another host",
    "note": "",
}
_NEEDED_PERMISSION: Final = "convai_write"  # reported if ElevenLabs' message names none: no pass works without it


def of_closing(code: int, reason: str, *, check: str | None = None) -> Finding:
    """Return what a close frame means."""
    said = f' ("{_shown(reason)}")' if reason else ""
    for symptom in SYMPTOMS:
        by_text = symptom.text and re.search(symptom.text, reason, re.IGNORECASE)
        if by_text or (not symptom.text and symptom.code == code):
            facts = by_text.groupdict() if by_text else {}
            facts = {name: _shown(fact.replace("'", "").replace('"', "")) for name, fact in facts.items()}
            return found(symptom.cause, check=check, **(_USUAL_FACTS | {"note": said} | facts))
    return found("unknown_closing", check=check, code=code, note=said)


def of_refusal(refusal: ElevenLabsRefusal) -> Finding:
    """Return what a refusal of ElevenLabs means."""
    name = _BY_CODE_IN_BODY.get(refusal.vendor_code) or _BY_REFUSAL[type(refusal)]
    note = f": {_shown(refusal.operator_note)}" if refusal.operator_note else ""
    lacked = _lacked(named_permission(refusal.operator_note) or _NEEDED_PERMISSION)
    return found(name, **(_USUAL_FACTS | {"note": note} | lacked))


def _lacked(permission: str) -> dict[str, str]:
    return {"permission": permission, "access": IN_DASHBOARD.get(permission, permission)}


def explain(pasted: str) -> Finding | None:
    """Return what somebody's close code, error body or console line means; None where it is not known here."""
    if permission := named_permission(pasted):
        cause = "permission_missing" if permission in IN_DASHBOARD else "permission_not_needed"
        return found(cause, **_lacked(permission))
    if (body := _json_object(pasted)) is not None:
        return _of_body(body, pasted.partition("{")[0])
    return _of_text(pasted)


def _of_text(pasted: str) -> Finding | None:
    code, status = _CLOSE_CODE.search(pasted), _STATUS.search(pasted)
    if (ours := _OUR_REFUSALS.get(pasted.strip())) is not None:
        return found("voicepass_refused", title=ours.title, detail=ours.detail)
    reason = "" if code and code[1] == pasted.strip() else pasted
    closing = of_closing(int(code[1]) if code else 0, reason)
    if closing.cause != "unknown_closing":
        return closing
    if vendor_code := next((name for name in _BY_VENDOR_CODE if name in pasted), None):
        if (ours := _OUR_REFUSALS.get(vendor_code)) is not None and status and int(status[1]) == ours.status:
            # voicepass sends quota_exceeded with 429; ElevenLabs sends it with 401.
            return found("voicepass_refused", title=ours.title, detail=ours.detail)
        return found(_BY_VENDOR_CODE[vendor_code], **(_USUAL_FACTS | _lacked(_NEEDED_PERMISSION)))
    if code:
        return found("unknown_closing", code=code[1], note="")
    return of_refusal(refusal_for(int(status[1]), b"{}", retry_after=None, now=0)) if status else None


def _of_body(body: Mapping[str, object], before: str) -> Finding | None:
    """Read a problem of ours, an error of ElevenLabs, or what onDisconnect was given."""
    if (ours := _OUR_REFUSALS.get(str(body.get("code")))) is not None:
        return found("voicepass_refused", title=ours.title, detail=ours.detail)
    if "detail" in body:
        status = _STATUS.search(before)
        refusal = refusal_for(int(status[1]) if status else 0, json.dumps(body).encode(), retry_after=None, now=0)
        is_known = status or refusal.vendor_code in _BY_CODE_IN_BODY or not isinstance(refusal, errors.BadAnswer)
        return of_refusal(refusal) if is_known else None
    code = body.get("closeCode") or body.get("code")
    return of_closing(code, str(body.get("closeReason") or body.get("reason") or "")) if isinstance(code, int) else None


def _json_object(pasted: str) -> dict[str, object] | None:
    try:
        value = json.loads(pasted[pasted.index("{") : pasted.rindex("}") + 1])
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _shown(text: str) -> str:
    printable = "".join(c if c.isprintable() else " " for c in text)
    return redact(printable, most_characters=_QUOTED_CHARACTERS)
