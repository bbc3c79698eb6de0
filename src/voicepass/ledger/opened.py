"""Rules about what is really open: about which passes to ask, what ElevenLabs answered, which pass to return again."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from voicepass.ledger.dialogue import Dialogue, Row
from voicepass.ledger.limits import IN_FLIGHT_SECONDS, IS_OPEN, SCOPES, UNUSED_SECONDS
from voicepass.ledger.rules import FIND_ISSUED, as_issued_pass, expire
from voicepass.ledger.sums import OPEN_SECONDS, change_sums, is_open
from voicepass.model import Counted, IssuedPass, Limit, LookupTurn, Turn

MOST_ASKED: Final = 10
"""Passes that one lookup asks ElevenLabs about."""
PAUSE_SECONDS: Final = 2.0
"""After a lookup that freed nothing, nobody starts another for so long."""
UNOPENED_SECONDS: Final = 5.0
"""ElevenLabs' answer that nobody has opened a pass is valid for so long: one lookup and the pause after it."""
LIST_LAG_SECONDS: Final = 15.0
"""ElevenLabs' list may lack a conversation that began less than this ago."""
LIST_OVERLAP_SECONDS: Final = 60.0
"""Each reading begins this long before the end of the last one, because ElevenLabs may write a record late."""
FAILED_SECONDS: Final = 60.0
"""A request that failed counts for so long: the window of `passes_per_minute`."""
LOOKUP_SECONDS: Final = 10.0
"""The longest that a lookup may take: a third of the longest deadline."""
AHEAD_SECONDS: Final = 3.0
"""An instant in the ledger may be this far in the future, because parallel transactions do not read the clock together.
If it is further in the future, a clock was wrong, and voicepass ignores it."""
_ASKABLE_SECONDS: Final = 24 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedPass:
    """A pass that, as far as voicepass knows, nobody opened. Its credential is sealed under the workspace's API key."""

    pass_id: str
    sealed: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Which part of an agent's list of conversations to read: those that began from `since` to `until`."""

    since: float
    until: float


def begin_lookup(
    key: str, whose: Mapping[str, Any], limit: Limit, *, seconds: float, now: float
) -> Dialogue[LookupTurn]:
    """Take the turn to look up what `limit` counts, for `seconds` at most; return the passes to ask about.

    The turn is RUNNING while another caller has it, and PAUSED shortly after a lookup that freed nothing.
    """
    parameters = {
        **whose,
        "key": key,
        "now": now,
        "until": now + seconds,
        "since": now - limit.window_seconds,
        "open_since": now - OPEN_SECONDS,
    }
    if not (yield _TAKE_TURN, parameters):
        is_running = yield from is_lookup_running(key, now)
        return LookupTurn(turn=Turn.RUNNING if is_running else Turn.PAUSED)
    statement = _COUNTING[limit.counted].format(scope=SCOPES[limit.scope], most=MOST_ASKED)
    rows = yield statement, parameters
    return LookupTurn(turn=Turn.OURS, passes=[as_issued_pass(row) for row in rows])


def end_lookup(key: str, *, has_freed: bool, now: float) -> Dialogue[None]:
    """Give the turn back. If nothing was freed, nobody takes it for two seconds."""
    if has_freed:
        yield "DELETE FROM lookups WHERE key = :key", {"key": key}
    else:
        yield (
            "UPDATE lookups SET running_until = 0, paused_until = :until WHERE key = :key",
            {"key": key, "until": now + PAUSE_SECONDS},
        )


def is_lookup_running(key: str, now: float) -> Dialogue[bool]:
    """Tell whether a caller looks this up at the moment."""
    return bool((yield _RUNNING, {"key": key, "now": now}))


def is_in_flight(whose: Mapping[str, Any], now: float) -> Dialogue[bool]:
    """Tell whether a pass of this user is between its reservation and its grant."""
    return bool((yield _IN_FLIGHT, {**whose, "since": now - IN_FLIGHT_SECONDS, "latest": now + AHEAD_SECONDS}))


def note_unopened(conversation_id: str, now: float, *, expires_seconds: float) -> Dialogue[bool]:
    """Note that nobody has opened a conversation yet. Returns whether its pass was old enough to be released."""
    if (yield from expire(conversation_id, now, min_age_seconds=expires_seconds)):
        return True
    yield _UNOPEN, {"conversation_id": conversation_id, "now": now}
    return False


def note_opened(conversation_id: str, opened_at: float) -> Dialogue[bool]:
    """Note that a conversation is open. If its pass was released as unopened, it counts again: then True."""
    for row in (yield FIND_ISSUED, {"conversation_id": conversation_id}):
        if row["settled_by"] == "expiry":
            yield from _reopen(row, opened_at)
            return True
        if row["settled_at"] is None:
            yield _OPEN, {"conversation_id": conversation_id, "opened_at": opened_at}
    return False


def _reopen(row: Row, opened_at: float) -> Dialogue[Row]:
    """Count a pass again that was released as unopened, with the seconds that were reserved for it."""
    (reopened,) = yield _REOPEN, {**row, "opened_at": opened_at}
    yield from change_sums(row, seconds=reopened["seconds"] - row["seconds"], opened=1)
    return reopened


def note_ended(conversation_id: str, now: float) -> Dialogue[bool]:
    """Note that a conversation has ended, though not how long it was. Returns whether it counted as open until now.

    Until its settlement, the time since the grant counts, or the reserved time if that is less.
    """
    for found in (yield FIND_ISSUED, {"conversation_id": conversation_id}):
        is_released = found["settled_by"] == "expiry"
        row = (yield from _reopen(found, found["granted_at"])) if is_released else found
        if is_open(row) and row["lapses_at"] > now:
            seconds = min(row["seconds"], max(0, math.ceil(now - row["granted_at"])))
            yield _END, {"conversation_id": conversation_id, "seconds": seconds, "now": now}
            yield from change_sums(row, seconds=seconds - row["seconds"], opened=-1)
            return True
    return False


def list_unopened(whose: Mapping[str, Any], now: float) -> Dialogue[list[SealedPass]]:
    """Return the user's passes for this agent and transport, the newest first.

    ElevenLabs has just said that nobody has opened them.
    """
    instants = {"since": now - UNUSED_SECONDS, "known": now - UNOPENED_SECONDS, "latest": now + AHEAD_SECONDS}
    rows = yield _UNOPENED, {**whose, **instants}
    return [SealedPass(pass_id=row["pass_id"], sealed=row["sealed"]) for row in rows]


def erase_sealed(now: float) -> Dialogue[None]:
    """Erase sealed credentials that are too old to be used, and delete old lookups and failed requests."""
    before = now - UNUSED_SECONDS
    yield "UPDATE passes SET sealed = NULL WHERE sealed IS NOT NULL AND reserved_at <= :before", {"before": before}
    yield "DELETE FROM lookups WHERE running_until < :before AND paused_until < :before", {"before": before}
    yield "DELETE FROM failed_requests WHERE reserved_at < :before", {"before": now - 2 * FAILED_SECONDS}


def begin_listing(
    agent_id: str, now: float, *, every_seconds: float, recent_seconds: float
) -> Dialogue[Listing | None]:
    """Return which part of the agent's list to read now; None if it was read a short time ago.

    It begins with the oldest conversation that is known to be open, or where the last reading ended.
    """
    (known,) = yield _LISTED, {"agent_id": agent_id}
    if known["listed_at"] is not None and 0 <= now - known["listed_at"] < every_seconds:
        return None
    parameters = {
        "agent_id": agent_id,
        "now": now,
        "oldest": now - _ASKABLE_SECONDS,
        "recent": now - recent_seconds,
        "reserved": now - recent_seconds - UNUSED_SECONDS,
    }
    (row,) = yield _TO_LIST, parameters
    yield _BEGIN_LISTING, parameters
    listed_until = known["listed_until"] or 0.0
    if listed_until > now:  # a clock was ahead: nobody can have read the list so far
        listed_until = 0.0
    begins = [row["open_since"]] if row["open_since"] is not None else []
    if row["unseen_since"] is not None:
        begins.append(max(row["unseen_since"], listed_until) - LIST_OVERLAP_SECONDS)
    if not begins:  # The list may still have conversations that began without a pass.
        begins.append(max(listed_until, now - recent_seconds) - LIST_OVERLAP_SECONDS)
    return Listing(since=min(begins), until=now - LIST_LAG_SECONDS)


def note_listed(agent_id: str, until: float) -> Dialogue[None]:
    """Note that the list was read to its end, for all conversations that began before `until`."""
    yield (
        "UPDATE listings SET listed_until = :until WHERE agent_id = :agent_id AND listed_until < :until",
        {"agent_id": agent_id, "until": until},
    )


def list_never_opened(agent_id: str, most: int, *, min_age_seconds: float) -> Dialogue[list[IssuedPass]]:
    """Return passes that were old enough when the list was last read, and are not in it; the oldest first."""
    rows = yield _NEVER_OPENED, {"agent_id": agent_id, "seconds": min_age_seconds, "most": most}
    return [as_issued_pass(row) for row in rows]


def find(conversation_ids: list[str]) -> Dialogue[list[IssuedPass]]:
    """Return the passes of these conversations. A conversation that voicepass did not issue has none."""
    names = {f"id_{n}": conversation_id for n, conversation_id in enumerate(conversation_ids)}
    rows: list[Row] = []
    if names:
        listed = ", ".join(f":{name}" for name in names)
        rows = list((yield f"SELECT * FROM passes WHERE conversation_id IN ({listed})", names))  # noqa: S608 - names of ours
    return [as_issued_pass(row) for row in rows]


_TAKE_TURN: Final = f"""
INSERT INTO lookups (key, running_until, paused_until) VALUES (:key, :until, 0)
ON CONFLICT (key) DO UPDATE SET running_until = excluded.running_until
WHERE (lookups.running_until <= :now OR lookups.running_until > :now + {LOOKUP_SECONDS + AHEAD_SECONDS})
AND (lookups.paused_until <= :now OR lookups.paused_until > :now + {PAUSE_SECONDS + AHEAD_SECONDS})
RETURNING key"""  # noqa: S608

_RUNNING: Final = f"""
SELECT 1 FROM lookups
WHERE key = :key AND running_until > :now AND running_until <= :now + {LOOKUP_SECONDS + AHEAD_SECONDS}"""  # noqa: S608

# First the passes of the user, because voicepass may return one of them again; then those of unknown state. The rest
# of the order is random, so that voicepass asks about each in time.
_ORDER: Final = """
ORDER BY CASE WHEN token_issuer = :token_issuer AND user_id = :user_id THEN 0 ELSE 1 END,
         CASE WHEN opened_at IS NULL AND unopened_at IS NULL THEN 0 ELSE 1 END, random() LIMIT {most}"""

_COUNTING: Final = {
    Counted.CONVERSATIONS: f"""
SELECT * FROM passes WHERE {{scope}} AND {IS_OPEN} AND conversation_id IS NOT NULL AND reserved_at > :open_since"""  # noqa: S608
    + _ORDER,
    Counted.SECONDS: """
SELECT * FROM passes WHERE {scope} AND settled_at IS NULL AND conversation_id IS NOT NULL
AND reserved_at > :since AND seconds > 0"""
    + _ORDER,
}

_IN_FLIGHT: Final = """
SELECT 1 FROM passes WHERE token_issuer = :token_issuer AND user_id = :user_id
AND granted_at IS NULL AND reserved_at > :since AND reserved_at <= :latest LIMIT 1"""

_UNOPEN: Final = """
UPDATE passes SET unopened_at = :now
WHERE conversation_id = :conversation_id AND settled_at IS NULL AND opened_at IS NULL"""

_OPEN: Final = """
UPDATE passes SET opened_at = :opened_at, sealed = NULL
WHERE conversation_id = :conversation_id AND settled_at IS NULL AND opened_at IS NULL"""

_REOPEN: Final = """
UPDATE passes SET opened_at = :opened_at, settled_at = NULL, settled_by = NULL, seconds = reserved_seconds
WHERE conversation_id = :conversation_id AND settled_by = 'expiry' RETURNING *"""

_END: Final = """
UPDATE passes SET opened_at = coalesce(opened_at, granted_at), ended_at = :now, seconds = :seconds, sealed = NULL
WHERE conversation_id = :conversation_id AND settled_at IS NULL"""

# By alias too: two aliases may name two branches of one agent.
_UNOPENED: Final = """
SELECT pass_id, sealed FROM passes
WHERE token_issuer = :token_issuer AND user_id = :user_id AND transport = :transport
AND agent_id = :agent_id AND agent_alias = :agent_alias
AND reserved_at > :since AND unopened_at > :known AND unopened_at <= :latest
AND settled_at IS NULL AND sealed IS NOT NULL
ORDER BY reserved_at DESC"""

_LISTED: Final = """
SELECT (SELECT listed_at FROM listings WHERE agent_id = :agent_id) AS listed_at,
       (SELECT listed_until FROM listings WHERE agent_id = :agent_id) AS listed_until"""

_TO_LIST: Final = """
SELECT (SELECT min(reserved_at) FROM
        (SELECT reserved_at FROM passes WHERE transport <> '' AND settled_at IS NULL AND conversation_id IS NOT NULL
         AND reserved_at > :oldest AND opened_at IS NULL AND agent_id = :agent_id
         ORDER BY reserved_at LIMIT 1) AS unseen) AS unseen_since,
       (SELECT min(opened_at) FROM passes WHERE transport <> '' AND settled_at IS NULL AND conversation_id IS NOT NULL
        AND reserved_at > :reserved AND opened_at > :recent AND agent_id = :agent_id) AS open_since"""

_BEGIN_LISTING: Final = """
INSERT INTO listings (agent_id, listed_until, listed_at) VALUES (:agent_id, 0, :now)
ON CONFLICT (agent_id) DO UPDATE SET listed_at = excluded.listed_at,
    listed_until = CASE WHEN listings.listed_until > :now THEN 0 ELSE listings.listed_until END"""

_NEVER_OPENED: Final = """
SELECT * FROM passes WHERE transport <> '' AND settled_at IS NULL AND conversation_id IS NOT NULL
AND opened_at IS NULL AND agent_id = :agent_id
AND reserved_at <= (SELECT listed_until FROM listings WHERE agent_id = :agent_id) - :seconds
AND granted_at <= (SELECT listed_until FROM listings WHERE agent_id = :agent_id) - :seconds
ORDER BY reserved_at LIMIT :most"""
