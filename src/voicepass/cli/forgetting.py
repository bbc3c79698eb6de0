"""`voicepass forget`: a user who is to be erased."""

from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Literal

import typer

from voicepass.app import open_provider
from voicepass.cli.failures import fail
from voicepass.cli.tables import UserId, escape_controls, with_ledger
from voicepass.config.build import Configuration, configure, find_sqlite_path
from voicepass.config.environment import SettingsRefusedError
from voicepass.config.settings import Settings, load_settings
from voicepass.ledger import Ledger
from voicepass.ledger.forgetting import find_issuers, forget_user, rewrite_file
from voicepass.model import Block, BlockKind, hash_user_id
from voicepass.settlement.erasing import erase_conversations
from voicepass.telemetry.logs import configure_logging


def forget(
    _kind: Annotated[Literal["user"], typer.Argument(metavar="user", help="The word user.")],
    user_id: UserId,
    *,
    issuer: Annotated[str, typer.Option(help="The user's issuer, if voicepass has several.")] = "",
    at_elevenlabs: Annotated[
        bool, typer.Option("--at-elevenlabs", help="Also delete the user's conversations at ElevenLabs.")
    ] = False,
    now: Annotated[bool, typer.Option("--now", help="Block the user, and forget open conversations as well.")] = False,
) -> None:
    """Remove a user from all rows of the ledger; the sums stay. Exits with 1 if something is left to do."""
    settings = load_settings()
    # A mistake in the settings must stop the command before it changes anything.
    configuration = configure(settings) if at_elevenlabs else None
    configure_logging(log_format="console", level="error")

    async def forget_in(ledger: Ledger) -> dict[str, str]:
        issuers = {issuer} if issuer else await _list_issuers(ledger, settings, user_id)
        if len(issuers) > 1:
            raise typer.BadParameter(f"name one of: {', '.join(sorted(issuers))}", param_hint="--issuer")
        token_issuer = "".join(issuers)
        if now:
            await ledger.block(Block(kind=BlockKind.USER, key=hash_user_id(user_id), token_issuer=token_issuer))
        done = await forget_user(
            ledger, user_id=user_id, token_issuer=token_issuer, even_if_open=now, at_elevenlabs=at_elevenlabs
        )
        if done.open_until is not None:
            until = datetime.fromtimestamp(done.open_until, UTC)
            fail([f"a conversation is open, or may begin, until {until:%H:%M} UTC at the latest: wait, or add --now"])
        if path := find_sqlite_path(settings):
            rewrite_file(path)
        typer.echo(f"forgotten: {done.passes} passes of user {escape_controls(user_id)}")
        if now:
            typer.echo(f"blocked: user {escape_controls(user_id)}")
        return {} if configuration is None else await _erase(ledger, settings, configuration)

    if left := with_ledger(forget_in):
        reasons = [f"{conversation_id}: {reason}" for conversation_id, reason in left.items()]
        fail(["not deleted at ElevenLabs; run the same command again:", *reasons])


async def _list_issuers(ledger: Ledger, settings: Settings, user_id: str) -> set[str]:
    """Return all issuers. If there are several, the operator must name one: the id may be of two people."""
    issuers = {*await ledger.run(partial(find_issuers, user_id=user_id))}
    with suppress(SettingsRefusedError):  # the command works without the service's secrets
        issuers |= {trusted.token_issuer for trusted in configure(settings).trusted}
    return issuers


async def _erase(ledger: Ledger, settings: Settings, configuration: Configuration) -> dict[str, str]:
    base_urls = {rules.agent.agent_id: rules.agent.base_url for rules in configuration.policy.agents.values()}
    async with AsyncExitStack() as stack:
        provider = await open_provider(stack, settings, configuration)
        return await erase_conversations(ledger, provider, base_urls)
