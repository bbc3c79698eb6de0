"""Forgetting a user: afterwards no row names the user, and every count stays as it was."""

import sqlite3
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.ledger.given import START, Engine, Postgres, TurnedClock, credential, grant_pass, limit, reservation, rows
from tests.ledger.given import settlement as reported
from voicepass.errors import ConversationUnknown, LedgerUnavailable, UserBlocked
from voicepass.ledger import Ledger
from voicepass.ledger.extensions import Extension, extend
from voicepass.ledger.forgetting import (
    BATCH,
    Forgotten,
    find_issuers,
    forget_user,
    list_erasures,
    rewrite_file,
)
from voicepass.model import Block, BlockKind, Counted, Scope

pytestmark = pytest.mark.anyio

USER = "canary-user-8c41"
ISSUER = "https://login.example"
SHARED = [limit(10**6, scope=scope, counted=counted) for scope in (Scope.AGENT, Scope.ALL) for counted in Counted]
NAMING_USERS = {"passes", "failed_requests", "blocks", "extensions", "lookups"}
"""The tables that can name a user. The first test fills each of them; a new one belongs here and in `forgetting`."""


async def forget(ledger: Ledger, *, even_if_open: bool = False, at_elevenlabs: bool = False) -> Forgotten:
    return await forget_user(
        ledger, user_id=USER, token_issuer=ISSUER, even_if_open=even_if_open, at_elevenlabs=at_elevenlabs
    )


async def count_shared(ledger: Ledger) -> list[int]:
    """Count what the limits of an agent and of all users count, by sums and by rows."""
    sums = await rows(ledger, "SELECT scope, length, slot, passes, failed, seconds, open FROM sums ORDER BY 1, 2, 3")
    totals = await rows(ledger, "SELECT count(*) AS n, sum(seconds) AS s FROM passes")
    failed = await rows(ledger, "SELECT count(*) AS n FROM failed_requests")
    return [int(value) for row in (*sums, *totals, *failed) for name, value in row.items() if name != "scope"]


async def list_tables(ledger: Ledger, engine: Engine) -> dict[str, set[str]]:
    """List the columns of each table."""
    columns = (
        "SELECT m.name AS name, c.name AS column_name FROM sqlite_master AS m JOIN pragma_table_info(m.name) AS c"
        " WHERE m.type = 'table'"
        if engine.name == "sqlite"
        else "SELECT table_name AS name, column_name FROM information_schema.columns"
        " WHERE table_schema = current_schema()"
    )
    tables: dict[str, set[str]] = {}
    for row in await rows(ledger, columns):
        tables.setdefault(row["name"], set()).add(row["column_name"])
    return tables


def read_files(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.iterdir())


async def use_everything(ledger: Ledger, clock: TurnedClock) -> str:
    """Put the user into every table that can name one. Return a conversation that is not settled."""
    settled = await grant_pass(ledger, user_id=USER)
    await ledger.settle(reported(settled, user_id=USER))
    failed = reservation(USER)
    await ledger.reserve(failed, [])
    await ledger.release(failed, has_reached=True)
    await ledger.begin_lookup(reservation(USER), limit(1, counted=Counted.CONVERSATIONS), seconds=1)
    lapsed, given = reservation(USER), credential()
    await ledger.reserve(lapsed, [])
    await ledger.grant(lapsed, replace(given, sealed=b"sealed"))
    await grant_pass(ledger, user_id="another-user")
    await ledger.block(Block(kind=BlockKind.USER, key=USER, token_issuer=ISSUER))
    extension = Extension(user_id=USER, token_issuer=ISSUER, minutes=30, ends_at=START + 86_400)
    await ledger.run(partial(extend, extension=extension))
    clock.now = START + 7200
    return given.conversation_id or ""


@pytest.mark.parametrize("engine", ["sqlite", "postgres"], indirect=True)  # a pooler leads to the same tables
async def test_no_table_names_a_forgotten_user_and_the_sums_stay(
    ledger: Ledger, engine: Engine, clock: TurnedClock, postgres: Postgres
) -> None:
    await use_everything(ledger, clock)
    tables = await list_tables(ledger, engine)
    naming = {name for name, columns in tables.items() if columns & {"user_id", "key", "token_issuer"}}
    before = {name: str(await rows(ledger, f"SELECT * FROM {name}")) for name in naming}  # noqa: S608
    counts = await count_shared(ledger)

    forgotten = await forget(ledger)

    assert naming == NAMING_USERS == {name for name, text in before.items() if USER in text}
    assert forgotten.passes == 2
    assert await count_shared(ledger) == counts
    assert await ledger.fix_sums() == []
    if engine.name == "sqlite":
        rewrite_file(engine.url)
        assert USER.encode() not in read_files(Path(engine.url).parent)
    else:
        dump = postgres.dump(engine.url)
        assert "another-user" in dump
        assert USER not in dump
    (hidden,) = {row["user_id"] for row in await rows(ledger, "SELECT user_id FROM passes")} - {"another-user"}
    assert hidden == ""


async def test_the_file_contains_a_forgotten_user_until_it_is_rewritten(tmp_path: Path, clock: TurnedClock) -> None:
    engine = Engine("sqlite", str(tmp_path / "ledger.db"), clock)
    async with engine.open() as ledger:
        await use_everything(ledger, clock)
        await forget(ledger)
        before = read_files(tmp_path)
        rewrite_file(engine.url)
        after = read_files(tmp_path)
        assert await grant_pass(ledger)

    assert USER.encode() in before
    assert USER.encode() not in after


@pytest.mark.parametrize("content", ["no database", None])
def test_a_file_that_cannot_be_rewritten_is_reported(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "ledger.db"
    with closing(sqlite3.connect(path)) as reader:
        reader.execute("PRAGMA journal_mode = WAL")
        reader.execute("CREATE TABLE t (x)")
        if content is None:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM t").fetchall()
        else:
            path = tmp_path / "text"
            path.write_text(content)

        with pytest.raises(LedgerUnavailable) as refusal:
            rewrite_file(str(path), wait_seconds=0.1)

    assert str(path) in refusal.value.operator_note


async def test_a_late_report_settles_a_forgotten_pass_without_its_user(ledger: Ledger, clock: TurnedClock) -> None:
    conversation_id = await use_everything(ledger, clock)
    await forget(ledger)

    settled = await ledger.settle(reported(conversation_id, seconds=120, user_id=USER))
    again = await ledger.settle(reported(conversation_id, seconds=120, user_id=USER, source="webhook"))

    assert settled is not None
    assert (settled.user_id, settled.seconds, settled.reported_user_id, again) == ("", 120, None, None)
    assert USER not in str(await rows(ledger, "SELECT * FROM passes"))
    assert await ledger.fix_sums() == []
    with pytest.raises(ConversationUnknown):
        await ledger.find_pass(conversation_id)
    with pytest.raises(ConversationUnknown):
        await ledger.read_seconds_left([], conversation_id=conversation_id)


async def test_a_user_with_an_open_conversation_is_forgotten_only_by_force(ledger: Ledger, clock: TurnedClock) -> None:
    conversation_id = await grant_pass(ledger, user_id=USER)
    in_flight = reservation(USER)
    await ledger.reserve(in_flight, [])
    counts = await count_shared(ledger)

    refused = await forget(ledger, at_elevenlabs=True)
    still = await ledger.list_passes(user_id=USER, most=9)
    done = await forget(ledger, even_if_open=True, at_elevenlabs=True)

    assert (refused.passes, len(still)) == (0, 2)
    assert refused.open_until is not None
    assert refused.open_until > clock.now
    assert done == Forgotten(2)
    with pytest.raises(LedgerUnavailable):  # the request in flight gets no URL
        await ledger.grant(in_flight, credential())
    assert [row["may_be_open"] for row in await ledger.run(list_erasures)] == [True]
    clock.now = refused.open_until
    assert [row["may_be_open"] for row in await ledger.run(list_erasures)] == [False]
    assert await ledger.fix_sums() == []
    assert counts != await count_shared(ledger), "the reservation in flight is released"
    assert (await ledger.settle(reported(conversation_id, user_id=USER))) is not None


@pytest.mark.parametrize("token_issuer", ["", ISSUER])
async def test_a_block_of_a_forgotten_user_applies_and_can_be_removed_by_id(ledger: Ledger, token_issuer: str) -> None:
    blocked = Block(kind=BlockKind.USER, key=USER, token_issuer=token_issuer)
    await ledger.block(blocked)
    await ledger.block(Block(kind=BlockKind.USER, key=USER, token_issuer="https://other.example"))

    await forget(ledger)
    keys = {block.key.partition(":")[0] for block in await ledger.list_blocks() if block.token_issuer == token_issuer}
    with pytest.raises(UserBlocked):
        await ledger.reserve(reservation(USER), [])
    await ledger.reserve(reservation("another-user"), [])
    removed = [await ledger.unblock(blocked) for _ in range(2)]
    await ledger.reserve(reservation(USER), [])

    assert keys == {"sha256"}
    assert removed == [True, False]
    assert [block.key for block in await ledger.list_blocks()] == [USER], "another issuer's user is another person"


async def test_users_of_other_issuers_keep_their_rows(ledger: Ledger) -> None:
    for token_issuer in ("https://a.example", ISSUER, "https://z.example"):
        await ledger.settle(reported(await grant_pass(ledger, user_id=USER, token_issuer=token_issuer)))
    failed = reservation(USER, token_issuer="https://failed.example")
    await ledger.reserve(failed, [])
    await ledger.release(failed, has_reached=True)
    for token_issuer in ("", "https://blocked.example"):
        await ledger.block(Block(kind=BlockKind.USER, key=USER, token_issuer=token_issuer))
    issuers = await ledger.run(lambda now: find_issuers(now, USER))

    await forget(ledger)

    left = [issued.token_issuer for issued in await ledger.list_passes(user_id=USER, most=9)]
    hosts = ["a", "blocked", "failed", "login", "z"]
    assert sorted(issuers) == [f"https://{host}.example" for host in hosts]
    assert sorted(left) == ["https://a.example", "https://z.example"]
    of_passes = await ledger.run(lambda now: find_issuers(now, "nobody"))
    assert sorted(of_passes) == ["https://a.example", "https://z.example"]


async def test_many_passes_are_forgotten_in_several_transactions(ledger: Ledger) -> None:
    await rows(
        ledger,
        "INSERT INTO passes (pass_id, request_id, token_issuer, user_id, agent_alias, agent_id, transport, reserved_at,"
        " lapses_at, reserved_seconds, seconds, granted_at, settled_at, conversation_id)"
        " WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < :most)"
        " SELECT 'p-' || n, 'r', CAST(:issuer AS TEXT), CAST(:user AS TEXT), 'default', 'agent_1', 'websocket',"
        " 1, 2, 1, 1, 1, 2, 'conv_' || n FROM numbers",
        issuer=ISSUER,
        user=USER,
        most=BATCH + 1,
    )

    forgotten = await forget(ledger, at_elevenlabs=True)
    again = await forget(ledger, at_elevenlabs=True)

    assert (forgotten.passes, again.passes) == (BATCH + 1, 0)
    assert len(await ledger.run(list_erasures)) == BATCH + 1
