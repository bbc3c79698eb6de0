"""The ledger's rules, once for both engines: each is a dialogue of statements, and knows no driver.

A rule yields a statement with its parameters and is sent the rows; the engine runs the whole dialogue in one
transaction that no other can interleave with, at the instant `now`. What a rule refuses, it refuses before it writes.
"""

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, Final

from voicepass.errors import BadAnswer, ConversationUnknown, LedgerUnavailable
from voicepass.ledger.dialogue import Dialogue, Row
from voicepass.ledger.limits import QUARTER_SECONDS, UNUSED_SECONDS, hold, move_sums, room
from voicepass.model import Block, Credential, IssuedPass, Limit, Reservation, Settlement, Standing, Transport

MAX_COUNTED: Final = 10_000  # by the standing: enough to be alarmed by

ORPHAN_SECONDS: Final = 24 * 3600
"""A settlement waits for its pass for so long: it arrives at the same instant, or the pass is not ours."""


def reserve(reservation: Reservation, limits: Sequence[Limit], now: float) -> Dialogue[None]:
    """Count one more pass, or raise UserBlocked, or the LimitReached of the limit that leaves no room for longest.

    While anything is left a conversation may begin, and no more is set aside for it than there is: what is promised
    never exceeds a limit. It may still end beyond it, for nobody can cut it; then the next is refused.
    """
    row = reserved_row(reservation)
    left = yield from room(row, limits, now)
    seconds = reservation.seconds if left is None else min(reservation.seconds, left)
    yield _RESERVE, row | {"now": now, "lapses_at": now + UNUSED_SECONDS, "seconds": seconds}


def reserved_row(reservation: Reservation) -> dict[str, Any]:
    """Return a reservation as parameters."""
    # Not by `asdict`: it copies in depth, which takes longer than the insert.
    row = {name: getattr(reservation, name) for name in _RESERVED}
    return row | {"transport": reservation.transport.value}


def grant(
    reservation: Reservation, credential: Credential, now: float, *, sealed: bytes | None = None
) -> Dialogue[None]:
    """Bind the conversation to the user it was reserved for, and keep the credential as `sealed`.

    Raises BadAnswer where ElevenLabs named a conversation that was issued to someone else, and LedgerUnavailable where
    the reservation is gone: no row, no pass.
    """
    row = {
        "pass_id": reservation.pass_id,
        "conversation_id": credential.conversation_id,
        "credential_sha256": credential.sha256,
        "sealed": sealed,
        "now": now,
        # Open until it has had time to be used to the full; what really was, a settlement will tell.
        "lapses_at": now + UNUSED_SECONDS + reservation.seconds,
    }
    granted = yield _GRANT, row
    if not granted:
        yield from _not_granted(reservation, row)
    elif granted[0]["is_early"]:
        for early in (yield _EARLY, row):
            yield "DELETE FROM orphans WHERE conversation_id = :conversation_id", row
            yield from settle(Settlement(**early, user_id=None), now)


def _not_granted(reservation: Reservation, row: Row) -> Dialogue[None]:
    others = yield "SELECT token_issuer, user_id FROM passes WHERE conversation_id = :conversation_id", row
    if not others:
        raise LedgerUnavailable(
            operator_note="the reservation is gone: it lapsed, or the database lost what it confirmed"
        )
    if (others[0]["token_issuer"], others[0]["user_id"]) != (reservation.token_issuer, reservation.user_id):
        raise BadAnswer(operator_note="ElevenLabs named a conversation that was issued to another user before")
    yield from release(reservation.pass_id)  # one conversation, one row: what the first has used stays charged


def release(pass_id: str, *, has_reached: bool = False) -> Dialogue[None]:
    """Give back a reservation that came to nothing. If it reached ElevenLabs, it counts as a request for a minute."""
    for row in (yield _RELEASE, {"pass_id": pass_id}):
        if has_reached:
            yield _FAIL, row


def settle(settlement: Settlement, now: float) -> Dialogue[IssuedPass | None]:
    """Close a conversation with what it really used: once, in any order, however often it is told.

    Returns the pass if this settled it; None if it was settled before or is of another agent, and if it is (yet)
    unknown: then the settlement waits, without the name of its user.
    """
    row = asdict(settlement) | {"now": now}
    found = yield FIND_ISSUED, row
    if not found:
        yield _ORPHAN, row
        return None
    if is_of_another_agent(found[0]["agent_id"], settlement.agent_id):
        return None
    row["user_id"] = _reported_user_id(settlement, found[0]["user_id"])
    # An expiry is a guess and gives way to what ElevenLabs tells; what it tells of itself outranks what it answers.
    yield from hold(found[0])
    settled = yield _SETTLE, row
    if settled:
        yield from move_sums(found[0], settlement.seconds)
    is_first = found[0]["settled_by"] in {None, "expiry"}
    return as_issued_pass(settled[0]) if settled and is_first else None


def is_of_another_agent(issued_agent_id: str, told_agent_id: str | None) -> bool:
    """Tell whether ElevenLabs tells of another agent than a pass was issued for.

    A speech engine's id (`seng_…`) and its agent's (`agent_…`) name one thing (the SDK's `conversations.list`).
    """
    both = (issued_agent_id, told_agent_id or "")
    return issued_agent_id != told_agent_id and all(agent_id.startswith("agent_") for agent_id in both)


def _reported_user_id(settlement: Settlement, user_id: str) -> str | None:
    """Return the user id that the browser claimed: one that is not the user's, if it claimed several."""
    claimed = [each for each in (settlement.user_id, settlement.variable_user_id) if each is not None]
    return next((each for each in claimed if each != user_id), claimed[0] if claimed else None)


def expire(conversation_id: str, now: float, *, min_age_seconds: float = 0.0) -> Dialogue[bool]:
    """Release a pass that nobody opened: its seconds are free again, and it is open no longer.

    Returns whether this released it: not if it is younger than `min_age_seconds`, known to be open, or settled.
    """
    before = now - min_age_seconds
    parameters = {"conversation_id": conversation_id, "now": now, "before": before, "unused": UNUSED_SECONDS}
    for unused in (yield FIND_ISSUED, parameters):
        yield from hold(unused)
        if (yield _EXPIRE, parameters):
            yield from move_sums(unused, 0)
            return True
    return False


def issued(conversation_id: str) -> Dialogue[IssuedPass]:
    """Return the pass behind a conversation, or raise ConversationUnknown."""
    found = yield FIND_ISSUED, {"conversation_id": conversation_id}
    if not found:
        raise ConversationUnknown
    return as_issued_pass(found[0])


def due(most: int, after: float, now: float, *, min_age_seconds: float) -> Dialogue[list[IssuedPass]]:
    """Return the passes that ElevenLabs' list should have settled by now and has not, oldest first."""
    rows = yield _DUE, {"after": after, "before": now - min_age_seconds, "most": most}
    return [as_issued_pass(row) for row in rows]


def lease(name: str, seconds: float, now: float) -> Dialogue[bool]:
    """Take a lease unless it is held. One that ends later than a new one would does not count: a clock was ahead."""
    return bool((yield _LEASE, {"name": name, "held_until": now + seconds, "now": now}))


def end_lease(name: str, now: float, *, after_seconds: float) -> Dialogue[None]:
    """Let a lease lapse earlier than it would."""
    yield "UPDATE leases SET held_until = :until WHERE name = :name", {"name": name, "until": now + after_seconds}


def check(name: str, now: float, *, is_whole: bool) -> Dialogue[None]:
    """Write a row and take it back, in one transaction. Nobody sees it, and nothing is left of it.

    The row is one of `leases`: that table is small, so PostgreSQL removes what this leaves behind within a minute.
    If it `is_whole`, a pass is reserved and taken back as well, which needs all the room that a real one needs.
    """
    yield "INSERT INTO leases (name, held_until) VALUES (:name, :now)", {"name": name, "now": now}
    yield "DELETE FROM leases WHERE name = :name", {"name": name}
    if is_whole:
        row = dict.fromkeys(_RESERVED, name) | {"transport": Transport.WEBSOCKET.value, "seconds": 0}
        yield _RESERVE, row | {"now": now, "lapses_at": now}
        yield from release(name)


def listed(user_id: str | None, most: int) -> Dialogue[list[IssuedPass]]:
    """Return the latest passes, of one user or of all, newest first."""
    whose = "AND user_id = :user_id" if user_id is not None else ""
    rows = yield (
        f"SELECT * FROM passes WHERE transport <> '' {whose} ORDER BY reserved_at DESC LIMIT :most",  # noqa: S608 - two fixed texts
        {"user_id": user_id, "most": most},
    )
    return [as_issued_pass(row) for row in rows]


def page(after: tuple[float, str], most: int) -> Dialogue[list[IssuedPass]]:
    """Return the passes that follow `after` (reserved_at, pass_id), oldest first: how an export walks through all."""
    rows = yield _PAGE, {"reserved_at": after[0], "pass_id": after[1], "most": most}
    return [as_issued_pass(row) for row in rows]


def totals(window_seconds: int, most: int, now: float) -> Dialogue[list[Row]]:
    """Return who used most in the window: token_issuer, user_id, passes, seconds."""
    rows = yield _TOTALS, {"since": now - window_seconds, "most": most}
    return [{**row, "seconds": int(row["seconds"])} for row in rows]  # PostgreSQL sums to a Decimal


def standing(now: float) -> Dialogue[Standing]:
    """Return what is open and what is overdue, each counted so far as costs next to nothing."""
    (row,) = yield _STANDING, {"now": now, "before": now - UNUSED_SECONDS, "most": MAX_COUNTED}
    oldest = row["oldest"]
    return Standing(
        open_conversations=row["open_conversations"],
        unsettled=row["unsettled"],
        oldest_unsettled_seconds=0.0 if oldest is None else now - oldest,
    )


def forget(age_seconds: int, now: float) -> Dialogue[None]:
    """Delete passes and settlements older than `age_seconds`: some of them, so that nobody waits for it."""
    (oldest,) = yield _OLDEST, {"before": now - age_seconds}
    if oldest["last"] is not None:
        yield "DELETE FROM passes WHERE transport <> '' AND reserved_at <= :last", oldest
    yield "DELETE FROM quarters WHERE quarter < :before", {"before": int((now - age_seconds) // QUARTER_SECONDS)}
    yield _FORGET_ORPHANS, {"before": now - min(age_seconds, ORPHAN_SECONDS)}


def block(blocked: Block, now: float) -> Dialogue[None]:
    """Give no more passes to a user, for an agent, or to anyone."""
    yield _BLOCK, asdict(blocked) | {"now": now}


def unblock(blocked: Block) -> Dialogue[None]:
    """Take a block back."""
    yield _UNBLOCK, asdict(blocked)


def blocks() -> Dialogue[list[Block]]:
    """Return all that is blocked."""
    rows = yield "SELECT kind, key, token_issuer FROM blocks ORDER BY kind, key", {}
    return [Block(**row) for row in rows]


def as_issued_pass(row: Row) -> IssuedPass:
    """Return a row as the data type."""
    # By name, not by all that is there: an older instance must not stumble over a column that a newer one has added.
    return IssuedPass(**{field.name: row[field.name] for field in fields(IssuedPass)})


_RESERVED: Final = [field.name for field in fields(Reservation)]

FIND_ISSUED: Final = "SELECT * FROM passes WHERE conversation_id = :conversation_id"

_RESERVE: Final = """
INSERT INTO passes (pass_id, request_id, token_issuer, user_id, agent_alias, agent_id, transport,
                    reserved_at, lapses_at, seconds)
VALUES (:pass_id, :request_id, :token_issuer, :user_id, :agent_alias, :agent_id, :transport,
        :now, :lapses_at, :seconds)"""

_RELEASE: Final = """
DELETE FROM passes WHERE pass_id = :pass_id AND granted_at IS NULL
RETURNING pass_id, token_issuer, user_id, agent_alias, transport, reserved_at"""

_FAIL: Final = """
INSERT INTO failed_requests (pass_id, token_issuer, user_id, agent_alias, transport, reserved_at)
VALUES (:pass_id, :token_issuer, :user_id, :agent_alias, :transport, :reserved_at)"""

_GRANT: Final = """
UPDATE passes SET granted_at = :now, conversation_id = :conversation_id, credential_sha256 = :credential_sha256,
                  lapses_at = :lapses_at, sealed = :sealed
WHERE pass_id = :pass_id AND NOT EXISTS (SELECT 1 FROM passes WHERE conversation_id = :conversation_id)
RETURNING EXISTS (SELECT 1 FROM orphans WHERE conversation_id = :conversation_id) AS is_early"""

_SETTLE: Final = """
UPDATE passes SET settled_at = :now, settled_by = :source, seconds = :seconds, cost = :cost, sealed = NULL,
                  reported_user_id = :user_id
WHERE conversation_id = :conversation_id AND (settled_at IS NULL OR settled_by = 'expiry'
      OR (settled_by <> 'webhook' AND :source = 'webhook')) RETURNING *"""

_EXPIRE: Final = """
UPDATE passes SET settled_at = :now, settled_by = 'expiry', seconds = 0, sealed = NULL,
                  lapses_at = granted_at + :unused + seconds  -- keeps what was reserved, for `opened.note_opened`
WHERE conversation_id = :conversation_id AND settled_at IS NULL AND opened_at IS NULL AND granted_at <= :before
RETURNING pass_id"""

_EARLY: Final = (
    "SELECT conversation_id, seconds, cost, agent_id, source FROM orphans WHERE conversation_id = :conversation_id"
)

_ORPHAN: Final = """
INSERT INTO orphans (conversation_id, arrived_at, seconds, cost, agent_id, source)
VALUES (:conversation_id, :now, :seconds, :cost, :agent_id, :source)
ON CONFLICT (conversation_id) DO UPDATE SET arrived_at = excluded.arrived_at, seconds = excluded.seconds,
    cost = excluded.cost, agent_id = excluded.agent_id, source = excluded.source
WHERE orphans.source <> 'webhook' AND excluded.source = 'webhook'"""

_DUE: Final = """
SELECT * FROM passes WHERE settled_at IS NULL AND conversation_id IS NOT NULL
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
SELECT token_issuer, user_id, count(*) AS passes, sum(seconds) AS seconds FROM passes
WHERE transport <> '' AND reserved_at > :since
GROUP BY token_issuer, user_id ORDER BY sum(seconds) DESC, count(*) DESC LIMIT :most"""

_STANDING: Final = """
SELECT (SELECT count(*) FROM (SELECT 1 FROM passes WHERE transport <> '' AND settled_at IS NULL AND lapses_at > :now
                              LIMIT :most) AS opened) AS open_conversations,
       (SELECT count(*) FROM (SELECT 1 FROM passes WHERE settled_at IS NULL AND conversation_id IS NOT NULL
                              AND reserved_at < :before LIMIT :most) AS overdue) AS unsettled,
       (SELECT min(reserved_at) FROM passes WHERE settled_at IS NULL AND conversation_id IS NOT NULL
        AND reserved_at < :before) AS oldest"""

_OLDEST: Final = """
SELECT max(reserved_at) AS last FROM
(SELECT reserved_at FROM passes
 WHERE transport <> '' AND reserved_at < :before ORDER BY reserved_at LIMIT 1000) AS oldest"""

_FORGET_ORPHANS: Final = """
DELETE FROM orphans WHERE conversation_id IN
(SELECT conversation_id FROM orphans WHERE arrived_at < :before LIMIT 1000)"""

_BLOCK: Final = """
INSERT INTO blocks (kind, key, token_issuer, blocked_at) VALUES (:kind, :key, :token_issuer, :now)
ON CONFLICT DO NOTHING"""

_UNBLOCK: Final = "DELETE FROM blocks WHERE kind = :kind AND key = :key AND token_issuer = :token_issuer"
