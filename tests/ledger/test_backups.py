"""A backup is complete although voicepass writes meanwhile, and a move to PostgreSQL copies all rows or none."""

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.cli.test_cli import CLEAN, ENVIRONMENT, run
from tests.ledger.given import Postgres, grant_pass, limit, rows, settlement
from voicepass.ledger import Ledger
from voicepass.ledger.backups import back_up
from voicepass.ledger.postgres import open_postgres
from voicepass.ledger.sqlite import COMMITS_PER_COPY, open_sqlite
from voicepass.model import Block, BlockKind, Scope

pytestmark = pytest.mark.anyio

TABLES = ("passes", "sums", "failed_requests", "orphans", "blocks", "listings")
MANY = 600


def count_passes(file: Path) -> int:
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return int(connection.execute("SELECT count(*) FROM passes").fetchone()[0])


async def test_a_backup_has_every_pass_that_a_plain_copy_of_the_file_loses(tmp_path: Path) -> None:
    file, backup, plain = tmp_path / "voicepass.db", tmp_path / "backup.db", tmp_path / "plain.db"
    is_done = asyncio.Event()
    before = COMMITS_PER_COPY // 2 - 1  # two commits each: SQLite has not yet copied its log into the file

    async def keep_writing(ledger: Ledger) -> None:
        while not is_done.is_set():
            await grant_pass(ledger)

    async with open_sqlite(str(file), clock=time.time) as ledger:
        for _ in range(before):
            await grant_pass(ledger)
        writing = asyncio.create_task(keep_writing(ledger))
        shutil.copy(file, plain)
        await asyncio.to_thread(back_up, file, backup)
        is_done.set()
        await writing
        written = len(await rows(ledger, "SELECT pass_id FROM passes"))

    assert before <= count_passes(backup) <= written
    assert backup.stat().st_mode & 0o777 == 0o600
    with pytest.raises((AssertionError, sqlite3.Error)):
        assert count_passes(plain) >= before
    assert set(os.listdir(tmp_path)) == {"voicepass.db", "backup.db", "plain.db"}  # noqa: PTH208


def test_a_ledger_command_that_fails_prints_the_reason_and_changes_nothing(tmp_path: Path, postgres: Postgres) -> None:
    (tmp_path / "taken.db").write_text("mine")
    none_yet = run("ledger", "backup", "new.db", cwd=tmp_path)
    asyncio.run(fill(tmp_path / "voicepass.db"))
    target = ENVIRONMENT | {"VOICEPASS_DATABASE_URL": postgres.fresh()}

    refused = {
        "cannot write taken.db (File exists): name a new file": run("ledger", "backup", "taken.db", cwd=tmp_path),
        "cannot write missing/new.db (No such file or directory): name a new file": run(
            "ledger", "backup", "missing/new.db", cwd=tmp_path
        ),
        "pg_dump": run("ledger", "backup", "new.db", cwd=tmp_path, environment=target),
        "there is no ledger yet": none_yet,
        "set it to the URL of an empty PostgreSQL": run("ledger", "copy", "voicepass.db", cwd=tmp_path),
        "cannot be locked (file is not a database)": run(
            "ledger", "copy", "taken.db", cwd=tmp_path, environment=target
        ),
    }

    for reason, ended in refused.items():
        assert (ended.returncode, ended.stdout) == (1, ""), reason
        assert reason in ended.stderr
    assert (tmp_path / "taken.db").read_text() == "mine"
    assert set(os.listdir(tmp_path)) == {"taken.db", "voicepass.db"}  # noqa: PTH208


async def fill(file: Path) -> None:
    """Write rows of each kind."""
    async with open_sqlite(str(file), clock=time.time) as ledger:
        conversations = [await grant_pass(ledger, user_id=f"u-{n} 'ä'\n") for n in range(30)]
        for conversation_id in [*conversations[:9], "conv_of_nobody"]:
            await ledger.settle(settlement(conversation_id))
        await ledger.block(Block(kind=BlockKind.USER, key="u-1", token_issuer=""))
        await ledger.begin_listing("agent_1", every_seconds=60, recent_seconds=1200)
        await ledger.take_lease("reconciler", 60)


async def read_all(ledger: Ledger) -> dict[str, list[str]]:
    return {table: sorted(map(repr, await rows(ledger, f"SELECT * FROM {table}"))) for table in TABLES}  # noqa: S608


async def test_a_move_copies_every_row_and_can_be_repeated_unless_there_are_other_rows(
    tmp_path: Path, postgres: Postgres
) -> None:
    file, url = tmp_path / "voicepass.db", postgres.fresh()
    await fill(file)
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("ANALYZE")  # makes a table that belongs to SQLite
    environment = ENVIRONMENT | {"VOICEPASS_DATABASE_URL": url}

    moved = await asyncio.to_thread(run, "ledger", "copy", str(file), cwd=tmp_path, environment=environment)
    again = await asyncio.to_thread(run, "ledger", "copy", str(file), cwd=tmp_path, environment=environment)

    assert (moved.returncode, moved.stderr) == (0, "")
    assert "passes: 30 rows" in moved.stdout
    assert again == moved
    async with open_sqlite(str(file), clock=time.time) as source, open_postgres(url) as target:
        assert await read_all(source) == await read_all(target)
        assert await target.fix_sums() == []
        assert await rows(target, "SELECT name FROM leases") == []
        everyone = limit(1000, scope=Scope.ALL)
        await grant_pass(target, [everyone], user_id="u-new")
    other = await asyncio.to_thread(run, "ledger", "copy", str(file), cwd=tmp_path, environment=environment)
    assert (other.returncode, other.stdout) == (1, "")
    assert "PostgreSQL has other rows already" in other.stderr


async def test_a_move_corrects_wrong_sums_of_the_source(tmp_path: Path, postgres: Postgres) -> None:
    file, url = tmp_path / "voicepass.db", postgres.fresh()
    await fill(file)
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("UPDATE sums SET seconds = seconds + 5 WHERE scope = 'all' AND length = 3600")
        connection.commit()
    environment = ENVIRONMENT | {"VOICEPASS_DATABASE_URL": url}

    moved = await asyncio.to_thread(run, "ledger", "copy", str(file), cwd=tmp_path, environment=environment)

    assert moved.returncode == 0
    assert moved.stderr.startswith("corrected ")
    async with open_postgres(url) as target:
        assert await target.fix_sums() == []


@contextmanager
def open_in_another_process(file: Path) -> Iterator[None]:
    """Let another process open the ledger as voicepass does, and keep it open."""
    code = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT * FROM passes').fetchall(); "
        "print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "open\n"
        yield
        process.stdin.close()


async def test_a_move_is_refused_while_another_process_has_the_ledger_open(tmp_path: Path, postgres: Postgres) -> None:
    file = tmp_path / "voicepass.db"
    await fill(file)
    environment = ENVIRONMENT | {"VOICEPASS_DATABASE_URL": postgres.fresh()}

    with open_in_another_process(file):
        refused = await asyncio.to_thread(run, "ledger", "copy", str(file), cwd=tmp_path, environment=environment)

    assert refused.returncode == 1
    assert "stop every voicepass that uses it" in refused.stderr


def multiply_passes(file: Path) -> None:
    """Copy each pass many times, so that a move takes long enough to be killed."""
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TEMP TABLE copies AS SELECT * FROM passes")
        for number in range(MANY):
            connection.execute("UPDATE copies SET pass_id = substr(pass_id, 1, 32) || ?1", (number,))
            connection.execute("UPDATE copies SET conversation_id = pass_id")
            connection.execute("INSERT INTO passes SELECT * FROM copies")
        connection.commit()


@pytest.mark.long
def test_a_move_that_is_killed_copies_nothing_and_can_be_repeated(tmp_path: Path, postgres: Postgres) -> None:
    file, url = tmp_path / "voicepass.db", postgres.fresh()
    asyncio.run(fill(file))
    multiply_passes(file)
    command = [sys.executable, "-m", "voicepass", "ledger", "copy", str(file)]
    environment = CLEAN | {"VOICEPASS_DATABASE_URL": url}
    count_passes_at_target = f"SELECT count(*) FROM {url.rpartition('%3D')[2]}.passes"  # noqa: S608 - a name of ours

    with subprocess.Popen(command, cwd=tmp_path, env=environment) as process:
        while postgres.run("SELECT count(*) FROM pg_stat_progress_copy WHERE tuples_processed > 0") == [(0,)]:
            assert process.poll() is None
        process.kill()
    killed = postgres.run(count_passes_at_target)
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert killed == [(0,)]
    assert ended.returncode == 0
    assert postgres.run(count_passes_at_target) == [(30 + 30 * MANY,)]


def test_a_backup_that_fails_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "voicepass.db").write_bytes(b"no database at all, but long enough to be read as one" * 40)

    with pytest.raises(sqlite3.DatabaseError):
        back_up(tmp_path / "voicepass.db", tmp_path / "backup.db")

    assert os.listdir(tmp_path) == ["voicepass.db"]  # noqa: PTH208
