"""Rules about many passes (lists, totals, deletion), and about what is no pass: blocks, leases, the ledger's check."""

import math
from dataclasses import asdict
from typing import Any, Final

from voicepass.ledger.dialogue import Dialogue, Row
from voicepass.ledger.limits import UNUSED_SECONDS
from voicepass.ledger.rules import GRANTED, RESERVE, RESERVED, as_issued_pass, release
from voicepass.ledger.sums import change_sums, delete_old_sums
from voicepass.model import Block, IssuedPass, Standing, Transport, hash_user_id

MAX_COUNTED: Final = 10_000
"""The standing counts no further: that many are a reason for an alarm."""
ORPHAN_SECONDS: Final = 24 * 3600
"""A settlement without its pass is kept for so long. It arrived at the same instant as its pass, or has none here."""


def list_overdue(most: int, after: float, now: float, *, min_age_seconds: float) -> Dialogue[list[IssuedPass]]:
    """Return old passes that ElevenLabs' list has not settled, the oldest first."""
    rows = yield _DUE, {"after": after, "before": now - min_age_seconds, "most": most}
    return [as_issued_pass(row) for row in rows]


def list_latest(user_id: str | None, most: int) -> Dialogue[list[IssuedPass]]:
    """Return the latest passes, of one user or of all, newest first."""
    whose = "AND user_id = :user_id" if user_id is not None else ""
    rows = yield (
        f"SELECT * FROM passes WHERE transport <> '' {whose} ORDER BY reserved_at DESC LIMIT :most",  # noqa: S608 - two fixed texts
        {"user_id": user_id, "most": most},
    )
    return [as_issued_pass(row) for row in rows]


def list_page(after: tuple[float, str], most: int) -> Dialogue[list[IssuedPass]]:
    """Return the passes after `after` (reserved_at, pass_id), the oldest first. An export reads page by page."""
    rows = yield _PAGE, {"reserved_at": after[0], "pass_id": after[1], "most": most}
    return [as_issued_pass(row) for row in rows]


def sum_by_user(window_seconds: int, most: int, now: float) -> Dialogue[list[Row]]:
    """Return who used most in the window: token_issuer, user_id, passes, seconds, cost_fiat."""
    rows = yield _TOTALS, {"since": now - window_seconds, "most": most}
    return [{**row, "seconds": int(row["seconds"])} for row in rows]  # PostgreSQL sums to a Decimal


def read_standing(now: float) -> Dialogue[Standing]:
    """Return how many passes are open, and how many are overdue, up to MAX_COUNTED."""
    instants = {"minute": math.floor(now / 60), "before": now - UNUSED_SECONDS}
    (row,) = yield _STANDING, instants | {"most": MAX_COUNTED}
    oldest = row["oldest"]
    return Standing(
        open_conversations=int(row["opened"]),
        unsettled=row["unsettled"],
        oldest_unsettled_seconds=0.0 if oldest is None else now - oldest,
    )


def delete_old(age_seconds: int, now: float) -> Dialogue[None]:
    """Delete some of the passes and settlements that are older than `age_seconds`, and the sums that no limit needs.

    `age_seconds` is 31 days at least: then the sums of these passes are gone already.
    """
    (oldest,) = yield _OLDEST, {"before": now - age_seconds}
    if oldest["last"] is not None:
        yield "DELETE FROM passes WHERE transport <> '' AND reserved_at <= :last", oldest
    yield from delete_old_sums(now)
    yield _DELETE_ORPHANS, {"before": now - min(age_seconds, ORPHAN_SECONDS)}


def block(blocked: Block, now: float) -> Dialogue[None]:
    """Block a user, an agent or everyone."""
    yield _BLOCK, asdict(blocked) | {"now": now}


def unblock(blocked: Block) -> Dialogue[bool]:
    """Remove a block, also of a forgotten user. Returns whether there was one."""
    return bool((yield _UNBLOCK, asdict(blocked) | {"user_hash": hash_user_id(blocked.key)}))


def list_blocks() -> Dialogue[list[Block]]:
    """Return all blocks."""
    rows = yield "SELECT kind, key, token_issuer FROM blocks ORDER BY kind, key", {}
    return [Block(**row) for row in rows]


def lease(name: str, seconds: float, now: float) -> Dialogue[bool]:
    """Take a lease unless another instance holds it. One that ends too late does not count: a clock was ahead."""
    return bool((yield _LEASE, {"name": name, "held_until": now + seconds, "now": now}))


def end_lease(name: str, now: float, *, after_seconds: float) -> Dialogue[None]:
    """Shorten a lease, so that it ends after these seconds."""
    yield "UPDATE leases SET held_until = :until WHERE name = :name", {"name": name, "until": now + after_seconds}


def check(name: str, now: float, *, is_whole: bool) -> Dialogue[None]:
    """Write a row and delete it again, in one transaction. Nobody sees it.

    The row is one of `leases`: PostgreSQL cleans this small table within a minute. If `is_whole`, this reserves and
    releases a pass as well, which needs as much room as a real pass.
    """
    yield "INSERT INTO leases (name, held_until) VALUES (:name, :now)", {"name": name, "now": now}
    yield "DELETE FROM leases WHERE name = :name", {"name": name}
    if is_whole:
        row: dict[str, Any] = (
            dict.fromkeys(RESERVED, name)
            | dict.fromkeys(GRANTED)
            | {"transport": Transport.WEBSOCKET.value, "seconds": 0}
        )
        row |= {"reserved_at": now, "lapses_at": now + 60}
        yield RESERVE, row
        yield from change_sums(row, passes=1, opened=1)
        yield from release(name)


_DUE: Final = """
SELECT * FROM passes WHERE transport <> '' AND settled_at IS NULL AND conversation_id IS NOT NULL
AND reserved_at > :after AND reserved_at < :before ORDER BY reserved_at LIMIT :most"""

_LEASE: Final = """
INSERT INTO leases (name, held_until) VALUES (:name, :held_until)
ON CONFLICT (name) DO UPDATE SET held_until = excluded.held_until
WHERE leases.held_until <= :now OR leases.held_until > excluded.held_until
RETURNING name"""

_PAGE: Final = """
SELECT * FROM passes WHERE transport <> '' AND (reserved_at, pass_id) > (:reserved_at, :pass_id)
ORDER BY reserved_at, pass_id LIMIT :most"""

_TOTALS: Final = """
SELECT token_issuer, user_id, count(*) AS passes, sum(seconds) AS seconds, sum(cost_fiat) AS cost_fiat
FROM passes WHERE transport <> '' AND reserved_at > :since
GROUP BY token_issuer, user_id ORDER BY sum(seconds) DESC, count(*) DESC LIMIT :most"""

_STANDING: Final = """
SELECT (SELECT coalesce(sum(open), 0) FROM sums WHERE scope = 'all' AND length = 60 AND slot > :minute) AS opened,
       (SELECT count(*) FROM (SELECT 1 FROM passes WHERE transport <> '' AND settled_at IS NULL
                              AND conversation_id IS NOT NULL AND reserved_at < :before LIMIT :most) AS overdue)
       AS unsettled,
       (SELECT min(reserved_at) FROM passes WHERE transport <> '' AND settled_at IS NULL
        AND conversation_id IS NOT NULL AND reserved_at < :before) AS oldest"""

_OLDEST: Final = """
SELECT max(reserved_at) AS last FROM
(SELECT reserved_at FROM passes
 WHERE transport <> '' AND reserved_at < :before ORDER BY reserved_at LIMIT 1000) AS oldest"""

_DELETE_ORPHANS: Final = """
DELETE FROM orphans WHERE conversation_id IN
(SELECT conversation_id FROM orphans WHERE arrived_at < :before LIMIT 1000)"""

_BLOCK: Final = """
INSERT INTO blocks (kind, key, token_issuer, blocked_at) VALUES (:kind, :key, :token_issuer, :now)
ON CONFLICT DO NOTHING"""

_UNBLOCK: Final = """
DELETE FROM blocks WHERE kind = :kind AND key IN (:key, :user_hash) AND token_issuer = :token_issuer
RETURNING kind"""
