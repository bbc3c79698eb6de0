"""The embedded engine: one SQLite file (or memory). One thread writes, and commits together what arrives together."""

import asyncio
import os
import sqlite3
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from voicepass.errors import LedgerUnavailable, Refusal
from voicepass.ledger import ANSWER_SECONDS, REPLY_SECONDS, Ledger
from voicepass.ledger.dialogue import LOCKS, Dialogue
from voicepass.ledger.schema import steps
from voicepass.model import Clock

Result = TypeVar("Result")

MAX_BATCH: Final = 64
COMMITS_PER_COPY: Final = 32
"""After this many commits, another thread copies the log into the file. Nobody waits for it."""
MAX_LOG_PAGES: Final = 4000
"""If the log is longer, the writer copies the rest itself: then SQLite writes it from its start again."""


@dataclass(slots=True, frozen=True)
class Call:
    """A rule that waits to be run, and the future that gets its outcome."""

    rule: Callable[[float], Dialogue[Any]]
    is_durable: bool
    outcome: asyncio.Future[Any]


@dataclass(slots=True, frozen=True)
class OpenFile:
    """The writer's connection, the copier's (None for a ledger in memory), and the files that they opened, by path."""

    connection: sqlite3.Connection
    copier: sqlite3.Connection | None
    files: Mapping[str, os.stat_result]

    def check_in_place(self) -> None:
        """Raise OperationalError if somebody deleted or replaced a file: then nobody would read what we write.

        voicepass does not open the new file by itself. In a new one, every limit would begin at zero.
        """
        for path, opened in self.files.items():
            try:
                is_in_place = os.path.samestat(os.stat(path), opened)  # noqa: PTH116 - a Path costs as much again
            except OSError:
                is_in_place = False
            if not is_in_place:
                raise sqlite3.OperationalError(
                    f"{path} was deleted or replaced while voicepass had it open: put it back, or restart voicepass"
                )

    def close(self) -> None:
        """Close both connections. The last one copies what is left of the log."""
        if self.copier is not None:
            self.copier.close()
        self.connection.close()


@dataclass(kw_only=True, eq=False)
class SqliteLedger(Ledger):
    """Made by `open_sqlite`. One transaction runs all rules that arrived while the last one was synced to disk.

    The sync is most of a commit's time. Because they share it, 64 commits cost little more than one.
    """

    file: OpenFile
    writer: ThreadPoolExecutor
    copier: ThreadPoolExecutor
    clock: Clock
    answer_seconds: float
    _waiting: deque[Call] = field(default_factory=deque, init=False)
    _batch: asyncio.Future[list[Any]] | None = field(default=None, init=False)
    _copy: asyncio.Future[None] | None = field(default=None, init=False)
    _commits: int = field(default=0, init=False)
    _log_pages: int = field(default=0, init=False)

    async def run(
        self, rule: Callable[[float], Dialogue[Result]], *, locks: Sequence[str] = (), is_durable: bool = True
    ) -> Result:
        """Run a rule in the next transaction."""
        del locks  # there is one writer
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[Result] = loop.create_future()
        deadline = loop.call_later(self.answer_seconds, self._give_up, outcome)  # cheaper than asyncio.timeout
        self._waiting.append(Call(rule, is_durable, outcome))
        if self._batch is None:
            self._write_next()
        try:
            return await outcome
        except sqlite3.Error as error:
            raise LedgerUnavailable(operator_note=f"SQLite cannot be written: {error}") from error
        finally:
            deadline.cancel()

    def _give_up(self, outcome: asyncio.Future[Any]) -> None:
        if not outcome.done():
            note = f"SQLite gave no answer within {self.answer_seconds:g} s"
            outcome.set_exception(LedgerUnavailable(operator_note=note))

    async def finish(self) -> None:
        """Wait until every rule has its outcome, and no thread is at work."""
        while self._batch is not None:
            await asyncio.wait({self._batch})
            await asyncio.sleep(0)  # its callback may begin the next
        if self._copy is not None:
            await asyncio.wait({self._copy})

    def _write_next(self) -> None:
        if not self._waiting:
            self._batch = None
            return
        calls = [self._waiting.popleft() for _ in range(min(MAX_BATCH, len(self._waiting)))]
        self._batch = asyncio.get_running_loop().run_in_executor(self.writer, self._commit, calls)
        self._batch.add_done_callback(lambda done: self._answer(calls, done.result()))

    def _answer(self, calls: Sequence[Call], outcomes: Sequence[Any]) -> None:
        for call, outcome in zip(calls, outcomes, strict=True):
            if call.outcome.done():  # its caller is gone
                continue
            if isinstance(outcome, Exception):
                call.outcome.set_exception(outcome)
            else:
                call.outcome.set_result(outcome)
        self._copy_log()
        self._write_next()

    def _commit(self, calls: Sequence[Call]) -> list[Any]:
        """Run the rules in one transaction; return their results, refusals and errors."""
        try:
            return self._commit_together(calls)
        except sqlite3.OperationalError as error:  # the disk or a lock: it would fail for each of them
            return [error] * len(calls)
        except Exception as error:  # noqa: BLE001 - the mistake of one rule must not fail the others
            return [error] if len(calls) == 1 else [outcome for call in calls for outcome in self._commit([call])]

    def _commit_together(self, calls: Sequence[Call]) -> list[Any]:
        connection = self.file.connection
        if self._log_pages > MAX_LOG_PAGES:
            self._log_pages = 0
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        # A durable commit also makes the earlier ones durable, because SQLite syncs the log in its order.
        connection.execute(f"PRAGMA synchronous = {'FULL' if any(call.is_durable for call in calls) else 'NORMAL'}")
        connection.execute("BEGIN IMMEDIATE")
        try:
            # If a caller has gone, its rule is not run: then nobody has to undo it.
            outcomes = [None if call.outcome.done() else self._play(call.rule(self.clock())) for call in calls]
            self.file.check_in_place()
            connection.execute("COMMIT")
        except BaseException:
            connection.rollback()
            raise
        return outcomes

    def _play(self, dialogue: Dialogue[Any]) -> Any:  # noqa: ANN401
        try:
            statement, parameters = next(dialogue)
            while True:
                rows = []
                if statement not in LOCKS:
                    rows = [dict(row) for row in self.file.connection.execute(statement, parameters)]
                statement, parameters = dialogue.send(rows)
        except StopIteration as end:
            return end.value
        except Refusal as refusal:  # rules raise it before they write
            return refusal

    def _copy_log(self) -> None:
        self._commits += 1
        if self._commits >= COMMITS_PER_COPY and (self._copy is None or self._copy.done()):
            self._commits = 0
            self._copy = asyncio.get_running_loop().run_in_executor(self.copier, self._checkpoint)

    def _checkpoint(self) -> None:
        if self.file.copier is not None:
            with suppress(sqlite3.Error):  # the next one tries again, and a writer that fails says why
                _, self._log_pages, _ = self.file.copier.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()


@asynccontextmanager
async def open_sqlite(
    path: str, *, clock: Clock, answer_seconds: float = ANSWER_SECONDS
) -> AsyncIterator[SqliteLedger]:
    """Open the ledger at `path` (":memory:" for one that ends with the process), and update its schema.

    Raises LedgerUnavailable if the file cannot be opened: the service does not start without its ledger.
    """
    loop = asyncio.get_running_loop()
    # The copier has a thread of its own: the loop's threads may all be busy, and the log would grow without end.
    with ThreadPoolExecutor(1, "ledger") as writer, ThreadPoolExecutor(1, "ledger-copier") as copier:
        try:
            file = await loop.run_in_executor(writer, _open, path, answer_seconds - REPLY_SECONDS)
        except (sqlite3.Error, OSError) as error:
            raise LedgerUnavailable(operator_note=f"{path} cannot be opened: {error}") from error
        ledger = SqliteLedger(file=file, writer=writer, copier=copier, clock=clock, answer_seconds=answer_seconds)
        try:
            yield ledger
        finally:
            await ledger.finish()
            await loop.run_in_executor(writer, file.close)


def _open(path: str, busy_seconds: float) -> OpenFile:
    connection = sqlite3.connect(path, timeout=busy_seconds, isolation_level=None)
    try:
        _prepare(connection)
        (_, _, resolved) = connection.execute("PRAGMA database_list").fetchone()  # "" for a ledger in memory
        if not resolved:
            return OpenFile(connection, None, {})
        # The given path may be a symlink, which could lead elsewhere later. The log is beside the file itself.
        log = f"{resolved}-wal"
        paths = [os.path.abspath(path)]  # noqa: PTH100 - the working directory may change
        if os.path.exists(log):  # noqa: PTH110 - some file systems do not let SQLite have one
            paths.append(log)
        found = {each: os.stat(each) for each in paths}  # noqa: PTH116
        return OpenFile(connection, sqlite3.connect(path, isolation_level=None, check_same_thread=False), found)
    except BaseException:
        connection.close()
        raise


def _prepare(connection: sqlite3.Connection) -> None:
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA wal_autocheckpoint = 0")  # the copier does it
    connection.execute("PRAGMA temp_store = MEMORY")  # otherwise each RETURNING creates a file
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("BEGIN IMMEDIATE")  # before the version is read: two instances may start together
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    for number, statements in enumerate(steps(), start=1):
        if version < number:
            for statement in statements:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
    connection.execute("COMMIT")
