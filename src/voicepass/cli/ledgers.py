"""`voicepass ledger`: back up the SQLite ledger, or copy it to PostgreSQL."""

import asyncio
import sqlite3
import time
from pathlib import Path
from typing import Annotated

import typer

from voicepass.cli.failures import fail
from voicepass.cli.tables import load_ledger_settings
from voicepass.config.build import find_sqlite_path, open_ledger
from voicepass.config.settings import Settings, load_settings
from voicepass.ledger.backups import back_up, lock_file

ledger = typer.Typer(no_args_is_help=True, help="Back up the SQLite ledger, or copy it to PostgreSQL.")


@ledger.command()
def backup(file: Annotated[Path, typer.Argument(help="The new file.")]) -> None:
    """Write a copy of the SQLite ledger to a new file. voicepass may run meanwhile."""
    path = find_sqlite_path(load_ledger_settings())
    if path is None:
        fail(["VOICEPASS_DATABASE_URL is PostgreSQL: back it up with pg_dump"])
    try:
        back_up(Path(path), file)
    except OSError as error:
        fail([f"cannot write {file} ({error.strerror}): name a new file, in a folder that exists"])
    except sqlite3.Error as error:
        fail([f"{path} cannot be copied to {file}: {error}"])
    typer.echo(f"{file}: {file.stat().st_size} bytes")


@ledger.command()
def copy(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The SQLite ledger to copy from.")],
) -> None:
    """Copy a SQLite ledger into the empty PostgreSQL of VOICEPASS_DATABASE_URL. Stop voicepass first.

    All rows are copied, or none. If the command is interrupted, run it again.
    """
    settings = load_settings()
    if find_sqlite_path(settings) is not None:
        fail(["VOICEPASS_DATABASE_URL is SQLite: set it to the URL of an empty PostgreSQL database"])
    for table, count in asyncio.run(_copy_to_postgres(file, settings)).items():
        typer.echo(f"{table}: {count} rows")


async def _copy_to_postgres(file: Path, settings: Settings) -> dict[str, int]:
    # This creates the tables. No user waits here, and the sums of a busy hour take longer than a request may.
    async with open_ledger(settings, clock=time.time, answer_seconds=600) as target:
        from voicepass.ledger.transfer import copy_rows  # noqa: PLC0415 - PostgreSQL's driver is an extra

        with lock_file(file) as source:
            counts = copy_rows(source, settings.voicepass_database_url)
        if corrections := await target.fix_sums():
            typer.echo(f"corrected {len(corrections)} sums, which were wrong in {file} too", err=True)
        return counts
