"""Our own side: what must work here before the doctor asks ElevenLabs anything."""

import time
from collections.abc import Iterator
from pathlib import Path

from voicepass.config.build import find_sqlite_path, open_ledger
from voicepass.doctor.case import Case
from voicepass.doctor.findings import Finding, report, report_ok
from voicepass.errors import KeysUnavailable, LedgerUnavailable
from voicepass.model import DEFAULT_ALIAS


async def check_service(case: Case) -> list[Finding]:
    """Check the policy, the ledger and the keys. The settings are complete, or the doctor would not be here."""
    found = [*_check_access(case), await _check_ledger(case), *await _check_keys(case)]
    return [*map(report_ok, ("settings", "access", "keys")), *found]


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
