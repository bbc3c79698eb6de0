"""Every way the emulator ends a conversation, with how sure we are that ElevenLabs ends it so."""

from dataclasses import dataclass, replace
from typing import Literal

# RFC 6455, 5.5: a control frame carries 125 bytes, two of them are the code.
_REASON_BYTES = 123


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


# fmt: off
_TABLE = (
    Closing("unauthorized", 3000, "Could not authorize the conversation.", "door",
            "observed", "users' reports; absent, expired, spent and forged signatures are not told apart"),
    Closing("unknown_agent", 3000, "The AI agent you are trying to reach does not exist", "door",
            "assumed", "text: the vendor's help centre; code and moment: our guess"),
    Closing("host_not_allowed", 3000, "Host {host} is not allowed to connect to this agent", "door",
            "assumed", "text: the vendor's help centre; code and moment: our guess, 1008 is as likely"),
    Closing("request_error", 3000, "Request error", "door",
            "observed", "elevenlabs/packages#626: a stale branch in the URL"),
    Closing("invalid_message", 1008, "Invalid message received", "door",
            "assumed", "code: the published message schema; text and moment: our guess"),
    Closing("first_frame_timeout", 1002, "No conversation initiation data received in time", "door",
            "assumed", "code: the published message schema has 1002 for timeouts; text: our guess"),
    # The braces that remain around the names are those of a printed Python set.
    Closing("variables_missing", 1008, "Missing required dynamic variables in {place}: {{{variables}}}", "start",
            "observed", "elevenlabs/elevenlabs-examples#138 (first message), elevenlabs/packages#360 (every tool's)",
            "missing_dynamic_variable"),
    Closing("override_not_allowed", 1008, "Override for field '{field}' is not allowed by config.", "start",
            "observed", "elevenlabs/packages#23 and #337", "override_error"),
    Closing("language_unsupported", 1008, "Language '{language}' is not supported by this agent", "start",
            "assumed", "elevenlabs/packages#241 tells of the close, not of its code or text"),
    Closing("quota_exceeded", 1002, "This request exceeds your quota limit.", "start",
            "observed", "elevenlabs/packages#911: the URL is minted, the socket says no"),
    Closing("agent_misconfigured", 1002, "The AI agent you are trying to reach appears to be misconfigured", "start",
            "observed", "elevenlabs/elevenlabs-examples#137: wrong credentials of a custom LLM", "custom_llm_error"),
    Closing("daily_limit", 1008, "Agent has exceeded its daily call limit of 100000", "start",
            "assumed", "text: the vendor's help centre; code and moment: our guess"),
    Closing("too_many_concurrent", 3008, "too many concurrent connections", "start",
            "assumed", "a mock in the vendor's widget; nobody reports it from the wire"),
    Closing("internal_error", 1011, "", "start",
            "observed", "elevenlabs/elevenlabs-docs#768: no reason given"),
)
# fmt: on

CLOSINGS = {row.name: row for row in _TABLE}


class Refused(Exception):  # noqa: N818  a refusal is an expected outcome here, not an error
    """The conversation ends with the row of this name; `facts` fill its reason, cut to what a close frame carries."""

    def __init__(self, name: str, **facts: str) -> None:
        super().__init__(name)
        row = CLOSINGS[name]
        reason = row.reason.format(**facts).encode()[:_REASON_BYTES]
        self.closing = replace(row, reason=reason.decode(errors="ignore"))
