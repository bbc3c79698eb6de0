"""Environment and policy file together: contradictions stop the start; workspaces, issuers and agents stay separate."""

import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import respx
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.canaries import API_KEY, secrets_in
from tests.conftest import (
    AUDIENCE,
    SIGNED_URL_PATH,
    TOKEN_ISSUER,
    UPSTREAM,
    MakeToken,
    serving,
    settings_with,
    signed_url,
)
from tests.identity.hostile_tokens import Mint, Signer, get_rsa_key, signer_for
from tests.tables import table
from voicepass.config.build import Configuration, configure, describe_ledger
from voicepass.config.environment import SettingsRefusedError

EU = "https://api.eu.residency.elevenlabs.io"
EU_KEY = "sk_canary-of-the-eu-0123456789"
SECRET = "canary-value-of-another-issuer-0123456789"
PRIVATE_PEM = get_rsa_key("provider").private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode("ascii")


def agent(alias: str, *lines: str) -> str:
    return "\n".join([f"[agents.{alias}]", f'id = "agent_{alias}"', *lines, ""])


def issuer(name: str, algorithm: str, key: str, audience: str = AUDIENCE) -> str:
    return f'[[issuers]]\nissuer = "{name}"\nalgorithm = "{algorithm}"\naudience = "{audience}"\n{key}\n'


def public_key(pem: str) -> str:
    return f"public_key = '''{pem}'''"


OPEN = 'allow = "everyone"'
IN_EU = (f'base_url = "{EU}"', 'api_key_env = "EU_KEY"')
NO_AGENT: dict[str, object] = {"elevenlabs_agent_id": None}
NO_ISSUER: dict[str, object] = {
    "voicepass_jwt_issuer": None,
    "voicepass_jwt_secret": None,
    "voicepass_jwt_audience": None,
}
OTHER = "https://other.example"
FILE = "VOICEPASS_POLICY_FILE"
PLAIN_ISSUER = "must not be an http:// address, where others could publish keys: see VOICEPASS_PLAIN_HTTP_HOSTS"
NO_AUDIENCE = (
    "is not set: give the 'aud' that your tokens name for this service, or in the policy file required_claims"
    ' such as { azp = ["https://app.example"] }'
)
UNSET = "is not set, though the policy file names it: make one with: openssl rand -base64 48"
TWICE = "names an issuer that has a block for this algorithm already: remove one of them"
AGENT_TWICE = f"ELEVENLABS_AGENT_ID is set, but {FILE} lists the agents: put its value there"
BARE = "must be the bare id or name: letters, digits, - and _ alone"
NO_API_KEY = "is not set: create a key with the permissions 'ElevenAgents: Write' and 'Read'"

# The policy file, the changed settings, the environment, and every printed line.
CONTRADICTIONS: dict[str, tuple[str, dict[str, object], dict[str, str], list[str]]] = {
    "an agent in the environment and agents in the file": (agent("a", OPEN), {}, {}, [AGENT_TWICE]),
    "variables in the environment and agents in the file": (
        agent("a", OPEN),
        NO_AGENT | {"voicepass_variables": {"plan": "plan"}},
        {},
        [f"VOICEPASS_VARIABLES is set, but {FILE} lists the agents: put its value there"],
    ),
    "a branch and an environment in the settings and agents in the file": (
        agent("a", OPEN),
        NO_AGENT | {"elevenlabs_branch_id": "agtbrch_1", "elevenlabs_environment": "staging"},
        {},
        [
            f"ELEVENLABS_BRANCH_ID is set, but {FILE} lists the agents: put its value there",
            f"ELEVENLABS_ENVIRONMENT is set, but {FILE} lists the agents: put its value there",
        ],
    ),
    "a query for a branch and a sentence for an environment": (
        "",
        {"elevenlabs_branch_id": "agtbrch_1&canary=1", "elevenlabs_environment": "canary value"},
        {},
        [f"ELEVENLABS_BRANCH_ID {BARE}", f"ELEVENLABS_ENVIRONMENT {BARE}"],
    ),
    "no agent at all": (
        "",
        NO_AGENT,
        {},
        ["ELEVENLABS_AGENT_ID is not set: copy your agent's id (agent_…) from the dashboard"],
    ),
    "no key for the agents of the usual host": (
        agent("a", OPEN) + agent("b", *IN_EU),
        NO_AGENT | {"elevenlabs_api_key": None},
        {"EU_KEY": EU_KEY},
        [f"ELEVENLABS_API_KEY {NO_API_KEY}"],
    ),
    "a region's key that is not there": (
        agent("a", *IN_EU),
        NO_AGENT,
        {},
        [f"EU_KEY {NO_API_KEY}"],
    ),
    "a region's key that is empty": (
        agent("a", *IN_EU),
        NO_AGENT,
        {"EU_KEY": " , "},
        [f"EU_KEY {NO_API_KEY}"],
    ),
    "a region's key that no header can carry": (
        agent("a", *IN_EU),
        NO_AGENT,
        {"EU_KEY": "sk_canary-valué"},
        ["EU_KEY holds a space, a line break or a character that no HTTP header can carry"],
    ),
    "one agent on two hosts": (
        agent("a", OPEN) + agent("b", *IN_EU).replace("agent_b", "agent_a"),
        NO_AGENT,
        {"EU_KEY": EU_KEY},
        [f"{FILE} names the agent agent_a on two hosts: give all its aliases one base_url"],
    ),
    "two keys of one host": (
        agent("a", *IN_EU) + agent("b", IN_EU[0], 'api_key_env = "SECOND_KEY"'),
        NO_AGENT,
        {"EU_KEY": EU_KEY, "SECOND_KEY": "sk_canary-value"},
        [f"SECOND_KEY is a second key for {EU}: write both into one variable, separated by a comma"],
    ),
    "two keys of the usual host": (
        agent("a", OPEN) + agent("b", f'base_url = "{UPSTREAM}/"', 'api_key_env = "SECOND_KEY"'),
        NO_AGENT,
        {"SECOND_KEY": "sk_canary-value"},
        [f"SECOND_KEY is a second key for {UPSTREAM}: write both into one variable, separated by a comma"],
    ),
    "an issuer in the environment and in the file": (
        issuer(TOKEN_ISSUER, "HS256", 'secret_env = "OTHER_SECRET"'),
        {},
        {"OTHER_SECRET": SECRET},
        [f"VOICEPASS_JWT_ISSUER {TWICE}"],
    ),
    "an issuer twice": (
        issuer(OTHER, "HS256", 'secret_env = "OTHER_SECRET"') * 2,
        {},
        {"OTHER_SECRET": SECRET},
        [f"{FILE} issuers.1: {TWICE}"],
    ),
    "a tenant of a template by its own name": (
        issuer(OTHER + "/{tid}", "RS256", 'jwks_url = "https://other.example/jwks"\ntenants = ["a", "b"]')
        + issuer(OTHER + "/b", "RS256", 'jwks_url = "https://other.example/jwks"'),
        {},
        {},
        [f"{FILE} issuers.1: {TWICE}"],
    ),
    "a secret that is not there": (
        issuer(OTHER, "HS256", 'secret_env = "OTHER_SECRET"'),
        {},
        {},
        [f"OTHER_SECRET {UNSET}"],
    ),
    "a secret that is empty": (
        issuer(OTHER, "HS256", 'secret_env = "OTHER_SECRET"'),
        {},
        {"OTHER_SECRET": ""},
        [f"OTHER_SECRET {UNSET}"],
    ),
    "a short secret": (
        issuer(OTHER, "HS256", 'secret_env = "OTHER_SECRET"'),
        {},
        {"OTHER_SECRET": "canary-value"},
        ["OTHER_SECRET must be at least 32 bytes long; this one has 12"],
    ),
    "a blank secret": (
        issuer(OTHER, "HS256", 'secret_env = "OTHER_SECRET"'),
        {},
        {"OTHER_SECRET": " " * 40},
        [f"OTHER_SECRET {UNSET}"],
    ),
    "a public key for a secret": (
        issuer(OTHER, "HS256", 'secret_env = "OTHER_SECRET"'),
        {},
        {"OTHER_SECRET": signer_for("RS256").published},
        ["OTHER_SECRET is a public key or a JWK, which anyone may hold; it cannot be an HS secret"],
    ),
    "a private key for a public one": (
        issuer(OTHER, "RS256", public_key(PRIVATE_PEM)),
        {},
        {},
        [
            f"{FILE} issuers.0.public_key: is a private key; give voicepass the public key only",
        ],
    ),
    "a text for a public key": (
        issuer(OTHER, "ES256", public_key("canary-value")),
        {},
        {},
        [f"{FILE} issuers.0.public_key: is not a PEM public key or certificate"],
    ),
    "a key of another kind": (
        issuer(OTHER, "ES256", public_key(signer_for("RS256").published)),
        {},
        {},
        [f"{FILE} issuers.0.public_key: is not a key for ES256"],
    ),
    "an issuer over http": (
        issuer("http://login.example", "HS256", 'secret_env = "OTHER_SECRET"'),
        {},
        {"OTHER_SECRET": SECRET},
        [f"{FILE} issuers.0.issuer: {PLAIN_ISSUER}"],
    ),
    "half an issuer in the environment and another in the file": (
        issuer(OTHER, "HS256", 'secret_env = "OTHER_SECRET"'),
        NO_ISSUER | {"voicepass_jwt_issuer": TOKEN_ISSUER},
        {"OTHER_SECRET": SECRET},
        [
            "VOICEPASS_JWT_SECRET is not set, and HS256 needs it: make one with: openssl rand -base64 48",
            f"VOICEPASS_JWT_AUDIENCE {NO_AUDIENCE}",
        ],
    ),
    "everything at once": (
        agent("a", *IN_EU) + issuer(TOKEN_ISSUER, "HS256", 'secret_env = "OTHER_SECRET"'),
        {},
        {},
        [
            f"EU_KEY {NO_API_KEY}",
            f"OTHER_SECRET {UNSET}",
            f"VOICEPASS_JWT_ISSUER {TWICE}",
            AGENT_TWICE,
        ],
    ),
}


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("EU_KEY", "SECOND_KEY", "OTHER_SECRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)  # away from any .env


def configure_policy(text: str, **overrides: object) -> Configuration:
    return configure(settings_with(voicepass_policy_file=write_policy(text), **overrides))


def write_policy(text: str) -> str:
    Path("policy.toml").write_text(text, encoding="utf-8")
    return "policy.toml"


@asynccontextmanager
async def serve_policy(text: str, **overrides: object) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(voicepass_policy_file=write_policy(text), **overrides) as api:
        yield api


@table("case", CONTRADICTIONS)
def test_a_contradiction_stops_the_start_and_is_reported_without_a_value(
    monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    text, overrides, environment, expected = CONTRADICTIONS[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(SettingsRefusedError) as refused:
        configure_policy(text, **overrides)

    assert refused.value.problems == expected
    assert secrets_in(str(refused.value)) == []
    assert "canary" not in str(refused.value)


def test_a_missing_policy_file_stops_the_start() -> None:
    with pytest.raises(SettingsRefusedError) as refused:
        configure(settings_with(voicepass_policy_file="missing.toml"))

    assert refused.value.problems == [f"{FILE} cannot be read (FileNotFoundError)"]


def test_a_secret_in_two_places_is_a_contradiction(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    monkeypatch.setenv("OTHER_SECRET", SECRET)
    monkeypatch.setenv("OTHER_SECRET_FILE", str(tmp_path / "secret"))

    with pytest.raises(SettingsRefusedError) as refused:
        configure_policy(issuer(OTHER, "HS256", 'secret_env = "OTHER_SECRET"'))

    assert refused.value.problems == ["OTHER_SECRET and OTHER_SECRET_FILE are both set: unset one of them"]


def test_secrets_that_the_file_names_may_come_from_files_or_dotenv(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text(SECRET + "\n")
    (tmp_path / ".env").write_text(f"EU_KEY={EU_KEY}, sk_second\n")
    monkeypatch.setenv("OTHER_SECRET_FILE", str(tmp_path / "secret"))
    text = agent("a", *IN_EU) + issuer(OTHER, "HS256", 'secret_env = "OTHER_SECRET"')

    configuration = configure_policy(text, elevenlabs_api_key=None, **NO_AGENT)

    (workspace,) = configuration.workspaces
    assert (workspace.base_url, workspace.keys) == (EU, (EU_KEY, "sk_second"))
    assert [trusted.token_issuer for trusted in configuration.trusted] == [OTHER, TOKEN_ISSUER]
    assert SECRET not in repr(configuration.trusted)


def test_issuers_may_come_from_the_file_from_the_environment_or_from_both() -> None:
    published = issuer(OTHER, "RS256", 'jwks_url = "https://other.example/jwks"')

    beside = configure_policy(published).trusted
    alone = configure_policy(published, **NO_ISSUER).trusted
    none = configure_policy("").trusted

    assert [[trusted.token_issuer for trusted in each] for each in (beside, alone, none)] == [
        [OTHER, TOKEN_ISSUER],
        [OTHER],
        [TOKEN_ISSUER],
    ]


def test_an_issuer_may_have_one_algorithm_in_the_environment_and_another_in_the_file() -> None:
    published = issuer(TOKEN_ISSUER, "RS256", 'jwks_url = "https://login.example/jwks"')

    trusted = configure_policy(published).trusted

    assert [(entry.token_issuer, entry.algorithm) for entry in trusted] == [
        (TOKEN_ISSUER, "RS256"),
        (TOKEN_ISSUER, "HS256"),
    ]


def test_the_limit_of_a_tokens_age_applies_to_every_issuer() -> None:
    published = issuer(OTHER, "RS256", 'jwks_url = "https://other.example/jwks"')

    unlimited = configure_policy(published)
    limited = configure_policy(published, voicepass_jwt_max_age_seconds=300)

    assert [trusted.max_age_seconds for trusted in unlimited.trusted] == [0, 0]
    assert [trusted.max_age_seconds for trusted in limited.trusted] == [300, 300]


# Workspaces ---------------------------------------------------------------------------------------------------------

TWO_HOSTS = agent("home", OPEN) + agent("eu", OPEN, *IN_EU)


@pytest.fixture
def two_hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[respx.MockRouter]:
    monkeypatch.setenv("EU_KEY", EU_KEY)
    with respx.mock(assert_all_called=False, using="voicepass") as router:
        for name, base_url in (("home", UPSTREAM), ("eu", EU)):
            host = base_url.removeprefix("https://")
            url = signed_url(host=host, agent_id=f"agent_{name}", conversation_id=f"conv_{name}")
            router.get(url__startswith=base_url + SIGNED_URL_PATH, name=name).respond(json={"signed_url": url})
        yield router


@pytest.mark.anyio
async def test_a_pass_for_each_agent_is_requested_at_its_own_host_with_its_own_key(
    two_hosts: respx.MockRouter, bearer: dict[str, str]
) -> None:
    async with serve_policy(TWO_HOSTS, **NO_AGENT) as api:
        answers = {
            alias: await api.post("/v1/signed-url", headers=bearer, json={"agent": alias}) for alias in ("home", "eu")
        }

    asked = [
        (call.request.url.host, call.request.url.params["agent_id"], call.request.headers["xi-api-key"])
        for call in two_hosts.calls
    ]
    assert asked == [
        ("api.elevenlabs.io", "agent_home", API_KEY),
        ("api.eu.residency.elevenlabs.io", "agent_eu", EU_KEY),
    ]
    assert {alias: answer.json()["conversation_id"] for alias, answer in answers.items()} == {
        "home": "conv_home",
        "eu": "conv_eu",
    }


@pytest.mark.anyio
async def test_a_rejected_key_is_tried_at_no_other_host_and_no_other_hosts_key_replaces_it(
    two_hosts: respx.MockRouter, bearer: dict[str, str]
) -> None:
    two_hosts["eu"].respond(401, json={"detail": {"status": "invalid_api_key"}})

    async with serve_policy(TWO_HOSTS, **NO_AGENT) as api:
        response = await api.post("/v1/signed-url", headers=bearer, json={"agent": "eu"})

    assert (response.status_code, response.json()["code"]) == (502, "elevenlabs_key_rejected")
    (call,) = two_hosts.calls
    assert (call.request.url.host, call.request.headers["xi-api-key"]) == ("api.eu.residency.elevenlabs.io", EU_KEY)


# Issuers ------------------------------------------------------------------------------------------------------------

SIGNERS: Mapping[str, Signer] = {
    TOKEN_ISSUER: signer_for("HS256", secret="canary-secret-of-the-first-issuer-0123456789"),
    "https://second.example": signer_for("HS256", secret="canary-secret-of-the-second-issuer-0123456789"),
    "https://third.example": signer_for("RS256"),
    "https://fourth.example": signer_for("ES256"),
}
FIRST, SECOND, THIRD, FOURTH = SIGNERS
FOUR_ISSUERS = (
    issuer(SECOND, "HS256", 'secret_env = "OTHER_SECRET"', audience="for-second")
    + issuer(THIRD, "RS256", public_key(SIGNERS[THIRD].published), audience="for-third")
    + issuer(FOURTH, "ES256", public_key(SIGNERS[FOURTH].published), audience="for-fourth")
)
AUDIENCES = dict(zip(SIGNERS, (AUDIENCE, "for-second", "for-third", "for-fourth"), strict=True))
CROSSES = [(claimed, signer) for claimed in SIGNERS for signer in SIGNERS if claimed != signer]


@pytest.fixture
def now() -> float:
    return time.time()


@pytest.fixture
def four_issuers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("OTHER_SECRET", SIGNERS[SECOND].published)
    return {"text": FOUR_ISSUERS, "voicepass_jwt_secret": SIGNERS[FIRST].published}


def make_mint(token_issuer: str, *, signer: Signer, audience: str, now: float) -> Mint:
    return Mint(signer=signer, token_issuer=token_issuer, audience=audience, now=now)


@pytest.mark.anyio
async def test_each_of_four_issuers_accepts_only_its_own_key(
    upstream: respx.MockRouter, four_issuers: dict[str, Any], now: float
) -> None:
    def forge_tokens(claimed: str, by: str) -> list[str]:
        mint = make_mint(claimed, signer=SIGNERS[by], audience=AUDIENCES[claimed], now=now)
        published = signer_for("HS256", secret=SIGNERS[by].published)
        disguised = mint.token(header=mint.header(alg=SIGNERS[claimed].algorithm), sign=SIGNERS[by].sign)
        return [mint.token(), disguised, mint.token(header=mint.header(alg="HS256"), sign=published.sign)]

    async with serve_policy(**four_issuers) as api:
        refused = [
            await api.post("/v1/signed-url", headers={"Authorization": f"Bearer {token}"})
            for claimed, by in CROSSES
            for token in forge_tokens(claimed, by)
        ]

    assert len(CROSSES) == 12
    assert [(r.status_code, r.json()["code"]) for r in refused] == [(401, "token_invalid")] * 36
    assert not upstream.calls


@pytest.mark.anyio
async def test_a_token_for_the_audience_of_another_issuer_is_refused(
    upstream: respx.MockRouter, four_issuers: dict[str, Any], now: float
) -> None:
    async with serve_policy(**four_issuers) as api:
        refused = [
            await api.post("/v1/signed-url", headers={"Authorization": f"Bearer {mint.token()}"})
            for issued_by, other in CROSSES
            for mint in [make_mint(issued_by, signer=SIGNERS[issued_by], audience=AUDIENCES[other], now=now)]
        ]

    assert [(r.status_code, r.json()["code"]) for r in refused] == [(401, "token_invalid")] * 12
    assert not upstream.calls


@pytest.mark.anyio
@pytest.mark.parametrize("token_issuer", SIGNERS)
async def test_a_user_of_each_of_four_issuers_gets_a_pass(
    upstream: respx.MockRouter, four_issuers: dict[str, Any], now: float, token_issuer: str
) -> None:
    mint = make_mint(token_issuer, signer=SIGNERS[token_issuer], audience=AUDIENCES[token_issuer], now=now)

    async with serve_policy(**four_issuers) as api:
        response = await api.post("/v1/signed-url", headers={"Authorization": f"Bearer {mint.token()}"})

    assert response.status_code == 200
    assert len(upstream.calls) == 1


@pytest.mark.anyio
async def test_one_id_at_two_issuers_is_two_users(
    upstream: respx.MockRouter, four_issuers: dict[str, Any], now: float
) -> None:
    async with serve_policy(**four_issuers) as api:
        answers = [
            await api.post("/v1/signed-url", headers={"Authorization": f"Bearer {mint.token()}"})
            for name in (SECOND, THIRD)
            for mint in [make_mint(name, signer=SIGNERS[name], audience=AUDIENCES[name], now=now)]
        ]

    # The fake ElevenLabs returns the same conversation twice; it was issued to the first user.
    assert [answer.status_code for answer in answers] == [200, 502]
    assert len(upstream.calls) == 2


# Agents -------------------------------------------------------------------------------------------------------------

SHOP = 'variables.shop = { claim = "shop", default = "none" }'
THREE_AGENTS = (
    agent("default", OPEN) + agent("seller", 'allow = [{ role = ["seller", "admin"] }]', SHOP) + agent("closed")
)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("claims", "alias", "variables"),
    [
        ({}, "default", {}),
        ({"role": "seller", "shop": "eggs"}, "seller", {"shop": "eggs"}),
        ({"role": ["buyer", "admin"]}, "seller", {"shop": "none"}),
    ],
)
async def test_a_user_whom_a_rule_admits_gets_a_pass_for_that_agent(
    upstream: respx.MockRouter, make_token: MakeToken, claims: dict[str, Any], alias: str, variables: dict[str, str]
) -> None:
    upstream["signed_url"].respond(json={"signed_url": signed_url(agent_id=f"agent_{alias}")})
    headers = {"Authorization": f"Bearer {make_token(**claims)}"}

    async with serve_policy(THREE_AGENTS, **NO_AGENT) as api:
        response = await api.post("/v1/signed-url", headers=headers, json={"agent": alias})

    assert response.status_code == 200
    assert (response.json()["agent"], response.json()["agent_id"]) == (alias, f"agent_{alias}")
    assert response.json()["dynamic_variables"] == variables | {"user_id": "u-1", "user_name": "Ada"}
    (call,) = upstream.calls
    assert call.request.url.params["agent_id"] == f"agent_{alias}"


@pytest.mark.anyio
@pytest.mark.parametrize("route", ["/v1/signed-url", "/v1/conversation-token"])
async def test_a_closed_agent_and_an_unknown_agent_get_the_same_answer(
    upstream: respx.MockRouter, make_token: MakeToken, route: str
) -> None:
    headers = {"Authorization": f"Bearer {make_token(role='buyer')}", "X-Request-ID": "the-same-for-all"}
    aliases = ["seller", "closed", "unknown", "agent_seller", "Seller", "seller ", "ѕeller", "s", "x" * 64, "__class__"]

    async with serve_policy(THREE_AGENTS, **NO_AGENT, voicepass_trusted_proxies="127.0.0.1") as api:
        posted = [await api.post(route, headers=headers, json={"agent": alias}) for alias in aliases]
        got = [await api.get(route, headers=headers, params={"agent": alias}) for alias in aliases]

    answers = [(r.status_code, r.content, sorted(r.headers.items())) for r in (*posted, *got)]
    assert answers == [answers[0]] * 20
    assert (posted[0].status_code, posted[0].json()["code"]) == (403, "agent_not_allowed")
    assert not upstream.calls


@pytest.mark.anyio
async def test_without_an_agent_named_default_a_request_without_alias_is_refused(
    upstream: respx.MockRouter, bearer: dict[str, str]
) -> None:
    async with serve_policy(agent("seller", OPEN), **NO_AGENT) as api:
        response = await api.post("/v1/signed-url", headers=bearer)

    assert (response.status_code, response.json()["code"]) == (403, "agent_not_allowed")
    assert not upstream.calls


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite://", ":memory:"),
        ("sqlite:////data/voicepass.db", "/data/voicepass.db"),
        (
            "postgresql://voicepass:pass%2Fword@db.example:5433/minutes?sslmode=require",
            "postgresql://db.example/minutes",
        ),
        ("postgresql://db.example/minutes?password=password", "postgresql://db.example/minutes"),
    ],
)
def test_the_line_at_the_start_names_the_ledger_without_its_password(url: str, shown: str) -> None:
    assert describe_ledger(settings_with(voicepass_database_url=url)) == shown
