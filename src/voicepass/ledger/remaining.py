"""How many seconds a user may still talk."""

from collections.abc import Sequence
from typing import Final

from voicepass.errors import ConversationUnknown
from voicepass.ledger.dialogue import Dialogue
from voicepass.ledger.limits import count
from voicepass.ledger.sums import is_open
from voicepass.model import Counted, Limit, Scope


def read_seconds_left(
    limits: Sequence[Limit], now: float, *, conversation_id: str | None, pass_id: str = ""
) -> Dialogue[int | None]:
    """Return the seconds that the user of a pass may still talk; None if no limit counts the user's minutes.

    What is reserved for this conversation, and not used yet, is also left. Raises ConversationUnknown.
    """
    found = yield _FIND, {"conversation_id": conversation_id, "pass_id": pass_id}
    if not found or not found[0]["user_id"]:
        raise ConversationUnknown
    row = found[0]
    whose = {name: row[name] for name in ("token_issuer", "user_id", "agent_alias")}
    own = 0
    if is_open(row):
        since = row["opened_at"] or row["granted_at"] or now
        own = max(0, row["seconds"] - max(0, int(now - since)))
    left: int | None = None
    for limit in limits:
        if limit.scope is Scope.USER and limit.counted is Counted.SECONDS:
            usage = yield from count(limit, whose, now)
            left = usage.left + own if left is None else min(left, usage.left + own)
    return left


_FIND: Final = "SELECT * FROM passes WHERE conversation_id = :conversation_id OR pass_id = :pass_id"
