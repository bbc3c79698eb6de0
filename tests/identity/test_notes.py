"""docs/troubleshooting.md explains the most frequent reasons for which voicepass refuses a token."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path


def test_the_notes_that_the_documents_explain_are_those_of_the_code() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "troubleshooting.md").read_text()
    section = page.partition("<!-- notes -->")[2].partition("<!-- end of notes")[0]
    documented = set(re.findall(r"^- `(.+?)`: ", section, re.MULTILINE))

    notes = {note for path in (root / "src/voicepass/identity").glob("*.py") for note in notes_in(path.read_text())}
    notes.remove("…")  # `refuse` itself

    assert len(documented) == 10
    assert documented <= notes


def notes_in(source: str) -> Iterator[str]:
    """Every text with which the source refuses a token; `…` stands for what it puts in."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id="refuse"), args=[text, *_]):
                yield text_of(text)
            case ast.keyword(arg="operator_note", value=value) if text_of(value).startswith("token refused: "):
                yield text_of(value).removeprefix("token refused: ")


def text_of(node: ast.expr) -> str:
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)
