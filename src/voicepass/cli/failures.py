"""How a command ends if it cannot do its work: a line for each problem on standard error, and exit code 1."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Never

import typer
from typer.core import TyperGroup

from voicepass.config.environment import PREFIXES, SettingsRefusedError
from voicepass.errors import LedgerUnavailable


class Commands(TyperGroup):
    """Runs a command, and prints the errors that the operator can fix without a traceback."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - Typer has no public name for this context
        """Run the command that the arguments name."""
        try:
            return super().invoke(ctx)
        except SettingsRefusedError as error:
            has_settings = Path(".env").exists() or any(name.startswith(PREFIXES) for name in os.environ)
            hint = [] if has_settings else [f"there are no settings in {Path.cwd()}: copy .env.example to .env"]
            fail(hint + error.problems)
        except LedgerUnavailable as error:
            fail([f"the ledger does not answer: {error.operator_note}"])


def fail(problems: Sequence[str]) -> Never:
    """Print the problems and exit with 1."""
    for problem in problems:
        typer.echo(problem, err=True)
    raise typer.Exit(1)


def check_port(host: str, port: int, *, option: str = "--port") -> None:
    """Exit with a line if nothing can listen on this port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            fail([f"cannot listen on {host} port {port} ({error.strerror}): choose another with {option}"])
