"""The engine for many instances: they share one PostgreSQL, its locks and its clock."""

import asyncio
import os
import re
import select
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Final, Generic, TypeVar
from weakref import WeakValueDictionary

import psycopg
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from voicepass.errors import LedgerUnavailable
from voicepass.ledger import ANSWER_SECONDS, REPLY_SECONDS, Ledger
from voicepass.ledger.dialogue import LOCKS, Dialogue, Row, read_statements
from voicepass.ledger.postgres_failures import Connection, LastFailure, RecordingConnection, explain_failure
from voicepass.ledger.postgres_url import parse_url
from voicepass.ledger.records import check
from voicepass.ledger.schema import steps
from voicepass.ledger.sums import CHANGE
from voicepass.model import Clock

Result = TypeVar("Result")
_Cursor = psycopg.AsyncClientCursor[dict[str, Any]]  # it sends several statements at once

MAX_CONNECTIONS: Final = 10  # of each instance; PostgreSQL allows 100 in all by default
MIGRATION_SECONDS: Final = 60
RECONNECT_SECONDS: Final = 1.0
CLOSING_SECONDS: Final = 1.0

_BEGIN: Final = read_statements("postgres")["begin"]


@dataclass(slots=True, kw_only=True)
class _Call(Generic[Result]):
    """A transaction in flight: whether its caller still waits for it, and on which connection it runs."""

    rule: Callable[[float], Dialogue[Result]]
    locks: Sequence[str]
    is_durable: bool
    is_awaited: bool = True
    connection: Connection | None = None
    must_flush: bool = False

    def check_awaited(self) -> None:
        """Raise LedgerUnavailable if the caller is gone, or was refused. What is not committed, nobody has to undo."""
        if not self.is_awaited:
            raise LedgerUnavailable(operator_note="nobody waits for this any more")


@dataclass(kw_only=True, eq=False)
class PostgresLedger(Ledger):
    """Made by `open_postgres`. Each rule is a transaction of its own, on a pooled connection."""

    pool: AsyncConnectionPool[Connection]
    clock: Clock | None
    last_failure: LastFailure
    answer_seconds: float
    _calls: dict[asyncio.Task[Any], _Call[Any]] = field(default_factory=dict, init=False)
    _queues: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary, init=False)
    _connected_at: float = field(default=float("-inf"), init=False)

    async def run(
        self, rule: Callable[[float], Dialogue[Result]], *, locks: Sequence[str] = (), is_durable: bool = True
    ) -> Result:
        """Run a rule in a transaction of its own."""
        # In a task of its own: a cancelled psycopg would wait for a server that may be frozen.
        call = _Call(rule=rule, locks=locks, is_durable=is_durable)
        task = asyncio.create_task(self._transact(call))
        self._calls[task] = call
        task.add_done_callback(self._forget)
        try:
            await asyncio.wait({task}, timeout=self.answer_seconds)
        finally:
            call.is_awaited = False
        if not task.done():
            raise self.last_failure.explain(f"PostgreSQL gave no answer within {self.answer_seconds:g} s")
        return task.result()

    def _forget(self, task: asyncio.Task[Any]) -> None:
        del self._calls[task]
        if not task.cancelled():
            task.exception()  # otherwise asyncio reports it as lost if the caller is gone

    async def _transact(self, call: _Call[Result]) -> Result:
        with _fails_closed(self.last_failure):
            async with AsyncExitStack() as stack:
                # Who will wait for a lock waits here first: then these hold one connection, and others get the rest.
                for lock in call.locks:
                    await stack.enter_async_context(self._queues.setdefault(lock, asyncio.Lock()))
                try:
                    result = await self._play(call)
                except (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure):
                    result = await self._play(call)  # PostgreSQL rolled it back in favour of another: try once more
                except psycopg.errors.ReadOnlySqlTransaction:
                    await self._connect_again()
                    raise
            if call.must_flush:  # a durable commit makes all earlier ones durable
                flush = partial(check, name=f"flush {uuid.uuid4().hex}", is_whole=False)
                await self._play(_Call(rule=flush, locks=(), is_durable=True))
            return result

    async def _play(self, call: _Call[Result]) -> Result:
        call.check_awaited()
        async with self.pool.connection() as call.connection, _Cursor(call.connection) as cursor:
            call.check_awaited()  # it may have waited for the connection too long
            limit_seconds = self.answer_seconds - REPLY_SECONDS
            now = await _begin(cursor, locks=call.locks[:1], limit_seconds=limit_seconds, is_durable=call.is_durable)
            return await _converse(call, cursor, now if self.clock is None else self.clock())

    async def _connect_again(self) -> None:
        """Replace all connections, once in a second at most: after a failover they may lead to a replica."""
        now = time.monotonic()
        if now >= self._connected_at + RECONNECT_SECONDS:
            self._connected_at = now
            await self.pool.drain()

    async def aclose(self) -> None:
        """Wait for the calls in flight. Close the connections to a server that does not answer them."""
        while self._calls and (await asyncio.wait(self._calls, timeout=CLOSING_SECONDS))[1]:
            for connection in [call.connection for call in self._calls.values() if call.connection is not None]:
                with suppress(psycopg.Error, OSError), socket.socket(fileno=os.dup(connection.fileno())) as line:
                    line.shutdown(socket.SHUT_RDWR)


@asynccontextmanager
async def open_postgres(
    url: str, *, clock: Clock | None = None, answer_seconds: float = ANSWER_SECONDS
) -> AsyncIterator[PostgresLedger]:
    """Open the ledger at `url` (postgresql://…), and update its schema. Without `clock`, the time is the database's.

    Raises LedgerUnavailable if the database cannot be used: the service does not start without its ledger.
    """
    options, last_failure = parse_url(url) | OPTIONS, LastFailure()
    with _fails_closed(last_failure):
        await _migrate(options)
    pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
        connection_class=RecordingConnection,
        kwargs=options | {"last_failure": last_failure},
        check=lambda connection: _check(connection, pool),
        min_size=1,
        max_size=MAX_CONNECTIONS,
        timeout=answer_seconds,
        reconnect_timeout=0.5,  # then the next caller tries: a growing pause would outlast the outage
        open=False,
    )
    async with pool:
        ledger = PostgresLedger(pool=pool, clock=clock, last_failure=last_failure, answer_seconds=answer_seconds)
        try:
            yield ledger
        finally:
            await ledger.aclose()


OPTIONS: Final[dict[str, Any]] = {
    "connect_timeout": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 1,
    "keepalives_count": 3,
    "tcp_user_timeout": 3000,  # milliseconds
    "fallback_application_name": "voicepass",
    "autocommit": True,  # _BEGIN begins each transaction: psycopg would need a round trip for it
    # A prepared statement belongs to one session, and fails for good once a newer instance has added a column.
    "prepare_threshold": None,
    "row_factory": dict_row,
    "client_encoding": "utf8",
}
"""A connection that hangs must not keep a request. libpq sends the server only the name and the encoding of these."""


async def _converse(call: _Call[Result], cursor: _Cursor, now: float) -> Result:
    """Send what the rule yields, and commit.

    A statement without rows waits for the next one, or for the commit, and is sent with it. So nobody holds a lock that
    all callers share, which rules take last, while voicepass waits for another answer.
    """
    dialogue, to_send = call.rule(now), list[str]()
    try:
        statement, parameters = next(dialogue)
        while True:
            if statement is CHANGE and call.is_durable:
                # All callers share these rows: nobody holds their locks while it waits for the disk.
                to_send.append("SET LOCAL synchronous_commit = off")
                call.must_flush = True
            to_send.append(cursor.mogrify(_translate(statement), parameters))
            rows: Sequence[Row] = []
            if _has_rows(statement):
                await cursor.execute(";".join(to_send).encode())
                await cursor.set_result(-1)
                rows, to_send = await cursor.fetchall() if cursor.description else [], []
            statement, parameters = dialogue.send(rows)
    except StopIteration as end:
        result: Result = end.value
    call.check_awaited()
    await cursor.execute(";".join([*to_send, "COMMIT"]).encode())
    return result


async def _begin(cursor: _Cursor, *, locks: Sequence[str], limit_seconds: float, is_durable: bool = True) -> float:
    """Begin a transaction of bounded statements, take the locks, and return the database's time."""
    limit = f"{limit_seconds * 1000:.0f}ms"
    parameters = {"limit": limit, "synchronous_commit": "on" if is_durable else "off", "locks": list(locks)}
    await cursor.execute(_BEGIN, parameters)
    await cursor.set_result(-1)
    (begun,) = await cursor.fetchall()
    return float(begun["now"])


async def _check(connection: Connection, pool: AsyncConnectionPool[Connection]) -> None:
    """Refuse a connection that the server has closed: on an idle one there is nothing else to read."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    if poll.poll(0):
        await pool.drain()  # a server that was restarted has closed all of them
        raise psycopg.OperationalError("the server has closed the connection")


async def _migrate(options: dict[str, Any]) -> None:
    """Run the steps that this database has not run. Instances that start together do so one after the other."""
    async with await Connection.connect(**options) as connection, _Cursor(connection) as cursor:
        await _begin(cursor, locks=["schema"], limit_seconds=MIGRATION_SECONDS)
        # While a step waits for a table, all statements of the other instances wait behind it.
        limit = f"'{ANSWER_SECONDS - REPLY_SECONDS:g}s'"
        await cursor.execute(
            f"SET LOCAL lock_timeout = {limit}; SET LOCAL idle_in_transaction_session_timeout = {limit}".encode()
        )
        # Not "IF NOT EXISTS": an instance may run as a role that must not create tables.
        await cursor.execute("SELECT to_regclass('schema_steps') AS name")
        (found,) = await cursor.fetchall()
        if found["name"] is None:
            await cursor.execute("CREATE TABLE schema_steps (number INTEGER PRIMARY KEY)")
        await cursor.execute("SELECT number FROM schema_steps")
        done = {row["number"] for row in await cursor.fetchall()}
        for number, statements in enumerate(steps(), start=1):
            if number not in done:
                note = f"INSERT INTO schema_steps (number) VALUES ({number})"  # noqa: S608 - a number of ours
                await cursor.execute(";\n".join([*statements, note]).encode())


@contextmanager
def _fails_closed(last_failure: LastFailure) -> Iterator[None]:
    try:
        yield
    except PoolTimeout as error:
        raise last_failure.explain("no connection to PostgreSQL was free in time") from error
    except (psycopg.Error, OSError) as error:
        raise LedgerUnavailable(operator_note=explain_failure(error)) from error


@cache
def _has_rows(statement: str) -> bool:
    is_change = statement.lstrip().startswith(("INSERT", "UPDATE", "DELETE"))
    return statement not in LOCKS and not (is_change and "RETURNING" not in statement)


@cache
def _translate(statement: str) -> bytes:
    """Write `:name` as psycopg does. Rules use no `::`, `%` or colon in a literal."""
    return re.sub(r":(\w+)", r"%(\1)s", statement).encode()
