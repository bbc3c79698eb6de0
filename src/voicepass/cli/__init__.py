"""The command line: every command, and the options that all of them share."""

import os
from typing import Annotated

import typer

from voicepass.cli.blocking import block, blocks, extend, extensions, unblock
from voicepass.cli.emulation import demo, emulator
from voicepass.cli.failures import Commands
from voicepass.cli.forgetting import forget
from voicepass.cli.ledgers import ledger
from voicepass.cli.policies import policy
from voicepass.cli.reports import conversations, export, usage
from voicepass.cli.service import serve
from voicepass.cli.tokens import create_token
from voicepass.config.environment import ENV_FILE
from voicepass.doctor.command import doctor
from voicepass.model import VERSION

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they print local variables, and with them secrets
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Return single-use ElevenLabs signed URLs to signed-in users. The API key stays on the server.",
)


def _print_version(is_asked: bool) -> None:  # noqa: FBT001 - Typer calls it with the option's value
    if is_asked:
        typer.echo(f"voicepass {VERSION}")
        raise typer.Exit


@app.callback()
def set_up(
    *,
    env_file: Annotated[
        str | None, typer.Option(help=f"Read the settings from this file, not from .env; also {ENV_FILE}.")
    ] = None,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Apply the options that hold for every command."""
    if env_file is not None:
        os.environ[ENV_FILE] = env_file  # the workers of `serve` read it too


app.command()(serve)
app.command()(demo)
app.command()(emulator)
app.command("token")(create_token)
app.command()(usage)
app.command()(conversations)
app.command()(export)
app.command()(block)
app.command()(unblock)
app.command()(blocks)
app.command()(extend)
app.command()(extensions)
app.command()(forget)
app.add_typer(ledger, name="ledger")
app.add_typer(policy, name="policy")
app.add_typer(doctor, name="doctor")


def main() -> None:
    """Run the command line."""
    app()
