"""The frozen data types: who asks, for which agent, what they get, and what the ledger keeps of it."""

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

Clock = Callable[[], float]  # the wall clock: seconds since the epoch; it may step when the system corrects its time
MonotonicClock = Callable[[], float]  # seconds since an unknown start: it never steps, so it measures durations
Scalar = str | int | float | bool  # the types that a dynamic variable may have (ElevenLabs, "Dynamic variables")

DEFAULT_ALIAS = "default"
VERSION = "0.1.0"  # as in pyproject.toml: the image has no metadata of an installed package


def new_id() -> str:
    """Return a new id of 32 hexadecimal digits. It is not a secret: others may guess it."""
    return f"{random.getrandbits(128):032x}"


class Transport(StrEnum):
    """How the frontend will open the conversation, and so which credential it needs."""

    WEBSOCKET = "websocket"
    WEBRTC = "webrtc"


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What may identify the user of a request, as it came. No header is trusted.

    `is_read`: the request changes nothing. `app_user`: what the dependency of the app around voicepass returned; it may
    be of any type.
    """

    authorization: tuple[str, ...] = field(default=(), repr=False)
    cookies: tuple[str, ...] = field(default=(), repr=False)
    is_post: bool = False
    is_read: bool = False
    origin: str | None = None
    fetch_site: str | None = None
    scheme: str = "http"
    host: str | None = None
    media_type: str | None = None
    app_user: object = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRequest:
    """One request as it arrived: nothing in it is trusted yet. `client`: the address it came from.

    `client_request_id`: the X-Request-ID of a caller that is no trusted proxy.
    `traceparent`: the trace that the caller says this is part of (W3C Trace Context).
    """

    request_id: str
    credentials: Credentials
    alias: str
    transport: Transport
    client: str | None = None
    client_request_id: str | None = None
    traceparent: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """A signed-in user: the issuer of the token, the user's exact `id` there, and all signed claims.

    An app around voicepass that signs its users in makes these itself, and needs only `id`.
    """

    issuer: str = "app"
    id: str
    name: str | None = None
    claims: Mapping[str, object] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """A voice agent at ElevenLabs, known to frontends by its alias only.

    `base_url`: the ElevenLabs host of its workspace. Each residency region has one, with keys and agents of its own.
    """

    alias: str
    agent_id: str
    base_url: str
    branch_id: str | None = None
    version_id: str | None = None
    environment: str | None = None

    @property
    def selection(self) -> dict[str, str]:
        """Return the branch, version and environment that are set, by their names in ElevenLabs' API."""
        selection = {"branch_id": self.branch_id, "version_id": self.version_id, "environment": self.environment}
        return {name: value for name, value in selection.items() if value is not None}

    def __str__(self) -> str:
        return ", ".join([self.agent_id, *(f"{name} {value}" for name, value in self.selection.items())])


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """What opens one conversation: a signed URL (WebSocket) or a conversation token (WebRTC).

    `conversation_id` and `expires_at` (seconds since the epoch) are None if ElevenLabs did not name them. `is_warm`:
    it was fetched before a user asked. `sealed`: the credential encrypted; who reads only the ledger cannot use it.
    """

    secret: str = field(repr=False)
    conversation_id: str | None
    expires_at: float | None
    is_warm: bool = False
    sealed: bytes | None = field(default=None, repr=False)

    @property
    def sha256(self) -> str:
        """The only form of the secret that voicepass logs. The ledger stores it, and `sealed`."""
        return hashlib.sha256(self.secret.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class VoicePass:
    """Everything the frontend needs to open one conversation as one user."""

    transport: Transport
    credential: Credential
    agent: Agent
    user_id: str
    dynamic_variables: Mapping[str, Scalar]


class Scope(StrEnum):
    """Whose use a limit adds up."""

    USER = "user"
    AGENT = "agent"
    ALL = "all"


class Counted(StrEnum):
    """What a limit counts."""

    PASSES = "passes"
    REQUESTS = "requests"
    """Passes, and requests that reached ElevenLabs and failed."""
    CONVERSATIONS = "conversations"
    """Open at once: passes that may still be used, and conversations that have not ended."""
    SECONDS = "seconds"
    """Seconds of conversation: those used, and those reserved for what is still open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """At most `most` of `counted`, for each `scope`, in any window of `window_seconds`. `plan` names what sets it."""

    name: str
    scope: Scope
    counted: Counted
    most: int
    window_seconds: int
    plan: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """How much of a limit is used, and when it will be less (seconds since the epoch; None while nothing is used)."""

    limit: Limit
    used: int
    resets_at: float | None

    @property
    def left(self) -> int:
        """How much may still be used now."""
        return max(0, self.limit.most - self.used)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """A pass that the ledger counts before it exists. `seconds` is the longest that its conversation may last."""

    pass_id: str = field(default_factory=new_id)
    request_id: str
    token_issuer: str
    user_id: str
    agent_alias: str
    agent_id: str
    transport: Transport
    seconds: int
    plan: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """What a conversation used, as ElevenLabs reports it.

    `user_id` and `variable_user_id` are what the browser sent there: as its user, and as a dynamic variable.
    `cost` is in credits, `cost_fiat` in US dollars.
    """

    conversation_id: str
    seconds: int
    source: str
    cost: int | None = None
    user_id: str | None = None
    variable_user_id: str | None = None
    agent_id: str | None = None
    cost_fiat: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuedPass:
    """A row of the ledger: to whom a conversation was issued, and what became of it. It never holds the credential."""

    pass_id: str
    request_id: str
    token_issuer: str
    user_id: str
    agent_alias: str
    agent_id: str
    transport: str
    reserved_at: float
    lapses_at: float
    seconds: int
    granted_at: float | None
    conversation_id: str | None
    credential_sha256: str | None
    opened_at: float | None
    """When its conversation began, as ElevenLabs reports; None until voicepass learns of it."""
    settled_at: float | None
    settled_by: str | None
    cost: int | None
    reported_user_id: str | None
    cost_fiat: float | None = None
    plan: str | None = None

    @property
    def identity_mismatch(self) -> bool:
        """Whether the browser named another user to ElevenLabs than the one of the pass."""
        return self.reported_user_id not in {None, self.user_id}

    @property
    def lag_seconds(self) -> float:
        """From the pass to its settlement, without the conversation itself."""
        return max(0.0, (self.settled_at or self.reserved_at) - self.reserved_at - self.seconds)


class Turn(StrEnum):
    """Whose turn it is to look up what a user has open."""

    OURS = "ours"
    RUNNING = "running"
    """Another caller is looking it up."""
    PAUSED = "paused"
    """A lookup a moment ago changed nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupTurn:
    """Whether this caller may ask ElevenLabs now, and about which passes."""

    turn: Turn
    passes: Sequence[IssuedPass] = ()


class BlockKind(StrEnum):
    """What an operator can switch off."""

    USER = "user"
    AGENT = "agent"
    EVERYONE = "everyone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A user (of any issuer, or of one), an agent, or everyone, who gets no pass."""

    kind: BlockKind
    key: str = ""
    token_issuer: str = ""


def hash_user_id(user_id: str) -> str:
    """Return what the block of a forgotten user holds in place of the id."""
    return f"sha256:{hashlib.sha256(user_id.encode(errors='surrogatepass')).hexdigest()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What the ledger holds: conversations open now, and passes that should be settled by now and are not.

    Neither is counted beyond 10,000. `oldest_unsettled_seconds` is the age of the oldest unsettled pass, or 0.
    """

    open_conversations: int
    unsettled: int
    oldest_unsettled_seconds: float
