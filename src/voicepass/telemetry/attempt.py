"""What is known of one request for a pass: the facts that the log line, the metrics and the trace are made of."""

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

from voicepass.model import Agent, Credential, Transport, User


class StepName(StrEnum):
    """The parts of an attempt."""

    VERIFY = "verify"
    RESERVE = "reserve"
    LOOKUP = "lookup"
    WARM = "warm"
    """Reserve and grant a credential that was fetched ahead."""
    UPSTREAM = "upstream"
    """Ask ElevenLabs for a credential."""
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


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One request for a pass, granted or refused. `passes` fills it in and shows it to the observers once.

    `outcome` is "granted", "cancelled" (the caller hung up) or the refusal's code; `operator_note` is for the log.
    """

    request_id: str
    transport: Transport
    alias: str
    client: str | None = None
    client_request_id: str | None = None
    traceparent: str | None = None
    user: User | None = None
    agent: Agent | None = None
    plan: str | None = None
    """The plan whose limits apply to the user, if one does."""
    conversation_id: str | None = None
    credential_sha256: str | None = None
    is_warm: bool = False
    has_asked: bool = False
    """Whether voicepass asked for a credential."""
    is_reissued: bool = False
    """Whether the user got an unopened pass of theirs again."""
    outcome: str = "internal_error"
    is_operators_fault: bool = False
    operator_note: str = ""
    cause: BaseException | None = None
    began: float = field(default_factory=time.monotonic)
    duration_seconds: float = 0.0
    steps: list[Step] = field(default_factory=list)

    def note_credential(self, credential: Credential) -> None:
        """Note which credential the attempt got. The secret itself is kept only as a hash."""
        self.conversation_id, self.is_warm = credential.conversation_id, credential.is_warm
        self.credential_sha256 = credential.sha256

    def step(self, name: StepName) -> Step:
        """Time a part: `with attempt.step(StepName.VERIFY): …`."""
        step = Step(name)
        self.steps.append(step)
        return step
