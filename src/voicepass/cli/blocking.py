"""`voicepass block`, `unblock` and `blocks`: the off switch."""

from dataclasses import asdict
from typing import Annotated

import typer

from voicepass.cli.tables import AsJson, show, with_ledger
from voicepass.config.build import configure
from voicepass.config.environment import SettingsRefusedError
from voicepass.config.settings import load_settings
from voicepass.model import Block, BlockKind

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


def blocks(as_json: AsJson = False) -> None:  # noqa: FBT002
    """Show what is blocked."""
    show([asdict(blocked) for blocked in with_ledger(lambda ledger: ledger.list_blocks())], as_json=as_json)


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
    return " ".join(part for part in (blocked.kind.value, blocked.key, issuer) if part)
