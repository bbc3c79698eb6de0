"""The ledger's rules, once for both engines: passes from their reservation to their settlement.

A rule yields statements and gets their rows. An engine runs the whole rule in one transaction, at the instant `now`. A
rule raises its refusal before it writes.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, Final

from voicepass.errors import BadAnswer, ConversationUnknown, LedgerUnavailable
from voicepass.ledger.dialogue import Dialogue, Row, read_statements
from voicepass.ledger.limits import RELEASED_SECONDS, UNUSED_SECONDS, Question, count_each, find_room
from voicepass.ledger.sums import change_sums, is_open
from voicepass.model import Counted, Credential, IssuedPass, Limit, Reservation, Scope, Settlement, Usage

SQL: Final = read_statements("rules")
RESERVED: Final = [field.name for field in fields(Reservation)]
GRANTED: Final = ["granted_at", "conversation_id", "credential_sha256", "sealed"]
_RESERVE_AND_GRANT: Final = f"{SQL['reserve']} ON CONFLICT (conversation_id) DO NOTHING RETURNING pass_id"


def reserve(
    now: float, reservation: Reservation, question: Question, *, ready: Credential | None = None
) -> Dialogue[bool]:
    """Count one more pass. Returns False, and does nothing, if lapsed reservations must be deleted first (`lapse`).

    If the credential is `ready`, this grants it, too, and raises BadAnswer as `grant` does. No settlement can have
    arrived before it, because nobody had this credential.

    Raises UserBlocked, or the LimitReached of the limit that leaves no room for longest. While a limit of minutes has
    room, a conversation may begin, and its pass reserves no more than this room. It may last longer, because nobody can
    end it. Then the next pass is refused.
    """
    row = reserved_row(reservation)
    seconds = yield from find_room(now, question, row, reservation.seconds)
    if seconds is None:
        return False
    # The pass counts as open until it has been used to the full, or a settlement says what happened.
    lapses_at = math.ceil((now + RELEASED_SECONDS + reservation.seconds) / 60) * 60.0
    row |= {"reserved_at": now, "lapses_at": lapses_at, "seconds": seconds}
    row |= dict.fromkeys(GRANTED) if ready is None else _granted_row(now, ready)
    if ready is None:
        yield SQL["reserve"], row
    elif not (yield _RESERVE_AND_GRANT, row):
        yield from _explain_no_grant(reservation, row)
        return True
    yield from change_sums(row, passes=1, seconds=seconds, opened=1)
    return True


def _granted_row(now: float, credential: Credential) -> dict[str, Any]:
    values = (now, credential.conversation_id, credential.sha256, credential.sealed)
    return dict(zip(GRANTED, values, strict=True))


def reserved_row(reservation: Reservation) -> dict[str, Any]:
    """Return a reservation as parameters."""
    return {name: getattr(reservation, name) for name in RESERVED}  # `asdict` takes longer than the insert


def lapse(now: float) -> Dialogue[None]:
    """Delete the oldest reservation, if a crash left it behind.

    One at a time: transactions that change several passes would wait for each other's sums in two orders, and deadlock.
    """
    for row in (yield SQL["lapse"], {"lapsed": now - UNUSED_SECONDS}):
        yield from change_sums(row, passes=-1, seconds=-row["seconds"], opened=-1)


def grant(now: float, reservation: Reservation, credential: Credential) -> Dialogue[None]:
    """Bind the conversation to the user it was reserved for, and keep the sealed credential.

    Raises BadAnswer if ElevenLabs named a conversation that voicepass issued to someone else, and LedgerUnavailable if
    the reservation is gone: a pass without a row never leaves.
    """
    row = {"pass_id": reservation.pass_id} | _granted_row(now, credential)
    granted = yield SQL["grant"], row
    if not granted:
        yield from _explain_no_grant(reservation, row)
    elif granted[0]["is_early"]:
        for early in (yield SQL["take_orphan"], row):
            yield from settle(now, Settlement(**early))


def _explain_no_grant(reservation: Reservation, row: Row) -> Dialogue[None]:
    owners = yield SQL["find_owner"], row
    if not owners:
        note = "the reservation is gone: it lapsed, or the database lost what it confirmed"
        raise LedgerUnavailable(operator_note=note)
    if (owners[0]["token_issuer"], owners[0]["user_id"]) != (reservation.token_issuer, reservation.user_id):
        raise BadAnswer(operator_note="ElevenLabs named a conversation that was issued to another user before")
    yield from release(reservation.pass_id)  # the first row of this conversation stays charged


def release(pass_id: str, *, has_reached: bool = False) -> Dialogue[None]:
    """Delete a reservation without a pass. If its request reached ElevenLabs, it counts as a request for a minute."""
    for row in (yield SQL["release"], {"pass_id": pass_id}):
        if has_reached:
            yield SQL["note_failed"], row
        yield from change_sums(row, passes=-1, failed=int(has_reached), seconds=-row["seconds"], opened=-1)


def settle(now: float, settlement: Settlement, /) -> Dialogue[IssuedPass | None]:
    """Close a conversation with what it really used. Order and repetition of settlements make no difference.

    Returns the pass if this settled it, and None if it was settled before or belongs to another agent. An unknown
    conversation returns None, too: then the settlement waits for its pass, without the name of its user.
    """
    row = asdict(settlement) | {"now": now}
    found = yield SQL["find_issued"], row
    if not found:
        yield SQL["keep_orphan"], row
        return None
    before = found[0]
    if is_of_another_agent(before["agent_id"], settlement.agent_id):
        return None
    row["user_id"] = _reported_user_id(settlement, before["user_id"])
    settled = yield SQL["settle"], row
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


def read_usage(now: float, whose: Row, limits: Sequence[Limit]) -> Dialogue[list[Usage] | None]:
    """Return what is used of these limits; None if lapsed reservations must be deleted first."""
    if (yield SQL["find_lapsed"], {"lapsed": now - UNUSED_SECONDS}):
        return None
    return (yield from count_each(now, limits, whose))


def read_seconds_left(
    now: float, limits: Sequence[Limit], *, conversation_id: str | None, pass_id: str = ""
) -> Dialogue[int | None]:
    """Return the seconds that the user of a pass may still talk; None if no limit counts the user's minutes.

    What is reserved for this conversation, and not used yet, is also left. Raises ConversationUnknown.
    """
    found = yield SQL["find_either"], {"conversation_id": conversation_id, "pass_id": pass_id}
    if not found or not found[0]["user_id"]:
        raise ConversationUnknown
    row = found[0]
    own = 0
    if is_open(row):
        since = row["opened_at"] or row["granted_at"] or now
        own = max(0, row["seconds"] - max(0, int(now - since)))
    of_minutes = [limit for limit in limits if limit.scope is Scope.USER and limit.counted is Counted.SECONDS]
    answers = yield from count_each(now, of_minutes, row)
    return min((answer.left + own for answer in answers), default=None)


def find_pass(_now: float, conversation_id: str) -> Dialogue[IssuedPass]:
    """Return the pass of a conversation: to whom it was issued. Raises ConversationUnknown, also if it is forgotten."""
    found = yield SQL["find_issued"], {"conversation_id": conversation_id}
    if not found or not found[0]["user_id"]:
        raise ConversationUnknown
    return as_issued_pass(found[0])


def as_issued_pass(row: Row) -> IssuedPass:
    """Return a row as the data type."""
    # Only known columns: a newer instance may have added others.
    return IssuedPass(**{field.name: row[field.name] for field in fields(IssuedPass)})


def read_passes(statement: str, parameters: Row) -> Dialogue[list[IssuedPass]]:
    """Return the passes that a statement finds."""
    return [as_issued_pass(row) for row in (yield statement, parameters)]
