"""docs/troubleshooting.md says what the doctor's tables say.

To write its tables anew: `python -m tests.doctor.test_troubleshooting`.
"""

import re
from pathlib import Path

from voicepass.doctor.causes import CAUSES, CHECKS
from voicepass.doctor.closings import SYMPTOMS

DOCUMENT = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
ANY = "anything else"
BLANKS = re.compile(r"\{(\w+)\}")


def shown(template: str) -> str:
    """The sentence with its blanks as words: what is filled in differs from case to case."""
    text = re.sub(r"\{(hint|note)\}", "", template.replace(": {note}", ": …"))
    text = re.sub(r"\{(\w+)\}", lambda blank: f"*{blank[1]}*", text.replace("{{", "\0").replace("}}", "\1"))
    return text.replace("\0", "{").replace("\1", "}").replace("<", "&lt;").replace("|", "\\|")


def reason(pattern: str) -> str:
    """The text that a pattern looks for, as people see it."""
    text = re.sub(r"\(\?P<(\w+)>(\w+|\\?[^()]*)\)", lambda group: group[2] if group[2].isalpha() else "…", pattern)
    return text.replace("\\{", "{").replace(":? '?", ": '").replace("'?", "'").replace("|", "` or `")


def by_close() -> str:
    """One row for each code and cause, with every text that means it."""
    texts: dict[tuple[int | None, str], list[str]] = {}
    for symptom in SYMPTOMS:
        text = f"`{reason(symptom.text)}`" if symptom.text else ANY
        texts.setdefault((symptom.code, symptom.cause), []).append(text)
    rows = [
        f"| {code or ''} | {' or '.join(of_cause)} | {shown(CAUSES[cause].says)} | {shown(CAUSES[cause].remedy)} |"
        for (code, cause), of_cause in sorted(texts.items(), key=lambda row: (row[0][0] or 9999, ANY in row[1]))
    ]
    return "\n".join(["| code | reason, or line | what it means | what to do |", "|---|---|---|---|", *rows])


def by_check() -> str:
    return "\n".join(f"- `{check}`: {meaning}" for check, meaning in CHECKS.items())


def with_tables(document: str) -> str:
    for name, table in {"closes": by_close(), "checks": by_check()}.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, _, rest = document.partition(begin)
        document = before + begin + table + end + rest.partition(end)[2]
    return document


def test_the_troubleshooting_tables_are_the_doctors() -> None:
    document = DOCUMENT.read_text()

    assert document == with_tables(document)
    assert document.count("\n| ") > 25


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text()))
