"""The nouns: who asks, for which agent, what they are given, and what is remembered of it."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

Clock = Callable[[], float]
"""Wall time in seconds since the epoch; injected everywhere, so that tests own the time."""

Scalar = str | int | float | bool
"""All that a dynamic variable may be (ElevenLabs, "Dynamic variables")."""

DEFAULT_ALIAS = "default"


class Transport(StrEnum):
    """How the frontend will open the conversation, and so which credential it needs."""

    WEBSOCKET = "websocket"
    WEBRTC = "webrtc"


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Everything in a request that may say who sent it: header values as they came, none of them trusted."""

    authorization: tuple[str, ...] = field(default=(), repr=False)
    cookies: tuple[str, ...] = field(default=(), repr=False)
    is_post: bool = False
    origin: str | None = None
    fetch_site: str | None = None
    host: str | None = None
    media_type: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRequest:
    """One request as it arrived: nothing in it is trusted yet. `client`: the address it came from."""

    request_id: str
    credentials: Credentials
    alias: str
    transport: Transport
    client: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """A signed-in user: who vouched for them (`issuer`), their exact `id` there, and every claim that was signed."""

    issuer: str
    id: str
    name: str | None
    claims: Mapping[str, object] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """A voice agent at ElevenLabs, known to frontends by its alias only."""

    alias: str
    agent_id: str
    base_url: str
    """The ElevenLabs host of its workspace: each residency region has one, with keys and agents of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """What opens one conversation: a signed URL (WebSocket) or a conversation token (WebRTC).

    `conversation_id` and `expires_at` (seconds since the epoch) are None where ElevenLabs did not tell.
    """

    secret: str = field(repr=False)
    conversation_id: str | None
    expires_at: float | None

    @property
    def sha256(self) -> str:
        """The only trace of the secret that may be stored or logged."""
        return hashlib.sha256(self.secret.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class VoicePass:
    """Everything the frontend needs to open one conversation as one user."""

    transport: Transport
    credential: Credential
    agent: Agent
    user_id: str
    dynamic_variables: Mapping[str, Scalar]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """The row behind a pass: to whom this conversation was issued. Holds a hash of the credential, never itself."""

    request_id: str
    granted_at: float
    token_issuer: str
    user_id: str
    agent_alias: str
    agent_id: str
    transport: Transport
    conversation_id: str | None
    credential_sha256: str
    expires_at: float | None


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One request for a pass, granted or refused: filled in as facts are learnt, shown to the observers once.

    `outcome` is "granted", "cancelled" (the caller hung up) or the refusal's code; `operator_note` is for the log.
    """

    request_id: str
    transport: Transport
    alias: str
    client: str | None = None
    user: User | None = None
    agent: Agent | None = None
    conversation_id: str | None = None
    credential_sha256: str | None = None
    outcome: str = "internal_error"
    operator_note: str = ""
    cause: BaseException | None = None
    duration_seconds: float = 0.0


def claim_at(claims: Mapping[str, object], path: str) -> object:
    """Return the claim called `path`, or the nested one that its dots lead to, or None.

    The exact name goes first, because namespaced claims such as `https://example.com/plan` hold dots themselves.
    """
    if path in claims:
        return claims[path]
    value: object = claims
    for step in path.split("."):
        if not isinstance(value, Mapping) or step not in value:
            return None
        value = value[step]
    return value
