"""`voicepass doctor` on the command line: it exits with 1 if a check failed."""

import asyncio
import json
import re
import shutil
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Final
from urllib.parse import urlsplit

import typer

from voicepass.config.build import Configuration, configure
from voicepass.config.environment import SettingsRefusedError
from voicepass.config.settings import Settings, load_settings
from voicepass.doctor import examine
from voicepass.doctor.case import Case, sort_findings
from voicepass.doctor.explain import explain
from voicepass.doctor.findings import CAUSES, CHECKS, OVERRIDES, Finding, report
from voicepass.elevenlabs.codes import Outcome
from voicepass.model import DEFAULT_ALIAS, Scalar
from voicepass.telemetry.logs import configure_logging

_MARKS: Final = {Outcome.FAILED: "FAIL", Outcome.WARNING: "warn", Outcome.SKIPPED: "skip", Outcome.OK: "ok  "}
_COLOURS: Final = {Outcome.FAILED: "red", Outcome.WARNING: "yellow", Outcome.OK: "green"}
_INDENT: Final = " " * 6
_NARROWEST, _WIDEST = 20, 100

doctor = typer.Typer(
    help="Find out why conversations fail, and say what to do. `explain` tells what a close code or a message means.",
)


@doctor.callback(invoke_without_command=True)
def _examine(
    context: typer.Context,
    *,
    agent: Annotated[str | None, typer.Option(help="The agent's alias; without it, the default one.")] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(help="What your frontend overrides: textOnly, firstMessage, language=de…; repeatable."),
    ] = None,
    origin: Annotated[
        str | None, typer.Option(help="The page's origin; else the first of VOICEPASS_ALLOWED_ORIGINS.")
    ] = None,
    no_conversation: Annotated[
        bool, typer.Option("--no-conversation", help="Skip the conversation at the end, which lasts 5 to 8 s.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make every check, and say what to do; exit 1 if one fails. Warnings do not count."""
    if context.invoked_subcommand is not None:
        return
    configure_logging(log_format="console", level="error")
    overrides = dict(map(_parse_override, override or ()))
    settings, configuration = _read_configuration(as_json=as_json)
    case = Case(
        settings=settings,
        configuration=configuration,
        alias=_choose_alias(agent, configuration),
        overrides=overrides,
        origin=origin,
        with_conversation=not no_conversation,
    )
    if sys.stderr.isatty():
        typer.echo("Asking ElevenLabs; a conversation takes 5 to 8 s…", err=True)
    findings = asyncio.run(examine(case))
    subject = f"agent {case.alias} ({case.agent}) at {urlsplit(case.agent.base_url).netloc}"
    _print_findings(findings, subject, as_json=as_json)
    if any(finding.outcome is Outcome.FAILED for finding in findings):
        raise typer.Exit(1)


def _read_configuration(*, as_json: bool) -> tuple[Settings, Configuration]:
    try:
        settings = load_settings()
        return settings, configure(settings)
    except SettingsRefusedError as error:
        refused = sort_findings(report("settings_refused", problem=problem) for problem in error.problems)
        _print_findings(refused, "the settings", as_json=as_json)
        raise typer.Exit(1) from None


@doctor.command("explain")
def _explain(
    pasted: Annotated[str, typer.Argument(help="A close code, its reason, or both; an error's body; a console line.")],
) -> None:
    """Say what a close code, a reason, an error's body or a console line means; exit 1 if it is not known."""
    finding = explain(sys.stdin.read() if pasted == "-" else pasted)
    if finding is None:
        typer.echo("\n".join(CAUSES["line_unknown"].fill()))
        raise typer.Exit(1)
    for line in _wrap(finding.says):
        typer.echo(line)
    for line in _wrap(f"-> {finding.remedy}"):
        typer.secho(line, bold=True)


def _print_findings(findings: Sequence[Finding], about: str, *, as_json: bool) -> None:
    """Print the failures last, next to the prompt, and all checks that found nothing wrong in one line."""
    failed = {finding.check for finding in findings if finding.outcome is Outcome.FAILED}
    if as_json:
        checks = [{"id": finding.id, "name": finding.check, **asdict(finding)} for finding in findings]
        typer.echo(json.dumps({"status": "failed" if failed else "ok", "about": about, "checks": checks}, indent=2))
        return
    typer.echo(f"{about}\n")
    for group in _group(findings):
        _print_group(group)
    warned = {finding.check for finding in findings if finding.outcome is Outcome.WARNING} - failed
    typer.secho(f"\n{len(failed)} of {len(CHECKS)} checks failed; warnings: {len(warned)}.", bold=True)


def _group(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Group checks that found the same cause, the worst last."""
    groups: defaultdict[tuple[str, int], list[Finding]] = defaultdict(list)
    seen: Counter[str] = Counter()  # two findings of one check and cause differ in their facts: they stay apart
    for finding in sorted(findings, key=lambda finding: list(Outcome).index(finding.outcome), reverse=True):
        groups[finding.cause, seen[finding.id]].append(finding)
        seen[finding.id] += finding.outcome is not Outcome.OK
    return list(groups.values())


def _print_group(group: Sequence[Finding]) -> None:
    outcome = group[0].outcome
    names = ", ".join(finding.check for finding in group)
    says = names if outcome is Outcome.OK else f"{names}: {group[0].says}"
    first, *further = _wrap(says)
    typer.echo(f"{typer.style(_MARKS[outcome], fg=_COLOURS.get(outcome), bold=True)}  {first}")
    for line in further:
        typer.echo(f"{_INDENT}{line}")
    for line in _wrap(f"-> {group[0].remedy}") if group[0].remedy else ():
        typer.secho(f"{_INDENT}{line}", bold=outcome is Outcome.FAILED)


def _wrap(text: str) -> list[str]:
    # Never inside a word: people copy addresses and names of settings.
    width = max(min(shutil.get_terminal_size().columns, _WIDEST) - len(_INDENT), _NARROWEST)
    text = "".join(c if c.isprintable() else " " for c in text)
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _parse_override(given: str) -> tuple[str, Scalar]:
    """Read FIELD or FIELD=VALUE; the field is a path or its last name, as the SDK or the API writes it."""
    name, _, value = given.partition("=")
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip()).lower()
    paths = [path for path in OVERRIDES if snake in {path, path.rpartition(".")[2]}]
    if not paths:
        raise typer.BadParameter(f"no such field; there are: {', '.join(OVERRIDES)}", param_hint="--override")
    sample = OVERRIDES[paths[0]]
    if not value and sample == "":
        raise typer.BadParameter(f"give the value that your frontend sends: {name}=…", param_hint="--override")
    if not value:
        return paths[0], sample
    try:
        number = json.loads(value)
    except ValueError:
        return paths[0], value
    return paths[0], number if isinstance(number, bool | int | float) else value


def _choose_alias(agent: str | None, configuration: Configuration) -> str:
    aliases = list(configuration.policy.agents)
    chosen = agent or (aliases[0] if len(aliases) == 1 else DEFAULT_ALIAS)
    if chosen not in aliases:
        raise typer.BadParameter(f"name one of: {', '.join(aliases)}", param_hint="--agent")
    return chosen
