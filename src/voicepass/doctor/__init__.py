"""Why would a conversation fail? Named checks in the order of what depends on what, each with its remedy.

The knowledge is in tables: `causes` (what can be wrong, and what to do) and `closings` (what is seen, and the cause it
means). Only the command line comes here; what is cheap enough for every probe is in `readiness`.
"""

from voicepass.doctor.case import Case, in_order
from voicepass.doctor.causes import Finding, found
from voicepass.doctor.conversation import converse
from voicepass.doctor.house import own_house
from voicepass.doctor.workspace import adapters, look, mint
from voicepass.model import Credential, Scalar, User

USER_ID = "voicepass-doctor"

_SAMPLES: dict[str | None, Scalar] = {"number": 1, "boolean": True}


async def examine(case: Case) -> list[Finding]:
    """Make every check that can be made; return what was found, in order, one finding at least for each check."""
    findings = await own_house(case)
    async with adapters(case) as one_each:
        minted = await mint(case, one_each)
        findings += minted.findings
        if minted.reader is not None:
            findings += await look(case, minted.reader)
    if not case.with_conversation:
        findings.append(found("not_asked"))
    elif minted.credential is not None:
        findings.append(await _conversation(case, minted.credential))
    return in_order(findings)


async def _conversation(case: Case, credential: Credential) -> Finding:
    user = User(issuer="", id=USER_ID, name="voicepass doctor", claims={})
    samples = {name: _SAMPLES.get(variable.type, "doctor") for name, variable in case.rules.variables.items()}
    return await converse(
        credential.secret,
        user_id=USER_ID,
        variables=samples | case.configuration.policy.variables_for(user, case.agent),
        overrides=case.overrides,
        origin=next(iter(case.origins), None),
        watch_seconds=case.watch_seconds,
    )
