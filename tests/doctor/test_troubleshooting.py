"""docs/troubleshooting.md repeats the doctor's tables.

To update its tables and its list: `python -m tests.doctor.test_troubleshooting`.
"""

import re
from pathlib import Path

from voicepass.doctor.findings import CHECKS
from voicepass.elevenlabs.codes import CAUSES as VENDOR_CAUSES
from voicepass.elevenlabs.codes import Cause

DOCUMENT = Path(__file__).parents[2] / "docs" / "troubleshooting.md"


def write_sentence(template: str) -> str:
    """Return the sentence with a word in place of each blank."""
    text = re.sub(r"\{(hint|note)\}", "", template.replace(": {note}", ": …"))
    text = re.sub(r"\{(\w+)\}", lambda blank: f"*{blank[1]}*", text.replace("{{", "\0").replace("}}", "\1"))
    return text.replace("\0", "{").replace("\1", "}").replace("<", "&lt;").replace("|", "\\|")


def write_match(pattern: str) -> str:
    """Return the text that a pattern matches, as people see it."""
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


def list_texts(cause: Cause) -> str:
    """Return the first texts of a cause; `doctor explain` also matches the others and the codes of the API."""
    texts = [write_match(pattern) for pattern in (*cause.reasons, *cause.lines)]
    alone = ["the code alone"] if cause.is_usual else []
    return ", ".join([*(f"`{text}`" for text in texts[:2]), *alone]).replace("|", "\\|")


def write_closes() -> str:
    rows = [
        f"| {cause.close} | {list_texts(cause)} | {write_sentence(cause.says)} | {write_sentence(cause.remedy)} |"
        for cause in sorted(VENDOR_CAUSES.values(), key=lambda cause: cause.close or 0)
        if cause.close and list_texts(cause)
    ]
    return "\n".join(["| code | reason, or line | what it means | what to do |", "|---|---|---|---|", *rows])


def write_lines() -> str:
    """Return the list without the meanings, because each remedy contains its meaning."""
    return "\n".join(
        f"- {list_texts(cause)}: {write_sentence(cause.remedy)}"
        for cause in VENDOR_CAUSES.values()
        if cause.check == "conversation" and not cause.close and cause.lines
    )


def write_checks() -> str:
    return "\n".join(f"- `{check}`: {meaning}" for check, meaning in CHECKS.items())


def insert_tables(document: str) -> str:
    for name, table in {"closes": write_closes(), "lines": write_lines(), "checks": write_checks()}.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, _, rest = document.partition(begin)
        document = before + begin + table + end + rest.partition(end)[2]
    return document


def test_the_troubleshooting_tables_are_the_doctors() -> None:
    document = DOCUMENT.read_text()

    assert document == insert_tables(document)
    assert len((write_closes() + write_lines()).splitlines()) > 40


if __name__ == "__main__":
    DOCUMENT.write_text(insert_tables(DOCUMENT.read_text()))
