"""From settings and the policy file to the parts of the service: merge both, check the result, build from it."""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import SecretStr

from voicepass.config.checks import EVERYONE, TENANT, Surroundings, split_list
from voicepass.config.environment import SettingsRefusedError
from voicepass.config.issuerchecks import key_from_text
from voicepass.config.policyfile import (
    IssuerEntry,
    Location,
    PolicyFile,
    PolicyFileError,
    load_document,
    parse_policy,
    write_dotted,
)
from voicepass.config.settings import Settings
from voicepass.elevenlabs import Workspace
from voicepass.errors import LedgerUnavailable
from voicepass.identity import FixedKey, KeySource, TrustedIssuer
from voicepass.identity.jwks import PublishedKeys
from voicepass.identity.keys import key_from_pem
from voicepass.ledger import ANSWER_SECONDS, Ledger
from voicepass.ledger.clock import SteadyClock, elapsed_seconds
from voicepass.ledger.sqlite import open_sqlite
from voicepass.model import DEFAULT_ALIAS, Clock
from voicepass.outbound import is_safe_url
from voicepass.policy import AgentRules, Policy, Rule

ISSUER_VARIABLES: Final = {
    "issuer": "VOICEPASS_JWT_ISSUER",
    "algorithm": "VOICEPASS_JWT_ALGORITHM",
    "secret_env": "VOICEPASS_JWT_SECRET",
    "jwks_url": "VOICEPASS_JWKS_URL",
    "public_key": "VOICEPASS_JWT_PUBLIC_KEY",
    "audience": "VOICEPASS_JWT_AUDIENCE",
    "user_id_claim": "VOICEPASS_USER_ID_CLAIM",
    "user_name_claim": "VOICEPASS_USER_NAME_CLAIM",
}
AGENT_VARIABLES: Final = {
    "id": "ELEVENLABS_AGENT_ID",
    "branch_id": "ELEVENLABS_BRANCH_ID",
    "environment": "ELEVENLABS_ENVIRONMENT",
    "variables": "VOICEPASS_VARIABLES",
}
WORKSPACE_VARIABLES: Final = {"base_url": "ELEVENLABS_BASE_URL", "api_key_env": "ELEVENLABS_API_KEY"}
_FILE: Final = "VOICEPASS_POLICY_FILE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """Whose tokens to accept (nobody's if an app signs its users in), what to allow, which workspaces to call."""

    trusted: Sequence[TrustedIssuer]
    policy: Policy
    workspaces: Sequence[Workspace]


def configure(settings: Settings, *, has_app_users: bool = False) -> Configuration:
    """Return the configuration of a service that may start, or raise SettingsRefusedError with a line per problem.

    `has_app_users`: the app around voicepass signs its users in. Then no issuer is needed, and none is accepted.
    """
    try:
        document = load_document(settings.voicepass_policy_file) if settings.voicepass_policy_file else {}
        parse_policy(document, surroundings=Surroundings(plain_http_hosts=settings.voicepass_plain_http_hosts))
    except PolicyFileError as error:
        raise SettingsRefusedError([f"{_FILE} {problem}" for problem in error.problems]) from None
    merged, places = merge(settings, document)
    if has_app_users:
        merged["issuers"] = []
    problems = _find_contradictions(settings, document, has_app_users=has_app_users)
    problems += _find_duplicates(settings, merged, places)
    try:
        policy = _parse(settings, merged, places)
    except PolicyFileError as error:
        problems = error.problems + problems
    if problems:
        raise SettingsRefusedError(problems)
    return build(policy, settings)


def merge(settings: Settings, document: Mapping[str, Any]) -> tuple[dict[str, Any], dict[Location, str]]:
    """Add to the policy file what the environment says; return that, and the variable at each place that came from it.

    The environment names one issuer, one agent, and the workspace of all agents that name none.
    """
    issuers, agents = list(document.get("issuers", [])), dict(document.get("agents", {}))
    places: dict[Location, str] = {}

    def put(place: Location, variables: Mapping[str, str]) -> dict[str, Any]:
        places.update({(*place, key): variable for key, variable in variables.items()})
        return _write_entry(settings, variables)

    if not issuers or settings.voicepass_jwt_issuer is not None:
        places["issuers", len(issuers)] = "VOICEPASS_JWT_ISSUER"
        issuers.append(put(("issuers", len(issuers)), ISSUER_VARIABLES))
    if not agents:
        agents[DEFAULT_ALIAS] = {"allow": EVERYONE} | put(("agents", DEFAULT_ALIAS), AGENT_VARIABLES)
    for alias, entry in agents.items():
        if "base_url" not in entry:
            agents[alias] = entry | put(("agents", alias), WORKSPACE_VARIABLES) | {"api_key_env": "ELEVENLABS_API_KEY"}
    return {**document, "issuers": issuers, "agents": agents}, places


def read_own_issuer(settings: Settings) -> IssuerEntry:
    """Return the issuer of VOICEPASS_JWT_*, or raise SettingsRefusedError with a line for each thing that it lacks."""
    merged, places = merge(settings, {})
    try:
        return _parse(settings, {"issuers": merged["issuers"]}, places).issuers[0]
    except PolicyFileError as error:
        raise SettingsRefusedError(error.problems) from None


def _write_entry(settings: Settings, variables: Mapping[str, str]) -> dict[str, Any]:
    """Write settings as an entry of the policy file: a secret as the name of its variable."""
    entry: dict[str, Any] = {}
    for key, variable in variables.items():
        value = getattr(settings, variable.lower())
        if value is not None:
            plain = value.get_secret_value() if isinstance(value, SecretStr) else value
            entry[key] = variable if key.endswith("_env") else plain
    return entry


def _parse(settings: Settings, document: Mapping[str, Any], places: Mapping[Location, str]) -> PolicyFile:
    def write_place(location: Location) -> str:
        beginnings = (location[:length] for length in range(len(location), 0, -1))
        variable = next((places[beginning] for beginning in beginnings if beginning in places), None)
        return variable or f"{_FILE} {write_dotted(location)}"

    surroundings = Surroundings(read_secret=settings.read_secret, plain_http_hosts=settings.voicepass_plain_http_hosts)
    return parse_policy(document, surroundings=surroundings, write_place=write_place)


def _find_contradictions(settings: Settings, document: Mapping[str, Any], *, has_app_users: bool) -> list[str]:
    problems = []
    if document.get("agents"):
        problems += [
            f"{variable} is set, but {_FILE} lists the agents: put its value there"
            for variable in AGENT_VARIABLES.values()
            if getattr(settings, variable.lower())
        ]
    origins = settings.voicepass_allowed_origins
    is_plain = any(origin.startswith("http:") and not is_safe_url(origin) for origin in origins)
    if is_plain and (settings.voicepass_session_cookie or has_app_users):
        # Anyone on the network can forge a page of an http:// origin, and the browser would send the cookie.
        cookie = "the app's cookie" if has_app_users else "VOICEPASS_SESSION_COOKIE"
        problems.append(
            f"VOICEPASS_ALLOWED_ORIGINS lists an http:// origin: with {cookie} each must be https://,"
            " or http:// to a loopback address"
        )
    return problems


def _find_duplicates(settings: Settings, merged: Mapping[str, Any], places: Mapping[Location, str]) -> list[str]:
    problems = []
    known: set[tuple[str, str]] = set()
    for number, entry in enumerate(merged["issuers"]):
        names = [entry.get("issuer", "").replace(TENANT, tenant) for tenant in entry.get("tenants", [TENANT])]
        blocks = {(name, entry.get("algorithm", "")) for name in names}
        if known & blocks:
            place = places.get(("issuers", number), f"{_FILE} issuers.{number}:")
            problems.append(f"{place} names an issuer that has a block for this algorithm already: remove one of them")
        known |= blocks
    keys_by_host: dict[str, list[str]] = {}
    host_of_agent: dict[str, str] = {}
    for entry in merged["agents"].values():
        host, name, agent_id = entry["base_url"].rstrip("/"), entry["api_key_env"], entry.get("id", "")
        if host_of_agent.setdefault(agent_id, host) != host:
            # A conversation names its agent, but not the host.
            problems.append(f"{_FILE} names the agent {agent_id} on two hosts: give all its aliases one base_url")
        keys = _read_api_keys(name, settings)
        if keys and keys != keys_by_host.setdefault(host, keys):
            problems.append(f"{name} is a second key for {host}: write both into one variable, separated by a comma")
    return problems


def build(policy: PolicyFile, settings: Settings) -> Configuration:
    """Build everything that the whole policy describes."""
    agents = {
        alias: AgentRules(
            agent=entry.build_agent(alias),
            allow=entry.rules,
            variables={name: variable.variable() for name, variable in entry.variables.items()},
        )
        for alias, entry in policy.agents.items()
    }
    workspaces = {
        entry.base_url: Workspace(base_url=entry.base_url or "", api_keys=_read_api_keys(entry.api_key_env, settings))
        for entry in policy.agents.values()
    }
    limits = policy.limits
    return Configuration(
        trusted=[trusted for entry in policy.issuers for trusted in _build_issuers(entry, settings)],
        policy=Policy(agents, limits.limits(), limits.conversation_minutes * 60, limits.plans()),
        workspaces=list(workspaces.values()),
    )


def _build_issuers(entry: IssuerEntry, settings: Settings) -> list[TrustedIssuer]:
    """Build one issuer, or one for each tenant of a template; they share their keys."""
    keys = _build_keys(entry, settings)
    return [
        TrustedIssuer(
            token_issuer=token_issuer,
            algorithm=entry.algorithm,
            keys=keys,
            audience=entry.audience,
            required=Rule(required_claims),
            leeway_seconds=settings.voicepass_jwt_leeway_seconds,
            max_age_seconds=settings.voicepass_jwt_max_age_seconds,
            user_id_claim=entry.user_id_claim,
            user_name_claim=entry.user_name_claim,
        )
        for token_issuer, required_claims in entry.token_issuers.items()
    ]


def _build_keys(entry: IssuerEntry, settings: Settings) -> KeySource:
    if entry.jwks_url is not None:
        return PublishedKeys(
            url=entry.jwks_url,
            token_issuer=entry.issuer,
            algorithm=entry.algorithm,
            clock=time.monotonic,
            plain_http_hosts=settings.voicepass_plain_http_hosts,
        )
    if entry.secret_env is not None:
        return FixedKey(key_from_text(settings.read_secret(entry.secret_env) or "", entry.algorithm))
    return FixedKey(key_from_pem(entry.public_key or "", entry.algorithm))


def _read_api_keys(name: str | None, settings: Settings) -> list[str]:
    return split_list(settings.read_secret(name or "") or "")


def open_ledger(
    settings: Settings, *, clock: Clock, answer_seconds: float = ANSWER_SECONDS
) -> AbstractAsyncContextManager[Ledger]:
    """Open the ledger that VOICEPASS_DATABASE_URL names. It decides by a clock that does not step."""
    path = find_sqlite_path(settings)
    if path is not None:
        steady = SteadyClock(wall=clock, ticks=elapsed_seconds)
        return open_sqlite(path, clock=steady, wall=clock, answer_seconds=answer_seconds)
    try:
        from voicepass.ledger.postgres import open_postgres  # noqa: PLC0415 - its driver is an extra
    except ImportError as error:
        raise LedgerUnavailable(operator_note="PostgreSQL needs its driver: install the extra 'postgres'") from error
    return open_postgres(settings.voicepass_database_url, answer_seconds=answer_seconds)


def describe_ledger(settings: Settings) -> str:
    """Return where the ledger is, without a password."""
    path = find_sqlite_path(settings)
    if path is not None:
        return path if path == ":memory:" else str(Path(path).absolute())
    from voicepass.ledger.postgres_url import parse_url  # noqa: PLC0415 - its driver is an extra

    parameters = parse_url(settings.voicepass_database_url)
    return f"postgresql://{parameters.get('host', '')}/{parameters.get('dbname', '')}"


def is_in_memory(settings: Settings) -> bool:
    """Whether the ledger belongs to this process and ends with it."""
    return find_sqlite_path(settings) == ":memory:"


def ledger_exists(settings: Settings) -> bool:
    """Whether there is a ledger already, which another process may use."""
    path = find_sqlite_path(settings)
    return path is None or Path(path).exists()


def find_sqlite_path(settings: Settings) -> str | None:
    """Return the path of the ledger's file, `:memory:`, or None for PostgreSQL."""
    url = settings.voicepass_database_url
    if not url.startswith("sqlite:"):
        return None
    return url.removeprefix("sqlite://").removeprefix("/") or ":memory:"
