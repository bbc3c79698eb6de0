"""Rules about what is really open: about which passes to ask, what ElevenLabs answered, which pass to return again."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from voicepass.ledger import rules
from voicepass.ledger.dialogue import Dialogue, Row, read_statements
from voicepass.ledger.limits import IN_FLIGHT_SECONDS, SCOPES, UNUSED_SECONDS, name_scope
from voicepass.ledger.rules import read_passes, reserved_row
from voicepass.ledger.sums import OPEN_SECONDS, change_sums, is_open
from voicepass.model import IssuedPass, Limit, LookupTurn, Reservation, Turn

PAUSE_SECONDS: Final = 2.0
"""After a lookup that freed nothing, nobody starts another for this time."""
UNOPENED_SECONDS: Final = 5.0
"""How long ElevenLabs' answer that nobody has opened a pass is valid: for one lookup and the pause after it."""
LIST_OVERLAP_SECONDS: Final = 60.0
"""Each reading begins this long before the end of the last one, because ElevenLabs may write a record late."""
NOTED_LATE_SECONDS: Final = 5.0
"""The start of a conversation may be noted this much too late: its age grows until the ledger has it."""
FAILED_SECONDS: Final = 60.0
"""How long a request that failed counts: the window of `passes_per_minute`."""
LOOKUP_SECONDS: Final = 10.0
"""The longest that a lookup may take: a third of the longest deadline."""
AHEAD_SECONDS: Final = 3.0
"""An instant in the ledger may be this far in the future, because parallel transactions do not read the clock together.
If it is further in the future, a clock was wrong, and voicepass ignores it."""
_ASKABLE_SECONDS: Final = 24 * 3600.0

SQL: Final = read_statements("opened")


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedPass:
    """A pass that, as far as voicepass knows, nobody opened. Its credential is sealed under the workspace's API key."""

    pass_id: str
    sealed: bytes = field(repr=False)


def begin_lookup(now: float, reservation: Reservation, limit: Limit, *, seconds: float) -> Dialogue[LookupTurn]:
    """Take the turn to ask ElevenLabs about the passes that `limit` counts for this user, for `seconds` at most.

    Returns these passes. The turn is RUNNING while another caller has it, and PAUSED shortly after a lookup that freed
    nothing.
    """
    turn = {"key": _name_lookup(reservation, limit), "now": now, "until": now + seconds}
    turn |= {
        "latest_running": now + LOOKUP_SECONDS + AHEAD_SECONDS,
        "latest_pause": now + PAUSE_SECONDS + AHEAD_SECONDS,
    }
    if not (yield SQL["take_turn"], turn):
        is_running = yield from is_lookup_running(now, reservation, limit)
        return LookupTurn(turn=Turn.RUNNING if is_running else Turn.PAUSED)
    statement = SQL[f"to_look_up_{limit.counted}"].format(scope=SCOPES[limit.scope])
    instants = {"now": now, "since": now - limit.window_seconds, "open_since": now - OPEN_SECONDS}
    passes = yield from read_passes(statement, reserved_row(reservation) | instants)
    return LookupTurn(turn=Turn.OURS, passes=passes)


def _name_lookup(reservation: Reservation, limit: Limit) -> str:
    return f"{limit.counted} of {name_scope(limit.scope, reserved_row(reservation))}"


def end_lookup(now: float, reservation: Reservation, limit: Limit, *, has_freed: bool) -> Dialogue[None]:
    """Give the turn back. If nothing was freed, nobody takes it for two seconds."""
    key = _name_lookup(reservation, limit)
    yield SQL["end_turn" if has_freed else "pause"], {"key": key, "until": now + PAUSE_SECONDS}


def is_lookup_running(now: float, reservation: Reservation, limit: Limit) -> Dialogue[bool]:
    """Tell whether a caller looks this up at the moment."""
    latest = now + LOOKUP_SECONDS + AHEAD_SECONDS
    key = _name_lookup(reservation, limit)
    return bool((yield SQL["is_running"], {"key": key, "now": now, "latest_running": latest}))


def is_in_flight(now: float, reservation: Reservation) -> Dialogue[bool]:
    """Tell whether a pass of this user is between its reservation and its grant."""
    instants = {"since": now - IN_FLIGHT_SECONDS, "latest": now + AHEAD_SECONDS}
    return bool((yield SQL["in_flight"], reserved_row(reservation) | instants))


def note_unopened(now: float, conversation_id: str, /, *, expires_seconds: float) -> Dialogue[bool]:
    """Note that nobody has opened a conversation yet. Returns whether its pass was old enough to be released.

    Then its seconds are free again, and it no longer counts as open. A pass that is known to be open stays as it is.
    """
    parameters = {"conversation_id": conversation_id, "now": now, "before": now - expires_seconds}
    for before in (yield rules.SQL["find_issued"], parameters):
        if (yield SQL["expire"], parameters):
            yield from change_sums(before, seconds=-before["seconds"], opened=-is_open(before))
            return True
    yield SQL["note_unopened"], parameters
    return False


def note_opened(now: float, conversation_id: str, age_seconds: float, /) -> Dialogue[bool]:
    """Note that a conversation began `age_seconds` ago. Returns whether its pass was released: then it counts again.

    It takes an age, because the ledger's clock may differ from the real time, which ElevenLabs uses.
    """
    opened_at = now - age_seconds
    for row in (yield rules.SQL["find_issued"], {"conversation_id": conversation_id}):
        if row["settled_by"] == "expiry":
            yield from _reopen(row, opened_at)
            return True
        yield SQL["note_opened"], {"conversation_id": conversation_id, "opened_at": opened_at}
    return False


def _reopen(row: Row, opened_at: float) -> Dialogue[Row]:
    """Count a pass again that was released as unopened, with the seconds that were reserved for it."""
    (reopened,) = yield SQL["reopen"], {**row, "opened_at": opened_at}
    yield from change_sums(row, seconds=reopened["seconds"] - row["seconds"], opened=1)
    return reopened


def note_ended(now: float, conversation_id: str, /) -> Dialogue[bool]:
    """Note that a conversation has ended, though not how long it was. Returns whether it counted as open until now.

    Until its settlement, the time since the grant counts, or the reserved time if that is less.
    """
    for found in (yield rules.SQL["find_issued"], {"conversation_id": conversation_id}):
        is_released = found["settled_by"] == "expiry"
        row = (yield from _reopen(found, found["granted_at"])) if is_released else found
        if is_open(row) and row["lapses_at"] > now:
            seconds = min(row["seconds"], max(0, math.ceil(now - row["granted_at"])))
            yield SQL["note_ended"], {"conversation_id": conversation_id, "seconds": seconds, "now": now}
            yield from change_sums(row, seconds=seconds - row["seconds"], opened=-1)
            return True
    return False


def list_unopened(now: float, reservation: Reservation) -> Dialogue[list[SealedPass]]:
    """Return the user's passes for this agent and transport, the newest first.

    ElevenLabs has just said that nobody has opened them.
    """
    instants = {"since": now - UNUSED_SECONDS, "known": now - UNOPENED_SECONDS, "latest": now + AHEAD_SECONDS}
    return [SealedPass(**row) for row in (yield SQL["unopened"], reserved_row(reservation) | instants)]


def erase_sealed(now: float) -> Dialogue[None]:
    """Erase sealed credentials that are too old to be used, and delete old lookups and failed requests."""
    yield SQL["erase_sealed"], {"before": now - UNUSED_SECONDS}
    yield SQL["delete_old_lookups"], {"before": now - UNUSED_SECONDS}
    yield SQL["delete_old_failed"], {"before": now - 2 * FAILED_SECONDS}


def begin_listing(now: float, agent_id: str, *, every_seconds: float, recent_seconds: float) -> Dialogue[float | None]:
    """Return how many seconds back to read the agent's list. Returns None if it was just read.

    The list is to cover conversations that began within `recent_seconds`. The reconciler asks about each older one.
    It begins with the oldest conversation that is known to be open, or where the last reading ended if that is earlier.
    """
    parameters = {"agent_id": agent_id, "now": now, "oldest": now - _ASKABLE_SECONDS}
    parameters |= {"recent": now - recent_seconds, "reserved": now - recent_seconds - UNUSED_SECONDS}
    listed_until = 0.0
    for known in (yield SQL["listing"], parameters):
        if 0 <= now - known["listed_at"] < every_seconds:
            return None
        # If it is in the future, a clock was ahead: nobody can have read the list so far.
        listed_until = known["listed_until"] if known["listed_until"] <= now else 0.0
    (row,) = yield SQL["to_list"], parameters
    yield SQL["begin_listing"], parameters
    begins: list[float] = [] if row["open_since"] is None else [row["open_since"] - NOTED_LATE_SECONDS]
    if row["unseen_since"] is not None:
        begins.append(max(row["unseen_since"], listed_until) - LIST_OVERLAP_SECONDS)
    if listed_until or not begins:  # The list may also have conversations that began without a pass.
        begins.append(max(listed_until, now - recent_seconds) - LIST_OVERLAP_SECONDS)
    return now - min(begins)


def note_listed(now: float, agent_id: str, age_seconds: float) -> Dialogue[None]:
    """Note that the list was read up to the conversations that began `age_seconds` ago."""
    yield SQL["note_listed"], {"agent_id": agent_id, "until": now - age_seconds}


def list_never_opened(_now: float, agent_id: str, most: int, *, min_age_seconds: float) -> Dialogue[list[IssuedPass]]:
    """Return passes that were old enough when the list was last read, and are not in it; the oldest first."""
    return read_passes(SQL["never_opened"], {"agent_id": agent_id, "seconds": min_age_seconds, "most": most})


def find(_now: float, conversation_ids: Sequence[str]) -> Dialogue[list[IssuedPass]]:
    """Return the passes of these conversations. A conversation that voicepass did not issue has none."""
    names = {f"id_{n}": conversation_id for n, conversation_id in enumerate(conversation_ids)}
    listed = ", ".join(f":{name}" for name in names) or "NULL"
    return read_passes(f"SELECT * FROM passes WHERE conversation_id IN ({listed})", names)  # noqa: S608 - names of ours
