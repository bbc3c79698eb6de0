"""The policy file: its rules, and that a mistake is reported with its key and what is allowed, never with a value."""

from pathlib import Path

import pytest

from tests.identity.hostile_tokens import signer_for
from tests.tables import table
from voicepass.config.environment import SettingsRefusedError
from voicepass.config.policyfile import PolicyFile, read_policy_file
from voicepass.policy import Rule, Variable

CANARY = "canary-9d41"

GOOD = """
[agents.default]
id = "agent_1"
allow = "everyone"

[agents.sales-eu_2]
id = "agent_2"
base_url = "https://api.eu.residency.elevenlabs.io/"
api_key_env = "ELEVENLABS_API_KEY_EU"
allow = [
    { role = ["seller", "admin"], "https://app.example/plan" = "pro" },
    { level = [3, 4.5], trial = false },
]

[agents.sales-eu_2.variables]
shop = "app_metadata.shop"
level = { claim = "level", type = "number", default = 0 }
plan = { claim = "https://app.example/plan", type = "string", default = "" }
trial = { claim = "trial", type = "boolean", default = true }

[agents.closed]
id = "agent_3"

[[issuers]]
issuer = "https://login.example/"
algorithm = "RS256"
jwks_url = "https://login.example/.well-known/jwks.json"
audience = "voicepass"

[[issuers]]
issuer = "our-own-backend"
algorithm = "HS512"
secret_env = "BACKEND_SECRET"
required_claims = { azp = ["https://app.example", "https://admin.example"], verified = true }
user_id_claim = "uid"
user_name_claim = "profile.nick"
"""


def agent(lines: str) -> str:
    return f'[agents.sales]\nid = "agent_1"\n{lines}'


def variable(entry: str) -> str:
    return agent(f"[agents.sales.variables]\nshop = {entry}")


def issuer(lines: str, *, algorithm: str = "HS256", addressee: str = 'audience = "a"') -> str:
    return f'[[issuers]]\nissuer = "https://login.example"\nalgorithm = "{algorithm}"\n{addressee}\n{lines}'


SECRET = 'secret_env = "S"'
SALES, SHOP, FIRST = "agents.sales", "agents.sales.variables.shop", "issuers.0"
OF_AN_AGENT = (
    "there is no such key; allowed here: id, allow, variables, base_url, api_key_env, branch_id, version_id, "
    "environment"
)
OF_AN_ISSUER = (
    "there is no such key; allowed here: issuer, tenants, algorithm, secret_env, jwks_url, public_key, "
    "required_claims, audience, user_id_claim, user_name_claim"
)
WHOM = 'must be "everyone", or tables of conditions: [{ role = ["seller", "admin"] }]'
SCALARS = "must be text, a number, true or false, or a list of these"
DEFAULT = "must be text of at most 200 visible characters, a finite number, true or false"
BARE_SELECTION = "must be the bare id or name: letters, digits, - and _ alone"
BARE_ID = "must be the bare agent id, such as agent_…: letters, digits, - and _ alone"
SAFE = "must be https://, or http:// to a loopback address or a host of VOICEPASS_PLAIN_HTTP_HOSTS"
BASE_URL = f"{SAFE}, without path, query or user"
ENVIRONMENT_NAME = "must be a variable's name in capitals; put the secret into that variable"
TOGETHER = "needs base_url and api_key_env together: a residency region has keys of its own"
ALGORITHM = (
    "must be one of ES256, ES384, ES512, EdDSA, HS256, HS384, HS512, RS256, RS384, RS512 "
    "(voicepass verifies no PS* and no ES256K)"
)
NO_ID = "is not set: copy your agent's id (agent_…) from the dashboard"
PLAIN_ISSUER = "must not be an http:// address, where others could publish keys: see VOICEPASS_PLAIN_HTTP_HOSTS"
NO_ISSUER = "is not set: give the exact 'iss' of your tokens"
NO_SECRET = "is not set, and HS256 needs it: make one with: openssl rand -base64 48"
ADDRESSEE = (
    "is not set: give the 'aud' that your tokens name for this service, or in the policy file required_claims"
    ' such as { azp = ["https://app.example"] }'
)
ALIASES = "agents: must have aliases of lower-case letters, digits, - and _"
RESERVED = (
    "agents.sales.variables: "
    "may not define user_id, user_name, system__ or secret__ variables: claims must not set them"
)


def plan(name: str, when: str) -> str:
    return f'[[limits.plan]]\nname = "{name}"\nwhen = {when}\n'


PRO = plan("pro", '{ plan = "pro" }')
OF_A_PLAN = (
    "there is no such key; allowed here: passes_per_minute, passes_per_day, open_conversations, minutes_per_day, "
    "minutes_per_month, name, when"
)
SAME_USERS = "limits: has two plans for the same users: plan.0 and plan.1"

MISTAKES: dict[str, tuple[str, str]] = {
    "a plan without a name": ("[[limits.plan]]\nwhen = { plan = 1 }", "limits.plan.0.name: is missing"),
    "a plan without conditions": ('[[limits.plan]]\nname = "pro"', "limits.plan.0.when: is missing"),
    "a plan for nobody": (plan("pro", "{}"), f"limits.plan.0.when: {WHOM}"),
    "a plan's name with a quote": (
        f"[[limits.plan]]\nname = '{CANARY}\"'\nwhen = {{ plan = 1 }}",
        "limits.plan.0.name: must be 1 to 64 lower-case letters, digits, - and _",
    ),
    "a plan's key misspelt": (f"{PRO}minuts_per_day = 1", f"limits.plan.0.minuts_per_day: {OF_A_PLAN}"),
    "a plan's limit that is no number": (
        f"{PRO}passes_per_day = -1",
        'limits.plan.0.passes_per_day: must be a whole number, or "off"',
    ),
    "plans as a table": ('[limits.plan]\nname = "pro"', "limits.plan: must be an array of tables, each [[so]]"),
    "two plans of one name": (
        PRO + plan("pro", '"everyone"'),
        "limits: has two plans of the same name: plan.0 and plan.1",
    ),
    "two plans for the same users": (
        plan("a", '[{ plan = ["x", "y"] }]') + plan("b", '[{ plan = "y" }, { plan = ["y", "x"] }]'),
        SAME_USERS,
    ),
    "an unknown table": ("[agent.sales]", "agent: there is no such key; allowed here: agents, issuers, limits"),
    "a table misspelt": ("[[issuer]]", "issuer: there is no such key; allowed here: agents, issuers, limits"),
    "agents that are no table": (f'agents = "{CANARY}"', "agents: must be a table"),
    "agents as a list": ("[[agents]]", "agents: must be a table"),
    "an agent that is no table": (f'agents.sales = "{CANARY}"', f"{SALES}: must be a table"),
    "an agent as a list": ("[[agents.sales]]", f"{SALES}: must be a table"),
    "an alias in capitals": ('[agents.Sales]\nid = "agent_1"', ALIASES),
    "an alias with a space": ('[agents."sales eu"]\nid = "agent_1"', ALIASES),
    "an alias with a dot": ('[agents."sales.eu"]\nid = "agent_1"', ALIASES),
    "an alias that begins with a dash": ('[agents.-sales]\nid = "agent_1"', ALIASES),
    "an alias of 65 characters": (f'[agents.{"a" * 65}]\nid = "agent_1"', ALIASES),
    "an alias of another script": ('[agents."ѕales"]\nid = "agent_1"', ALIASES),
    "an alias with a line break": ('[agents."sales\\n"]\nid = "agent_1"', ALIASES),
    "an empty alias": ('[agents.""]\nid = "agent_1"', ALIASES),
    "an agent without an id": (
        "[agents.sales]",
        f"{SALES}.id: {NO_ID}",
    ),
    "an id that is a number": ("[agents.sales]\nid = 7", f"{SALES}.id: should be a valid string"),
    "a branch that is a query": (
        agent(f'branch_id = "branch_id={CANARY}"'),
        f"{SALES}.branch_id: {BARE_SELECTION}",
    ),
    "a version that is empty": (agent('version_id = ""'), f"{SALES}.version_id: {BARE_SELECTION}"),
    "an environment that is a number": (agent("environment = 7"), f"{SALES}.environment: should be a valid string"),
    "an id with a branch": (f'[agents.sales]\nid = "{CANARY}&branch_id=x"', f"{SALES}.id: {BARE_ID}"),
    "an id with a line break": (f'[agents.sales]\nid = "{CANARY}\\n"', f"{SALES}.id: {BARE_ID}"),
    "a conversation for an agent": (
        '[agents.sales]\nid = "conv_1"',
        f"{SALES}.id: is a conversation's id; an agent's looks like agent_…",
    ),
    "an unknown key of an agent": (agent(f'alow = "{CANARY}"'), f"{SALES}.alow: {OF_AN_AGENT}"),
    "an unknown key of an agent called variables": (
        f'[agents.variables]\nid = "agent_1"\nalow = "{CANARY}"',
        f"agents.variables.alow: {OF_AN_AGENT}",
    ),
    "allow a word": (agent(f'allow = "{CANARY}"'), f"{SALES}.allow: {WHOM}"),
    "allow everyone in capitals": (agent('allow = "Everyone"'), f"{SALES}.allow: {WHOM}"),
    "allow true": (agent("allow = true"), f"{SALES}.allow: {WHOM}"),
    "allow nobody at all": (agent("allow = []"), f"{SALES}.allow: {WHOM}"),
    "allow an empty condition": (agent("allow = [{}]"), f"{SALES}.allow: {WHOM}"),
    "allow an empty condition among others": (agent('allow = [{ a = "b" }, {}]'), f"{SALES}.allow: {WHOM}"),
    "allow one table, not a list": (agent(f'allow = {{ role = "{CANARY}" }}'), f"{SALES}.allow: {WHOM}"),
    "allow words": (agent(f'allow = ["{CANARY}"]'), f"{SALES}.allow: {WHOM}"),
    "a condition without values": (agent("allow = [{ role = [] }]"), f"{SALES}.allow.0.role: {SCALARS}"),
    "a condition that is a table": (agent(f'allow = [{{ role.x = "{CANARY}" }}]'), f"{SALES}.allow.0.role: {SCALARS}"),
    "a condition of lists": (agent(f'allow = [{{ role = [["{CANARY}"]] }}]'), f"{SALES}.allow.0.role: {SCALARS}"),
    "a condition of dates": (agent("allow = [{ day = 1979-05-27 }]"), f"{SALES}.allow.0.day: {SCALARS}"),
    "variables that are no table": (agent(f'variables = "{CANARY}"'), f"{SALES}.variables: must be a table"),
    "a variable that is a number": (variable("7"), f"{SHOP}: must be a table"),
    "a variable without a claim": (variable("{}"), f"{SHOP}.claim: is missing"),
    "a variable of an empty claim": (variable('""'), f"{SHOP}.claim: String should have at least 1 character"),
    "an unknown key of a variable": (
        variable(f'{{ claim = "a", defualt = "{CANARY}" }}'),
        f"{SHOP}.defualt: there is no such key; allowed here: claim, type, default",
    ),
    "an unknown type": (
        variable(f'{{ claim = "a", type = "{CANARY}" }}'),
        f"{SHOP}.type: should be 'string', 'number' or 'boolean'",
    ),
    "a default of another type": (
        variable(f'{{ claim = "a", type = "number", default = "{CANARY}" }}'),
        f"{SHOP}.default: must be a number, as its type says",
    ),
    "a default that is true for a number": (
        variable('{ claim = "a", type = "number", default = true }'),
        f"{SHOP}.default: must be a number, as its type says",
    ),
    "a default that is a number for text": (
        variable('{ claim = "a", type = "string", default = 7 }'),
        f"{SHOP}.default: must be a string, as its type says",
    ),
    "a default that is a list": (variable(f'{{ claim = "a", default = ["{CANARY}"] }}'), f"{SHOP}.default: {DEFAULT}"),
    "a default that is a date": (variable('{ claim = "a", default = 1979-05-27 }'), f"{SHOP}.default: {DEFAULT}"),
    "a default that JSON cannot hold": (variable('{ claim = "a", default = nan }'), f"{SHOP}.default: {DEFAULT}"),
    "an infinite default": (variable('{ claim = "a", default = -inf }'), f"{SHOP}.default: {DEFAULT}"),
    "a default that browsers round": (
        variable('{ claim = "a", default = 9007199254740993 }'),
        f"{SHOP}.default: {DEFAULT}",
    ),
    "a default that names another variable": (
        variable('{ claim = "a", default = "{{system__time}}" }'),
        f"{SHOP}.default: {DEFAULT}",
    ),
    "an invisible default": (variable('{ claim = "a", default = "x\\u202e" }'), f"{SHOP}.default: {DEFAULT}"),
    "a long default": (variable(f'{{ claim = "a", default = "{"x" * 201}" }}'), f"{SHOP}.default: {DEFAULT}"),
    "a variable of ElevenLabs'": (agent('variables.system__time = "iat"'), RESERVED),
    "a secret variable": (agent('variables.secret__key = "key"'), RESERVED),
    "a variable that is the user's id": (agent('variables.user_id = "email"'), RESERVED),
    "a variable that is the user's name": (agent('variables.user_name = "email"'), RESERVED),
    "a variable with a dash": (
        agent('variables.shop-name = "shop"'),
        "agents.sales.variables: must be named with letters, digits and _",
    ),
    "a base URL without a key": (agent('base_url = "https://x.example"'), f"{SALES}: {TOGETHER}"),
    "a key without a base URL": (agent('api_key_env = "KEY"'), f"{SALES}: {TOGETHER}"),
    "a plain base URL": (
        agent(f'base_url = "http://{CANARY}.example"\napi_key_env = "KEY"'),
        f"{SALES}.base_url: {BASE_URL}",
    ),
    "a base URL with a user": (
        agent(f'base_url = "https://u:{CANARY}@x.example"\napi_key_env = "KEY"'),
        f"{SALES}.base_url: {BASE_URL}",
    ),
    "a base URL with a query": (
        agent('base_url = "https://x.example?"\napi_key_env = "KEY"'),
        f"{SALES}.base_url: {BASE_URL}",
    ),
    "a base URL with a fragment": (
        agent('base_url = "https://x.example#"\napi_key_env = "KEY"'),
        f"{SALES}.base_url: {BASE_URL}",
    ),
    "a base URL with a line break": (
        agent('base_url = "https://x.example\\n"\napi_key_env = "KEY"'),
        f"{SALES}.base_url: {BASE_URL}",
    ),
    "the key itself in place of its variable's name": (
        agent(f'base_url = "https://x.example"\napi_key_env = "sk_{CANARY}"'),
        f"{SALES}.api_key_env: {ENVIRONMENT_NAME}",
    ),
    "no name for the key's variable": (
        agent('base_url = "https://x.example"\napi_key_env = ""'),
        f"{SALES}.api_key_env: {ENVIRONMENT_NAME}",
    ),
    "issuers as a table": ('[issuers]\nissuer = "x"', "issuers: must be an array of tables, each [[so]]"),
    "an issuer that is no table": (f'issuers = ["{CANARY}"]', f"{FIRST}: must be a table"),
    "an issuer without a name": (
        f'[[issuers]]\nalgorithm = "HS256"\naudience = "a"\n{SECRET}',
        f"{FIRST}.issuer: {NO_ISSUER}",
    ),
    "an issuer without an algorithm": (
        f'[[issuers]]\nissuer = "i"\naudience = "a"\n{SECRET}',
        f"{FIRST}.algorithm: {ALGORITHM}",
    ),
    "a blank issuer": (
        f'[[issuers]]\nissuer = " "\nalgorithm = "HS256"\naudience = "a"\n{SECRET}',
        f"{FIRST}.issuer: {NO_ISSUER}",
    ),
    "an issuer over http": (
        f'[[issuers]]\nissuer = "http://{CANARY}.example"\nalgorithm = "HS256"\naudience = "a"\n{SECRET}',
        f"{FIRST}.issuer: {PLAIN_ISSUER}",
    ),
    "an issuer over http, in capitals": (
        f'[[issuers]]\nissuer = "HTTP://{CANARY}.example"\nalgorithm = "HS256"\naudience = "a"\n{SECRET}',
        f"{FIRST}.issuer: {PLAIN_ISSUER}",
    ),
    "no algorithm at all": (
        issuer(SECRET, algorithm="none"),
        f"{FIRST}.algorithm: {ALGORITHM}",
    ),
    "two algorithms": (
        '[[issuers]]\nissuer = "i"\nalgorithm = ["HS256", "RS256"]\naudience = "a"',
        f"{FIRST}.algorithm: should be a valid string",
    ),
    "a secret algorithm without a secret": (issuer(""), f"{FIRST}.secret_env: {NO_SECRET}"),
    "a secret algorithm with published keys": (
        issuer('jwks_url = "https://login.example/jwks"'),
        f"{FIRST}.jwks_url: does not go with the algorithm HS256: change one of the two",
    ),
    "a secret and published keys": (
        issuer(f'{SECRET}\njwks_url = "https://login.example/jwks"'),
        f"{FIRST}.jwks_url: does not go with the algorithm HS256: change one of the two",
    ),
    "a public algorithm with a secret": (
        issuer(SECRET, algorithm="RS256"),
        f"{FIRST}.secret_env: does not go with the algorithm RS256: change one of the two",
    ),
    "a public algorithm with both": (
        issuer('public_key = "x"\njwks_url = "https://login.example/jwks"', algorithm="ES256"),
        f"{FIRST}.public_key: is set, and so is the URL of a JWKS: remove one of the two",
    ),
    "a public algorithm with nothing": (
        issuer("", algorithm="ES256"),
        f"{FIRST}.public_key: is not set, and ES256 needs it: give your provider's key as PEM, or the URL of its JWKS",
    ),
    "a plain JWKS URL": (
        issuer(f'jwks_url = "http://{CANARY}.example/jwks"', algorithm="RS256"),
        f"{FIRST}.jwks_url: {SAFE}",
    ),
    "the secret itself in place of its variable's name": (
        issuer(f'secret_env = "{CANARY}-{CANARY}-{CANARY}-{CANARY}"'),
        f"{FIRST}.secret_env: {ENVIRONMENT_NAME}",
    ),
    "no addressee": (issuer(SECRET, addressee=""), f"{FIRST}.audience: {ADDRESSEE}"),
    "no addressee but an empty condition": (
        issuer(SECRET, addressee="required_claims = {}"),
        f"{FIRST}.audience: {ADDRESSEE}",
    ),
    "two audiences": (
        issuer(SECRET, addressee=f'audience = ["a", "{CANARY}"]'),
        f"{FIRST}.audience: should be a valid string",
    ),
    "required claims without values": (
        issuer(SECRET, addressee="required_claims = { azp = [] }"),
        f"{FIRST}.required_claims.azp: {SCALARS}",
    ),
    "an unknown key of an issuer": (issuer(f'{SECRET}\njwk_url = "{CANARY}"'), f"{FIRST}.jwk_url: {OF_AN_ISSUER}"),
}

NOT_TOML: dict[str, tuple[bytes, str]] = {
    "prose": (f"the agent is {CANARY}".encode(), "is not TOML: Expected '=' after a key"),
    "JSON": (f'{{"agents": "{CANARY}"}}'.encode(), "is not TOML: Invalid statement (at line 1"),
    "a value without quotes": (f"agents = {CANARY}".encode(), "is not TOML: Invalid value (at line 1"),
    "a text without its final quote": (f'agents = "{CANARY}'.encode(), "is not TOML: Unterminated string"),
    "a key twice": (f'x = 1\nx = "{CANARY}"'.encode(), "is not TOML: Cannot overwrite a value"),
    "a table twice": (b"[agents.a]\n[agents.a]", "is not TOML: Cannot declare ('agents', 'a') twice"),
    "a byte that is not UTF-8": (f'x = "{CANARY}\xff"'.encode("latin-1"), "is not UTF-8 text: save it as UTF-8"),
    "UTF-16": (f'x = "{CANARY}"'.encode("utf-16"), "is not UTF-8 text: save it as UTF-8"),
    "a NUL": (b'x = "\0"', "is not UTF-8 text: save it as UTF-8"),
    "5,000 brackets": (b"x = " + b"[" * 5000, "is not TOML: "),
    "a number of 5,000 digits": (b"x = " + b"9" * 5000, "is not TOML: "),
}


def read(tmp_path: Path, text: str) -> PolicyFile:
    path = tmp_path / "policy.toml"
    path.write_text(text, encoding="utf-8")
    return read_policy_file(str(path))


def read_problems(path: Path) -> list[str]:
    """Return the problems of a file, without its path."""
    with pytest.raises(SettingsRefusedError) as refused:
        read_policy_file(str(path))
    assert refused.value.__context__ is None or refused.value.__suppress_context__, "a traceback would show the value"
    assert CANARY not in str(refused.value)
    assert all(problem.startswith(f"{path}: ") for problem in refused.value.problems)
    return [problem.removeprefix(f"{path}: ") for problem in refused.value.problems]


def test_a_valid_file_is_read_into_agents_rules_variables_and_issuers(tmp_path: Path) -> None:
    policy_file = read(tmp_path, GOOD)

    default, sales, closed = (entry.build(alias) for alias, entry in policy_file.agents.items())
    in_eu = policy_file.agents["sales-eu_2"]
    published, shared = policy_file.issuers
    assert list(policy_file.agents) == ["default", "sales-eu_2", "closed"]
    assert (default.allow, closed.allow) == ((Rule({}),), ())
    assert sales.allow == (
        Rule({"role": ("seller", "admin"), "https://app.example/plan": ("pro",)}),
        Rule({"level": (3, 4.5), "trial": (False,)}),
    )
    assert sales.variables == {
        "shop": Variable(claim="app_metadata.shop"),
        "level": Variable(claim="level", type="number", default=0),
        "plan": Variable(claim="https://app.example/plan", type="string", default=""),
        "trial": Variable(claim="trial", type="boolean", default=True),
    }
    assert (in_eu.base_url, in_eu.api_key_env) == ("https://api.eu.residency.elevenlabs.io", "ELEVENLABS_API_KEY_EU")
    assert (published.issuer, published.audience, published.user_id_claim) == (
        "https://login.example/",
        "voicepass",
        "sub",
    )
    assert (shared.secret_env, shared.user_id_claim, shared.user_name_claim) == (
        "BACKEND_SECRET",
        "uid",
        "profile.nick",
    )
    assert shared.required_claims == {"azp": ("https://app.example", "https://admin.example"), "verified": (True,)}


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "[agents]\n", "issuers = []\n"])
def test_an_empty_file_sets_nothing(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text) == PolicyFile()


@table("alias", ["a", "0", "default", "sales-eu_2", "a" * 64, "variables", "issuers"])
def test_an_alias_may_be_any_short_plain_name(tmp_path: Path, alias: str) -> None:
    assert list(read(tmp_path, f'[agents.{alias}]\nid = "agent_1"').agents) == [alias]


@pytest.mark.parametrize("value", ['"1"', "1", "1.5", "true"])
def test_a_condition_keeps_the_type_it_was_written_with(tmp_path: Path, value: str) -> None:
    entry = read(tmp_path, agent(f"allow = [{{ level = {value} }}]")).agents["sales"]

    (held,) = entry.allow[0]["level"]
    assert (type(held), held) == {"1": (int, 1), "1.5": (float, 1.5), "true": (bool, True)}.get(value, (str, "1"))


def test_one_table_of_a_plans_conditions_needs_no_list(tmp_path: Path) -> None:
    text = plan("a", '{ role = "x" }') + plan("b", '[{ role = "y" }, { level = 1 }]') + plan("c", '"everyone"')

    plans = read(tmp_path, text).limits.plans()

    assert [each.when for each in plans] == [
        (Rule({"role": ("x",)}),),
        (Rule({"role": ("y",)}), Rule({"level": (1,)})),
        (Rule({}),),
    ]


@table("case", MISTAKES)
def test_a_mistake_is_one_line_with_its_key_and_what_is_allowed(tmp_path: Path, case: str) -> None:
    text, expected = MISTAKES[case]

    path = tmp_path / "policy.toml"
    path.write_text(text, encoding="utf-8")

    assert read_problems(path) == [expected]


def test_a_plan_takes_its_missing_keys_from_the_users_limits(tmp_path: Path) -> None:
    text = f'{PRO}minutes_per_day = 120\npasses_per_day = "off"\n[limits.user]\nminutes_per_day = 5\n[limits.all]\n'
    limits = read(tmp_path, f"{text}passes_per_day = 9\n[limits.agent]\npasses_per_day = 8").limits

    (pro,) = limits.plans()

    assert (pro.name, pro.when) == ("pro", (Rule({"plan": ("pro",)}),))
    assert {limit.name: (limit.most, limit.plan) for limit in pro.limits} == {
        "user_passes_per_minute": (10, "pro"),
        "user_open_conversations": (3, "pro"),
        "user_minutes_per_day": (7200, "pro"),
        "user_minutes_per_month": (36_000, "pro"),
        "agent_passes_per_day": (8, None),
        "all_passes_per_day": (9, None),
    }
    assert {limit.most for limit in limits.limits() if limit.name == "user_minutes_per_day"} == {300}


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    text = f"{agent('allow = 1')}\n[agents.support]\n{issuer('', algorithm='none')}\n[extra]"

    path = tmp_path / "policy.toml"
    path.write_text(text, encoding="utf-8")

    problems = read_problems(path)

    assert [problem.split(":")[0] for problem in problems] == [
        "agents.sales.allow",
        "agents.support.id",
        "issuers.0.algorithm",
        "extra",
    ]


def test_a_public_key_may_be_in_the_file_because_it_is_public(tmp_path: Path) -> None:
    pem = signer_for("ES256").published

    policy_file = read(tmp_path, issuer(f'public_key = """{pem}"""', algorithm="ES256"))

    assert policy_file.issuers[0].public_key == pem


@table("case", NOT_TOML)
def test_a_file_that_is_not_toml_is_one_line_without_its_content(tmp_path: Path, case: str) -> None:
    data, beginning = NOT_TOML[case]
    path = tmp_path / "policy.toml"
    path.write_bytes(data)

    (problem,) = read_problems(path)

    assert problem.startswith(beginning)
    assert "\n" not in problem


def test_a_file_that_cannot_be_read_is_reported_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    paths = {"nothing": "FileNotFoundError", "": "IsADirectoryError", "loop": "OSError", "x" * 300: "OSError"}

    for name, why in paths.items():
        assert read_problems(tmp_path / name) == [f"cannot be read ({why})"]
