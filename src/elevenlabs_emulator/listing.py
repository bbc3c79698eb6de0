"""The list of conversations: the rows that a caller asks for, one page at a time."""

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

from elevenlabs_emulator.accounts import Account, Status

_Position = tuple[float, str]


class ListQuery(BaseModel):
    """The query of the list, with the vendor's names and limits; other filters are ignored.

    Both limits of the start time are inclusive here. Nobody has verified that for the live service.
    """

    agent_id: str | None = None
    user_id: str | None = None
    call_start_after_unix: int | None = None
    call_start_before_unix: int | None = None
    exclude_statuses: list[Status] = []
    page_size: int = Field(default=30, ge=1, le=100)
    cursor: str | None = None
    sort_direction: Literal["asc", "desc"] = "desc"

    @field_validator("cursor")
    @classmethod
    def _check_cursor(cls, cursor: str | None) -> str | None:
        if cursor is not None:
            _parse_cursor(cursor)
        return cursor

    def matches(self, account: Account) -> bool:
        """Whether the list has a row for this conversation."""
        started_at, after, before = int(account.started_at), self.call_start_after_unix, self.call_start_before_unix
        return (
            self.agent_id in {None, account.agent.agent_id}
            and self.user_id in {None, account.user_id}
            and (after is None or started_at >= after)
            and (before is None or started_at <= before)
            and account.status not in self.exclude_statuses
        )


def list_page(accounts: Iterable[Account], query: ListQuery) -> dict[str, Any]:
    """Return one page in the shape of the vendor's model, sorted by the time of the start.

    A cursor names the last row of its page, so conversations that begin between two calls move no later page.
    """
    is_descending = query.sort_direction == "desc"
    rows = sorted((each for each in accounts if query.matches(each)), key=_position, reverse=is_descending)
    if query.cursor is not None:
        last = _parse_cursor(query.cursor)
        rows = [row for row in rows if (_position(row) < last if is_descending else _position(row) > last)]
    page, has_more = rows[: query.page_size], len(rows) > query.page_size
    return {
        "conversations": [row.summary_as_json() for row in page],
        "next_cursor": "{}/{}".format(*_position(page[-1])) if has_more else None,
        "has_more": has_more,
    }


def _position(account: Account) -> _Position:
    return account.started_at, account.record.conversation_id or ""


def _parse_cursor(cursor: str) -> _Position:
    started_at, _, conversation_id = cursor.partition("/")
    return float(started_at), conversation_id
