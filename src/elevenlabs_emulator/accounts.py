"""Conversations as the vendor's API and its webhook show them: one, and a page of the list."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, Field

from elevenlabs_emulator.agents import EmulatedAgent
from elevenlabs_emulator.records import RecordedConversation

_CREDITS_PER_SECOND = 10  # made up: the price depends on the plan and the model
_DOLLARS_PER_SECOND = 0.0015  # likewise
_SUCCESS = {"done": "success", "failed": "failure"}
# The members that a row of the list has: of a conversation, and of its metadata.
_IN_ROW = ("agent_id", "conversation_id", "status")
_METADATA = ("start_time_unix_secs", "call_duration_secs", "cost", "cost_fiat", "termination_reason", "main_language")

Status = Literal["initiated", "in-progress", "processing", "done", "failed"]
AuthorizationMethod = Literal["signed_url", "livekit_token", "public"]


@dataclass(kw_only=True)
class Account:
    """One conversation. `seconds` is None until it ends; until `done_at` it is `processing`."""

    agent: EmulatedAgent
    record: RecordedConversation
    clock: Callable[[], float]
    authorization_method: AuthorizationMethod
    started_at: float
    # What the client's first frame said, without secrets, if it was valid.
    client_data: dict[str, Any] | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)
    queue_seconds: float | None = None
    final_status: Literal["done", "failed"] = "done"
    seconds: int | None = None
    done_at: float = 0

    def end(self, *, seconds: int, done_at: float) -> None:
        """Set how long the conversation lasted, and when its processing is over."""
        self.done_at = done_at
        self.seconds = seconds  # last: a reader in another thread takes it as the end

    def add_turn(self, role: Literal["user", "agent"], message: str | None, **members: object) -> None:
        """Add a turn to the transcript."""
        turn = {"role": role, "message": message, "time_in_call_secs": int(self.clock() - self.started_at)}
        self.turns.append(turn | {"tool_calls": [], "tool_results": [], "interrupted": False} | members)

    @property
    def status(self) -> Status:
        """Return the status at this time of the emulator's clock."""
        if self.seconds is None:
            return "initiated" if self.client_data is None else "in-progress"
        return "processing" if self.clock() < self.done_at else self.final_status

    @property
    def user_id(self) -> str | None:
        """Return the user's id that the client sent."""
        return (self.client_data or {}).get("user_id")

    @property
    def position(self) -> tuple[float, str]:
        """Return where it is in the list, which is sorted by the time of the start."""
        return self.started_at, self.record.conversation_id or ""

    def as_json(self) -> dict[str, Any]:
        """Return the conversation in the shape of the vendor's model, without what no caller reads."""
        turns = [] if self.seconds is None else self.turns
        status, is_voice = self.status, not self.agent.text_only
        has_user_audio = is_voice and bool(turns) and self.record.microphone_seconds > 0
        has_response_audio = is_voice and any(turn["role"] == "agent" for turn in turns)
        analysis: dict[str, object] = {
            "call_successful": _SUCCESS.get(status),
            "transcript_summary": f"The conversation has {len(turns)} turns.",
            "evaluation_criteria_results": {},
            "data_collection_results": {},
        }
        return {
            "agent_id": self.agent.agent_id,
            "conversation_id": self.record.conversation_id,
            "status": status,
            "user_id": self.user_id,
            "transcript": turns,
            "metadata": self._metadata(),
            "analysis": analysis if status in _SUCCESS else None,
            "conversation_initiation_client_data": self._client_data_as_json(),
            "has_audio": has_user_audio or has_response_audio,
            "has_user_audio": has_user_audio,
            "has_response_audio": has_response_audio,
            "has_auxiliary_audio": False,
        }

    def row_as_json(self) -> dict[str, object]:
        """Return the conversation as a row of the list."""
        whole = self.as_json()
        row = {name: whole[name] for name in _IN_ROW} | {name: whole["metadata"][name] for name in _METADATA}
        messages = [turn for turn in whole["transcript"] if turn["message"] is not None]
        return row | {"message_count": len(messages), "call_successful": _SUCCESS.get(whole["status"], "unknown")}

    def _metadata(self) -> dict[str, object]:
        record, seconds = self.record, self.seconds or 0
        has_error = record.closed_by == "emulator" and record.close_code != 1000  # noqa: PLR2004
        reason = f"Client disconnected: {record.close_code}" if record.closed_by == "client" else record.close_reason
        return {
            "start_time_unix_secs": int(self.started_at),
            "call_duration_secs": seconds,
            "queue_wait_secs": self.queue_seconds,
            "cost": seconds * _CREDITS_PER_SECOND,
            "cost_fiat": round(seconds * _DOLLARS_PER_SECOND, 4),
            "authorization_method": self.authorization_method,
            "termination_reason": reason,
            "error": {"code": record.close_code, "reason": record.close_reason} if has_error else None,
            "main_language": self.agent.language,
            "text_only": self.agent.text_only,
            "conversation_initiation_source": record.query.get("source", "unknown"),
            "conversation_initiation_source_version": record.query.get("version"),
        }

    def _client_data_as_json(self) -> dict[str, object]:
        data = self.client_data or {}
        variables: dict[str, object] = data.get("dynamic_variables") or {}
        ids = {"system__agent_id": self.agent.agent_id, "system__conversation_id": self.record.conversation_id}
        return data | {"dynamic_variables": variables | ids | {"system__call_duration_secs": self.seconds or 0}}


class ListQuery(BaseModel):
    """The query of the list, with the vendor's names and limits; other filters are ignored.

    Both limits of the start time are inclusive here. Nobody has verified that for the live service.
    """

    agent_id: str | None = None
    user_id: str | None = None
    call_start_after_unix: int = 0
    call_start_before_unix: int = sys.maxsize
    exclude_statuses: list[Status] = []
    page_size: int = Field(default=30, ge=1, le=100)
    cursor: str | None = Field(default=None, pattern=r"^\d+(\.\d+)?/\w*$")
    sort_direction: Literal["asc", "desc"] = "desc"

    def matches(self, account: Account) -> bool:
        """Whether the list has a row for this conversation."""
        return (
            self.agent_id in {None, account.agent.agent_id}
            and self.user_id in {None, account.user_id}
            and self.call_start_after_unix <= int(account.started_at) <= self.call_start_before_unix
            and account.status not in self.exclude_statuses
        )


def list_page(accounts: Iterable[Account], query: ListQuery) -> dict[str, Any]:
    """Return one page in the shape of the vendor's model.

    A cursor names the last row of its page, so conversations that begin between two calls move no later page.
    """
    is_descending = query.sort_direction == "desc"
    rows = sorted(filter(query.matches, accounts), key=lambda row: row.position, reverse=is_descending)
    if query.cursor is not None:
        started_at, _, conversation_id = query.cursor.partition("/")
        last = (float(started_at), conversation_id)
        rows = [row for row in rows if (row.position < last if is_descending else row.position > last)]
    page, has_more = rows[: query.page_size], len(rows) > query.page_size
    return {
        "conversations": [row.row_as_json() for row in page],
        "next_cursor": "{}/{}".format(*page[-1].position) if has_more else None,
        "has_more": has_more,
    }
