"""Every identity provider of the document: its block, as printed, accepts a token of the documented shape only."""

import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.canaries import API_KEY
from tests.cli.test_cli import CLEAN, run
from tests.conftest import settings_with
from tests.identity.hostile_jwks import jwk_of
from tests.identity.hostile_tokens import Mint, ec_key_of, ed25519_key_of, rsa_key_of, signer_for
from tests.servers import running
from tests.tables import table
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
BLOCKS: dict[str, str] = dict(re.findall(r"<!--([a-z0-9-]+)-->\n```toml\n(.*?)```", DOCUMENT, re.DOTALL))


def vary(name: str, *, without: str = "", to: list[str]) -> str:
    """The block with these lines, which the document prints, instead of those of the same keys and of `without`."""
    keys = {without, *(line.split(" ")[0] for line in to)}
    assert all(f"`{line}`" in DOCUMENT for line in to)
    return "\n".join([*(line for line in BLOCKS[name].splitlines() if line.split(" ")[0] not in keys), *to, ""])


BLOCKS |= {
    "better-auth-anonymous": vary("better-auth", to=["required_claims = { isAnonymous = false }"]),
    "cognito-access": vary(
        "cognito", without="audience", to=['required_claims = { client_id = "CLIENT", token_use = "access" }']
    ),
    "supabase-legacy": vary(
        "supabase", without="jwks_url", to=['secret_env = "SUPABASE_JWT_SECRET"', 'algorithm = "HS256"']
    ),
}
SECRETS = re.findall(r'secret_env = "(\w+)"', DOCUMENT)
KID = "key-2026"
KEYS: dict[str, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey] = {
    "RS256": rsa_key_of("provider"),
    "ES256": ec_key_of("provider", "ES256"),
    "ES384": ec_key_of("provider", "ES384"),
    "EdDSA": ed25519_key_of("provider"),
}

Claims = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shape:
    """What a provider documents of its tokens. `wrong`: what differs in its other tokens; None takes a claim out."""

    claims: Claims
    user: tuple[str, str | None]
    wrong: dict[str, Claims]


UUID = "11111111-2222-3333-4444-555555555555"
COGNITO = {"sub": UUID, "jti": "j", "origin_jti": "o", "event_id": "e", "auth_time": 1795500000}
COGNITO_ID = {"aud": "CLIENT", "token_use": "id", "name": "Ada", "cognito:username": UUID, "client_id": None}
COGNITO_ACCESS = {"client_id": "CLIENT", "token_use": "access", "username": UUID, "aud": None}
BETTER_AUTH = {"sub": "Qx7", "id": "Qx7", "aud": "https://APP.example", "name": "Ada", "email": "ada@app.example"}
SUPABASE = {
    "sub": UUID,
    "aud": "authenticated",
    "role": "authenticated",
    "aal": "aal1",
    "amr": [{"method": "password", "timestamp": 1795500000}],
    "session_id": "s",
    "email": "",
    "is_anonymous": False,
    "app_metadata": {"provider": "email", "providers": ["email"]},
    "user_metadata": {"full_name": "Ada"},
}
SUPABASE_WRONG: dict[str, Claims] = {
    "anonymous user": {"is_anonymous": True, "user_metadata": {}},
    "anon key": {"iss": "supabase", "ref": "PROJECT", "role": "anon", "sub": None, "aud": None, "is_anonymous": None},
    "anon key with the project's iss": {"role": "anon", "sub": None, "aud": None, "is_anonymous": None},
    "service_role key": {"iss": "supabase", "role": "service_role", "sub": None, "aud": None, "is_anonymous": None},
    "another audience": {"aud": "service"},
}

SHAPES: dict[str, Shape] = {
    "auth0": Shape(
        {
            "sub": "auth0|5f7c8ec7c33c6c004bbafe82",
            "aud": ["https://voice.example", "https://TENANT.eu.auth0.com/userinfo"],
            "azp": "CLIENT",
            "scope": "openid profile email",
            "https://voice.example/name": "Ada",
        },
        ("auth0|5f7c8ec7c33c6c004bbafe82", "Ada"),
        {
            "ID token": {"aud": "CLIENT", "azp": None, "scope": None, "name": "Ada", "nonce": "n"},
            "another API": {"aud": ["https://other.example", "https://TENANT.eu.auth0.com/userinfo"]},
            "another tenant": {"iss": "https://OTHER.eu.auth0.com/"},
            "issuer without its slash": {"iss": "https://TENANT.eu.auth0.com"},
        },
    ),
    "authjs": Shape(
        {
            "sub": "github:583231",
            "aud": "voicepass",
            "name": "Ada",
            "email": "a@app.example",
            "picture": None,
            "jti": "j",
        },
        ("github:583231", "Ada"),
        {"another audience": {"aud": "another"}, "another application": {"iss": "https://OTHER.example"}},
    ),
    "better-auth": Shape(
        BETTER_AUTH,
        ("Qx7", "Ada"),
        {"another application": {"iss": "https://OTHER.example"}, "another audience": {"aud": "https://OTHER.example"}},
    ),
    "better-auth-anonymous": Shape(
        BETTER_AUTH | {"isAnonymous": False},
        ("Qx7", "Ada"),
        {"anonymous user": {"isAnonymous": True, "name": "Anonymous"}, "unknown": {"isAnonymous": None}},
    ),
    "clerk": Shape(
        {"sub": "user_2abcDEF", "azp": "https://APP.example", "sid": "sess_2", "sts": "active", "v": 2, "name": "Ada"},
        ("user_2abcDEF", "Ada"),
        {
            "another origin": {"azp": "https://other.example"},
            "no origin": {"azp": None},
            "pending session": {"sts": "pending"},
            "another instance": {"iss": "https://clerk.OTHER.example"},
        },
    ),
    "cognito": Shape(
        COGNITO | COGNITO_ID,
        (UUID, "Ada"),
        {
            "access token": COGNITO_ACCESS,
            "access token with an audience": COGNITO_ACCESS | {"aud": "CLIENT"},
            "another client": {"aud": "OTHER"},
            "another pool": {"iss": "https://cognito-idp.eu-central-1.amazonaws.com/OTHER"},
        },
    ),
    "cognito-access": Shape(
        COGNITO | COGNITO_ACCESS | {"name": "Ada", "scope": "aws.cognito.signin.user.admin"},
        (UUID, "Ada"),
        {"ID token": COGNITO_ID, "another client": {"client_id": "OTHER"}},
    ),
    "simplejwt": Shape(
        {"sub": 42, "aud": "voicepass", "token_type": "access", "jti": "j", "name": "Ada Lovelace"},
        ("42", "Ada Lovelace"),
        {
            "refresh token": {"token_type": "refresh"},
            "sliding token": {"token_type": "sliding"},
            "another audience": {"aud": "another"},
            "default settings": {"aud": None, "iss": None, "sub": None, "user_id": 42},
        },
    ),
    "fastapi-users": Shape(
        {"sub": UUID, "aud": ["fastapi-users:auth"], "name": "Ada"},
        (UUID, "Ada"),
        {
            "password-reset token": {"aud": "fastapi-users:reset", "password_fgpt": "x"},
            "verification token": {"aud": "fastapi-users:verify", "email": "ada@app.example"},
            "the default strategy": {"iss": None},
            "no lifetime": {"exp": None},
        },
    ),
    "firebase": Shape(
        {
            "sub": "Xf3uid",
            "user_id": "Xf3uid",
            "aud": "PROJECT",
            "auth_time": 1795500000,
            "name": "Ada",
            "firebase": {"identities": {"email": ["ada@app.example"]}, "sign_in_provider": "password"},
        },
        ("Xf3uid", "Ada"),
        {
            "anonymous user": {"firebase": {"identities": {}, "sign_in_provider": "anonymous"}, "name": None},
            "custom token": {"firebase": {"identities": {}, "sign_in_provider": "custom"}},
            "session cookie": {"iss": "https://session.firebase.google.com/PROJECT"},
            "another project": {"iss": "https://securetoken.google.com/OTHER", "aud": "OTHER"},
            "another audience": {"aud": "OTHER"},
        },
    ),
    "keycloak": Shape(
        {
            "sub": "f:1:ada",
            "aud": ["voicepass", "account"],
            "typ": "Bearer",
            "azp": "frontend",
            "realm_access": {"roles": ["seller", "offline_access"]},
            "resource_access": {"account": {"roles": ["view-profile"]}},
            "name": "Ada Lovelace",
            "preferred_username": "ada",
            "sid": "s",
        },
        ("f:1:ada", "Ada Lovelace"),
        {
            "ID token": {"typ": "ID", "aud": "frontend"},
            "ID token of a client called voicepass": {"typ": "ID", "aud": "voicepass", "azp": "voicepass"},
            "refresh token": {"typ": "Refresh", "aud": "https://sso.example/realms/REALM"},
            "another client": {"aud": "account"},
            "lightweight token": {"sub": None, "name": None, "preferred_username": None},
            "another realm": {"iss": "https://sso.example/realms/OTHER"},
        },
    ),
    "logto": Shape(
        {"sub": "u1d2e3f4", "aud": "https://voice.example", "client_id": "app", "scope": "", "name": "Ada"},
        ("u1d2e3f4", "Ada"),
        {"ID token": {"aud": "app", "client_id": None}, "another API": {"aud": "https://other.example"}},
    ),
    "entra": Shape(
        {
            "sub": "AAAAAAAAAAAAAAAAAAAAAIkzqFVrSaSaFHy782bbtaQ",
            "oid": "00000000-0000-0000-66f3-3332eca7ea81",
            "tid": "TENANT-ID",
            "aud": "API-CLIENT-ID",
            "azp": "frontend",
            "scp": "SCOPE",
            "roles": ["Seller"],
            "name": "Ada",
            "preferred_username": "ada@app.example",
            "ver": "2.0",
        },
        ("00000000-0000-0000-66f3-3332eca7ea81", "Ada"),
        {
            "ID token": {"aud": "frontend", "scp": None, "azp": None},
            "app without a user": {"scp": None, "roles": ["Seller"], "idtyp": "app"},
            "another scope": {"scp": "OTHER.READ"},
            "version 1": {"iss": "https://sts.windows.net/TENANT-ID/", "aud": "api://API-CLIENT-ID", "ver": "1.0"},
            "token for Graph": {"aud": "00000003-0000-0000-c000-000000000000", "scp": "User.Read"},
            "another tenant": {"iss": "https://login.microsoftonline.com/OTHER/v2.0", "tid": "OTHER"},
            "without the scope profile": {"oid": None},
        },
    ),
    "okta": Shape(
        {
            "sub": "ada@app.example",
            "uid": "00uid4BxXw6I6TV4m0g3",
            "cid": "frontend",
            "aud": "api://default",
            "scp": ["openid", "profile"],
            "name": "Ada",
            "jti": "AT.1",
            "ver": 1,
        },
        ("00uid4BxXw6I6TV4m0g3", "Ada"),
        {
            "ID token": {"aud": "frontend", "cid": None, "uid": None, "sub": "00uid4BxXw6I6TV4m0g3"},
            "the organization's own server": {"iss": "https://ORG.okta.com", "aud": "https://ORG.okta.com"},
            "machine": {"uid": None, "sub": "0oa1client"},
        },
    ),
    "privy": Shape(
        {"sub": "did:privy:cl1", "aud": "APP-ID", "sid": "s"},
        ("did:privy:cl1", None),
        {"another app": {"aud": "OTHER"}},
    ),
    "stytch": Shape(
        {"sub": "user-live-1", "aud": ["PROJECT_ID"], "https://stytch.com/session": {"id": "s"}, "name": "Ada"},
        ("user-live-1", "Ada"),
        {"another project": {"iss": "stytch.com/OTHER", "aud": ["OTHER"]}, "another audience": {"aud": ["OTHER"]}},
    ),
    "supabase": Shape(SUPABASE, (UUID, "Ada"), SUPABASE_WRONG),
    "supabase-legacy": Shape(SUPABASE, (UUID, "Ada"), SUPABASE_WRONG),
    "workos": Shape(
        {"sub": "user_01", "aud": "voicepass", "name": "Ada Lovelace", "sid": "session_01", "role": "member"},
        ("user_01", "Ada Lovelace"),
        {
            "no JWT template": {"aud": None, "name": None},
            "issuer of before 2025": {"iss": "https://api.workos.com"},
            "another client": {"iss": "https://api.workos.com/user_management/OTHER"},
        },
    ),
}


@pytest.fixture(scope="module")
def provider() -> Iterator[str]:
    """Publishes the keys of every provider, and the discovery documents of those that have one, on loopback."""
    published = [jwk_of(key, kid=KID, use="sig", alg=algorithm) for algorithm, key in KEYS.items()]

    async def keys(_request: Request) -> Response:
        return JSONResponse({"keys": published})

    async def discovery(request: Request) -> Response:
        issuer = "https://sso.example/" + request.path_params["realm"]
        return JSONResponse({"issuer": issuer, "jwks_uri": str(request.base_url) + "keys"})

    routes = [Route("/{realm:path}" + DISCOVERY_PATH, discovery), Route("/{path:path}", keys)]
    with running(lambda _url: Starlette(routes=routes)) as url:
        yield url


def block_of(name: str, provider: str) -> str:
    """The printed block; only the host of its keys is ours."""
    return re.sub(r'(jwks_url = ")https://[^/]+', rf"\1{provider}", BLOCKS[name])


@asynccontextmanager
async def authenticator_of(
    name: str, provider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[JwtAuthenticator, Mint]]:
    """What voicepass makes of the printed block, and a mint of the provider's tokens."""
    (tmp_path / "policy.toml").write_text(block_of(name, provider))
    for variable in SECRETS:
        monkeypatch.setenv(variable, signer_for("HS256").published)
    here = dict.fromkeys(("voicepass_jwt_secret", "voicepass_jwt_issuer", "voicepass_jwt_audience"))
    (trusted,) = configure(settings_with(voicepass_policy_file=str(tmp_path / "policy.toml"), **here)).trusted
    yield JwtAuthenticator(trusted=[trusted], clock=time.time), mint_of(trusted.token_issuer, trusted.algorithm)
    if isinstance(trusted.keys, PublishedKeys):
        await trusted.keys.aclose()


def mint_of(token_issuer: str, algorithm: str) -> Mint:
    return Mint(signer=signer_for(algorithm), token_issuer=token_issuer, audience="", now=time.time())


def token(mint: Mint, claims: Claims) -> str:
    now = int(mint.now)
    every = {"iss": mint.token_issuer, "iat": now, "exp": now + 60} | claims
    stated = {claim: value for claim, value in every.items() if value is not None}
    return mint.token(header=mint.header(kid=KID), claims=stated)


@table("name", SHAPES)
async def test_a_token_of_the_providers_shape_is_accepted_and_its_other_tokens_are_not(
    name: str, provider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, accepted = SHAPES[name], {}

    async with authenticator_of(name, provider, tmp_path, monkeypatch) as (authenticator, mint):
        user = await authenticator.user_of(token(mint, shape.claims))
        for wrong, changes in shape.wrong.items():
            try:
                accepted[wrong] = await authenticator.user_of(token(mint, shape.claims | changes))
            except TokenInvalid:
                continue

    assert (user.issuer, user.id, user.name) == (mint.token_issuer, *shape.user)
    assert accepted == {}


@pytest.mark.long
@table("name", SHAPES)
async def test_no_provider_takes_the_token_of_another(
    name: str, provider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted: list[tuple[str, User]] = []

    async with authenticator_of(name, provider, tmp_path, monkeypatch) as (authenticator, mint):
        for other, shape in SHAPES.items():
            for signed_with in ("HS256", *KEYS):
                is_own = signed_with == mint.signer.algorithm
                forger = mint_of(f"https://{other}" if is_own else mint.token_issuer, signed_with)
                try:
                    accepted.append((other, await authenticator.user_of(token(forger, shape.claims))))
                except Refusal:
                    continue

    assert accepted == []


def test_the_command_line_explains_a_token_as_the_document_shows(provider: str, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(block_of("auth0", provider))
    environment = CLEAN | {
        "ELEVENLABS_API_KEY": API_KEY,
        "ELEVENLABS_AGENT_ID": "agent_01k0example",
        "VOICEPASS_POLICY_FILE": "policy.toml",
    }
    unverified_token = token(mint_of("https://TENANT.eu.auth0.com/", "RS256"), SHAPES["auth0"].claims)

    checked = run("policy", "check", "policy.toml", cwd=tmp_path, environment=CLEAN)
    explained = run("policy", "explain", unverified_token, cwd=tmp_path, environment=environment)

    shown = DOCUMENT.replace("\n   ", "\n")
    assert f"```\n{checked.stdout}```" in shown
    assert f"```\n{explained.stdout}```" in shown


async def test_keycloak_roles_open_an_agent(provider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with authenticator_of("keycloak", provider, tmp_path, monkeypatch) as (authenticator, mint):
        user = await authenticator.user_of(token(mint, SHAPES["keycloak"].claims))

    (condition,) = re.findall(r'allow = \[\{ "(realm_access\.roles)" = \["(seller)"\] \}\]', DOCUMENT)
    assert Rule({condition[0]: (condition[1],)}).admits(user.claims)


def test_every_provider_of_the_document_is_tested_and_says_what_a_frontend_needs() -> None:
    sections = re.split(r"^## ", DOCUMENT, flags=re.MULTILINE)[1:]

    assert set(BLOCKS) == set(SHAPES)
    assert len(sections) == 16
    assert [section.split("\n")[0] for section in sections if section.count("**Send** ") != 1] == []


def test_the_code_for_auth_js_gives_a_user_the_same_id_at_every_sign_in() -> None:
    section = DOCUMENT[DOCUMENT.index("## Auth.js") : DOCUMENT.index("## Better Auth")]

    assert 'if (account) token.sub = account.provider + ":" + account.providerAccountId;' in section


def test_the_example_of_the_policy_document_is_a_good_file(tmp_path: Path) -> None:
    document = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
    example, *further = re.findall(r"```toml\n(.*?)```", document, re.DOTALL)
    for text in (*further, example):
        (tmp_path / "policy.toml").write_text(text)
        read_policy_file(str(tmp_path / "policy.toml"))

    policy_file = read_policy_file(str(tmp_path / "policy.toml"))

    assert set(policy_file.agents) == {"default", "seller"}
    assert [rule.whom for rule in policy_file.agents["seller"].build("seller").allow] == [
        "users whose role is seller or admin and app_metadata.plan is pro",
        "users whose scope is voice:talk",
    ]
    assert policy_file.limits.user == UserLimitsEntry(), "the document shows the defaults"
    models = (policy_file.agents["seller"], policy_file.issuers[0], policy_file.limits.user)
    for key in (key for model in models for key in model.__class__.model_fields):
        assert f"`{key}`" in document
