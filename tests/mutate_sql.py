"""Changes the ledger's SQL in one place at a time, and runs the tests that should notice it. CONTRIBUTING.md says when.

python -m tests.mutate_sql limits rules
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[1] / "src"
TESTS = ("limits", "settlement", "opened", "sums", "extensions", "forgetting", "sqlite", "remaining", "plans")
CHANGES = {
    " > ": " >= ",
    " >= ": " > ",
    " < ": " <= ",
    " <= ": " < ",
    " = ": " <> ",
    " <> ": " = ",
    " + ": " - ",
    " - ": " + ",
    " AND ": " OR ",
    " OR ": " AND ",
    " IS NULL": " IS NOT NULL",
    " IS NOT NULL": " IS NULL",
    "min(": "max(",
    "max(": "min(",
    " DESC": "",
}


def mutate(sql: str) -> Iterator[tuple[str, str]]:
    """Yield each change of a file, and the file with it. Comments stay as they are."""
    begin = 0
    for number, line in enumerate(sql.splitlines(keepends=True), start=1):
        for old, new in CHANGES.items():
            for found in re.finditer(re.escape(old), line) if not line.startswith("--") else ():
                at = begin + found.start()
                change = f"{old.strip()} becomes {new.strip() or 'nothing'}"
                place = f"line {number}, column {found.start()}: {change}: {line.strip()}"
                yield place, sql[:at] + new + sql[at + len(old) :]
        begin += len(line)


def survives(source: Path) -> bool:
    """Tell whether the tests pass with the package in `source`."""
    files = [f"tests/ledger/test_{name}.py" for name in TESTS]
    flags = ["-q", "-x", "-n", "0", "-k", "sqlite", "-p", "no:cacheprovider", "--timeout=20"]
    command = [sys.executable, "-m", "pytest", *flags, *files]
    environment = os.environ | {"PYTHONPATH": str(source)}
    options: dict[str, Any] = {"env": environment, "cwd": SOURCE.parent, "capture_output": True, "timeout": 100}
    try:
        return subprocess.run(command, check=False, **options).returncode == 0
    except subprocess.TimeoutExpired:  # a loop without an end
        return False


def main() -> None:
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(shutil.copytree(SOURCE, Path(folder) / "src"))
            file = source / "voicepass" / "ledger" / f"{name}.sql"
            original = file.read_text()
            assert survives(source), "the tests fail without a change"
            tried = survived = 0
            for place, mutant in mutate(original):
                file.write_text(mutant)
                tried += 1
                if survives(source):
                    survived += 1
                    print(f"{name}.sql survived: {place}", flush=True)
            print(f"{name}.sql: {tried} tried, {tried - survived} killed, {survived} survived", flush=True)


if __name__ == "__main__":
    main()
