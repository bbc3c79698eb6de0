"""`voicepass doctor` on the command line: it exits with 1 if a check failed."""

import asyncio
import json
import re
import shutil
import sys
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Final
from urllib.parse import urlsplit

import typer

from voicepass.config.build import configure
from voicepass.config.environment import SettingsRefusedError
from voicepass.config.settings import load_settings
from voicepass.doctor import examine
from voicepass.doctor.explain import explain
from voicepass.doctor.findings import CAUSES, CHECKS, OVERRIDES, Case, Finding, report, sort_findings
from voicepass.elevenlabs.codes import Outcome
from voicepass.model import DEFAULT_ALIAS, Scalar

_MARKS: Final = {Outcome.FAILED: "FAIL", Outcome.WARNING: "warn", Outcome.SKIPPED: "skip", Outcome.OK: "ok  "}
_COLOURS: Final = {Outcome.FAILED: "red", Outcome.WARNING: "yellow", Outcome.OK: "green"}
_INDENT: Final = " " * 6
_NARROWEST, _WIDEST = 20, 100

Overrides = Annotated[list[str] | None, typer.Option(help="What your frontend overrides: textOnly, language=de…")]
PageOrigin = Annotated[str | None, typer.Option(help="The page's origin; else the first of VOICEPASS_ALLOWED_ORIGINS.")]
NoConversation = Annotated[bool, typer.Option("--no-conversation", help="Skip the conversation, which lasts 5 to 8 s.")]

doctor = typer.Typer(
    help="Find out why conversations fail, and say what to do. `explain` tells what a close code or a message means.",
)


@doctor.callback(invoke_without_command=True)
def _examine(
    context: typer.Context,
    *,
    agent: Annotated[str | None, typer.Option(help="The agent's alias; without it, the default one.")] = None,
    override: Overrides = None,
    origin: PageOrigin = None,
    no_conversation: NoConversation = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make every check, and say what to do; exit 1 if one fails. Warnings do not count."""
    if context.invoked_subcommand is not None:
        return
    overrides = dict(map(_parse_override, override or ()))
    try:
        settings = load_settings()
        configuration = configure(settings)
    except SettingsRefusedError as error:
        refused = sort_findings(report("settings_refused", problem=problem) for problem in error.problems)
        raise typer.Exit(_print_findings(refused, "the settings", as_json=as_json)) from None
    case = Case(
        settings=settings,
        configuration=configuration,
        alias=_choose_alias(agent, list(configuration.policy.agents)),
        overrides=overrides,
        origin=origin,
        with_conversation=not no_conversation,
    )
    if sys.stderr.isatty():
        typer.echo("Asking ElevenLabs; a conversation takes 5 to 8 s…", err=True)
    findings = asyncio.run(examine(case))
    subject = f"agent {case.alias} ({case.agent}) at {urlsplit(case.agent.base_url).netloc}"
    raise typer.Exit(_print_findings(findings, subject, as_json=as_json))


@doctor.command("explain")
def _explain(
    pasted: Annotated[str, typer.Argument(help="A close code, its reason, or both; an error's body; a console line.")],
) -> None:
    """Say what a close code, a reason, an error's body or a console line means; exit 1 if it is not known."""
    finding = explain(sys.stdin.read() if pasted == "-" else pasted)
    if finding is None:
        typer.echo("\n".join(CAUSES["line_unknown"].fill()))
        raise typer.Exit(1)
    typer.echo(_wrap(finding.says))
    typer.secho(_wrap(f"-> {finding.remedy}"), bold=True)


def _print_findings(findings: Sequence[Finding], about: str, *, as_json: bool) -> int:
    """Print the failures last, next to the prompt, and all checks that found nothing wrong in one line.

    Return the exit code.
    """
    failed = {finding.check for finding in findings if finding.outcome is Outcome.FAILED}
    if as_json:
        checks = [{"id": f"{each.check}.{each.cause or 'ok'}", "name": each.check} | asdict(each) for each in findings]
        typer.echo(json.dumps({"status": "failed" if failed else "ok", "about": about, "checks": checks}, indent=2))
        return int(bool(failed))
    groups = defaultdict[tuple[str, str], list[Finding]](list)  # checks that found the same, the worst last
    for finding in sorted(findings, key=lambda finding: list(Outcome).index(finding.outcome), reverse=True):
        groups[finding.cause, finding.says if finding.cause else ""].append(finding)
    typer.echo(f"{about}\n")
    for group in groups.values():
        _print_group(group)
    warned = {finding.check for finding in findings if finding.outcome is Outcome.WARNING} - failed
    typer.secho(f"\n{len(failed)} of {len(CHECKS)} checks failed; warnings: {len(warned)}.", bold=True)
    return int(bool(failed))


def _print_group(group: Sequence[Finding]) -> None:
    outcome, remedy = group[0].outcome, group[0].remedy
    names = ", ".join(finding.check for finding in group)
    text = _wrap(names if outcome is Outcome.OK else f"{names}: {group[0].says}", indent=_INDENT)
    mark = typer.style(_MARKS[outcome], fg=_COLOURS.get(outcome), bold=True)
    typer.echo(f"{mark}  {text.removeprefix(_INDENT)}")
    if remedy:
        typer.secho(_wrap(f"-> {remedy}", indent=_INDENT), bold=outcome is Outcome.FAILED)


def _wrap(text: str, *, indent: str = "") -> str:
    width = max(min(shutil.get_terminal_size().columns, _WIDEST) - len(indent), _NARROWEST)
    printable = "".join(c if c.isprintable() else " " for c in text)
    # Never inside a word: people copy addresses and names of settings.
    lines = textwrap.fill(printable, width, break_long_words=False, break_on_hyphens=False)
    return textwrap.indent(lines, indent)


def _parse_override(given: str) -> tuple[str, Scalar]:
    """Read FIELD or FIELD=VALUE; the field is a path or its last name, as the SDK or the API writes it."""
    name, _, value = given.partition("=")
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip()).lower()
    path = next((path for path in OVERRIDES if snake in {path, path.rpartition(".")[2]}), None)
    if path is None:
        raise typer.BadParameter(f"no such field; there are: {', '.join(OVERRIDES)}", param_hint="--override")
    if not value and OVERRIDES[path] == "":
        raise typer.BadParameter(f"give the value that your frontend sends: {name}=…", param_hint="--override")
    try:
        number = json.loads(value)
    except ValueError:
        return path, value or OVERRIDES[path]
    return path, number if isinstance(number, bool | int | float) else value


def _choose_alias(agent: str | None, aliases: Sequence[str]) -> str:
    chosen = agent or (aliases[0] if len(aliases) == 1 else DEFAULT_ALIAS)
    if chosen not in aliases:
        raise typer.BadParameter(f"name one of: {', '.join(aliases)}", param_hint="--agent")
    return chosen
