"""`voicepass extend` and `extensions`: more minutes for one user."""

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Literal

import typer

from voicepass.cli.blocking import OfIssuer
from voicepass.cli.tables import AsJson, escape_controls, show, with_ledger, write_instant
from voicepass.errors import RequestInvalid
from voicepass.ledger.extensions import MAX_MINUTES, Extension


def extend(
    kind: Annotated[Literal["user"], typer.Argument(help="Whom to extend.")],
    user_id: Annotated[str, typer.Argument(help="The user's id.")],
    *,
    issuer: OfIssuer = "",
    minutes: Annotated[
        int | None, typer.Option(min=1, max=MAX_MINUTES, help="Minutes to add to each of the user's limits of minutes.")
    ] = None,
    until: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="The last day, in UTC.")] = None,
    revoke: Annotated[bool, typer.Option("--revoke", help="End the user's extension now.")] = False,
) -> None:
    """Give one user more minutes for some time. It replaces an earlier extension of this user."""
    del kind
    whom = escape_controls(f"user {user_id} of {issuer}" if issuer else f"user {user_id}")
    if revoke:
        had_one = with_ledger(lambda ledger: ledger.revoke_extension(user_id, issuer))
        typer.echo(f"{'revoked the extension' if had_one else 'there was no extension'} of {whom}")
        return
    if minutes is None or until is None:
        raise typer.BadParameter("name --minutes and --until, or --revoke")
    ends_at = until.replace(hour=23, minute=59, second=59, tzinfo=UTC).timestamp()
    extension = Extension(user_id=user_id, token_issuer=issuer, minutes=minutes, ends_at=ends_at)
    try:
        is_known = with_ledger(lambda ledger: ledger.extend(extension))
    except RequestInvalid as refusal:
        raise typer.BadParameter(refusal.detail, param_hint="--until") from None
    typer.echo(f"extended: {whom} by {minutes} minutes until {write_instant(ends_at)}")
    if not is_known:
        typer.echo(f"{whom} has never had a pass: check the id", err=True)


def extensions(as_json: AsJson = False) -> None:  # noqa: FBT002
    """Show the extensions that have not ended."""
    rows = [asdict(extension) for extension in with_ledger(lambda ledger: ledger.list_extensions())]
    show([{**row, "ends_at": write_instant(row["ends_at"])} for row in rows], as_json=as_json)
