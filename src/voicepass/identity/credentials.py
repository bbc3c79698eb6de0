"""Find the tokens in a request: in its Authorization header, or in a session cookie that no other site can send.

A browser also sends a cookie with requests that other sites cause. So a cookie counts only on a POST from our own or a
listed origin, with a JSON body. A page of another site cannot send that without a preflight.
"""

import hashlib
import hmac
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile
from typing import Final, Self

from voicepass.errors import HeadersTooLarge, OriginNotAllowed, TokenInvalid, TokenMissing, UnsupportedMediaType
from voicepass.model import Credentials
from voicepass.outbound import is_safe_url

MAX_TOKEN_CHARACTERS: Final = 8192
MAX_COOKIES: Final = 8  # of one name: each one costs a verification

_FOR_BACKENDS: Final = "This route is for backends: send one of the service's VOICEPASS_SERVICE_TOKENS as bearer token."


@dataclass(frozen=True, slots=True)
class SessionCookie:
    """The cookie that may hold the token, and the origins besides our own whose pages may send it."""

    name: str
    allowed_origins: Collection[str]


def bearer_token(credentials: Credentials) -> str | None:
    """Return the one bearer token of the Authorization header (RFC 6750, section 2.1), or None if there is no header.

    Raises TokenMissing if the header holds none, TokenInvalid for two headers, or HeadersTooLarge.
    """
    if not credentials.authorization:
        return None
    if len(credentials.authorization) > 1:
        raise TokenInvalid(operator_note="token refused: more than one Authorization header")
    scheme, _, unverified_token = credentials.authorization[0].partition(" ")
    if scheme.lower() != "bearer" or not unverified_token.strip(" "):
        raise TokenMissing
    return _check_length(unverified_token.strip(" "))


def cookie_tokens(credentials: Credentials, session: SessionCookie) -> Sequence[str]:
    """Return the tokens in the session cookie. There may be several: a browser sends one per path and domain.

    Raises HeadersTooLarge, or TokenInvalid for more than MAX_COOKIES cookies and for a split cookie with a gap.
    """
    values: dict[str, list[str]] = defaultdict(list)
    for pair in (pair for header in credentials.cookies for pair in header.split(";")):
        name, _, value = pair.strip().partition("=")
        values[name].append(value)
    whole = values.get(session.name, [])
    tokens = [token for token in dict.fromkeys(whole + _join_parts(values, session.name)) if token]
    if len(tokens) > MAX_COOKIES:
        raise TokenInvalid(operator_note=f"token refused: more than {MAX_COOKIES} cookies are named {session.name}")
    return [_check_length(token) for token in tokens]


def _join_parts(values: Mapping[str, list[str]], name: str) -> list[str]:
    """Return the cookies that the browser got in parts: Auth.js and Supabase write NAME.0, NAME.1 and so on."""
    parts = list(takewhile(bool, (values.get(f"{name}.{number}", []) for number in count())))
    numbers = [other.removeprefix(f"{name}.") for other in values if other.startswith(f"{name}.")]
    is_whole = sum(number.isdecimal() for number in numbers) == len(parts) and len(set(map(len, parts))) <= 1
    if is_whole:
        return ["".join(set_of_parts) for set_of_parts in zip(*parts, strict=True)]
    if name in values:
        return []
    raise TokenInvalid(operator_note=f"token refused: a part of the split cookie {name} is missing")


def check_own_site(credentials: Credentials, session: SessionCookie) -> None:
    """Raise OriginNotAllowed or UnsupportedMediaType unless one of our own pages sent the cookie."""
    _check_page(credentials, session.allowed_origins)
    if credentials.media_type != "application/json":
        raise UnsupportedMediaType


def check_page_of_app(credentials: Credentials, allowed_origins: Collection[str]) -> None:
    """Raise OriginNotAllowed if a page of another site may have sent the cookie of the app around voicepass."""
    # A client that sends none is no browser, such as a phone app. A browser may add a password instead of a cookie.
    if credentials.cookies or credentials.origin is not None or credentials.fetch_site is not None:
        _check_page(credentials, {f"{credentials.scheme}://{credentials.host}", *allowed_origins})


def _check_page(credentials: Credentials, allowed_origins: Collection[str]) -> None:
    # Pages cannot set Sec-Fetch-Site. Browsers send it only to https and loopback, and some then leave Origin out.
    origin = credentials.origin
    own_origins = (None, f"https://{credentials.host}", f"http://{credentials.host}")
    is_secure = origin is None or is_safe_url(origin)
    same_origin = credentials.fetch_site == "same-origin" and origin in own_origins and is_secure
    if origin not in allowed_origins and not same_origin:
        raise OriginNotAllowed(
            operator_note="a session cookie came from a page that is neither ours nor listed, or not over https; if a "
            "proxy rewrites the Host header, list the public origin of the page in VOICEPASS_ALLOWED_ORIGINS"
        )


def _check_length(unverified_token: str) -> str:
    if len(unverified_token) > MAX_TOKEN_CHARACTERS:
        raise HeadersTooLarge
    return unverified_token


@dataclass(frozen=True, slots=True)
class ServiceToken:
    """The bearer token of one of the operator's backends, and its name in the log."""

    name: str
    token: str = field(repr=False)

    @classmethod
    def parse(cls, entry: str) -> Self:
        """Parse `name:token`, or a token alone. The name of a token alone is the start of its SHA-256."""
        name, colon, token = entry.partition(":")
        return cls(name, token) if colon else cls(_sha256(entry).hex()[:8], entry)


class ServiceTokens:
    """The bearer tokens of the operator's own backends: it keeps their hashes, and compares them in constant time."""

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
