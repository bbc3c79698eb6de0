"""The ledger's rules, once for both engines: each is a dialogue of statements, and knows no driver.

A rule yields a statement with its parameters and is sent the rows; the engine runs the whole dialogue in one
transaction that no other can interleave with, at the instant `now`. What it raises rolls everything back.
"""

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, Final, TypeVar

from voicepass.errors import (
    BadAnswer,
    ConversationUnknown,
    LedgerUnavailable,
    LimitReached,
    QuotaExceeded,
    RateLimited,
    TooManyConversations,
    UserBlocked,
)
from voicepass.model import (
    Block,
    Counted,
    Credential,
    IssuedPass,
    Limit,
    Reservation,
    Scope,
    Settlement,
    Usage,
)

Result = TypeVar("Result")
Row = Mapping[str, Any]
Dialogue = Generator[tuple[str, Mapping[str, Any]], Sequence[Row], Result]

UNUSED_SECONDS: Final = 900
"""A pass can be used for 15 minutes; a reservation that a crash left behind lapses then too."""

QUARTER_SECONDS: Final = UNUSED_SECONDS
"""Minutes of an agent or of all are kept added up by the quarter of an hour, once it is over for as long: by then
every reservation in it was granted or has lapsed, so that only a settlement still moves its sum."""

SHARE: Final = "share"
"""Not a statement: from here on, transactions that hold one of the `locks` alone come before this one or after it."""

# The terms that always hold name the index (see the schema, step 3).
_ALL: Final = "transport <> ''"
_SCOPES: Final = {
    Scope.USER: "token_issuer = :token_issuer AND user_id = :user_id",
    Scope.AGENT: "agent_alias = :agent_alias AND agent_alias <> ''",
    Scope.ALL: _ALL,
}
# Passes and conversations are counted no further than their limit.
_QUESTIONS: Final = {
    Counted.PASSES: """
        SELECT count(*) AS used, min(reserved_at) AS oldest FROM
        (SELECT reserved_at FROM passes WHERE {scope} AND reserved_at > :since
         ORDER BY reserved_at DESC LIMIT :most) AS counted""",
    Counted.CONVERSATIONS: """
        SELECT count(*) AS used, min(lapses_at) AS oldest FROM
        (SELECT lapses_at FROM passes WHERE {scope} AND settled_at IS NULL AND lapses_at > :now
         ORDER BY lapses_at DESC LIMIT :most) AS counted""",
}
_MINUTES_OF_USER: Final = """
SELECT coalesce(sum(seconds), 0) AS used, min(reserved_at) AS oldest FROM passes
WHERE {scope} AND reserved_at > :since AND seconds > 0"""
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
    AND reserved_at >= CAST(quarter AS DOUBLE PRECISION) * 900
    AND reserved_at < CAST(quarter + 1 AS DOUBLE PRECISION) * 900) FROM missing"""
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
_REFUSALS: Final = {
    Counted.PASSES: RateLimited,
    Counted.CONVERSATIONS: TooManyConversations,
    Counted.SECONDS: QuotaExceeded,
}


def counted_in(scope: Scope, whose: Mapping[str, Any]) -> str:
    """Name what a limit of this scope counts together for the user and agent in `whose`: no two share a name."""
    token_issuer = whose.get("token_issuer", "")
    return {
        Scope.USER: f"user {len(token_issuer)} {token_issuer} {whose.get('user_id')}",
        Scope.AGENT: f"agent {whose.get('agent_alias')}",
        Scope.ALL: "all",
    }[scope]


def usage(whose: Mapping[str, str], limits: Sequence[Limit], now: float) -> Dialogue[list[Usage]]:
    """Answer each limit's question for the user and agent in `whose`.

    Minutes of an agent or of all may be asked only where no other transaction counts in that scope.
    """
    yield _LAPSE, {"now": now}
    answers = []
    for limit in limits:
        parameters = {**whose, "now": now, "since": now - limit.window_seconds, "most": limit.most}
        if limit.counted is Counted.SECONDS:
            answers.append((yield from _minutes(limit, parameters)))
            continue
        (row,) = yield _QUESTIONS[limit.counted].format(scope=_SCOPES[limit.scope]), parameters
        resets_at = row["oldest"]
        if resets_at is not None and limit.counted is Counted.PASSES:
            resets_at += limit.window_seconds
        answers.append(Usage(limit=limit, used=int(row["used"]), resets_at=resets_at))
    return answers


def _minutes(limit: Limit, parameters: dict[str, Any]) -> Dialogue[Usage]:
    scope = _SCOPES[limit.scope]
    if limit.scope is Scope.USER:
        (row,) = yield _MINUTES_OF_USER.format(scope=scope), parameters
        used, oldest = int(row["used"]), row["oldest"]
    else:
        parameters |= yield from _added_up(counted_in(limit.scope, parameters), scope, parameters)
        (row,) = yield _MINUTES.format(scope=scope), parameters
        used, oldest = int(row["used"]), None
    if used >= limit.most:
        oldest = yield from _reached(scope, parameters)
    return Usage(limit=limit, used=used, resets_at=None if oldest is None else oldest + limit.window_seconds)


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
            yield _ADD_UP.format(scope=scope), {**parameters, "key": key, "first": begin, "end": stop}
    end = max(first, over)
    return {
        "key": key,
        "first": first,
        "end": end,
        "first_at": float(first * QUARTER_SECONDS),
        "end_at": float(end * QUARTER_SECONDS),
    }


def _reached(scope: str, parameters: Mapping[str, Any]) -> Dialogue[float | None]:
    """Return when the pass was reserved that, with all after it, reaches the limit; None if none does any more."""
    passes, most = _REACHED_BY_PASS.format(scope=scope), parameters["most"]
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


def reserve(reservation: Reservation, limits: Sequence[Limit], now: float) -> Dialogue[None]:
    """Count one more pass, or raise UserBlocked, or the LimitReached of the limit that leaves no room for longest.

    While anything is left a conversation may begin, and no more is set aside for it than there is: what is promised
    never exceeds a limit. It may still end beyond it, for nobody can cut it; then the next is refused.
    """
    row = asdict(reservation) | {"transport": reservation.transport.value}
    if (yield _BLOCKED, row):
        raise UserBlocked
    answers = yield from usage(row, limits, now)
    if reached := [_limit_reached(answer, now) for answer in answers if answer.left == 0]:
        raise max(reached, key=lambda refusal: refusal.resets_at)
    left = (answer.left for answer in answers if answer.limit.counted is Counted.SECONDS)
    seconds = min([reservation.seconds, *left])
    yield _RESERVE, row | {"now": now, "lapses_at": now + UNUSED_SECONDS, "seconds": seconds}


def _limit_reached(answer: Usage, now: float) -> LimitReached:
    refusal = _REFUSALS[answer.limit.counted](operator_note=f"the limit {answer.limit.name} is reached")
    refusal.resets_at = answer.resets_at or now + answer.limit.window_seconds
    refusal.retry_after_seconds = max(1, math.ceil(refusal.resets_at - now))
    refusal.headers = _rate_limit_headers(answer, refusal.retry_after_seconds)
    return refusal


def _rate_limit_headers(answer: Usage, wait_seconds: int) -> dict[str, str]:
    """Word a limit as the RateLimit header fields (draft-ietf-httpapi-ratelimit-headers)."""
    limit = answer.limit
    return {
        "RateLimit-Policy": f'"{limit.name}";q={limit.most};w={limit.window_seconds}',
        "RateLimit": f'"{limit.name}";r=0;t={wait_seconds}',
    }


def grant(reservation: Reservation, credential: Credential, now: float) -> Dialogue[None]:
    """Bind the conversation to the user it was reserved for.

    Raises BadAnswer where ElevenLabs named a conversation that was issued to someone else, and LedgerUnavailable where
    the reservation is gone: no row, no pass.
    """
    row = asdict(reservation) | {
        "conversation_id": credential.conversation_id,
        "credential_sha256": credential.sha256,
        "now": now,
        # Open until it has had time to be used to the full; what really was, a settlement will tell.
        "lapses_at": now + UNUSED_SECONDS + reservation.seconds,
    }
    for other in (yield "SELECT token_issuer, user_id FROM passes WHERE conversation_id = :conversation_id", row):
        if (other["token_issuer"], other["user_id"]) != (reservation.token_issuer, reservation.user_id):
            raise BadAnswer(operator_note="ElevenLabs named a conversation that was issued to another user before")
        yield from release(reservation.pass_id)  # one conversation, one row: what the first has used stays charged
        return
    if not (yield _GRANT, row):
        raise LedgerUnavailable(
            operator_note="the reservation is gone: it lapsed, or the database lost what it confirmed"
        )
    for early in (yield _EARLY, row):
        yield "DELETE FROM orphans WHERE conversation_id = :conversation_id", row
        yield from settle(Settlement(**early), now)


def release(pass_id: str) -> Dialogue[None]:
    """Give back a reservation that came to nothing."""
    yield "DELETE FROM passes WHERE pass_id = :pass_id AND granted_at IS NULL", {"pass_id": pass_id}


def settle(settlement: Settlement, now: float) -> Dialogue[IssuedPass | None]:
    """Close a conversation with what it really used: once, in any order, however often it is told.

    Returns the pass if this settled it; None if it was settled before, or is (yet) unknown: then the settlement waits.
    """
    row = asdict(settlement) | {"now": now}
    found = yield _ISSUED, row
    if not found:
        yield _ORPHAN, row
        return None
    # An expiry is a guess and gives way to what ElevenLabs tells; what it tells of itself outranks what it answers.
    yield SHARE, {"locks": _scopes_of(found[0])}
    settled = yield _SETTLE, row
    if settled:
        yield from _moved(found[0], settlement.seconds)
    is_first = found[0]["settled_by"] in {None, "expiry"}
    return _issued_pass(settled[0]) if settled and is_first else None


def expire(conversation_id: str, now: float) -> Dialogue[None]:
    """Release a pass that was never used: its seconds are free again, and it is open no longer."""
    for unused in (yield _ISSUED, {"conversation_id": conversation_id}):
        yield SHARE, {"locks": _scopes_of(unused)}
        if (yield _EXPIRE, {"conversation_id": conversation_id, "now": now}):
            yield from _moved(unused, 0)


def _scopes_of(row: Row) -> list[str]:
    return [counted_in(scope, row) for scope in (Scope.AGENT, Scope.ALL)]


def _moved(before: Row, seconds: int) -> Dialogue[None]:
    """Keep what is added up equal to its passes; nothing is kept where no limit ever asked."""
    agent, quarter = counted_in(Scope.AGENT, before), math.floor(before["reserved_at"] / QUARTER_SECONDS)
    yield _MOVE, {"agent": agent, "quarter": quarter, "more": seconds - before["seconds"]}


def issued(conversation_id: str) -> Dialogue[IssuedPass]:
    """Return the pass behind a conversation, or raise ConversationUnknown."""
    found = yield _ISSUED, {"conversation_id": conversation_id}
    if not found:
        raise ConversationUnknown
    return _issued_pass(found[0])


def due(most: int, after: float, now: float) -> Dialogue[list[IssuedPass]]:
    """Return the passes that should have been used or settled by now and are not, oldest first."""
    rows = yield _DUE, {"after": after, "before": now - UNUSED_SECONDS, "most": most}
    return [_issued_pass(row) for row in rows]


def lease(name: str, seconds: float, now: float) -> Dialogue[bool]:
    """Take a lease unless it is held; nobody gives one back, it lapses."""
    return bool((yield _LEASE, {"name": name, "held_until": now + seconds, "now": now}))


def listed(user_id: str | None, most: int) -> Dialogue[list[IssuedPass]]:
    """Return the latest passes, of one user or of all, newest first."""
    whose = "AND user_id = :user_id" if user_id is not None else ""
    rows = yield (
        f"SELECT * FROM passes WHERE {_ALL} {whose} ORDER BY reserved_at DESC LIMIT :most",  # noqa: S608 - two fixed texts
        {"user_id": user_id, "most": most},
    )
    return [_issued_pass(row) for row in rows]


def page(after: tuple[float, str], most: int) -> Dialogue[list[IssuedPass]]:
    """Return the passes that follow `after` (reserved_at, pass_id), oldest first: how an export walks through all."""
    rows = yield _PAGE, {"reserved_at": after[0], "pass_id": after[1], "most": most}
    return [_issued_pass(row) for row in rows]


def totals(window_seconds: int, most: int, now: float) -> Dialogue[list[Row]]:
    """Return who used most in the window: token_issuer, user_id, passes, seconds."""
    rows = yield _TOTALS, {"since": now - window_seconds, "most": most}
    return [{**row, "seconds": int(row["seconds"])} for row in rows]  # PostgreSQL sums to a Decimal


def forget(age_seconds: int, now: float) -> Dialogue[None]:
    """Delete passes and settlements older than `age_seconds`: some of them, so that nobody waits for it."""
    (oldest,) = yield _OLDEST, {"before": now - age_seconds}
    if oldest["last"] is not None:
        yield f"DELETE FROM passes WHERE {_ALL} AND reserved_at <= :last", oldest  # noqa: S608 - a fixed text
    yield "DELETE FROM quarters WHERE quarter < :before", {"before": int((now - age_seconds) // QUARTER_SECONDS)}
    yield _FORGET_ORPHANS, {"before": now - age_seconds}


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


def _issued_pass(row: Row) -> IssuedPass:
    # By name, not by all that is there: an older instance must not stumble over a column that a newer one has added.
    return IssuedPass(**{field.name: row[field.name] for field in fields(IssuedPass)})


_ISSUED: Final = "SELECT * FROM passes WHERE conversation_id = :conversation_id"

_BLOCKED: Final = """
SELECT 1 AS blocked FROM blocks WHERE kind = 'everyone' OR (kind = 'agent' AND key = :agent_alias)
OR (kind = 'user' AND key = :user_id AND token_issuer IN ('', :token_issuer)) LIMIT 1"""

_RESERVE: Final = """
INSERT INTO passes (pass_id, request_id, token_issuer, user_id, agent_alias, agent_id, transport,
                    reserved_at, lapses_at, seconds)
VALUES (:pass_id, :request_id, :token_issuer, :user_id, :agent_alias, :agent_id, :transport,
        :now, :lapses_at, :seconds)"""

_GRANT: Final = """
UPDATE passes SET granted_at = :now, conversation_id = :conversation_id, credential_sha256 = :credential_sha256,
                  lapses_at = :lapses_at WHERE pass_id = :pass_id RETURNING pass_id"""

_SETTLE: Final = """
UPDATE passes SET settled_at = :now, settled_by = :source, seconds = :seconds, cost = :cost, reported_user_id = :user_id
WHERE conversation_id = :conversation_id AND (settled_at IS NULL OR settled_by = 'expiry'
      OR (settled_by = 'reconciler' AND :source = 'webhook')) RETURNING *"""

_EXPIRE: Final = """
UPDATE passes SET settled_at = :now, settled_by = 'expiry', seconds = 0
WHERE conversation_id = :conversation_id AND settled_at IS NULL RETURNING pass_id"""

_EARLY: Final = (
    "SELECT conversation_id, seconds, cost, user_id, source FROM orphans WHERE conversation_id = :conversation_id"
)

_ORPHAN: Final = """
INSERT INTO orphans (conversation_id, arrived_at, seconds, cost, user_id, source)
VALUES (:conversation_id, :now, :seconds, :cost, :user_id, :source)
ON CONFLICT (conversation_id) DO UPDATE SET arrived_at = excluded.arrived_at, seconds = excluded.seconds,
    cost = excluded.cost, user_id = excluded.user_id, source = excluded.source
WHERE orphans.source = 'reconciler' AND excluded.source = 'webhook'"""

_LAPSE: Final = "DELETE FROM passes WHERE granted_at IS NULL AND lapses_at <= :now"

_DUE: Final = """
SELECT * FROM passes WHERE settled_at IS NULL AND conversation_id IS NOT NULL
AND reserved_at > :after AND reserved_at < :before ORDER BY reserved_at LIMIT :most"""

_LEASE: Final = """
INSERT INTO leases (name, held_until) VALUES (:name, :held_until)
ON CONFLICT (name) DO UPDATE SET held_until = excluded.held_until WHERE leases.held_until <= :now
RETURNING name"""

_PAGE: Final = """
SELECT * FROM passes WHERE transport <> '' AND (reserved_at, pass_id) > (:reserved_at, :pass_id)
ORDER BY reserved_at, pass_id LIMIT :most"""

_TOTALS: Final = """
SELECT token_issuer, user_id, count(*) AS passes, sum(seconds) AS seconds FROM passes
WHERE transport <> '' AND reserved_at > :since
GROUP BY token_issuer, user_id ORDER BY sum(seconds) DESC, count(*) DESC LIMIT :most"""

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
