"""The PostgreSQL engine: it refuses passes while the server fails, recovers by itself, and shares the database."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from tests.canaries import secrets_in
from tests.conftest import serving, serving_app, settings_with, signed_url
from tests.ledger.given import (
    PATIENT_SECONDS,
    TOKEN_ISSUER,
    Engine,
    Postgres,
    credential,
    grant_pass,
    limit,
    reservation,
    rows,
    settlement,
)
from tests.servers import listening
from voicepass.app import create_app
from voicepass.errors import LedgerUnavailable, RateLimited
from voicepass.ledger import ANSWER_SECONDS, Ledger, limits
from voicepass.ledger.dialogue import Dialogue
from voicepass.ledger.postgres import MAX_CONNECTIONS, open_postgres
from voicepass.ledger.schema import steps
from voicepass.ledger.sums import change_sums
from voicepass.model import Scope

ROOT = Path(__file__).parents[2]
IN_TIME_SECONDS = ANSWER_SECONDS + 2
"""A caller waits for ANSWER_SECONDS; two more are for a busy machine."""

pytestmark = [pytest.mark.anyio, pytest.mark.alone, pytest.mark.parametrize("engine", ["postgres"], indirect=True)]


@pytest.fixture
async def pooled(engine: Engine) -> AsyncIterator[Ledger]:
    """A ledger with the time limits of production and a pool full of connections."""
    async with engine.open(answer_seconds=ANSWER_SECONDS) as ledger:
        await asyncio.gather(*(grant_pass(ledger, user_id=f"u-{n}") for n in range(MAX_CONNECTIONS)))
        yield ledger


open_patiently = partial(open_postgres, answer_seconds=PATIENT_SECONDS)


async def measure(call: Awaitable[object]) -> tuple[object, float]:
    begun = time.monotonic()
    try:
        return await call, time.monotonic() - begun
    except Exception as error:  # noqa: BLE001 - the test looks at it
        return error, time.monotonic() - begun


async def wait_for_recovery(ledger: Ledger) -> None:
    """Grant a pass. On a busy machine the ledger may still refuse the first call after ANSWER_SECONDS, so retry."""
    begun = time.monotonic()
    while True:
        try:
            await grant_pass(ledger)
        except LedgerUnavailable:
            assert time.monotonic() - begun < IN_TIME_SECONDS
        else:
            return


async def reserve_at_once(ledger: Ledger, count: int = 40) -> list[tuple[object, float]]:
    calls = [ledger.reserve(reservation(f"burst-{n}"), [limit(1)]) for n in range(count)]
    return await asyncio.gather(*map(measure, calls))


@pytest.mark.long
async def test_while_the_server_is_down_passes_are_refused_in_time_and_then_granted(
    pooled: Ledger, postgres: Postgres
) -> None:
    postgres.stop()
    try:
        refused = await reserve_at_once(pooled)
        await asyncio.sleep(1)  # by then a pool that backs off still waits when the server is back
    finally:
        postgres.start()

    await wait_for_recovery(pooled)
    assert {type(outcome) for outcome, _ in refused} == {LedgerUnavailable}
    assert max(seconds for _, seconds in refused) < IN_TIME_SECONDS


async def test_a_restart_between_two_requests_refuses_nothing(pooled: Ledger, postgres: Postgres) -> None:
    postgres.stop()
    postgres.start()

    assert {outcome for outcome, _ in await reserve_at_once(pooled, 10)} == {None}


@pytest.mark.long
async def test_while_the_server_hangs_passes_are_refused_in_time_and_never_counted(
    pooled: Ledger, postgres: Postgres
) -> None:
    with freeze(postgres):
        refused = await reserve_at_once(pooled)

    await wait_for_recovery(pooled)
    assert {type(outcome) for outcome, _ in refused} == {LedgerUnavailable}
    assert max(seconds for _, seconds in refused) < IN_TIME_SECONDS
    await asyncio.sleep(0.5)
    ((late,),) = [
        row.values()
        for row in await rows(pooled, "SELECT count(*) AS n FROM passes WHERE user_id LIKE 'burst-' || '%%'")
    ]
    assert late == 0, "a refused request is not counted when the server continues"


@pytest.mark.long
async def test_a_frozen_server_does_not_delay_the_end_of_the_process(engine: Engine, postgres: Postgres) -> None:
    with contextlib.ExitStack() as stack:
        async with engine.open(answer_seconds=ANSWER_SECONDS) as ledger:
            await grant_pass(ledger)
            stack.enter_context(freeze(postgres))
            await reserve_at_once(ledger, 5)
            begun = time.monotonic()
        assert time.monotonic() - begun < 3 * IN_TIME_SECONDS


@contextlib.contextmanager
def hold_lock(url: str, lock: str) -> Iterator[None]:
    """Hold a lock of the ledger on another connection."""
    with psycopg.connect(url) as other:
        other.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (lock,))
        yield


async def wait_for_waiters(postgres: Postgres, count: int) -> None:
    """Return as soon as `count` transactions wait for a lock of the ledger."""
    question = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    async with asyncio.timeout(PATIENT_SECONDS):
        while postgres.run(question) != [(count,)]:  # noqa: ASYNC110 - the server sends no event
            await asyncio.sleep(0.01)


@contextlib.contextmanager
def freeze(postgres: Postgres) -> Iterator[None]:
    """Stop the server's processes with SIGSTOP: first the parent, which would start new ones, then its children."""
    processes = [postgres.pid]
    try:
        os.kill(postgres.pid, signal.SIGSTOP)
        processes += map(int, Path(f"/proc/{postgres.pid}/task/{postgres.pid}/children").read_text().split())
        send(processes[1:], signal.SIGSTOP)
        yield
    finally:
        send(processes, signal.SIGCONT)


def send(processes: list[int], number: signal.Signals) -> None:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def end_sessions(postgres: Postgres, role: str) -> None:
    """End every session of a role. The server waits until their processes are gone."""
    postgres.run(f"SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE usename = '{role}'")  # noqa: S608


@pytest.mark.long
async def test_a_server_without_free_connections_refuses_and_recovers(engine: Engine, postgres: Postgres) -> None:
    role = f"few_{os.urandom(4).hex()}"
    postgres.run(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 1")
    async with open_postgres(postgres.fresh(user=role), clock=engine.clock) as ledger:
        await grant_pass(ledger)
        assert {outcome for outcome, _ in await reserve_at_once(ledger, 5)} == {None}, (
            "one connection serves all requests"
        )
        # To occupy the last connection here would be unreliable: the pool may still be connecting, and take it first.
        postgres.run(f"ALTER ROLE {role} CONNECTION LIMIT 0")
        end_sessions(postgres, role)
        refused = await reserve_at_once(ledger, 5)
        postgres.run(f"ALTER ROLE {role} CONNECTION LIMIT 1")
        await wait_for_recovery(ledger)

    assert {type(outcome) for outcome, _ in refused} == {LedgerUnavailable}
    assert max(seconds for _, seconds in refused) < IN_TIME_SECONDS


async def test_a_connection_that_breaks_in_a_transaction_changes_nothing(pooled: Ledger, postgres: Postgres) -> None:
    def rule(_now: float) -> Dialogue[None]:
        ((pid,),) = [row.values() for row in (yield "SELECT pg_backend_pid() AS pid", {})]
        yield "DELETE FROM passes", {}
        postgres.run(f"SELECT pg_terminate_backend({pid}, 1000)")
        yield "SELECT 1 AS one", {}

    before = len(await rows(pooled, "SELECT pass_id FROM passes"))
    with pytest.raises(LedgerUnavailable):
        await pooled.run(rule)

    assert len(await rows(pooled, "SELECT pass_id FROM passes")) == before


@pytest.mark.parametrize(("failures", "expected"), [(1, "done"), (2, LedgerUnavailable)])
@pytest.mark.parametrize("error", [psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure])
async def test_a_transaction_that_was_rolled_back_for_another_is_retried_once(
    pooled: Ledger, error: type[psycopg.Error], failures: int, expected: object
) -> None:
    tries: list[float] = []

    def rule(now: float) -> Dialogue[str]:
        tries.append(now)
        yield "SELECT 1 AS one", {}
        if len(tries) <= failures:
            raise error
        return "done"

    outcome, _ = await measure(pooled.run(rule))

    assert outcome == expected or type(outcome) is expected
    assert len(tries) == 2


@pytest.mark.long
async def test_a_lock_held_by_another_session_refuses_passes_in_time(pooled: Ledger, engine: Engine) -> None:
    with psycopg.connect(engine.url) as other:
        other.execute("LOCK TABLE passes")
        refused = await reserve_at_once(pooled, 5)
    await wait_for_recovery(pooled)

    assert {type(outcome) for outcome, _ in refused} == {LedgerUnavailable}
    assert max(seconds for _, seconds in refused) < IN_TIME_SECONDS


async def test_a_flood_of_one_user_does_not_use_the_connections_of_others(engine: Engine, postgres: Postgres) -> None:
    lock = limits.name_scope(Scope.USER, {"token_issuer": TOKEN_ISSUER, "user_id": "u-flood"})
    async with engine.open() as ledger:
        with hold_lock(engine.url, lock):
            calls = [ledger.reserve(reservation("u-flood"), [limit(1)]) for _ in range(100)]
            flood = [asyncio.create_task(measure(each)) for each in calls]
            await wait_for_waiters(postgres, 1)
            others = await reserve_at_once(ledger, 20)
            answered = [each.done() for each in flood]
        outcomes = [outcome for outcome, _ in await asyncio.gather(*flood)]

    assert {outcome for outcome, _ in others} == {None}
    assert not any(answered), "the flood waits for this lock"
    assert outcomes.count(None) == 1


async def test_the_time_comes_from_the_database_and_grows_under_a_lock(engine: Engine) -> None:
    async with open_patiently(engine.url) as one, open_patiently(engine.url) as two:
        moments: list[float] = []

        def rule(now: float) -> Dialogue[None]:
            moments.append(now)
            yield "SELECT 1 AS one", {}

        await asyncio.gather(*((one, two)[n % 2].run(rule, locks=["l"]) for n in range(40)))

    assert moments == sorted(moments)
    assert len(set(moments)) == 40
    assert abs(moments[0] - time.time()) < 5


async def test_only_one_of_30_callers_at_once_gets_a_lease_by_the_databases_clock(engine: Engine) -> None:
    async with open_patiently(engine.url) as one, open_patiently(engine.url) as two:
        for number in range(5):
            taken = await asyncio.gather(*((one, two)[n % 2].take_lease(f"l-{number}", 60) for n in range(30)))

            assert taken.count(True) == 1


async def test_every_connection_is_durable_has_time_limits_and_reads_only_committed_rows(pooled: Ledger) -> None:
    names = ["synchronous_commit", "statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"]
    names += ["transaction_isolation", "search_path"]

    shown = [next(iter((await rows(pooled, f"SHOW {name}"))[0].values())) for name in names]

    assert shown[:5] == ["on", "2s", "2s", "2s", "read committed"]
    assert shown[5].startswith("s"), "the options of the URL are kept"


async def test_every_tcp_connection_detects_a_lost_server_within_seconds(engine: Engine, postgres: Postgres) -> None:
    async with listening(postgres.relay) as address:
        server, url = urlsplit(address), urlsplit(engine.url)
        search_path = "&".join(part for part in url.query.split("&") if "host=" not in part)
        async with open_patiently(f"postgresql://postgres@{server.netloc}{url.path}?{search_path}") as ledger:
            await ledger.check()
            options = list_tcp_options(server.port)

    expected = {"SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 3000}
    assert options
    assert all(each == expected for each in options)


async def test_a_reservation_holds_shared_locks_for_one_round_trip(engine: Engine, postgres: Postgres) -> None:
    connections: list[list[bytes]] = []

    async def record(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        copy, messages = asyncio.StreamReader(), list[bytes]()
        connections.append(messages)

        async def read() -> None:
            while message := await reader.read(65_536):
                messages.append(message)
                copy.feed_data(message)
            copy.feed_eof()

        await asyncio.gather(read(), postgres.relay(copy, writer))

    every_scope = [limit(9, scope=scope) for scope in Scope]
    async with listening(record) as address:
        server, url = urlsplit(address), urlsplit(engine.url)
        search_path = "&".join(part for part in url.query.split("&") if "host=" not in part)
        async with open_patiently(f"postgresql://postgres@{server.netloc}{url.path}?{search_path}") as ledger:
            await ledger.reserve(reservation("u-1"), every_scope)
            await ledger.reserve(reservation("u-2"), every_scope)

    # The pool may use a second connection if the first one is not back in time.
    (messages,) = [each for each in connections if any(b"u-2" in message for message in each)]
    first = max(number for number, message in enumerate(messages) if b"BEGIN" in message)
    begin, question, change = messages[first : first + 3]
    assert not b"".join(messages[first + 3 :]).strip(b"X\x00\x04"), "only the end of the session follows"
    assert b"'agent default'" not in begin
    assert b"'{\"agent default\",all}'" in question
    assert b"INSERT INTO sums" in change
    assert change.rstrip(b"\x00").endswith(b"COMMIT")


def list_tcp_options(port: int | None) -> list[dict[str, int]]:
    """Ask each socket of this process that is connected to `port` of this machine."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(descriptor.name))) as copy:
            if copy.getpeername()[:2] == ("127.0.0.1", port):
                options = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
                tcp = {option: copy.getsockopt(socket.IPPROTO_TCP, getattr(socket, option)) for option in options}
                found.append({"SO_KEEPALIVE": copy.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)} | tcp)
    return found


async def test_only_a_durable_transaction_waits_for_the_disk(pooled: Ledger) -> None:
    def rule(_now: float) -> Dialogue[str]:
        (row,) = yield "SELECT current_setting('synchronous_commit') AS level", {}
        return str(row["level"])

    assert [await pooled.run(rule, is_durable=each) for each in (True, False, True)] == ["on", "off", "on"]


async def test_a_transaction_that_holds_the_locks_of_the_sums_does_not_wait_for_the_disk(pooled: Ledger) -> None:
    def rule(_now: float) -> Dialogue[str]:
        (row,) = yield "SELECT * FROM passes LIMIT 1", {}
        yield from change_sums(row, passes=1)
        yield from change_sums(row, passes=-1)
        (level,) = yield "SELECT current_setting('synchronous_commit') AS level", {}
        return str(level["level"])

    assert await pooled.run(rule) == "off"
    assert await rows(pooled, "SELECT name FROM leases") == []


async def test_limits_are_exact_even_if_the_role_has_another_isolation(engine: Engine, postgres: Postgres) -> None:
    role = f"strict_{os.urandom(4).hex()}"
    postgres.run(f"CREATE ROLE {role} LOGIN")
    postgres.run(f"ALTER ROLE {role} SET default_transaction_isolation = 'repeatable read'")
    url = postgres.fresh(user=role)
    async with contextlib.AsyncExitStack() as stack:
        instances = [await stack.enter_async_context(open_patiently(url, clock=engine.clock)) for _ in range(3)]
        # A stricter level takes its snapshot before it waits for the lock, so it does not see the others' passes.
        with hold_lock(engine.url, limits.name_scope(Scope.USER, {"token_issuer": TOKEN_ISSUER, "user_id": "u-1"})):
            calls = [asyncio.create_task(each.reserve(reservation(), [limit(1)])) for each in instances]
            await wait_for_waiters(postgres, 3)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)

    assert Counter(map(type, outcomes)) == {type(None): 1, RateLimited: 2}


async def test_the_service_runs_on_postgresql_and_shows_its_password_nowhere(engine: Engine) -> None:
    url = engine.url.replace("postgres:@", "postgres:hunter2canary@")  # the server of the tests checks no password
    settings = settings_with(voicepass_database_url=url)

    async with serving_app(create_app(settings)) as client:
        ready = await client.get("/readyz")

    assert ready.status_code == 200
    assert "hunter2canary" not in f"{settings!r} {settings}"


# -- read-only, as after a failover -----------------------------------------------------------------------------------


@contextlib.contextmanager
def make_read_only(postgres: Postgres) -> Iterator[None]:
    """Make all sessions of the server read-only, including the old ones."""
    try:
        postgres.run("ALTER SYSTEM SET default_transaction_read_only = on")
        reload(postgres, read_only="on")
        yield
    finally:
        postgres.run("ALTER SYSTEM RESET default_transaction_read_only")
        reload(postgres, read_only="off")


def reload(postgres: Postgres, *, read_only: str) -> None:
    """Reload the settings; return when new sessions have them, which is some time after the call."""
    postgres.run("SELECT pg_reload_conf()")
    while postgres.run("SHOW default_transaction_read_only") != [(read_only,)]:
        time.sleep(0.01)


async def test_the_service_is_not_ready_only_while_the_server_is_read_only(engine: Engine, postgres: Postgres) -> None:
    async def ready() -> tuple[int, bool]:
        async with serving(voicepass_database_url=engine.url) as client:
            answer, metrics = await client.get("/readyz"), await client.get("/metrics")
            return answer.status_code, "voicepass_ledger_up 1.0" in metrics.text

    async with engine.open() as ledger:
        await ledger.check()
        with make_read_only(postgres):
            refused = [await measure(call) for call in (ledger.check(), grant_pass(ledger))]
            while_read_only = await ready()
        await wait_for_recovery(ledger)
        await ledger.check()

    assert [type(outcome) for outcome, _ in refused] == [LedgerUnavailable] * 2
    assert max(seconds for _, seconds in refused) < IN_TIME_SECONDS
    assert while_read_only == (503, False)
    assert await ready() == (200, True)


async def test_connections_to_a_server_that_became_a_replica_are_replaced(engine: Engine, postgres: Postgres) -> None:
    role = f"moved_{os.urandom(4).hex()}"
    postgres.run(f"CREATE ROLE {role} LOGIN")
    async with open_postgres(postgres.fresh(user=role), clock=engine.clock) as ledger:
        postgres.run(f"ALTER ROLE {role} SET default_transaction_read_only = on")
        end_sessions(postgres, role)
        refused = await reserve_at_once(ledger, 20)
        # A session keeps the settings that its role had when it began, as a session with a replica stays read-only.
        postgres.run(f"ALTER ROLE {role} RESET default_transaction_read_only")
        await wait_for_recovery(ledger)

    assert {type(outcome) for outcome, _ in refused} == {LedgerUnavailable}
    assert any("read-only" in outcome.operator_note for outcome, _ in refused if isinstance(outcome, LedgerUnavailable))


async def test_a_check_leaves_nothing_behind(engine: Engine, postgres: Postgres) -> None:
    async with engine.open() as one, engine.open() as other:
        with make_read_only(postgres):
            outcome, _ = await measure(one.reserve(reservation(), []))
        await asyncio.gather(*(ledger.check() for ledger in (one, other) * 10))

        assert type(outcome) is LedgerUnavailable
        assert await rows(one, "SELECT name FROM leases") == []
        assert await rows(one, "SELECT pass_id FROM passes") == []


# -- side by side ----------------------------------------------------------------------------------------------------


async def test_instances_that_start_at_once_create_the_schema_once(engine: Engine) -> None:
    async def start() -> None:
        async with engine.open() as ledger:
            await grant_pass(ledger)

    await asyncio.gather(*(start() for _ in range(8)))

    async with engine.open() as ledger:
        assert [row["number"] for row in await rows(ledger, "SELECT number FROM schema_steps")] == [
            number for number, _ in enumerate(steps(), start=1)
        ]


async def test_an_old_instance_works_on_a_newer_schema(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = [*steps(), ["ALTER TABLE passes ADD COLUMN region TEXT", "ALTER TABLE orphans ADD COLUMN region TEXT"]]
    async with engine.open() as old:
        for _ in range(20):  # often enough that a driver which prepares repeated statements has prepared them
            conversation_id = await grant_pass(old, [limit(100)])
            await old.settle(settlement(conversation_id))
            await old.find_pass(conversation_id)
        monkeypatch.setattr("voicepass.ledger.postgres.steps", lambda: newer)

        async with engine.open() as new:
            for number in range(20):
                conversation_id = await grant_pass((old, new)[number % 2], [limit(100)])
                await (new, old)[number % 2].settle(settlement(conversation_id))
                assert (await old.find_pass(conversation_id)).seconds == 42
        reserved = reservation()
        await old.reserve(reserved, [])
        await old.settle(settlement("conv_early"))
        await old.grant(reserved, credential("conv_early"))
    monkeypatch.undo()
    async with engine.open() as started_again:
        assert (await started_again.find_pass("conv_early")).seconds == 42


async def test_an_instance_starts_as_a_role_that_may_not_create_tables(engine: Engine, postgres: Postgres) -> None:
    async with engine.open():
        pass
    role, schema = f"plain_{os.urandom(4).hex()}", engine.url.rpartition("%3D")[2]
    postgres.run(f"CREATE ROLE {role} LOGIN")
    postgres.run(f"GRANT USAGE ON SCHEMA {schema} TO {role}")
    postgres.run(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {role}")

    async with open_patiently(postgres.url(schema, user=role), clock=engine.clock) as ledger:
        await grant_pass(ledger)


async def test_a_schema_step_that_fails_is_rolled_back(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("voicepass.ledger.postgres.steps", lambda: [*steps(), ["CREATE TABLE half ()", "nonsense"]])
    with pytest.raises(LedgerUnavailable):
        async with engine.open():
            pass
    monkeypatch.undo()

    async with engine.open() as ledger:
        ((half,),) = [row.values() for row in await rows(ledger, "SELECT to_regclass('half') AS half")]
        assert half is None


# -- secrets ---------------------------------------------------------------------------------------------------------


async def test_the_tables_hold_no_secret(pooled: Ledger) -> None:
    written = str([await rows(pooled, f"SELECT * FROM {table}") for table in ("passes", "orphans", "blocks")])  # noqa: S608

    assert secrets_in(signed_url()) != []
    assert secrets_in(written) == []


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://voicepass:{password}@127.0.0.1:1/db",
        "postgresql://voicepass:{password}@[::1/db",
        "postgresql://voicepass:%zz{password}@127.0.0.1/db",
        "postgresql://voicepass:{password}@127.0.0.1:1/db?nonsense=1",
        "postgresql://voicepass:{password}@name.invalid/db",
    ],
)
async def test_a_server_that_cannot_be_reached_stops_the_start_and_no_text_shows_the_password(
    engine: Engine, url: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    del engine
    raised: list[BaseException | None] = []
    with pytest.raises(LedgerUnavailable) as refused:
        async with open_postgres(url.format(password="hunter2canary")):
            pass

    raised.append(refused.value)
    while raised[-1] is not None:
        raised.append(raised[-1].__cause__ or raised[-1].__context__)
    text = " ".join(
        [*(f"{error!r} {error}" for error in raised), refused.value.operator_note, caplog.text, *capsys.readouterr()]
    )
    assert "hunter2canary" not in text


@pytest.mark.long
async def test_the_role_that_compose_creates_owns_its_database_and_is_not_a_superuser(
    engine: Engine, postgres: Postgres, tmp_path: Path
) -> None:
    (tmp_path / "database_password").write_text("it's secret")
    script = (ROOT / "deploy" / "postgres" / "role.sql").read_text()
    (tmp_path / "role.sql").write_text(script.replace("/run/secrets", str(tmp_path)))
    url = urlsplit(postgres.url("public", user="voicepass"))
    own = url._replace(path="/voicepass", query="&".join(part for part in url.query.split("&") if "host=" in part))

    await asyncio.to_thread(postgres.run_file, tmp_path / "role.sql")
    try:
        async with open_patiently(own.geturl(), clock=engine.clock) as ledger:
            await grant_pass(ledger)
        (rights,) = postgres.run(
            "SELECT rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls FROM pg_roles"
            " WHERE rolname = 'voicepass'"
        )
        (password,) = postgres.run(
            "SELECT rolpassword LIKE 'SCRAM-SHA-256%' FROM pg_authid WHERE rolname = 'voicepass'"
        )
    finally:
        postgres.run("DROP DATABASE voicepass WITH (FORCE)")
        postgres.run("DROP ROLE voicepass")

    assert not any(rights)
    assert password == (True,)
