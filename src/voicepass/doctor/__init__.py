"""Why would a conversation fail? Named checks, each with its remedy, in an order in which causes come first.

What the doctor knows is data: `findings.toml` here, and ElevenLabs' codes in `elevenlabs/codes.toml`. The command line
alone uses this package; checks that are cheap enough for every probe are in `api/operators`.
"""

from voicepass.doctor.case import Case, sort_findings
from voicepass.doctor.conversation import try_conversation
from voicepass.doctor.findings import Finding, report
from voicepass.doctor.service import check_service
from voicepass.doctor.workspace import check_workspace, open_adapters, sign_url
from voicepass.model import Credential, Scalar, User

USER_ID = "voicepass-doctor"

_SAMPLES: dict[str | None, Scalar] = {"number": 1, "boolean": True}


async def examine(case: Case) -> list[Finding]:
    """Make every check that is possible; return the findings in order, one at least for each check."""
    findings = await check_service(case)
    async with open_adapters(case) as adapters:
        signed = await sign_url(case, adapters)
        findings += signed.findings
        if signed.reader is not None:
            findings += await check_workspace(case, signed.reader)
    if not case.with_conversation:
        findings.append(report("not_asked"))
    elif signed.credential is not None:
        findings.append(await _try_conversation(case, signed.credential))
    return sort_findings(findings)


async def _try_conversation(case: Case, credential: Credential) -> Finding:
    user = User(issuer="", id=USER_ID, name="voicepass doctor", claims={})
    samples = {name: _SAMPLES.get(variable.type, "doctor") for name, variable in case.rules.variables.items()}
    finding = await try_conversation(
        credential.secret,
        user_id=USER_ID,
        variables=samples | case.configuration.policy.variables_for(user, case.agent),
        overrides=case.overrides,
        origin=next(iter(case.origins), None),
        watch_seconds=case.watch_seconds,
    )
    if finding.cause == "request_refused" and case.agent.selection:
        return report("selection_unknown", check=finding.check, agent=case.agent)
    return finding
