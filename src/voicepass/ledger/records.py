"""Rules about many passes (lists, totals, deletion), and about what is no pass: blocks, leases, the ledger's check."""

import math
from dataclasses import asdict
from typing import Any, Final

from voicepass.ledger import rules
from voicepass.ledger.dialogue import Dialogue, Row, read_statements
from voicepass.ledger.limits import UNUSED_SECONDS
from voicepass.ledger.rules import read_passes, release
from voicepass.ledger.sums import change_sums, delete_old_sums
from voicepass.model import Block, IssuedPass, Standing, Transport, hash_user_id

ORPHAN_SECONDS: Final = 24 * 3600
"""A settlement without a pass is kept for this time: its pass may arrive at the same instant."""

SQL: Final = read_statements("records")


def list_unsettled(now: float, most: int, *, after: float = 0.0, min_age_seconds: float) -> Dialogue[list[IssuedPass]]:
    """Return passes reserved after `after` that are old enough and not settled, the oldest first."""
    return read_passes(SQL["overdue"], {"after": after, "before": now - min_age_seconds, "most": most})


def list_passes(_now: float, *, user_id: str | None = None, most: int) -> Dialogue[list[IssuedPass]]:
    """Return the latest passes, of one user or of all, newest first."""
    if user_id is None:
        return read_passes(SQL["latest"], {"most": most})
    return read_passes(SQL["latest_of_user"], {"user_id": user_id, "most": most})


def list_page(_now: float, after: tuple[float, str], most: int) -> Dialogue[list[IssuedPass]]:
    """Return the passes after `after` (reserved_at, pass_id), the oldest first. An export reads page by page."""
    return read_passes(SQL["page"], {"reserved_at": after[0], "pass_id": after[1], "most": most})


def sum_usage(now: float, *, window_seconds: int, most: int) -> Dialogue[list[Row]]:
    """Return who used most in the window: token_issuer, user_id, passes, seconds, cost_fiat."""
    rows = yield SQL["totals"], {"since": now - window_seconds, "most": most}
    return [{**row, "seconds": int(row["seconds"])} for row in rows]  # PostgreSQL sums to a Decimal


def read_standing(now: float) -> Dialogue[Standing]:
    """Return how many passes are open, and how many are overdue, up to 10,000."""
    (row,) = yield SQL["standing"], {"minute": math.floor(now / 60), "before": now - UNUSED_SECONDS}
    return Standing(
        open_conversations=int(row["opened"]),
        unsettled=row["unsettled"],
        oldest_unsettled_seconds=0.0 if row["oldest"] is None else now - row["oldest"],
    )


def delete_old(now: float, *, age_seconds: int) -> Dialogue[None]:
    """Delete some of the passes and settlements that are older than `age_seconds`, and the sums that no limit needs.

    `age_seconds` is 31 days at least: then the sums of these passes are gone already.
    """
    (oldest,) = yield SQL["oldest"], {"before": now - age_seconds}
    yield SQL["delete_old"], oldest
    yield from delete_old_sums(now)
    yield SQL["delete_orphans"], {"before": now - min(age_seconds, ORPHAN_SECONDS)}


def block(now: float, blocked: Block) -> Dialogue[None]:
    """Block a user, an agent or everyone, at once on every instance."""
    yield SQL["block"], asdict(blocked) | {"now": now}


def unblock(_now: float, blocked: Block) -> Dialogue[bool]:
    """Remove a block, also of a forgotten user. Returns whether there was one."""
    return bool((yield SQL["unblock"], asdict(blocked) | {"user_hash": hash_user_id(blocked.key)}))


def list_blocks(_now: float) -> Dialogue[list[Block]]:
    """Return all blocks."""
    return [Block(**row) for row in (yield SQL["blocks"], {})]


def take_lease(now: float, name: str, /, seconds: float) -> Dialogue[bool]:
    """Take a lease for this many seconds. Returns whether no other instance holds it.

    A lease that ends too late does not count: a clock was ahead.
    """
    return bool((yield SQL["lease"], {"name": name, "held_until": now + seconds, "now": now}))


def end_lease(now: float, name: str, *, after_seconds: float = 0.0) -> Dialogue[None]:
    """Shorten a lease, so that it ends after these seconds."""
    yield SQL["end_lease"], {"name": name, "until": now + after_seconds}


def check(now: float, name: str, *, is_whole: bool) -> Dialogue[None]:
    """Write a row and delete it again, in one transaction. Nobody sees it.

    The row is one of `leases`: PostgreSQL cleans this small table within a minute. If `is_whole`, this reserves and
    releases a pass as well, which needs as much room as a real pass.
    """
    yield SQL["write_row"], {"name": name, "now": now}
    yield SQL["delete_row"], {"name": name}
    if is_whole:
        row: dict[str, Any] = dict.fromkeys(rules.RESERVED, name) | dict.fromkeys(rules.GRANTED)
        row |= {"transport": Transport.WEBSOCKET.value, "seconds": 0, "reserved_at": now, "lapses_at": now + 60}
        yield rules.SQL["reserve"], row
        yield from change_sums(row, passes=1, opened=1)
        yield from release(name)
