"""Limits: one statement checks them all. Only if one of them is nearly reached, voicepass counts it exactly.

A user's passes are counted row by row. For an agent or for all, the first statement adds up whole slots of time, which
together are a little longer than the window. The exact count uses shorter slots, and rows at the edge of the window.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from voicepass.errors import LimitReached, QuotaExceeded, RateLimited, TooManyConversations, UserBlocked
from voicepass.ledger.dialogue import LOCK_SCOPES, Dialogue, Row, read_statements
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
_REFUSALS: Final[dict[Counted, type[LimitReached]]] = {
    Counted.PASSES: RateLimited,
    Counted.REQUESTS: RateLimited,
    Counted.CONVERSATIONS: TooManyConversations,
    Counted.SECONDS: QuotaExceeded,
}
_AMOUNTS: Final = {Counted.PASSES: "passes", Counted.REQUESTS: "passes + failed", Counted.SECONDS: "seconds"}
_NO_END: Final = float(2**53)
_BY_ROW: Final = 0  # in place of the length of a slot
_Piece = tuple[int, float, float]  # the length of its slots, its begin and its end

SQL: Final = read_statements("limits")


@dataclass(frozen=True, slots=True)
class Question:
    """What stays the same from pass to pass: the statement that answers all limits, by the names of its columns."""

    columns: Mapping[str, Limit]
    shared_scopes: tuple[Scope, ...]
    statement: str


def prepare_question(limits: Sequence[Limit]) -> Question:
    """Prepare the question whether these limits have room."""
    columns = {f"used_{n}": limit for n, limit in enumerate(limits)}
    of_user = {name: limit for name, limit in columns.items() if limit.scope is Scope.USER}
    answers = [SQL["has_lapsed"], SQL["is_blocked"]]
    answers += [f"({_in_slots(limit)}) AS {name}" for name, limit in columns.items() if name not in of_user]
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
        statement=f"SELECT {', '.join(answers)} {origin}",
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


def find_room(now: float, question: Question, whose: Row, seconds: int) -> Dialogue[int | None]:
    """Return how many of the `seconds` the limits leave for a pass; None if a lapsed reservation must be deleted first.

    Raises UserBlocked, or the LimitReached of the limit that leaves no room for longest. Limits of passes come first:
    a lookup at ElevenLabs can change what the others count. No other transaction counts in these scopes meanwhile.
    """
    parameters = _parameters(now, whose)
    for window_seconds in map(_window_seconds, question.columns.values()):
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
    return (yield from _find_exact_room(now, near, whose, seconds))


def _find_exact_room(now: float, limits: Sequence[Limit], whose: Row, seconds: int) -> Dialogue[int]:
    answers = yield from count_each(now, limits, whose)
    if reached := [answer for answer in answers if answer.left == 0]:
        of_passes = [answer for answer in reached if answer.limit.counted in {Counted.PASSES, Counted.REQUESTS}]
        refusals: list[LimitReached] = []
        for answer in of_passes or reached:
            refusals.append((yield from _build_refusal(now, answer, whose)))  # noqa: PERF401
        raise max(refusals, key=lambda refusal: refusal.resets_at)
    return min([seconds, *(answer.left for answer in answers if answer.limit.counted is Counted.SECONDS)])


def count_each(now: float, limits: Sequence[Limit], whose: Row) -> Dialogue[list[Usage]]:
    """Count exactly what the user and the agent in `whose` have used of each limit."""
    answers: list[Usage] = []
    for limit in limits:
        is_extensible = limit.scope is Scope.USER and limit.counted is Counted.SECONDS
        extensions = (yield SQL["extensions_of_user"], {**whose, "now": now}) if is_extensible else []
        answers.append((yield from _count_extended(now, limit, whose, extensions)))
    return answers


def _count_extended(now: float, limit: Limit, whose: Row, extensions: Sequence[Row]) -> Dialogue[Usage]:
    """Count what is used of a limit that extensions raise. `extensions` begins with the one that ends first.

    `resets_at` takes into account that an extension may end before a new try can succeed.
    """
    most = limit.most + 60 * sum(extension["minutes"] for extension in extensions)
    answer = yield from count(now, replace(limit, most=most), whose)
    resets_at = answer.resets_at
    for extension in extensions:
        if answer.left > 0 or resets_at is None or resets_at < extension["ends_at"]:
            break
        most -= 60 * extension["minutes"]
        resets_at = (yield from count(now, replace(limit, most=most), whose)).resets_at
    return replace(answer, resets_at=resets_at)


def count(now: float, limit: Limit, whose: Row) -> Dialogue[Usage]:
    """Count exactly what the user and the agent in `whose` have used of a limit."""
    parameters = {**_parameters(now, whose), "key": name_scope(limit.scope, whose)}
    if limit.counted is Counted.CONVERSATIONS:
        (row,) = yield SQL["exactly_open_of_user" if limit.scope is Scope.USER else "exactly_open"], parameters
        return Usage(limit=limit, used=int(row["used"]), resets_at=row["next_lapse_at"])
    pieces = _list_pieces(now, limit)
    row = yield from _add_up(limit, pieces, parameters, limit.most)
    used, since, most = int(row["used"]), row["oldest"], limit.most
    # Since which instant is the limit full? Find its slot, then the shorter slot within that one, and at last its row.
    while row["reached"] is not None:
        since = row["reached"]
        length = next(length for length, begin, end in pieces if begin <= since < end)
        if length == _BY_ROW:
            break
        most -= int(row["newer"])
        pieces = [(_find_finer(length, now - since), since, since + length)]
        row = yield from _add_up(limit, pieces, parameters, most)
    return Usage(limit=limit, used=used, resets_at=None if since is None else float(since) + limit.window_seconds)


def _list_pieces(now: float, limit: Limit) -> list[_Piece]:
    """Cut the limit's window into pieces: by row at its edge, then in slots that are longer the newer they are."""
    pieces: list[_Piece] = []
    begin, length = math.nextafter(now - limit.window_seconds, math.inf), _BY_ROW
    if limit.scope is not Scope.USER:
        for coarser in LENGTHS:
            if is_kept(coarser, limit.window_seconds):
                end = float(math.ceil(begin / coarser) * coarser)
                pieces.append((length, begin, end))
                begin, length = end, coarser
    return [*pieces, (length, begin, _NO_END)]


def _find_finer(length: int, age_seconds: float) -> int:
    """Return the length of the slots into which a slot of this age divides."""
    kept = [finer for finer in LENGTHS if finer < length and is_kept(finer, age_seconds)]
    return max(kept, default=_BY_ROW)


def _add_up(limit: Limit, pieces: Sequence[_Piece], whose: Row, most: int) -> Dialogue[Row]:
    """Add up what the limit counts in these pieces of time, and find the place where there are `most` since then."""
    texts: list[str] = []
    parameters = {**whose, "most": most}
    for n, (length, begin, end) in enumerate(pieces):
        if length == _BY_ROW:
            amount = "seconds" if limit.counted is Counted.SECONDS else "1"
            tables = ["passes", "failed_requests"] if limit.counted is Counted.REQUESTS else ["passes"]
            texts += [SQL["rows"].format(table=each, amount=amount, scope=SCOPES[limit.scope], n=n) for each in tables]
            parameters |= {f"begin_{n}": begin, f"end_{n}": end}
        else:
            texts.append(SQL["slots"].format(amount=_AMOUNTS[limit.counted], n=n))
            parameters |= {f"length_{n}": length, f"first_{n}": int(begin // length), f"last_{n}": int(end // length)}
    (row,) = yield SQL["add_up"].format(pieces=" UNION ALL ".join(texts)), parameters
    return row


def _build_refusal(now: float, answer: Usage, whose: Row) -> Dialogue[LimitReached]:
    limit = answer.limit
    resets_at = answer.resets_at or now + limit.window_seconds
    if limit.counted is Counted.CONVERSATIONS:
        passes = "passes" if limit.scope is Scope.USER else SQL["newest_unsettled"]
        parameters = _parameters(now, whose)
        parameters |= {"in_flight_since": now - IN_FLIGHT_SECONDS, "may_end_at": now + MAY_END_SECONDS}
        parameters |= {"unused_seconds": UNUSED_SECONDS, "released_seconds": RELEASED_SECONDS}
        (row,) = yield SQL["free_at"].format(passes=passes, scope=SCOPES[limit.scope]), parameters
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


def _parameters(now: float, whose: Row) -> dict[str, Any]:
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
    return max(length for length in LENGTHS if length * 12 <= window_seconds)


def _of_user(limit: Limit) -> str:
    return SQL[f"{limit.counted}_of_user"].format(window=limit.window_seconds)


def _in_slots(limit: Limit) -> str:
    scope = "'all'" if limit.scope is Scope.ALL else ":agent"
    if limit.counted is Counted.CONVERSATIONS:
        return SQL["sum_of_open"].format(scope=scope)
    length, amount = _slot_length(limit.window_seconds), _AMOUNTS[limit.counted]
    return SQL["sum_of_slots"].format(amount=amount, scope=scope, length=length, window=limit.window_seconds)
