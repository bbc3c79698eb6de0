"""What is known of one request for a pass: the facts that the log line, the metrics and the trace are made of."""

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

from voicepass.model import Agent, Credential, PassRequest, User


class StepName(StrEnum):
    """The parts of an attempt. LOOKUP finds out what the user has open; UPSTREAM asks ElevenLabs for a credential.

    WARM reserves and grants a credential that was fetched ahead.
    """

    VERIFY = "verify"
    RESERVE = "reserve"
    LOOKUP = "lookup"
    WARM = "warm"
    UPSTREAM = "upstream"
    GRANT = "grant"
    RELEASE = "release"


@dataclass(slots=True)
class Step:
    """One part of an attempt. It is timed while its `with` block runs; `began` is a time of the monotonic clock."""

    name: StepName
    began: float = 0.0
    seconds: float = 0.0
    has_failed: bool = False

    def __enter__(self) -> Self:
        self.began = time.monotonic()
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self.seconds = time.monotonic() - self.began
        self.has_failed = error is not None


@dataclass(slots=True)
class Attempt:
    """One request for a pass, granted or refused. `passes` fills it in and shows it to the observers once.

    `plan` names the plan whose limits apply to the user. `has_asked`: voicepass asked for a credential. `is_reissued`:
    the user got an unopened pass of theirs again. `outcome` is "granted", "cancelled" (the caller hung up) or the
    refusal's code; `operator_note` is for the log.
    """

    request: PassRequest
    user: User | None = None
    agent: Agent | None = None
    plan: str | None = None
    conversation_id: str | None = None
    credential_sha256: str | None = None
    is_warm: bool = False
    has_asked: bool = False
    is_reissued: bool = False
    outcome: str = "internal_error"
    is_operators_fault: bool = False
    operator_note: str = ""
    cause: BaseException | None = None
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    steps: list[Step] = field(default_factory=list)

    @property
    def alias(self) -> str | None:
        """Return the alias of the agent, or None if the user may not use it: then it is text of the caller."""
        return self.request.alias if self.agent else None

    def note_credential(self, credential: Credential) -> None:
        """Note which credential the attempt got. The secret itself is kept only as a hash."""
        self.conversation_id, self.is_warm = credential.conversation_id, credential.is_warm
        self.credential_sha256 = credential.sha256

    def step(self, name: StepName) -> Step:
        """Time a part: `with attempt.step(StepName.VERIFY): …`."""
        step = Step(name)
        self.steps.append(step)
        return step
