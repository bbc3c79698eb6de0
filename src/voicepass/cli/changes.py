"""The commands that change the ledger or copy it: `voicepass block`, `extend`, `forget`, `ledger` and their like."""

import sqlite3
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from voicepass.app import open_provider
from voicepass.cli.failures import fail
from voicepass.cli.tables import AsJson, escape_controls, load_ledger_settings, show, with_ledger, write_instant
from voicepass.config.build import configure, find_sqlite_path
from voicepass.config.environment import SettingsRefusedError
from voicepass.config.settings import Settings, load_settings
from voicepass.errors import RequestInvalid
from voicepass.identity import MAX_USER_ID_CHARACTERS
from voicepass.ledger import Ledger
from voicepass.ledger import extensions as rules
from voicepass.ledger.backups import back_up, lock_file
from voicepass.ledger.forgetting import find_issuers, forget_user, rewrite_file
from voicepass.model import Block, BlockKind, hash_user_id
from voicepass.settlement.retention import erase_conversations

ledger_commands = typer.Typer(no_args_is_help=True, help="Back up the SQLite ledger, or copy it to PostgreSQL.")


def _check_user_id(user_id: str) -> str:
    if not 0 < len(user_id) <= MAX_USER_ID_CHARACTERS:  # a forgotten user has an empty id
        raise typer.BadParameter(f"the id of a user has 1 to {MAX_USER_ID_CHARACTERS} characters")
    return user_id


Key = Annotated[str, typer.Argument(help="The user's id or the agent's alias; nothing for everyone.")]
WordUser = Annotated[Literal["user"], typer.Argument(metavar="user", help="The word user.")]
UserId = Annotated[str, typer.Argument(metavar="ID", help="The user's id.", callback=_check_user_id)]
UsersIssuer = Annotated[str, typer.Option("--issuer", help="The user's issuer, if voicepass has several.")]
OfIssuer = Annotated[str, typer.Option("--issuer", help="Only the user of this issuer.")]
Minutes = Annotated[int | None, typer.Option(min=1, max=rules.MAX_MINUTES, help="More minutes a day and a month.")]
Until = Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="The last day, in UTC.")]
Revoke = Annotated[bool, typer.Option("--revoke", help="End the user's extension now.")]
AtElevenLabs = Annotated[bool, typer.Option("--at-elevenlabs", help="Also delete the conversations at ElevenLabs.")]
Now = Annotated[bool, typer.Option("--now", help="Block the user, and forget open conversations as well.")]


def block(kind: BlockKind, key: Key = "", issuer: OfIssuer = "") -> None:
    """Grant no more passes to a user, for an agent, or to everyone. Works at once, on every instance."""
    blocked = _parse_block(kind, key, issuer)
    if kind is BlockKind.AGENT:
        with suppress(SettingsRefusedError):  # an off switch works without the service's secrets
            aliases = configure(load_settings()).policy.agents
            if key not in aliases:
                raise typer.BadParameter(f"no such agent; name one of: {', '.join(aliases)}", param_hint="KEY")
    with_ledger(lambda ledger: ledger.block(blocked))
    typer.echo(f"blocked: {_describe(blocked)}")


def unblock(kind: BlockKind, key: Key = "", issuer: OfIssuer = "") -> None:
    """Remove a block."""
    blocked = _parse_block(kind, key, issuer)
    was_blocked = with_ledger(lambda ledger: ledger.unblock(blocked))
    typer.echo(f"{'unblocked' if was_blocked else 'was not blocked'}: {_describe(blocked)}")
    for left in with_ledger(Ledger.list_blocks):
        if left.kind == kind and left.key in {key, hash_user_id(key)}:
            remedy = f"add --issuer {left.token_issuer}" if left.token_issuer else "leave out --issuer"
            typer.echo(f"still blocked: {escape_controls(remedy)}", err=True)


def blocks(as_json: AsJson = False) -> None:  # noqa: FBT002
    """Show what is blocked."""
    show([asdict(blocked) for blocked in with_ledger(Ledger.list_blocks)], as_json=as_json)


def extend(
    _kind: WordUser,
    user_id: UserId,
    *,
    issuer: OfIssuer = "",
    minutes: Minutes = None,
    until: Until = None,
    revoke: Revoke = False,
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
    extension = rules.Extension(user_id=user_id, token_issuer=issuer, minutes=minutes, ends_at=ends_at)
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


def forget(
    _kind: WordUser, user_id: UserId, *, issuer: UsersIssuer = "", at_elevenlabs: AtElevenLabs = False, now: Now = False
) -> None:
    """Remove a user from all rows of the ledger; the sums stay. Exits with 1 if something is left to do."""
    settings = load_settings()
    # A mistake in the settings must stop the command before it changes anything.
    configuration = configure(settings) if at_elevenlabs else None

    async def forget_in(ledger: Ledger) -> dict[str, str]:
        token_issuer = issuer or await _find_issuer(ledger, settings, user_id)
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
        if not done.passes:
            typer.echo("no pass of this user is left: the user was forgotten before, or the id is wrong", err=True)
        if now:
            typer.echo(f"blocked: user {escape_controls(user_id)}")
        if configuration is None:
            return {}
        base_urls = {each.agent.agent_id: each.agent.base_url for each in configuration.policy.agents.values()}
        async with AsyncExitStack() as stack:
            provider = await open_provider(stack, settings, configuration)
            return await erase_conversations(ledger, provider, base_urls)

    if left := with_ledger(forget_in):
        reasons = [f"{conversation_id}: {reason}" for conversation_id, reason in left.items()]
        fail(["not deleted at ElevenLabs; run the same command again:", *reasons])


async def _find_issuer(ledger: Ledger, settings: Settings, user_id: str) -> str:
    """Return the only issuer. If there are several, the operator must name one: the id may be of two people."""
    issuers = {*await ledger.run(partial(find_issuers, user_id=user_id))}
    with suppress(SettingsRefusedError):  # the command works without the service's secrets
        issuers |= {trusted.token_issuer for trusted in configure(settings).trusted}
    if len(issuers) > 1:
        raise typer.BadParameter(f"name one of: {', '.join(sorted(issuers))}", param_hint="--issuer")
    return "".join(issuers)


def _parse_block(kind: BlockKind, key: str, issuer: str) -> Block:
    if bool(key) == (kind is BlockKind.EVERYONE) or (issuer and kind is not BlockKind.USER):
        raise typer.BadParameter("name a user or an agent, or nobody with 'everyone'; --issuer is for a user")
    return Block(kind=kind, key=key, token_issuer=issuer)


def _describe(blocked: Block) -> str:
    issuer = f"of {blocked.token_issuer}" if blocked.token_issuer else ""
    return escape_controls(" ".join(filter(None, (blocked.kind.value, blocked.key, issuer))))


@ledger_commands.command()
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


@ledger_commands.command()
def copy(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The SQLite ledger to copy from.")],
) -> None:
    """Copy a SQLite ledger into the empty PostgreSQL of VOICEPASS_DATABASE_URL. Stop voicepass first.

    All rows are copied, or none. If the command is interrupted, run it again.
    """
    settings = load_settings()
    if find_sqlite_path(settings) is not None:
        fail(["VOICEPASS_DATABASE_URL is SQLite: set it to the URL of an empty PostgreSQL database"])

    async def copy_to(target: Ledger) -> None:
        from voicepass.ledger.transfer import copy_rows  # noqa: PLC0415 - PostgreSQL's driver is an extra

        with lock_file(file) as source:
            counts = copy_rows(source, settings.voicepass_database_url)
        if corrections := await target.fix_sums():
            typer.echo(f"corrected {len(corrections)} sums, which were wrong in {file} too", err=True)
        for table, count in counts.items():
            typer.echo(f"{table}: {count} rows")

    # Opening creates the tables. No user waits here, and the sums of a busy hour take longer than a request may.
    with_ledger(copy_to, settings, answer_seconds=600)
