"""Our own side: what must be in order here before ElevenLabs is asked anything."""

import time

from voicepass.config.build import is_in_memory, ledger_exists, open_ledger
from voicepass.doctor.case import Case
from voicepass.doctor.causes import Finding, fine, found
from voicepass.errors import KeysUnavailable, LedgerUnavailable


async def own_house(case: Case) -> list[Finding]:
    """Return what was found of the policy, the ledger and the keys; settings that start nothing never come so far."""
    access = fine("access") if case.rules.allow else found("nobody_allowed", alias=case.alias)
    return [fine("settings"), access, await _ledger(case), *(await _keys(case) or [fine("keys")])]


async def _ledger(case: Case) -> Finding:
    if is_in_memory(case.settings):
        return found("ledger_in_memory")
    if not ledger_exists(case.settings):  # to open it would make one, in a folder that may be the wrong one
        return found("ledger_missing")
    try:
        async with open_ledger(case.settings, clock=time.time) as ledger:
            await ledger.check()
            corrections = await ledger.fix_sums()
    except LedgerUnavailable as refusal:
        return found("ledger_unavailable", note=refusal.operator_note)
    return found("sums_corrected", count=str(len(corrections))) if corrections else fine("ledger")


async def _keys(case: Case) -> list[Finding]:
    troubles = []
    for trusted in case.configuration.trusted:
        try:
            await trusted.keys.check()
        except KeysUnavailable as refusal:
            troubles.append(found("keys_unavailable", issuer=trusted.token_issuer, note=refusal.operator_note))
    return troubles
