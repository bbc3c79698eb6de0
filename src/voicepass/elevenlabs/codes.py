"""What ElevenLabs' codes, close codes and messages mean: the one table, codes.toml, read once.

The refusals and the doctor read it; client.js and docs/troubleshooting.md are generated from it. The doctor keeps its
own findings in a file of the same form.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.resources import files
from typing import Any, Final

from pydantic import TypeAdapter


class Outcome(StrEnum):
    """How bad a cause is, in the doctor's words. FAILED: conversations fail, or are open to anyone."""

    FAILED = "failed"
    WARNING = "warning"
    SKIPPED = "skipped"
    OK = "ok"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """One row: why something fails, and how to recognise it. codes.toml explains each field."""

    name: str
    says: str
    remedy: str
    check: str = "conversation"
    outcome: Outcome = Outcome.FAILED
    codes: tuple[str, ...] = ()
    statuses: tuple[int, ...] = ()
    events: tuple[str, ...] = ()
    close: int | None = None
    is_usual: bool = False
    reasons: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    refusal: str = ""
    browser: Mapping[str, str] = field(default_factory=dict)
    new_pass_helps: bool = False
    facts: Mapping[str, str] = field(default_factory=dict)
    settings: tuple[Mapping[str, Any], ...] = ()
    """In the doctor's file: the settings of an agent that show this cause."""

    def fill(self, **facts: object) -> tuple[str, str]:
        """Return `says` and `remedy` with these facts, or the usual ones for those that are not known."""
        known = {"note": "", **self.facts, **facts}
        return self.says.format(**known), self.remedy.format(**known)


def load_table(package: str, name: str) -> dict[str, Any]:
    """Read a TOML file that is beside the modules of `package`."""
    return tomllib.loads(files(package).joinpath(name).read_text(encoding="utf-8"))


def load_causes(package: str, name: str) -> dict[str, Cause]:
    """Read the causes of a TOML file that is beside the modules of `package`, by name."""
    rows = {name: row | {"name": name} for name, row in load_table(package, name).items()}
    return TypeAdapter(dict[str, Cause]).validate_python(rows)


CAUSES: Final[Mapping[str, Cause]] = load_causes("voicepass.elevenlabs", "codes.toml")

BY_CODE: Final = {code: cause for cause in CAUSES.values() for code in cause.codes}
BY_STATUS: Final = {status: cause for cause in CAUSES.values() for status in cause.statuses}
BY_EVENT: Final = {event: cause for cause in CAUSES.values() for event in cause.events}
BY_REFUSAL: Final = {cause.refusal: cause for cause in CAUSES.values() if cause.refusal}
BY_CLOSE: Final = {cause.close: cause for cause in CAUSES.values() if cause.is_usual}


_WORDS: Final = {word: cause for words in (BY_CODE, BY_EVENT) for word, cause in words.items()}
_WORD: Final = re.compile(r"\b[a-z]++(?:_[a-z]++)++(?!\.[a-z])|(?<=['\"])[a-z]++(?=['\"])")


def find_in_text(text: str) -> tuple[Cause, dict[str, str]] | None:
    """Return the cause that this text names, by a code or else by a pattern, and the facts in the text.

    A code of one common word counts only in quotes.
    """
    named = next((_WORDS[word] for word in _WORD.findall(text) if word in _WORDS), None)
    for cause in [named] if named else CAUSES.values():
        for pattern in (*cause.reasons, *cause.lines):
            if matched := re.search(pattern, text, re.IGNORECASE):
                return cause, {name: fact for name, fact in matched.groupdict().items() if fact is not None}
    return (named, {}) if named else None
