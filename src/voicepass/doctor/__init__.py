"""Why would a conversation fail? Named checks, each with its remedy, in an order in which causes come first.

What the doctor knows is data: `findings.toml` here, and ElevenLabs' codes in `elevenlabs/codes.toml`. The command line
alone uses this package; checks that are cheap enough for every probe are in `api/operators`.
"""

import time
from collections.abc import Iterator
from pathlib import Path

from voicepass.config.build import find_sqlite_path, open_ledger
from voicepass.doctor.conversation import try_conversation
from voicepass.doctor.findings import Case, Finding, report, report_ok, sort_findings
from voicepass.doctor.workspace import check_workspace, open_adapters, sign_url
from voicepass.errors import KeysUnavailable, LedgerUnavailable
from voicepass.model import DEFAULT_ALIAS


async def examine(case: Case) -> list[Finding]:
    """Make every check that is possible; return the findings in order, one at least for each check."""
    # The settings are complete, or there would be no case.
    findings = [*map(report_ok, ("settings", "access", "keys")), *_check_access(case)]
    findings += [await _check_ledger(case), *await _check_keys(case)]
    async with open_adapters(case) as adapters:
        about_url, reader, credential = await sign_url(case, adapters)
        findings += about_url
        if reader is not None:
            findings += await check_workspace(case, reader)
    if not case.with_conversation:
        findings.append(report("not_asked"))
    elif credential is not None:
        findings.append(await try_conversation(case, credential.secret))
    return sort_findings(findings)


def _check_access(case: Case) -> Iterator[Finding]:
    if not case.rules.allow:
        yield report("nobody_allowed", alias=case.alias)
    if DEFAULT_ALIAS not in case.configuration.policy.agents:
        yield report("default_missing")
    if case.origin is not None and case.origin not in case.settings.voicepass_allowed_origins:
        yield report("origin_not_allowed", origin=case.origin)


async def _check_ledger(case: Case) -> Finding:
    path = find_sqlite_path(case.settings)
    if path == ":memory:":
        return report("ledger_in_memory")
    if path and not Path(path).parent.is_dir():
        return report("ledger_folder_missing", folder=Path(path).parent)
    # Opening it would create one, perhaps in the wrong folder.
    if path and not Path(path).exists():  # noqa: ASYNC240 - nobody waits beside the doctor
        return report("ledger_missing")
    try:
        async with open_ledger(case.settings, clock=time.time) as ledger:
            await ledger.check()
            corrections = await ledger.fix_sums()
    except LedgerUnavailable as refusal:
        return report("ledger_unavailable", note=refusal.operator_note)
    return report("sums_corrected", count=str(len(corrections))) if corrections else report_ok("ledger")


async def _check_keys(case: Case) -> list[Finding]:
    findings = []
    for trusted in case.configuration.trusted:
        try:
            await trusted.keys.check()
        except KeysUnavailable as refusal:
            findings.append(report("keys_unavailable", issuer=trusted.token_issuer, note=refusal.operator_note))
    return findings
