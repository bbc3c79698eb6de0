"""The doctor explains each reason for which voicepass refuses a token."""

import ast
from collections.abc import Iterator
from pathlib import Path

from voicepass.doctor.findings import REFUSED


def test_the_doctor_explains_every_note_of_a_refused_token() -> None:
    source = Path(__file__).parents[2] / "src" / "voicepass" / "identity"

    notes = {note for path in source.glob("*.py") for note in find_notes(path.read_text())}
    notes.remove("…")  # `refuse` itself

    assert len(notes) >= 20
    assert {row["note"] for row in REFUSED["tokens"]} == notes


def find_notes(source: str) -> Iterator[str]:
    """Find every note with which the source refuses a token. `…` replaces each inserted value."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id="refuse"), args=[text, *_]):
                yield read_text(text)
            case ast.keyword(arg="operator_note", value=value) if read_text(value).startswith("token refused: "):
                yield read_text(value).removeprefix("token refused: ")


def read_text(node: ast.expr) -> str:
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)
