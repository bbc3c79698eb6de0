"""The ledger's rules, once for both engines: passes from their reservation to their settlement.

A rule yields statements and gets their rows. An engine runs the whole rule in one transaction, at the instant `now`. A
rule raises its refusal before it writes.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, Final

from voicepass.errors import BadAnswer, ConversationUnknown, LedgerUnavailable
from voicepass.ledger.dialogue import Dialogue, Row
from voicepass.ledger.limits import HAS_LAPSED, RELEASED_SECONDS, UNUSED_SECONDS, Question, count_each, find_room
from voicepass.ledger.sums import change_sums, is_open
from voicepass.model import Counted, Credential, IssuedPass, Limit, Reservation, Scope, Settlement, Usage


def reserve(
    reservation: Reservation,
    question: Question,
    now: float,
    *,
    ready: Credential | None = None,
    sealed: bytes | None = None,
) -> Dialogue[bool]:
    """Count one more pass. Returns False, and does nothing, if lapsed reservations must be deleted first (`lapse`).

    If the credential is `ready`, this grants it, too, and raises BadAnswer as `grant` does. No settlement can have
    arrived before it, because nobody had this credential.

    Raises UserBlocked, or the LimitReached of the limit that leaves no room for longest. While a limit of minutes has
    room, a conversation may begin, and its pass reserves no more than this room. It may last longer, because nobody can
    end it. Then the next pass is refused.
    """
    row = reserved_row(reservation)
    seconds = yield from find_room(question, row, reservation.seconds, now)
    if seconds is None:
        return False
    # The pass counts as open until it has been used to the full, or a settlement says what happened.
    lapses_at = math.ceil((now + RELEASED_SECONDS + reservation.seconds) / 60) * 60.0
    row |= {"reserved_at": now, "lapses_at": lapses_at, "seconds": seconds}
    row |= dict.fromkeys(GRANTED) if ready is None else _granted_row(ready, sealed, now)
    if ready is None:
        yield RESERVE, row
    elif not (yield _RESERVE_AND_GRANT, row):
        yield from _explain_no_grant(reservation, row)
        return True
    yield from change_sums(row, passes=1, seconds=seconds, opened=1)
    return True


def _granted_row(credential: Credential, sealed: bytes | None, now: float) -> dict[str, Any]:
    return dict(zip(GRANTED, (now, credential.conversation_id, credential.sha256, sealed), strict=True))


def reserved_row(reservation: Reservation) -> dict[str, Any]:
    """Return a reservation as parameters."""
    row = {name: getattr(reservation, name) for name in RESERVED}  # `asdict` takes longer than the insert
    row["transport"] = reservation.transport.value
    return row


def lapse(now: float) -> Dialogue[None]:
    """Delete the oldest reservation, if a crash left it behind.

    One at a time: transactions that change several passes would wait for each other's sums in two orders, and deadlock.
    """
    for row in (yield _LAPSE, {"lapsed": now - UNUSED_SECONDS}):
        yield from change_sums(row, passes=-1, seconds=-row["seconds"], opened=-1)


def grant(
    reservation: Reservation, credential: Credential, now: float, *, sealed: bytes | None = None
) -> Dialogue[None]:
    """Bind the conversation to the user it was reserved for, and keep the credential as `sealed`.

    Raises BadAnswer if ElevenLabs named a conversation that voicepass issued to someone else, and LedgerUnavailable if
    the reservation is gone: a pass without a row never leaves.
    """
    row = {"pass_id": reservation.pass_id} | _granted_row(credential, sealed, now)
    granted = yield _GRANT, row
    if not granted:
        yield from _explain_no_grant(reservation, row)
    elif granted[0]["is_early"]:
        for early in (yield _EARLY, row):
            yield "DELETE FROM orphans WHERE conversation_id = :conversation_id", row
            yield from settle(Settlement(**early), now)


def _explain_no_grant(reservation: Reservation, row: Row) -> Dialogue[None]:
    others = yield "SELECT token_issuer, user_id FROM passes WHERE conversation_id = :conversation_id", row
    if not others:
        raise LedgerUnavailable(
            operator_note="the reservation is gone: it lapsed, or the database lost what it confirmed"
        )
    if (others[0]["token_issuer"], others[0]["user_id"]) != (reservation.token_issuer, reservation.user_id):
        raise BadAnswer(operator_note="ElevenLabs named a conversation that was issued to another user before")
    yield from release(reservation.pass_id)  # the first row of this conversation stays charged


def release(pass_id: str, *, has_reached: bool = False) -> Dialogue[None]:
    """Delete a reservation without a pass. If its request reached ElevenLabs, it counts as a request for a minute."""
    for row in (
        yield "DELETE FROM passes WHERE pass_id = :pass_id AND granted_at IS NULL RETURNING *", {"pass_id": pass_id}
    ):
        if has_reached:
            yield _FAIL, row
        yield from change_sums(row, passes=-1, failed=int(has_reached), seconds=-row["seconds"], opened=-1)


def settle(settlement: Settlement, now: float) -> Dialogue[IssuedPass | None]:
    """Close a conversation with what it really used. Order and repetition of settlements make no difference.

    Returns the pass if this settled it, and None if it was settled before or belongs to another agent. An unknown
    conversation returns None, too: then the settlement waits for its pass, without the name of its user.
    """
    row = asdict(settlement) | {"now": now}
    found = yield FIND_ISSUED, row
    if not found:
        yield _ORPHAN, row
        return None
    before = found[0]
    if is_of_another_agent(before["agent_id"], settlement.agent_id):
        return None
    row["user_id"] = _reported_user_id(settlement, before["user_id"])
    # An expiry is a guess, which any report replaces. A webhook replaces what voicepass asked for itself.
    settled = yield _SETTLE, row
    if not settled:
        return None
    yield from change_sums(before, seconds=settlement.seconds - before["seconds"], opened=-is_open(before))
    return as_issued_pass(settled[0]) if before["settled_by"] in {None, "expiry"} else None


def is_of_another_agent(issued_agent_id: str, reported_agent_id: str | None) -> bool:
    """Tell whether ElevenLabs reports another agent than the pass was issued for.

    A speech engine's id (`seng_…`) and that of its agent (`agent_…`) name the same (the SDK's `conversations.list`).
    """
    both = (issued_agent_id, reported_agent_id or "")
    return issued_agent_id != reported_agent_id and all(agent_id.startswith("agent_") for agent_id in both)


def _reported_user_id(settlement: Settlement, user_id: str) -> str | None:
    """Return the user id that the browser sent to ElevenLabs. If it sent several, return one that is not the user's."""
    claimed = [each for each in (settlement.user_id, settlement.variable_user_id) if each is not None]
    return next((each for each in claimed if each != user_id), claimed[0] if claimed else None)


def expire(conversation_id: str, now: float, *, min_age_seconds: float = 0.0) -> Dialogue[bool]:
    """Release a pass that nobody opened: its seconds are free again, and it no longer counts as open.

    Returns whether this released it: not if it is younger than `min_age_seconds`, known to be open, or settled.
    """
    parameters = {"conversation_id": conversation_id, "now": now, "before": now - min_age_seconds}
    for before in (yield FIND_ISSUED, parameters):
        if (yield _EXPIRE, parameters):
            yield from change_sums(before, seconds=-before["seconds"], opened=-is_open(before))
            return True
    return False


def read_usage(whose: Row, limits: Sequence[Limit], now: float) -> Dialogue[list[Usage] | None]:
    """Return what a user has used of limits of the scope USER; None if lapsed reservations must be deleted first."""
    (row,) = yield f"SELECT {HAS_LAPSED}", {"lapsed": now - UNUSED_SECONDS}
    if row["has_lapsed"]:
        return None
    return (yield from count_each(limits, whose, now))


def read_seconds_left(
    limits: Sequence[Limit], now: float, *, conversation_id: str | None, pass_id: str = ""
) -> Dialogue[int | None]:
    """Return the seconds that the user of a pass may still talk; None if no limit counts the user's minutes.

    What is reserved for this conversation, and not used yet, is also left. Raises ConversationUnknown.
    """
    found = yield _FIND_EITHER, {"conversation_id": conversation_id, "pass_id": pass_id}
    if not found or not found[0]["user_id"]:
        raise ConversationUnknown
    row = found[0]
    whose = {name: row[name] for name in ("token_issuer", "user_id", "agent_alias")}
    own = 0
    if is_open(row):
        since = row["opened_at"] or row["granted_at"] or now
        own = max(0, row["seconds"] - max(0, int(now - since)))
    of_minutes = [limit for limit in limits if limit.scope is Scope.USER and limit.counted is Counted.SECONDS]
    answers = yield from count_each(of_minutes, whose, now)
    return min((answer.left + own for answer in answers), default=None)


def find_issued(conversation_id: str) -> Dialogue[IssuedPass]:
    """Return the pass of a conversation. Raises ConversationUnknown, also if its user was forgotten."""
    found = yield FIND_ISSUED, {"conversation_id": conversation_id}
    if not found or not found[0]["user_id"]:
        raise ConversationUnknown
    return as_issued_pass(found[0])


def as_issued_pass(row: Row) -> IssuedPass:
    """Return a row as the data type."""
    # Only known columns: a newer instance may have added others.
    return IssuedPass(**{field.name: row[field.name] for field in fields(IssuedPass)})


RESERVED: Final = [field.name for field in fields(Reservation)]
GRANTED: Final = ["granted_at", "conversation_id", "credential_sha256", "sealed"]

FIND_ISSUED: Final = "SELECT * FROM passes WHERE conversation_id = :conversation_id"

_FIND_EITHER: Final = "SELECT * FROM passes WHERE conversation_id = :conversation_id OR pass_id = :pass_id"

RESERVE: Final = """
INSERT INTO passes (pass_id, request_id, token_issuer, user_id, agent_alias, agent_id, transport,
                    plan, reserved_at, lapses_at, reserved_seconds, seconds,
                    granted_at, conversation_id, credential_sha256, sealed)
VALUES (:pass_id, :request_id, :token_issuer, :user_id, :agent_alias, :agent_id, :transport,
        :plan, :reserved_at, :lapses_at, :seconds, :seconds,
        :granted_at, :conversation_id, :credential_sha256, :sealed)"""

_RESERVE_AND_GRANT: Final = f"{RESERVE} ON CONFLICT (conversation_id) DO NOTHING RETURNING pass_id"

_LAPSE: Final = """
DELETE FROM passes WHERE granted_at IS NULL AND pass_id =
(SELECT pass_id FROM passes WHERE granted_at IS NULL AND reserved_at <= :lapsed
 ORDER BY reserved_at LIMIT 1) RETURNING *"""

_FAIL: Final = """
INSERT INTO failed_requests (pass_id, token_issuer, user_id, agent_alias, transport, reserved_at)
VALUES (:pass_id, :token_issuer, :user_id, :agent_alias, :transport, :reserved_at)"""

_GRANT: Final = """
UPDATE passes SET granted_at = :granted_at, conversation_id = :conversation_id, credential_sha256 = :credential_sha256,
                  sealed = :sealed
WHERE pass_id = :pass_id AND NOT EXISTS (SELECT 1 FROM passes WHERE conversation_id = :conversation_id)
RETURNING EXISTS (SELECT 1 FROM orphans WHERE conversation_id = :conversation_id) AS is_early"""

_SETTLE: Final = """
UPDATE passes SET settled_at = :now, settled_by = :source, seconds = :seconds, cost = :cost,
                  cost_fiat = :cost_fiat, sealed = NULL, reported_user_id = CASE WHEN user_id <> '' THEN :user_id END
WHERE conversation_id = :conversation_id AND (settled_at IS NULL OR settled_by = 'expiry'
      OR (settled_by <> 'webhook' AND :source = 'webhook')) RETURNING *"""

_EXPIRE: Final = """
UPDATE passes SET settled_at = :now, settled_by = 'expiry', seconds = 0, sealed = NULL
WHERE conversation_id = :conversation_id AND settled_at IS NULL AND opened_at IS NULL AND granted_at <= :before
RETURNING pass_id"""

_EARLY: Final = (
    "SELECT conversation_id, seconds, cost, cost_fiat, agent_id, source FROM orphans"
    " WHERE conversation_id = :conversation_id"
)

_ORPHAN: Final = """
INSERT INTO orphans (conversation_id, arrived_at, seconds, cost, cost_fiat, agent_id, source)
VALUES (:conversation_id, :now, :seconds, :cost, :cost_fiat, :agent_id, :source)
ON CONFLICT (conversation_id) DO UPDATE SET arrived_at = excluded.arrived_at, seconds = excluded.seconds,
    cost = excluded.cost, cost_fiat = excluded.cost_fiat, agent_id = excluded.agent_id, source = excluded.source
WHERE orphans.source <> 'webhook' AND excluded.source = 'webhook'"""
