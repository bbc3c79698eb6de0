"""What operators change for one user: `voicepass block`, `unblock` and `blocks`, `extend` and `extensions`."""

from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Literal

import typer

from voicepass.cli.tables import AsJson, UserId, escape_controls, show, with_ledger, write_instant
from voicepass.config.build import configure
from voicepass.config.environment import SettingsRefusedError
from voicepass.config.settings import load_settings
from voicepass.errors import RequestInvalid
from voicepass.ledger import extensions as rules
from voicepass.ledger.extensions import MAX_MINUTES, Extension
from voicepass.model import Block, BlockKind, hash_user_id

Key = Annotated[str, typer.Argument(help="The user's id or the agent's alias; nothing for everyone.")]
OfIssuer = Annotated[str, typer.Option("--issuer", help="Only the user of this issuer.")]


def block(kind: BlockKind, key: Key = "", issuer: OfIssuer = "") -> None:
    """Grant no more passes to a user, for an agent, or to everyone. Works at once, on every instance."""
    blocked = _parse_block(kind, key, issuer)
    if kind is BlockKind.AGENT:
        _check_alias(key)
    with_ledger(lambda ledger: ledger.block(blocked))
    typer.echo(f"blocked: {_describe(blocked)}")


def unblock(kind: BlockKind, key: Key = "", issuer: OfIssuer = "") -> None:
    """Remove a block."""
    blocked = _parse_block(kind, key, issuer)
    was_blocked = with_ledger(lambda ledger: ledger.unblock(blocked))
    typer.echo(f"{'unblocked' if was_blocked else 'was not blocked'}: {_describe(blocked)}")
    for left in with_ledger(lambda ledger: ledger.list_blocks()):
        if left.kind == kind and left.key in {key, hash_user_id(key)}:
            remedy = f"add --issuer {left.token_issuer}" if left.token_issuer else "leave out --issuer"
            typer.echo(f"still blocked: {escape_controls(remedy)}", err=True)


def blocks(as_json: AsJson = False) -> None:  # noqa: FBT002
    """Show what is blocked."""
    show([asdict(blocked) for blocked in with_ledger(lambda ledger: ledger.list_blocks())], as_json=as_json)


def extend(
    _kind: Annotated[Literal["user"], typer.Argument(metavar="user", help="The word user.")],
    user_id: UserId,
    *,
    issuer: OfIssuer = "",
    minutes: Annotated[int | None, typer.Option(min=1, max=MAX_MINUTES, help="More minutes a day and a month.")] = None,
    until: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="The last day, in UTC.")] = None,
    revoke: Annotated[bool, typer.Option("--revoke", help="End the user's extension now.")] = False,
) -> None:
    """Give one user more minutes for some time. It replaces an earlier extension of this user."""
    whom = _describe(Block(kind=BlockKind.USER, key=user_id, token_issuer=issuer))
    if revoke:
        had_one = with_ledger(lambda ledger: ledger.run(partial(rules.revoke, user_id=user_id, token_issuer=issuer)))
        typer.echo(f"{'revoked the extension' if had_one else 'there was no extension'} of {whom}")
        return
    if minutes is None or until is None:
        raise typer.BadParameter("give both --minutes and --until, or only --revoke")
    ends_at = until.replace(hour=23, minute=59, second=59, tzinfo=UTC).timestamp()
    extension = Extension(user_id=user_id, token_issuer=issuer, minutes=minutes, ends_at=ends_at)
    try:
        is_known = with_ledger(lambda ledger: ledger.run(partial(rules.extend, extension=extension)))
    except RequestInvalid as refusal:
        raise typer.BadParameter(refusal.detail, param_hint="--until") from None
    typer.echo(f"extended: {whom} by {minutes} minutes until {write_instant(ends_at)}")
    if not is_known:
        typer.echo(f"{whom} has never had a pass: check the id", err=True)


def extensions(as_json: AsJson = False) -> None:  # noqa: FBT002
    """Show the extensions that have not ended."""
    rows = [asdict(extension) for extension in with_ledger(lambda ledger: ledger.run(rules.list_extensions))]
    show([{**row, "ends_at": write_instant(row["ends_at"])} for row in rows], as_json=as_json)


def _parse_block(kind: BlockKind, key: str, issuer: str) -> Block:
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


def _describe(blocked: Block) -> str:
    issuer = f"of {blocked.token_issuer}" if blocked.token_issuer else ""
    return escape_controls(" ".join(part for part in (blocked.kind.value, blocked.key, issuer) if part))
