"""The ledger on a real file: durable rows, one owner per conversation, no secrets, and no pass when it is out."""

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from tests.canaries import secrets_in
from tests.conftest import signed_url
from voicepass.errors import BadAnswer, ConversationUnknown, LedgerUnavailable
from voicepass.ledger.sqlite import open_sqlite
from voicepass.model import Credential, Grant, Transport

pytestmark = pytest.mark.anyio

CREDENTIAL = Credential(secret=signed_url(), conversation_id="conv_1", expires_at=1900.0)
GRANT = Grant(
    request_id="r-1",
    granted_at=1000.0,
    token_issuer="https://login.example",
    user_id="u-1",
    agent_alias="default",
    agent_id="agent_1",
    transport=Transport.WEBSOCKET,
    conversation_id="conv_1",
    credential_sha256=CREDENTIAL.sha256,
    expires_at=1900.0,
)


def rows(path: Path) -> list[tuple[object, ...]]:
    with sqlite3.connect(path) as connection:
        found = connection.execute("SELECT * FROM grants ORDER BY rowid").fetchall()
    connection.close()
    return [tuple(row) for row in found]


async def test_a_row_says_who_was_given_which_conversation_and_holds_no_secret(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"

    async with open_sqlite(str(path)) as ledger:
        await ledger.record(GRANT)

    (row,) = rows(path)
    assert row[:8] == ("r-1", 1000.0, "https://login.example", "u-1", "default", "agent_1", "websocket", "conv_1")
    assert row[8:] == (CREDENTIAL.sha256, 1900.0)
    assert secrets_in(path.read_bytes().decode("latin-1")) == []


async def test_rows_outlive_the_process_and_the_schema_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"

    for number in range(3):
        async with open_sqlite(str(path)) as ledger:
            await ledger.record(replace(GRANT, request_id=f"r-{number}"))

    assert [row[0] for row in rows(path)] == ["r-0", "r-1", "r-2"]


async def test_a_conversation_has_one_owner(tmp_path: Path) -> None:
    async with open_sqlite(str(tmp_path / "ledger.db")) as ledger:
        await ledger.record(GRANT)

        with pytest.raises(BadAnswer):
            await ledger.record(replace(GRANT, user_id="u-2"))
        with pytest.raises(BadAnswer):
            await ledger.record(replace(GRANT, token_issuer="https://other.example"))

    assert len(rows(tmp_path / "ledger.db")) == 1


async def test_a_conversation_is_found_by_its_id_and_no_other_is() -> None:
    async with open_sqlite(":memory:") as ledger:
        await ledger.record(GRANT)

        found = await ledger.issued("conv_1")

        assert found == GRANT
        for unknown in ("conv_2", "CONV_1", "", "%", "conv_1' OR '1'='1"):
            with pytest.raises(ConversationUnknown):
                await ledger.issued(unknown)


async def test_passes_without_a_conversation_id_are_written_too() -> None:
    async with open_sqlite(":memory:") as ledger:
        await ledger.record(replace(GRANT, conversation_id=None))
        await ledger.record(replace(GRANT, conversation_id=None, user_id="u-2"))


async def test_a_locked_ledger_refuses_and_recovers_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with open_sqlite(str(path)) as ledger:
        blocker = sqlite3.connect(path)
        blocker.execute("BEGIN IMMEDIATE")

        with pytest.raises(LedgerUnavailable):
            await ledger.record(GRANT)
        blocker.rollback()
        blocker.close()
        await ledger.record(GRANT)

    assert len(rows(path)) == 1


async def test_what_was_handed_out_survives_a_power_cut(tmp_path: Path) -> None:
    async with open_sqlite(str(tmp_path / "ledger.db")) as ledger:
        connection = ledger._connection
        modes = await ledger._run(
            lambda: [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
        )

    assert modes == ["wal", 2]


async def test_a_ledger_that_cannot_be_opened_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.Error):
        async with open_sqlite(str(tmp_path / "missing" / "ledger.db")):
            pass
