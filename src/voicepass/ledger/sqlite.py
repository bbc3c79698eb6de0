"""The embedded ledger: one SQLite file (or memory), written by one thread."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib.resources import files
from typing import TypeVar

from voicepass.errors import BadAnswer, ConversationUnknown, LedgerUnavailable
from voicepass.model import Grant, Transport

Result = TypeVar("Result")

BUSY_TIMEOUT_SECONDS = 1.0  # another process may hold the file; well inside a request's deadline


_INSERT = """
INSERT INTO grants
SELECT :request_id, :granted_at, :token_issuer, :user_id, :agent_alias, :agent_id, :transport,
       :conversation_id, :credential_sha256, :expires_at
WHERE NOT EXISTS (
    SELECT 1 FROM grants
    WHERE conversation_id = :conversation_id AND (token_issuer, user_id) <> (:token_issuer, :user_id)
)
"""

_FIND = "SELECT * FROM grants WHERE conversation_id = ? ORDER BY granted_at DESC LIMIT 1"


class SqliteLedger:
    """Writes and finds grants. Made by `open_sqlite`, which also brings the schema up to date."""

    def __init__(self, *, connection: sqlite3.Connection, thread: ThreadPoolExecutor) -> None:
        self._connection = connection
        self._thread = thread

    async def record(self, grant: Grant) -> None:
        """Write one grant durably. Raises LedgerUnavailable or BadAnswer; then nothing was written.

        BadAnswer: ElevenLabs named a conversation that was issued to someone else, so whose it is cannot be told.
        """
        if not await self._run(lambda: self._insert(grant)):
            raise BadAnswer(operator_note="ElevenLabs named a conversation that was issued to another user before")

    async def issued(self, conversation_id: str) -> Grant:
        """Return the grant of a conversation, or raise ConversationUnknown where it was not issued here."""
        row = await self._run(lambda: self._connection.execute(_FIND, (conversation_id,)).fetchone())
        if row is None:
            raise ConversationUnknown
        return Grant(**(dict(row) | {"transport": Transport(row["transport"])}))

    async def check(self) -> None:
        """Raise LedgerUnavailable unless the ledger answers."""
        await self._run(lambda: self._connection.execute("SELECT 1 FROM grants LIMIT 1").fetchone())

    def _insert(self, grant: Grant) -> bool:
        with self._connection:
            return self._connection.execute(_INSERT, asdict(grant)).rowcount == 1

    async def _run(self, work: Callable[[], Result]) -> Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.Error as error:
            raise LedgerUnavailable(operator_note=f"the ledger does not answer: {error}") from error


@asynccontextmanager
async def open_sqlite(path: str) -> AsyncIterator[SqliteLedger]:
    """Open the ledger at `path` (":memory:" for one that is gone with the process), schema up to date.

    Raises sqlite3.Error when the file cannot be opened: the service does not start without its ledger.
    """
    loop = asyncio.get_running_loop()
    # One thread owns the connection: SQLite has one writer anyway, and the event loop never waits for the disk.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger") as thread:
        connection = await loop.run_in_executor(thread, _connect, path)
        try:
            yield SqliteLedger(connection=connection, thread=thread)
        finally:
            await loop.run_in_executor(thread, connection.close)


def _connect(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_SECONDS, isolation_level="IMMEDIATE")
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # a pass that was handed out survives a power cut
    _migrate(connection)
    return connection


def _migrate(connection: sqlite3.Connection) -> None:
    """Apply the numbered files of `schema/` that this database has not seen, each in a transaction of its own."""
    steps = sorted((step for step in files(__package__).joinpath("schema").iterdir()), key=lambda step: step.name)
    for number, step in enumerate(steps, start=1):
        with connection:
            connection.execute("BEGIN IMMEDIATE")  # before the version is read: two instances may start at once
            if connection.execute("PRAGMA user_version").fetchone()[0] < number:
                for statement in step.read_text().split(";\n"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {number}")
