"""The embedded engine: one SQLite file (or memory), one thread, and what comes together is committed together."""

import asyncio
import os
import sqlite3
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from voicepass.errors import LedgerUnavailable, Refusal
from voicepass.ledger import ANSWER_SECONDS, Ledger
from voicepass.ledger.dialogue import SHARE, Dialogue
from voicepass.ledger.schema import steps
from voicepass.model import Clock

Result = TypeVar("Result")

BUSY_TIMEOUT_SECONDS: Final = 1.0  # another process may hold the file; well inside a request's deadline
MAX_BATCH: Final = 64
CHECKPOINT_PAGES: Final = 4000  # of 4 kB, four times SQLite's own: whoever comes amid a checkpoint waits for it


@dataclass(slots=True, frozen=True)
class Asked:
    """A rule that waits for its turn, and whoever waits for its answer."""

    rule: Callable[[float], Dialogue[Any]]
    is_durable: bool
    answer: asyncio.Future[Any]


@dataclass(slots=True, frozen=True)
class OpenedFile:
    """The connection, and which files it had opened at which path: the database and its log."""

    connection: sqlite3.Connection
    files: Mapping[str, tuple[int, int] | None]

    def check_in_place(self) -> None:
        """Raise OperationalError if a file was deleted or replaced: what is written to it now, nobody would read.

        voicepass opens no other file by itself: in a new one, every limit would begin at zero.
        """
        for path, opened in self.files.items():
            if opened is None or _identity(path) != opened:
                raise sqlite3.OperationalError(
                    f"{path} was deleted or replaced while voicepass had it open: put it back, or restart voicepass"
                )


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - a Path costs as much again, for each commit
    except OSError:
        return None
    return found.st_dev, found.st_ino


class SqliteLedger(Ledger):
    """Made by `open_sqlite`. One transaction carries all that waited while the last was synced to disk.

    A sync is most of a commit's cost: with it shared, durability for 64 users costs little more than for one.
    """

    def __init__(self, *, opened: OpenedFile, thread: ThreadPoolExecutor, clock: Clock, wall: Clock) -> None:
        self._opened = opened
        self._connection = opened.connection
        self._thread = thread
        self._clock = clock
        self._wall = wall
        self._waiting: deque[Asked] = deque()
        self._writer: asyncio.Future[list[Any]] | None = None

    async def _run(
        self, rule: Callable[[float], Dialogue[Result]], *, locks: Sequence[str] = (), is_durable: bool = True
    ) -> Result:
        del locks  # there is one writer: every transaction comes after the other anyway
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Result] = loop.create_future()
        too_late = loop.call_later(ANSWER_SECONDS, _give_up, answer)
        self._waiting.append(Asked(rule, is_durable, answer))
        if self._writer is None:
            self._write_next()
        try:
            return await answer
        finally:
            too_late.cancel()

    def _ahead_seconds(self) -> float:
        return self._clock() - self._wall()

    async def written(self) -> None:
        """Wait until all that was asked has been answered."""
        while self._writer is not None:
            await asyncio.wait({self._writer})
            await asyncio.sleep(0)  # its callback may begin the next

    def _write_next(self) -> None:
        if not self._waiting:
            self._writer = None
            return
        batch = [self._waiting.popleft() for _ in range(min(MAX_BATCH, len(self._waiting)))]
        loop = asyncio.get_running_loop()
        self._writer = loop.run_in_executor(self._thread, self._commit, batch)
        self._writer.add_done_callback(lambda done: self._answer(batch, done))

    def _answer(self, batch: Sequence[Asked], done: asyncio.Future[Any]) -> None:
        error = done.exception()
        outcomes = [error] * len(batch) if error is not None else done.result()
        for answer, outcome in zip([asked.answer for asked in batch], outcomes, strict=True):
            if answer.done():  # whoever asked has gone
                continue
            if isinstance(outcome, sqlite3.Error):
                refusal = LedgerUnavailable(operator_note=f"SQLite cannot be written: {outcome}")
                refusal.__cause__ = outcome
                answer.set_exception(refusal)
            elif isinstance(outcome, BaseException):
                answer.set_exception(outcome)
            else:
                answer.set_result(outcome)
        self._write_next()

    def _commit(self, batch: Sequence[Asked]) -> list[Any]:
        """Run the rules in one transaction; return results and refusals.

        Whoever was told no meanwhile, or has gone, is passed over: what is not done, nobody has to give back.
        """
        cursor = self._connection.cursor()
        # In its log what follows is never older: a durable commit makes all before it durable too.
        cursor.execute(f"PRAGMA synchronous = {'FULL' if any(asked.is_durable for asked in batch) else 'NORMAL'}")
        cursor.execute("BEGIN IMMEDIATE")
        try:
            outcomes = [
                None if asked.answer.done() else self._play(cursor, asked.rule(self._clock())) for asked in batch
            ]
            self._opened.check_in_place()
            cursor.execute("COMMIT")
        except BaseException:
            self._connection.rollback()
            raise
        return outcomes

    def _play(self, cursor: sqlite3.Cursor, dialogue: Dialogue[Any]) -> Any:  # noqa: ANN401
        try:
            statement, parameters = next(dialogue)
            while True:
                rows = []
                if statement is not SHARE:  # there is one writer: nobody else is in any transaction
                    rows = [dict(row) for row in cursor.execute(statement, parameters).fetchall()]
                statement, parameters = dialogue.send(rows)
        except StopIteration as end:
            return end.value
        except Refusal as refusal:  # a rule's own answer, and before it wrote; of anything else the whole batch fails
            return refusal


def _give_up(answer: asyncio.Future[Any]) -> None:
    if not answer.done():
        note = f"SQLite gave no answer within {ANSWER_SECONDS:g} s"
        answer.set_exception(LedgerUnavailable(operator_note=note))


@asynccontextmanager
async def open_sqlite(path: str, *, clock: Clock, wall: Clock | None = None) -> AsyncIterator[SqliteLedger]:
    """Open the ledger at `path` (":memory:" for one that is gone with the process), schema up to date.

    It decides by `clock`. `wall` is the real time, which ElevenLabs has too, unless that is `clock`.

    Raises LedgerUnavailable when the file cannot be opened: the service does not start without its ledger.
    """
    loop = asyncio.get_running_loop()
    # One thread owns the connection: SQLite has one writer anyway, and the event loop never waits for the disk.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger") as thread:
        try:
            opened = await loop.run_in_executor(thread, _open, path)
        except sqlite3.Error as error:
            raise LedgerUnavailable(operator_note=f"{path} cannot be opened: {error}") from error
        ledger = SqliteLedger(opened=opened, thread=thread, clock=clock, wall=wall or clock)
        try:
            yield ledger
        finally:
            await ledger.written()
            await loop.run_in_executor(thread, opened.connection.close)


def _open(path: str) -> OpenedFile:
    connection = _connect(path)
    (_, _, resolved) = connection.execute("PRAGMA database_list").fetchone()  # "" for a ledger in memory
    # The path as it was given may be a symlink, which could lead elsewhere later. The log is beside the file itself.
    log = f"{resolved}-wal"
    paths = [os.path.abspath(path)] if resolved else []  # noqa: PTH100 - the working directory may change
    if os.path.exists(log):  # noqa: PTH110 - some file systems do not let SQLite have one
        paths.append(log)
    return OpenedFile(connection, {each: _identity(each) for each in paths})


def _connect(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None)
    try:
        _prepare(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection) -> None:
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
    connection.execute("PRAGMA temp_store = MEMORY")  # else each RETURNING makes a file of its own
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("BEGIN IMMEDIATE")  # before the version is read: two instances may start at once
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    for number, statements in enumerate(steps(), start=1):
        if version < number:
            for statement in statements:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
    connection.execute("COMMIT")
