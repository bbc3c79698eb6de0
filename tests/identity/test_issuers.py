"""Several issuers with fetched keys: they share nothing, and voicepass fetches no address that a token names."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Final

import httpx
import pytest

from elevenlabs_emulator import EmulatedAgent, Emulator, create_emulator
from tests.canaries import API_KEY
from tests.conftest import AGENT_ID, AUDIENCE, TOKEN_ISSUER, settings_with
from tests.identity.hostile_jwks import KID, make_jwk, make_set
from tests.identity.hostile_tokens import Mint, get_ec_key, get_rsa_key, signer_for
from tests.identity.issuer import EC_JWK, JWKS_PATH, OLD, Issuer, make_answer, open_trap
from tests.servers import running
from voicepass.app import create_app
from voicepass.errors import Refusal, TokenInvalid
from voicepass.identity import FixedKey, JwtAuthenticator, TrustedIssuer
from voicepass.identity.jwks import PublishedKeys
from voicepass.identity.keys import key_from_secret
from voicepass.model import User

pytestmark = pytest.mark.anyio

NOW: Final = 1_800_000_000.0

PAIRS: Final = [("RS256", "RS256"), ("RS256", "ES256"), ("RS256", "HS256"), ("ES256", "ES256"), ("ES256", "HS256")]


def make_mint(letter: str, algorithm: str) -> Mint:
    signer = signer_for(algorithm, owner="provider" if letter == "a" else "attacker")
    return Mint(
        signer=signer,
        token_issuer=f"https://{letter}.example",
        audience=f"audience of {letter}",
        now=NOW,
        kid=f"key of {letter}",
    )


@asynccontextmanager
async def build_authenticator(
    issuer: Issuer, *mints: Mint, jwks: Sequence[object] = ()
) -> AsyncIterator[JwtAuthenticator]:
    """Trust the issuer of each mint. voicepass fetches their keys, except the secrets of HS*."""
    sources: list[FixedKey | PublishedKeys] = []
    for mint, jwk in zip(mints, jwks, strict=True):
        if jwk is None:
            sources.append(
                FixedKey(replace(key_from_secret(mint.signer.published, "HS256"), names={"kid": mint.kid or ""}))
            )
            continue
        path = f"/{len(sources)}"
        issuer.answers[path] = make_answer(make_set(*jwk) if isinstance(jwk, list) else make_set(jwk))
        sources.append(
            PublishedKeys(
                url=issuer.url + path,
                token_issuer=mint.token_issuer,
                algorithm=mint.signer.algorithm,
                clock=issuer.clock,
            )
        )
    trusted = [
        TrustedIssuer(
            token_issuer=mint.token_issuer,
            algorithm=mint.signer.algorithm,
            keys=source,
            audience=mint.audience,
            leeway_seconds=mint.leeway_seconds,
        )
        for mint, source in zip(mints, sources, strict=True)
    ]
    try:
        yield JwtAuthenticator(trusted=trusted, clock=lambda: NOW)
    finally:
        for source in sources:
            if isinstance(source, PublishedKeys):
                await source.aclose()


def find_jwk(mint: Mint, *, kid: str | None = None) -> dict[str, object] | None:
    owner = "provider" if mint.token_issuer == "https://a.example" else "attacker"
    if mint.signer.algorithm == "HS256":
        return None
    key = get_rsa_key(owner) if mint.signer.algorithm == "RS256" else get_ec_key(owner, mint.signer.algorithm)
    return make_jwk(key, kid=kid or mint.kid)


def make_mixed_tokens(own: Mint, other: Mint) -> Iterator[tuple[str, str]]:
    """Make tokens of the issuer `own` with a key, name, audience or header of the issuer `other`."""
    ours, theirs = own.header(kid=own.kid), other.header(kid=other.kid)
    as_text = signer_for("HS256", secret=own.signer.published)
    as_their_text = signer_for("HS256", secret=other.signer.published)
    yield "their key", own.token(header=ours, sign=other.signer.sign)
    yield "their key, no name", own.token(sign=other.signer.sign)
    yield "their key under its name", own.token(header=ours | {"kid": other.kid}, sign=other.signer.sign)
    yield "their key and algorithm", own.token(header=ours | {"alg": theirs["alg"]}, sign=other.signer.sign)
    yield "their whole header and key", own.token(header=theirs, sign=other.signer.sign)
    yield "their name, our key", own.token(header=ours | {"kid": other.kid})
    yield (
        "our issuer and theirs in a list",
        own.token(
            header=theirs, claims=other.claims(iss=[own.token_issuer, other.token_issuer]), sign=other.signer.sign
        ),
    )
    yield "their issuer, our key", own.token(header=ours, claims=other.claims())
    yield "their audience, our key", own.token(header=ours, claims=own.claims(aud=other.audience))
    yield "our public key as a secret", own.token(header=ours | {"alg": "HS256"}, sign=as_text.sign)
    yield "their public key as a secret", own.token(header=theirs | {"alg": "HS256"}, sign=as_their_text.sign)
    yield "their issuer in the header", own.token(header=ours | {"iss": other.token_issuer}, sign=other.signer.sign)


@pytest.mark.parametrize(("algorithm", "other_algorithm"), PAIRS)
@pytest.mark.parametrize("is_same_kid", [False, True])
async def test_two_issuers_never_share_a_key_an_algorithm_or_an_audience(
    issuer: Issuer, algorithm: str, other_algorithm: str, *, is_same_kid: bool
) -> None:
    a, b = make_mint("a", algorithm), make_mint("b", other_algorithm)
    if is_same_kid:
        a, b = (replace(mint, kid="key-1") for mint in (a, b))
    tokens = {
        f"{own.token_issuer}: {name}": token
        for own, other in ((a, b), (b, a))
        for name, token in make_mixed_tokens(own, other)
    }
    if is_same_kid:  # then these tokens are valid
        del tokens["https://a.example: their name, our key"], tokens["https://b.example: their name, our key"]
    if other_algorithm == "HS256":  # this token is valid too, because its own secret signs it
        del tokens["https://b.example: our public key as a secret"]

    async with build_authenticator(issuer, a, b, jwks=[find_jwk(a), find_jwk(b)]) as authenticator:
        good = [await get_user(authenticator, mint.token(header=mint.header(kid=mint.kid))) for mint in (a, b)]
        accepted = [name for name, token in tokens.items() if await get_user(authenticator, token) is not TokenInvalid]

    assert [user.issuer for user in good if isinstance(user, User)] == ["https://a.example", "https://b.example"]
    assert accepted == []
    assert len(tokens) >= 21


async def test_a_token_is_tried_with_eight_keys_at_most(issuer: Issuer) -> None:
    mint, others = make_mint("a", "ES256"), [OLD | {"kid": f"k{n}"} for n in range(8)]
    own, users = find_jwk(mint), []
    for published in ([*others[:7], own], [*others, own]):
        async with build_authenticator(issuer, mint, jwks=[published]) as authenticator:
            users.append(await get_user(authenticator, mint.token()))

    assert isinstance(users[0], User)
    assert users[1] is TokenInvalid


async def get_user(authenticator: JwtAuthenticator, token: str) -> User | type[Refusal]:
    try:
        return await authenticator.user_of(token)
    except Refusal as refusal:
        return type(refusal)


# Addresses that a token names ---------------------------------------------------------------------------------------


async def test_no_address_in_a_token_is_ever_fetched(issuer: Issuer) -> None:
    mint = replace(make_mint("a", "ES256"), kid=KID)
    attacker = signer_for("ES256", owner="attacker")
    attackers_jwk = make_jwk(get_ec_key("attacker", "ES256"), kid=KID)
    async with (
        open_trap() as (key_url, key_visitors),
        open_trap() as (chain_url, chain_visitors),
        build_authenticator(issuer, mint, jwks=[EC_JWK]) as authenticator,
    ):
        lures: list[dict[str, object]] = [
            {"jku": f"{key_url}/jwks.json"},
            {"x5u": f"{chain_url}/chain.pem"},
            {"jwk": attackers_jwk},
            {"jwk": attackers_jwk | {"x5u": chain_url, "jku": key_url}},
            {"x5c": [chain_url]},
            {"iss": key_url},
            {"jku": key_url, "x5u": chain_url, "jwk": attackers_jwk, "x5c": ["AAAA"], "x5t": "AAAA"},
        ]
        lures += [lure | {"kid": kid} for lure in lures for kid in (KID, "unknown", key_url, f"{chain_url}/key")]
        forged = [mint.token(header=mint.header(**lure), sign=attacker.sign) for lure in lures]
        forged += [
            mint.token(header=mint.header(kid=KID), claims=mint.claims(iss=url), sign=sign)
            for url in (key_url, chain_url)
            for sign in (mint.signer.sign, attacker.sign)
        ]

        refused = [await get_user(authenticator, token) for token in forged]
        honest = await get_user(authenticator, mint.token(header=mint.header(**lures[-1] | {"kid": KID})))

    assert refused == [TokenInvalid] * len(forged)
    assert isinstance(honest, User)
    assert (key_visitors, chain_visitors) == ([], [])


# The whole service --------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.alone
async def test_during_a_flood_of_unknown_key_names_over_http_every_signed_in_user_gets_a_pass(issuer: Issuer) -> None:
    mint = Mint(signer=signer_for("ES256"), token_issuer=TOKEN_ISSUER, audience=AUDIENCE, now=time.time())
    good = {
        "Authorization": f"Bearer {mint.token(header=mint.header(kid=KID), claims=mint.claims(exp=time.time() + 900))}"
    }
    flood = [{"Authorization": f"Bearer {mint.token(header=mint.header(kid=f'unknown-{n}'))}"} for n in range(10_000)]

    def emulator(url: str) -> Any:
        return create_emulator(
            Emulator(
                agents=[EmulatedAgent(agent_id=AGENT_ID)],
                api_keys={API_KEY: frozenset({"convai_write"})},
                public_ws_base=url.replace("http", "ws"),
            )
        )

    with running(emulator) as elevenlabs:
        settings = settings_with(
            voicepass_jwt_algorithm="ES256",
            voicepass_jwt_secret=None,
            voicepass_jwks_url=issuer.url + JWKS_PATH,
            elevenlabs_base_url=elevenlabs,
            voicepass_log_level="warning",
        )
        with running(lambda _url: create_app(settings)) as service:
            async with httpx.AsyncClient(base_url=service, trust_env=False, timeout=30) as client:
                idle = [await measure_pass(client, good) for _ in range(300)]
                began = time.monotonic()
                refused, flooded = [], []
                for wave in range(0, len(flood), 25):
                    *answers, served = await asyncio.gather(
                        *(measure_pass(client, headers) for headers in [*flood[wave : wave + 25], good])
                    )
                    refused += answers
                    flooded.append(served)
                took = time.monotonic() - began

    p99s = [statistics.quantiles([seconds for _, seconds in answers], n=100)[-1] * 1000 for answers in (idle, flooded)]
    print(f"\n10,000 unknown names in {took:.0f} s: {len(issuer.asked)} fetches; ")
    print(f"p99 of a good token {p99s[0]:.1f} ms idle, {p99s[1]:.1f} ms during waves of 25")
    assert {status for status, _ in idle + flooded} == {200}
    assert {status for status, _ in refused} == {401}
    assert len(issuer.asked) <= 1 + (took + 30) // 30


async def measure_pass(client: httpx.AsyncClient, headers: dict[str, str]) -> tuple[int, float]:
    began = time.monotonic()
    response = await client.post("/v1/signed-url", headers=headers)
    return response.status_code, time.monotonic() - began
