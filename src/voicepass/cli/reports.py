"""`voicepass usage`, `conversations` and `export`: who used what, and what was issued to whom."""

import csv
import math
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import typer
from rich.console import Console

from voicepass.cli.tables import AsJson, escape_controls, make_cell, show, with_ledger, write_instant, write_json
from voicepass.config.build import configure
from voicepass.config.environment import SettingsRefusedError
from voicepass.config.settings import load_settings
from voicepass.ledger import Ledger
from voicepass.ledger.sums import DAY_SECONDS, list_days
from voicepass.model import IssuedPass, Scope, Usage, User
from voicepass.policy import Policy

_NOBODY: Final = User(issuer="", id="")

MaxRows = Annotated[int, typer.Option("--limit", "--most", min=1, max=10_000, help="The maximum number of rows.")]


def usage(
    *,
    user: Annotated[str | None, typer.Option(help="Show each limit of this user, by their latest plan.")] = None,
    issuer: Annotated[str | None, typer.Option(help="The user's issuer, if voicepass accepts several.")] = None,
    limit: MaxRows = 50,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> None:
    """Show the minutes of the last 30 days and who used most, or how much of each limit one user has used."""
    if user is not None:
        show(_read_limits_of(user, issuer), as_json=as_json, as_csv=as_csv)
    elif as_json or as_csv:
        show(with_ledger(lambda ledger: _read_users(ledger, limit)), as_json=as_json, as_csv=as_csv)
    else:
        with_ledger(lambda ledger: _draw(ledger, limit))


def _read_limits_of(user_id: str, issuer: str | None) -> list[dict[str, Any]]:
    configuration = configure(load_settings())
    issuers = [trusted.token_issuer for trusted in configuration.trusted]
    if issuer is None and len(issuers) != 1:
        raise typer.BadParameter(f"name one of: {', '.join(issuers)}", param_hint="--issuer")
    user = User(issuer=issuer or issuers[0], id=user_id)
    return [
        {
            "limit": answer.limit.name,
            "used": answer.used,
            "most": answer.limit.most,
            "unit": answer.limit.counted.value,
            "resets_at": write_instant(answer.resets_at),
        }
        for answer in with_ledger(lambda ledger: _read_usage(ledger, configuration.policy, Scope.USER, user))
    ]


async def _read_usage(ledger: Ledger, policy: Policy, scope: Scope, user: User, *, alias: str = "") -> list[Usage]:
    """Return what is used of each limit of this scope. A user has the limits of the plan of the user's latest pass."""
    passes = await ledger.list_passes(user_id=user.id, most=50) if policy.plans and user.id else []
    plan = next((issued.plan for issued in passes if issued.token_issuer == user.issuer), None)
    limits = [limit for limit in policy.limits_of(plan) if limit.scope is scope]
    return await ledger.usage(user, limits, agent_alias=alias)


async def _read_users(ledger: Ledger, most: int) -> list[dict[str, Any]]:
    rows = await ledger.sum_usage(window_seconds=30 * DAY_SECONDS, most=most)
    return [
        {**row, "minutes": round(row["seconds"] / 60, 1), "cost_fiat": row["cost_fiat"] and round(row["cost_fiat"], 4)}
        for row in rows
    ]


async def _draw(ledger: Ledger, most: int) -> None:
    """Print the chart, then the agents, then the users of each issuer who used most."""
    policy = Policy({})
    with suppress(SettingsRefusedError):  # a report works without the service's secrets
        policy = configure(load_settings()).policy

    async def find_nearest(scope: Scope, user: User = _NOBODY, *, alias: str = "") -> str:
        """Return the limit of which most is used, such as `84% minutes_per_day`."""
        answers = await _read_usage(ledger, policy, scope, user, alias=alias)
        shares = [(100 * answer.used // max(1, answer.limit.most), answer.limit.name) for answer in answers]
        share, name = max(shares, default=("", ""))
        return f"{share}% {name.partition('_')[2]}" if name else ""

    days = await ledger.run(list_days)
    _draw_days({day["slot"]: day["seconds"] for day in days if day["scope"] == "all"})
    seconds = Counter[str]()
    for day in days:
        seconds[day["scope"]] += day["seconds"]
    rows: list[dict[str, Any]] = []
    for name, used in seconds.most_common():
        scope, _, alias = name.partition(" ")
        nearest = await find_nearest(Scope(scope), alias=alias)
        rows.append({"agent": alias or "all agents", "minutes": round(used / 60, 1), "nearest limit": nearest})
    show(rows)
    users = await _read_users(ledger, most)
    for issuer in dict.fromkeys(row["token_issuer"] for row in users):
        typer.echo(f"\nusers of {escape_controls(issuer)}" if issuer else "\nforgotten users")
        of_issuer = [row for row in users if row["token_issuer"] == issuer]
        for row in of_issuer:
            user = User(issuer=issuer, id=row["user_id"])
            row["nearest limit"] = await find_nearest(Scope.USER, user) if issuer else ""
        columns = ("user_id", "minutes", "cost_fiat", "nearest limit")
        show([{column: row[column] for column in columns} for row in of_issuer])


def _draw_days(seconds: Mapping[int, int]) -> None:
    console = Console(highlight=False)
    block = "█" if console.encoding.startswith("utf") else "#"
    seconds_per_block = max(1, *seconds.values()) / (console.width - 22) if seconds else 1
    console.print("minutes by day (UTC)")
    today = int(time.time() // DAY_SECONDS)
    for day in range(today - 29, today + 1):
        used = seconds.get(day, 0)
        date = datetime.fromtimestamp(day * DAY_SECONDS, UTC).date()
        console.print(f"{date} {used / 60:>9.1f} {block * math.ceil(used / seconds_per_block)}")
    console.print()


def conversations(
    user: Annotated[str | None, typer.Option(help="Show only the passes of this user.")] = None,
    limit: MaxRows = 20,
    as_json: AsJson = False,  # noqa: FBT002
) -> None:
    """Show the latest passes, newest first, and the state of their conversations."""
    rows = [_make_row(issued) for issued in with_ledger(lambda ledger: ledger.list_passes(user_id=user, most=limit))]
    if not as_json:
        for row in rows:
            row["issued_at"] = row["issued_at"].replace("T", " ")  # a narrow terminal breaks the line at a space
            row["state"] += " mismatch" if row["identity_mismatch"] else ""
        rows = [{name: row[name] for name in _SHORT} for row in rows]
    show(rows, as_json=as_json)


def export(
    file: Annotated[typer.FileTextWrite, typer.Argument(help="The file to write; - is standard output.")] = "-",  # type: ignore[assignment] # Typer opens it
    export_format: Annotated[Literal["csv", "jsonl"], typer.Option("--format", help="CSV, or JSON lines.")] = "csv",
) -> None:
    """Write every pass of the ledger, oldest first. CSV shows control characters as escapes; no cell is a formula."""

    async def write(ledger: Ledger) -> None:
        writer = csv.writer(file)
        if export_format == "csv":
            writer.writerow(_COLUMNS)
        async for issued in ledger.read_every_pass():
            row = _make_row(issued)
            if export_format == "jsonl":
                file.write(write_json(row) + "\n")
            else:
                writer.writerow(map(make_cell, row.values()))

    with_ledger(write)


_FIELDS: Final = [field.name for field in fields(IssuedPass) if not field.name.endswith("_at")]
_COLUMNS: Final = ("issued_at", "state", *_FIELDS, "settled_at", "identity_mismatch")
_SHORT: Final = ("conversation_id", "user_id", "issued_at", "state", "seconds")


def _make_row(issued: IssuedPass) -> dict[str, Any]:
    state = "settled" if issued.settled_at else "open" if issued.granted_at else "reserved"
    row = asdict(issued) | {
        "issued_at": write_instant(issued.reserved_at),
        "state": "unused" if issued.settled_by == "expiry" else state,
        "settled_at": write_instant(issued.settled_at),
        "identity_mismatch": issued.identity_mismatch,
    }
    return {column: row[column] for column in _COLUMNS}
