"""The bodies of requests and answers. The OpenAPI document is made from them."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal, Self

from fastapi import FastAPI
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from voicepass import errors
from voicepass.api.problems import PROBLEM_JSON, Instant, Problem
from voicepass.elevenlabs import find_livekit_url
from voicepass.errors import Refusal
from voicepass.ledger.extensions import MAX_MINUTES
from voicepass.model import DEFAULT_ALIAS, BlockKind, Counted, IssuedPass, Scalar, Usage, User, VoicePass


class PassBody(BaseModel):
    """What a frontend may ask for. No body at all asks for the default agent."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"example": {"agent": DEFAULT_ALIAS}})

    agent: str = Field(
        DEFAULT_ALIAS, min_length=1, max_length=64, description="The agent's alias; never its ElevenLabs id."
    )


class _PassFields(BaseModel):
    conversation_id: str | None = Field(
        description="The one conversation this opens; null if ElevenLabs names none.", examples=["conv_01k0example"]
    )
    agent: str = Field(examples=["default"])
    agent_id: str = Field(examples=["agent_01k0example"])
    expires_at: Instant | None = Field(
        description="The conversation must begin before this instant.", examples=["2026-11-22T12:15:00Z"]
    )
    user_id: str = Field(examples=["u-1"])
    dynamic_variables: dict[str, Scalar] = Field(examples=[{"user_id": "u-1", "user_name": "Ada"}])

    @classmethod
    def of(cls, voice_pass: VoicePass) -> Self:
        """Make the answer for a pass."""
        credential = voice_pass.credential
        return cls.model_validate(
            {
                "signed_url": credential.secret,  # Each answer has one of these two fields;
                "conversation_token": credential.secret,  # pydantic ignores the other.
                "livekit_url": find_livekit_url(voice_pass.agent.base_url),
                "conversation_id": credential.conversation_id,
                "agent": voice_pass.agent.alias,
                "agent_id": voice_pass.agent.agent_id,
                "expires_at": credential.expires_at,
                "user_id": voice_pass.user_id,
                "dynamic_variables": voice_pass.dynamic_variables,
            }
        )


class _SignedUrl(BaseModel):
    signed_url: str = Field(
        description="Opens one conversation, once, within 15 minutes.",
        examples=["wss://api.elevenlabs.io/v1/convai/conversation?agent_id=agent_…&conversation_signature=cvtkn_…"],
    )


class _ConversationToken(BaseModel):
    conversation_token: str = Field(description="Opens one conversation over WebRTC.", examples=["eyJ…"])
    livekit_url: str | None = Field(description="The SDK's `livekitUrl`; null if the region's host is not known.")


class SignedUrlPass(_PassFields, _SignedUrl):  # in this order, the credential is the first field
    """A pass for the WebSocket: pass its members to the SDK's `startSession`."""


class ConversationTokenPass(_PassFields, _ConversationToken):
    """A pass for WebRTC: pass its members to the SDK's `startSession`."""


class Ready(BaseModel):
    """The service can hand out passes. A check that is not `ok` says what is missing."""

    status: Literal["ready"]
    ledger: str = Field(description="The same as in `checks`; older probes read it here.", examples=["ok"])
    checks: dict[str, str] = Field(examples=[{"settings": "ok", "ledger": "ok", "keys": "ok", "elevenlabs": "ok"}])


class IssuedConversation(BaseModel):
    """To whom a conversation was issued. `token_issuer` and `user_id` together name one person."""

    conversation_id: str = Field(examples=["conv_01k0example"])
    user_id: str = Field(examples=["u-1"])
    token_issuer: str = Field(examples=["https://login.example"])
    agent: str = Field(examples=["default"])
    agent_id: str = Field(examples=["agent_01k0example"])
    issued_at: Instant = Field(examples=["2026-11-22T12:00:00Z"])
    settled_at: Instant | None = Field(description="When voicepass learned how long it was; null until then.")
    seconds: int | None = Field(description="How long it really was; null until then.", examples=[84])
    seconds_left: int | None = Field(
        description="How long its user may still talk; null if no limit counts the user's minutes.", examples=[516]
    )
    identity_mismatch: bool = Field(description="The browser told ElevenLabs another user id than this one.")
    reported_user_id: str | None = Field(description="The user id that the browser told ElevenLabs; null if none.")
    request_id: str = Field(description="The line of the service's log that granted it.")

    @classmethod
    def of(cls, issued: IssuedPass, *, seconds_left: int | None) -> Self:
        """Make the answer for a row of the ledger."""
        seconds = None if issued.settled_at is None else issued.seconds
        times = {"issued_at": issued.reserved_at, "seconds": seconds, "seconds_left": seconds_left}
        names = {"agent": issued.agent_alias, "identity_mismatch": issued.identity_mismatch}
        return cls.model_validate(asdict(issued) | names | times)


class _Used(BaseModel):
    unit: Literal["passes", "conversations", "seconds"]
    used: int = Field(description="Seconds reserved for open conversations count as used.", examples=[684])
    resets_at: Instant | None = Field(description="When `used` will be lower; null while it is 0.")


class LimitUsage(_Used):
    """How much of one limit a user has used. `limit`, `used` and `remaining` count `unit`."""

    name: str = Field(description="As in `RateLimit-Policy`.", examples=["user_minutes_per_day"])
    limit: int = Field(examples=[3600])
    remaining: int = Field(examples=[2916])


class OldLimitUsage(_Used):
    """The same with older names: `limit` is the name, `most` the limit, and `left` what remains."""

    limit: str = Field(examples=["user_minutes_per_day"])
    most: int = Field(examples=[3600])
    left: int = Field(examples=[2916])


class UserUsage(BaseModel):
    """How much of each limit a user has used."""

    user_id: str = Field(examples=["u-1"])
    plan: str | None = Field(description="The plan whose limits apply; null if none does.", examples=["pro"])
    usage: list[LimitUsage]
    limits: list[OldLimitUsage] = Field(deprecated="Use `usage`: the next release has no `limits`.")

    @classmethod
    def of(cls, user: User, plan: str | None, answers: Sequence[Usage]) -> Self:
        """Make the answer from the ledger's answers, limit by limit."""
        usage, limits = [], []
        for answer in answers:
            limit = answer.limit
            unit = "passes" if limit.counted is Counted.REQUESTS else limit.counted.value
            used = {"unit": unit, "used": answer.used, "resets_at": answer.resets_at}
            usage.append(used | {"name": limit.name, "limit": limit.most, "remaining": answer.left})
            limits.append(used | {"limit": limit.name, "most": limit.most, "left": answer.left})
        return cls.model_validate({"user_id": user.id, "plan": plan, "usage": usage, "limits": limits})


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class UserBlock(_Body):
    """A user with this id: of every issuer, or of one."""

    kind: Literal[BlockKind.USER]
    key: str = Field(pattern="^[^\\x00]{1,255}$", description="The user's id.", examples=["u-1"])
    token_issuer: str = Field("", pattern="^[^\\x00]{0,255}$", description="Empty for every issuer.")


class AgentBlock(_Body):
    """An agent, by its alias."""

    kind: Literal[BlockKind.AGENT]
    key: str = Field(pattern="^[^\\x00]{1,64}$", description="The agent's alias.", examples=["default"])


class EveryoneBlock(_Body):
    """Everyone."""

    kind: Literal[BlockKind.EVERYONE]


BlockBody = Annotated[UserBlock | AgentBlock | EveryoneBlock, Field(discriminator="kind")]
"""Who gets no more passes."""


class ExtendedUser(_Body):
    """Whose extension it is: that of a user with this id, of every issuer or of one."""

    user_id: str = Field(pattern="^[^\\x00]{1,255}$", examples=["u-1"])
    token_issuer: str = Field("", pattern="^[^\\x00]{0,255}$", description="Empty for every issuer.")


class UserExtension(ExtendedUser):
    """More minutes for one user: they are added to each of the user's limits of minutes."""

    minutes: int = Field(strict=True, ge=1, le=MAX_MINUTES, examples=[30])
    ends_at: AwareDatetime = Field(description="Within ten years.", examples=["2026-12-31T23:59:59Z"])


class Extended(BaseModel):
    """The extension is set."""

    is_known_user: bool = Field(description="Whether this user has ever got a pass. If not, check the id.")


class Extensions(BaseModel):
    """All extensions that have not ended, the next to end first."""

    extensions: list[UserExtension]


def list_refusals(route: str) -> list[type[Refusal]]:
    """Return the refusals with which routes of this kind may answer; `refusals.toml` has the kinds."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Refusal)]
    return [kind for kind in kinds if {route, "any"}.intersection(kind.routes)]


def describe_refusals(route: str) -> dict[int | str, dict[str, Any]]:
    """Describe refusals for the OpenAPI document: one type of problem, and the codes of each status."""
    codes: dict[int, list[str]] = {}
    for refusal in list_refusals(route):
        codes.setdefault(refusal.status, []).append(f"`{refusal.code}`")
    content = {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": " · ".join(names), "content": content} for status, names in codes.items()}


class DocumentedApp(FastAPI):
    """Its OpenAPI document has the type of all refusals once."""

    def openapi(self) -> dict[str, Any]:
        """Return the document."""
        document = super().openapi()
        document["components"]["schemas"]["Problem"] = Problem.model_json_schema()
        return document
