"""The command line: parse, call, print."""

import asyncio
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Annotated, Any, Never

import typer
from jose import jwt

from voicepass.api.server import run
from voicepass.cli import reports
from voicepass.config.build import Configuration, configure, is_in_memory, open_ledger, read_own_issuer
from voicepass.config.checks import split_list
from voicepass.config.environment import ENV_FILE, SettingsRefusedError, read_variables
from voicepass.config.issuerchecks import decode_secret
from voicepass.config.policyfile import PolicyFileError, read_policy_file
from voicepass.config.settings import Settings, load_settings
from voicepass.doctor.command import doctor
from voicepass.errors import LedgerUnavailable, Refusal, TokenInvalid
from voicepass.identity import JwtAuthenticator
from voicepass.identity.differences import list_differences
from voicepass.identity.jwks import FETCH_SECONDS
from voicepass.ledger import ANSWER_SECONDS
from voicepass.model import DEFAULT_ALIAS
from voicepass.policy import Rule
from voicepass.telemetry.logs import configure_logging, log_writer
from voicepass.telemetry.workers import share_metrics

LOOPBACK = "127.0.0.1"
DEFAULT_EMULATOR_KEY = "sk_emulator"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they print local variables, and with them secrets
    help="Signed-in users get a single-use ElevenLabs signed URL; the API key stays on the server.",
)


@app.callback()
def program(
    env_file: Annotated[
        str | None, typer.Option(help=f"The file with the settings, in place of .env; also {ENV_FILE}.")
    ] = None,
) -> None:
    """Set what holds for every command."""
    if env_file is not None:
        os.environ[ENV_FILE] = env_file  # the workers of `serve` read it too


Port = Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")]


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 inside a container.")] = LOOPBACK,
    port: Annotated[int, typer.Option(min=1, max=65535, envvar="PORT", help="The port to listen on.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes that share the port.")] = 1,
    admin_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="A second port, for /metrics and /v1/blocks; --port then answers them with 404."
        ),
    ] = None,
    root_path: Annotated[str, typer.Option(help="The path prefix under which a proxy serves voicepass: /voice.")] = "",
) -> None:
    """Run the service. It does not start open: what is missing is named, a line each."""
    settings = _settings()
    _configuration(settings)
    if workers > 1 and is_in_memory(settings):
        _fail(["VOICEPASS_DATABASE_URL is in memory, and each worker would have its own: name a file or PostgreSQL"])
    _check_ledger(settings)
    _check_port(host, port)
    _check_admin_port(host, port, admin_port)
    configure_logging(log_format=settings.voicepass_log_format, level=settings.voicepass_log_level)
    # Workers buffer their own lines, and so does one process that serves; a parent of workers has no lifespan.
    with share_metrics(workers), log_writer.buffered() if workers > 1 else nullcontext():
        run(
            _application(admin_port),
            host=host,
            port=port,
            admin_port=admin_port,
            factory=True,
            workers=workers,
            grace_seconds=longest_answer_seconds(settings),
            root_path=root_path,
        )


@app.command()
def demo(port: Port = 8000) -> None:
    """Show the whole story on this machine: the service, a pretend ElevenLabs and a page. No account, no internet."""
    from voicepass.demo import create_demo  # noqa: PLC0415 - the service never loads the demo

    base_url = f"http://{LOOPBACK}:{port}"
    typer.echo(f"voicepass demo: open {base_url} in a browser, sign in with any name, start a conversation.")
    typer.echo("Nothing leaves this machine. Ctrl-C ends it.")
    _check_port(LOOPBACK, port)
    run(create_demo(base_url), host=LOOPBACK, port=port, grace_seconds=1)


@app.command()
def emulator(
    *,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 inside a container.")] = LOOPBACK,
    port: Port = 9000,
    agent: Annotated[list[str] | None, typer.Option(help="The id of an agent besides agent_demo; repeatable.")] = None,
    key: Annotated[str, typer.Option(help="The API key that is accepted.")] = DEFAULT_EMULATOR_KEY,
    open_agents: Annotated[bool, typer.Option("--open", help="Let conversations in without a signature.")] = False,
    fault: Annotated[
        list[str] | None,
        typer.Option(help="Trouble from the start, as for PUT /_emulator/faults: '{\"status\": 503}'."),
    ] = None,
    processing_seconds: Annotated[
        float, typer.Option(min=0, help="How long a conversation that has ended is `processing` before it is `done`.")
    ] = 0,
    webhook_url: Annotated[str | None, typer.Option(help="Where the post-call webhook goes.")] = None,
    webhook_secret: Annotated[str | None, typer.Option(help="What signs the webhook.")] = None,
) -> None:
    """Run a pretend ElevenLabs, for frontends and CI. GET /_emulator lists its controls."""
    from pydantic import ValidationError  # noqa: PLC0415

    from elevenlabs_emulator import (  # noqa: PLC0415 - as above
        DEFAULT_WEBHOOK_SECRET,
        EmulatedAgent,
        Emulator,
        Fault,
        create_emulator,
    )

    try:
        faults = [Fault.model_validate_json(text) for text in fault or ()]
    except ValidationError as error:
        mistakes = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors())
        raise typer.BadParameter(mistakes, param_hint="--fault") from None
    agents = [*(agent or ()), "agent_demo"]
    pretend = Emulator(
        agents=[EmulatedAgent(agent_id=agent_id, requires_auth=not open_agents) for agent_id in agents],
        api_keys={key: frozenset({"convai_write", "convai_read"})},
        faults=faults,
        processing_seconds=processing_seconds,
        webhook_url=webhook_url,
        webhook_secret=webhook_secret or DEFAULT_WEBHOOK_SECRET,
    )
    configure_logging(log_format="console", level="info")
    typer.echo(f"A pretend ElevenLabs: ELEVENLABS_BASE_URL=http://{LOOPBACK}:{port} ELEVENLABS_AGENT_ID={agents[0]}")
    if key == DEFAULT_EMULATOR_KEY:
        typer.echo(f"It takes the API key {key}.")
    if webhook_url:
        typer.echo(f"It signs webhooks: ELEVENLABS_WEBHOOK_SECRET={pretend.webhooks.secret}")
    _check_port(host, port)
    run(create_emulator(pretend), host=host, port=port, grace_seconds=1)


@app.command()
def token(
    user: Annotated[str, typer.Option(help="The user's id, the claim VOICEPASS_USER_ID_CLAIM.")],
    name: Annotated[str | None, typer.Option(help="The user's name, the claim VOICEPASS_USER_NAME_CLAIM.")] = None,
    ttl: Annotated[int, typer.Option(min=1, help="Seconds until it expires.")] = 3600,
    claim: Annotated[list[str] | None, typer.Option(help="A further claim, key=value; the value may be JSON.")] = None,
) -> None:
    """Print a test JWT for curl, signed with the VOICEPASS_JWT_SECRET that you hold."""
    settings = _settings()
    try:
        issuer = read_own_issuer(settings)
    except SettingsRefusedError as error:
        _fail(error.problems)
    if issuer.secret_env is None:
        _fail([f"VOICEPASS_JWT_ALGORITHM is {issuer.algorithm}: only your identity provider can sign such tokens"])
    now = int(time.time())
    claims: dict[str, Any] = {
        "iss": issuer.issuer,
        "aud": issuer.audience,
        "sub": user,
        "iat": now,
        "exp": now + ttl,
        issuer.user_id_claim: user,
    }
    if name is not None:
        claims[issuer.user_name_claim] = name
    for entry in claim or ():
        key, separator, value = entry.partition("=")
        if not separator:
            raise typer.BadParameter("must read key=value", param_hint="--claim")
        claims[key] = _json_or_text(value)
    secret = decode_secret(settings.read_secret(issuer.secret_env) or "")
    typer.echo(jwt.encode(claims, secret.encode("utf-8", "surrogateescape"), issuer.algorithm))


policy = typer.Typer(no_args_is_help=True, help="Look at the policy: who may use which agent, and why.")
app.add_typer(policy, name="policy")
app.add_typer(doctor, name="doctor")
reports.register(app)


@policy.command("check")
def policy_check(
    file: Annotated[str | None, typer.Argument(help="The file; VOICEPASS_POLICY_FILE where none is named.")] = None,
) -> None:
    """Check a policy file, without any secret, and print who may do what; exit 1 with a line for each mistake."""
    path = file or _settings().voicepass_policy_file
    if path is None:
        _fail(["name a file, or set VOICEPASS_POLICY_FILE"])
    try:
        hosts = split_list(read_variables().get("VOICEPASS_PLAIN_HTTP_HOSTS", "").lower())
        policy_file = read_policy_file(path, plain_http_hosts=hosts)
    except PolicyFileError as error:
        _fail([f"{path}: {problem}" for problem in error.problems])
    for issuer in policy_file.issuers:
        for token_issuer, required_claims in issuer.token_issuers.items():
            addressee = f"for {issuer.audience}" if issuer.audience else f"where {Rule(required_claims)}"
            typer.echo(f"believes {issuer.algorithm} tokens of {token_issuer} {addressee}")
    for alias, entry in policy_file.agents.items():
        typer.echo(
            f"agent {alias} ({entry.id}) is open to {', and to '.join(rule.whom for rule in entry.rules) or 'nobody'}"
        )
        for name, variable in entry.variables.items():
            default = "" if variable.default is None else f", else {variable.default!r}"
            typer.echo(f"  {name} = the claim {variable.claim}{default}")


@policy.command("explain")
def policy_explain(
    token: Annotated[str, typer.Argument(help="A JWT, or - to read it from standard input.")],
    agent: Annotated[str, typer.Option(help="The alias it is to be used for.")] = DEFAULT_ALIAS,
) -> None:
    """Say for a token which check or rule decides; exit 1 where it is refused. The token is verified, not spent."""
    configuration = _configuration()
    configure_logging(log_format="console", level="error")
    unverified_token = sys.stdin.read().strip() if token == "-" else token  # noqa: S105
    authenticator = JwtAuthenticator(trusted=configuration.trusted, clock=time.time)
    try:
        user = asyncio.run(authenticator.user_of(unverified_token))
        typer.echo(f"user {user.id!r} of {user.issuer}")
        allowed = configuration.policy.agent_for(user, agent)
        rule = configuration.policy.agents[agent].admitting(user)
        typer.echo(f"may use the agent {agent} ({allowed.agent_id}), open to {rule.whom if rule else 'nobody'}")
        for name, value in configuration.policy.variables_for(user, allowed).items():
            typer.echo(f"  {name} = {value!r}")
    except Refusal as refusal:
        typer.echo(f"refused: {refusal.code}: {refusal.operator_note or refusal.detail}", err=True)
        if isinstance(refusal, TokenInvalid):
            blocks = [(trusted.token_issuer, trusted.audience) for trusted in configuration.trusted]
            for line in list_differences(unverified_token, blocks):
                typer.echo(line, err=True)
        raise typer.Exit(1) from None


def main() -> None:
    """Run the command line."""
    app()


def longest_answer_seconds(settings: Settings) -> int:
    """Return what keys, ledger and ElevenLabs may take together: past it uvicorn may cut whatever is being answered."""
    return math.ceil(settings.voicepass_deadline_seconds + 2 * ANSWER_SECONDS + FETCH_SECONDS)


def _json_or_text(value: str) -> object:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _settings() -> Settings:
    try:
        return load_settings()
    except SettingsRefusedError as error:
        _fail(error.problems)


def _configuration(settings: Settings | None = None) -> Configuration:
    try:
        return configure(settings or load_settings())
    except SettingsRefusedError as error:
        _fail(error.problems)


def _check_ledger(settings: Settings) -> None:
    """Open the ledger once, its schema up to date, before any worker does."""

    async def open_once() -> None:
        async with open_ledger(settings, clock=time.time) as ledger:
            await ledger.blocks()  # a read: the service may start on a replica that is about to become the primary

    try:
        asyncio.run(open_once())
    except LedgerUnavailable as error:
        _fail([f"VOICEPASS_DATABASE_URL cannot be used: {error.operator_note}"])


def _application(admin_port: int | None) -> str | Callable[[], object]:
    if admin_port is None:
        return "voicepass.app:create_app"
    from voicepass.app import create_app  # noqa: PLC0415 - no other command needs it

    return partial(create_app, admin_port=admin_port)  # workers take it as it is


def _check_admin_port(host: str, port: int, admin_port: int | None) -> None:
    if admin_port == port:
        _fail([f"--admin-port and --port are both {port}: choose two ports"])
    if admin_port is not None:
        _check_port(host, admin_port, option="--admin-port")


def _check_port(host: str, port: int, *, option: str = "--port") -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            _fail([f"cannot listen on {host} port {port} ({error.strerror}): choose another with {option}"])


def _fail(problems: Sequence[str]) -> Never:
    for problem in problems:
        typer.echo(problem, err=True)
    raise typer.Exit(1)
