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

`detail` is for the end user or the frontend's developer: short, without blame, without anything that only the operator
can use. It never holds a vendor's text, a token or a key. `operator_note` is for the log only: what failed and what the
operator should do. The technical cause is chained with `raise ... from`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar


class Refusal(Exception):
    """What voicepass will not do, in words for the caller. It is complete when it is raised: nothing changes it later.

    `operator_note` is for the log. `retry_after_seconds` is set if waiting helps; it becomes the `Retry-After` header.
    `checks` holds the outcome of each readiness check, if one of them failed.
    """

    code: ClassVar[str]
    status: ClassVar[int]
    title: ClassVar[str]
    detail: str
    operator_note: str = ""
    retry_after_seconds: int | None = None
    is_operators_fault: ClassVar[bool] = False
    """Whether only the operator can end it: then it is logged as an error."""
    has_reached_elevenlabs: bool = True
    """Whether voicepass called ElevenLabs before it refused. If so, the request counts as one that reached it."""

    def __init__(
        self,
        detail: str | None = None,
        *,
        operator_note: str = "",
        retry_after_seconds: int | None = None,
        checks: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        if detail is not None:
            self.detail = detail
        if retry_after_seconds is not None:
            self.retry_after_seconds = retry_after_seconds
        if operator_note:
            self.operator_note = operator_note
        self.checks = checks
        super().__init__(self.detail)


class Malformed(Refusal):
    code, status, title = "request_malformed", 400, "Malformed request"
    detail = "The request is not valid HTTP/1.x, or two servers could understand it differently."


class TokenMissing(Refusal):
    code, status, title = "token_missing", 401, "No token"
    detail = "Send the user's JWT in the header 'Authorization: Bearer <token>'."


class TokenInvalid(Refusal):
    """`operator_note` names the check that failed; the caller only learns that one did."""

    code, status, title = "token_invalid", 401, "Token not accepted"
    detail = "The token was not accepted. Sign in again to get a new one."


class TokenExpired(Refusal):
    code, status, title = "token_expired", 401, "Token expired"
    detail = "The token has expired. Sign in again to get a new one."


class SignatureInvalid(Refusal):
    """`operator_note` names the check that failed; the sender only learns that one did."""

    code, status, title = "signature_invalid", 401, "Signature not accepted"
    detail = "The webhook's signature was not accepted."


class CredentialsConflict(Refusal):
    code, status, title = "credentials_conflict", 400, "Two users in one request"
    detail = "The Authorization header and the session cookie name different users. Send only one of them."
    operator_note = "the frontend sends the tokens of two users: let it send the header or the cookie, not both"


class OriginNotAllowed(Refusal):
    code, status, title = "origin_not_allowed", 403, "Origin not allowed"
    detail = "Web pages of this origin may not use this service."


class AgentNotAllowed(Refusal):
    """The same answer if the alias does not exist and if this user may not use it: nobody can find out which."""

    code, status, title = "agent_not_allowed", 403, "Agent not allowed"
    detail = "This agent is not available to you."


class UserBlocked(Refusal):
    code, status, title = "user_blocked", 403, "Blocked"
    detail = "You cannot start a conversation at the moment. Contact support."
    operator_note = "a block is set: `voicepass blocks` lists all, and `voicepass unblock` removes one"


class LimitReached(Refusal):
    """A limit of the policy is reached: `most` in any window of `window_seconds`.

    `resets_at`: seconds since the epoch, from when a new try can succeed. `plan`: the plan that sets the limit.
    """

    def __init__(
        self,
        *,
        operator_note: str = "",
        retry_after_seconds: int | None = None,
        resets_at: float = 0.0,
        limit_name: str = "",
        most: int = 0,
        window_seconds: int = 0,
        plan: str | None = None,
    ) -> None:
        super().__init__(operator_note=operator_note, retry_after_seconds=retry_after_seconds)
        self.resets_at = resets_at
        self.limit_name = limit_name
        self.most = most
        self.window_seconds = window_seconds
        self.plan = plan


class RateLimited(LimitReached):
    code, status, title = "rate_limited", 429, "Too many passes"
    detail = "Too many conversations were started. Try again later."


class QuotaExceeded(LimitReached):
    code, status, title = "quota_exceeded", 429, "Minutes used up"
    detail = "The minutes of conversation are used up. Try again later."


class TooManyConversations(LimitReached):
    code, status, title = "too_many_conversations", 429, "Too many conversations"
    detail = "Too many conversations are open at once. End one, or try again later."


class RequestInvalid(Refusal):
    code, status, title = "request_invalid", 422, "Request not understood"
    detail = "Send no body, or a JSON object with only 'agent' (an alias), with 'Content-Type: application/json'."


class UnsupportedMediaType(Refusal):
    code, status, title = "unsupported_media_type", 415, "Not JSON"
    detail = "Send the header 'Content-Type: application/json', with a JSON body such as {}."


class BodyTooLarge(Refusal):
    code, status, title = "body_too_large", 413, "Body too large"
    detail = "The body is larger than 16 kB."


class HeadersTooLarge(Refusal):
    code, status, title = "headers_too_large", 431, "Headers too large"
    detail = "The request has more than 100 headers, more than 16 kB of headers, or a token of more than 8 kB."


class NotFound(Refusal):
    code, status, title = "not_found", 404, "No such route"
    detail = "There is nothing at this path. Check for an extra slash at the end."


class ConversationUnknown(Refusal):
    code, status, title = "conversation_unknown", 404, "Conversation unknown"
    detail = "This service did not issue this conversation. Do not act for any user because of it."


class MethodNotAllowed(Refusal):
    code, status, title = "method_not_allowed", 405, "Method not allowed"
    detail = "This path does not answer that method. The header 'Allow' lists the methods that it answers."


class InternalError(Refusal):
    is_operators_fault = True
    code, status, title = "internal_error", 500, "Internal error"
    detail = "Something went wrong. Try again. If it happens again, give support the request id."


class KeysUnavailable(Refusal):
    """Fails closed: without the issuer's keys, voicepass cannot distinguish a token from a forged one."""

    is_operators_fault = True
    code, status, title = "keys_unavailable", 503, "Signing keys unavailable"
    detail = "Your sign-in cannot be checked at the moment. Try again shortly."
    retry_after_seconds = 5


class LedgerUnavailable(Refusal):
    """Fails closed: voicepass returns no pass that the ledger does not hold."""

    is_operators_fault = True
    code, status, title = "ledger_unavailable", 503, "Ledger unavailable"
    detail = "This service is not available at the moment. Try again shortly."
    retry_after_seconds = 5


class Overloaded(Refusal):
    """voicepass refuses at once, so that the requests in flight finish in time."""

    has_reached_elevenlabs = False
    code, status, title = "overloaded", 503, "Too many at once"
    detail = "This service is busy at the moment. Try again shortly."
    retry_after_seconds = 2


class ShuttingDown(Refusal):
    """Only the answer of `/readyz`. Until the process ends, it serves every request."""

    code, status, title = "shutting_down", 503, "Shutting down"
    detail = "This instance is about to end. It still serves requests, but send new ones to another instance."


class NotStarted(Refusal):
    """Every answer of a service that an app mounted without its lifespan."""

    code, status, title = "not_started", 503, "Not started"
    detail = (
        "The app around voicepass did not start it: write voicepass.mount(app, path) "
        "instead of app.mount(path, create_app())."
    )


class ElevenLabsRefusal(Refusal):
    """ElevenLabs gave no usable credential. The public detail never repeats ElevenLabs' own words.

    `vendor_code`: ElevenLabs' own, or empty. `pause_seconds`: how long it asked to wait. `may_retry`: a retry may help.
    """

    is_operators_fault = True

    def __init__(
        self,
        *,
        operator_note: str = "",
        retry_after_seconds: int | None = None,
        vendor_code: str = "",
        pause_seconds: float = 0.0,
        may_retry: bool = False,
        has_reached_elevenlabs: bool = True,
    ) -> None:
        super().__init__(operator_note=operator_note, retry_after_seconds=retry_after_seconds)
        self.vendor_code, self.pause_seconds, self.may_retry = vendor_code, pause_seconds, may_retry
        self.has_reached_elevenlabs = has_reached_elevenlabs


class KeyRejected(ElevenLabsRefusal):
    code, status, title = "elevenlabs_key_rejected", 502, "ElevenLabs refused the service's key"
    detail = "This service cannot start a conversation at the moment."


class AgentUnknown(ElevenLabsRefusal):
    code, status, title = "elevenlabs_agent_unknown", 502, "ElevenLabs does not know the agent"
    detail = "This service cannot start a conversation at the moment."


class BadAnswer(ElevenLabsRefusal):
    code, status, title = "elevenlabs_bad_answer", 502, "ElevenLabs gave an unusable answer"
    detail = "This service cannot start a conversation at the moment. Try again."


class Busy(ElevenLabsRefusal):
    is_operators_fault = False
    code, status, title = "elevenlabs_busy", 503, "ElevenLabs is busy"
    detail = "Too many conversations are open at the moment. Try again shortly."
    retry_after_seconds = 5


class QuotaExhausted(ElevenLabsRefusal):
    code, status, title = "elevenlabs_quota_exhausted", 503, "ElevenLabs quota exhausted"
    detail = "This service cannot start a conversation at the moment."


class Unavailable(ElevenLabsRefusal):
    code, status, title = "elevenlabs_unavailable", 503, "ElevenLabs unavailable"
    detail = "This service cannot start a conversation at the moment. Try again shortly."
    retry_after_seconds = 5


class Timeout(ElevenLabsRefusal):
    is_operators_fault = False
    code, status, title = "elevenlabs_timeout", 504, "ElevenLabs took too long"
    detail = "The conversation could not be started in time. Try again."
    retry_after_seconds = 2
