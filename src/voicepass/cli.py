"""The command line: parse, call, print."""

import json
import math
import time
from typing import Annotated, Any, Never

import typer
import uvicorn
from jose import jwt

from voicepass.keys import HMAC_ALGORITHMS
from voicepass.observe import configure_logging
from voicepass.settings import SettingsRefusedError, load_settings, settings_to_serve

LOOPBACK = "127.0.0.1"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they print local variables, and with them secrets
    help="Signed-in users get a single-use ElevenLabs signed URL; the API key stays on the server.",
)

Port = Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")]


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 inside a container.")] = LOOPBACK,
    port: Annotated[int, typer.Option(min=1, max=65535, envvar="PORT", help="The port to listen on.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes that share the port.")] = 1,
) -> None:
    """Run the service. It does not start open: what is missing is named, a line each."""
    try:
        settings = settings_to_serve()
    except SettingsRefusedError as error:
        _fail(error)
    configure_logging(log_format=settings.voicepass_log_format, level=settings.voicepass_log_level)
    _listen(
        "voicepass.app:create_app",
        host=host,
        port=port,
        factory=True,
        workers=workers,
        # Longer than the deadline: past it uvicorn would cut the requests that are still being answered.
        timeout_graceful_shutdown=math.ceil(settings.voicepass_deadline_seconds) + 2,
    )


@app.command()
def demo(port: Port = 8000) -> None:
    """Show the whole story on this machine: the service, a pretend ElevenLabs and a page. No account, no internet."""
    from voicepass.demo import create_demo  # noqa: PLC0415 - the service never loads the demo

    base_url = f"http://{LOOPBACK}:{port}"
    typer.echo(f"voicepass demo: open {base_url} in a browser, sign in with any name, start a conversation.")
    typer.echo("Nothing leaves this machine. Ctrl-C ends it.")
    _listen(create_demo(base_url), host=LOOPBACK, port=port, timeout_graceful_shutdown=1)


@app.command()
def emulator(
    port: Port = 9000,
    agent: Annotated[list[str] | None, typer.Option(help="An agent id that exists; repeatable.")] = None,
    key: Annotated[str, typer.Option(help="The API key that is accepted.")] = "sk_emulator",
    open_agents: Annotated[bool, typer.Option("--open", help="Let conversations in without a signature.")] = False,  # noqa: FBT002
    fault: Annotated[
        list[str] | None,
        typer.Option(help="Trouble from the start, as for PUT /_emulator/faults: '{\"status\": 503}'."),
    ] = None,
) -> None:
    """Run a pretend ElevenLabs, for frontends and CI. Control it at /_emulator (requests, faults, agents, clock)."""
    from pydantic import ValidationError  # noqa: PLC0415

    from voicepass.emulator import EmulatedAgent, Emulator, Fault, create_emulator  # noqa: PLC0415 - as above

    try:
        faults = [Fault.model_validate_json(text) for text in fault or ()]
    except ValidationError as error:
        raise typer.BadParameter(str(error), param_hint="--fault") from None
    agents = agent or ["agent_demo"]
    pretend = Emulator(
        agents=[EmulatedAgent(agent_id=agent_id, requires_auth=not open_agents) for agent_id in agents],
        api_keys={key: frozenset({"convai_write"})},
        faults=faults,
    )
    configure_logging(log_format="console", level="info")
    typer.echo(f"A pretend ElevenLabs: ELEVENLABS_BASE_URL=http://{LOOPBACK}:{port} ELEVENLABS_AGENT_ID={agents[0]}")
    _listen(create_emulator(pretend), host=LOOPBACK, port=port, timeout_graceful_shutdown=1)


@app.command()
def token(
    user: Annotated[str, typer.Option(help="The user's id, the claim VOICEPASS_USER_ID_CLAIM.")],
    name: Annotated[str | None, typer.Option(help="The user's name, the claim VOICEPASS_USER_NAME_CLAIM.")] = None,
    ttl: Annotated[int, typer.Option(min=1, help="Seconds until it expires.")] = 3600,
    claim: Annotated[list[str] | None, typer.Option(help="A further claim, key=value; the value may be JSON.")] = None,
) -> None:
    """Print a test JWT for curl, signed with the VOICEPASS_JWT_SECRET that you hold."""
    try:
        settings = load_settings()
    except SettingsRefusedError as error:
        _fail(error)
    if problems := settings.identity_problems():
        _fail(SettingsRefusedError(problems))
    secret, algorithm = settings.voicepass_jwt_secret, settings.voicepass_jwt_algorithm
    if secret is None or algorithm not in HMAC_ALGORITHMS:
        typer.echo(
            f"VOICEPASS_JWT_ALGORITHM is {algorithm}: only your identity provider can sign such tokens", err=True
        )
        raise typer.Exit(1)
    now = int(time.time())
    claims: dict[str, Any] = {
        "iss": settings.voicepass_jwt_issuer,
        "aud": settings.voicepass_jwt_audience,
        "sub": user,
        "iat": now,
        "exp": now + ttl,
    }
    claims[settings.voicepass_user_id_claim] = user
    if name is not None:
        claims[settings.voicepass_user_name_claim] = name
    for entry in claim or ():
        key, separator, value = entry.partition("=")
        if not separator:
            raise typer.BadParameter("must read key=value", param_hint="--claim")
        claims[key] = _json_or_text(value)
    typer.echo(jwt.encode(claims, secret.get_secret_value(), algorithm))


def main() -> None:
    """Run the command line."""
    app()


def _json_or_text(value: str) -> object:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _fail(error: SettingsRefusedError) -> Never:
    for problem in error.problems:
        typer.echo(problem, err=True)
    raise typer.Exit(1)


def _listen(application: Any, *, host: str, port: int, **options: Any) -> None:  # noqa: ANN401
    uvicorn.run(
        application,
        host=host,
        port=port,
        log_config=None,  # configure_logging owns it
        access_log=False,  # one line per attempt says more, and no query string
        server_header=False,
        proxy_headers=False,  # uvicorn would believe anyone on loopback
        ws="websockets-sansio",
        h11_max_incomplete_event_size=64 * 1024,  # ours is the limit that answers with a problem
        **options,
    )
