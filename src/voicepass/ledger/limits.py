"""Limits: one statement answers while all of them have room. Only near a limit, voicepass counts each exactly.

A user's passes are counted row by row. For an agent or for all, the first answer adds up whole slots of time. They hold
no less than the window. The exact count adds up smaller slots, and counts by row at the edge of the window.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from voicepass.errors import LimitReached, QuotaExceeded, RateLimited, TooManyConversations, UserBlocked
from voicepass.ledger.dialogue import LOCK_SCOPES, Dialogue, Row
from voicepass.ledger.extensions import count_extended
from voicepass.ledger.sums import LENGTHS, OPEN_SECONDS, is_kept
from voicepass.model import Counted, Limit, Scope, Usage, hash_user_id

UNUSED_SECONDS: Final = 900
"""A pass can be opened for 15 minutes. A reservation that a crash left behind lapses after this time, too."""
RELEASED_SECONDS: Final = UNUSED_SECONDS + 30.0
"""A pass that nobody opened is released at this age. The 30 seconds are for clocks that differ."""
IN_FLIGHT_SECONDS: Final = 10.0
"""An older reservation without a grant is not in flight. A crash left it behind."""
MAY_END_SECONDS: Final = 3.0
"""When to retry while a conversation is open: its user can end it at any moment."""

SCOPES: Final = {  # the condition on `transport` selects an index (see the schema)
    Scope.USER: "token_issuer = :token_issuer AND user_id = :user_id",
    Scope.AGENT: "transport <> '' AND agent_alias = :agent_alias",
    Scope.ALL: "transport <> ''",
}
IS_OPEN: Final = "settled_at IS NULL AND ended_at IS NULL AND lapses_at > :now"
_REFUSALS: Final = {
    Counted.PASSES: RateLimited,
    Counted.REQUESTS: RateLimited,
    Counted.CONVERSATIONS: TooManyConversations,
    Counted.SECONDS: QuotaExceeded,
}
_NO_END: Final = float(2**53)
_BY_ROW: Final = 0  # in place of the length of a slot


@dataclass(frozen=True, slots=True)
class Question:
    """What stays the same from pass to pass: the statement that answers all limits, by the names of its columns."""

    columns: Mapping[str, Limit]
    shared_scopes: tuple[Scope, ...]
    statement: str
    windows: frozenset[int]


def prepare_question(limits: Sequence[Limit]) -> Question:
    """Prepare the question whether these limits have room."""
    columns = {f"used_{n}": limit for n, limit in enumerate(limits)}
    of_user = {name: limit for name, limit in columns.items() if limit.scope is Scope.USER}
    answers = [f"({_in_slots(limit)}) AS {name}" for name, limit in columns.items() if name not in of_user]
    origin = ""
    if of_user:  # one scan of the user's passes answers all
        counts = ", ".join(f"{_of_user(limit)} AS {name}" for name, limit in of_user.items())
        longest = max(map(_window_seconds, of_user.values()))
        whose = f"{SCOPES[Scope.USER]} AND reserved_at > :since_{longest}"
        answers.append("of_user.*")
        origin = f"FROM (SELECT {counts} FROM passes WHERE {whose}) AS of_user"  # noqa: S608 - texts of this module
    return Question(
        columns=columns,
        shared_scopes=tuple(sorted({limit.scope for limit in limits} - {Scope.USER})),
        statement=f"SELECT {', '.join([HAS_LAPSED, _IS_BLOCKED, *answers])} {origin}",
        windows=frozenset(map(_window_seconds, limits)),
    )


def name_scope(scope: Scope, whose: Mapping[str, Any]) -> str:
    """Name what a limit of this scope counts together for the user and the agent in `whose`. No two share a name."""
    match scope:
        case Scope.USER:
            token_issuer = whose["token_issuer"]
            return f"user {len(token_issuer)} {token_issuer} {whose['user_id']}"
        case Scope.AGENT:
            return f"agent {whose['agent_alias']}"
        case Scope.ALL:
            return "all"


def find_room(question: Question, whose: Row, seconds: int, now: float) -> Dialogue[int | None]:
    """Return how many of the `seconds` the limits leave for a pass; None if a lapsed reservation must be deleted first.

    Raises UserBlocked, or the LimitReached of the limit that leaves no room for longest. Limits of passes come first:
    a lookup at ElevenLabs can change what the others count. No other transaction counts in these scopes meanwhile.
    """
    parameters = _parameters(whose, now)
    for window_seconds in question.windows:
        parameters[f"since_{window_seconds}"] = now - window_seconds
        parameters[f"slot_{window_seconds}"] = math.floor((now - window_seconds) / _slot_length(window_seconds))
    if question.shared_scopes:
        yield LOCK_SCOPES, {"keys": [name_scope(scope, whose) for scope in question.shared_scopes]}
    (row,) = yield question.statement, parameters
    if row["is_blocked"]:
        raise UserBlocked
    if row["has_lapsed"]:
        return None
    amounts = {Counted.SECONDS: max(1, seconds)}
    near = [limit for name, limit in question.columns.items() if row[name] + amounts.get(limit.counted, 1) > limit.most]
    return (yield from _find_exact_room(near, whose, seconds, now)) if near else seconds


def _find_exact_room(limits: Sequence[Limit], whose: Row, seconds: int, now: float) -> Dialogue[int]:
    answers = yield from count_each(limits, whose, now)
    if reached := [answer for answer in answers if answer.left == 0]:
        of_passes = [answer for answer in reached if answer.limit.counted in {Counted.PASSES, Counted.REQUESTS}]
        refusals: list[LimitReached] = []
        for answer in of_passes or reached:
            refusals.append((yield from _refuse(answer, whose, now)))  # noqa: PERF401
        raise max(refusals, key=lambda refusal: refusal.resets_at)
    return min([seconds, *(answer.left for answer in answers if answer.limit.counted is Counted.SECONDS)])


def count_each(limits: Sequence[Limit], whose: Row, now: float) -> Dialogue[list[Usage]]:
    """Count exactly what the user and the agent in `whose` have used of each limit."""
    answers: list[Usage] = []
    for limit in limits:
        answers.append((yield from count_extended(count, limit, whose, now)))  # noqa: PERF401 - a generator cannot be in a comprehension
    return answers


def count(limit: Limit, whose: Row, now: float) -> Dialogue[Usage]:
    """Count exactly what the user and the agent in `whose` have used of a limit."""
    parameters = {**_parameters(whose, now), "key": name_scope(limit.scope, whose)}
    if limit.counted is Counted.CONVERSATIONS:
        (row,) = yield _OPEN_OF_USER if limit.scope is Scope.USER else _OPEN_IN_SLOTS, parameters
        return Usage(limit=limit, used=int(row["used"]), resets_at=row["oldest"])
    used, most, oldest = 0, limit.most, None
    length, place = _BY_ROW, None  # where, counted from now back, the limit is reached
    for piece_length, begin, end in _list_pieces(limit, now):
        row = yield from _add_up(limit, piece_length, {**parameters, "begin": begin, "end": end, "most": most})
        used += int(row["used"])
        oldest = oldest if row["oldest"] is None else row["oldest"]
        if place is None:
            most -= int(row["newer"])
            length, place = piece_length, row["reached"]
    while place is not None and length != _BY_ROW:  # look into the slot, until it is a pass
        begin, end = place, place + length
        length = _find_finer(length, now - begin)
        row = yield from _add_up(limit, length, {**parameters, "begin": begin, "end": end, "most": most})
        most -= int(row["newer"])
        place = row["reached"]
    since = oldest if place is None else place
    return Usage(limit=limit, used=used, resets_at=None if since is None else float(since) + limit.window_seconds)


def _list_pieces(limit: Limit, now: float) -> list[tuple[int, float, float]]:
    """Cut the limit's window into pieces, the newest first: (length of its slots, begin, end)."""
    pieces: list[tuple[int, float, float]] = []
    begin, length = math.nextafter(now - limit.window_seconds, math.inf), _BY_ROW
    if limit.scope is not Scope.USER:
        for coarser in LENGTHS:
            if is_kept(coarser, limit.window_seconds):
                end = float(math.ceil(begin / coarser) * coarser)
                pieces.append((length, begin, end))
                begin, length = end, coarser
    pieces.append((length, begin, _NO_END))
    return pieces[::-1]


def _find_finer(length: int, age_seconds: float) -> int:
    """Return the length of the slots into which a slot of this age divides."""
    kept = [finer for finer in LENGTHS if finer < length and is_kept(finer, age_seconds)]
    return max(kept, default=_BY_ROW)


def _add_up(limit: Limit, length: int, parameters: dict[str, Any]) -> Dialogue[Row]:
    """Add up what the limit counts from `begin` until before `end`."""
    pieces = _ROWS[limit.counted].format(scope=SCOPES[limit.scope])
    if length != _BY_ROW:
        pieces = _SLOTS.format(amount=_AMOUNTS[limit.counted])
        slots = {"length": length, "first": parameters["begin"] // length, "last": parameters["end"] // length}
        parameters |= {name: int(number) for name, number in slots.items()}
    (row,) = yield _ADD_UP.format(pieces=pieces), parameters
    return row


def _refuse(answer: Usage, whose: Row, now: float) -> Dialogue[LimitReached]:
    limit = answer.limit
    resets_at = answer.resets_at or now + limit.window_seconds
    if limit.counted is Counted.CONVERSATIONS:
        origin = "passes" if limit.scope is Scope.USER else _NEWEST
        (row,) = yield _FREE_AT.format(origin=origin, scope=SCOPES[limit.scope]), _parameters(whose, now)
        if row["free_at"] is not None:
            resets_at = max(now, row["free_at"])
    return _REFUSALS[limit.counted](
        operator_note=f"the limit {limit.name} is reached",
        retry_after_seconds=max(1, math.ceil(resets_at - now)),
        resets_at=resets_at,
        limit_name=limit.name,
        most=limit.most,
        window_seconds=limit.window_seconds,
        plan=limit.plan,
    )


def _parameters(whose: Row, now: float) -> dict[str, Any]:
    return {
        **whose,
        "user_hash": hash_user_id(whose["user_id"]),
        "now": now,
        "minute": math.floor(now / 60),
        "lapsed": now - UNUSED_SECONDS,
        "open_since": now - OPEN_SECONDS,
        "agent": f"agent {whose['agent_alias']}",
    }


def _window_seconds(limit: Limit) -> int:
    return OPEN_SECONDS if limit.counted is Counted.CONVERSATIONS else limit.window_seconds


def _slot_length(window_seconds: int) -> int:
    """Return the longest slots of which at most one in twelve reaches beyond the window."""
    return max((length for length in LENGTHS if length * 12 <= window_seconds), default=LENGTHS[0])


def _of_user(limit: Limit) -> str:
    since = f"reserved_at > :since_{limit.window_seconds}"
    match limit.counted:
        case Counted.PASSES:
            return f"count(*) FILTER (WHERE {since})"
        case Counted.REQUESTS:
            failed = f"SELECT count(*) FROM failed_requests WHERE {SCOPES[Scope.USER]} AND {since}"  # noqa: S608
            return f"count(*) FILTER (WHERE {since}) + ({failed})"
        case Counted.CONVERSATIONS:
            return f"count(*) FILTER (WHERE {IS_OPEN})"
        case Counted.SECONDS:
            return f"coalesce(sum(seconds) FILTER (WHERE {since}), 0)"


def _in_slots(limit: Limit) -> str:
    scope = "'all'" if limit.scope is Scope.ALL else ":agent"
    if limit.counted is Counted.CONVERSATIONS:
        return f"SELECT coalesce(sum(open), 0) FROM sums WHERE scope = {scope} AND length = 60 AND slot > :minute"  # noqa: S608
    length, amount = _slot_length(limit.window_seconds), _AMOUNTS[limit.counted]
    slots = f"length = {length} AND slot >= :slot_{limit.window_seconds}"
    return f"SELECT coalesce(sum({amount}), 0) FROM sums WHERE scope = {scope} AND {slots}"  # noqa: S608


HAS_LAPSED: Final = "EXISTS (SELECT 1 FROM passes WHERE granted_at IS NULL AND reserved_at <= :lapsed) AS has_lapsed"

_IS_BLOCKED: Final = """
EXISTS (SELECT 1 FROM blocks WHERE kind = 'everyone' OR (kind = 'agent' AND key = :agent_alias)
        OR (kind = 'user' AND key IN (:user_id, :user_hash) AND token_issuer IN ('', :token_issuer))) AS is_blocked"""

_AMOUNTS: Final = {Counted.PASSES: "passes", Counted.REQUESTS: "passes + failed", Counted.SECONDS: "seconds"}

_SLOTS: Final = """
SELECT slot * length AS place, {amount} AS amount FROM sums
WHERE scope = :key AND length = :length AND slot >= :first AND slot < :last"""

_ROWS: Final = {
    Counted.PASSES: """
SELECT reserved_at AS place, 1 AS amount FROM passes
WHERE {scope} AND reserved_at >= :begin AND reserved_at < :end""",
    Counted.REQUESTS: """
SELECT reserved_at AS place, 1 AS amount FROM passes
WHERE {scope} AND reserved_at >= :begin AND reserved_at < :end
UNION ALL SELECT reserved_at, 1 FROM failed_requests
WHERE {scope} AND reserved_at >= :begin AND reserved_at < :end""",
    Counted.SECONDS: """
SELECT reserved_at AS place, seconds AS amount FROM passes
WHERE {scope} AND reserved_at >= :begin AND reserved_at < :end""",
}

# `reached`: the newest place from which on there are `most` or more. `newer`: what is after it.
_ADD_UP: Final = """
SELECT coalesce(sum(amount), 0) AS used, min(place) AS oldest,
       max(CASE WHEN so_far >= :most THEN place END) AS reached,
       coalesce(max(CASE WHEN so_far < :most THEN so_far END), 0) AS newer
FROM (SELECT place, amount, sum(amount) OVER (ORDER BY place DESC) AS so_far
      FROM ({pieces}) AS pieces WHERE amount > 0) AS added"""

_OPEN_OF_USER: Final = f"""
SELECT count(*) AS used, min(lapses_at) AS oldest FROM passes
WHERE {SCOPES[Scope.USER]} AND reserved_at > :open_since AND {IS_OPEN}"""  # noqa: S608

_OPEN_IN_SLOTS: Final = """
SELECT coalesce(sum(open), 0) AS used, min(CASE WHEN open > 0 THEN slot END) * 60.0 AS oldest FROM sums
WHERE scope = :key AND length = 60 AND slot > :minute"""

# An open conversation can end at any moment, and a request in flight can fail. Nobody can open an old pass any more.
_FREE_AT: Final = f"""
SELECT min(CASE WHEN opened_at IS NOT NULL OR (granted_at IS NULL AND reserved_at > :now - {IN_FLIGHT_SECONDS})
                THEN :now + {MAY_END_SECONDS}
           WHEN granted_at IS NULL THEN reserved_at + {UNUSED_SECONDS}
           WHEN unopened_at IS NOT NULL THEN granted_at + {RELEASED_SECONDS} ELSE lapses_at END) AS free_at
FROM {{origin}} WHERE {{scope}} AND reserved_at > :open_since AND {IS_OPEN}"""  # noqa: S608

_NEWEST: Final = """
(SELECT * FROM passes WHERE transport <> '' AND settled_at IS NULL ORDER BY reserved_at DESC LIMIT 1000) AS newest"""
