"""Every identity provider of the documents: its block, as printed, takes a token of the provider's documented shape."""

import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from jose import jwk, jwt
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.canaries import API_KEY
from tests.cli.test_cli import CLEAN, run
from tests.conftest import settings_with
from tests.servers import running
from voicepass.config.build import configure
from voicepass.config.limits import UserLimitsEntry
from voicepass.config.policyfile import read_policy_file
from voicepass.errors import Refusal, TokenInvalid
from voicepass.identity import JwtAuthenticator
from voicepass.identity.jwks import DISCOVERY_PATH, PublishedKeys
from voicepass.model import User
from voicepass.policy import Rule

pytestmark = pytest.mark.anyio

DOCUMENT = (Path(__file__).parents[2] / "docs" / "identity-providers.md").read_text()
BLOCKS: dict[str, str] = dict(re.findall(r"<!-- ([a-z0-9-]+) -->\n```toml\n(.*?)```", DOCUMENT, re.DOTALL))
SECRET = "a-shared-secret-of-48-characters-for-these-tests"
KID = "key-2026"

# What each provider documents of its tokens: the claims, the user that comes of it, and a token for someone else.
SHAPES: dict[str, tuple[dict[str, Any], tuple[str, str | None], dict[str, Any]]] = {
    "auth0": (
        {
            "sub": "auth0|5f7c8ec7c33c6c004bbafe82",
            "aud": ["https://voice.example", "https://TENANT.eu.auth0.com/userinfo"],
            "azp": "my_client_id",
            "scope": "openid profile email",
            "https://voice.example/name": "Ada",
        },
        ("auth0|5f7c8ec7c33c6c004bbafe82", "Ada"),
        {"aud": ["https://other.example"]},
    ),
    "clerk": (
        {
            "sub": "user_2abcDEF",
            "azp": "https://APP.example",
            "sid": "sess_2abc",
            "sts": "active",
            "v": 2,
            "fva": [0, -1],
            "name": "Ada",
        },
        ("user_2abcDEF", "Ada"),
        {"azp": "https://other.example"},
    ),
    "supabase-legacy": (
        {
            "sub": "11111111-2222-3333-4444-555555555555",
            "aud": "authenticated",
            "role": "authenticated",
            "aal": "aal1",
            "amr": [{"method": "password", "timestamp": 1795500000}],
            "session_id": "s",
            "is_anonymous": False,
            "app_metadata": {"provider": "email", "providers": ["email"]},
            "user_metadata": {"full_name": "Ada"},
        },
        ("11111111-2222-3333-4444-555555555555", "Ada"),
        {"aud": None, "sub": None, "role": "anon"},
    ),
    "supabase": (
        {
            "sub": "11111111-2222-3333-4444-555555555555",
            "aud": "authenticated",
            "role": "authenticated",
            "email": "ada@app.example",
            "user_metadata": {"full_name": "Ada"},
        },
        ("11111111-2222-3333-4444-555555555555", "Ada"),
        {"aud": "service"},
    ),
    "firebase": (
        {
            "sub": "Xf3uid",
            "user_id": "Xf3uid",
            "aud": "PROJECT",
            "auth_time": 1795500000,
            "name": "Ada",
            "firebase": {"identities": {"email": ["ada@app.example"]}, "sign_in_provider": "password"},
        },
        ("Xf3uid", "Ada"),
        {"aud": "OTHER-PROJECT"},
    ),
    "cognito": (
        {
            "sub": "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee",
            "client_id": "CLIENT",
            "token_use": "access",
            "scope": "aws.cognito.signin.user.admin",
            "username": "ada",
            "jti": "j",
            "origin_jti": "o",
            "event_id": "e",
        },
        ("aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee", "ada"),
        {"client_id": "ANOTHER"},
    ),
    "entra": (
        {
            "sub": "AAAAAAAAAAAAAAAAAAAAAIkzqFVrSaSaFHy782bbtaQ",
            "oid": "00000000-0000-0000-66f3-3332eca7ea81",
            "tid": "TENANT-ID",
            "aud": "API-CLIENT-ID",
            "azp": "frontend",
            "scp": "voice.talk",
            "roles": ["Seller"],
            "name": "Ada",
            "preferred_username": "ada@app.example",
            "uti": "u",
            "ver": "2.0",
        },
        ("00000000-0000-0000-66f3-3332eca7ea81", "Ada"),
        {"aud": "ANOTHER-API"},
    ),
    "okta": (
        {
            "sub": "ada@app.example",
            "uid": "00uid4BxXw6I6TV4m0g3",
            "cid": "frontend",
            "aud": "api://default",
            "scp": ["openid", "profile"],
            "name": "Ada",
            "jti": "AT.1",
            "ver": 1,
            "auth_time": 1795500000,
        },
        ("00uid4BxXw6I6TV4m0g3", "Ada"),
        {"aud": "https://ORG.okta.com"},
    ),
    "keycloak": (
        {
            "sub": "f:1:ada",
            "aud": ["voicepass", "account"],
            "typ": "Bearer",
            "azp": "frontend",
            "realm_access": {"roles": ["seller", "offline_access"]},
            "resource_access": {"account": {"roles": ["view-profile"]}},
            "preferred_username": "ada",
            "sid": "s",
        },
        ("f:1:ada", "ada"),
        {"aud": "account"},
    ),
    "authjs": (
        {"sub": "cuid1", "aud": "voicepass", "name": "Ada", "email": "ada@app.example", "picture": None, "jti": "j"},
        ("cuid1", "Ada"),
        {"aud": "another"},
    ),
}

RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())


def pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


SIGNING_KEYS = {"RS256": pem(RSA_KEY), "ES256": pem(EC_KEY), "HS256": SECRET}


@pytest.fixture(scope="module")
def provider() -> Iterator[str]:
    """Publishes the keys of every provider, and the discovery documents of those that have one, on loopback."""
    published = [
        jwk.construct(SIGNING_KEYS[algorithm], algorithm).public_key().to_dict() | {"kid": KID, "use": "sig"}
        for algorithm in ("RS256", "ES256")
    ]

    async def keys(_request: Request) -> Response:
        return JSONResponse({"keys": published})

    async def discovery(request: Request) -> Response:
        issuer = "https://sso.example/" + request.path_params["realm"]
        return JSONResponse({"issuer": issuer, "jwks_uri": str(request.base_url) + "keys"})

    routes = [Route("/{realm:path}" + DISCOVERY_PATH, discovery), Route("/{path:path}", keys)]
    with running(lambda _url: Starlette(routes=routes)) as url:
        yield url


@asynccontextmanager
async def authenticator_of(
    name: str, provider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[JwtAuthenticator, str, str]]:
    """What the printed block makes of the service; only the host of its keys is ours."""
    block = re.sub(r'(jwks_url = ")https://[^/]+', rf"\1{provider}", BLOCKS[name])
    (tmp_path / "policy.toml").write_text(block)
    monkeypatch.setenv("SUPABASE_JWT_SECRET", SECRET)
    monkeypatch.setenv("AUTH_SECRET", SECRET)
    here = dict.fromkeys(("voicepass_jwt_secret", "voicepass_jwt_issuer", "voicepass_jwt_audience"))
    settings = settings_with(voicepass_policy_file=str(tmp_path / "policy.toml"), **here)
    (trusted,) = configure(settings).trusted
    yield JwtAuthenticator(trusted=[trusted], clock=time.time), trusted.token_issuer, trusted.algorithm
    if isinstance(trusted.keys, PublishedKeys):
        await trusted.keys.aclose()


def token(issuer: str, algorithm: str, claims: dict[str, Any], **header: Any) -> str:
    now = int(time.time())
    times = {"iss": issuer, "iat": now, "exp": now + 60}
    return str(jwt.encode(times | claims, SIGNING_KEYS[algorithm], algorithm, headers={"kid": KID} | header))


@pytest.mark.parametrize("name", SHAPES)
async def test_a_token_of_the_providers_shape_is_accepted_and_one_for_others_is_not(
    name: str, provider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims, (user_id, user_name), for_others = SHAPES[name]

    async with authenticator_of(name, provider, tmp_path, monkeypatch) as (authenticator, issuer, algorithm):
        user = await authenticator.user_of(token(issuer, algorithm, claims))
        foreign = {claim: value for claim, value in (claims | for_others).items() if value is not None}
        with pytest.raises(TokenInvalid):
            await authenticator.user_of(token(issuer, algorithm, foreign))

    assert (user.issuer, user.id, user.name) == (issuer, user_id, user_name)


@pytest.mark.parametrize("name", SHAPES)
async def test_no_provider_takes_the_token_of_another(
    name: str, provider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted: list[tuple[str, User]] = []

    async with authenticator_of(name, provider, tmp_path, monkeypatch) as (authenticator, issuer, algorithm):
        for other, (claims, _, _) in SHAPES.items():
            for signed_with in SIGNING_KEYS:
                if (other, signed_with) == (name, algorithm):
                    continue
                forged = token(issuer if signed_with != algorithm else f"https://{other}", signed_with, claims)
                try:
                    accepted.append((other, await authenticator.user_of(forged)))
                except Refusal:
                    continue

    assert accepted == []


@pytest.mark.parametrize("name", SHAPES)
def test_each_block_is_understood_and_explains_a_token_as_the_document_shows(
    name: str, provider: str, tmp_path: Path
) -> None:
    claims, (user_id, user_name), _ = SHAPES[name]
    block = re.sub(r'(jwks_url = ")https://[^/]+', rf"\1{provider}", BLOCKS[name])
    (tmp_path / "policy.toml").write_text(block)
    issuer, algorithm = re.findall(r'^(?:issuer|algorithm) = "(.+)"', block, re.MULTILINE)
    environment = CLEAN | {
        "ELEVENLABS_API_KEY": API_KEY,
        "ELEVENLABS_AGENT_ID": "agent_01k0example",
        "VOICEPASS_POLICY_FILE": "policy.toml",
        "SUPABASE_JWT_SECRET": SECRET,
        "AUTH_SECRET": SECRET,
    }

    checked = run("policy", "check", "policy.toml", cwd=tmp_path, environment=CLEAN)
    unverified_token = token(issuer, algorithm, claims)
    explained = run("policy", "explain", unverified_token, cwd=tmp_path, environment=environment)

    assert checked.stdout.startswith(f"believes {algorithm} tokens of {issuer} ")
    assert explained.stdout.splitlines() == [
        f"user {user_id!r} of {issuer}",
        "may use the agent default (agent_01k0example), open to every signed-in user",
        f"  user_id = {user_id!r}",
        f"  user_name = {user_name!r}",
    ]
    if name == "auth0":
        shown = DOCUMENT.replace("\n   ", "\n")
        assert f"```\n{checked.stdout}```" in shown
        assert f"```\n{explained.stdout}```" in shown


async def test_keycloak_roles_open_an_agent(provider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = SHAPES["keycloak"][0]

    async with authenticator_of("keycloak", provider, tmp_path, monkeypatch) as (authenticator, issuer, algorithm):
        user = await authenticator.user_of(token(issuer, algorithm, claims))

    (condition,) = re.findall(r'allow = \[\{ "(realm_access\.roles)" = \["(seller)"\] \}\]', DOCUMENT)
    assert Rule({condition[0]: (condition[1],)}).admits(user.claims)


def test_every_provider_of_the_document_is_tested() -> None:
    assert set(BLOCKS) == set(SHAPES)


def test_the_example_of_the_policy_document_is_a_good_file(tmp_path: Path) -> None:
    document = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
    example, *further = re.findall(r"```toml\n(.*?)```", document, re.DOTALL)
    for text in (*further, example):
        (tmp_path / "policy.toml").write_text(text)
        read_policy_file(str(tmp_path / "policy.toml"))

    policy_file = read_policy_file(str(tmp_path / "policy.toml"))

    assert set(policy_file.agents) == {"default", "seller"}
    assert [rule.whom for rule in policy_file.agents["seller"].rules] == [
        "users whose role is seller or admin and app_metadata.plan is pro",
        "users whose scope is voice:talk",
    ]
    assert policy_file.limits.user == UserLimitsEntry(), "the document shows the defaults"
    models = (policy_file.agents["seller"], policy_file.issuers[0], policy_file.limits.user)
    for key in (key for model in models for key in model.__class__.model_fields):
        assert f"`{key}`" in document
