"""If PostgreSQL cannot be used, the log's note says why and what to do, and holds no password."""

import os
import re
from collections.abc import Iterator
from urllib.parse import urlsplit

import psycopg
import pytest

from tests.ledger.given import START, Postgres
from tests.servers import free_port, listening
from tests.tables import table
from voicepass.errors import LedgerUnavailable
from voicepass.ledger.postgres import open_postgres
from voicepass.ledger.postgres_failures import CAUSES, explain_failure

pytestmark = pytest.mark.anyio

SECRET = "hunter2canary"


async def read_note(url: str) -> str:
    with pytest.raises(LedgerUnavailable) as refused:
        async with open_postgres(url, clock=lambda: START):
            pass
    return refused.value.operator_note


@pytest.fixture
def own_role(postgres: Postgres) -> Iterator[str]:
    """A role that may have one connection only, and may create nothing."""
    role = postgres.create_role(f"few_{os.urandom(4).hex()}")
    postgres.run(f"ALTER ROLE {role} CONNECTION LIMIT 1")
    yield role
    postgres.run(f"DROP ROLE {role}")


async def test_each_kind_of_refusal_has_its_own_note(postgres: Postgres, own_role: str) -> None:
    url = postgres.url("public", user=own_role).replace(f"{own_role}:@", f"{own_role}:{SECRET}@")
    notes = {
        "rights": await read_note(url),
        "role": await read_note(url.replace(own_role, "nobody_at_all")),
        "database": await read_note(url.replace("/postgres?", "/missing?")),
        "nobody listens": await read_note(f"postgresql://voicepass:{SECRET}@127.0.0.1:{free_port()}/postgres"),
        "no such host": await read_note(f"postgresql://voicepass:{SECRET}@name.invalid/postgres"),
    }
    async with listening(postgres.relay) as address:
        server = urlsplit(address).netloc
        notes["TLS"] = await read_note(f"postgresql://{own_role}:{SECRET}@{server}/postgres?sslmode=require")
    with psycopg.connect(url):
        notes["connections"] = await read_note(url)

    expected = {
        "rights": "permission denied for schema public (SQLSTATE 42501). Give the role the rights",
        "role": 'role "nobody_at_all" does not exist (SQLSTATE 28000). Compare the role',
        "database": 'database "missing" does not exist (SQLSTATE 3D000). Create the database',
        "nobody listens": "Connection refused",
        "no such host": "Compare the host in VOICEPASS_DATABASE_URL",
        "TLS": "server does not support SSL, but SSL was required. Switch TLS on",
        "connections": f'too many connections for role "{own_role}" (SQLSTATE 53300). Raise the limit',
    }
    assert {name: notes[name] for name in expected if expected[name] not in notes[name]} == {}
    assert SECRET not in str(notes)


@table(
    ("message", "sqlstate"),
    [
        # The servers of these tests do not send these messages. They are from the sources of PostgreSQL 18 and
        # pgbouncer 1.18, and from reports of Supavisor's users.
        ('FATAL:  password authentication failed for user "voicepass"', "28P01"),
        ('FATAL:  no pg_hba.conf entry for host "10.0.0.1", user "u", database "d", SSL encryption', "28000"),
        ("FATAL:  sorry, too many clients already", "53300"),
        ("FATAL:  remaining connection slots are reserved for roles with the SUPERUSER attribute", "53300"),
        ("FATAL:  no more connections allowed (max_client_conn)", "53300"),
        ("FATAL:  Tenant or user not found", "28000"),
        ("FATAL:  unsupported startup parameter: options", "08P01"),
        ("FATAL:  the database system is starting up", "57P03"),
    ],
)
def test_the_note_adds_the_sqlstate_that_the_message_means(message: str, sqlstate: str) -> None:
    assert f"{message.replace('  ', ' ')} (SQLSTATE {sqlstate})" in explain_failure(psycopg.OperationalError(message))


async def test_a_note_contains_no_value_of_a_row(postgres: Postgres) -> None:
    with psycopg.connect(postgres.fresh()) as connection:
        connection.execute("CREATE TABLE t (secret TEXT UNIQUE)")
        with pytest.raises(psycopg.Error) as failed:
            connection.execute("INSERT INTO t VALUES (%s), (%s)", (SECRET, SECRET))

    assert SECRET in str(failed.value)
    assert SECRET not in explain_failure(failed.value)
    assert "(SQLSTATE 23505)" in explain_failure(failed.value)


@table(
    ("url", "expected"),
    [
        (f"postgresql://u:{SECRET}@127.0.0.1/d?pgbouncer=true", "does not know: pgbouncer. Remove"),
        (
            f"postgresql://u:{SECRET}@127.0.0.1/d?schema=x&sslmode=require&connection_limit=1",
            "schema, connection_limit",
        ),
        (f"postgresql://u@127.0.0.1/d?pool_timeout&password={SECRET}", "does not know: pool_timeout. Remove"),
        (f"postgresql://u:a@{SECRET}@127.0.0.1/d", "write @ as %40"),
        (f"postgresql://u:{SECRET}/b@127.0.0.1/d", "/ as %2F"),
        (f"postgresql://u:1/{SECRET}@127.0.0.1/d", "/ as %2F"),
        (f"postgresql://u:%zz{SECRET}@127.0.0.1/d", "% as %25"),
        (f"postgresql://u:1/b?{SECRET}=@127.0.0.1/d", "cannot be read"),
    ],
)
async def test_a_url_that_cannot_be_read_is_refused_and_unknown_parameters_are_named(url: str, expected: str) -> None:
    note = await read_note(url)

    assert expected in note
    assert SECRET not in note


@pytest.mark.long
async def test_the_note_of_a_running_ledger_says_why_it_gets_no_connection(postgres: Postgres) -> None:
    role = postgres.create_role(f"gone_{os.urandom(4).hex()}")
    async with open_postgres(postgres.fresh(user=role)) as ledger:
        await ledger.check()
        postgres.run(f"ALTER ROLE {role} NOLOGIN")
        postgres.run(f"SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity WHERE usename = '{role}'")  # noqa: S608
        with pytest.raises(LedgerUnavailable) as refused:
            await ledger.check()

    assert re.search(r'role "gone_\w+" is not permitted to log in \(SQLSTATE 28000\)', refused.value.operator_note)


def test_every_cause_has_its_own_advice() -> None:
    assert len({cause["advice"] for cause in CAUSES}) == len(CAUSES)
