"""Each SQL file contains exactly the statements that the module of the same name uses."""

import re
from pathlib import Path

import pytest

from voicepass import ledger
from voicepass.ledger.dialogue import read_statements
from voicepass.model import Counted

FOLDER = Path(ledger.__file__).parent
BUILT = {f"{counted}_of_user" for counted in Counted} | {"to_look_up_conversations", "to_look_up_seconds"}
"""Names that the code builds from parts."""


@pytest.mark.parametrize("module", sorted(path.stem for path in FOLDER.glob("*.sql")))
def test_a_module_uses_each_statement_of_its_file_and_no_other(module: str) -> None:
    code = (FOLDER / f"{module}.py").read_text()
    statements = read_statements(module)

    quoted = set(re.findall(r"""["'](\w+)["']""", code)) | BUILT
    named = set(re.findall(r"""(?<!\.)(?:SQL|read_statements\("postgres"\))\[["'](\w+)["']""", code))

    text = (FOLDER / f"{module}.sql").read_text()
    assert len(re.findall("^-- name: ", text, re.MULTILINE)) == len(statements), "two statements have the same name"
    assert named <= statements.keys() <= quoted
    assert all(statements.values())
