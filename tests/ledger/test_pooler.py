"""Behind a pooler each transaction may use another session, so time limits and locks must end with the transaction."""

import asyncio
import tempfile
from collections import Counter
from pathlib import Path

import psycopg
import pytest

from tests.ledger.given import Engine, Postgres, credential, grant_pass, limit, reservation, rows, settlement
from voicepass.errors import LedgerUnavailable, RateLimited
from voicepass.ledger.dialogue import Dialogue
from voicepass.ledger.postgres import open_postgres

pytestmark = [
    pytest.mark.alone,
    pytest.mark.anyio,
    pytest.mark.long,
    pytest.mark.parametrize("engine", [pytest.param("pooler")], indirect=True),
]


async def test_limits_are_exact_across_instances_that_share_three_sessions(engine: Engine) -> None:
    async with engine.instances() as ledgers:
        calls = [ledgers[n % 3].reserve(reservation(), [limit(20)]) for n in range(100)]

        outcomes = Counter(type(outcome) for outcome in await asyncio.gather(*calls, return_exceptions=True))

    assert outcomes == {type(None): 20, RateLimited: 80}


async def test_a_pass_is_reserved_granted_and_settled_through_different_instances(engine: Engine) -> None:
    async with engine.instances() as ledgers:
        conversation_id = await grant_pass(ledgers[0], [limit(5)])
        reserved = reservation()
        await ledgers[1].reserve(reserved, [limit(5)])
        await ledgers[2].grant(reserved, credential("conv_2"))
        settled = [await ledgers[1].settle(settlement(each)) for each in (conversation_id, "conv_2")]
        corrections = await ledgers[0].fix_sums()
        await ledgers[2].check()

    assert [each and each.seconds for each in settled] == [42, 42]
    assert corrections == []


async def test_every_time_limit_applies_in_a_transaction_and_ends_with_it(engine: Engine) -> None:
    names = ["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"]

    def show(_now: float) -> Dialogue[list[str]]:
        shown: list[str] = []
        for name in [*names, "transaction_isolation"]:
            (row,) = yield f"SHOW {name}", {}
            shown += row.values()
        return shown

    async with engine.open(answer_seconds=2.5) as ledger:
        await grant_pass(ledger, [limit(1)])
        inside = await ledger.run(show, locks=["l"])
        prepared = await rows(ledger, "SELECT name FROM pg_prepared_statements")
        with psycopg.connect(engine.url, prepare_threshold=None, autocommit=True) as other:  # on a used session
            after = [value for name in names for value in other.execute(f"SHOW {name}".encode()).fetchone() or ()]
            locks = other.execute("SELECT pid FROM pg_locks WHERE locktype = 'advisory'").fetchall()

    assert inside == ["2s", "2s", "2s", "read committed"]
    assert after == ["0", "0", "0"]
    assert (prepared, locks) == ([], [])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("/postgres", "/postgres?options=-csearch_path%3Dx"), ["SQLSTATE 08P01", "options", "ALTER ROLE"]),
        (("/postgres", "/nowhere"), ["SQLSTATE 3D000", "no such database"]),
        (("/postgres", "/missing"), ["SQLSTATE 3D000", 'database "missing" does not exist']),
        (("//pooled", "//other"), ["SQLSTATE 28000", "authentication failed", "Compare the role"]),
        (("/postgres", "/postgres?sslmode=require"), ["does not support SSL", "remove sslmode"]),
        (("/postgres", "/postgres?pgbouncer=true"), ["parameters that PostgreSQL's driver does not know: pgbouncer"]),
    ],
)
async def test_the_note_on_a_refusal_of_the_pooler_says_what_to_change(
    engine: Engine, change: tuple[str, str], expected: list[str]
) -> None:
    url = engine.url.replace(*change)

    with pytest.raises(LedgerUnavailable) as refused:
        async with open_postgres(url):
            pass

    assert [part for part in expected if part not in refused.value.operator_note] == [], refused.value.operator_note


async def test_the_note_names_a_pooler_without_free_connections(engine: Engine, postgres: Postgres) -> None:
    del engine
    with (
        tempfile.TemporaryDirectory(prefix="vp") as directory,
        postgres.pooler(Path(directory), max_clients=1) as url,
        psycopg.connect(url),
        pytest.raises(LedgerUnavailable) as refused,
    ):
        async with open_postgres(url):
            pass

    assert "SQLSTATE 53300" in refused.value.operator_note, refused.value.operator_note
