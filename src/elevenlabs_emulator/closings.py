"""The table of closings, read from `closings.toml`: facts of the wire, no meaning."""

import tomllib
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Literal

# RFC 6455, 5.5: a control frame carries 125 bytes, two of them are the code.
_REASON_BYTES = 123
# The published schema allows no other code in an `error` event.
_ERROR_EVENT_CODES = {1000, 1002, 1008, 1011}


@dataclass(frozen=True, kw_only=True)
class Closing:
    """One row of the table; `closings.toml` describes the columns."""

    name: str
    code: int
    reason: str
    moment: Literal["before_metadata", "after_metadata", "during"]
    basis: Literal["documented", "observed", "assumed"]
    source: str
    template: str | None = None
    error_type: str | None = None
    record: Literal["done", "failed"] = "done"

    @property
    def error_event(self) -> dict[str, object] | None:
        """Return the `error` event that comes before the close, or None if there is none."""
        if self.name == "agent_ended" or self.code not in _ERROR_EVENT_CODES:
            return None
        event = {"code": self.code, "message": self.reason, "reason": self.reason}
        return event | ({"error_type": self.error_type} if self.error_type else {})


CLOSINGS = {
    name: Closing(name=name, **row)
    for name, row in tomllib.loads(files(__package__).joinpath("closings.toml").read_text("utf-8")).items()
}


class CloseConversation(Exception):  # noqa: N818 - to end a conversation is an expected outcome here
    """Ends the conversation with the row of this name; `facts` fill its template, else the example is the reason."""

    def __init__(self, name: str, **facts: object) -> None:
        super().__init__(name)
        row = CLOSINGS[name]
        reason = row.template.format(**facts) if row.template and facts else row.reason
        self.closing = replace(row, reason=reason.encode()[:_REASON_BYTES].decode(errors="ignore"))
