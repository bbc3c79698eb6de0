"""Our own side: what must work here before the doctor asks ElevenLabs anything."""

import time

from voicepass.config.build import is_in_memory, ledger_exists, open_ledger
from voicepass.doctor.case import Case
from voicepass.doctor.findings import Finding, report, report_ok
from voicepass.errors import KeysUnavailable, LedgerUnavailable


async def check_service(case: Case) -> list[Finding]:
    """Check the policy, the ledger and the keys. The settings are complete, or the doctor would not be here."""
    access = report_ok("access") if case.rules.allow else report("nobody_allowed", alias=case.alias)
    return [report_ok("settings"), access, await _check_ledger(case), *(await _check_keys(case) or [report_ok("keys")])]


async def _check_ledger(case: Case) -> Finding:
    if is_in_memory(case.settings):
        return report("ledger_in_memory")
    if not ledger_exists(case.settings):  # opening it would create one, perhaps in the wrong folder
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
