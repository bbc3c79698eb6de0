"""`voicepass policy`: who may use which agent, and why. `voicepass token`: test tokens."""

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import combinations
from typing import Annotated, Any

import typer
from jose import jwt

from voicepass.cli.failures import fail
from voicepass.config.build import configure, read_own_issuer
from voicepass.config.checks import split_list
from voicepass.config.environment import SettingsRefusedError, read_variables
from voicepass.config.issuers import decode_secret
from voicepass.config.limits import OFF
from voicepass.config.policyfile import PolicyFile, read_policy_file
from voicepass.config.settings import load_settings
from voicepass.errors import Refusal, TokenInvalid
from voicepass.identity import JwtAuthenticator
from voicepass.identity.tokens import list_differences
from voicepass.model import DEFAULT_ALIAS

policy = typer.Typer(no_args_is_help=True, help="Show who may use which agent, and why.")


@policy.command()
def check(
    file: Annotated[str | None, typer.Argument(help="The file; without it, VOICEPASS_POLICY_FILE.")] = None,
) -> None:
    """Check a policy file and print who may do what. Needs no secret. Prints a line for each mistake, then exits 1."""
    path = file or load_settings().voicepass_policy_file
    if path is None:
        fail(["name a file, or set VOICEPASS_POLICY_FILE"])
    try:
        hosts = split_list(read_variables().get("VOICEPASS_PLAIN_HTTP_HOSTS", "").lower())
        policy_file = read_policy_file(path, plain_http_hosts=hosts)
    except SettingsRefusedError as error:
        fail(error.problems)
    for issuer in policy_file.issuers:
        for token_issuer, required in issuer.token_issuers.items():
            addressee = f"for {issuer.audience}" if issuer.audience else f"where {required}"
            typer.echo(f"accepts {issuer.algorithm} tokens of {token_issuer} {addressee}")
    for alias, entry in policy_file.agents.items():
        rules = entry.build(alias)
        users = ", and to ".join(rule.whom for rule in rules.allow) or "nobody"
        typer.echo(f"agent {alias} ({rules.agent}) is open to {users}")
        for name, variable in rules.variables.items():
            default = "" if variable.default is None else f", else {variable.default!r}"
            typer.echo(f"  {name} = the claim {variable.claim}{default}")
    limits = policy_file.limits
    for plan, entry_of_plan in zip(limits.plans(), limits.plan, strict=True):
        typer.echo(f"plan {plan.name} is for {' and '.join(rule.whom for rule in plan.when)}")
        for key, most in entry_of_plan.complete(limits.user):
            typer.echo(f"  {key} = {OFF if most is None else most}")
    for warning in _list_warnings(policy_file):
        typer.echo(f"warning: {path}: {warning}", err=True)


def _list_warnings(policy_file: PolicyFile) -> Iterator[str]:
    """Yield a line for each condition that can never hold, and for each plan that an earlier one hides."""
    rules = {f"agents.{alias}.allow": entry.build(alias).allow for alias, entry in policy_file.agents.items()}
    plans = policy_file.limits.plans()
    rules |= {f"limits.plan.{number}.when": plan.when for number, plan in enumerate(plans)}
    for place, of_place in rules.items():
        for claim in [claim for rule in of_place for claim in rule.list_impossible()]:
            yield f"{place}: never holds, because no token can hold a listed value of {claim}"
    for (first, one), (second, other) in combinations(enumerate(plans), 2):
        if one.covers(other):
            yield f"limits.plan.{second}: never applies, because limits.plan.{first} applies to its users"


@policy.command()
def explain(
    token: Annotated[str, typer.Argument(help="A JWT, or - to read it from standard input.")],
    agent: Annotated[str, typer.Option(help="The alias of the agent.")] = DEFAULT_ALIAS,
) -> None:
    """Say which check or rule decides for a token; exit 1 if it is refused. This grants no pass."""
    configuration = configure(load_settings())
    unverified_token = sys.stdin.read().strip() if token == "-" else token  # noqa: S105
    authenticator = JwtAuthenticator(trusted=configuration.trusted, clock=time.time)
    try:
        user = asyncio.run(authenticator.user_of(unverified_token))
        typer.echo(f"user {user.id!r} of {user.issuer}")
        plan = configuration.policy.plan_for(user)
        if configuration.policy.plans:
            typer.echo(f"has the limits of plan {plan.name}" if plan.name else "has no plan")
        allowed = configuration.policy.agent_for(user, agent)
        rule = configuration.policy.agents[agent].admitting(user)
        typer.echo(f"may use the agent {agent} ({allowed}), open to {rule.whom if rule else 'nobody'}")
        for name, value in configuration.policy.variables_for(user, allowed).items():
            typer.echo(f"  {name} = {value!r}")
    except Refusal as refusal:
        lines = [f"refused: {refusal.code}: {refusal.operator_note or refusal.detail}"]
        if isinstance(refusal, TokenInvalid):
            blocks = [(trusted.token_issuer, trusted.audience) for trusted in configuration.trusted]
            lines += list_differences(unverified_token, blocks)
        fail(lines)


def token(
    user: Annotated[str, typer.Option(help="The user's id, for the claim VOICEPASS_USER_ID_CLAIM.")],
    name: Annotated[str | None, typer.Option(help="The user's name, for the claim VOICEPASS_USER_NAME_CLAIM.")] = None,
    ttl: Annotated[int, typer.Option(min=1, help="Seconds until the token expires.")] = 3600,
    claim: Annotated[list[str] | None, typer.Option(help="Add a claim, key=value or key=JSON; repeatable.")] = None,
) -> None:
    """Print a test JWT for curl, signed with your VOICEPASS_JWT_SECRET."""
    settings = load_settings()
    issuer = read_own_issuer(settings)
    if issuer.secret_env is None:
        fail([f"VOICEPASS_JWT_ALGORITHM is {issuer.algorithm}: only your identity provider can sign such tokens"])
    now = int(time.time())
    claims: dict[str, Any] = {"iss": issuer.issuer, "aud": issuer.audience, "iat": now, "exp": now + ttl}
    claims |= {"sub": user, issuer.user_id_claim: user}
    if name is not None:
        claims[issuer.user_name_claim] = name
    for entry in claim or ():
        key, separator, value = entry.partition("=")
        if not separator:
            raise typer.BadParameter("write key=value", param_hint="--claim")
        claims[key] = value
        with suppress(ValueError):
            claims[key] = json.loads(value)
    secret = decode_secret(settings.read_secret(issuer.secret_env))
    typer.echo(jwt.encode(claims, secret.encode("utf-8", "surrogateescape"), issuer.algorithm))
