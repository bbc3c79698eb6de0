"""Rules about extensions: more minutes for one user until an instant. They raise the user's limits of minutes.

The first answer of `limits` ignores them, because a user below the limit needs none. So they cost other users nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final

from voicepass.errors import RequestInvalid
from voicepass.ledger.dialogue import Dialogue, Row
from voicepass.model import Counted, Limit, Scope, Usage

Count = Callable[[Limit, Row, float], Dialogue[Usage]]

MAX_MINUTES: Final = 1_000_000
MAX_SECONDS: Final = 3660 * 86_400
"""An extension ends within about ten years. A later end is a typing error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """A user (of each issuer, or of one) may use so many more minutes in each day and month until `ends_at`."""

    user_id: str
    token_issuer: str = ""
    minutes: int
    ends_at: float


def extend(extension: Extension, now: float) -> Dialogue[bool]:
    """Set the user's extension; an earlier one ends. Returns whether voicepass has issued a pass to this user before.

    Raises RequestInvalid unless it ends within the next ten years.
    """
    if not now < extension.ends_at <= now + MAX_SECONDS:
        raise RequestInvalid("An extension must end in the future, and within ten years.")
    yield "DELETE FROM extensions WHERE ends_at <= :now", {"now": now}
    row = asdict(extension)
    yield _EXTEND, row
    return bool((yield _IS_KNOWN, row))


def revoke(user_id: str, token_issuer: str, now: float) -> Dialogue[bool]:
    """End a user's extension. Returns whether there was one."""
    return bool((yield _REVOKE, {"user_id": user_id, "token_issuer": token_issuer, "now": now}))


def list_extensions(now: float) -> Dialogue[list[Extension]]:
    """Return the extensions that have not ended, the next to end first."""
    rows = yield _LIST, {"now": now}
    return [Extension(**row) for row in rows]


def count_extended(count: Count, limit: Limit, whose: Row, now: float) -> Dialogue[Usage]:
    """Count what is used of a limit. The user's extensions raise a limit of the user's minutes.

    `resets_at` takes into account that an extension may end before a new try can succeed.
    """
    rows: Sequence[Row] = ()
    if limit.scope is Scope.USER and limit.counted is Counted.SECONDS:
        rows = yield _OF_USER, {**whose, "now": now}
    most = limit.most + 60 * sum(row["minutes"] for row in rows)
    answer = yield from count(replace(limit, most=most), whose, now)
    resets_at = answer.resets_at
    for row in rows:
        if answer.left > 0 or resets_at is None or resets_at < row["ends_at"]:
            break
        most -= 60 * row["minutes"]
        resets_at = (yield from count(replace(limit, most=most), whose, now)).resets_at
    return replace(answer, resets_at=resets_at)


_OF_USER: Final = """
SELECT minutes, ends_at FROM extensions
WHERE user_id = :user_id AND token_issuer IN ('', :token_issuer) AND ends_at > :now ORDER BY ends_at"""

_EXTEND: Final = """
INSERT INTO extensions (user_id, token_issuer, minutes, ends_at) VALUES (:user_id, :token_issuer, :minutes, :ends_at)
ON CONFLICT (user_id, token_issuer) DO UPDATE SET minutes = excluded.minutes, ends_at = excluded.ends_at"""

_LIST: Final = """
SELECT user_id, token_issuer, minutes, ends_at FROM extensions
WHERE ends_at > :now ORDER BY ends_at, user_id, token_issuer"""

_REVOKE: Final = """
DELETE FROM extensions WHERE user_id = :user_id AND token_issuer = :token_issuer AND ends_at > :now
RETURNING user_id"""

# The index of a user's passes begins with the issuer: naming each issuer lets the engine jump to the user.
EACH_ISSUER: Final = """
WITH RECURSIVE issuers (name) AS (SELECT min(token_issuer) FROM passes UNION ALL
    SELECT (SELECT min(token_issuer) FROM passes WHERE token_issuer > name) FROM issuers WHERE name IS NOT NULL)"""

_IS_KNOWN: Final = f"""{EACH_ISSUER}
SELECT 1 FROM issuers WHERE :token_issuer IN ('', name)
AND EXISTS (SELECT 1 FROM passes WHERE passes.token_issuer = name AND user_id = :user_id) LIMIT 1"""  # noqa: S608
