"""`voicepass usage`, `conversations` and `export`: who used what, and what was issued to whom."""

import csv
import sys
from dataclasses import asdict, fields
from enum import StrEnum
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import Progress

from voicepass.cli.tables import AsJson, escape_controls, show, with_ledger, write_instant, write_json
from voicepass.config.build import configure
from voicepass.config.settings import load_settings
from voicepass.ledger import Ledger
from voicepass.model import IssuedPass, Scope, User

MONTH_SECONDS = 30 * 24 * 60 * 60

Limit = Annotated[int, typer.Option("--limit", "--most", min=1, max=10_000, help="The maximum number of rows.")]


class ExportFormat(StrEnum):
    """How an export is written."""

    CSV = "csv"
    JSONL = "jsonl"


def usage(
    user: Annotated[str | None, typer.Option(help="Show each limit of this user, as without a plan.")] = None,
    issuer: Annotated[str | None, typer.Option(help="The user's issuer, if voicepass accepts several.")] = None,
    limit: Limit = 50,
    as_json: AsJson = False,  # noqa: FBT002
) -> None:
    """Show who used most in the last 30 days, or how much of each limit one user has used."""
    if user is None:
        rows = with_ledger(lambda ledger: ledger.sum_usage(window_seconds=MONTH_SECONDS, most=limit))
        show([{**row, "minutes": round(row["seconds"] / 60, 1)} for row in rows], as_json=as_json)
        return
    configuration = configure(load_settings())
    issuers = [trusted.token_issuer for trusted in configuration.trusted]
    if issuer is None and len(issuers) != 1:
        raise typer.BadParameter(f"name one of: {', '.join(issuers)}", param_hint="--issuer")
    limits = [limit for limit in configuration.policy.limits if limit.scope is Scope.USER]
    asked = User(issuer=issuer or issuers[0], id=user, name=None, claims={})
    answers = with_ledger(lambda ledger: ledger.usage(asked, limits))
    show(
        [
            {
                "limit": answer.limit.name,
                "used": answer.used,
                "most": answer.limit.most,
                "unit": answer.limit.counted.value,
                "resets_at": write_instant(answer.resets_at),
            }
            for answer in answers
        ],
        as_json=as_json,
    )


def conversations(
    user: Annotated[str | None, typer.Option(help="Show only the passes of this user.")] = None,
    limit: Limit = 20,
    as_json: AsJson = False,  # noqa: FBT002
) -> None:
    """Show the latest passes, newest first, and the state of their conversations."""
    rows = [_make_row(issued) for issued in with_ledger(lambda ledger: ledger.list_passes(user_id=user, most=limit))]
    if not as_json:
        rows = [
            {
                "conversation_id": row["conversation_id"],
                "user_id": row["user_id"],
                "issued_at": row["issued_at"].replace("T", " "),  # a narrow terminal breaks the line at a space
                "state": row["state"] + (" mismatch" if row["identity_mismatch"] else ""),
                "seconds": row["seconds"],
            }
            for row in rows
        ]
    show(rows, as_json=as_json)


def export(
    file: Annotated[typer.FileTextWrite, typer.Argument(help="The file to write; - is standard output.")] = "-",  # type: ignore[assignment] # Typer opens it
    export_format: Annotated[ExportFormat, typer.Option("--format", help="CSV, or JSON lines.")] = ExportFormat.CSV,
) -> None:
    """Write every pass of the ledger, oldest first. CSV shows control characters as escapes; no cell is a formula."""

    async def write(ledger: Ledger) -> None:
        writer = csv.writer(file)
        with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task("passes", total=None)
            if export_format is ExportFormat.CSV:
                writer.writerow(_COLUMNS)
            async for issued in ledger.read_every_pass():
                row = _make_row(issued)
                if export_format is ExportFormat.JSONL:
                    file.write(write_json(row) + "\n")
                else:
                    writer.writerow([_make_cell(row[column]) for column in _COLUMNS])
                progress.advance(task)

    with_ledger(write)


_COLUMNS: Final = (
    "issued_at",
    "state",
    *(field.name for field in fields(IssuedPass) if not field.name.endswith("_at")),
    "settled_at",
    "identity_mismatch",
)


def _make_row(issued: IssuedPass) -> dict[str, Any]:
    state = "settled" if issued.settled_at else "open" if issued.granted_at else "reserved"
    return {
        "issued_at": write_instant(issued.reserved_at),
        "state": "unused" if issued.settled_by == "expiry" else state,
        **{name: value for name, value in asdict(issued).items() if not name.endswith("_at")},
        "settled_at": write_instant(issued.settled_at),
        "identity_mismatch": issued.identity_mismatch,
    }


def _make_cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    # A spreadsheet runs text that begins like a formula, and a browser may report any text as the user's id.
    quote = "'" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else ""
    return quote + escape_controls(value)
