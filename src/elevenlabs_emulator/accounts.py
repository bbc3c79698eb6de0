"""Conversations as the vendor's API and its webhook show them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from elevenlabs_emulator.agents import EmulatedAgent
from elevenlabs_emulator.records import RecordedConversation

_CREDITS_PER_SECOND = 10  # made up: the price depends on the plan and the model
_DOLLARS_PER_SECOND = 0.0015  # likewise
_SUCCESS = {"done": "success", "failed": "failure"}
# The members of the first frame, and of its overrides, that the vendor's model of a conversation has.
_INITIATION = ("user_id", "source_info", "custom_llm_extra_body", "branch_id", "environment", "dynamic_variables")
_OVERRIDES = ("agent", "asr", "conversation", "tts", "turn")
# The members of the metadata that a row of the list has too.
_SHARED = ("start_time_unix_secs", "call_duration_secs", "cost", "cost_fiat", "termination_reason", "main_language")

Status = Literal["initiated", "in-progress", "processing", "done", "failed"]
AuthorizationMethod = Literal["signed_url", "livekit_token", "public"]


@dataclass(kw_only=True)
class Account:
    """One conversation. `seconds` is None until it ends; until `done_at` it is `processing`."""

    agent: EmulatedAgent
    record: RecordedConversation
    clock: Callable[[], float]
    authorization_method: AuthorizationMethod
    started_at: float = field(init=False)
    initiation: Any = None
    """The client's first frame, without secrets, if it was valid."""
    turns: list[dict[str, Any]] = field(default_factory=list)
    queue_seconds: float | None = None
    final_status: Literal["done", "failed"] = "done"
    seconds: int | None = None
    done_at: float = 0

    def __post_init__(self) -> None:
        self.started_at = self.clock()

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
            return "in-progress" if self.initiation else "initiated"
        return "processing" if self.clock() < self.done_at else self.final_status

    @property
    def user_id(self) -> Any:  # noqa: ANN401 - a string or None
        """Return the user's id that the client sent."""
        return self.initiation and self.initiation.get("user_id")

    def as_json(self) -> dict[str, object]:
        """Return the conversation in the shape of the vendor's model, without what no caller reads."""
        turns = [] if self.seconds is None else self.turns
        status, is_voice = self.status, not self.agent.text_only
        has_user_audio = is_voice and bool(turns) and self.record.microphone_seconds > 0
        has_response_audio = is_voice and any(turn["role"] == "agent" for turn in turns)
        return {
            "agent_id": self.agent.agent_id,
            "conversation_id": self.record.conversation_id,
            "status": status,
            "user_id": self.user_id,
            "transcript": turns,
            "metadata": self._metadata(),
            "analysis": {
                "call_successful": _SUCCESS[status],
                "transcript_summary": f"The conversation has {len(turns)} turns.",
                "evaluation_criteria_results": {},
                "data_collection_results": {},
            }
            if status in _SUCCESS
            else None,
            "conversation_initiation_client_data": self._client_data(),
            "has_audio": has_user_audio or has_response_audio,
            "has_user_audio": has_user_audio,
            "has_response_audio": has_response_audio,
            "has_auxiliary_audio": False,
        }

    def summary_as_json(self) -> dict[str, object]:
        """Return the conversation as a row of the list."""
        metadata, status = self._metadata(), self.status
        return {name: metadata[name] for name in _SHARED} | {
            "agent_id": self.agent.agent_id,
            "conversation_id": self.record.conversation_id,
            "message_count": 0 if self.seconds is None else sum(turn["message"] is not None for turn in self.turns),
            "status": status,
            "call_successful": _SUCCESS.get(status, "unknown"),
        }

    def _metadata(self) -> dict[str, object]:
        record = self.record
        has_error = record.closed_by == "emulator" and record.close_code != 1000  # noqa: PLR2004
        reason = f"Client disconnected: {record.close_code}" if record.closed_by == "client" else record.close_reason
        return {
            "start_time_unix_secs": int(self.started_at),
            "call_duration_secs": self.seconds or 0,
            "queue_wait_secs": self.queue_seconds,
            "cost": (self.seconds or 0) * _CREDITS_PER_SECOND,
            "cost_fiat": round((self.seconds or 0) * _DOLLARS_PER_SECOND, 4),
            "authorization_method": self.authorization_method,
            "termination_reason": reason,
            "error": {"code": record.close_code, "reason": record.close_reason} if has_error else None,
            "main_language": self.agent.language,
            "text_only": self.agent.text_only,
            "conversation_initiation_source": record.query.get("source", "unknown"),
            "conversation_initiation_source_version": record.query.get("version"),
        }

    def _client_data(self) -> dict[str, object]:
        frame = self.initiation or {}
        override = frame.get("conversation_config_override") or {}
        system_variables = {
            "system__agent_id": self.agent.agent_id,
            "system__conversation_id": self.record.conversation_id,
            "system__call_duration_secs": self.seconds or 0,
        }
        return {name: frame[name] for name in _INITIATION if name in frame} | {
            "conversation_config_override": {name: override[name] for name in _OVERRIDES if name in override},
            "dynamic_variables": (frame.get("dynamic_variables") or {}) | system_variables,
        }
