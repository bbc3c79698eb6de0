"""What the doctor examines, and what a check can report.

The texts are data: checks.toml and findings.toml here, codes.toml for ElevenLabs' codes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from voicepass.config.build import Configuration
from voicepass.config.settings import Settings
from voicepass.elevenlabs import REGIONS
from voicepass.elevenlabs.codes import CAUSES as VENDOR_CAUSES
from voicepass.elevenlabs.codes import Cause, Outcome, load_causes, load_table
from voicepass.model import Agent, Scalar
from voicepass.policy import AgentRules

_DATA: Final = load_table("voicepass.doctor", "checks.toml")
AGENT_CHECKS: Final[Mapping[str, str]] = _DATA["checks"]["agent"]
CHECKS: Final[Mapping[str, str]] = {name: text for group in _DATA["checks"].values() for name, text in group.items()}
OVERRIDES: Final[Mapping[str, Scalar]] = _DATA["overrides"]
CAUSES: Final[Mapping[str, Cause]] = {**load_causes("voicepass.doctor", "findings.toml"), **VENDOR_CAUSES}

REFUSED: Final[Mapping[str, Sequence[Mapping[str, str]]]] = load_table("voicepass.doctor", "notes.toml")
"""What voicepass refuses itself, `tokens` and `settings`: each row has a note, what it means, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One agent of a configured service. `overrides`: what the frontend sends, by path; `origin`: of its page.

    `regions` are the hosts that may be the right one for a refused key. The doctor asks them only if the base URL is
    one of them.
    """

    settings: Settings
    configuration: Configuration
    alias: str
    overrides: Mapping[str, Scalar] = field(default_factory=dict)
    origin: str | None = None
    with_conversation: bool = True
    regions: Mapping[str, str] = field(default_factory=lambda: REGIONS)
    watch_seconds: float = 5.0  # users saw conversations that an exhausted quota ended after 3 to 5 s

    @property
    def rules(self) -> AgentRules:
        """Return the policy's rules for the agent."""
        return self.configuration.policy.agents[self.alias]

    @property
    def agent(self) -> Agent:
        """Return the agent."""
        return self.rules.agent

    @property
    def origins(self) -> list[str]:
        """Return the known origins of the pages that open its conversations."""
        return [self.origin] if self.origin is not None else self.settings.voicepass_allowed_origins


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of a check. `cause` names the row of CAUSES; it is empty if nothing is wrong."""

    check: str
    outcome: Outcome = Outcome.OK
    says: str
    remedy: str = ""
    cause: str = ""


def report(name: str, *, check: str | None = None, **facts: object) -> Finding:
    """Return the finding of this cause with these facts; `check` replaces the cause's own."""
    cause = CAUSES[name]
    says, remedy = cause.fill(**facts)
    return Finding(check=check or cause.check, outcome=cause.outcome, says=says, remedy=remedy, cause=name)


def report_ok(check: str) -> Finding:
    """Return that this check found nothing wrong."""
    return Finding(check=check, says=CHECKS[check])


def sort_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Sort by check, without "nothing wrong" where something is.

    A check without a finding was not reached: report it as skipped, with the check that failed.
    """
    findings = list(dict.fromkeys(findings))
    first_failed = next((finding.check for finding in findings if finding.outcome is Outcome.FAILED), "")
    sorted_findings: list[Finding] = []
    for check in CHECKS:
        found = [finding for finding in findings if finding.check == check]
        wrong = [finding for finding in found if finding.cause]
        sorted_findings += wrong or found or [report("not_reached", check=check, first=first_failed)]
    return sorted_findings
