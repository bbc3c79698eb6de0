"""Every refusal voicepass can give: its stable code, its HTTP status, and the sentence its reader may see.

    Refusal
    ├── the caller must act ──  Malformed 400 · CredentialsConflict 400
    │   │                       TokenMissing 401 · TokenInvalid 401 · TokenExpired 401 · SignatureInvalid 401
    │   │                       OriginNotAllowed 403 · AgentNotAllowed 403 · UserBlocked 403
    │   │                       ConversationUnknown 404 · NotFound 404 · MethodNotAllowed 405
    │   │                       BodyTooLarge 413 · UnsupportedMediaType 415 · RequestInvalid 422
    │   │                       HeadersTooLarge 431
    │   └── LimitReached ─────  RateLimited 429 · QuotaExceeded 429 · TooManyConversations 429
    ├── we are at fault ──────  KeysUnavailable 503 · LedgerUnavailable 503 · Overloaded 503
    │                           ShuttingDown 503 · InternalError 500
    └── ElevenLabsRefusal ────  KeyRejected 502 · AgentUnknown 502 · BadAnswer 502
                                Busy 503 · QuotaExhausted 503 · Unavailable 503 · Timeout 504

`detail` is public: it never holds a vendor's text, a token or a key. `operator_note` is for the log alone: what went
wrong and what whoever runs the service should do about it. The technical cause is chained with `raise ... from`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar


class Refusal(Exception):
    """Something voicepass will not do, worded for the person who asked for it.

    `retry_after_seconds` is set where waiting helps; it becomes the `Retry-After` header.
    """

    code: ClassVar[str]
    status: ClassVar[int]
    title: ClassVar[str]
    detail: str
    retry_after_seconds: int | None = None
    headers: Mapping[str, str] = MappingProxyType({})
    checks: Mapping[str, str] = MappingProxyType({})
    """How each of the named checks of readiness ended, where one of them is the refusal."""
    has_reached_elevenlabs: bool = True
    """Whether ElevenLabs was asked, where the refusal came instead of its answer: then the request counts."""
    is_operators_fault: ClassVar[bool] = False
    """Whether it stays until whoever runs the service does something: the log says so as an error."""

    def __init__(
        self, detail: str | None = None, *, operator_note: str = "", retry_after_seconds: int | None = None
    ) -> None:
        if detail is not None:
            self.detail = detail
        if retry_after_seconds is not None:
            self.retry_after_seconds = retry_after_seconds
        self.operator_note = operator_note
        super().__init__(self.detail)


class Malformed(Refusal):
    code, status, title = "request_malformed", 400, "Not HTTP as it should be"
    detail = "The request is not HTTP/1.x, or is HTTP that two readers could take in two ways."


class TokenMissing(Refusal):
    code, status, title = "token_missing", 401, "No token"
    detail = "Send the user's JWT in the header 'Authorization: Bearer <token>'."


class TokenInvalid(Refusal):
    """`operator_note` names the check that failed; the caller only learns that one did."""

    code, status, title = "token_invalid", 401, "Token not accepted"
    detail = "The token was not accepted. Sign in again to get a new one; the service's log says which check failed."


class TokenExpired(Refusal):
    code, status, title = "token_expired", 401, "Token expired"
    detail = "The token has expired. Sign in again to get a new one."


class SignatureInvalid(Refusal):
    """`operator_note` names the check that failed; the sender only learns that one did."""

    code, status, title = "signature_invalid", 401, "Signature not accepted"
    detail = "The webhook's signature was not accepted; the service's log says which check failed."
    headers = MappingProxyType({"WWW-Authenticate": "ElevenLabs-Signature"})


class CredentialsConflict(Refusal):
    code, status, title = "credentials_conflict", 400, "Two users in one request"
    detail = "The Authorization header and the session cookie speak of different users. Send one of them."


class OriginNotAllowed(Refusal):
    code, status, title = "origin_not_allowed", 403, "Origin not allowed"
    detail = "This service does not answer pages of that origin. Whoever runs it can list it."


class AgentNotAllowed(Refusal):
    """The same answer for an alias that does not exist and one that is closed to this user: neither can be probed."""

    code, status, title = "agent_not_allowed", 403, "Agent not allowed"
    detail = "There is no agent of this name that you may use. Ask for it by its alias, or send none for the default."


class UserBlocked(Refusal):
    code, status, title = "user_blocked", 403, "Blocked"
    detail = "Passes are switched off for you at the moment. Whoever runs the service can switch them on again."


class LimitReached(Refusal):
    """A limit of the policy is reached: `most` in any window of `window_seconds`.

    `resets_at`: seconds since the epoch, from when a new try can succeed.
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
    ) -> None:
        super().__init__(operator_note=operator_note, retry_after_seconds=retry_after_seconds)
        self.resets_at = resets_at
        self.limit_name = limit_name
        self.most = most
        self.window_seconds = window_seconds


class RateLimited(LimitReached):
    code, status, title = "rate_limited", 429, "Too many passes"
    detail = "Too many passes were asked for. Wait until the reset."


class QuotaExceeded(LimitReached):
    code, status, title = "quota_exceeded", 429, "Minutes used up"
    detail = "The minutes of conversation are used up. Wait until the reset."


class TooManyConversations(LimitReached):
    code, status, title = "too_many_conversations", 429, "Too many conversations"
    detail = "Too many conversations are open at once. End one of them and try again."


class RequestInvalid(Refusal):
    code, status, title = "request_invalid", 422, "Request not understood"
    detail = (
        "Send no body, or a JSON object with nothing but 'agent' (an alias, as text) and the header "
        "'Content-Type: application/json'."
    )


class UnsupportedMediaType(Refusal):
    code, status, title = "unsupported_media_type", 415, "Not JSON"
    detail = "Send the header 'Content-Type: application/json', with a JSON body such as {}."


class BodyTooLarge(Refusal):
    code, status, title = "body_too_large", 413, "Body too large"
    detail = "The body is larger than 16 kB."


class HeadersTooLarge(Refusal):
    code, status, title = "headers_too_large", 431, "Headers too large"
    detail = "The request's headers are more than 100, or longer than 16 kB in all, or the token is longer than 8 kB."


class NotFound(Refusal):
    code, status, title = "not_found", 404, "No such route"
    detail = "There is nothing at this path. Paths are exact: mind a slash too many at the end."


class ConversationUnknown(Refusal):
    code, status, title = "conversation_unknown", 404, "Conversation unknown"
    detail = "This conversation was not issued here: do not act for anyone on its word."


class MethodNotAllowed(Refusal):
    code, status, title = "method_not_allowed", 405, "Method not allowed"
    detail = "This path does not answer that method; the header 'Allow' says which it does."


class InternalError(Refusal):
    is_operators_fault = True
    code, status, title = "internal_error", 500, "Internal error"
    detail = "Something broke inside voicepass. Give the request id to whoever runs it."


class KeysUnavailable(Refusal):
    """Fails closed: without its issuer's keys no token can be told from a forged one."""

    is_operators_fault = True
    code, status, title = "keys_unavailable", 503, "Signing keys unavailable"
    detail = "The keys that tokens are verified with cannot be had at the moment. Try again shortly."
    retry_after_seconds = 5


class LedgerUnavailable(Refusal):
    """Fails closed: a pass that nobody wrote down is not handed out."""

    is_operators_fault = True
    code, status, title = "ledger_unavailable", 503, "Ledger unavailable"
    detail = "The service cannot write down what it hands out, so it hands out nothing. Try again shortly."
    retry_after_seconds = 5


class Overloaded(Refusal):
    """Shed at once, so that those who are served are served in time."""

    has_reached_elevenlabs = False
    code, status, title = "overloaded", 503, "Too many at once"
    detail = "More passes are asked for at this moment than the service can give. Try again shortly."
    retry_after_seconds = 2


class ShuttingDown(Refusal):
    """Said by `/readyz` alone: until the end, whoever is sent here is served."""

    code, status, title = "shutting_down", 503, "Shutting down"
    detail = "This instance is about to end. It still serves, but send new requests to another."


class ElevenLabsRefusal(Refusal):
    """ElevenLabs gave no usable credential. The public detail never repeats ElevenLabs' own words.

    `vendor_code` is ElevenLabs' code for it, empty where it gave none.
    """

    is_operators_fault = True
    pause_seconds: float = 0.0
    """For how long ElevenLabs wants to be left alone; 0 where it did not say."""

    def __init__(
        self, *, operator_note: str = "", retry_after_seconds: int | None = None, vendor_code: str = ""
    ) -> None:
        super().__init__(operator_note=operator_note, retry_after_seconds=retry_after_seconds)
        self.vendor_code = vendor_code


class KeyRejected(ElevenLabsRefusal):
    code, status, title = "elevenlabs_key_rejected", 502, "ElevenLabs refused the service's key"
    detail = "ElevenLabs did not accept this service's API key. Whoever runs the service has to mend it."


class AgentUnknown(ElevenLabsRefusal):
    code, status, title = "elevenlabs_agent_unknown", 502, "ElevenLabs does not know the agent"
    detail = "ElevenLabs does not know the agent that this service is set up with. Whoever runs it has to mend it."


class BadAnswer(ElevenLabsRefusal):
    code, status, title = "elevenlabs_bad_answer", 502, "ElevenLabs gave an unusable answer"
    detail = "ElevenLabs answered with something that cannot be handed on safely. Try again; if it stays, report it."


class Busy(ElevenLabsRefusal):
    is_operators_fault = False
    code, status, title = "elevenlabs_busy", 503, "ElevenLabs is busy"
    detail = "ElevenLabs takes no further conversations at the moment. Try again shortly."
    retry_after_seconds = 5


class QuotaExhausted(ElevenLabsRefusal):
    code, status, title = "elevenlabs_quota_exhausted", 503, "ElevenLabs quota exhausted"
    detail = "This service's quota at ElevenLabs is used up. Whoever runs the service has to raise it."


class Unavailable(ElevenLabsRefusal):
    code, status, title = "elevenlabs_unavailable", 503, "ElevenLabs unavailable"
    detail = "ElevenLabs cannot be reached or is out of order. Try again shortly."
    retry_after_seconds = 5


class Timeout(ElevenLabsRefusal):
    is_operators_fault = False
    code, status, title = "elevenlabs_timeout", 504, "ElevenLabs took too long"
    detail = "ElevenLabs did not answer in time. Try again."
    retry_after_seconds = 2
