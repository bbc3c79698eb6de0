"""A close frame, a refusal, or a line that somebody pasted, explained by the table of causes."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

from voicepass import errors
from voicepass.doctor.findings import REFUSED, Finding, report
from voicepass.elevenlabs.answers import parse_json_object
from voicepass.elevenlabs.codes import BY_CLOSE, BY_CODE, BY_REFUSAL, CAUSES, find_in_text
from voicepass.elevenlabs.refusals import IN_DASHBOARD, describe_permission, find_permission, refusal_for, vendor_error
from voicepass.errors import BadAnswer, ElevenLabsRefusal, Refusal
from voicepass.telemetry.logger import redact

_BEFORE_NOTE: Final = "token refused: "
_QUOTED_CHARACTERS: Final = 200
# Four digits are a close code only at the start or after a word for closing: not a port, a year or a line number.
_CLOSE_CODE: Final = re.compile(
    r"(?:^\W{0,9}|(?:code|closed?|received|sent|disconnected)\b[^\d\n]{0,20})(100\d|101[0-5]|[34]\d{3})(?![\w.:])",
    re.IGNORECASE,
)
_STATUS: Final = re.compile(r"(?<![\w.:])([45]\d\d)(?![\w.])")
# Of the others alone nobody can say whether ElevenLabs, voicepass or a proxy sent them.
_STATUS_ALONE: Final = re.compile(
    r"(?:HTTP[/\d.]{0,4} )?(?:status(?: code)?:? )?(?:40[12]|429|5\d\d)\b[A-Za-z' -]{0,40}"
)

_OUR_REFUSALS: Final = {kind.code: kind for kind in vars(errors).values() if hasattr(kind, "code")}


def describe_close(code: int, reason: str, *, check: str | None = None) -> Finding:
    """Return what a close frame means; `code` is 0 if there was none."""
    note = f' ("{_quote(reason)}")' if reason else ""
    cause, facts = find_in_text(reason) or (BY_CLOSE.get(code, CAUSES["unknown_closing"]), {})
    facts = {name: _quote(fact.replace("'", "").replace('"', "")) for name, fact in facts.items()}
    return report(cause.name, check=check, **({"code": code, "note": note} | facts))


def describe_refusal(refusal: ElevenLabsRefusal) -> Finding:
    """Return what a refusal of ElevenLabs means."""
    cause = BY_CODE.get(refusal.vendor_code) or BY_REFUSAL[refusal.code]
    said = refusal.operator_note.rpartition("(ElevenLabs said ")[2].strip("()")  # without the cause's own sentences
    note = f": {_quote(said)}" if said else ""
    permission = find_permission(refusal.operator_note)
    return report(cause.name, note=note, **(describe_permission(permission) if permission else {}))


def explain(pasted: str) -> Finding | None:
    """Return what a close code, an error's body or a line means, or None: the doctor never guesses."""
    if (own_note := _explain_own_note(pasted)) is not None:
        return own_note
    if permission := find_permission(pasted):
        cause = "permission_missing" if permission in IN_DASHBOARD else "permission_not_needed"
        return report(cause, **describe_permission(permission))
    body = _read_json_object(pasted)
    status = _STATUS.search(pasted)
    if (own := _find_own_refusal(pasted, body, int(status[1]) if status else None)) is not None:
        return report("voicepass_refused", title=own.title, detail=own.detail)
    code = _CLOSE_CODE.search(pasted)
    if code or find_in_text(pasted):
        is_alone = code is not None and code[1] == pasted.strip()
        return describe_close(int(code[1]) if code else 0, "" if is_alone else pasted)
    sent = json.dumps(body).encode()
    is_elevenlabs = "detail" in body or "/convai/" in pasted or _STATUS_ALONE.fullmatch(pasted.strip())
    if status and is_elevenlabs and not vendor_error(sent)[0]:  # an unknown code may mean anything
        return describe_refusal(refusal_for(int(status[1]), sent, retry_after=None, now=0))
    return None


def _explain_own_note(pasted: str) -> Finding | None:
    """Return what a note of voicepass' own means: of a refused token in the log, or of a refused setting."""
    _, marker, rest = pasted.rpartition(_BEFORE_NOTE)
    note = rest.partition('"')[0].strip()  # a log line is JSON, and goes on behind the note
    for row in REFUSED["tokens"]:
        first, *others = row["note"].split("…")
        if (marker or first) and note.startswith(first) and all(part in note for part in others):
            return report("token_refused", **row)
    for row in REFUSED["settings"]:
        if all(part in pasted for part in row["note"].split("…")):
            return report("setting_refused", **row)
    return None


def _find_own_refusal(pasted: str, body: Mapping[str, object], status: int | None) -> type[Refusal] | None:
    """Return the refusal of voicepass' own. ElevenLabs has some of its codes too, but with other statuses."""
    if body:
        own = _OUR_REFUSALS.get(str(body.get("code")))
        return own if own and body.get("status", own.status) == own.status else None
    named = [_OUR_REFUSALS[word] for word in re.findall(r"\b[a-z_]{1,40}\b", pasted) if word in _OUR_REFUSALS]
    return next((own for own in named if own.status == status or own.code == pasted.strip()), None)


def _read_json_object(pasted: str) -> dict[str, object]:
    with suppress(ValueError, BadAnswer):
        return parse_json_object(pasted[pasted.index("{") : pasted.rindex("}") + 1].encode())
    return {}


def _quote(text: str) -> str:
    return redact(text, most_characters=_QUOTED_CHARACTERS)
