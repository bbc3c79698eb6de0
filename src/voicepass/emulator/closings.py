"""Every way the emulator ends a conversation, with how sure we are that ElevenLabs ends it so."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

# RFC 6455, 5.5: a control frame carries 125 bytes, two of them are the code.
_REASON_BYTES = 123

_DOOR: Literal["door"] = "door"
_START: Literal["start"] = "start"


@dataclass(frozen=True)
class Closing:
    """One row of the table.

    `moment` is `door` (before the metadata: an SDK never reports "connected") or `start` (after it, with an `error`
    event that carries `error_type`). `basis` covers code, reason and moment together: `assumed` if any of them is a
    guess, and `source` says which.
    """

    name: str
    code: int
    reason: str
    moment: Literal["door", "start"]
    basis: Literal["documented", "observed", "assumed"]
    source: str
    error_type: str | None = None

    @property
    def needs_facts(self) -> bool:
        """Whether the reason names something that only the conversation at hand knows."""
        return "{" in self.reason

    def about(self, **facts: str) -> "Closing":
        """Fill the reason's placeholders; the result is cut to what a close frame can carry."""
        reason = self.reason.format(**facts).encode(errors="replace")[:_REASON_BYTES]
        return replace(self, reason=reason.decode(errors="ignore"))


# fmt: off
_TABLE = (
    Closing("unauthorized", 3000, "Could not authorize the conversation.", _DOOR,
            "observed", "users' reports; absent, expired, spent and forged signatures are not told apart"),
    Closing("unknown_agent", 3000, "The AI agent you are trying to reach does not exist", _DOOR,
            "assumed", "text: the vendor's help centre; code and moment: our guess"),
    Closing("host_not_allowed", 3000, "Host {host} is not allowed to connect to this agent", _DOOR,
            "assumed", "text: the vendor's help centre; code and moment: our guess, 1008 is as likely"),
    Closing("request_error", 3000, "Request error", _DOOR,
            "observed", "elevenlabs/packages#626: a stale branch in the URL"),
    Closing("invalid_message", 1008, "Invalid message received", _DOOR,
            "assumed", "code: the published message schema; text and moment: our guess"),
    Closing("first_frame_timeout", 1002, "No conversation initiation data received in time", _DOOR,
            "assumed", "code: the published message schema has 1002 for timeouts; text: our guess"),
    Closing("frame_too_big", 1009, "Message too big", _DOOR,
            "assumed", "RFC 6455, 7.4.1; the vendor's own bound is unknown"),
    Closing("variables_missing_in_first_message", 1008,
            "Missing required dynamic variables in first message: {variables}", _START,
            "observed", "elevenlabs/elevenlabs-examples#138: about 170 ms after the metadata",
            "missing_dynamic_variable"),
    Closing("variables_missing_in_tools", 1008, "Missing required dynamic variables in tools: {variables}", _START,
            "observed", "elevenlabs/packages#360: every variable of every attached tool", "missing_dynamic_variable"),
    Closing("override_not_allowed", 1008, "Override for field '{field}' is not allowed by config.", _START,
            "observed", "elevenlabs/packages#23 and #337", "override_error"),
    Closing("quota_exceeded", 1002, "This request exceeds your quota limit.", _START,
            "observed", "elevenlabs/packages#911: the URL is minted, the socket says no"),
    Closing("agent_misconfigured", 1002, "The AI agent you are trying to reach appears to be misconfigured", _START,
            "observed", "elevenlabs/elevenlabs-examples#137: wrong credentials of a custom LLM", "custom_llm_error"),
    Closing("daily_limit", 1008, "Agent has exceeded its daily call limit of 100000", _START,
            "assumed", "text: the vendor's help centre; code and moment: our guess"),
    Closing("too_many_concurrent", 3008, "too many concurrent connections", _START,
            "assumed", "a mock in the vendor's widget; nobody reports it from the wire"),
    Closing("internal_error", 1011, "", _START,
            "observed", "elevenlabs/elevenlabs-docs#768: no reason given"),
)
# fmt: on

CLOSINGS: Mapping[str, Closing] = {row.name: row for row in _TABLE}


class Refused(Exception):  # noqa: N818  a refusal is an expected outcome here, not an error
    """The conversation ends with the row of this name; `facts` fill its reason."""

    def __init__(self, name: str, **facts: str) -> None:
        super().__init__(name)
        self.closing = CLOSINGS[name].about(**facts)
