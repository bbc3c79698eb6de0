"""What a check can report. The texts are data: checks.toml and findings.toml here, codes.toml for ElevenLabs' codes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from voicepass.elevenlabs.codes import CAUSES as VENDOR_CAUSES
from voicepass.elevenlabs.codes import Cause, Outcome, load_causes, load_table
from voicepass.model import Scalar

_DATA: Final = load_table("voicepass.doctor", "checks.toml")
CHECKS: Final[Mapping[str, str]] = _DATA["checks"]
OVERRIDES: Final[Mapping[str, Scalar]] = _DATA["overrides"]
CAUSES: Final[Mapping[str, Cause]] = {**load_causes("voicepass.doctor", "findings.toml"), **VENDOR_CAUSES}

REFUSED: Final[Mapping[str, Sequence[Mapping[str, str]]]] = load_table("voicepass.doctor", "notes.toml")
"""What voicepass refuses itself, `tokens` and `settings`: each row has a note, what it means, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of a check. `cause` names the row of CAUSES; it is empty if nothing is wrong."""

    check: str
    outcome: Outcome = Outcome.OK
    says: str
    remedy: str = ""
    cause: str = ""

    @property
    def id(self) -> str:
        """Return the stable name of what was found, for machines."""
        return f"{self.check}.{self.cause or 'ok'}"


def report(name: str, *, check: str | None = None, **facts: object) -> Finding:
    """Return the finding of this cause with these facts; `check` replaces the cause's own."""
    cause = CAUSES[name]
    says, remedy = cause.fill(**facts)
    return Finding(check=check or cause.check, outcome=cause.outcome, says=says, remedy=remedy, cause=name)


def report_ok(check: str) -> Finding:
    """Return that this check found nothing wrong."""
    return Finding(check=check, says=CHECKS[check])
