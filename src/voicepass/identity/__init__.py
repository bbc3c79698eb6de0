"""From an unverified token to a User: every check spelled out, in the order of RFC 8725.

python-jose computes the signature; nothing else of a token is left to it, because its `jwt.decode` lets through what
this file refuses (a missing `exp`, text as a number, duplicate members, `crit`, a second spelling of the same bytes)
and raises errors of other kinds for hostile input. `parse`, `check_header`, `check_signature`, `check_claims`: that is
every check of a token.
"""

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NoReturn, Protocol

from voicepass.errors import CredentialsConflict, KeysUnavailable, TokenExpired, TokenInvalid, TokenMissing
from voicepass.identity.credentials import (
    MAX_TOKEN_CHARACTERS,
    SessionCookie,
    bearer_token,
    check_own_site,
    cookie_token,
)
from voicepass.identity.differences import explain_difference
from voicepass.identity.keys import VerificationKey, base64url_decode
from voicepass.model import Clock, Credentials, User, claim_at
from voicepass.policy import Rule, clean_text

_MAX_INTEGER_DIGITS: Final = 20
_ACCEPTED_TYPES: Final = frozenset({"jwt", "at+jwt", "application/at+jwt"})  # RFC 7519, section 5.1; RFC 9068
_UNSUPPORTED_HEADERS: Final = ("crit", "b64", "zip", "cty")


class KeySource(Protocol):
    """Raises TokenInvalid where there is no such key, KeysUnavailable where the keys cannot be had."""

    async def key_for(self, kid: str | None, /) -> VerificationKey: ...  # noqa: D102
    async def check(self) -> None: ...  # noqa: D102 - whether any key can be had


@dataclass(frozen=True, slots=True)
class FixedKey:
    """The source of the one key that stands in the configuration; what a token calls it does not matter."""

    key: VerificationKey

    async def key_for(self, _kid: str | None) -> VerificationKey:
        """Return the key."""
        return self.key

    async def check(self) -> None:
        """Do nothing: the key is here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustedIssuer:
    """Whose tokens are believed, by which keys and one algorithm, and what each of them must say.

    `audience` is None where the provider sets none; then `required` must tell its tokens apart from those meant for
    others. `leeway_seconds` forgives clock skew. `max_age_seconds` limits the time since `iat`; 0 sets no limit.
    """

    token_issuer: str
    algorithm: str
    keys: KeySource
    audience: str | None
    leeway_seconds: int
    max_age_seconds: int = 0
    required: Rule = field(default_factory=lambda: Rule({}))
    user_id_claim: str = "sub"
    user_name_claim: str = "name"


class JwtAuthenticator:
    """Turns the credentials of a request into the user who signed in."""

    def __init__(self, *, trusted: Sequence[TrustedIssuer], clock: Clock, session: SessionCookie | None = None) -> None:
        self._trusted = {(block.token_issuer, block.algorithm): block for block in trusted}
        self._clock = clock
        self._session = session

    async def authenticate(self, credentials: Credentials) -> User:
        """Return the user. Raises a refusal of `credentials`, TokenInvalid, TokenExpired or KeysUnavailable."""
        bearer = bearer_token(credentials)
        cookie = cookie_token(credentials, self._session) if self._session and credentials.is_post else None
        if bearer is not None:
            user = await self.user_of(bearer)
            other = await self.user_of(cookie) if cookie is not None else user
            if (user.issuer, user.id) != (other.issuer, other.id):
                raise CredentialsConflict
            return user
        if cookie is None or self._session is None:
            raise TokenMissing
        check_own_site(credentials, self._session)
        return await self.user_of(cookie)

    async def check_keys(self) -> str | None:
        """Return a word where the keys of some issuers cannot be had; raise KeysUnavailable where those of none can."""

        async def failure_of(issuer: TrustedIssuer) -> KeysUnavailable | None:
            try:
                await issuer.keys.check()
            except KeysUnavailable as refusal:
                return refusal
            return None

        every = await asyncio.gather(*map(failure_of, self._trusted.values()))
        failures = list(filter(None, every))
        if failures and len(failures) == len(every):
            raise failures[0]
        return f"of {len(every) - len(failures)} of {len(every)} issuers" if failures else None

    async def user_of(self, unverified_token: str) -> User:
        """Return the user of one token. The issuer is picked by what the token says, and then holds it to that."""
        token = parse(unverified_token)
        unverified_claims = _json_object(token.payload, "payload")
        trusted = self._find_block(unverified_claims.get("iss"), token.header.get("alg"))
        kid = check_header(token.header, trusted.algorithm)
        check_signature(token, kid, await trusted.keys.key_for(kid))
        return check_claims(unverified_claims, trusted, now=self._clock())

    def _find_block(self, token_issuer: object, algorithm: object) -> TrustedIssuer:
        """Return the issuer's block for this algorithm: a token never meets the key of another block."""
        is_text = isinstance(token_issuer, str) and isinstance(algorithm, str)
        block = self._trusted.get((str(token_issuer), str(algorithm))) if is_text else None
        if block is None:
            algorithms = sorted(known for name, known in self._trusted if name == token_issuer)
            if algorithms:
                _refuse(f"alg is not {' or '.join(algorithms)}")
            difference = explain_difference(token_issuer, {block.token_issuer for block in self._trusted.values()})
            _refuse(f"iss is no configured issuer{difference}")
        return block


@dataclass(frozen=True, slots=True)
class UnverifiedToken:
    """A compact JWS, well-formed; nothing in it is trusted."""

    header: Mapping[str, object]
    payload: bytes
    signing_input: bytes
    signature: bytes


def parse(unverified_token: str) -> UnverifiedToken:
    """Take a compact JWS apart (RFC 7515, section 7.1). Raises TokenInvalid for any other form."""
    if len(unverified_token) > MAX_TOKEN_CHARACTERS:
        _refuse("longer than 8 kB")
    segments = unverified_token.split(".")
    if len(segments) != 3:  # noqa: PLR2004 - header, payload, signature
        _refuse("not three segments")
    try:
        header, payload, signature = (base64url_decode(segment) for segment in segments)
    except ValueError:
        _refuse("not strict base64url")
    signing_input = unverified_token.rpartition(".")[0].encode("ascii")
    return UnverifiedToken(_json_object(header, "header"), payload, signing_input, signature)


def check_header(header: Mapping[str, object], algorithm: str) -> str | None:
    """Return the id of the key that the header names, or None. Raises TokenInvalid."""
    # The one algorithm comes from our configuration; the token may only agree with it.
    if header.get("alg") != algorithm:
        _refuse(f"alg is not {algorithm}")
    if any(name in header for name in _UNSUPPORTED_HEADERS):
        _refuse("asks for an extension (crit, b64, zip or cty)")
    token_type = header.get("typ", "JWT")
    if not isinstance(token_type, str) or token_type.lower() not in _ACCEPTED_TYPES:
        _refuse("typ is not that of a JWT")
    kid = header.get("kid")
    if kid is not None and not isinstance(kid, str):
        _refuse("kid is not text")
    return kid


def check_signature(token: UnverifiedToken, kid: str | None, key: VerificationKey) -> None:
    """Raise TokenInvalid unless the signature was made with `key`, which the token may call by no other id."""
    if kid is not None and key.kid is not None and kid != key.kid:
        _refuse("kid names another key")
    if not token.signature or not key.verifies(token.signing_input, token.signature):
        _refuse("the signature does not hold")


def check_claims(claims: Mapping[str, object], trusted: TrustedIssuer, *, now: float) -> User:
    """Return the user whom signed `claims` speak of; raise TokenInvalid or TokenExpired. `now`: epoch seconds."""
    if claims.get("iss") != trusted.token_issuer:
        _refuse("iss is not the configured issuer")
    if trusted.audience is not None:
        audience = claims.get("aud")
        audiences = audience if isinstance(audience, list) else [audience]
        if not all(isinstance(entry, str) for entry in audiences) or trusted.audience not in audiences:
            _refuse(f"aud does not name the configured audience{explain_difference(audience, [trusted.audience])}")
    if not trusted.required.admits(claims):
        _refuse(f"a required claim does not hold: {trusted.required}")
    expires_at = _instant(claims, "exp")
    if expires_at is None:
        _refuse("exp is missing")
    if now >= expires_at + trusted.leeway_seconds:
        raise TokenExpired
    _check_age(claims, trusted, now)
    for claim in ("nbf", "iat"):
        instant = _instant(claims, claim)
        if instant is not None and now < instant - trusted.leeway_seconds:
            _refuse(f"{claim} lies in the future; if the token is good, compare the clocks")
    if not isinstance(claims.get("sub"), str) or not claims["sub"]:
        _refuse("sub is missing or not text")
    name = claim_at(claims, trusted.user_name_claim)
    return User(
        issuer=trusted.token_issuer,
        id=_user_id(claims, trusted.user_id_claim),
        name=str(name) if isinstance(name, (str, int, float)) and not isinstance(name, bool) else None,
        claims=claims,
    )


def _check_age(claims: Mapping[str, object], trusted: TrustedIssuer, now: float) -> None:
    """Raise TokenInvalid or TokenExpired where the operator limits the age of tokens, whatever their `exp`."""
    if not trusted.max_age_seconds:
        return
    issued_at = _instant(claims, "iat")
    if issued_at is None:
        _refuse("iat is missing, and VOICEPASS_JWT_MAX_AGE_SECONDS needs it")
    if now >= issued_at + trusted.max_age_seconds + trusted.leeway_seconds:
        raise TokenExpired(operator_note="the token is older than VOICEPASS_JWT_MAX_AGE_SECONDS")


def _user_id(claims: Mapping[str, object], claim: str) -> str:
    value = claim_at(claims, claim)
    user_id = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    # An identity is never repaired: two ids that are cleaned to the same text would be two users in one.
    if not isinstance(user_id, str) or not user_id or clean_text(user_id) != user_id:
        _refuse(f"the claim '{claim}' is no user id: a number, or text of 1 to 200 characters, none of them invisible")
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
        value = _STRICT_JSON.decode(data.decode("utf-8"))
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


_STRICT_JSON: Final = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_bounded_integer, parse_float=_finite_float, parse_constant=_no_constant
)


def _refuse(failed_check: str, cause: BaseException | None = None) -> NoReturn:
    raise TokenInvalid(operator_note=f"token refused: {failed_check}") from cause
