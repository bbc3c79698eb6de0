"""Every refusal of voicepass: its stable code, its HTTP status, and the text for the caller.

    Refusal
    ├── the caller must act ──  Malformed 400 · CredentialsConflict 400
    │   │                       TokenMissing 401 · TokenInvalid 401 · TokenExpired 401 · SignatureInvalid 401
    │   │                       OriginNotAllowed 403 · AgentNotAllowed 403 · UserBlocked 403
    │   │                       ConversationUnknown 404 · NotFound 404 · MethodNotAllowed 405
    │   │                       BodyTooLarge 413 · UnsupportedMediaType 415 · RequestInvalid 422
    │   │                       HeadersTooLarge 431
    │   └── LimitReached ─────  RateLimited 429 · QuotaExceeded 429 · TooManyConversations 429
    ├── voicepass failed ─────  KeysUnavailable 503 · LedgerUnavailable 503 · Overloaded 503
    │                           ShuttingDown 503 · NotStarted 503 · InternalError 500
    └── ElevenLabsRefusal ────  KeyRejected 502 · AgentUnknown 502 · BadAnswer 502
                                Busy 503 · QuotaExhausted 503 · Unavailable 503 · Timeout 504

`refusals.toml` has their values, and says what each is for. The technical cause is chained with `raise ... from`.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from importlib.resources import files
from typing import ClassVar, Final

_VALUES: Final = tomllib.loads(files(__package__).joinpath("refusals.toml").read_text("utf-8"))


@dataclass(eq=False, repr=False)
class Refusal(Exception):
    """What voicepass will not do, in words for the caller. It is complete when it is raised: nothing changes it later.

    If an argument is not given, the class's value from `refusals.toml` applies. `checks`: the outcome of each readiness
    check, if one failed.
    """

    detail: str = ""
    _: KW_ONLY
    operator_note: str = ""
    retry_after_seconds: int | None = None
    headers: Mapping[str, str] | None = None
    checks: Mapping[str, str] | None = None

    code: ClassVar[str]
    status: ClassVar[int]
    title: ClassVar[str]
    routes: ClassVar[Sequence[str]] = ()
    is_operators_fault: ClassVar[bool] = False
    has_reached_elevenlabs = True  # no annotation: as a field, its default would hide the value of Overloaded

    def __init_subclass__(cls) -> None:
        for name, value in _VALUES.get(cls.__name__, {}).items():
            setattr(cls, name, value)

    def __post_init__(self) -> None:
        kind = type(self)
        self.detail = self.detail or kind.detail
        self.operator_note = self.operator_note or kind.operator_note
        self.headers = {**(kind.headers or {}), **(self.headers or {})}
        if self.retry_after_seconds is None:
            self.retry_after_seconds = kind.retry_after_seconds
        super().__init__(self.detail)


@dataclass(eq=False, repr=False, kw_only=True)
class LimitReached(Refusal):
    """A limit of the policy is reached: `most` in any window of `window_seconds`.

    `resets_at`: seconds since the epoch, from when a new try can succeed. `plan`: the plan that sets the limit.
    """

    detail: str = field(default="", init=False)
    resets_at: float = 0.0
    limit_name: str = ""
    most: int = 0
    window_seconds: int = 0
    plan: str | None = None


@dataclass(eq=False, repr=False, kw_only=True)
class ElevenLabsRefusal(Refusal):
    """ElevenLabs gave no usable credential. The public detail never repeats ElevenLabs' own words.

    `vendor_code`: ElevenLabs' own, or empty. `pause_seconds`: how long it asked to wait. `may_retry`: a retry may help.
    """

    detail: str = field(default="", init=False)
    vendor_code: str = ""
    pause_seconds: float = 0.0
    may_retry: bool = False
    has_reached_elevenlabs: bool = True


class Malformed(Refusal): ...


class TokenMissing(Refusal): ...


class TokenInvalid(Refusal):
    """`operator_note` names the check that failed; the caller only learns that one did."""


class TokenExpired(Refusal): ...


class SignatureInvalid(Refusal):
    """`operator_note` names the check that failed; the sender only learns that one did."""


class CredentialsConflict(Refusal): ...


class OriginNotAllowed(Refusal): ...


class AgentNotAllowed(Refusal):
    """The same answer if the alias does not exist and if this user may not use it: nobody can find out which."""


class UserBlocked(Refusal): ...


class RateLimited(LimitReached): ...


class QuotaExceeded(LimitReached): ...


class TooManyConversations(LimitReached): ...


class RequestInvalid(Refusal): ...


class UnsupportedMediaType(Refusal): ...


class BodyTooLarge(Refusal): ...


class HeadersTooLarge(Refusal): ...


class NotFound(Refusal): ...


class ConversationUnknown(Refusal): ...


class MethodNotAllowed(Refusal): ...


class InternalError(Refusal): ...


class KeysUnavailable(Refusal):
    """Fails closed: without the issuer's keys, voicepass cannot distinguish a token from a forged one."""


class LedgerUnavailable(Refusal):
    """Fails closed: voicepass returns no pass that the ledger does not hold."""


class Overloaded(Refusal):
    """Too many callers wait already. voicepass refuses at once, so that those finish in time."""


class ShuttingDown(Refusal):
    """Only the answer of `/readyz`. Until the process ends, it serves every request."""


class NotStarted(Refusal):
    """Every answer of a service that an app mounted without its lifespan."""


class KeyRejected(ElevenLabsRefusal): ...


class AgentUnknown(ElevenLabsRefusal): ...


class BadAnswer(ElevenLabsRefusal): ...


class Busy(ElevenLabsRefusal): ...


class QuotaExhausted(ElevenLabsRefusal): ...


class Unavailable(ElevenLabsRefusal): ...


class Timeout(ElevenLabsRefusal): ...
