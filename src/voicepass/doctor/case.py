"""What the doctor examines, and the order of its findings."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from voicepass.config.build import Configuration
from voicepass.config.settings import Settings
from voicepass.doctor.findings import CHECKS, Finding, report
from voicepass.elevenlabs import REGIONS
from voicepass.elevenlabs.codes import Outcome
from voicepass.model import Agent, Scalar
from voicepass.policy import AgentRules

WATCH_SECONDS = 5.0
"""Users saw conversations that an exhausted quota ended after 3 to 5 s."""


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
    watch_seconds: float = WATCH_SECONDS

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
