"""Reads the ledger and prints rows: as a table for people, as JSON for machines."""

import asyncio
import csv
import json
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from voicepass.cli.failures import fail
from voicepass.config.build import find_sqlite_path, open_ledger
from voicepass.config.settings import Settings, load_settings
from voicepass.ledger import ANSWER_SECONDS, Ledger
from voicepass.policy import is_visible

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Result = TypeVar("Result")


def load_ledger_settings() -> Settings:
    """Return the settings. Exits with a line if there is no ledger yet."""
    settings = load_settings()
    path = find_sqlite_path(settings)
    if path == ":memory:":
        fail(["VOICEPASS_DATABASE_URL is in memory: only the service itself can read this ledger"])
    if path and not Path(path).exists():  # opening it would create one, and a block in it would block nobody
        elsewhere = "if the service already runs elsewhere, set VOICEPASS_DATABASE_URL as the service has it"
        fail([f"there is no ledger yet at {Path(path).absolute()}: `voicepass serve` creates it", elsewhere])
    return settings


def with_ledger(
    work: Callable[[Ledger], Awaitable[Result]],
    settings: Settings | None = None,
    *,
    answer_seconds: float = ANSWER_SECONDS,
) -> Result:
    """Open the ledger, and return what `work` returns. Exits with a line if there is no ledger yet.

    With `settings`, it creates the ledger instead.
    """
    settings = settings or load_ledger_settings()

    async def run() -> Result:
        async with open_ledger(settings, clock=time.time, answer_seconds=answer_seconds) as ledger:
            return await work(ledger)

    return asyncio.run(run())


def show(rows: Sequence[Mapping[str, Any]], *, as_json: bool = False, as_csv: bool = False) -> None:
    """Print rows that have the same members. The first column of a table is not broken if it is narrow."""
    if as_json:
        typer.echo(write_json(rows, indent=2))
    elif as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerows([map(make_cell, cells) for cells in (*rows[:1], *(row.values() for row in rows))])
    elif not rows:
        typer.echo("nothing yet")
    else:
        console = Console(markup=False, emoji=False)  # an id may be anything, markup too
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
        cells = [["" if value is None else escape_controls(str(value)) for value in row.values()] for row in rows]
        is_narrow = max(len(row[0]) for row in cells) <= console.width // 2
        for number, name in enumerate(rows[0]):
            table.add_column(name, overflow="fold", no_wrap=number == 0 and is_narrow)  # people copy the first
        for row in cells:
            table.add_row(*row)
        console.print(table)


def make_cell(value: object) -> object:
    """Return a value as a cell of a CSV file."""
    if not isinstance(value, str):
        return value
    # A spreadsheet runs text that begins like a formula, and a browser may report any text as the user's id.
    quote = "'" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else ""
    return quote + escape_controls(value)


def escape_controls(text: str) -> str:
    """Replace each character that could steer a terminal with its escape in Python, such as that of ESC."""
    return "".join(char if is_visible(char) else char.encode("unicode_escape").decode() for char in text)


def write_instant(seconds: float | None) -> str | None:
    """Write seconds since the epoch as a date without fractions of a second."""
    return None if seconds is None else datetime.fromtimestamp(int(seconds), UTC).isoformat().replace("+00:00", "Z")


def write_json(value: object, *, indent: int | None = None) -> str:
    """Write JSON without control characters."""
    return json.dumps(value, indent=indent).replace("\x7f", "\\u007f")  # the one that `dumps` leaves
