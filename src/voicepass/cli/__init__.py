"""The command line: every command, and the options that all of them share."""

import os
from typing import Annotated

import typer

from voicepass.cli.changes import block, blocks, extend, extensions, forget, ledger_commands, unblock
from voicepass.cli.emulation import demo, emulator
from voicepass.cli.failures import Commands
from voicepass.cli.policies import policy, token
from voicepass.cli.reports import conversations, export, usage
from voicepass.cli.service import serve
from voicepass.config.environment import ENV_FILE
from voicepass.doctor.command import doctor
from voicepass.model import VERSION
from voicepass.telemetry.logs import configure_logging

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
    configure_logging(log_format="console", level="error")  # commands that serve call it again


for command in (serve, demo, emulator, token, usage, conversations, export):
    app.command()(command)
for change in (block, unblock, blocks, extend, extensions, forget):
    app.command()(change)
app.add_typer(ledger_commands, name="ledger")
app.add_typer(policy, name="policy")
app.add_typer(doctor, name="doctor")


def main() -> None:
    """Run the command line."""
    app()
