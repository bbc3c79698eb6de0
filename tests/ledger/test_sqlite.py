"""The SQLite engine: durable, with few commits for many requests. It refuses passes if it cannot write its file."""

import asyncio
import os
import resource
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.canaries import secrets_in
from tests.ledger.given import START, Engine, RecordingLedger, credential, grant_pass, limit, reservation, rows
from tests.ledger.writer import FORKS
from voicepass.errors import LedgerUnavailable
from voicepass.ledger import ANSWER_SECONDS
from voicepass.ledger.dialogue import Dialogue
from voicepass.ledger.sqlite import open_sqlite

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("engine", ["sqlite"], indirect=True)]


async def test_the_journal_mode_keeps_granted_passes_after_a_power_cut(engine: Engine) -> None:
    async with engine.open() as ledger:
        (journal,) = await rows(ledger, "PRAGMA journal_mode")
        (synchronous,) = await rows(ledger, "PRAGMA synchronous")

    assert (journal["journal_mode"], synchronous["synchronous"]) == ("wal", 2)


async def test_a_grant_waits_for_the_disk_and_a_reservation_does_not(engine: Engine) -> None:
    async with engine.open() as ledger:
        recording = RecordingLedger(ledger)
        await grant_pass(recording)

        levels = [await ledger.run(read_synchronous, is_durable=each) for each in recording.is_durable]

    assert levels == [1, 2], "NORMAL for the reservation, FULL for the grant"


def read_synchronous(_now: float) -> Dialogue[int]:
    (row,) = yield "PRAGMA synchronous", {}
    return int(row["synchronous"])


async def test_a_transaction_that_fails_does_not_fail_the_others_of_its_commit(engine: Engine) -> None:
    def fail(_now: float) -> Dialogue[None]:
        yield "DELETE FROM passes", {}
        raise ZeroDivisionError

    async with engine.open() as ledger:
        await grant_pass(ledger)
        twice = reservation()
        calls = [ledger.reserve(reservation(f"u-{n}"), []) for n in range(10)]
        calls += [ledger.run(fail), ledger.reserve(twice, []), ledger.reserve(twice, [])]

        outcomes = await asyncio.gather(*calls, return_exceptions=True)

        assert Counter(map(type, outcomes)) == {type(None): 11, ZeroDivisionError: 1, LedgerUnavailable: 1}
        assert len(await rows(ledger, "SELECT pass_id FROM passes")) == 12


@pytest.mark.long
async def test_the_log_stays_short_during_thousands_of_passes(engine: Engine) -> None:
    async with engine.open() as ledger:
        for _ in range(60):
            await asyncio.gather(*(grant_pass(ledger, user_id=f"u-{n}") for n in range(64)))
        longest = os.stat(f"{engine.url}-wal").st_size  # noqa: PTH116

    assert longest < 8000 * 4120


async def test_rows_are_kept_after_a_restart_and_the_schema_is_created_once(engine: Engine) -> None:
    conversations = []
    for _ in range(3):
        async with engine.open() as ledger:
            conversations.append(await grant_pass(ledger))

    async with engine.open() as ledger:
        assert [(await ledger.find_pass(each)).conversation_id for each in conversations] == conversations


async def test_the_file_holds_no_secret(engine: Engine) -> None:
    async with engine.open() as ledger:
        for _ in range(20):
            await grant_pass(ledger)
        files = [path for path in Path(engine.url).parent.iterdir() if path.name.startswith("ledger.db")]

        written = b"".join(path.read_bytes() for path in files).decode("latin-1")

    assert len(files) == 3, "the database, its log and its index"
    assert "conv_" in written
    assert secrets_in(written) == []


async def test_64_requests_at_once_share_at_most_three_commits(engine: Engine) -> None:
    async with engine.open() as ledger:
        log = Path(f"{engine.url}-wal")
        before = count_commits(log)

        await asyncio.gather(*(ledger.reserve(reservation(f"u-{n}"), [limit(1)]) for n in range(64)))

        assert 1 <= count_commits(log) - before <= 3
        assert len(await rows(ledger, "SELECT pass_id FROM passes")) == 64


def count_commits(log: Path) -> int:
    """Count the frames that end a transaction: their header holds the size of the database (SQLite's file format)."""
    frames = log.read_bytes()[32:]
    return sum(any(frames[start + 4 : start + 8]) for start in range(0, len(frames), 4096 + 24))


async def test_a_refusal_does_not_roll_back_the_others_of_its_commit(engine: Engine) -> None:
    async with engine.open() as ledger:
        outcomes = await asyncio.gather(
            *(ledger.reserve(reservation(f"u-{n % 2}"), [limit(1)]) for n in range(64)), return_exceptions=True
        )

        assert [outcome for outcome in outcomes if outcome is None] == [None, None]
        assert sorted(row["user_id"] for row in await rows(ledger, "SELECT user_id FROM passes")) == ["u-0", "u-1"]


@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.long)])
@pytest.mark.alone
async def test_while_the_file_is_locked_passes_are_refused_in_time_and_then_granted(engine: Engine, count: int) -> None:
    async with engine.open(answer_seconds=ANSWER_SECONDS) as ledger:
        blocker = sqlite3.connect(engine.url)
        blocker.execute("BEGIN IMMEDIATE")
        begun = time.monotonic()

        outcomes = await asyncio.gather(
            *(ledger.reserve(reservation(f"u-{n}"), []) for n in range(count)), return_exceptions=True
        )
        waited = time.monotonic() - begun
        blocker.rollback()
        blocker.close()
        await grant_pass(ledger)

        assert Counter(map(type, outcomes)) == {LedgerUnavailable: count}
        assert waited < ANSWER_SECONDS + 2
        assert len(await rows(ledger, "SELECT pass_id FROM passes")) == 1, "a refused pass is not counted"


@contextmanager
def limit_log_growth(engine: Engine, most_bytes: int) -> Iterator[None]:
    """Let the log grow by `most_bytes`. Python ignores SIGXFSZ, so a longer write fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = Path(f"{engine.url}-wal").stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + most_bytes, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_while_the_disk_is_full_passes_are_refused_and_then_granted(engine: Engine) -> None:
    async with engine.open() as ledger:
        before = await grant_pass(ledger)
        with limit_log_growth(engine, 5000):
            outcomes = await asyncio.gather(
                *(ledger.reserve(reservation(f"full-{n}"), []) for n in range(100)), return_exceptions=True
            )

        after = await grant_pass(ledger)
        kept = await rows(ledger, "SELECT conversation_id FROM passes WHERE conversation_id IS NOT NULL")

    refusals = [outcome for outcome in outcomes if outcome is not None]
    assert {(type(refusal), type(refusal.__cause__)) for refusal in refusals} == {
        (LedgerUnavailable, sqlite3.OperationalError)
    }
    assert {row["conversation_id"] for row in kept} == {before, after}


async def test_the_check_fails_while_the_disk_is_full_and_then_succeeds(engine: Engine) -> None:
    async with engine.open() as ledger:
        await ledger.check()
        with limit_log_growth(engine, 0), pytest.raises(LedgerUnavailable):
            await ledger.check()
        await ledger.check()


async def test_after_a_failed_pass_the_check_writes_as_much_as_a_pass(engine: Engine) -> None:
    async with engine.open() as ledger:
        await grant_pass(ledger)
        with limit_log_growth(engine, 5 * 4120):  # the check writes two pages of 4096 bytes, each with a header of 24
            await ledger.check()
            with pytest.raises(LedgerUnavailable):
                await ledger.reserve(reservation(), [])
            with pytest.raises(LedgerUnavailable):
                await ledger.check()
        await ledger.check()
        with limit_log_growth(engine, 3 * 4120):
            await ledger.check()  # the last check succeeded, so this one writes one row only


@contextmanager
def move_away(path: Path, *, copy: str) -> Iterator[None]:
    """Move a file away and back. Meanwhile the path has no file, or a copy."""
    aside = path.with_suffix(".aside")
    path.rename(aside)
    if copy == "a copy":
        path.write_bytes(aside.read_bytes())
    yield
    aside.rename(path)


@pytest.mark.parametrize("suffix", ["", "-wal"])
@pytest.mark.parametrize("copy", ["nothing", "a copy"])
async def test_no_pass_is_written_to_a_deleted_or_replaced_file(engine: Engine, suffix: str, copy: str) -> None:
    path, reserved = Path(engine.url + suffix), reservation()
    async with engine.open() as ledger:
        await grant_pass(ledger)
        await ledger.reserve(reserved, [])
        with move_away(path, copy=copy):
            attempts = ledger.grant(reserved, credential()), ledger.check(), ledger.reserve(reservation(), [])
            refused = await asyncio.gather(*attempts, return_exceptions=True)
        await ledger.grant(reserved, credential())
        await ledger.check()

    notes = [each.operator_note for each in refused if isinstance(each, LedgerUnavailable)]
    assert len(notes) == 3
    assert all(str(path) in note and "restart voicepass" in note for note in notes)


async def test_a_symlink_that_points_to_another_file_counts_as_a_replaced_file(engine: Engine, tmp_path: Path) -> None:
    link, other = tmp_path / "link.db", tmp_path / "other.db"
    link.symlink_to(engine.url)
    other.touch()
    async with open_sqlite(str(link), clock=engine.clock) as ledger:
        await grant_pass(ledger)
        link.unlink()
        link.symlink_to(other)

        with pytest.raises(LedgerUnavailable):
            await grant_pass(ledger)


async def test_a_check_leaves_nothing_behind(engine: Engine) -> None:
    async with engine.open() as ledger:
        await ledger.check()
        with limit_log_growth(engine, 0), pytest.raises(LedgerUnavailable):
            await grant_pass(ledger)
        await ledger.check()  # this one writes as much as a pass

        assert await rows(ledger, "SELECT name FROM leases") == []
        assert await rows(ledger, "SELECT pass_id FROM passes") == []


async def test_a_ledger_that_cannot_be_opened_stops_the_start(engine: Engine, tmp_path: Path) -> None:
    del engine
    (tmp_path / "not-a-database").write_text("something else" * 100)

    for path in (tmp_path / "missing" / "ledger.db", tmp_path, tmp_path / "not-a-database"):
        with pytest.raises(LedgerUnavailable):
            async with open_sqlite(str(path), clock=lambda: START):
                pass


async def test_processes_that_start_at_once_share_a_new_file(engine: Engine) -> None:
    started = [FORKS.Process(target=_open_once, args=(engine.url,)) for _ in range(6)]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=20)

    assert [process.exitcode for process in started] == [0] * 6


def _open_once(path: str) -> None:
    async def once() -> None:
        async with open_sqlite(path, clock=lambda: START) as ledger:
            await grant_pass(ledger)

    asyncio.run(once())
