"""The list of conversations: the rows that a caller asks for, a page at a time."""

import base64
import json
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

from elevenlabs_emulator.aftermath import Account, Status

_Position = tuple[float, str]


class ListQuery(BaseModel):
    """The query of the list, with the vendor's names and limits; its other filters are ignored.

    Both limits of the start time are inclusive here. Nobody has verified that for the real service.
    """

    agent_id: str | None = None
    call_start_after_unix: int | None = None
    call_start_before_unix: int | None = None
    exclude_statuses: list[Status] = []
    page_size: int = Field(default=30, ge=1, le=100)
    cursor: str | None = None
    sort_direction: Literal["asc", "desc"] = "desc"

    @field_validator("cursor")
    @classmethod
    def _can_be_read(cls, cursor: str | None) -> str | None:
        if cursor is not None:
            _position_at(cursor)
        return cursor


def list_page(accounts: Iterable[Account], query: ListQuery, *, now: float) -> dict[str, Any]:
    """Return one page in the shape of the vendor's model, sorted by the time of the start.

    A cursor names the last row of its page, so that conversations which begin meanwhile move no later page.
    """
    is_descending = query.sort_direction == "desc"
    rows = sorted(
        (account for account in accounts if _matches(account, query, now)), key=_position, reverse=is_descending
    )
    if query.cursor is not None:
        last = _position_at(query.cursor)
        rows = [row for row in rows if (_position(row) < last if is_descending else _position(row) > last)]
    page, has_more = rows[: query.page_size], len(rows) > query.page_size
    return {
        "conversations": [row.summary(now) for row in page],
        "next_cursor": _cursor_at(_position(page[-1])) if has_more else None,
        "has_more": has_more,
    }


def _matches(account: Account, query: ListQuery, now: float) -> bool:
    started_at, after, before = int(account.started_at), query.call_start_after_unix, query.call_start_before_unix
    return (
        query.agent_id in {None, account.agent_id}
        and (after is None or started_at >= after)
        and (before is None or started_at <= before)
        and account.status(now) not in query.exclude_statuses
    )


def _position(account: Account) -> _Position:
    return float(account.started_at), account.record.conversation_id or ""


def _cursor_at(position: _Position) -> str:
    return base64.urlsafe_b64encode(json.dumps(position).encode()).decode()


def _position_at(cursor: str) -> _Position:
    match json.loads(base64.urlsafe_b64decode(cursor)):
        case [float(started_at), str(conversation_id)]:
            return started_at, conversation_id
    raise ValueError("not a cursor of this list")
