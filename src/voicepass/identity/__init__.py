"""From an unverified token to a User: every check of RFC 8725, one by one.

`parse`, `check_header`, `check_signature` and `check_claims` are all checks of a token. python-jose only computes the
signature. Its `jwt.decode` accepts what voicepass refuses (a missing `exp`, text as a number, duplicate members,
`crit`, a second spelling of the same bytes), and raises errors of other types for hostile input.
"""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from voicepass.errors import (
    CredentialsConflict,
    InternalError,
    KeysUnavailable,
    TokenExpired,
    TokenInvalid,
    TokenMissing,
)
from voicepass.identity.credentials import SessionCookie, bearer_token, check_own_site, check_page_of_app, cookie_tokens
from voicepass.identity.keys import KEY_NAMES, VerificationKey, select_keys
from voicepass.identity.tokens import UnverifiedToken, explain_difference, parse, parse_object, refuse
from voicepass.model import Clock, Credentials, User
from voicepass.policy import Rule, claim_at, clean_text

MAX_USER_ID_CHARACTERS: Final = 255  # OpenID Connect Core 1.0, section 2
MAX_KEYS_TRIED: Final = 8  # each one costs a verification

_ACCEPTED_TYPES: Final = frozenset({"jwt", "at+jwt", "application/at+jwt"})  # RFC 7519, section 5.1; RFC 9068
_UNSUPPORTED_HEADERS: Final = ("crit", "b64", "zip", "cty")
_APP_USER: Final = "the dependency of voicepass.mount(user=…) returned"


class KeySource(Protocol):
    """Where the keys of an issuer come from. Both methods raise KeysUnavailable if there are no keys."""

    async def keys_for(self, names: Mapping[str, str], /) -> Sequence[VerificationKey]: ...  # noqa: D102
    async def check(self) -> None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class FixedKey:
    """The source of one key from the configuration."""

    key: VerificationKey

    async def keys_for(self, names: Mapping[str, str]) -> Sequence[VerificationKey]:
        """Return the key, unless it has a name and `names` names another."""
        return select_keys([self.key], names)

    async def check(self) -> None:
        """Do nothing: the key is here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustedIssuer:
    """An issuer whose tokens voicepass accepts: its keys, its one algorithm, and what each token must say.

    `audience` is None if the provider sets none. Then `required` must exclude tokens that are meant for others.
    `leeway_seconds` is the allowed clock skew. `max_age_seconds` limits the time since `iat`; 0 sets no limit.
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
    """Finds the user who signed in from the credentials of a request."""

    def __init__(self, *, trusted: Sequence[TrustedIssuer], clock: Clock, session: SessionCookie | None = None) -> None:
        self._trusted = {(block.token_issuer, block.algorithm): block for block in trusted}
        self._clock = clock
        self._session = session

    async def authenticate(self, credentials: Credentials) -> User:
        """Return the user. Raises a refusal of `credentials`, TokenInvalid, TokenExpired or KeysUnavailable."""
        bearer = bearer_token(credentials)
        cookies = cookie_tokens(credentials, self._session) if self._session and credentials.is_post else []
        if bearer is not None:
            user = await self.user_of(bearer)
            other = await self._user_of_cookies(cookies) if cookies else user
            if (user.issuer, user.id) != (other.issuer, other.id):
                raise CredentialsConflict
            return user
        if self._session is None:
            raise TokenMissing
        if not cookies:
            raise TokenMissing(
                "Send the user's JWT in the header 'Authorization: Bearer <token>', "
                f"or send a POST with the cookie '{self._session.name}'."
            )
        check_own_site(credentials, self._session)
        return await self._user_of_cookies(cookies)

    async def _user_of_cookies(self, unverified_tokens: Sequence[str]) -> User:
        """Return the one user of these tokens. A token that is not valid does not count beside one that is."""
        users: set[tuple[str, str]] = set()
        refusals: list[TokenInvalid | TokenExpired] = []
        for unverified_token in unverified_tokens:
            try:
                user = await self.user_of(unverified_token)
            except (TokenInvalid, TokenExpired) as refusal:
                refusals.append(refusal)
            else:
                users.add((user.issuer, user.id))
        if not users:
            raise refusals[0]
        if len(users) > 1:
            raise CredentialsConflict("Two session cookies name different users. Sign out and sign in again.")
        return user

    async def check_keys(self) -> str | None:
        """Return a note if the keys of some issuers are unavailable. Raise KeysUnavailable if those of all are."""
        issuers = self._trusted.values()
        results = await asyncio.gather(*(issuer.keys.check() for issuer in issuers), return_exceptions=True)
        failures = [result for result in results if result is not None]
        for failure in failures:
            if not isinstance(failure, KeysUnavailable):
                raise failure
        if failures and len(failures) == len(issuers):
            raise failures[0]
        return f"of {len(issuers) - len(failures)} of {len(issuers)} issuers" if failures else None

    async def user_of(self, unverified_token: str) -> User:
        """Return the user of one token. Its unverified `iss` selects the issuer, whose keys must then verify it."""
        token = parse(unverified_token)
        unverified_claims = parse_object(token.payload, "payload")
        trusted = self._find_block(unverified_claims.get("iss"), token.header.get("alg"))
        names = check_header(token.header, trusted.algorithm)
        check_signature(token, await trusted.keys.keys_for(names))
        return check_claims(unverified_claims, trusted, now=self._clock())

    def _find_block(self, token_issuer: object, algorithm: object) -> TrustedIssuer:
        """Return the issuer's block for this algorithm: a token never meets the key of another block."""
        is_text = isinstance(token_issuer, str) and isinstance(algorithm, str)
        block = self._trusted.get((str(token_issuer), str(algorithm))) if is_text else None
        if block is None:
            algorithms = sorted(known for name, known in self._trusted if name == token_issuer)
            if algorithms:
                refuse(f"alg is not {' or '.join(algorithms)}")
            difference = explain_difference(token_issuer, {name for name, _ in self._trusted})
            refuse(f"iss is no configured issuer{difference}")
        return block


@dataclass(frozen=True, slots=True)
class AppUsers:
    """Finds the user whom the app around voicepass has signed in, as its dependency returned it."""

    allowed_origins: Collection[str]

    async def authenticate(self, credentials: Credentials) -> User:
        """Return the user. Raises TokenMissing, OriginNotAllowed, or InternalError for what cannot be a user."""
        user = credentials.app_user
        if user is None:
            raise TokenMissing("Sign in to start a conversation.")
        if not credentials.is_read:
            check_page_of_app(credentials, self.allowed_origins)
        if not isinstance(user, User):
            raise InternalError(operator_note=f"{_APP_USER} {type(user).__qualname__}: return a voicepass.User or None")
        if not (
            isinstance(user.issuer, str) and isinstance(user.name, str | None) and isinstance(user.claims, Mapping)
        ):
            raise InternalError(operator_note=f"{_APP_USER} a User whose issuer, name or claims have a wrong type")
        try:
            return replace(user, id=parse_user_id(user.id))
        except ValueError as error:
            raise InternalError(operator_note=f"{_APP_USER} a User whose id is {error}") from error


def check_header(header: Mapping[str, object], algorithm: str) -> Mapping[str, str]:
    """Return the names by which the header names its key, by member of KEY_NAMES. Raises TokenInvalid."""
    # The one algorithm comes from our configuration; a token that names another is refused.
    if header.get("alg") != algorithm:
        refuse(f"alg is not {algorithm}")
    if any(name in header for name in _UNSUPPORTED_HEADERS):
        refuse("asks for an extension (crit, b64, zip or cty)")
    token_type = header.get("typ", "JWT")
    if not isinstance(token_type, str) or token_type.lower() not in _ACCEPTED_TYPES:
        refuse("typ is not that of a JWT")
    names: dict[str, str] = {}
    for member in KEY_NAMES:
        value = header.get(member)
        if isinstance(value, str):
            names[member] = value
        elif value is not None:
            refuse(f"{member} is not text")
    return names


def check_signature(token: UnverifiedToken, keys: Sequence[VerificationKey]) -> None:
    """Raise TokenInvalid unless one of `keys` made the signature."""
    if not keys:
        refuse("the issuer has no key of the name in the header (kid, x5t)")
    if not any(key.verifies(token.signing_input, token.signature) for key in keys[:MAX_KEYS_TRIED]):
        refuse("the signature does not hold")


def check_claims(claims: Mapping[str, object], trusted: TrustedIssuer, *, now: float) -> User:
    """Return the user of signed `claims`, or raise TokenInvalid or TokenExpired. `now`: seconds since the epoch."""
    if trusted.audience is not None:
        audience = claims.get("aud")
        audiences = audience if isinstance(audience, list) else [audience]
        if not all(isinstance(entry, str) for entry in audiences) or trusted.audience not in audiences:
            refuse(f"aud does not name the configured audience{explain_difference(audience, [trusted.audience])}")
    if not trusted.required.admits(claims):
        refuse(f"a required claim does not hold: {trusted.required}")
    _check_times(claims, trusted, now)
    return User(
        issuer=trusted.token_issuer,
        id=_user_id(claims, trusted.user_id_claim),
        name=_user_name(claims, trusted.user_name_claim),
        claims=claims,
    )


def _check_times(claims: Mapping[str, object], trusted: TrustedIssuer, now: float) -> None:
    expires_at, issued_at, not_before = (_instant(claims, claim) for claim in ("exp", "iat", "nbf"))
    if expires_at is None:
        refuse("exp is missing")
    if now >= expires_at + trusted.leeway_seconds:
        raise TokenExpired
    if trusted.max_age_seconds:
        if issued_at is None:
            refuse("iat is missing, and VOICEPASS_JWT_MAX_AGE_SECONDS needs it")
        if now >= issued_at + trusted.max_age_seconds + trusted.leeway_seconds:
            raise TokenExpired(operator_note="the token is older than VOICEPASS_JWT_MAX_AGE_SECONDS")
    for claim, instant in (("nbf", not_before), ("iat", issued_at)):
        if instant is not None and now < instant - trusted.leeway_seconds:
            refuse(f"{claim} lies in the future; if the token is good, compare the clocks")


def _user_id(claims: Mapping[str, object], claim: str) -> str:
    # A provider may leave out `sub` if another claim is the id.
    if claims.get("sub") is not None and not _text(claims["sub"]):
        refuse("sub is neither text nor a whole number")
    try:
        return parse_user_id(claim_at(claims, claim))
    except ValueError:
        refuse(f"the claim '{claim}' is no user id: a whole number, or 1 to 255 visible characters")


def parse_user_id(value: object) -> str:
    """Return a user id as text, or raise ValueError. An id is never repaired, because two users could become one."""
    user_id = _text(value)
    if not user_id or clean_text(user_id, most_characters=MAX_USER_ID_CHARACTERS) != user_id:
        raise ValueError("no user id: a whole number, or 1 to 255 visible characters")
    return user_id


def _user_name(claims: Mapping[str, object], claim: str) -> str | None:
    given_and_family = " ".join(filter(None, (_text(claims.get(name)) for name in ("given_name", "family_name"))))
    candidates = [claim_at(claims, claim), claims.get("name"), given_and_family]
    candidates += [claims.get("preferred_username"), claims.get("nickname")]
    return next((name for name in map(_text, candidates) if clean_text(name)), None)


def _text(value: object) -> str:
    """Return a text as it is and a whole number as decimal text; of anything else, the empty text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else ""


def _instant(claims: Mapping[str, object], claim: str) -> float | None:
    if claim not in claims:
        return None
    value = claims[claim]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        refuse(f"{claim} is not a number")
    return value
