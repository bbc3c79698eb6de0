"""From a header to a user: which tokens are accepted, and hundreds that are refused."""

import dataclasses
import json
import random
import string
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest

from tests.identity.hostile_tokens import (
    MAX_CHARACTERS,
    Hostile,
    Mint,
    base64url,
    make_deep_token,
    make_hostile_tokens,
    make_token_of_length,
    make_valid_tokens,
    signer_for,
)
from tests.tables import table
from voicepass.errors import CredentialsConflict, HeadersTooLarge, Refusal, TokenExpired, TokenInvalid, TokenMissing
from voicepass.identity import FixedKey, JwtAuthenticator, TrustedIssuer, check_header, check_signature
from voicepass.identity.credentials import SessionCookie
from voicepass.identity.keys import (
    ALGORITHMS,
    HMAC_ALGORITHMS,
    VerificationKey,
    key_from_pem,
    key_from_secret,
    select_keys,
)
from voicepass.identity.tokens import parse
from voicepass.model import Credentials, User

pytestmark = pytest.mark.anyio

NOW = 1_800_000_000.25
ISSUER = "https://login.example"
AUDIENCE = "voicepass"

each_kind = pytest.mark.parametrize("algorithm", ["HS256", "RS256", "ES256", "EdDSA"])
each_algorithm = pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))


def make_mint(algorithm: str = "HS256", **changes: Any) -> Mint:
    mint = Mint(signer=signer_for(algorithm), token_issuer=ISSUER, audience=AUDIENCE, now=NOW, kid="key-1")
    return dataclasses.replace(mint, **changes)


def build_key(mint: Mint) -> VerificationKey:
    algorithm = mint.signer.algorithm
    build = key_from_secret if algorithm in HMAC_ALGORITHMS else key_from_pem
    key = build(mint.signer.published, algorithm)
    return key if mint.kid is None else dataclasses.replace(key, names={"kid": mint.kid})


def verify(token: str, key: VerificationKey) -> None:
    """Check form, header and signature as `user_of` does."""
    parsed = parse(token)
    check_signature(parsed, select_keys([key], check_header(parsed.header, key.algorithm)))


def trust(mint: Mint, **settings: Any) -> TrustedIssuer:
    return TrustedIssuer(
        token_issuer=mint.token_issuer,
        algorithm=mint.signer.algorithm,
        audience=mint.audience,
        keys=FixedKey(build_key(mint)),
        leeway_seconds=mint.leeway_seconds,
        **settings,
    )


def build_authenticator(mint: Mint, *, now: float | None = None, **settings: Any) -> JwtAuthenticator:
    return JwtAuthenticator(trusted=[trust(mint, **settings)], clock=lambda: mint.now if now is None else now)


async def authenticate(authenticator: JwtAuthenticator, authorization: Sequence[str]) -> User | type[Refusal]:
    """Return the user, or the class of the refusal. Any other exception fails the test."""
    try:
        return await authenticator.authenticate(Credentials(authorization=tuple(authorization)))
    except Refusal as refusal:
        return type(refusal)


# The corpus ---------------------------------------------------------------------------------------------------------


@cache
def make_corpus(algorithm: str, leeway_seconds: int, kid: str | None) -> Sequence[Hostile]:
    """Return the hostile tokens of a service, cached because to sign those of RS256 takes long."""
    return make_hostile_tokens(make_mint(algorithm, leeway_seconds=leeway_seconds, kid=kid))


@each_kind
@pytest.mark.parametrize(
    ("leeway_seconds", "kid"),
    [(60, "key-1"), pytest.param(0, "key-1", marks=pytest.mark.long), pytest.param(60, None, marks=pytest.mark.long)],
)
async def test_every_hostile_token_gets_its_own_refusal(algorithm: str, leeway_seconds: int, kid: str | None) -> None:
    mint = make_mint(algorithm, leeway_seconds=leeway_seconds, kid=kid)
    authenticator = build_authenticator(mint)
    corpus = make_corpus(algorithm, leeway_seconds, kid)

    outcomes = {hostile: await authenticate(authenticator, [f"Bearer {hostile.token}"]) for hostile in corpus}

    assert {hostile.name: seen for hostile, seen in outcomes.items() if seen is not hostile.expected} == {}
    assert len(outcomes) >= 750


@each_kind
async def test_every_valid_token_is_accepted(algorithm: str) -> None:
    mint = make_mint(algorithm)
    authenticator = build_authenticator(mint)
    good = make_valid_tokens(mint)

    outcomes = {name: await authenticate(authenticator, [f"Bearer {token}"]) for name, token in good.items()}

    assert {name: seen for name, seen in outcomes.items() if not isinstance(seen, User) or seen.id != "u-1"} == {}
    assert len(outcomes) >= 30


@each_kind
def test_the_corpus_holds_no_name_and_no_token_twice(algorithm: str) -> None:
    corpus = make_corpus(algorithm, 60, "key-1")

    names, tokens = {hostile.name for hostile in corpus}, {hostile.token for hostile in corpus}
    assert len(names) == len(corpus)
    assert len(tokens) == len(corpus)


@each_kind
async def test_a_key_without_a_name_verifies_tokens_with_any_kid(algorithm: str) -> None:
    mint = make_mint(algorithm, kid=None)
    authenticator = build_authenticator(mint)

    user = await authenticator.user_of(mint.token(header=mint.header(kid="whatever")))

    assert user.id == "u-1"


@each_kind
async def test_a_token_with_a_very_deep_claim_is_accepted_or_refused_and_causes_no_other_error(algorithm: str) -> None:
    mint = make_mint(algorithm)

    seen = await authenticate(build_authenticator(mint), [f"Bearer {make_deep_token(mint)}"])

    assert seen is TokenInvalid or isinstance(seen, User)


# Algorithms ---------------------------------------------------------------------------------------------------------


@each_algorithm
async def test_every_algorithm_can_be_configured(algorithm: str) -> None:
    mint = make_mint(algorithm)

    user = await build_authenticator(mint).user_of(mint.token(claims=mint.claims(name="Ada")))

    assert user == User(issuer=ISSUER, id="u-1", name="Ada", claims=mint.claims(name="Ada"))


@each_algorithm
async def test_a_service_accepts_tokens_of_its_one_algorithm_only(algorithm: str) -> None:
    authenticator = build_authenticator(make_mint(algorithm))
    others = [make_mint(other) for other in sorted(ALGORITHMS - {algorithm})]

    outcomes = [await authenticate(authenticator, [f"Bearer {other.token()}"]) for other in others]

    assert outcomes == [TokenInvalid] * 9


async def test_an_iss_that_is_a_number_is_not_the_issuer_of_that_name() -> None:
    mint = make_mint(token_issuer="7")

    outcomes = [
        await authenticate(build_authenticator(mint), [f"Bearer {mint.token(claims=mint.claims(iss=iss))}"])
        for iss in ("7", 7)
    ]

    assert isinstance(outcomes[0], User)
    assert outcomes[1] is TokenInvalid


@each_algorithm
async def test_a_token_of_another_key_is_refused(algorithm: str) -> None:
    mint = make_mint(algorithm)
    stranger = make_mint(algorithm, signer=signer_for(algorithm, owner="attacker"))

    seen = await authenticate(build_authenticator(mint), [f"Bearer {stranger.token()}"])

    assert seen is TokenInvalid


@each_kind
@pytest.mark.parametrize("count", [5_000, pytest.param(20_000, marks=pytest.mark.long)])
def test_no_other_spelling_of_a_token_verifies(algorithm: str, count: int) -> None:
    mint = make_mint(algorithm)
    key, token = build_key(mint), mint.token(claims=mint.claims(jti="~~~???>>>"))
    chance = random.Random(algorithm)  # noqa: S311 - a seed, so that a failure can be repeated

    accepted = {mutant for mutant in make_mutants(token, count, chance) if is_verified(mutant, key)}

    assert accepted == set()
    assert is_verified(token, key)


def make_mutants(token: str, count: int, chance: random.Random) -> list[str]:
    """Return copies of `token`, each with one byte changed, inserted or deleted: mostly characters of tokens."""
    alphabet = string.ascii_letters + string.digits + "-_.=+/"
    mutants: list[str] = []
    while len(mutants) < count:
        place = chance.randrange(len(token) + 1)
        byte = chance.choice(alphabet) if chance.random() < 0.8 else chr(chance.randrange(256))
        rest, change = token[place:], chance.randrange(3)
        mutant = token[:place] + ((byte + rest[1:]), byte + rest, rest[1:])[change]
        if mutant != token:
            mutants.append(mutant)
    return mutants


def is_verified(token: str, key: VerificationKey) -> bool:
    try:
        verify(token, key)
    except TokenInvalid:
        return False
    return True


# The Authorization header -------------------------------------------------------------------------------------------

TOKEN = make_mint().token()
HEADER_SHAPES: dict[str, tuple[list[str], type[Refusal] | None]] = {
    "plain": ([f"Bearer {TOKEN}"], None),
    "small letters": ([f"bearer {TOKEN}"], None),
    "capitals": ([f"BEARER {TOKEN}"], None),
    "mixed letters": ([f"bEaReR {TOKEN}"], None),
    "two spaces": ([f"Bearer  {TOKEN}"], None),
    "spaces at the end": ([f"Bearer {TOKEN}  "], None),
    "none": ([], TokenMissing),
    "empty": ([""], TokenMissing),
    "only spaces": (["   "], TokenMissing),
    "only the scheme": (["Bearer"], TokenMissing),
    "the scheme and spaces": (["Bearer    "], TokenMissing),
    "no scheme": ([TOKEN], TokenMissing),
    "another scheme": ([f"Basic {TOKEN}"], TokenMissing),
    "a scheme called JWT": ([f"JWT {TOKEN}"], TokenMissing),
    "a longer scheme": ([f"Bearers {TOKEN}"], TokenMissing),
    "a colon": ([f"Bearer: {TOKEN}"], TokenMissing),
    "an equals sign": ([f"Bearer={TOKEN}"], TokenMissing),
    "a cyrillic scheme": ([f"\u0412earer {TOKEN}"], TokenMissing),
    "a space before": ([f" Bearer {TOKEN}"], TokenMissing),
    "a tab for a space": ([f"Bearer\t{TOKEN}"], TokenMissing),
    "a no-break space for a space": ([f"Bearer\u00a0{TOKEN}"], TokenMissing),
    "a tab after the space": ([f"Bearer \t{TOKEN}"], TokenInvalid),
    "a tab at the end": ([f"Bearer {TOKEN}\t"], TokenInvalid),
    "the scheme twice": ([f"Bearer Bearer {TOKEN}"], TokenInvalid),
    "a parameter": ([f"Bearer token={TOKEN}"], TokenInvalid),
    "quotes": ([f'Bearer "{TOKEN}"'], TokenInvalid),
    "a comma after": ([f"Bearer {TOKEN},"], TokenInvalid),
    "a comma list of two": ([f"Bearer {TOKEN}, Bearer {TOKEN}"], TokenInvalid),
    "a comma list, another scheme first": ([f"Basic dTpw, Bearer {TOKEN}"], TokenMissing),
    "two tokens": ([f"Bearer {TOKEN} {TOKEN}"], TokenInvalid),
    "two headers": ([f"Bearer {TOKEN}", f"Bearer {TOKEN}"], TokenInvalid),
    "two headers, one empty": (["", f"Bearer {TOKEN}"], TokenInvalid),
    "two headers, another scheme": ([f"Bearer {TOKEN}", "Basic dTpw"], TokenInvalid),
    "8,192 characters of rubbish": ([f"Bearer {'.' * MAX_CHARACTERS}"], TokenInvalid),
    "8,193 characters of rubbish": ([f"Bearer {'.' * (MAX_CHARACTERS + 1)}"], HeadersTooLarge),
}


@table("shape", HEADER_SHAPES)
async def test_only_one_bearer_token_in_one_header_is_accepted(shape: str) -> None:
    authorization, expected = HEADER_SHAPES[shape]

    seen = await authenticate(build_authenticator(make_mint()), authorization)

    assert (None if isinstance(seen, User) else seen) is expected


async def test_one_user_id_of_two_issuers_in_header_and_cookie_is_a_conflict() -> None:
    mints = [make_mint(), make_mint(token_issuer="https://other.example")]
    authenticator = JwtAuthenticator(
        trusted=[trust(mint) for mint in mints], clock=lambda: NOW, session=SessionCookie("session", ())
    )
    header, cookie = (mint.token() for mint in mints)

    def build_credentials(cookie: str) -> Credentials:
        return Credentials(authorization=(f"Bearer {header}",), cookies=(f"session={cookie}",), is_post=True)

    assert (await authenticator.authenticate(build_credentials(header))).id == (await authenticator.user_of(cookie)).id
    with pytest.raises(CredentialsConflict):
        await authenticator.authenticate(build_credentials(cookie))


async def test_a_token_of_8192_characters_is_accepted_and_one_of_8193_is_refused() -> None:
    mint = make_mint()
    authenticator = build_authenticator(mint)

    longest = await authenticate(authenticator, [f"Bearer {make_token_of_length(mint, 8192)}"])
    too_long = await authenticate(authenticator, [f"Bearer {make_token_of_length(mint, 8193)}"])

    assert isinstance(longest, User)
    assert too_long is HeadersTooLarge


def test_the_verifier_itself_refuses_a_token_of_8193_characters() -> None:
    mint = make_mint()

    with pytest.raises(TokenInvalid):
        verify(make_token_of_length(mint, 8193), build_key(mint))


# Time ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leeway_seconds", [0, 1, 60, 300])
async def test_exp_is_the_first_instant_at_which_a_token_is_refused(leeway_seconds: int) -> None:
    mint = make_mint(leeway_seconds=leeway_seconds)
    token = mint.token(claims=mint.claims(exp=1_800_000_600))
    end = 1_800_000_600 + leeway_seconds

    outcomes = [
        await authenticate(build_authenticator(mint, now=now), [f"Bearer {token}"])
        for now in (end - 0.001, end, end + 0.001, end + 1e9)
    ]

    assert isinstance(outcomes[0], User)
    assert outcomes[1:] == [TokenExpired] * 3


@pytest.mark.parametrize("leeway_seconds", [0, 60])
async def test_a_token_older_than_the_maximum_age_is_expired_even_if_its_exp_is_later(leeway_seconds: int) -> None:
    mint = make_mint(leeway_seconds=leeway_seconds)
    token = mint.token(claims=mint.claims(exp=1_900_000_000, iat=1_800_000_000))
    end = 1_800_000_000 + 300 + leeway_seconds

    outcomes = [
        await authenticate(build_authenticator(mint, now=now, max_age_seconds=300), [f"Bearer {token}"])
        for now in (1_800_000_000, end - 0.001, end, end + 1e6)
    ]
    without_limit = await authenticate(build_authenticator(mint, now=end + 1e6), [f"Bearer {token}"])

    assert [isinstance(seen, User) for seen in outcomes] == [True, True, False, False]
    assert outcomes[2:] == [TokenExpired] * 2
    assert isinstance(without_limit, User)


@pytest.mark.parametrize("iat", [None, "1800000000", True])
async def test_if_the_age_is_limited_a_token_without_a_valid_iat_is_refused(iat: object) -> None:
    mint = make_mint()
    claims = {name: value for name, value in mint.claims().items() if name != "iat"}
    token = mint.token(claims=claims if iat is None else claims | {"iat": iat})

    limited = await authenticate(build_authenticator(mint, max_age_seconds=300), [f"Bearer {token}"])

    assert limited is TokenInvalid


@pytest.mark.parametrize("claim", ["nbf", "iat"])
@pytest.mark.parametrize("leeway_seconds", [0, 1, 60, 300])
async def test_nbf_and_iat_are_the_first_instant_at_which_a_token_is_accepted(leeway_seconds: int, claim: str) -> None:
    mint = make_mint(leeway_seconds=leeway_seconds)
    token = mint.token(claims=mint.claims(exp=1_900_000_000) | {claim: 1_800_000_600})
    begin = 1_800_000_600 - leeway_seconds

    outcomes = [
        await authenticate(build_authenticator(mint, now=now), [f"Bearer {token}"])
        for now in (begin - 1e9, begin - 0.001, begin, begin + 0.001)
    ]

    assert outcomes[:2] == [TokenInvalid] * 2
    assert all(isinstance(seen, User) for seen in outcomes[2:])


async def test_the_clock_is_read_for_each_token() -> None:
    mint, times = make_mint(), iter([NOW, NOW + 1e6, NOW])
    authenticator = JwtAuthenticator(trusted=[trust(mint)], clock=lambda: next(times))

    outcomes = [await authenticate(authenticator, [f"Bearer {mint.token()}"]) for _ in range(3)]

    assert [seen is TokenExpired for seen in outcomes] == [False, True, False]


async def test_an_expired_token_with_a_bad_signature_is_invalid_not_expired() -> None:
    mint = make_mint()
    forged = make_mint(signer=signer_for("HS256", owner="attacker"))

    seen = await authenticate(build_authenticator(mint), [f"Bearer {forged.token(claims=forged.claims(exp=1))}"])

    assert seen is TokenInvalid


# The user -----------------------------------------------------------------------------------------------------------

USER_IDS: dict[str, tuple[str, dict[str, object], str]] = {
    "sub": ("sub", {}, "u-1"),
    "sub of one character": ("sub", {"sub": "u"}, "u"),
    "sub of 255 characters": ("sub", {"sub": "u" * 255}, "u" * 255),
    "sub a number": ("sub", {"sub": 42}, "42"),
    "sub zero": ("sub", {"sub": 0}, "0"),
    "sub a negative number": ("sub", {"sub": -7}, "-7"),
    "sub a number of 20 digits": ("sub", {"sub": 10**19}, "1" + "0" * 19),
    "sub as Auth0 writes it": ("sub", {"sub": "auth0|5f7c8e@clients"}, "auth0|5f7c8e@clients"),
    "sub beyond ASCII": ("sub", {"sub": "Ağça 🎙"}, "Ağça 🎙"),
    "sub in another case": ("sub", {"sub": "U-1"}, "U-1"),
    "another claim": ("uid", {"uid": "ada"}, "ada"),
    "a nested claim": ("app_metadata.user.id", {"app_metadata": {"user": {"id": "ada"}}}, "ada"),
    "a namespaced claim": ("https://example.com/user_id", {"https://example.com/user_id": "ada"}, "ada"),
    "a claim with dots and a nested one": ("a.b", {"a.b": "exact", "a": {"b": "nested"}}, "exact"),
    "a number": ("uid", {"uid": 42}, "42"),
    "zero": ("uid", {"uid": 0}, "0"),
    "a number of 20 digits": ("uid", {"uid": 10**19}, "1" + "0" * 19),
}


@table("name", USER_IDS)
async def test_the_user_id_comes_from_the_configured_claim_exactly(name: str) -> None:
    claim, claims, expected = USER_IDS[name]
    mint = make_mint()

    user = await build_authenticator(mint, user_id_claim=claim).user_of(mint.token(claims=mint.claims(**claims)))

    assert user.id == expected
    assert user.issuer == ISSUER


@pytest.mark.parametrize(
    "value", [None, "", True, False, 1.0, [], ["ada"], {}, {"id": "ada"}, "u" * 256, "\ud800", "ada\udcff"], ids=repr
)
@pytest.mark.parametrize("claim", ["uid", "app_metadata.id", "https://example.com/id"])
async def test_an_invalid_user_id_is_refused(claim: str, value: object) -> None:
    mint = make_mint()
    nested: dict[str, object] = {"app_metadata": {"id": value}} if claim == "app_metadata.id" else {claim: value}

    seen = await authenticate(
        build_authenticator(mint, user_id_claim=claim), [f"Bearer {mint.token(claims=mint.claims(**nested))}"]
    )

    assert seen is TokenInvalid


@table("claim", ["uid", "a.b", "sub.id", "app_metadata.id.more", "app_metadata.", ".", ""])
async def test_a_token_without_the_configured_user_id_claim_is_refused_and_sub_never_replaces_it(claim: str) -> None:
    mint = make_mint()
    token = mint.token(claims=mint.claims(app_metadata={"id": "ada"}))

    seen = await authenticate(build_authenticator(mint, user_id_claim=claim), [f"Bearer {token}"])

    assert seen is TokenInvalid


SUBJECTS_BESIDE_ANOTHER_CLAIM: dict[str, tuple[dict[str, object], object]] = {
    "no sub": ({"uid": "ada"}, "ada"),
    "no sub, a number": ({"uid": 7}, "7"),
    "sub null": ({"sub": None, "uid": "ada"}, "ada"),
    "sub text": ({"sub": "u-1", "uid": "ada"}, "ada"),
    "sub a number": ({"sub": 7, "uid": "ada"}, "ada"),
    "sub longer than an id": ({"sub": "u" * 300, "uid": "ada"}, "ada"),
    "sub empty": ({"sub": "", "uid": "ada"}, TokenInvalid),
    "sub a list": ({"sub": ["u-1"], "uid": "ada"}, TokenInvalid),
    "sub a boolean": ({"sub": True, "uid": "ada"}, TokenInvalid),
    "sub a fraction": ({"sub": 7.5, "uid": "ada"}, TokenInvalid),
    "no sub, no such claim": ({}, TokenInvalid),
    "no sub, a fraction": ({"uid": 7.5}, TokenInvalid),
    "no sub, a boolean": ({"uid": True}, TokenInvalid),
    "no sub, empty": ({"uid": ""}, TokenInvalid),
}


async def test_if_another_claim_is_the_user_id_sub_may_be_missing_but_not_invalid() -> None:
    mint, seen = make_mint(), {}
    for name, (claims, _) in SUBJECTS_BESIDE_ANOTHER_CLAIM.items():
        unnamed = {claim: value for claim, value in mint.claims().items() if claim != "sub"}
        authenticator = build_authenticator(mint, user_id_claim="uid")
        user = await authenticate(authenticator, [f"Bearer {mint.token(claims=unnamed | claims)}"])
        seen[name] = user.id if isinstance(user, User) else user

    assert seen == {name: expected for name, (_, expected) in SUBJECTS_BESIDE_ANOTHER_CLAIM.items()}


OTHER_NAMES: dict[str, object] = {"preferred_username": "ada@app.example", "nickname": "Countess"}
USER_NAMES: dict[str, tuple[str, dict[str, object], str | None]] = {
    "name": ("name", OTHER_NAMES | {"name": "Ada", "given_name": "A.", "family_name": "L."}, "Ada"),
    "given and family name": ("name", OTHER_NAMES | {"given_name": "Ada", "family_name": "Lovelace"}, "Ada Lovelace"),
    "only a given name": ("name", OTHER_NAMES | {"given_name": "Ada", "family_name": None}, "Ada"),
    "only a family name": ("name", OTHER_NAMES | {"family_name": "Lovelace"}, "Lovelace"),
    "preferred_username": ("name", OTHER_NAMES, "ada@app.example"),
    "nickname": ("name", {"nickname": "Countess"}, "Countess"),
    "none at all": ("name", {}, None),
    "blank ones are none": ("name", {"name": " ", "given_name": "", "preferred_username": "\u200b"}, None),
    "those of other types are none": ("name", {"name": ["Ada"], "preferred_username": True, "nickname": 1.5}, None),
    "a number": ("name", {"name": 7}, "7"),
    "the configured claim first": ("nickname", OTHER_NAMES | {"name": "Ada"}, "Countess"),
    "a nested claim first": ("profile.nick", {"profile": {"nick": "Nick"}, "name": "Ada"}, "Nick"),
    "the configured claim is missing": ("nickname", {"name": "Ada", "preferred_username": "ada"}, "Ada"),
    "the configured claim is blank": ("nickname", {"nickname": "\t", "preferred_username": "ada"}, "ada"),
}


async def test_the_user_name_falls_back_from_the_configured_claim_to_the_names_of_openid_connect() -> None:
    mint, seen = make_mint(), {}
    for name, (claim, claims, _) in USER_NAMES.items():
        token = mint.token(claims=mint.claims(**claims))
        seen[name] = (await build_authenticator(mint, user_name_claim=claim).user_of(token)).name

    assert seen == {name: expected for name, (_, _, expected) in USER_NAMES.items()}


# The refusals -------------------------------------------------------------------------------------------------------


@each_kind
async def test_no_refusal_repeats_the_token_or_tells_the_caller_which_check_failed(algorithm: str) -> None:
    authenticator = build_authenticator(make_mint(algorithm))
    refusals = [await get_refusal(authenticator, hostile) for hostile in make_corpus(algorithm, 60, "key-1")]

    details = {(type(refusal).__name__, refusal.detail) for _, refusal in refusals}
    repeating = [
        hostile.name
        for hostile, refusal in refusals
        if any(part in refusal.operator_note for part in hostile.token.split(".") if len(part) > 8)
    ]
    silent = [
        hostile.name for hostile, refusal in refusals if type(refusal) is TokenInvalid and not refusal.operator_note
    ]

    assert details == {(kind.__name__, kind.detail) for kind in (TokenInvalid, TokenExpired, HeadersTooLarge)}
    assert repeating == []
    assert silent == []


@table(("segment", "part"), [(0, "header"), (1, "payload")])
async def test_the_operator_learns_which_part_is_no_json_and_the_parsers_error(segment: int, part: str) -> None:
    segments = make_mint().token().split(".")
    segments[segment] = base64url(b"{")

    with pytest.raises(TokenInvalid) as caught:
        await build_authenticator(make_mint()).user_of(".".join(segments))

    assert caught.value.operator_note == f"token refused: the {part} is not strict JSON"
    assert type(caught.value.__cause__) is json.JSONDecodeError


async def get_refusal(authenticator: JwtAuthenticator, hostile: Hostile) -> tuple[Hostile, Refusal]:
    with pytest.raises(Refusal) as caught:
        await authenticator.authenticate(Credentials(authorization=(f"Bearer {hostile.token}",)))
    return hostile, caught.value


@table(
    ("changes", "note"),
    [
        ({"aud": "other"}, "token refused: aud does not name the configured audience"),
        ({"iss": "other"}, "token refused: iss is no configured issuer"),
        ({"exp": "soon"}, "token refused: exp is not a number"),
        ({"nbf": NOW + 900}, "token refused: nbf lies in the future; if the token is good, compare the clocks"),
        ({"iat": NOW + 900}, "token refused: iat lies in the future; if the token is good, compare the clocks"),
        ({"sub": 7.5}, "token refused: sub is neither text nor a whole number"),
        ({"sub": " "}, "token refused: the claim 'sub' is no user id: a whole number, or 1 to 255 visible characters"),
    ],
)
async def test_the_operator_learns_which_check_failed(changes: dict[str, object], note: str) -> None:
    mint = make_mint()

    with pytest.raises(TokenInvalid) as caught:
        await build_authenticator(mint).user_of(mint.token(claims=mint.claims(**changes)))

    assert caught.value.operator_note == note
