"""docs/troubleshooting.md says what the doctor's tables say.

To write its tables and its list again: `python -m tests.doctor.test_troubleshooting`.
"""

import re
from pathlib import Path

from voicepass.doctor.findings import CHECKS
from voicepass.elevenlabs.codes import CAUSES as VENDOR_CAUSES
from voicepass.elevenlabs.codes import Cause

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
    """The first texts that the table knows a cause by; `doctor explain` knows all, and the codes of the API."""
    texts = [as_seen(pattern) for pattern in (*cause.reasons, *cause.lines)]
    alone = ["the code alone"] if cause.is_usual else []
    return ", ".join([*(f"`{text}`" for text in texts[:2]), *alone]).replace("|", "\\|")


def by_close() -> str:
    rows = [
        f"| {cause.close} | {seen(cause)} | {shown(cause.says)} | {shown(cause.remedy)} |"
        for cause in sorted(VENDOR_CAUSES.values(), key=lambda cause: cause.close or 0)
        if cause.close and seen(cause)
    ]
    return "\n".join(["| code | reason, or line | what it means | what to do |", "|---|---|---|---|", *rows])


def by_line() -> str:
    """Without what each line means, because the remedy says it too."""
    return "\n".join(
        f"- {seen(cause)}: {shown(cause.remedy)}"
        for cause in VENDOR_CAUSES.values()
        if cause.check == "conversation" and not cause.close and cause.lines
    )


def by_check() -> str:
    return "\n".join(f"- `{check}`: {meaning}" for check, meaning in CHECKS.items())


def with_tables(document: str) -> str:
    for name, table in {"closes": by_close(), "lines": by_line(), "checks": by_check()}.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, _, rest = document.partition(begin)
        document = before + begin + table + end + rest.partition(end)[2]
    return document


def test_the_troubleshooting_tables_are_the_doctors() -> None:
    document = DOCUMENT.read_text()

    assert document == with_tables(document)
    assert len((by_close() + by_line()).splitlines()) > 40


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text()))
