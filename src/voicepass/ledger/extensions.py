"""Rules about extensions: more minutes for one user until an instant. They raise the user's limits of minutes.

The first answer of `limits` ignores them, because a user below the limit needs none. So they cost other users nothing.
"""

from dataclasses import asdict, dataclass
from typing import Final

from voicepass.errors import RequestInvalid
from voicepass.ledger.dialogue import Dialogue, read_statements

MAX_MINUTES: Final = 1_000_000
MAX_SECONDS: Final = 3660 * 86_400
"""An extension ends within about ten years. A later end is a typing error."""

SQL: Final = read_statements("extensions")


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """A user (of each issuer, or of one) may use this many more minutes in each day and month until `ends_at`."""

    user_id: str
    token_issuer: str = ""
    minutes: int
    ends_at: float


def extend(now: float, extension: Extension) -> Dialogue[bool]:
    """Set the user's extension; an earlier one ends. Returns whether voicepass has issued a pass to this user before.

    Raises RequestInvalid unless it ends within the next ten years.
    """
    if not now < extension.ends_at <= now + MAX_SECONDS:
        raise RequestInvalid("An extension must end in the future, and within ten years.")
    yield SQL["delete_ended"], {"now": now}
    row = asdict(extension)
    yield SQL["extend"], row
    return bool((yield SQL["is_known"], row))


def revoke(now: float, user_id: str, token_issuer: str) -> Dialogue[bool]:
    """End a user's extension. Returns whether there was one."""
    return bool((yield SQL["revoke"], {"user_id": user_id, "token_issuer": token_issuer, "now": now}))


def list_extensions(now: float) -> Dialogue[list[Extension]]:
    """Return the extensions that have not ended, the next to end first."""
    return [Extension(**row) for row in (yield SQL["list"], {"now": now})]
