"""What a check can report. The texts are data: findings.toml here, and codes.toml for ElevenLabs' own codes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from voicepass.elevenlabs.codes import CAUSES as VENDOR_CAUSES
from voicepass.elevenlabs.codes import Cause, Outcome, load_causes

CHECKS: Final[Mapping[str, str]] = {
    "settings": "the settings are complete, safe, and contradict nothing",
    "access": "a rule allows somebody to use the agent",
    "ledger": "the ledger answers",
    "keys": "the keys that verify tokens are available",
    "api_key": "ElevenLabs answers, and accepts the API key",
    "permission": "the key may make signed URLs (`convai_write`)",
    "region": "the host is one of ElevenLabs', and of the key's region",
    "agent": "the agent exists in that workspace",
    "archived": "the agent is not archived",
    "authentication": "nobody can connect without a signed URL",
    "allowlist": "pages that get a pass may connect",
    "shareable_link": "no link avoids voicepass",
    "overrides": "the agent allows what the frontend overrides, and nothing dangerous",
    "variables": "every variable that the agent needs is sent",
    "duration": "conversations may last long enough, and no longer than voicepass reserves",
    "silence": "ElevenLabs hangs up on silence",
    "audio": "the audio formats suit browsers",
    "retention": "voicepass can look up conversations",
    "queue": "no user waits in a silent queue",
    "concurrency": "the agent accepts as many conversations at once as voicepass allows",
    "daily_limit": "the agent accepts as many conversations a day as voicepass allows",
    "bursting": "the agent never exceeds its own limit",
    "webhook": "the post-call webhook exists, leads here, is signed, switched on, and reports minutes",
    "conversation": "a conversation opens and stays open",
}
"""The checks in the order in which the doctor makes them, and what each makes sure of."""

CAUSES: Final[Mapping[str, Cause]] = {**load_causes("voicepass.doctor", "findings.toml"), **VENDOR_CAUSES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of a check. `cause` names the row of CAUSES; it is empty if nothing is wrong."""

    check: str
    outcome: Outcome = Outcome.OK
    says: str
    remedy: str = ""
    cause: str = ""

    @property
    def id(self) -> str:
        """Return the stable name of what was found, for machines."""
        return f"{self.check}.{self.cause or 'ok'}"


def report(name: str, *, check: str | None = None, **facts: object) -> Finding:
    """Return the finding of this cause with these facts; `check` replaces the cause's own."""
    cause = CAUSES[name]
    return Finding(
        check=check or cause.check,
        outcome=cause.outcome,
        says=cause.says.format(**facts),
        remedy=cause.remedy.format(**facts),
        cause=name,
    )


def report_ok(check: str) -> Finding:
    """Return that this check found nothing wrong."""
    return Finding(check=check, says=CHECKS[check])
