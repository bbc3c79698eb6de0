"""The procedures of docs/upgrade.md work as printed: the tests run each command of the page."""

import os
import re
import sqlite3
import subprocess
import sys
import time
from contextlib import AbstractAsyncContextManager, closing
from pathlib import Path

import pytest

from tests.cli.test_cli import CLEAN
from tests.ledger.given import Engine, Postgres, grant_pass, rows
from voicepass.ledger import Ledger
from voicepass.ledger.postgres import open_postgres
from voicepass.ledger.sqlite import open_sqlite

PAGE = Path(__file__).parents[2] / "docs" / "upgrade.md"

pytestmark = pytest.mark.anyio


def run_printed(kind: str, *, cwd: Path, database_url: str, tools: Path | None = None) -> str:
    """Run the commands that follow the mark `<!-- kind -->` in the page."""
    (command,) = re.findall(rf"<!-- {kind} -->\n *```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    path = os.pathsep.join([*([str(tools)] if tools else []), str(Path(sys.prefix) / "bin"), CLEAN["PATH"]])
    environment = CLEAN | {"PATH": path, "VOICEPASS_DATABASE_URL": database_url}
    shell = ["bash", "-ec", command]
    ended = subprocess.run(shell, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
    return ended.stdout


async def list_conversations(ledger: Ledger) -> list[str]:
    return sorted(row["conversation_id"] for row in await rows(ledger, "SELECT conversation_id FROM passes"))


def open_file(folder: Path) -> AbstractAsyncContextManager[Ledger]:
    return open_sqlite(str(folder / "voicepass.db"), clock=time.time)


@pytest.mark.long
async def test_a_sqlite_ledger_is_backed_up_while_it_is_open_and_restored(tmp_path: Path) -> None:
    url = "sqlite:///voicepass.db"
    async with open_file(tmp_path) as ledger:
        before = [await grant_pass(ledger) for _ in range(5)]
        run_printed("backup", cwd=tmp_path, database_url=url)
        await grant_pass(ledger)

    run_printed("restore", cwd=tmp_path, database_url=url)

    async with open_file(tmp_path) as restored:
        assert await list_conversations(restored) == sorted(before)
        await grant_pass(restored)


@pytest.mark.long
async def test_a_ledger_moves_to_postgresql_is_dumped_and_restored(tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.create_database()
    async with open_file(tmp_path) as ledger:
        moved = [await grant_pass(ledger) for _ in range(5)]

    printed = run_printed("move", cwd=tmp_path, database_url=url)
    async with open_postgres(url) as target:
        assert await list_conversations(target) == sorted(moved)
        moved.append(await grant_pass(target))
        run_printed("dump", cwd=tmp_path, database_url=url, tools=postgres.tools)
        await grant_pass(target)
    run_printed("restore-dump", cwd=tmp_path, database_url=url, tools=postgres.tools)

    assert "passes: 5 rows" in printed
    async with open_postgres(url) as restored:
        assert await list_conversations(restored) == sorted(moved)
        await grant_pass(restored)


@pytest.mark.parametrize("engine", ["sqlite", "postgres"], indirect=True)  # a pooler leads to the same tables
async def test_after_a_downgrade_the_old_version_grants_on_the_newer_ledger(engine: Engine, postgres: Postgres) -> None:
    async with engine.open() as old:
        before = await grant_pass(old)
    if engine.name == "sqlite":
        with closing(sqlite3.connect(engine.url)) as connection:
            connection.executescript("ALTER TABLE passes ADD COLUMN newer TEXT; PRAGMA user_version = 99")
    else:
        schema = engine.url.rpartition("%3D")[2]
        postgres.run(f"ALTER TABLE {schema}.passes ADD COLUMN newer TEXT")
        postgres.run(f"INSERT INTO {schema}.schema_steps (number) VALUES (99)")  # noqa: S608 - a name of ours

    async with engine.open() as again:
        after = await grant_pass(again)

        assert await list_conversations(again) == sorted([before, after])
