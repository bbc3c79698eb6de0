"""The command line over the ledger: who used what, what was issued to whom, and the off switch."""

import asyncio
import csv
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Final, TypeVar

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from voicepass.config.build import configure, ledger_exists, open_ledger
from voicepass.config.environment import SettingsRefusedError
from voicepass.config.settings import load_settings
from voicepass.errors import LedgerUnavailable
from voicepass.ledger import Ledger
from voicepass.model import Block, BlockKind, IssuedPass, Scope, User
from voicepass.policy import is_visible

Result = TypeVar("Result")

MONTH_SECONDS = 30 * 24 * 60 * 60

AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]
Most = Annotated[int, typer.Option(min=1, max=10_000, help="How many rows at most.")]
Key = Annotated[str, typer.Argument(help="The user's id or the agent's alias; none for everyone.")]
OfIssuer = Annotated[str, typer.Option("--issuer", help="Of a user: only as this issuer names them.")]


class ExportFormat(StrEnum):
    """How an export is written."""

    CSV = "csv"
    JSONL = "jsonl"


def usage(
    user: Annotated[str | None, typer.Option(help="One user: where they stand with each limit.")] = None,
    issuer: Annotated[str | None, typer.Option(help="Their issuer, where several are trusted.")] = None,
    most: Most = 50,
    as_json: AsJson = False,  # noqa: FBT002
) -> None:
    """Show who used most in the last 30 days, or where one user stands."""
    if user is None:
        rows = _with_ledger(lambda ledger: ledger.totals(window_seconds=MONTH_SECONDS, most=most))
        _show([{**row, "minutes": round(row["seconds"] / 60, 1)} for row in rows], as_json=as_json)
        return
    with _explained():
        configuration = configure(load_settings())
    issuers = [trusted.token_issuer for trusted in configuration.trusted]
    if issuer is None and len(issuers) != 1:
        raise typer.BadParameter(f"name one of: {', '.join(issuers)}", param_hint="--issuer")
    limits = [limit for limit in configuration.policy.limits if limit.scope is Scope.USER]
    asked = User(issuer=issuer or issuers[0], id=user, name=None, claims={})
    answers = _with_ledger(lambda ledger: ledger.usage(asked, limits))
    _show(
        [
            {
                "limit": answer.limit.name,
                "used": answer.used,
                "most": answer.limit.most,
                "unit": answer.limit.counted.value,
                "resets_at": _instant(answer.resets_at),
            }
            for answer in answers
        ],
        as_json=as_json,
    )


def conversations(
    user: Annotated[str | None, typer.Option(help="Of one user only.")] = None,
    most: Most = 20,
    as_json: AsJson = False,  # noqa: FBT002
) -> None:
    """Show the latest passes, newest first, and what became of them."""
    passes = _with_ledger(lambda ledger: ledger.listed(user_id=user, most=most))
    rows = [_row(issued) for issued in passes]
    if not as_json:
        columns = ("conversation_id", "user_id", "issued_at", "state", "seconds")
        mismatches = {row["conversation_id"] for row in rows if row["identity_mismatch"]}
        rows = [{name: row[name] for name in columns} for row in rows]
        for row in rows:
            row["issued_at"] = row["issued_at"].replace("T", " ")  # where a narrow terminal breaks it
            row["state"] += " mismatch" if row["conversation_id"] in mismatches else ""
    _show(rows, as_json=as_json)


def export(
    file: Annotated[typer.FileTextWrite, typer.Argument(help="The file to write, or - for standard output.")],
    export_format: Annotated[ExportFormat, typer.Option("--format", help="CSV, or JSON lines.")] = ExportFormat.CSV,
) -> None:
    """Write every pass of the ledger, oldest first. CSV shows control characters as escapes; no cell is a formula."""

    async def write(ledger: Ledger) -> None:
        writer = csv.writer(file)
        with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task("passes", total=None)
            if export_format is ExportFormat.CSV:
                writer.writerow(_COLUMNS)
            async for issued in ledger.every_pass():
                row = _row(issued)
                if export_format is ExportFormat.JSONL:
                    file.write(_json(row) + "\n")
                else:
                    writer.writerow([_harmless(row[column]) for column in _COLUMNS])
                progress.advance(task)

    _with_ledger(write)


def block(kind: BlockKind, key: Key = "", issuer: OfIssuer = "") -> None:
    """Give no more passes to a user, for an agent, or to everyone: at once, on every instance."""
    blocked = _block(kind, key, issuer)
    if kind is BlockKind.AGENT:
        _check_alias(key)
    _with_ledger(lambda ledger: ledger.block(blocked))
    typer.echo(f"blocked: {_named(blocked)}")


def unblock(kind: BlockKind, key: Key = "", issuer: OfIssuer = "") -> None:
    """Take a block back."""
    blocked = _block(kind, key, issuer)

    async def take_back(ledger: Ledger) -> bool:
        was_blocked = blocked in await ledger.blocks()
        await ledger.unblock(blocked)
        return was_blocked

    typer.echo(f"{'unblocked' if _with_ledger(take_back) else 'was not blocked'}: {_named(blocked)}")


def blocks(as_json: AsJson = False) -> None:  # noqa: FBT002
    """Show what is blocked."""
    _show([asdict(blocked) for blocked in _with_ledger(lambda ledger: ledger.blocks())], as_json=as_json)


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for command in (usage, conversations, export, block, unblock, blocks):
        app.command()(command)


def _block(kind: BlockKind, key: str, issuer: str) -> Block:
    if bool(key) == (kind is BlockKind.EVERYONE) or (issuer and kind is not BlockKind.USER):
        raise typer.BadParameter("name a user or an agent, or nobody with 'everyone'; --issuer is for a user")
    return Block(kind=kind, key=key, token_issuer=issuer)


def _check_alias(alias: str) -> None:
    try:
        aliases = configure(load_settings()).policy.agents
    except SettingsRefusedError:  # an off switch works without the service's secrets
        return
    if alias not in aliases:
        raise typer.BadParameter(f"no such agent; name one of: {', '.join(aliases)}", param_hint="KEY")


def _named(blocked: Block) -> str:
    issuer = f"of {blocked.token_issuer}" if blocked.token_issuer else ""
    return " ".join(part for part in (blocked.kind.value, blocked.key, issuer) if part)


def _with_ledger(work: Callable[[Ledger], Awaitable[Result]]) -> Result:
    async def run() -> Result:
        settings = load_settings()
        if not ledger_exists(settings):  # else a block in the wrong folder would make one, and block nobody
            raise LedgerUnavailable(operator_note="there is none; set VOICEPASS_DATABASE_URL as the service has it")
        async with open_ledger(settings, clock=time.time) as ledger:
            return await work(ledger)

    with _explained():
        return asyncio.run(run())


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except SettingsRefusedError as error:
        typer.echo("\n".join(error.problems), err=True)
        raise typer.Exit(1) from None
    except LedgerUnavailable as error:
        typer.echo(f"the ledger does not answer: {error.operator_note}", err=True)
        raise typer.Exit(1) from None


_COLUMNS: Final = (
    "issued_at",
    "state",
    *(field.name for field in fields(IssuedPass) if not field.name.endswith("_at")),
    "settled_at",
    "identity_mismatch",
)


def _row(issued: IssuedPass) -> dict[str, Any]:
    state = "settled" if issued.settled_at else "open" if issued.granted_at else "reserved"
    return {
        "issued_at": _instant(issued.reserved_at),
        "state": "unused" if issued.settled_by == "expiry" else state,
        **{name: value for name, value in asdict(issued).items() if not name.endswith("_at")},
        "settled_at": _instant(issued.settled_at),
        "identity_mismatch": issued.identity_mismatch,
    }


def _instant(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(int(seconds), UTC).isoformat().replace("+00:00", "Z")


def _harmless(value: object) -> object:
    if not isinstance(value, str):
        return value
    # A spreadsheet runs what begins like a formula, and the user whom a browser reports may be any text.
    quote = "'" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else ""
    return quote + _visible(value)


def _visible(text: str) -> str:
    """Replace each character that could steer a terminal with its escape in Python, such as that of ESC."""
    return "".join(char if is_visible(char) else char.encode("unicode_escape").decode() for char in text)


def _json(value: object, *, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent).replace("\x7f", "\\u007f")  # the one control character that it leaves


def _show(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        typer.echo(_json(rows, indent=2))
        return
    if not rows:
        typer.echo("nothing yet")
        return
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for name in rows[0]:
        table.add_column(name, overflow="fold", no_wrap=name == "conversation_id")  # it is there to be copied
    for row in rows:
        table.add_row(*("" if value is None else _visible(str(value)) for value in row.values()))
    Console(markup=False, emoji=False).print(table)  # an id may be anything, markup too
