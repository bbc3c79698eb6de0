"""docs/troubleshooting.md says what the doctor's tables say.

To write its tables anew: `python -m tests.doctor.test_troubleshooting`.
"""

import re
from pathlib import Path

from voicepass.doctor.findings import CAUSES, CHECKS, REFUSED
from voicepass.elevenlabs.codes import CAUSES as VENDOR_CAUSES
from voicepass.elevenlabs.codes import Cause, Outcome

DOCUMENT = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
BLANKS = re.compile(r"\{(\w+)\}")


def shown(template: str) -> str:
    """The sentence with its blanks as words: what is filled in differs from case to case."""
    text = re.sub(r"\{(hint|note)\}", "", template.replace(": {note}", ": …"))
    text = re.sub(r"\{(\w+)\}", lambda blank: f"*{blank[1]}*", text.replace("{{", "\0").replace("}}", "\1"))
    return text.replace("\0", "{").replace("\1", "}").replace("<", "&lt;").replace("|", "\\|")


def as_seen(pattern: str) -> str:
    """The text that a pattern looks for, as people see it."""
    for part, text in (
        (r"\(\?!.*?\)|\\b|\^?\\W\{0,9\}\$?|\{0,1\}|(?<=')\?|(?<=:)\?", ""),
        (r"\(\?P<\w+>transfer\)", "transfer"),
        (r"\(\?P<\w+>[^()]*\)|(?:\[[^\]]*\]|\\\S|\.)(?:\{[\d,]*\}|\+|\*)", "…"),
        (r"\[(.)[^\]]*\]", r"\1"),
        (r"\\(.)", r"\1"),
        (r"… ?…", "…"),
    ):
        pattern = re.sub(part, text, pattern)
    return pattern


def seen(cause: Cause) -> str:
    """All that the table knows a cause by."""
    patterns = [as_seen(pattern) for pattern in (*cause.reasons, *cause.lines)]
    texts = [f"`{text}`" for text in (*cause.codes, *cause.events, *patterns)]
    alone = ["the code alone"] if cause.is_usual else []
    return ", ".join([*texts, *(f"HTTP {status}" for status in cause.statuses), *alone]).replace("|", "\\|")


def by_sign() -> str:
    rows = [
        f"| {cause.close or ''} | {seen(cause)} | {shown(cause.says)} | {shown(cause.remedy)} "
        f"| {'yes' if cause.new_pass_helps else ''} |"
        for cause in sorted(VENDOR_CAUSES.values(), key=lambda cause: (cause.close is None, cause.close or 0))
        if seen(cause)
    ]
    head = "| close code | code, reason or line | what it means | what to do | a new pass may help |"
    return "\n".join([head, "|---|---|---|---|---|", *rows])


def by_check() -> str:
    rows = [
        f"| `{check}` | `{cause.name}` | {cause.outcome if cause.outcome is not Outcome.FAILED else '**failed**'} "
        f"| {shown(cause.says)} | {shown(cause.remedy)} |"
        for check in CHECKS
        for cause in CAUSES.values()
        if cause.check == check and cause.outcome in {Outcome.FAILED, Outcome.WARNING}
    ]
    return "\n".join(["| check | cause | outcome | what it found | what to do |", "|---|---|---|---|---|", *rows])


def by_note(kind: str, head: str) -> str:
    rows = [f"| `{row['note']}` | {row['says']} | {row['remedy']} |" for row in REFUSED[kind]]
    return "\n".join([head, "|---|---|---|", *rows])


def with_tables(document: str) -> str:
    tables = {
        "signs": by_sign(),
        "checks": by_check(),
        "notes": by_note("tokens", "| note | what it means | what to do |"),
        "settings": by_note("settings", "| message | why | what to do |"),
    }
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, _, rest = document.partition(begin)
        document = before + begin + table + end + rest.partition(end)[2]
    return document


def test_the_troubleshooting_tables_are_the_doctors() -> None:
    document = DOCUMENT.read_text()

    assert document == with_tables(document)
    assert document.count("\n| ") > 80


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text()))
