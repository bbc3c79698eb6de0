"""Settings and the policy file become what the service is built from; a contradiction is named, never guessed away."""

import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from voicepass.config.checks import is_header_value
from voicepass.config.policyfile import AgentEntry, IssuerEntry, PolicyFile, PolicyFileError, read_policy_file
from voicepass.config.settings import Settings, SettingsRefusedError, secret_named
from voicepass.elevenlabs import Workspace
from voicepass.errors import LedgerUnavailable
from voicepass.identity import FixedKey, KeySource, TrustedIssuer
from voicepass.identity.jwks import PublishedKeys
from voicepass.identity.keys import HMAC_ALGORITHMS, KeyUnusableError, key_from_pem, key_from_secret
from voicepass.ledger import Ledger
from voicepass.ledger.clock import SteadyClock, elapsed_seconds
from voicepass.ledger.sqlite import open_sqlite
from voicepass.model import DEFAULT_ALIAS, Agent, Clock
from voicepass.outbound import is_safe_url
from voicepass.policy import AgentRules, Policy, Rule, Variable, find_agents_on_two_hosts

EVERY_USER = Rule({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """Whom to believe, what to allow, and whom to ask."""

    trusted: Sequence[TrustedIssuer]
    policy: Policy
    workspaces: Sequence[Workspace]


def configure(settings: Settings) -> Configuration:
    """Return the configuration of a service that may start, or raise SettingsRefusedError with a line per problem."""
    problems: list[str] = []
    policy_file = PolicyFile()
    if settings.voicepass_policy_file is not None:
        try:
            policy_file = read_policy_file(settings.voicepass_policy_file)
        except PolicyFileError as error:
            raise SettingsRefusedError([f"VOICEPASS_POLICY_FILE {problem}" for problem in error.problems]) from None
    trusted = _trusted(settings, policy_file, problems)
    workspaces = _workspaces(settings, policy_file, problems)
    rules = _rules(settings, policy_file, problems)
    if settings.voicepass_session_cookie and not all(map(is_safe_url, settings.voicepass_allowed_origins)):
        # Whoever is on the network can write a page of an http:// origin, and the browser would send the cookie.
        problems.append(
            "VOICEPASS_ALLOWED_ORIGINS lists an http:// origin: with VOICEPASS_SESSION_COOKIE each must be https://,"
            " or http:// to a loopback address"
        )
    placed = [(rule.agent.agent_id, rule.agent.base_url) for rule in rules.values()]
    problems += [
        f"VOICEPASS_POLICY_FILE names the agent {agent_id} on two hosts: give all its aliases one base_url"
        for agent_id in find_agents_on_two_hosts(placed)
    ]
    if problems:
        raise SettingsRefusedError(problems)
    limits = policy_file.limits
    policy = Policy(rules, limits.limits(), limits.conversation_minutes * 60)
    return Configuration(trusted=trusted, policy=policy, workspaces=workspaces)


def _trusted(settings: Settings, policy_file: PolicyFile, problems: list[str]) -> list[TrustedIssuer]:
    trusted = [] if policy_file.issuers and settings.voicepass_jwt_issuer is None else _issuer_here(settings, problems)
    for number, entry in enumerate(policy_file.issuers):
        where = f"VOICEPASS_POLICY_FILE issuers.{number}"
        keys = _key_source(entry, where, problems)
        if any(other.token_issuer == entry.issuer for other in trusted):
            problems.append(f"{where}: this issuer is there twice; each has one algorithm")
        if keys is not None:
            trusted.append(
                TrustedIssuer(
                    token_issuer=entry.issuer,
                    algorithm=entry.algorithm,
                    keys=keys,
                    audience=entry.audience,
                    required=Rule(entry.required_claims),
                    leeway_seconds=settings.voicepass_jwt_leeway_seconds,
                    max_age_seconds=settings.voicepass_jwt_max_age_seconds,
                    user_id_claim=entry.user_id_claim,
                    user_name_claim=entry.user_name_claim,
                )
            )
    return trusted


def _issuer_here(settings: Settings, problems: list[str]) -> list[TrustedIssuer]:
    """Return the issuer of VOICEPASS_JWT_*, or name what it lacks."""
    token_issuer, url = settings.voicepass_jwt_issuer, settings.voicepass_jwks_url
    lacking = settings.issuer_problems()
    key = None if lacking else settings.fixed_key()
    if lacking or token_issuer is None or (key is None and url is None):
        problems += lacking
        return []
    algorithm = settings.voicepass_jwt_algorithm
    return [
        TrustedIssuer(
            token_issuer=token_issuer,
            algorithm=algorithm,
            keys=FixedKey(key) if key is not None else _published(url or "", token_issuer, algorithm),
            audience=settings.voicepass_jwt_audience,
            leeway_seconds=settings.voicepass_jwt_leeway_seconds,
            max_age_seconds=settings.voicepass_jwt_max_age_seconds,
            user_id_claim=settings.voicepass_user_id_claim,
            user_name_claim=settings.voicepass_user_name_claim,
        )
    ]


def _key_source(entry: IssuerEntry, where: str, problems: list[str]) -> KeySource | None:
    if entry.jwks_url is not None:
        return _published(entry.jwks_url, entry.issuer, entry.algorithm)
    try:
        if entry.algorithm not in HMAC_ALGORITHMS:
            return FixedKey(key_from_pem(entry.public_key or "", entry.algorithm))
        secret = secret_named(entry.secret_env or "")
        if not secret:
            problems.append(f"{entry.secret_env} is not set, though {where}.secret_env names it")
            return None
        return FixedKey(key_from_secret(secret, entry.algorithm))
    except KeyUnusableError as error:
        problems.append(f"{entry.secret_env or where + '.public_key'} {error}")
        return None


def _published(url: str, token_issuer: str, algorithm: str) -> PublishedKeys:
    return PublishedKeys(url=url, token_issuer=token_issuer, algorithm=algorithm, clock=time.monotonic)


def _workspaces(settings: Settings, policy_file: PolicyFile, problems: list[str]) -> list[Workspace]:
    own = [entry for entry in policy_file.agents.values() if entry.base_url is not None]
    workspaces: dict[str, Workspace] = {}
    if len(own) < len(policy_file.agents) or not own:
        if not settings.api_keys:
            problems.append("ELEVENLABS_API_KEY is not set: create a key with the permission 'ElevenAgents: Write'")
        workspaces[settings.elevenlabs_base_url] = Workspace(
            base_url=settings.elevenlabs_base_url, api_keys=settings.api_keys
        )
    for entry in own:
        base_url, name = entry.base_url or "", entry.api_key_env or ""
        keys = tuple(key.strip() for key in (secret_named(name) or "").split(",") if key.strip())
        if not keys:
            problems.append(f"{name} is not set, though VOICEPASS_POLICY_FILE names it as the key for {base_url}")
        elif not all(is_header_value(key) for key in keys):
            problems.append(f"{name} holds a character that no HTTP header can carry")
        elif base_url in workspaces and workspaces[base_url].keys != keys:
            problems.append(
                f"{name} is a second key for {base_url}: two keys of one host stand in one variable, by comma"
            )
        else:
            workspaces[base_url] = Workspace(base_url=base_url, api_keys=keys)
    return list(workspaces.values())


def _rules(settings: Settings, policy_file: PolicyFile, problems: list[str]) -> dict[str, AgentRules]:
    if policy_file.agents:
        if settings.elevenlabs_agent_id is not None:
            problems.append(
                "ELEVENLABS_AGENT_ID is set, but VOICEPASS_POLICY_FILE lists the agents: put it there, with its rules"
            )
        if settings.voicepass_variables:
            problems.append("VOICEPASS_VARIABLES is set, but VOICEPASS_POLICY_FILE lists the agents: put them there")
        return {alias: _rules_of(alias, entry, settings) for alias, entry in policy_file.agents.items()}
    if settings.elevenlabs_agent_id is None:
        problems.append("ELEVENLABS_AGENT_ID is not set: copy your agent's id (agent_…) from the dashboard")
        return {}
    agent = Agent(alias=DEFAULT_ALIAS, agent_id=settings.elevenlabs_agent_id, base_url=settings.elevenlabs_base_url)
    variables = {name: Variable(claim=claim) for name, claim in settings.voicepass_variables.items()}
    # One agent and no policy: it is there for whoever can sign in.
    return {DEFAULT_ALIAS: AgentRules(agent=agent, allow=(EVERY_USER,), variables=variables)}


def _rules_of(alias: str, entry: AgentEntry, settings: Settings) -> AgentRules:
    return AgentRules(
        agent=Agent(alias=alias, agent_id=entry.id, base_url=entry.base_url or settings.elevenlabs_base_url),
        allow=entry.rules,
        variables={name: variable.variable() for name, variable in entry.variables.items()},
    )


def open_ledger(settings: Settings, *, clock: Clock) -> AbstractAsyncContextManager[Ledger]:
    """Open the ledger that VOICEPASS_DATABASE_URL names. It decides by a clock that does not step."""
    path = _sqlite_path(settings)
    if path is not None:
        return open_sqlite(path, clock=SteadyClock(wall=clock, ticks=elapsed_seconds), wall=clock)
    try:
        from voicepass.ledger.postgres import open_postgres  # noqa: PLC0415 - its driver is an extra
    except ImportError as error:
        raise LedgerUnavailable(operator_note="PostgreSQL needs its driver: install the extra 'postgres'") from error
    return open_postgres(settings.voicepass_database_url)


def is_in_memory(settings: Settings) -> bool:
    """Whether the ledger is this process' own, and gone with it."""
    return _sqlite_path(settings) == ":memory:"


def ledger_exists(settings: Settings) -> bool:
    """Whether there is a ledger already, that another process may be using."""
    path = _sqlite_path(settings)
    return path is None or Path(path).exists()


def _sqlite_path(settings: Settings) -> str | None:
    url = settings.voicepass_database_url
    if not url.startswith("sqlite:"):
        return None
    return url.removeprefix("sqlite://").removeprefix("/") or ":memory:"
