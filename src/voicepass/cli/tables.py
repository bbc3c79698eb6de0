"""Reads the ledger and prints rows: as a table for people, as JSON for machines."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from voicepass.cli.failures import fail
from voicepass.config.build import find_sqlite_path, is_in_memory, ledger_exists, open_ledger
from voicepass.config.settings import Settings, load_settings
from voicepass.ledger import Ledger
from voicepass.policy import is_visible

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

Result = TypeVar("Result")


def load_ledger_settings() -> Settings:
    """Return the settings. Exits with a line if there is no ledger yet."""
    settings = load_settings()
    if is_in_memory(settings):
        fail(["VOICEPASS_DATABASE_URL is in memory: only the service itself can read this ledger"])
    if not ledger_exists(settings):  # opening it would create one, and a block in it would block nobody
        path = Path(find_sqlite_path(settings) or "").absolute()
        fail(
            [
                f"there is no ledger yet at {path}: `voicepass serve` creates it",
                "if the service already runs elsewhere, set VOICEPASS_DATABASE_URL as the service has it",
            ]
        )
    return settings


def with_ledger(work: Callable[[Ledger], Awaitable[Result]]) -> Result:
    """Open the ledger, and return what `work` returns. Exits with a line if there is no ledger yet."""
    settings = load_ledger_settings()

    async def run() -> Result:
        async with open_ledger(settings, clock=time.time) as ledger:
            return await work(ledger)

    return asyncio.run(run())


def show(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    """Print rows that have the same members."""
    if as_json:
        typer.echo(write_json(rows, indent=2))
        return
    if not rows:
        typer.echo("nothing yet")
        return
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for name in rows[0]:
        table.add_column(name, overflow="fold", no_wrap=name == "conversation_id")  # people copy it
    for row in rows:
        table.add_row(*("" if value is None else escape_controls(str(value)) for value in row.values()))
    Console(markup=False, emoji=False).print(table)  # an id may be anything, markup too


def escape_controls(text: str) -> str:
    """Replace each character that could steer a terminal with its escape in Python, such as that of ESC."""
    return "".join(char if is_visible(char) else char.encode("unicode_escape").decode() for char in text)


def write_json(value: object, *, indent: int | None = None) -> str:
    """Write JSON without control characters."""
    return json.dumps(value, indent=indent).replace("\x7f", "\\u007f")  # the one that `dumps` leaves
