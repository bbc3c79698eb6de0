"""Limits as questions: how much is used in a window, and when less will be; asked in the transaction that counts.

Passes and conversations are counted no further than their limit, a user's minutes pass by pass. Minutes of an agent or
of all are kept added up by the quarter of an hour, so that a question takes no longer the more there was.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final

from voicepass.errors import LimitReached, QuotaExceeded, RateLimited, TooManyConversations, UserBlocked
from voicepass.ledger.dialogue import SHARE, Dialogue, Row
from voicepass.model import Counted, Limit, Scope, Usage

UNUSED_SECONDS: Final = 900
"""A pass can be used for 15 minutes; a reservation that a crash left behind lapses then too."""

RELEASED_SECONDS: Final = UNUSED_SECONDS + 30.0
"""A pass that nobody opened is released at this age; the 30 seconds are for clocks that differ."""

IN_FLIGHT_SECONDS: Final = 10.0
"""A reservation without a pass is in flight for so long; an older one was left behind by a crash."""

MAY_END_SECONDS: Final = 3.0
"""When to try again while a conversation is open: its user can end it at any moment."""

QUARTER_SECONDS: Final = UNUSED_SECONDS
"""Added up once it is over for as long: by then every reservation in it was granted or has lapsed, so that only a
settlement still moves its sum."""

# The terms that always hold name the index (see the schema, step 3).
SCOPES: Final = {
    Scope.USER: "token_issuer = :token_issuer AND user_id = :user_id",
    Scope.AGENT: "agent_alias = :agent_alias AND agent_alias <> ''",
    Scope.ALL: "transport <> ''",
}
_QUESTIONS: Final = {
    Counted.PASSES: """
        SELECT count(*) AS used, min(reserved_at) AS oldest FROM
        (SELECT reserved_at FROM passes WHERE {scope} AND reserved_at > :since_{n}
         ORDER BY reserved_at DESC LIMIT :most_{n}) AS counted""",
    Counted.REQUESTS: """
        SELECT count(*) AS used, min(reserved_at) AS oldest FROM
        (SELECT reserved_at FROM passes WHERE {scope} AND reserved_at > :since_{n}
         UNION ALL SELECT reserved_at FROM failed_requests WHERE {scope} AND reserved_at > :since_{n}
         ORDER BY reserved_at DESC LIMIT :most_{n}) AS counted""",
    Counted.CONVERSATIONS: """
        SELECT count(*) AS used, min(lapses_at) AS oldest FROM
        (SELECT lapses_at FROM passes WHERE {scope} AND settled_at IS NULL AND lapses_at > :now
         ORDER BY lapses_at DESC LIMIT :most_{n}) AS counted""",
    Counted.SECONDS: """
        SELECT coalesce(sum(seconds), 0) AS used, min(reserved_at) AS oldest FROM passes
        WHERE {scope} AND reserved_at > :since_{n} AND seconds > 0""",
}
_LAPSED: Final = "EXISTS (SELECT 1 FROM passes WHERE granted_at IS NULL AND lapses_at <= :now) AS has_lapsed"
_LAPSE: Final = "DELETE FROM passes WHERE granted_at IS NULL AND lapses_at <= :now"
_OF_PASSES: Final = {Counted.PASSES, Counted.REQUESTS}
_BLOCKED: Final = """
, EXISTS (SELECT 1 FROM blocks WHERE kind = 'everyone' OR (kind = 'agent' AND key = :agent_alias)
        OR (kind = 'user' AND key = :user_id AND token_issuer IN ('', :token_issuer))) AS is_blocked"""

# By the quarter where it is added up, by the pass at both ends of the window.
_MINUTES: Final = """
SELECT (SELECT coalesce(sum(seconds), 0) FROM quarters
        WHERE scope = :key AND quarter >= :first AND quarter < :end)
     + (SELECT coalesce(sum(seconds), 0) FROM passes
        WHERE {scope} AND reserved_at > :since AND reserved_at < :first_at AND seconds > 0)
     + (SELECT coalesce(sum(seconds), 0) FROM passes
        WHERE {scope} AND reserved_at >= :end_at AND seconds > 0) AS used"""
_KNOWN: Final = "SELECT min(quarter) AS first, max(quarter) AS last FROM quarters WHERE scope = :key"
_ADD_UP: Final = """
INSERT INTO quarters (scope, quarter, seconds)
WITH RECURSIVE missing (quarter) AS
(SELECT CAST(:first AS BIGINT) UNION ALL SELECT quarter + 1 FROM missing WHERE quarter + 1 < :end)
SELECT :key, quarter, (SELECT coalesce(sum(seconds), 0) FROM passes WHERE {scope}
    AND reserved_at >= CAST(quarter AS DOUBLE PRECISION) * :length
    AND reserved_at < CAST(quarter + 1 AS DOUBLE PRECISION) * :length) FROM missing"""
_MOVE: Final = """
UPDATE quarters SET seconds = seconds + :more WHERE scope IN (:agent, 'all') AND quarter = :quarter"""
# Asked only when nothing is left: from which pass on, or in which quarter, the limit is reached, newest first; and how
# much was used after it. When that pass leaves the window, a new try can succeed.
_REACHED: Final = """
SELECT max(CASE WHEN since_then >= :most THEN place END) AS place,
       coalesce(max(CASE WHEN since_then < :most THEN since_then END), 0) AS newer
FROM (SELECT place, sum(seconds) OVER (ORDER BY place DESC) AS since_then FROM ({counted}) AS counted) AS summed"""
_REACHED_BY_PASS: Final = _REACHED.format(
    counted="""SELECT reserved_at AS place, seconds FROM passes
    WHERE {scope} AND reserved_at > :since AND reserved_at < :until AND seconds > 0"""
)
_REACHED_BY_QUARTER: Final = _REACHED.format(
    counted="""SELECT quarter AS place, seconds FROM quarters
    WHERE scope = :key AND quarter >= :first AND quarter < :end AND seconds > 0"""
)
# A conversation that is open can end at any moment, and a pass that is not granted yet can fail. A pass that nobody has
# opened is released when it is too old.
_FREE_AT: Final = """
SELECT min(CASE WHEN opened_at IS NOT NULL OR (granted_at IS NULL AND reserved_at > :in_flight) THEN :may_end
           WHEN unopened_at IS NOT NULL THEN granted_at + :released ELSE lapses_at END) AS free_at
FROM passes WHERE {scope} AND settled_at IS NULL AND lapses_at > :now"""
_REFUSALS: Final = {
    Counted.PASSES: RateLimited,
    Counted.REQUESTS: RateLimited,
    Counted.CONVERSATIONS: TooManyConversations,
    Counted.SECONDS: QuotaExceeded,
}


def counted_in(scope: Scope, whose: Mapping[str, Any]) -> str:
    """Name what a limit of this scope counts together for the user and agent in `whose`: no two share a name."""
    match scope:
        case Scope.USER:
            token_issuer = whose["token_issuer"]
            return f"user {len(token_issuer)} {token_issuer} {whose['user_id']}"
        case Scope.AGENT:
            return f"agent {whose['agent_alias']}"
        case Scope.ALL:
            return "all"


def room(whose: Mapping[str, Any], limits: Sequence[Limit], now: float) -> Dialogue[int | None]:
    """Return how many seconds the limits leave for the user and agent in `whose`; None where none counts seconds.

    Raises UserBlocked, or the LimitReached of the limit that leaves no room for longest. A limit of passes comes before
    the others: what the others count may change when somebody asks ElevenLabs. No other transaction counts in those
    scopes at the same time.
    """
    answers = yield from usage(whose, limits, now, is_for_a_pass=True)
    if reached := [answer for answer in answers if answer.left == 0]:
        refusals = []
        for answer in [answer for answer in reached if answer.limit.counted in _OF_PASSES] or reached:
            refusal = yield from _limit_reached(answer, whose, now)
            refusals.append(refusal)
        raise max(refusals, key=lambda refusal: refusal.resets_at)
    return min((answer.left for answer in answers if answer.limit.counted is Counted.SECONDS), default=None)


def usage(
    whose: Mapping[str, Any], limits: Sequence[Limit], now: float, *, is_for_a_pass: bool = False
) -> Dialogue[list[Usage]]:
    """Answer each limit's question for the user and agent in `whose`: one statement, but for what is added up.

    Raises UserBlocked for who may have no pass, where it is for one.
    """
    added_up = [limit for limit in limits if limit.counted is Counted.SECONDS and limit.scope is not Scope.USER]
    counted = tuple(limit for limit in limits if limit not in added_up)
    question = _question(counted, is_for_a_pass)
    parameters = {**whose, "now": now}
    for n, limit in enumerate(counted):
        parameters[f"since_{n}"], parameters[f"most_{n}"] = now - limit.window_seconds, limit.most
    (row,) = yield question, parameters
    if is_for_a_pass and row["is_blocked"]:
        raise UserBlocked
    if row["has_lapsed"]:
        yield _LAPSE, {"now": now}
        (row,) = yield question, parameters
    answers: list[Usage] = []
    for n, limit in enumerate(counted):
        used, oldest = int(row[f"used_{n}"]), row[f"oldest_{n}"]
        if limit.counted is Counted.SECONDS and used >= limit.most:
            oldest = yield from _reached(limit, _window(whose, limit, now))
        if oldest is not None and limit.counted is not Counted.CONVERSATIONS:
            oldest += limit.window_seconds
        answers.append(Usage(limit=limit, used=used, resets_at=oldest))
    for limit in added_up:
        answer = yield from _minutes(limit, _window(whose, limit, now))
        answers.append(answer)
    return answers


@cache
def _question(counted: tuple[Limit, ...], is_for_a_pass: bool) -> str:  # noqa: FBT001 - of the one call above
    """Word one statement that asks all: a round trip for each would be most of what a reservation takes."""
    asked = "".join(f", q{n}.used AS used_{n}, q{n}.oldest AS oldest_{n}" for n in range(len(counted)))
    questions = [
        f"({_QUESTIONS[limit.counted].format(scope=SCOPES[limit.scope], n=n)}) AS q{n}"
        for n, limit in enumerate(counted)
    ]
    origin = f" FROM {', '.join(questions)}" if questions else ""
    return f"SELECT {_LAPSED}{_BLOCKED if is_for_a_pass else ''}{asked}{origin}"


def _window(whose: Mapping[str, Any], limit: Limit, now: float) -> dict[str, Any]:
    return {**whose, "now": now, "since": now - limit.window_seconds, "most": limit.most}


def _minutes(limit: Limit, parameters: dict[str, Any]) -> Dialogue[Usage]:
    parameters |= yield from _added_up(counted_in(limit.scope, parameters), SCOPES[limit.scope], parameters)
    (row,) = yield _MINUTES.format(scope=SCOPES[limit.scope]), parameters
    used, place = int(row["used"]), None
    if used >= limit.most:
        place = yield from _reached(limit, parameters)
    return Usage(limit=limit, used=used, resets_at=None if place is None else place + limit.window_seconds)


def _added_up(key: str, scope: str, parameters: Mapping[str, Any]) -> Dialogue[dict[str, Any]]:
    """Add up the quarters of the window that are not yet; tell which they are: from `first`, before `end`."""
    first = math.floor(parameters["since"] / QUARTER_SECONDS) + 1  # a pass at `since` itself is out of the window
    over = math.floor((parameters["now"] - UNUSED_SECONDS) / QUARTER_SECONDS)
    # A clock that was ahead for a while has added up what was yet to come.
    yield "DELETE FROM quarters WHERE scope = :key AND quarter >= :over", {"key": key, "over": over}
    (known,) = yield _KNOWN, {"key": key}
    nothing = known["first"] is None
    for begin, stop in [(first, over)] if nothing else [(first, known["first"]), (known["last"] + 1, over)]:
        if begin < stop:
            missing = {"key": key, "first": begin, "end": stop, "length": QUARTER_SECONDS}
            yield _ADD_UP.format(scope=scope), {**parameters, **missing}
    end = max(first, over)
    return {
        "key": key,
        "first": first,
        "end": end,
        "first_at": float(first * QUARTER_SECONDS),
        "end_at": float(end * QUARTER_SECONDS),
    }


def _reached(limit: Limit, parameters: Mapping[str, Any]) -> Dialogue[float | None]:
    """Return when the pass was reserved that, with all after it, reaches the limit; None if none does any more."""
    passes, most = _REACHED_BY_PASS.format(scope=SCOPES[limit.scope]), limit.most
    since, until = parameters["since"], math.inf
    if "end_at" in parameters:
        (row,) = yield passes, {**parameters, "since": _just_before(parameters["end_at"]), "until": until}
        if row["place"] is not None:
            return float(row["place"])
        most -= int(row["newer"])
        (row,) = yield _REACHED_BY_QUARTER, {**parameters, "most": most}
        most, until = most - int(row["newer"]), parameters["first_at"]
        if row["place"] is not None:
            since, until = _just_before(row["place"] * QUARTER_SECONDS), (row["place"] + 1) * QUARTER_SECONDS
    (row,) = yield passes, {**parameters, "since": since, "until": float(until), "most": most}
    return None if row["place"] is None else float(row["place"])


def _just_before(instant: float) -> float:
    return math.nextafter(instant, 0.0)


def move_sums(before: Row, seconds: int) -> Dialogue[None]:
    """Keep what is added up equal to its passes, where a pass comes to count `seconds`. Asked after `hold`."""
    agent, quarter = counted_in(Scope.AGENT, before), math.floor(before["reserved_at"] / QUARTER_SECONDS)
    yield _MOVE, {"agent": agent, "quarter": quarter, "more": seconds - before["seconds"]}


def hold(row: Row) -> Dialogue[None]:
    """Wait for whoever adds up where this pass counts; it and what follows here cannot miss each other."""
    yield SHARE, {"locks": [counted_in(scope, row) for scope in (Scope.AGENT, Scope.ALL)]}


def _limit_reached(answer: Usage, whose: Mapping[str, Any], now: float) -> Dialogue[LimitReached]:
    limit = answer.limit
    resets_at = answer.resets_at or now + limit.window_seconds
    if limit.counted is Counted.CONVERSATIONS:
        instants = {
            "now": now,
            "may_end": now + MAY_END_SECONDS,
            "released": RELEASED_SECONDS,
            "in_flight": now - IN_FLIGHT_SECONDS,
        }
        (row,) = yield _FREE_AT.format(scope=SCOPES[limit.scope]), {**whose, **instants}
        if row["free_at"] is not None:
            resets_at = max(now, row["free_at"])
    return _REFUSALS[limit.counted](
        operator_note=f"the limit {limit.name} is reached",
        retry_after_seconds=max(1, math.ceil(resets_at - now)),
        resets_at=resets_at,
        limit_name=limit.name,
        most=limit.most,
        window_seconds=limit.window_seconds,
    )
