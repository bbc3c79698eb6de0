"""Which token a request offers: that of its Authorization header, or a session cookie where no other site can send it.

A browser attaches a cookie to requests that other sites cause. So a cookie counts only on a POST, from an origin that
is ours or listed, with a JSON body, which no foreign form can send without asking first.
"""

import hashlib
import hmac
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

from voicepass.errors import HeadersTooLarge, OriginNotAllowed, TokenInvalid, TokenMissing, UnsupportedMediaType
from voicepass.model import Credentials
from voicepass.outbound import is_safe_url

MAX_TOKEN_CHARACTERS: Final = 8192

_FOR_BACKENDS: Final = "This route is for backends: send one of the service's VOICEPASS_SERVICE_TOKENS as bearer token."


@dataclass(frozen=True, slots=True)
class SessionCookie:
    """The cookie that may carry the token, and the origins, besides our own, whose pages may use it."""

    name: str
    allowed_origins: Collection[str]


def bearer_token(credentials: Credentials) -> str | None:
    """Return the one bearer token of the Authorization header (RFC 6750, section 2.1), or None if there is no header.

    Raises TokenMissing for a header without one, TokenInvalid for two headers, HeadersTooLarge.
    """
    if not credentials.authorization:
        return None
    if len(credentials.authorization) > 1:
        raise TokenInvalid(operator_note="token refused: more than one Authorization header")
    scheme, _, unverified_token = credentials.authorization[0].partition(" ")
    if scheme.lower() != "bearer" or not unverified_token.strip(" "):
        raise TokenMissing
    return _of_bearable_length(unverified_token.strip(" "))


def cookie_token(credentials: Credentials, session: SessionCookie) -> str | None:
    """Return the token in the session cookie, or None. Raises TokenInvalid where it is there twice."""
    pairs = [pair.strip().partition("=") for header in credentials.cookies for pair in header.split(";")]
    values = [value for name, _, value in pairs if name == session.name]
    if len(values) > 1:
        raise TokenInvalid(operator_note="token refused: the session cookie was sent more than once")
    return _of_bearable_length(values[0]) if values and values[0] else None


def check_own_site(credentials: Credentials, session: SessionCookie) -> None:
    """Let a cookie count only where our own pages sent it. Raises OriginNotAllowed or UnsupportedMediaType."""
    # Only the browser sets Sec-Fetch-Site, and only for https and loopback; older ones leave Origin out beside it.
    origin = credentials.origin
    own_origins = (None, f"https://{credentials.host}", f"http://{credentials.host}")
    is_secure = origin is None or is_safe_url(origin)
    same_origin = credentials.fetch_site == "same-origin" and origin in own_origins and is_secure
    if origin not in session.allowed_origins and not same_origin:
        raise OriginNotAllowed(
            operator_note="a session cookie came from a page that is neither ours nor listed, or not over https; if a "
            "proxy rewrites the Host header, list the public origin of the page in VOICEPASS_ALLOWED_ORIGINS"
        )
    if credentials.media_type != "application/json":
        raise UnsupportedMediaType


def _of_bearable_length(unverified_token: str) -> str:
    if len(unverified_token) > MAX_TOKEN_CHARACTERS:
        raise HeadersTooLarge
    return unverified_token


@dataclass(frozen=True, slots=True)
class ServiceToken:
    """The bearer token of one of the operator's backends, and the name that the log gives it."""

    name: str
    token: str = field(repr=False)

    @classmethod
    def parse(cls, entry: str) -> Self:
        """Read `name:token`, or a token alone: its name is then the start of its SHA-256."""
        name, colon, token = entry.partition(":")
        return cls(name, token) if colon else cls(_sha256(entry).hex()[:8], entry)


class ServiceTokens:
    """The bearer tokens of the operator's own backends. Only their hashes are kept, and compared in constant time."""

    def __init__(self, tokens: Sequence[ServiceToken]) -> None:
        self._names = {_sha256(token.token): token.name for token in tokens}

    def check(self, credentials: Credentials) -> str:
        """Return the name of the token that the request carries, or raise TokenMissing or TokenInvalid."""
        if not self._names:
            raise TokenInvalid(_FOR_BACKENDS, operator_note="VOICEPASS_SERVICE_TOKENS is not set")
        token = bearer_token(credentials)
        if token is None:
            raise TokenMissing(_FOR_BACKENDS)
        offered = _sha256(token)
        matching = [name for known, name in self._names.items() if hmac.compare_digest(known, offered)]
        if not matching:
            raise TokenInvalid(_FOR_BACKENDS, operator_note="it is none of VOICEPASS_SERVICE_TOKENS")
        return matching[0]


def _sha256(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
