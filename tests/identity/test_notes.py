"""The doctor explains each reason for which voicepass refuses a token."""

import ast
from collections.abc import Iterator
from pathlib import Path

from voicepass.doctor.findings import REFUSED


def test_the_doctor_explains_every_note_of_a_refused_token() -> None:
    source = Path(__file__).parents[2] / "src" / "voicepass" / "identity"

    notes = {note for path in source.glob("*.py") for note in notes_in(path.read_text())}
    notes.remove("…")  # `refuse` itself

    assert len(notes) >= 20
    assert {row["note"] for row in REFUSED["tokens"]} == notes


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
