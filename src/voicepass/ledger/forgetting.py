"""Forgets a user: removes the identity from the user's rows, and keeps the rows, so that limits of all still hold.

A forgotten row has an empty user and an empty issuer. `erasures` lists what is left to delete at ElevenLabs.
"""

import sqlite3
import time
from contextlib import closing
from typing import Final, NamedTuple

from voicepass.errors import LedgerUnavailable
from voicepass.ledger import Ledger
from voicepass.ledger.dialogue import Dialogue, Row
from voicepass.ledger.extensions import EACH_ISSUER
from voicepass.ledger.limits import IS_OPEN, SCOPES, name_scope
from voicepass.ledger.rules import release
from voicepass.model import Scope, hash_user_id

BATCH: Final = 100
"""A transaction changes so many rows at most, so that nobody waits for it too long."""


class Forgotten(NamedTuple):
    """How many passes were forgotten. If `open_until` is set, none was: the user has an open pass until then."""

    passes: int
    open_until: float | None = None


def find_issuers(user_id: str, _now: float) -> Dialogue[list[str]]:
    """Return every issuer that the ledger names."""
    rows = yield _ISSUERS, {"user_id": user_id}
    return [row["token_issuer"] for row in rows]


async def forget_user(
    ledger: Ledger, *, user_id: str, token_issuer: str, even_if_open: bool, at_elevenlabs: bool
) -> Forgotten:
    """Forget a user. If `at_elevenlabs`, the ids of the user's conversations become erasures.

    A block of the user stays, but holds only the hash of the id. Nothing is changed if a conversation is open, unless
    `even_if_open`. A call that was interrupted can be repeated.
    """
    whose = {"token_issuer": token_issuer, "user_id": user_id, "user_hash": hash_user_id(user_id), "most": BATCH}

    def forget_some(now: float) -> Dialogue[Forgotten]:
        (row,) = yield _OPEN_UNTIL, whose | {"now": now}
        if row["open_until"] is not None and not even_if_open:
            return Forgotten(0, row["open_until"])
        for statement in (_HIDE_BLOCKS, _DELETE_BLOCKS, _DELETE_EXTENSIONS, _HIDE_FAILED, _DELETE_LOOKUPS):
            yield statement, whose
        reserved = yield _RESERVED, whose
        passes = yield _GRANTED, whose | {"now": now}
        for row in passes:
            if at_elevenlabs and row["conversation_id"] is not None:
                yield _ADD_ERASURE, row
            yield _HIDE_ROW, row
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
    return list((yield _ERASURES, {"now": now}))


def end_erasure(conversation_id: str, _now: float) -> Dialogue[None]:
    """Remove a conversation from the list, because ElevenLabs has deleted it."""
    yield "DELETE FROM erasures WHERE conversation_id = :id", {"id": conversation_id}


def rewrite_file(path: str, *, wait_seconds: float = 30.0) -> None:
    """Write SQLite's file again and empty its log, because both keep deleted text. Raises LedgerUnavailable.

    Until this ends, nobody can write to the ledger.
    """
    try:
        with closing(sqlite3.connect(path, timeout=wait_seconds, isolation_level=None)) as connection:
            connection.execute("VACUUM")
            ends_at = time.monotonic() + wait_seconds
            # SQLite does not wait if the service copies the log at the same time.
            while (is_busy := connection.execute(_EMPTY_LOG).fetchone()[0]) and time.monotonic() < ends_at:
                time.sleep(0.1)
    except sqlite3.Error as error:
        raise LedgerUnavailable(operator_note=f"{path} cannot be rewritten: {error}") from error
    if is_busy:
        raise LedgerUnavailable(operator_note=f"{path}-wal is in use and may still name the user: run this again")


_EMPTY_LOG: Final = "PRAGMA wal_checkpoint(TRUNCATE)"

_OF_USER: Final = SCOPES[Scope.USER]
_BLOCKS_OF_USER: Final = "kind = 'user' AND key = :user_id AND token_issuer IN ('', :token_issuer)"

_ISSUERS: Final = f"""{EACH_ISSUER}
SELECT name AS token_issuer FROM issuers WHERE name <> ''
UNION SELECT token_issuer FROM blocks WHERE kind = 'user' AND key = :user_id AND token_issuer <> ''
UNION SELECT token_issuer FROM extensions WHERE user_id = :user_id AND token_issuer <> ''
UNION SELECT token_issuer FROM failed_requests WHERE user_id = :user_id AND token_issuer <> ''"""  # noqa: S608

_OPEN_UNTIL: Final = f"SELECT max(lapses_at) AS open_until FROM passes WHERE {_OF_USER} AND {IS_OPEN}"  # noqa: S608

_HIDE_BLOCKS: Final = f"""
INSERT INTO blocks (kind, key, token_issuer, blocked_at)
SELECT kind, :user_hash, token_issuer, blocked_at FROM blocks WHERE {_BLOCKS_OF_USER}
ON CONFLICT DO NOTHING"""  # noqa: S608

_DELETE_BLOCKS: Final = f"DELETE FROM blocks WHERE {_BLOCKS_OF_USER}"  # noqa: S608

_DELETE_EXTENSIONS: Final = """
DELETE FROM extensions WHERE user_id = :user_id AND token_issuer IN ('', :token_issuer)"""

_HIDE_FAILED: Final = f"UPDATE failed_requests SET token_issuer = '', user_id = '' WHERE {_OF_USER}"  # noqa: S608

_GRANTED: Final = f"""
SELECT pass_id, conversation_id, agent_id, CASE WHEN {IS_OPEN} THEN lapses_at ELSE 0 END AS ends_at
FROM passes WHERE {_OF_USER} AND granted_at IS NOT NULL LIMIT :most"""  # noqa: S608

# The conversation's id stays: a late report needs it.
_HIDE_ROW: Final = """
UPDATE passes SET token_issuer = '', user_id = '', request_id = '', credential_sha256 = NULL, sealed = NULL,
                  reported_user_id = NULL WHERE pass_id = :pass_id"""

_DELETE_LOOKUPS: Final = "DELETE FROM lookups"  # their keys name users; a lookup that is deleted is only repeated

_RESERVED: Final = f"SELECT pass_id FROM passes WHERE {_OF_USER} AND granted_at IS NULL LIMIT 1"  # noqa: S608

_ADD_ERASURE: Final = """
INSERT INTO erasures (conversation_id, agent_id, ends_at) VALUES (:conversation_id, :agent_id, :ends_at)
ON CONFLICT DO NOTHING"""

_ERASURES: Final = """
SELECT conversation_id, agent_id, ends_at > :now AS may_be_open FROM erasures ORDER BY conversation_id"""
