"""From settings and the policy file to the parts of the service: merge both, check the result, build from it."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import SecretStr

from voicepass.config.checks import EVERYONE, is_header_value, split_list
from voicepass.config.environment import SettingsRefusedError
from voicepass.config.issuers import SECRET_REMEDY, TENANT, IssuerEntry, build_hmac_key
from voicepass.config.policyfile import Location, PolicyFile, load_document, parse_policy
from voicepass.config.settings import Settings
from voicepass.elevenlabs import Workspace
from voicepass.errors import LedgerUnavailable
from voicepass.identity import FixedKey, KeySource, TrustedIssuer
from voicepass.identity.jwks import PublishedKeys
from voicepass.identity.keys import HMAC_ALGORITHMS, KeyUnusableError, VerificationKey, key_from_pem
from voicepass.ledger import ANSWER_SECONDS, Ledger
from voicepass.ledger.clock import SteadyClock, elapsed_seconds
from voicepass.ledger.sqlite import open_sqlite
from voicepass.model import DEFAULT_ALIAS, Clock
from voicepass.outbound import is_safe_url
from voicepass.policy import Policy

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
    path = settings.voicepass_policy_file
    document = load_document(path, _FILE) if path else {}
    _parse(settings, document, {})  # the file alone: `merge` needs its tables to be tables
    merged, places = merge(settings, document)
    if has_app_users:
        merged["issuers"] = []
    contradictions = _find_contradictions(settings, document, has_app_users=has_app_users)
    policy = _check(settings, merged, places, contradictions)
    key_names = {entry.base_url: entry.api_key_env for entry in policy.agents.values()}
    agents = {alias: entry.build(alias) for alias, entry in policy.agents.items()}
    limits = policy.limits
    return Configuration(
        trusted=[trusted for entry in policy.issuers for trusted in _build_issuers(entry, settings)],
        policy=Policy(agents, limits.limits(), limits.conversation_minutes * 60, limits.plans()),
        workspaces=[
            Workspace(base_url=url, api_keys=split_list(settings.read_secret(name))) for url, name in key_names.items()
        ],
    )


def read_own_issuer(settings: Settings) -> IssuerEntry:
    """Return the issuer of VOICEPASS_JWT_*, or raise SettingsRefusedError with a line for each thing that it lacks."""
    merged, places = merge(settings, {})
    return _check(settings, {**merged, "agents": {}}, places).issuers[0]


def merge(settings: Settings, document: Mapping[str, Any]) -> tuple[dict[str, Any], dict[Location, str]]:
    """Add to the policy file what the environment says; return that, and the variable at each place that came from it.

    The environment names one issuer, one agent, and the workspace of all agents that name none.
    """
    issuers, agents = list(document.get("issuers", [])), dict(document.get("agents", {}))
    places: dict[Location, str] = {}

    def write_entry(place: Location, variables: Mapping[str, str]) -> dict[str, Any]:
        places.update({(*place, key): variable for key, variable in variables.items()})
        entry: dict[str, Any] = {}
        for key, variable in variables.items():
            value = getattr(settings, variable.lower())
            if value is not None:
                entry[key] = value.get_secret_value() if isinstance(value, SecretStr) else value
        return entry

    if not issuers or settings.voicepass_jwt_issuer is not None:
        place = ("issuers", len(issuers))
        places[place] = "VOICEPASS_JWT_ISSUER"
        issuers.append(write_entry(place, ISSUER_VARIABLES))
        if "secret_env" in issuers[-1]:
            issuers[-1]["secret_env"] = "VOICEPASS_JWT_SECRET"  # noqa: S105 - its name, as in a policy file
    if not agents:
        agents[DEFAULT_ALIAS] = {"allow": EVERYONE} | write_entry(("agents", DEFAULT_ALIAS), AGENT_VARIABLES)
    for alias, entry in agents.items():
        if "base_url" not in entry:
            places["agents", alias, "base_url"] = "ELEVENLABS_BASE_URL"
            agents[alias] = entry | {"base_url": settings.elevenlabs_base_url, "api_key_env": "ELEVENLABS_API_KEY"}
    return {**document, "issuers": issuers, "agents": agents}, places


def _parse(settings: Settings, document: Mapping[str, Any], places: Mapping[Location, str]) -> PolicyFile:
    hosts = settings.voicepass_plain_http_hosts
    return parse_policy(document, subject=_FILE, places=places, plain_http_hosts=hosts)


def _check(
    settings: Settings, merged: Mapping[str, Any], places: Mapping[Location, str], further: Iterable[str] = ()
) -> PolicyFile:
    """Parse the whole policy, and check the secrets that it names. Raises SettingsRefusedError, also for `further`."""
    problems = [*_check_agents(settings, merged), *_check_issuers(settings, merged, places), *further]
    try:
        policy = _parse(settings, merged, places)
    except SettingsRefusedError as error:
        problems = error.problems + problems
    if problems:
        raise SettingsRefusedError(list(dict.fromkeys(problems)))
    return policy


def _check_agents(settings: Settings, merged: Mapping[str, Any]) -> Iterator[str]:
    keys_by_host: dict[str, list[str]] = {}
    host_of_agent: dict[str, str] = {}
    for entry in merged["agents"].values():
        host, name, agent_id = entry["base_url"].rstrip("/"), entry["api_key_env"], entry.get("id", "")
        keys = split_list(settings.read_secret(name))
        if not keys:
            yield f"{name} is not set: create a key with the permissions 'ElevenAgents: Write' and 'Read'"
        # Checked here, because httpx and h11 print the whole key in the error they raise for it.
        elif keys[0].startswith("base64:") or not all(map(is_header_value, keys)):
            yield f"{name} holds a space, a line break or a character that no HTTP header can carry"
        elif keys != keys_by_host.setdefault(host, keys):
            yield f"{name} is a second key for {host}: write both into one variable, separated by a comma"
        if host_of_agent.setdefault(agent_id, host) != host:
            # A conversation names its agent, but not the host.
            yield f"{_FILE} names the agent {agent_id} on two hosts: give all its aliases one base_url"


def _check_issuers(settings: Settings, merged: Mapping[str, Any], places: Mapping[Location, str]) -> Iterator[str]:
    known: set[tuple[str, str]] = set()
    for number, entry in enumerate(merged["issuers"]):
        name, algorithm, secret = entry.get("issuer", ""), entry.get("algorithm", ""), entry.get("secret_env")
        if secret is not None and algorithm in HMAC_ALGORITHMS:
            try:
                _read_key(secret, algorithm, settings)
            except KeyUnusableError as error:
                yield f"{secret} {error}"
        blocks = {(name.replace(TENANT, tenant), algorithm) for tenant in entry.get("tenants", [TENANT])}
        if known & blocks:
            place = places.get(("issuers", number), f"{_FILE} issuers.{number}:")
            yield f"{place} names an issuer that has a block for this algorithm already: remove one of them"
        known |= blocks


def _find_contradictions(settings: Settings, document: Mapping[str, Any], *, has_app_users: bool) -> Iterator[str]:
    for variable in AGENT_VARIABLES.values():
        if document.get("agents") and getattr(settings, variable.lower()):
            yield f"{variable} is set, but {_FILE} lists the agents: put its value there"
    origins = settings.voicepass_allowed_origins
    is_plain = any(origin.startswith("http:") and not is_safe_url(origin) for origin in origins)
    if is_plain and (settings.voicepass_session_cookie or has_app_users):
        # Anyone on the network can forge a page of an http:// origin, and the browser would send the cookie.
        cookie = "the app's cookie" if has_app_users else "VOICEPASS_SESSION_COOKIE"
        rule = f"with {cookie} each must be https://, or http:// to a loopback address"
        yield f"VOICEPASS_ALLOWED_ORIGINS lists an http:// origin: {rule}"


def _build_issuers(entry: IssuerEntry, settings: Settings) -> list[TrustedIssuer]:
    """Build one issuer, or one for each tenant of a template; they share their keys."""
    keys = _build_keys(entry, settings)
    return [
        TrustedIssuer(
            token_issuer=token_issuer,
            algorithm=entry.algorithm,
            keys=keys,
            audience=entry.audience,
            required=required,
            leeway_seconds=settings.voicepass_jwt_leeway_seconds,
            max_age_seconds=settings.voicepass_jwt_max_age_seconds,
            user_id_claim=entry.user_id_claim,
            user_name_claim=entry.user_name_claim,
        )
        for token_issuer, required in entry.token_issuers.items()
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
        return FixedKey(_read_key(entry.secret_env, entry.algorithm, settings))
    return FixedKey(key_from_pem(entry.public_key or "", entry.algorithm))


def _read_key(name: str, algorithm: str, settings: Settings) -> VerificationKey:
    secret = settings.read_secret(name)
    if not secret:
        raise KeyUnusableError(f"is not set, though the policy file names it: {SECRET_REMEDY}")
    return build_hmac_key(secret, algorithm)


def open_ledger(
    settings: Settings, *, clock: Clock, answer_seconds: float = ANSWER_SECONDS
) -> AbstractAsyncContextManager[Ledger]:
    """Open the ledger that VOICEPASS_DATABASE_URL names. It decides by a clock that does not step."""
    path = find_sqlite_path(settings)
    if path is not None:
        return open_sqlite(path, clock=SteadyClock(wall=clock, ticks=elapsed_seconds), answer_seconds=answer_seconds)
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


def find_sqlite_path(settings: Settings) -> str | None:
    """Return the path of the ledger's file, `:memory:`, or None for PostgreSQL."""
    url = settings.voicepass_database_url
    if not url.startswith("sqlite:"):
        return None
    return url.removeprefix("sqlite://").removeprefix("/") or ":memory:"
