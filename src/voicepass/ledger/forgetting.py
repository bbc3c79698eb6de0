"""Forgets a user: removes the identity from the user's rows, and keeps the rows, so that limits of all still hold.

A forgotten row has an empty user and an empty issuer. `erasures` lists what is left to delete at ElevenLabs.
"""

import sqlite3
import time
from contextlib import closing
from typing import Final, NamedTuple

from voicepass.errors import LedgerUnavailable
from voicepass.ledger import Ledger
from voicepass.ledger.dialogue import Dialogue, Row, read_statements
from voicepass.ledger.limits import name_scope
from voicepass.ledger.rules import release
from voicepass.model import Scope, hash_user_id

BATCH: Final = 100
"""A transaction changes this many rows at most. Other callers wait for it."""

SQL: Final = read_statements("forgetting")


class Forgotten(NamedTuple):
    """How many passes were forgotten. If `open_until` is set, none was: the user has an open pass until then."""

    passes: int
    open_until: float | None = None


def find_issuers(_now: float, user_id: str) -> Dialogue[list[str]]:
    """Return every issuer that the ledger names."""
    return [row["token_issuer"] for row in (yield SQL["issuers"], {"user_id": user_id})]


async def forget_user(
    ledger: Ledger, *, user_id: str, token_issuer: str, even_if_open: bool, at_elevenlabs: bool
) -> Forgotten:
    """Forget a user. If `at_elevenlabs`, the ids of the user's conversations become erasures.

    A block of the user stays, but holds only the hash of the id. Nothing is changed if a conversation is open, unless
    `even_if_open`. A call that was interrupted can be repeated.
    """
    whose = {"token_issuer": token_issuer, "user_id": user_id, "user_hash": hash_user_id(user_id), "most": BATCH}

    def forget_some(now: float) -> Dialogue[Forgotten]:
        (row,) = yield SQL["open_until"], whose | {"now": now}
        if row["open_until"] is not None and not even_if_open:
            return Forgotten(0, row["open_until"])
        for name in ("hide_blocks", "delete_blocks", "delete_extensions", "hide_failed", "delete_lookups"):
            yield SQL[name], whose
        reserved = yield SQL["reserved"], whose
        passes = yield SQL["granted"], whose | {"now": now}
        for row in passes:
            if at_elevenlabs and row["conversation_id"] is not None:
                yield SQL["add_erasure"], row
            yield SQL["hide_pass"], row
        # One at a time, as in `lapse`. Its grant finds no row, and no URL leaves.
        for row in reserved:
            yield from release(row["pass_id"])
        return Forgotten(len(passes) + len(reserved))

    total = 0
    while (done := await ledger.run(forget_some, locks=[name_scope(Scope.USER, whose)])).passes:
        total += done.passes
    return Forgotten(total, done.open_until)


def list_erasures(now: float) -> Dialogue[list[Row]]:
    """Return what is left to delete at ElevenLabs: conversation_id, agent_id, may_be_open."""
    return list((yield SQL["erasures"], {"now": now}))


def end_erasure(_now: float, conversation_id: str) -> Dialogue[None]:
    """Remove a conversation from the list, because ElevenLabs has deleted it."""
    yield SQL["end_erasure"], {"conversation_id": conversation_id}


def rewrite_file(path: str, *, wait_seconds: float = 30.0) -> None:
    """Write SQLite's file again and empty its log, because both keep deleted text. Raises LedgerUnavailable.

    Until this ends, nobody can write to the ledger.
    """
    try:
        with closing(sqlite3.connect(path, timeout=wait_seconds, isolation_level=None)) as connection:
            connection.execute("VACUUM")
            ends_at = time.monotonic() + wait_seconds
            # SQLite does not wait if the service copies the log at the same time.
            while connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                if time.monotonic() >= ends_at:
                    note = f"{path}-wal is in use and may still name the user: run this again"
                    raise LedgerUnavailable(operator_note=note)
                time.sleep(0.1)
    except sqlite3.Error as error:
        raise LedgerUnavailable(operator_note=f"{path} cannot be rewritten: {error}") from error
