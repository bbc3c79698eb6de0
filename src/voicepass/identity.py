"""From an unverified token to a User: every check spelled out, in the order of RFC 8725.

python-jose computes the signature; nothing else of a token is left to it, because its `jwt.decode` lets through what
this file refuses (a missing `exp`, text as a number, duplicate members, `crit`, a second spelling of the same bytes)
and raises errors of other kinds for hostile input. `verified_payload` and `check_claims` are the whole story.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from voicepass.errors import HeadersTooLarge, TokenExpired, TokenInvalid, TokenMissing
from voicepass.keys import VerificationKey, base64url_decode
from voicepass.model import Clock, User, claim_at

MAX_TOKEN_CHARACTERS: Final = 8192
MAX_USER_ID_CHARACTERS: Final = 255  # OpenID Connect Core 1.0, section 2
_MAX_INTEGER_DIGITS: Final = 20
_ACCEPTED_TYPES: Final = frozenset({"jwt", "at+jwt", "application/at+jwt"})  # RFC 7519, section 5.1; RFC 9068
_UNSUPPORTED_HEADERS: Final = ("crit", "b64", "zip", "cty")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustedIssuer:
    """Whose tokens are believed, and what each of them must say. `leeway_seconds` forgives clock skew."""

    token_issuer: str
    audience: str
    key: VerificationKey
    leeway_seconds: int
    user_id_claim: str


class JwtAuthenticator:
    """Turns the values of a request's Authorization headers into the user who signed in."""

    def __init__(self, *, trusted: TrustedIssuer, clock: Clock) -> None:
        self._trusted = trusted
        self._clock = clock

    async def authenticate(self, authorization: Sequence[str]) -> User:
        """Return the user, or raise TokenMissing, TokenInvalid, TokenExpired or HeadersTooLarge."""
        unverified_token = bearer_token(authorization)
        payload = verified_payload(unverified_token, self._trusted.key)
        claims = _json_object(payload, "payload")
        return check_claims(claims, self._trusted, now=self._clock())


def bearer_token(authorization: Sequence[str]) -> str:
    """Return the one bearer token among the Authorization headers (RFC 6750, section 2.1)."""
    if not authorization:
        raise TokenMissing
    if len(authorization) > 1:
        _refuse("more than one Authorization header")
    scheme, _, unverified_token = authorization[0].partition(" ")
    unverified_token = unverified_token.strip(" ")
    if scheme.lower() != "bearer" or not unverified_token:
        raise TokenMissing
    if len(unverified_token) > MAX_TOKEN_CHARACTERS:
        raise HeadersTooLarge
    return unverified_token


def verified_payload(unverified_token: str, key: VerificationKey) -> bytes:
    """Return the payload of a compact JWS whose form, header and signature hold for `key`; else raise TokenInvalid."""
    if len(unverified_token) > MAX_TOKEN_CHARACTERS:
        _refuse("longer than 8 kB")
    segments = unverified_token.split(".")
    if len(segments) != 3:  # noqa: PLR2004 - header, payload, signature
        _refuse("not three segments")
    try:
        header_bytes, payload, signature = (base64url_decode(segment) for segment in segments)
    except ValueError:
        _refuse("not strict base64url")
    _check_header(_json_object(header_bytes, "header"), key)
    signing_input = unverified_token.rpartition(".")[0].encode("ascii")
    if not signature or not key.verifies(signing_input, signature):
        _refuse("the signature does not hold")
    return payload


def _check_header(header: Mapping[str, object], key: VerificationKey) -> None:
    # The one algorithm comes from our configuration; the token may only agree with it.
    if header.get("alg") != key.algorithm:
        _refuse(f"alg is not {key.algorithm}")
    if any(name in header for name in _UNSUPPORTED_HEADERS):
        _refuse("asks for an extension (crit, b64, zip or cty)")
    token_type = header.get("typ", "JWT")
    if not isinstance(token_type, str) or token_type.lower() not in _ACCEPTED_TYPES:
        _refuse("typ is not that of a JWT")
    kid = header.get("kid")
    if kid is not None and not isinstance(kid, str):
        _refuse("kid is not text")
    if kid is not None and key.kid is not None and kid != key.kid:
        _refuse("kid names another key")


def check_claims(claims: Mapping[str, object], trusted: TrustedIssuer, *, now: float) -> User:
    """Return the user whom signed `claims` speak of; raise TokenInvalid or TokenExpired. `now`: epoch seconds."""
    if claims.get("iss") != trusted.token_issuer:
        _refuse("iss is not the configured issuer")
    audience = claims.get("aud")
    audiences = audience if isinstance(audience, list) else [audience]
    if not all(isinstance(entry, str) for entry in audiences) or trusted.audience not in audiences:
        _refuse("aud does not name the configured audience")
    expires_at = _instant(claims, "exp")
    if expires_at is None:
        _refuse("exp is missing")
    if now >= expires_at + trusted.leeway_seconds:
        raise TokenExpired
    for claim in ("nbf", "iat"):
        instant = _instant(claims, claim)
        if instant is not None and now < instant - trusted.leeway_seconds:
            _refuse(f"{claim} lies in the future; if the token is good, compare the clocks")
    if not isinstance(claims.get("sub"), str) or not claims["sub"]:
        _refuse("sub is missing or not text")
    return User(issuer=trusted.token_issuer, id=_user_id(claims, trusted.user_id_claim), claims=claims)


def _user_id(claims: Mapping[str, object], claim: str) -> str:
    value = claim_at(claims, claim)
    user_id = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(user_id, str) or not 0 < len(user_id) <= MAX_USER_ID_CHARACTERS or not _is_unicode(user_id):
        _refuse(f"the claim '{claim}' is no user id (text of 1 to {MAX_USER_ID_CHARACTERS} characters, or a number)")
    return user_id


def _instant(claims: Mapping[str, object], claim: str) -> float | None:
    if claim not in claims:
        return None
    value = claims[claim]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _refuse(f"{claim} is not a number")
    return value


def _json_object(data: bytes, part: str) -> dict[str, object]:
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_bounded_integer,
            parse_float=_finite_float,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError) as error:  # RecursionError: brackets nested a thousand deep
        _refuse(f"the {part} is not strict JSON", error)
    if not isinstance(value, dict):
        _refuse(f"the {part} is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate member")
    return members


def _bounded_integer(digits: str) -> int:
    if len(digits) > _MAX_INTEGER_DIGITS:
        raise ValueError("huge number")
    return int(digits)


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("infinite number")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _refuse(failed_check: str, cause: BaseException | None = None) -> NoReturn:
    raise TokenInvalid(operator_note=f"token refused: {failed_check}") from cause
