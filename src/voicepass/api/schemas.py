"""The shapes of requests and answers, as the contract and the OpenAPI document show them."""

from datetime import UTC, datetime
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field

from voicepass import errors
from voicepass.api.problems import PROBLEM_JSON, problem_body
from voicepass.errors import Refusal
from voicepass.model import DEFAULT_ALIAS, Grant, Scalar, VoicePass

Alias = Annotated[str, Field(min_length=1, max_length=64, description="The agent's alias; never its ElevenLabs id.")]


class PassBody(BaseModel):
    """What a frontend may ask for. No body at all asks for the default agent."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"example": {"agent": DEFAULT_ALIAS}})

    agent: Alias = DEFAULT_ALIAS


class _PassFields(BaseModel):
    conversation_id: str | None = Field(
        description="The one conversation this opens; null in the rare case that ElevenLabs does not tell.",
        examples=["conv_01k0example"],
    )
    agent: str = Field(examples=["default"])
    agent_id: str = Field(examples=["agent_01k0example"])
    expires_at: datetime | None = Field(
        description="The conversation must begin before; an open one is not cut.", examples=["2026-11-22T12:15:00Z"]
    )
    user_id: str = Field(examples=["u-1"])
    dynamic_variables: dict[str, Scalar] = Field(examples=[{"user_id": "u-1", "user_name": "Ada"}])

    @classmethod
    def of(cls, voice_pass: VoicePass) -> Self:
        """Show a pass as this answer."""
        credential = voice_pass.credential
        expires_at = credential.expires_at
        return cls.model_validate(
            {
                "signed_url": credential.secret,  # each answer takes the one
                "conversation_token": credential.secret,  # of these two that it has
                "conversation_id": credential.conversation_id,
                "agent": voice_pass.agent.alias,
                "agent_id": voice_pass.agent.agent_id,
                "expires_at": None if expires_at is None else datetime.fromtimestamp(int(expires_at), UTC),
                "user_id": voice_pass.user_id,
                "dynamic_variables": dict(voice_pass.dynamic_variables),
            }
        )


class _SignedUrl(BaseModel):
    signed_url: str = Field(
        description="Opens one conversation, once, within 15 minutes.",
        examples=["wss://api.elevenlabs.io/v1/convai/conversation?agent_id=agent_…&conversation_signature=cvtkn_…"],
    )


class _ConversationToken(BaseModel):
    conversation_token: str = Field(description="Opens one conversation over WebRTC.", examples=["eyJ…"])


class SignedUrlPass(_PassFields, _SignedUrl):  # bases in this order: the credential is shown first
    """A pass for the WebSocket: hand its parts to the SDK's `startSession`."""


class ConversationTokenPass(_PassFields, _ConversationToken):
    """A pass for WebRTC: hand its parts to the SDK's `startSession`."""


class Problem(BaseModel):
    """Why a request was refused, and what to do (RFC 9457)."""

    type: str = Field(examples=["urn:voicepass:problem:token_expired"])
    title: str
    status: int
    detail: str = Field(description="What whoever reads this should do.")
    code: str = Field(description="Stable; branch on this.", examples=["token_expired"])
    request_id: str = Field(description="The line to look for in the service's log.")
    retry_after_seconds: int | None = None


class IssuedConversation(BaseModel):
    """To whom a conversation was issued. `user_id` is exact, as `token_issuer` wrote it: the two name one person."""

    conversation_id: str = Field(examples=["conv_01k0example"])
    user_id: str = Field(examples=["u-1"])
    token_issuer: str = Field(examples=["https://login.example"])
    agent: str = Field(examples=["default"])
    agent_id: str = Field(examples=["agent_01k0example"])
    issued_at: datetime = Field(examples=["2026-11-22T12:00:00Z"])
    request_id: str = Field(description="The line of the service's log that granted it.")

    @classmethod
    def of(cls, grant: Grant) -> Self:
        """Show a grant as this answer."""
        return cls(
            conversation_id=grant.conversation_id or "",
            user_id=grant.user_id,
            token_issuer=grant.token_issuer,
            agent=grant.agent_alias,
            agent_id=grant.agent_id,
            issued_at=datetime.fromtimestamp(int(grant.granted_at), UTC),
            request_id=grant.request_id,
        )


ANYWHERE: tuple[type[Refusal], ...] = (
    errors.Malformed,
    errors.BodyTooLarge,
    errors.HeadersTooLarge,
    errors.RequestInvalid,
    errors.InternalError,
)
"""What any route may answer."""

OF_A_PASS: tuple[type[Refusal], ...] = (
    errors.CredentialsConflict,
    errors.TokenMissing,
    errors.TokenInvalid,
    errors.TokenExpired,
    errors.OriginNotAllowed,
    errors.AgentNotAllowed,
    errors.UnsupportedMediaType,
    errors.KeysUnavailable,
    errors.LedgerUnavailable,
    errors.KeyRejected,
    errors.AgentUnknown,
    errors.BadAnswer,
    errors.Busy,
    errors.QuotaExhausted,
    errors.Unavailable,
    errors.Timeout,
)
"""What a request for a pass may be answered with besides."""

OF_A_CONVERSATION: tuple[type[Refusal], ...] = (
    errors.TokenMissing,
    errors.TokenInvalid,
    errors.ConversationUnknown,
    errors.LedgerUnavailable,
)


def refusals(*kinds: type[Refusal]) -> dict[int | str, dict[str, Any]]:
    """Describe refusals for the OpenAPI document: by status, with an example for each code."""
    responses: dict[int | str, dict[str, Any]] = {}
    for refusal in (*kinds, *ANYWHERE):
        known = responses.setdefault(refusal.status, {"description": "", "content": {PROBLEM_JSON: _shape()}})
        known["description"] = f"{known['description']} · `{refusal.code}`".removeprefix(" · ")
        example = problem_body(refusal(), request_id="3f0c8c1e4b7a4d0c9d9d6f1f2b8b6a57")
        known["content"][PROBLEM_JSON]["examples"][refusal.code] = {"value": example}
    return responses


def _shape() -> dict[str, Any]:
    return {"schema": Problem.model_json_schema(), "examples": {}}
