"""`voicepass demo` and `voicepass emulator`: what needs no account at ElevenLabs."""

from typing import Annotated

import typer
from pydantic import ValidationError

from voicepass.api.server import run
from voicepass.cli.failures import check_port
from voicepass.telemetry.logs import configure_logging

LOOPBACK = "127.0.0.1"
DEFAULT_EMULATOR_KEY = "sk_emulator"

Port = Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")]
Faults = Annotated[
    list[str] | None,
    typer.Option(help="Fail from the start, as with PUT /_emulator/faults: '{\"status\": 503}'; repeatable."),
]
AgentIds = Annotated[list[str] | None, typer.Option(help="Add an agent with this id to agent_demo; repeatable.")]


def demo(port: Port = 8000) -> None:
    """Run the service, an emulated ElevenLabs and a web page on this machine. Needs no account and no internet."""
    from voicepass.demo import create_demo  # noqa: PLC0415 - the service never loads the demo

    base_url = f"http://{LOOPBACK}:{port}"
    typer.echo(f"voicepass demo: open {base_url} in a browser, sign in with any name, start a conversation.")
    typer.echo("Nothing leaves this machine. Press Ctrl-C to stop.")
    check_port(LOOPBACK, port)
    run(create_demo(base_url), host=LOOPBACK, port=port, grace_seconds=1)


def emulator(
    *,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 inside a container.")] = LOOPBACK,
    port: Port = 9000,
    agent: AgentIds = None,
    key: Annotated[str, typer.Option(help="The API key to accept.")] = DEFAULT_EMULATOR_KEY,
    open_agents: Annotated[bool, typer.Option("--open", help="Accept conversations without a signature.")] = False,
    fault: Faults = None,
    processing_seconds: Annotated[
        float, typer.Option(min=0, help="Seconds from the end of a conversation until its status is `done`.")
    ] = 0,
    webhook_url: Annotated[str | None, typer.Option(help="Send the post-call webhook to this URL.")] = None,
    webhook_secret: Annotated[str | None, typer.Option(help="Sign the webhook with this secret.")] = None,
) -> None:
    """Run an emulated ElevenLabs, for frontends and CI. GET /_emulator lists its controls."""
    import elevenlabs_emulator as emulation  # noqa: PLC0415 - the service never loads the emulator

    agents = [*(agent or ()), "agent_demo"]
    try:
        faults = [emulation.Fault.model_validate_json(text) for text in fault or ()]
    except ValidationError as error:
        mistakes = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'it'}: {each['msg']}" for each in error.errors())
        raise typer.BadParameter(mistakes, param_hint="--fault") from None
    emulated = emulation.Emulator(
        agents=[emulation.EmulatedAgent(agent_id=agent_id, requires_auth=not open_agents) for agent_id in agents],
        api_keys={key: frozenset({"convai_write", "convai_read"})},
        faults=faults,
        processing_seconds=processing_seconds,
        webhook_url=webhook_url,
        webhook_secret=webhook_secret or emulation.DEFAULT_WEBHOOK_SECRET,
    )
    configure_logging(log_format="console", level="info")
    typer.echo(f"Emulated ElevenLabs: ELEVENLABS_BASE_URL=http://{LOOPBACK}:{port} ELEVENLABS_AGENT_ID={agents[0]}")
    if key == DEFAULT_EMULATOR_KEY:
        typer.echo(f"It accepts ELEVENLABS_API_KEY={key}")
    if webhook_url:
        typer.echo(f"It signs webhooks with ELEVENLABS_WEBHOOK_SECRET={emulated.webhooks.secret}")
    check_port(host, port)
    run(emulation.create_emulator(emulated), host=host, port=port, grace_seconds=1)
